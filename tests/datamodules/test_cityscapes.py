from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_lightning.datamodules.cityscapes import (
    CityscapesDataModule,
    cityscapes_baselines,
    cityscapes_tasks,
    read_disparity,
    read_label_ids,
    read_parts,
)
from mtl_lightning.datamodules.dense import DenseDataset
from mtl_lightning.datamodules.files import BrokenFileError
from mtl_lightning.modules.evaluation import named_metrics
from tests.datamodules.layouts import (
    FIRST_TEST,
    disparity,
    hole,
    part_ids,
    scene,
    write_cityscapes_arrays,
    write_cityscapes_pictures,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*samples where")
THREE = ("segmentation", "depth", "part_segmentation")


def _dataset(root: Path, split: Any = "test", **options: Any) -> DenseDataset:
    datamodule = CityscapesDataModule(root=root, **options)
    datamodule.setup()
    dataset = datamodule.datasets[split]
    assert isinstance(dataset, DenseDataset)
    return dataset


@pytest.mark.parametrize(
    ("folder", "num_classes"), [("label_7", 7), ("label", 7), ("label_19", 19), ("label", 19), ("label_2", 2)]
)
def test_folders_of_labels_have_several_names(tmp_path: Path, folder: str, num_classes: Literal[2, 7, 19]) -> None:
    write_cityscapes_arrays(tmp_path, train=1, test=2, label=folder)
    for index in (0, 1):
        path = tmp_path / "val" / folder / f"{index}.npy"
        np.save(path, np.where(np.load(path) < 0, -1, np.load(path) % num_classes))
    for index, (image, labels) in enumerate(_dataset(tmp_path, num_classes=num_classes)):
        maps = scene(FIRST_TEST + index)
        assert torch.equal(image, torch.from_numpy(maps["image"].copy()).permute(2, 0, 1))
        expected = hole(maps["semseg"] % 7 % num_classes, -1)
        assert torch.equal(labels["segmentation"], torch.from_numpy(expected))
        depth = torch.from_numpy(hole(disparity(FIRST_TEST + index), np.nan)).permute(2, 0, 1)
        torch.testing.assert_close(labels["depth"], depth, equal_nan=True)


def test_the_folder_of_the_asked_classes_goes_before_the_others(tmp_path: Path) -> None:
    for folder in ("label", "label_19", "label_7"):
        write_cityscapes_arrays(tmp_path, train=1, test=1, label=folder)
    for num_classes in (7, 19):
        files = _dataset(tmp_path, num_classes=num_classes).files["segmentation"]
        assert files.path("0").parent.name == f"label_{num_classes}"


def test_the_form_of_three_tasks_is_read(tmp_path: Path) -> None:
    write_cityscapes_pictures(tmp_path, train=1, test=3)
    for index, (image, labels) in enumerate(_dataset(tmp_path, num_classes=19, tasks=THREE)):
        maps = scene(FIRST_TEST + index)
        torch.testing.assert_close(image, torch.from_numpy(maps["image"].copy()).permute(2, 0, 1))
        assert torch.equal(labels["segmentation"], torch.from_numpy(hole(maps["semseg"], -1)))
        stored = torch.from_numpy(hole(disparity(FIRST_TEST + index), np.nan)).permute(2, 0, 1)
        torch.testing.assert_close(labels["depth"], stored, equal_nan=True, atol=0.5 / 1024 + 1e-6, rtol=0)


def test_disparity_of_16_bits_is_shifted_by_one(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 1025, 65535]], np.uint16)).save(tmp_path / "a.png")
    expected = torch.tensor([[[torch.nan, torch.nan, 1.0, 65534 / 1024]]])
    torch.testing.assert_close(read_disparity(tmp_path / "a.png"), expected, equal_nan=True)


def test_label_ids_become_nineteen_classes(tmp_path: Path) -> None:
    Image.fromarray(np.arange(34, dtype=np.uint8)[None]).save(tmp_path / "a.png")
    classes = read_label_ids(tmp_path / "a.png")[0]
    known = (classes >= 0).nonzero().flatten()
    assert classes[known].tolist() == list(range(19))
    assert known[[0, -1]].tolist() == [7, 33]
    # Those that Cityscapes leaves out of its evaluation.
    assert set(range(34)) - set(known.tolist()) == {0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30}


def test_label_ids_out_of_range_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.array([[7, 34]], np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(BrokenFileError, match="should hold classes from 0 to 33"):
        read_label_ids(tmp_path / "a.png")


def _reference_parts(number: int) -> int:
    digits = str(number)
    if len(digits) < 6:
        return 0
    label, part = int(digits[:-5]), int(digits[-2:])
    if label in (24, 25):
        return part
    return 4 + part if label in (26, 27, 28) and part else 0


def test_parts_are_read_digit_by_digit(tmp_path: Path) -> None:
    numbers = part_ids(scene(0)["semseg"])
    Image.fromarray(numbers).save(tmp_path / "a.tif")
    expected = [[_reference_parts(number) for number in row] for row in numbers.tolist()]
    assert read_parts(tmp_path / "a.tif").tolist() == expected


def test_parts_of_every_kind_have_a_class(tmp_path: Path) -> None:
    ids = [7, 24, 24_005, 2_400_500, 2_400_501, 2_500_504, 2_600_101, 2_799_905, 2_800_100, 3_300_101]
    Image.fromarray(np.array([ids], np.int32)).save(tmp_path / "a.tif")
    assert read_parts(tmp_path / "a.tif").tolist() == [[0, 0, 0, 0, 1, 4, 5, 9, 0, 0]]


def test_disparity_is_multiplied_when_things_come_nearer(tmp_path: Path) -> None:
    # Dividing it, as depth, is the reverse of what the camera sees.
    write_cityscapes_arrays(tmp_path, train=1, test=1)
    for path in (tmp_path / "train" / "depth").iterdir():
        np.save(path, np.full_like(np.load(path), 0.2))
    dataset = _dataset(tmp_path, "train", tasks=["depth"], augment=True, val_fraction=0.0)
    seen = {round(float(value), 3) for epoch in range(40) for value in dataset[epoch][1]["depth"].flatten()}
    assert min(seen) == 0.2
    assert max(seen) == pytest.approx(0.3, abs=0.01)


def test_the_form_of_mtan_has_no_parts(tmp_path: Path) -> None:
    write_cityscapes_arrays(tmp_path, train=1, test=1)
    with pytest.raises(ValueError, match="`tasks` should be among segmentation and depth in the form of MTAN"):
        _dataset(tmp_path, tasks=THREE)


def test_the_form_of_three_tasks_has_nineteen_classes(tmp_path: Path) -> None:
    write_cityscapes_pictures(tmp_path, train=1, test=1)
    with pytest.raises(ValueError, match=r"`num_classes` should be 19 in the form of Auto-Lambda.* Found 7"):
        _dataset(tmp_path)


@pytest.mark.parametrize("make", [CityscapesDataModule, cityscapes_tasks])
def test_other_numbers_of_classes_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"`num_classes` should be 2, 7 or 19\. Found 13"):
        make(num_classes=13)


def test_baselines_are_of_the_metrics_that_are_logged() -> None:
    directions = {
        f"test_{name}/{task.name}": metric.higher_is_better
        for task in cityscapes_tasks()
        for name, metric in named_metrics(task).items()
    }
    for name, baseline in cityscapes_baselines().items():
        assert directions[name] == baseline.higher_is_better
