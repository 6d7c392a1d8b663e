from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lightning.datamodules.files import BrokenFileError, DatasetNotFoundError
from mtl_lightning.datamodules.sarcos import SarcosDataModule
from mtl_lightning.datamodules.tabular import TableDataset
from tests.datamodules.tables import write_sarcos

RNG = np.random.default_rng(0)
TRAIN, OTHER = RNG.normal(3, 2, (40, 28)), RNG.normal(3, 2, (5, 28))
TEST = np.concatenate([TRAIN[::10], OTHER])


def _datamodule(root: Path, **options: Any) -> SarcosDataModule:
    datamodule = SarcosDataModule(root=root, **options)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def _table(datamodule: SarcosDataModule, split: Any) -> TableDataset:
    table = datamodule.datasets[split]
    assert isinstance(table, TableDataset)
    return table


@pytest.mark.parametrize("form", ["mat", "npy", "csv"])
def test_the_forms_hold_the_same(tmp_path: Path, form: str) -> None:
    datamodule = _datamodule(write_sarcos(tmp_path, TRAIN, TEST, form), exclude_test_rows=False, val_fraction=0.0)
    table = _table(datamodule, "train")
    expected = torch.tensor((TRAIN - TRAIN.mean(0)) / TRAIN.std(0)).float()
    assert torch.allclose(table.features, expected[:, :21])
    assert torch.allclose(table.targets["torque_7"], expected[:, 27:])
    assert datamodule.target_scales["torque_7"] == pytest.approx(TRAIN.std(0)[27])


def test_rows_of_the_test_file_are_not_trained_on(tmp_path: Path) -> None:
    datamodule = _datamodule(write_sarcos(tmp_path, TRAIN, TEST), val_fraction=0.25)
    assert [len(_table(datamodule, split)) for split in ("train", "val", "test")] == [27, 9, 9]
    assert datamodule.num_excluded == 4
    sides = [{tuple(row) for row in _table(datamodule, split).features.tolist()} for split in ("train", "val", "test")]
    assert len(set.union(*sides)) == 45


def test_tasks_keep_the_order_asked_for(tmp_path: Path) -> None:
    datamodule = _datamodule(write_sarcos(tmp_path, TRAIN, TEST), tasks=["torque_3", "torque_1"], batch_size=4)
    inputs, targets = next(iter(datamodule.train_dataloader()))
    assert inputs.shape == (4, 21)
    assert {name: target.shape for name, target in targets.items()} == {"torque_3": (4, 1), "torque_1": (4, 1)}


def test_the_summary_says_how_many_rows_were_left_out(tmp_path: Path) -> None:
    assert "4 training rows left out" in _datamodule(write_sarcos(tmp_path, TRAIN, TEST)).summary()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"Missing: sarcos_inv\.npy, sarcos_inv_test\.npy \(2 in all\)"):
        _datamodule(tmp_path)


def test_matlab_files_are_read_where_nothing_could_be_written(tmp_path: Path) -> None:
    datamodule = SarcosDataModule(root=write_sarcos(tmp_path, TRAIN, TEST))
    datamodule.setup()
    prepared = _datamodule(tmp_path)
    assert torch.equal(_table(datamodule, "train").features, _table(prepared, "train").features)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_root_is_left_as_it_is(tmp_path: Path) -> None:
    root = write_sarcos(tmp_path, TRAIN, TEST)
    root.chmod(0o555)
    try:
        assert len(_table(_datamodule(root), "test")) == len(TEST)
    finally:
        root.chmod(0o755)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TRAIN[:, :27], r"a table of 28 columns\. Found shape \(40, 27\)"),
        (np.where(np.arange(28) == 3, np.nan, TRAIN), r"finite numbers\. Found 40 others"),
    ],
)
def test_another_table_is_refused(tmp_path: Path, table: Any, message: str) -> None:
    with pytest.raises(BrokenFileError, match=message):
        _datamodule(write_sarcos(tmp_path, table, TEST))


def test_an_unknown_torque_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one of torque_1, .* Found \['torque_8'\]"):
        SarcosDataModule(tasks=["torque_8"])
