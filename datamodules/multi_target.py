"""Multi-target regression tables of Mulan: many small sets of numbers, one task per target."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from torchmetrics import MetricCollection

from mtl_lightning.datamodules.arff import Attribute, Table, read_arff
from mtl_lightning.datamodules.base import Split, SplitDataModule, check_fraction
from mtl_lightning.datamodules.files import Origin
from mtl_lightning.datamodules.tabular import Floats, Scaling, SplitRule, TableDataset, one_hot, split_rows
from mtl_lightning.datamodules.target_errors import RelativeRootMeanSquaredError, ScaledMeanAbsoluteError
from mtl_lightning.losses import MaskedMSELoss
from mtl_lightning.task import Task

TableName = Literal[
    "enb", "slump", "sf1", "sf2", "jura", "edm", "andro", "rf1", "rf2", "scm1d", "scm20d", "wq",
    "atp1d", "atp7d", "oes97", "oes10",
]  # fmt: skip
_BUNDLED = Path(__file__).parent / "tables"


class TableShape(NamedTuple):
    """How many attributes of a table are features, which come first, and how many are targets."""

    num_features: int
    num_targets: int


class MultiTargetDataModule(SplitDataModule):
    """A multi-target regression table, one task per target.

    A batch is ``(inputs, {target: values})``, float32, of shapes ``(B, F)`` and ``(B, 1)``. Nominal features become one
    column of 0 and 1 per value, which ``num_features`` counts. Numeric features and targets are standardised by mean
    and deviation of the training rows. A missing target is NaN.

    ======= ===== ========== ======= ====================================================================
    name    rows  features   targets content
    ======= ===== ========== ======= ====================================================================
    enb       768   8        2       heating and cooling load of buildings; in the package
    slump     103   7        3       concrete: slump (cm), flow (cm), strength (MPa); in the package
    sf2      1066  10 -> 33  3       solar flares of classes C, M, X; in the package
    sf1       323  10 -> 33  3       the same, of other years
    jura      359  15        3       heavy metals in soil
    edm       154  16        2       electrical discharge machining
    andro      49  30        6       water quality
    rf1      9125  64        8       river flow in two days; 3,264 missing features, 9,005 whole rows
    rf2      9125 576        8       rf1 with precipitation forecasts
    scm1d    9803 280        16      prices in a supply chain, the next day
    scm20d   8966  61        16      the same, in twenty days
    wq       1060  16        14      species in rivers
    atp1d     337 411        6       air fares, the next day
    atp7d     296 411        6       the same, in seven days
    oes97     334 263        16      employment by occupation
    oes10     403 298        16      the same, of 2010
    ======= ===== ========== ======= ====================================================================

    The first eight were read from the files; the other rows are those of the paper and were not checked against files.

    Others than those in the package are looked for as ``root/<name>.arff``, from
    https://github.com/tsoumakas/mulan/tree/master/data/multi-target. Licences: enb, slump, sf1 and sf2 are of the UCI
    repository, CC BY 4.0; of the others none is stated.

    Splits are drawn by seed; the benchmarks have none of their own. Of 1,066 rows of sf2 only 365 differ, and a random
    split would test on rows seen in training: by default rows with equal features are on one side. rf1, rf2, scm1d and
    scm20d are time series, whose neighbours are alike: there, ``split="stored"`` is the honest one.

    Args:
        name: The name of the table.
        root: The folder of the file; None for a table in the package.
        tasks: The names of the targets to learn, in their order; all by default.
        missing: What becomes of rows with missing features: ``"drop"`` leaves them out, ``"mean"`` puts the mean of the
            training rows, and for a nominal feature the shares of its values.
        split: ``"grouped"``, ``"random"`` or ``"stored"``, as in ``split_rows``.
        val_fraction: The share of rows for validation. With 0 there is no such split.
        test_fraction: The share of rows for the test. With 0 there is no such split.
        batch_size: The number of rows per batch and rank.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the splits and of the order of training.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> datamodule = MultiTargetDataModule(name="enb", batch_size=16)
        >>> datamodule.setup()
        >>> inputs, targets = next(iter(datamodule.train_dataloader()))
        >>> inputs.shape, {name: tuple(target.shape) for name, target in targets.items()}
        (torch.Size([16, 8]), {'Y1': (16, 1), 'Y2': (16, 1)})
        >>> tasks = multi_target_tasks(datamodule.target_names, datamodule.target_scales)

    References:
        - Spyromitros-Xioufis, Tsoumakas, Groves, Vlahavas: Multi-target regression via input space expansion: treating
          targets as inputs. Machine Learning 104, 2016. arXiv:1211.6581.
    """

    SHAPES: ClassVar[dict[str, TableShape]] = {
        "enb": TableShape(8, 2),
        "slump": TableShape(7, 3),
        "sf1": TableShape(10, 3),
        "sf2": TableShape(10, 3),
        "jura": TableShape(15, 3),
        "edm": TableShape(16, 2),
        "andro": TableShape(30, 6),
        "rf1": TableShape(64, 8),
        "rf2": TableShape(576, 8),
        "scm1d": TableShape(280, 16),
        "scm20d": TableShape(61, 16),
        "wq": TableShape(16, 14),
        "atp1d": TableShape(411, 6),
        "atp7d": TableShape(411, 6),
        "oes97": TableShape(263, 16),
        "oes10": TableShape(298, 16),
    }

    def __init__(
        self,
        *,
        name: TableName = "enb",
        root: str | Path | None = None,
        tasks: Sequence[str] | None = None,
        missing: Literal["drop", "mean"] = "drop",
        split: SplitRule = "grouped",
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, collate_fn=TableDataset.collate)
        for argument, value, choices in (
            ("name", name, tuple(self.SHAPES)),
            ("missing", missing, ("drop", "mean")),
            ("split", split, get_args(SplitRule)),
        ):
            if value not in choices:
                raise ValueError(f"`{argument}` should be one of {', '.join(choices)}. Found {value!r}.")
        check_fraction("val_fraction", val_fraction)
        check_fraction("test_fraction", test_fraction)
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                "`val_fraction` and `test_fraction` should leave rows for training. "
                f"Found {val_fraction} and {test_fraction}."
            )
        self.table_name = name
        self.root = None if root is None else Path(root).expanduser()
        self.missing = missing
        self.split = split
        self.fractions: dict[Split, float] = {"val": val_fraction, "test": test_fraction}
        self._tasks = None if tasks is None else tuple(tasks)
        self._scales: dict[str, float] = {}

    @property
    def path(self) -> Path:
        """The file of the table."""
        return (_BUNDLED if self.root is None else self.root) / f"{self.table_name}.arff"

    @cached_property
    def table(self) -> Table:
        """The table as it is in the file.

        Raises:
            DatasetNotFoundError: If there is no such file.
            ValueError: If it is damaged, or has another number of columns.
        """
        if not self.path.is_file():
            found = f"Found no {self.path}" if self.root else f"Found no table {self.table_name!r} in the package"
            raise Origin(
                f"The table {self.table_name}",
                "https://github.com/tsoumakas/mulan/tree/master/data/multi-target",
                f"root/{self.table_name}.arff",
                "CC BY 4.0 (enb, slump, sf1, sf2), none stated (others)",
            ).not_found(f"{found}; pass its folder as `root`")
        table = read_arff(self.path)
        shape = self.SHAPES[self.table_name]
        if len(table.attributes) != sum(shape):
            raise ValueError(
                f"{self.path} should have {shape.num_features} features and {shape.num_targets} targets. "
                f"Found {len(table.attributes)} attributes. Fetch it again."
            )
        nominal = [attribute.name for attribute in self._target_attributes(table) if attribute.values is not None]
        if nominal:
            raise ValueError(f"{self.path} should have numeric targets. Found {', '.join(nominal)} nominal.")
        return table

    @cached_property
    def num_features(self) -> int:
        """The number ``F`` of inputs of a network."""
        features = self.table.attributes[: self.SHAPES[self.table_name].num_features]
        return sum(1 if attribute.values is None else len(attribute.values) for attribute in features)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names of the tasks; characters that names of tasks cannot hold are underscores.

        Raises:
            ValueError: If ``tasks`` holds a name that is not that of a target, or one twice, or none.
        """
        names = self._all_targets()
        if self._tasks is None:
            return names
        if not self._tasks or len(set(self._tasks)) < len(self._tasks) or not set(self._tasks) <= set(names):
            raise ValueError(
                f"`tasks` should hold at least one of {', '.join(names)}, each once. Found {list(self._tasks)}."
            )
        return self._tasks

    @property
    def target_scales(self) -> dict[str, float]:
        """The standard deviation of each target over the training rows, by name.

        Raises:
            RuntimeError: If ``setup`` has not been called.
        """
        if not self._scales:
            raise RuntimeError("`setup` should be called before the scales are asked for, as they depend on the split.")
        return dict(self._scales)

    def setup(self, stage: str | None = None) -> None:
        """Read the table, split and standardise it.

        Raises:
            DatasetNotFoundError: If there is no file.
            ValueError: If it is damaged, a task is not known, or too few rows are left.
        """
        names = self.target_names
        features, is_numeric, targets = self._columns()
        if self.missing == "drop":
            whole = ~np.isnan(features).any(axis=1)
            features, targets = features[whole], targets[whole]
        rows = split_rows(features, self.fractions, self.split, self.generator("split"))
        train = rows["train"]
        scaling = Scaling.of(features[train])
        features = np.where(np.isnan(features), scaling.mean, features)
        features = np.where(is_numeric, scaling.apply(features), features)
        target_scaling = Scaling.of(targets[train])
        targets = target_scaling.apply(targets)
        columns = [self._all_targets().index(name) for name in names]
        self._scales = {name: float(target_scaling.std[column]) for name, column in zip(names, columns, strict=True)}
        splits: tuple[Split, ...] = ("train", "val", "test")
        for split in splits:
            self.datasets[split] = (
                TableDataset(features[rows[split]], targets[np.ix_(rows[split], np.array(columns))], names)
                if split in rows
                else None
            )

    def _target_attributes(self, table: Table) -> Sequence[Attribute]:
        return table.attributes[self.SHAPES[self.table_name].num_features :]

    def _all_targets(self) -> tuple[str, ...]:
        return tuple(re.sub(r"[\s/.]", "_", attribute.name) for attribute in self._target_attributes(self.table))

    def _columns(self) -> tuple[Floats, npt.NDArray[np.bool_], Floats]:
        """Return the features with nominal ones expanded, which of them are numeric, and the targets."""
        num_features = self.SHAPES[self.table_name].num_features
        blocks, is_numeric = [], []
        for column, attribute in enumerate(self.table.attributes[:num_features]):
            values = self.table.rows[:, column]
            blocks.append(values[:, None] if attribute.values is None else one_hot(values, len(attribute.values)))
            is_numeric += [attribute.values is None] * blocks[-1].shape[1]
        return np.concatenate(blocks, axis=1), np.array(is_numeric), self.table.rows[:, num_features:]


def multi_target_tasks(names: Sequence[str], scales: Mapping[str, float] | None = None) -> list[Task]:
    """Return one regression task per target, of standardised numbers of shape ``(B, 1)``.

    The loss is the mean squared error. Metrics, to be minimised, are ``rrmse``, 1 for the best constant, and, with
    ``scales``, ``absolute_error`` in the unit of the target.

    Args:
        names: The names of the targets.
        scales: The standard deviation of each target, by name.

    Example:
        >>> [(task.name, list(task.metrics)) for task in multi_target_tasks(["Y1"], {"Y1": 10.1})]
        [('Y1', ['absolute_error', 'rrmse'])]
    """
    tasks = []
    for name in names:
        metrics: dict[str, RelativeRootMeanSquaredError | ScaledMeanAbsoluteError] = {
            "rrmse": RelativeRootMeanSquaredError()
        }
        if scales is not None:
            metrics["absolute_error"] = ScaledMeanAbsoluteError(scales[name])
        tasks.append(Task(name, MaskedMSELoss(), MetricCollection(dict(metrics))))
    return tasks
