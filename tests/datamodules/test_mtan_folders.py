from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from mtl_lightning.datamodules.dense import Folder
from mtl_lightning.datamodules.dense_labels import read_depth
from mtl_lightning.datamodules.files import DatasetNotFoundError, Origin
from mtl_lightning.datamodules.mtan_folders import numbered_samples

ORIGIN = Origin("Toy", "https://example.org", "root/*", "CC0")


def _files(root: Path, numbers: dict[str, list[int]]) -> dict[str, Folder]:
    for field, present in numbers.items():
        (root / field).mkdir(parents=True, exist_ok=True)
        for number in present:
            (root / field / f"{number}.npy").touch()
    return {field: Folder(root / field, ".npy", read_depth) for field in numbers}


def test_samples_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    files = _files(tmp_path, {"image": list(range(12))})
    assert numbered_samples(tmp_path, ".", files, 12, ORIGIN) == [str(number) for number in range(12)]


def test_gaps_and_what_only_one_field_has_are_samples(tmp_path: Path) -> None:
    files = _files(tmp_path, {"image": [0, 2], "depth": [0, 3]})
    assert numbered_samples(tmp_path, ".", files, 4, ORIGIN) == ["0", "1", "2", "3"]


def test_another_number_of_samples_than_published_is_said(tmp_path: Path) -> None:
    files = _files(tmp_path, {"image": [0, 1]})
    with pytest.warns(UserWarning, match="holds 2 samples where Toy has 795"):
        numbered_samples(tmp_path, ".", files, 795, ORIGIN)


def test_nothing_is_said_about_a_whole_set(tmp_path: Path) -> None:
    files = _files(tmp_path, {"image": [0, 1]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbered_samples(tmp_path, ".", files, 2, ORIGIN)


def test_folders_without_numbered_files_are_an_error(tmp_path: Path) -> None:
    files = _files(tmp_path, {"image": []})
    with pytest.raises(DatasetNotFoundError, match=r"Found no numbered files in train/"):
        numbered_samples(tmp_path, "train", files, 2, ORIGIN)
