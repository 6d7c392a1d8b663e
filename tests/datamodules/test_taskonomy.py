from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.utils.data import DataLoader

from mtl_lightning.datamodules.base import Split
from mtl_lightning.datamodules.dense import DenseDataset
from mtl_lightning.datamodules.files import BrokenFileError, DatasetNotFoundError
from mtl_lightning.datamodules.taskonomy import (
    TASKONOMY_TASKS,
    TaskonomyDataModule,
    blurred,
    depth_in_metres,
    read_buildings,
    read_curvature,
    read_depth_target,
    read_scaled,
    taskonomy_tasks,
)
from mtl_lightning.modules.evaluation import named_metrics
from tests.datamodules.layouts import (
    BUILDINGS,
    HEIGHT,
    WIDTH,
    hole,
    save,
    scene,
    taskonomy_maps,
    taskonomy_path,
    taskonomy_views,
    write_taskonomy,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*buildings of the")
TREES = ("omnidata", "original")
LISTS = Path(os.environ.get("MTL_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")) / "splits" / "taskonomy"
needs_lists = pytest.mark.skipif(not LISTS.exists(), reason="the lists of Taskonomy are not beside the repository")


def _dataset(root: Path, split: Split = "train", **options: Any) -> DenseDataset:
    datamodule = TaskonomyDataModule(root=root, **({"image_size": None} | options))
    datamodule.setup()
    dataset = datamodule.datasets[split]
    assert isinstance(dataset, DenseDataset)
    return dataset


def _reference_occlusion(stored: NDArray[Any]) -> Tensor:
    blurred_by_scipy = gaussian_filter(stored.astype(np.float64), 4.0, mode="mirror")
    return torch.from_numpy(2 * blurred_by_scipy / (0.00625 * 2**16) - 1).float()


@pytest.mark.parametrize("tree", TREES)
def test_all_tasks_of_a_sample_show_the_same_scene(tmp_path: Path, tree: str) -> None:
    write_taskonomy(tmp_path, tree, count=2)
    dataset = _dataset(tmp_path, tasks=tuple(TASKONOMY_TASKS), normalize=None)
    views = [(building, *view) for building in sorted(BUILDINGS["train"]) for view in taskonomy_views(2)]
    assert dataset.keys == [f"{building}/{point}/{view}" for building, point, view in views]
    for seed, (image, labels) in enumerate(dataset):
        maps = scene(seed)
        torch.testing.assert_close(image, torch.from_numpy(maps["image"].copy()).permute(2, 0, 1))
        for name in ("depth_euclidean", "depth_zbuffer"):
            expected = torch.from_numpy(hole(maps[name], np.nan)).permute(2, 0, 1)
            torch.testing.assert_close(
                depth_in_metres(labels[name]), expected, atol=0.5 / 512 + 1e-5, rtol=0, equal_nan=True
            )
        normal = torch.from_numpy(hole(maps["normal"], np.nan)).permute(2, 0, 1)
        torch.testing.assert_close(labels["normal"], normal, atol=0.015, rtol=0, equal_nan=True)
        assert torch.equal(labels["segment_semantic"], torch.from_numpy(hole(maps["semseg"], -1)))
        stored = taskonomy_maps(seed)
        ratios = {"edge_texture": 0.08, "keypoints2d": 0.005}
        for name, ratio in ratios.items():
            expected = torch.from_numpy(stored[name].astype(np.float32)) / (ratio * 2**16)
            torch.testing.assert_close(labels[name][0], 2 * expected.clamp(max=1) - 1)
        expected = torch.from_numpy(stored["keypoints3d"].astype(np.float32)) / 2**16
        torch.testing.assert_close(labels["keypoints3d"][0], 2 * expected - 1)
        torch.testing.assert_close(
            labels["edge_occlusion"][0], _reference_occlusion(stored["edge_occlusion"]), atol=1e-4, rtol=1e-4
        )
        for name in ("reshading", "segment_unsup2d", "segment_unsup25d"):
            expected = torch.from_numpy(stored[name].reshape(HEIGHT, WIDTH, -1)).permute(2, 0, 1) / 255
            torch.testing.assert_close(labels[name], 2 * expected - 1)


@pytest.mark.parametrize("split", BUILDINGS)
def test_a_split_holds_its_buildings(tmp_path: Path, split: Split) -> None:
    write_taskonomy(tmp_path, count=2)
    keys = _dataset(tmp_path, split, tasks=["normal"]).keys
    assert {key.split("/")[0] for key in keys} == set(BUILDINGS[split])
    assert len(keys) == 2 * len(BUILDINGS[split])


def test_samples_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_taskonomy(tmp_path)
    keys = _dataset(tmp_path, "val", tasks=["normal"]).keys
    assert keys == ["corozal/9/0", "corozal/10/1", "corozal/11/2"]


@pytest.mark.parametrize("tree", TREES)
def test_a_missing_file_does_not_shift_the_others(tmp_path: Path, tree: str) -> None:
    # Pairing by position would give the sample the label of the next one.
    write_taskonomy(tmp_path, tree)
    taskonomy_path(tmp_path, tree, "depth_zbuffer", "hanson", 9, 0).unlink()
    with pytest.warns(UserWarning, match="0 of 6 samples and 1 labels"):
        dataset = _dataset(tmp_path, tasks=["depth_zbuffer", "normal"], on_broken="mask")
    for seed, (_, labels) in enumerate(dataset):
        depth = torch.from_numpy(hole(scene(seed)["depth_zbuffer"], np.nan)).permute(2, 0, 1)
        if seed == 0:
            depth = torch.full_like(depth, torch.nan)
        found = depth_in_metres(labels["depth_zbuffer"])
        torch.testing.assert_close(found, depth, atol=0.5 / 512 + 1e-5, rtol=0, equal_nan=True)
        assert not labels["normal"].isnan().all()


def test_a_missing_image_is_noticed(tmp_path: Path) -> None:
    write_taskonomy(tmp_path)
    path = taskonomy_path(tmp_path, "omnidata", "rgb", "merom", 10, 1)
    path.unlink()
    with pytest.raises(DatasetNotFoundError, match=rf"Missing: {path.relative_to(tmp_path)} \(1 in all\)"):
        _dataset(tmp_path, tasks=["normal"])


def test_the_largest_depth_is_no_infinity(tmp_path: Path) -> None:
    # log(1 + 65535) in uint16 is log(0).
    save(tmp_path / "a.png", np.array([[0, 511, 65534, 65535]], np.uint16))
    target = read_depth_target(tmp_path / "a.png")
    assert depth_in_metres(target)[0, 0, :3].tolist() == pytest.approx([0, 511 / 512, 65534 / 512], rel=1e-5)
    assert target[0, 0, 3].isnan()
    assert 0 <= target[..., :3].min() <= target[..., :3].max() <= 1


def test_no_depth_is_not_mixed_into_its_neighbours_by_resizing(tmp_path: Path) -> None:
    # Bilinear resizing of the file makes 9067 of 1000 and 65535.
    write_taskonomy(tmp_path, count=1)
    stored = np.full((32, 40), 1000, np.uint16)
    stored[10:] = 3000
    stored[::3, ::2] = 65535
    stored[:, 20:] = 65535
    save(taskonomy_path(tmp_path, "omnidata", "depth_zbuffer", "hanson", 9, 0), stored)
    depth = _dataset(tmp_path, tasks=["depth_zbuffer"], image_size=(16, 16))[0][1]["depth_zbuffer"]
    assert depth.isnan().any()
    found = (depth_in_metres(depth[~depth.isnan()]) * 512).round()
    assert set(found.tolist()) == {1000.0, 3000.0}


def test_occlusion_edges_are_blurred_and_never_clipped(tmp_path: Path) -> None:
    stored = taskonomy_maps(0)["edge_occlusion"]
    save(tmp_path / "a.png", stored)
    found = read_scaled(tmp_path / "a.png", 1, 0.00625 * 2**16, sigma=4.0)[0]
    torch.testing.assert_close(found, _reference_occlusion(stored), atol=1e-4, rtol=1e-4)


def test_occlusion_edges_may_be_larger_than_one(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((32, 32), 2**12, np.uint16))
    assert read_scaled(tmp_path / "a.png", 1, 0.00625 * 2**16, sigma=4.0).min() > 10


@pytest.mark.parametrize("shape", [(3, 3), (5, 40)])
def test_a_picture_smaller_than_the_blur_is_blurred_as_far_as_it_goes(shape: tuple[int, int]) -> None:
    torch.testing.assert_close(blurred(torch.ones(1, *shape), 4.0), torch.ones(1, *shape))


def test_curvature_is_standardised_by_channel(tmp_path: Path) -> None:
    stored = np.array([[[127, 127, 127], [200, 50, 0]]], np.uint8)
    save(tmp_path / "a.png", stored)
    expected = (stored[..., :2] - np.array([123.572, 120.1])) / np.array([31.922, 21.658])
    torch.testing.assert_close(read_curvature(tmp_path / "a.png"), torch.from_numpy(expected).permute(2, 0, 1).float())


def test_a_picture_with_too_few_channels_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(BrokenFileError, match=r"a\.png should hold a picture of 2 channels\. Found shape"):
        read_curvature(tmp_path / "a.png")


def test_only_flips_augment(tmp_path: Path) -> None:
    write_taskonomy(tmp_path, count=1)
    plain, augmented = (_dataset(tmp_path, tasks=["reshading"], augment=augment) for augment in (False, True))
    image = plain[0][0]
    seen = [augmented[2 * epoch][0] for epoch in range(12)]
    mirrored = [torch.equal(each, image.flip(-1)) for each in seen]
    assert any(mirrored)
    assert [torch.equal(each, image) for each in seen] == [not flipped for flipped in mirrored]


def test_images_are_from_minus_one_to_one_and_256_pixels_wide(tmp_path: Path) -> None:
    write_taskonomy(tmp_path, count=1)
    datamodule = TaskonomyDataModule(root=tmp_path, tasks=["normal"])
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    assert isinstance(loader, DataLoader)
    image = next(iter(loader))[0]
    assert image.shape == (2, 3, 256, 256)
    assert -1 <= image.min() < 0 < image.max() <= 1


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_lists_of_buildings_are_read_with_any_ends_of_lines(tmp_path: Path, end: str) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(end.join(["id,train,val,test", "a,1,0,0", "b,0,1,0", "c,0,0,1", "d,1,0,0", "e,0,0,0"]).encode())
    assert read_buildings(path, TaskonomyDataModule.ORIGIN) == {"train": ["a", "d"], "val": ["b"], "test": ["c"]}


@pytest.mark.parametrize("content", ["", "id,train\na,1\n", "a\rb\r"])
def test_a_list_of_another_form_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(BrokenFileError, match=r"list\.csv should hold the columns id, train, val and test"):
        read_buildings(tmp_path / "list.csv", TaskonomyDataModule.ORIGIN)


@needs_lists
@pytest.mark.parametrize(
    ("subset", "counts"),
    [("tiny", (25, 5, 5)), ("medium", (99, 20, 19)), ("full", (346, 67, 69)), ("fullplus", (383, 75, 79))],
)
def test_the_published_lists_have_their_numbers_of_buildings(subset: str, counts: tuple[int, int, int]) -> None:
    splits = read_buildings(LISTS / f"train_val_test_{subset}.csv", TaskonomyDataModule.ORIGIN)
    assert tuple(map(len, splits.values())) == counts
    buildings = [building for split in splits.values() for building in split]
    assert len(set(buildings)) == len(buildings)


def test_the_list_may_lie_elsewhere(tmp_path: Path) -> None:
    write_taskonomy(tmp_path / "set", count=1)
    other = (tmp_path / "set" / "splits_taskonomy").rename(tmp_path / "lists")
    with pytest.raises(DatasetNotFoundError, match=r"The list of buildings should be .*tiny\.csv or"):
        _dataset(tmp_path / "set", tasks=["normal"])
    assert len(_dataset(tmp_path / "set", tasks=["normal"], split_file=other / "train_val_test_tiny.csv")) == 2


def test_buildings_that_are_not_there_are_left_out_with_a_warning(tmp_path: Path) -> None:
    write_taskonomy(tmp_path, count=1)
    with pytest.warns(UserWarning, match="1 buildings of the train split are left out.*: nowhere"):
        _dataset(tmp_path, tasks=["normal"])


def test_an_unknown_subset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`subset` should be one of tiny, medium, full, fullplus\. Found 'small'"):
        TaskonomyDataModule(subset="small")  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKONOMY_TASKS)
def test_metrics_know_their_direction(task: str) -> None:
    metrics = {name: metric.higher_is_better for name, metric in named_metrics(taskonomy_tasks([task])[0]).items()}
    higher = {"miou", "accuracy", "within_11", "within_22", "within_30"}
    assert metrics
    assert metrics == {name: name in higher for name in metrics}
