"""SARCOS: the torques of a robot arm's seven joints from their positions, velocities and accelerations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mtl_lightning.datamodules.base import Split, SplitDataModule, check_fraction
from mtl_lightning.datamodules.files import BrokenFileError, Origin, read_mat, read_numpy
from mtl_lightning.datamodules.tabular import Floats, Scaling, TableDataset, split_rows

_ORIGIN = Origin(
    "SARCOS",
    "http://www.gaussianprocess.org/gpml/data/",
    "root/sarcos_inv.mat and root/sarcos_inv_test.mat\n"
    "or the same tables, 28 columns, as .npy or as .csv without a header",
    "not stated",
)


class SarcosDataModule(SplitDataModule):
    """Inverse dynamics of a SARCOS arm: 21 inputs, and the torques of seven joints as tasks ``torque_1`` to ``_7``.

    A batch is ``(inputs, {task: torques})``, float32, of shapes ``(B, 21)`` and ``(B, 1)``, standardised by mean and
    deviation of the training rows. Tasks with losses and metrics are those of ``multi_target_tasks``.

    ``prepare_data`` turns the MATLAB files into ``.npy`` beside them, if the folder can be written to; from then on
    scipy is not needed. The following is as generally described, and was not checked against the files: 44,484 training
    rows in the variable ``sarcos_inv`` and 4,449 test rows in ``sarcos_inv_test``, of which nearly all are among the
    training rows as well. Training rows that equal a test row are therefore left out by default.

    Args:
        root: The folder of the files.
        tasks: The names of the torques to learn, in their order; all by default.
        exclude_test_rows: Whether rows of the training file that are in the test file, too, are left out.
        val_fraction: The share of training rows for validation. With 0 there is no such split.
        batch_size: The number of rows per batch and rank.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the validation rows and of the order of training.

    Attributes:
        num_excluded: How many training rows were left out; None before ``setup``.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        - Vijayakumar, Schaal: Locally Weighted Projection Regression. 2000.
        - Rasmussen, Williams: Gaussian Processes for Machine Learning. 2006. Section 2.5.
    """

    NUM_FEATURES = 21
    TASKS: ClassVar[tuple[str, ...]] = tuple(f"torque_{joint}" for joint in range(1, 8))
    FILES: ClassVar[dict[str, str]] = {"train": "sarcos_inv", "test": "sarcos_inv_test"}

    def __init__(
        self,
        *,
        root: str | Path = "data/sarcos",
        tasks: Sequence[str] | None = None,
        exclude_test_rows: bool = True,
        val_fraction: float = 0.1,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, collate_fn=TableDataset.collate)
        check_fraction("val_fraction", val_fraction)
        self.tasks = self.TASKS if tasks is None else tuple(tasks)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or not set(self.tasks) <= set(self.TASKS):
            raise ValueError(
                f"`tasks` should hold at least one of {', '.join(self.TASKS)}, each once. Found {list(self.tasks)}."
            )
        self.root = Path(root).expanduser()
        self.exclude_test_rows = exclude_test_rows
        self.val_fraction = val_fraction
        self.num_excluded: int | None = None
        self._scales: dict[str, float] = {}

    @property
    def target_scales(self) -> dict[str, float]:
        """The standard deviation of each torque over the training rows, by task.

        Raises:
            RuntimeError: If ``setup`` has not been called.
        """
        if not self._scales:
            raise RuntimeError("`setup` should be called before the scales are asked for, as they depend on the split.")
        return dict(self._scales)

    def prepare_data(self) -> None:
        """Write the tables of the MATLAB files as ``.npy``, unless they are there or the folder is read-only.

        Raises:
            ValueError: If a file is damaged.
        """
        for stem in self.FILES.values():
            source, target = self.root / f"{stem}.mat", self.root / f"{stem}.npy"
            if source.is_file() and not target.exists() and os.access(self.root, os.W_OK):
                part = self.root / f".{stem}-{os.getpid()}.npy"
                try:
                    np.save(part, _checked(source, read_mat(source, stem)))
                    os.replace(part, target)
                finally:
                    part.unlink(missing_ok=True)

    def setup(self, stage: str | None = None) -> None:
        """Read, split and standardise the tables.

        Raises:
            DatasetNotFoundError: If files are missing.
            ValueError: If a file is damaged.
        """
        # Both files for every stage: the test rows decide which rows are trained on, and those the scales of the test.
        tables = {name: self._read(stem) for name, stem in self.FILES.items()}
        train, test = tables["train"], tables["test"]
        if self.exclude_test_rows:
            seen = {row.tobytes() for row in test}
            fresh = np.array([row.tobytes() not in seen for row in train])
            self.num_excluded = int((~fresh).sum())
            train = train[fresh]
        else:
            self.num_excluded = 0
        rows = split_rows(train, {"val": self.val_fraction, "test": 0.0}, "grouped", self.generator("split"))
        scaling = Scaling.of(train[rows["train"]])
        columns = [self.NUM_FEATURES + self.TASKS.index(task) for task in self.tasks]
        self._scales = {task: float(scaling.std[column]) for task, column in zip(self.tasks, columns, strict=True)}
        parts: dict[Split, Floats | None] = {
            "train": train[rows["train"]],
            "val": train[rows["val"]] if "val" in rows else None,
            "test": test,
        }
        for split, part in parts.items():
            if part is None:
                self.datasets[split] = None
                continue
            scaled = scaling.apply(part)
            self.datasets[split] = TableDataset(scaled[:, : self.NUM_FEATURES], scaled[:, columns], self.tasks)

    def summary(self, num_samples: int = 32) -> str:
        """Return what ``SplitDataModule.summary`` tells, and how many training rows were left out.

        Args:
            num_samples: How many samples of each split are read.

        Raises:
            RuntimeError: If ``setup`` has not been called.
        """
        return f"{super().summary(num_samples)}\n{self.num_excluded} training rows left out that are in the test file"

    def _read(self, stem: str) -> Floats:
        array, table, matlab = self._places(stem)
        if array.is_file():
            return _checked(array, read_numpy(array))
        if table.is_file():
            try:
                return _checked(table, np.loadtxt(table, delimiter=",", ndmin=2))
            except ValueError as error:
                raise BrokenFileError.of(table, "numbers separated by commas", str(error)) from error
        if matlab.is_file():
            return _checked(matlab, read_mat(matlab, stem))
        missing = [f"{stem}.npy" for stem in self.FILES.values() if not any(map(Path.is_file, self._places(stem)))]
        raise _ORIGIN.not_found(f"Found none of {', '.join(map(str, self._places(stem)))}", missing)

    def _places(self, stem: str) -> tuple[Path, Path, Path]:
        return self.root / f"{stem}.npy", self.root / f"{stem}.csv", self.root / f"{stem}.mat"


def _checked(path: Path, table: npt.NDArray[Any]) -> Floats:
    columns = SarcosDataModule.NUM_FEATURES + len(SarcosDataModule.TASKS)
    if table.ndim != 2 or table.shape[1] != columns or not len(table):
        raise BrokenFileError.of(path, f"a table of {columns} columns", f"shape {table.shape}")
    table = np.ascontiguousarray(table, dtype=np.float64)
    if not np.isfinite(table).all():
        raise BrokenFileError.of(path, "finite numbers", f"{int((~np.isfinite(table)).sum())} others")
    return table
