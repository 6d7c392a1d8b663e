from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from mtl_lightning.datamodules.base import Split
from mtl_lightning.datamodules.files import DatasetNotFoundError
from mtl_lightning.datamodules.multi_target import MultiTargetDataModule, multi_target_tasks
from mtl_lightning.datamodules.tabular import TableDataset
from mtl_lightning.grouping import AllTogether
from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from tests.datamodules.tables import write_arff

SPLITS: tuple[Split, ...] = ("train", "val", "test")
REAL = Path(__file__).parents[3] / "shared" / "data" / "mulan-mtr"
needs_real_files = pytest.mark.skipif(not REAL.exists(), reason="the Mulan files are not beside the repository")

# rows, features after expansion, targets
COUNTS = {
    "enb": (768, 8, 2),
    "slump": (103, 7, 3),
    "sf1": (323, 33, 3),
    "sf2": (1066, 33, 3),
    "jura": (359, 15, 3),
    "edm": (154, 16, 2),
    "andro": (49, 30, 6),
    "rf1": (9005, 64, 8),
}


def _datamodule(root: Path | None = None, **options: Any) -> MultiTargetDataModule:
    datamodule = MultiTargetDataModule(root=root, **options)
    datamodule.setup()
    return datamodule


def _table(datamodule: MultiTargetDataModule, split: Split) -> TableDataset:
    table = datamodule.datasets[split]
    assert isinstance(table, TableDataset)
    return table


def _targets(table: TableDataset) -> Tensor:
    return torch.cat(list(table.targets.values()), dim=1)


@pytest.fixture
def flares(tmp_path: Path) -> Path:
    """The folder of an ``sf1`` of 60 rows: two nominal features, of which one is missing at times, eight numbers."""
    generator = np.random.default_rng(0)
    header = {"kind": "{A,B, C}", "size": "{1,2}"} | {f"n{index}": "numeric" for index in range(8)}
    header |= {"c-class": "real", "m/class 2.5": "numeric", "x-class": "integer"}
    rows: list[list[object]] = []
    for index in range(60):
        numbers: list[object] = [f"{value:.3f}" for value in generator.normal(100, 5, 8)]
        if index % 10 == 0:
            numbers[3] = "?"
        rows.append(["?" if index % 15 == 0 else "ABC"[index % 3], index % 2 + 1, *numbers, index, 2 * index, 7])
    write_arff(tmp_path / "sf1.arff", header, rows)
    return tmp_path


# The tables


@pytest.mark.parametrize("name", ["enb", "slump", "sf2"])
def test_bundled_tables_are_there(name: Any) -> None:
    datamodule = _datamodule(name=name)
    rows, num_features, num_targets = COUNTS[name]
    assert sum(len(_table(datamodule, split)) for split in SPLITS) == rows
    assert _table(datamodule, "test").features.shape[1] == datamodule.num_features == num_features
    assert len(datamodule.target_names) == num_targets


@needs_real_files
@pytest.mark.parametrize("name", COUNTS)
def test_real_tables_are_read(name: Any) -> None:
    datamodule = _datamodule(REAL, name=name)
    rows, num_features, num_targets = COUNTS[name]
    assert sum(len(_table(datamodule, split)) for split in SPLITS) == rows
    assert datamodule.num_features == num_features
    for split in SPLITS:
        table = _table(datamodule, split)
        assert table.features.isfinite().all()
        assert _targets(table).shape == (len(table), num_targets)


@needs_real_files
def test_targets_of_real_tables_are_the_last_columns() -> None:
    assert _datamodule(REAL, name="jura").target_names == ("Cd", "Co", "Cu")
    assert _datamodule(REAL, name="rf1").target_names[0] == "CHSI2_48H__0"


@pytest.mark.parametrize("name", ["enb", "slump", "sf2"])
def test_the_notes_on_bundled_tables_name_source_and_licence(name: str) -> None:
    from mtl_lightning.datamodules import multi_target

    text = (Path(multi_target.__file__).parent / "tables/README.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"| {name}.arff"))
    assert "10.24432/C5" in line
    assert "CC BY 4.0" in line


# Splits


def test_flares_of_equal_features_are_in_one_split() -> None:
    datamodule = _datamodule(name="sf2")
    sides = [{tuple(row) for row in _table(datamodule, split).features.tolist()} for split in SPLITS]
    assert len(set.union(*sides)) == sum(map(len, sides))


def test_splits_share_the_rows_as_asked() -> None:
    datamodule = _datamodule(name="enb", val_fraction=0.25, test_fraction=0.5)
    assert [len(_table(datamodule, split)) for split in SPLITS] == [192, 192, 384]


def test_without_fractions_all_rows_are_trained_on() -> None:
    datamodule = _datamodule(name="slump", val_fraction=0.0, test_fraction=0.0)
    assert len(_table(datamodule, "train")) == 103
    assert datamodule.val_dataloader() == datamodule.test_dataloader() == []


def test_stored_rows_are_tested_at_the_end(flares: Path) -> None:
    datamodule = _datamodule(flares, name="sf1", split="stored", missing="mean")
    scale = datamodule.target_scales["c-class"]
    target = _table(datamodule, "test").targets["c-class"][:, 0] * scale
    assert torch.allclose(target.diff(), torch.ones(11), atol=1e-4)


# Numbers


def test_training_rows_are_standardised_and_others_likewise() -> None:
    datamodule = _datamodule(name="enb")
    for values in (_table(datamodule, "train").features, _targets(_table(datamodule, "train"))):
        assert values.mean(0).abs().max() < 1e-5
        assert torch.allclose(values.std(0, unbiased=False), torch.ones(values.shape[1]), atol=1e-5)
    assert _targets(_table(datamodule, "test")).mean(0).abs().max() > 1e-3


def test_other_rows_do_not_change_the_scaling(flares: Path) -> None:
    path = flares / "sf1.arff"
    options: dict[str, Any] = {"name": "sf1", "split": "stored", "missing": "mean"}
    before = _datamodule(flares, **options)
    lines = path.read_text().splitlines()
    lines[-1] = "A, 1, " + "9e9, " * 8 + "9e9, 9e9, 9e9"
    path.write_text("\n".join(lines))
    after = _datamodule(flares, **options)
    assert torch.equal(_table(before, "train").features, _table(after, "train").features)
    assert before.target_scales == after.target_scales
    assert not torch.equal(_table(before, "test").features, _table(after, "test").features)


def test_scales_bring_back_the_unit_of_the_target() -> None:
    datamodule = _datamodule(name="enb", split="stored", val_fraction=0.0, test_fraction=0.5)
    stored = datamodule.table.rows[:384, -2:]
    assert list(datamodule.target_scales.values()) == pytest.approx(stored.std(axis=0))


def test_nominal_features_are_columns_of_zero_and_one(flares: Path) -> None:
    datamodule = _datamodule(flares, name="sf1")
    nominal = _table(datamodule, "train").features[:, :5]
    assert datamodule.num_features == 13
    assert set(nominal.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(nominal[:, :3].sum(1), torch.ones(len(nominal)))


def test_rows_with_missing_features_are_dropped_or_kept(flares: Path) -> None:
    for missing, rows in (("drop", 52), ("mean", 60)):
        datamodule = _datamodule(flares, name="sf1", missing=missing)
        assert sum(len(_table(datamodule, split)) for split in SPLITS) == rows


def test_missing_numbers_become_the_mean_of_training_and_missing_kinds_their_shares(flares: Path) -> None:
    datamodule = _datamodule(flares, name="sf1", missing="mean", split="stored")
    features = _table(datamodule, "train").features
    assert features[0, 5 + 3].item() == pytest.approx(0)
    known = [row for row in range(36) if row % 15]
    expected = [sum(row % 3 == kind for row in known) / len(known) for kind in range(3)]
    assert features[0, :3].tolist() == pytest.approx(expected)


def test_a_missing_target_is_a_missing_label(tmp_path: Path) -> None:
    header = {f"f{index}": "numeric" for index in range(8)} | {"Y1": "numeric", "Y2": "numeric"}
    rows = [[*range(index, index + 8), "?" if index % 4 == 0 else index, index] for index in range(20)]
    write_arff(tmp_path / "enb.arff", header, rows)
    datamodule = _datamodule(tmp_path, name="enb")
    targets = torch.cat([_targets(_table(datamodule, split)) for split in SPLITS])
    assert targets.isnan().sum(0).tolist() == [5, 0]


def test_a_constant_target_becomes_zero(flares: Path) -> None:
    datamodule = _datamodule(flares, name="sf1")
    assert _table(datamodule, "test").targets["x-class"].abs().max() == 0
    assert datamodule.target_scales["x-class"] == 1


# Tasks


def test_tasks_keep_the_order_asked_for() -> None:
    datamodule = _datamodule(name="slump", tasks=["Compressive_Strength_Mpa", "SLUMP_cm"])
    _, targets = next(iter(datamodule.val_dataloader()))
    assert list(targets) == list(datamodule.target_names) == ["Compressive_Strength_Mpa", "SLUMP_cm"]
    whole = _table(_datamodule(name="slump"), "train")
    for name, values in _table(datamodule, "train").targets.items():
        assert torch.equal(values, whole.targets[name])


def test_names_of_targets_serve_as_names_of_tasks(flares: Path) -> None:
    names = _datamodule(flares, name="sf1").target_names
    assert names == ("c-class", "m_class_2_5", "x-class")
    assert [task.name for task in multi_target_tasks(names)] == list(names)


def test_batches_have_the_documented_form() -> None:
    inputs, targets = next(iter(_datamodule(name="enb").train_dataloader()))
    assert (inputs.dtype, inputs.shape) == (torch.float32, (32, 8))
    assert {name: (target.dtype, target.shape) for name, target in targets.items()} == {
        "Y1": (torch.float32, (32, 1)),
        "Y2": (torch.float32, (32, 1)),
    }


def test_workers_change_nothing() -> None:
    first, second = (list(_datamodule(name="slump", num_workers=count).train_dataloader()) for count in (0, 2))
    assert all(torch.equal(one[0], two[0]) for one, two in zip(first, second, strict=True))


def test_a_network_learns_the_targets() -> None:
    torch.manual_seed(0)
    datamodule = MultiTargetDataModule(name="enb")
    datamodule.setup()
    tasks = multi_target_tasks(datamodule.target_names, datamodule.target_scales)
    heads: dict[str, nn.Module] = {task.name: nn.Linear(32, 1) for task in tasks}
    network = MultiHeadNetwork(MLP(datamodule.num_features, [32]), heads)
    module = TaskGroupModule(
        network=network, tasks=tasks, optimizer=partial(torch.optim.Adam, lr=1e-2), grouping=AllTogether()
    )
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(accelerator="cpu", max_epochs=20, **quiet)
    trainer.fit(module, datamodule)
    assert trainer.callback_metrics["val_rrmse/Y1"] < 0.4
    assert trainer.callback_metrics["val_absolute_error/Y1"] < 4  # kWh/m2, of a deviation of 10


def test_the_summary_names_sizes_and_tasks() -> None:
    text = _datamodule(name="slump").summary()
    assert "train: 61 samples" in text
    assert "FLOW_cm: (1,) float32" in text


def test_arguments_can_be_given_on_the_command_line() -> None:
    arguments = ["--data.name=sf2", "--data.tasks=[c-class]", "--data.missing=mean"]
    datamodule = LightningCLI(BoringModel, MultiTargetDataModule, args=arguments, run=False).datamodule
    assert (datamodule.table_name, datamodule.target_names, datamodule.missing) == ("sf2", ("c-class",), "mean")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "boston"}, r"`name` should be one of enb, slump.* Found 'boston'"),
        ({"missing": "zero"}, r"`missing` should be one of drop, mean\. Found 'zero'"),
        ({"split": "time"}, r"`split` should be one of grouped, random, stored\. Found 'time'"),
        ({"val_fraction": 1.0}, r"`val_fraction` should be in \[0, 1\)\. Found 1\.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"should leave rows for training\. Found 0\.5 and 0\.5"),
        ({"batch_size": 0}, r"`batch_size` should be at least 1\. Found 0"),
    ],
)
def test_an_argument_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiTargetDataModule(**options)


@pytest.mark.parametrize("tasks", [["Y3"], ["Y1", "Y1"], []])
def test_tasks_that_are_not_targets_are_refused(tasks: list[str]) -> None:
    with pytest.raises(ValueError, match=r"`tasks` should hold at least one of Y1, Y2, each once\. Found \["):
        _datamodule(name="enb", tasks=tasks)


@pytest.mark.parametrize("root", [None, "."])
def test_a_missing_table_is_named_with_address_and_licence(root: str | None, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError) as error:
        _datamodule(None if root is None else tmp_path, name="jura")
    for part in ("`root`", "jura.arff", "https://github.com/tsoumakas/mulan", "none stated"):
        assert part in str(error.value)


def test_another_number_of_columns_is_refused(tmp_path: Path) -> None:
    write_arff(tmp_path / "enb.arff", {"a": "numeric", "Y1": "numeric"}, [[1, 2]])
    with pytest.raises(ValueError, match=r"enb\.arff should have 8 features and 2 targets\. Found 2 attributes"):
        _datamodule(tmp_path, name="enb")


def test_a_nominal_target_is_refused(tmp_path: Path) -> None:
    header = {f"f{index}": "numeric" for index in range(8)} | {"Y1": "numeric", "Y2": "{A}"}
    write_arff(tmp_path / "enb.arff", header, [[*range(9), "A"]])
    with pytest.raises(ValueError, match=r"should have numeric targets\. Found Y2 nominal"):
        _datamodule(tmp_path, name="enb")


def test_scales_before_setup_are_refused() -> None:
    with pytest.raises(RuntimeError, match="`setup` should be called before the scales"):
        _ = MultiTargetDataModule(name="enb").target_scales
