from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lightning.datamodules.dense import DenseDataset
from mtl_lightning.datamodules.files import BrokenFileError
from mtl_lightning.datamodules.nyuv2 import NYUV2_TASKS, NYUv2DataModule, nyuv2_baselines, nyuv2_tasks
from mtl_lightning.metrics import RelativeImprovement
from mtl_lightning.modules.evaluation import named_metrics
from tests.datamodules.layouts import FIRST_TEST, hole, scene, write_nyuv2

pytestmark = pytest.mark.filterwarnings("ignore:.*samples where")


def _dataset(root: Path, split: Any = "test", **options: Any) -> DenseDataset:
    datamodule = NYUv2DataModule(root=root, **options)
    datamodule.setup()
    dataset = datamodule.datasets[split]
    assert isinstance(dataset, DenseDataset)
    return dataset


def test_files_of_a_number_belong_to_one_scene(tmp_path: Path) -> None:
    # With twelve samples, an order of names is not that of numbers.
    write_nyuv2(tmp_path, train=2, test=12)
    dataset = _dataset(tmp_path)
    for index, (image, labels) in enumerate(dataset):
        maps = scene(FIRST_TEST + index)
        assert torch.equal(image, torch.from_numpy(maps["image"].copy()).permute(2, 0, 1))
        assert torch.equal(labels["segmentation"], torch.from_numpy(hole(maps["semseg"], -1)))
        depth = torch.from_numpy(hole(maps["depth_zbuffer"], np.nan)).permute(2, 0, 1)
        torch.testing.assert_close(labels["depth"], depth, equal_nan=True)
        normal = torch.from_numpy(hole(maps["normal"], np.nan)).permute(2, 0, 1)
        torch.testing.assert_close(labels["normal"], normal, equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float32, np.float64])
def test_classes_may_be_stored_as_any_type(tmp_path: Path, dtype: type[Any]) -> None:
    write_nyuv2(tmp_path, train=2, test=1, label_dtype=dtype)
    label = _dataset(tmp_path, tasks=["segmentation"])[0][1]["segmentation"]
    assert torch.equal(label, torch.from_numpy(hole(scene(FIRST_TEST)["semseg"], -1)))


def test_a_label_out_of_range_is_named(tmp_path: Path) -> None:
    write_nyuv2(tmp_path, train=2, test=1)
    path = tmp_path / "val" / "label" / "0.npy"
    np.save(path, np.load(path) + 5)
    with pytest.raises(BrokenFileError, match=rf"{path} should hold classes from 0 to 12"):
        _dataset(tmp_path)[0]


def test_the_folder_val_is_the_test_split(tmp_path: Path) -> None:
    write_nyuv2(tmp_path, train=4, test=3)
    paths = [_dataset(tmp_path, split, val_fraction=0.5).files["image"].path("0") for split in ("train", "val", "test")]
    assert [path.parts[-3] for path in paths] == ["train", "train", "val"]


def test_augmentation_enlarges_by_the_benchmarks_scales_and_divides_depth(tmp_path: Path) -> None:
    write_nyuv2(tmp_path, train=1, test=1)
    plain, augmented = (
        _dataset(tmp_path, "train", tasks=["depth"], augment=augment, val_fraction=0.0) for augment in (False, True)
    )
    largest = plain[0][1]["depth"].nan_to_num().max()
    ratios = [float(augmented[epoch][1]["depth"].nan_to_num().max() / largest) for epoch in range(40)]
    # The largest depth may be cut out of the window, but nothing gets farther than its scale says.
    assert max(ratios) == 1
    assert {round(ratio, 2) for ratio in ratios if ratio > 0.97 / 1.2} <= {1.0, 0.83, 0.84, 0.82}
    assert min(ratios) <= 1 / 1.5 + 0.01


def test_tasks_have_the_channels_of_the_set() -> None:
    assert {name: task.channels for name, task in NYUV2_TASKS.items()} == {"segmentation": 13, "depth": 1, "normal": 3}


def test_baselines_are_of_the_metrics_that_are_logged() -> None:
    directions = {
        f"test_{name}/{task.name}": metric.higher_is_better
        for task in nyuv2_tasks()
        for name, metric in named_metrics(task).items()
    }
    for name, baseline in nyuv2_baselines().items():
        assert directions[name] == baseline.higher_is_better
    assert len(nyuv2_baselines("val")) == 9


def test_an_improvement_of_all_metrics_by_a_tenth_is_ten_percent() -> None:
    baselines = nyuv2_baselines()
    values = {name: base.value * (1.1 if base.higher_is_better else 0.9) for name, base in baselines.items()}
    assert RelativeImprovement(baselines, per="metric")(values) == pytest.approx(10)
