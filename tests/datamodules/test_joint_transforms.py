from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_lightning.datamodules.joint_transforms import (
    IGNORE_INDEX,
    Crop,
    Draw,
    JointTransform,
    LabelKind,
    enlarge_label,
    flip_label,
    missing_like,
)
from mtl_lightning.datamodules.scene_rendering import render

KINDS: dict[str, LabelKind] = {
    "semseg": "classes",
    "instance": "classes",
    "depth_zbuffer": "depth",
    "depth_euclidean": "depth",
    "normal": "normal",
    "edge_occlusion": "mask",
    "edge_texture": "values",
    "keypoints2d": "values",
    "keypoints3d": "values",
    "principal_curvature": "curvature",
    "albedo": "values",
}


def _maps(seed: int, size: int, *, mirror: bool = False) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in render(seed, size, mirror=mirror).items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_label_is_that_of_the_mirrored_scene(name: str) -> None:
    for seed in range(10):
        flipped, mirrored = flip_label(_maps(seed, 32)[name], KINDS[name]), _maps(seed, 32, mirror=True)[name]
        torch.testing.assert_close(flipped, mirrored, rtol=1e-6, atol=1e-6)


def test_reshading_of_a_mirrored_scene_is_not_flipped_reshading() -> None:
    scene, mirrored = _maps(0, 32), _maps(0, 32, mirror=True)
    assert (flip_label(scene["reshading"], "values") - mirrored["reshading"]).abs().max() > 0.05
    torch.testing.assert_close(flip_label(scene["reshading_left"], "values"), mirrored["reshading"])


def test_a_flip_leaves_its_argument_as_it_is() -> None:
    normal = _maps(0, 32)["normal"]
    before = normal.clone()
    flip_label(normal, "normal")
    assert torch.equal(normal, before)


@pytest.mark.parametrize("kind", [kind for kind in get_args(LabelKind) if kind != "fixed"])
def test_two_flips_are_none(kind: LabelKind) -> None:
    label = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flip_label(flip_label(label, kind), kind), label)


def test_a_fixed_label_is_not_flipped() -> None:
    with pytest.raises(ValueError, match='kind "fixed" should not be flipped'):
        flip_label(torch.zeros(1, 2, 2), "fixed")


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("semseg", 1),
        ("depth_zbuffer", 1 / 3),
        ("depth_euclidean", 1 / 3),
        ("normal", 1),
        ("principal_curvature", 3),
        ("albedo", 1),
    ],
)
def test_an_enlarged_crop_is_the_picture_of_a_longer_camera_in_a_smaller_scene(name: str, factor: float) -> None:
    # Three times as many pixels on the same field of view, of which the window shows a third each way, are a focal
    # length of three times as many pixels. The middle of 3 x 3 pixels sees what the pixel of the small picture saw.
    for seed in range(5):
        small, large = _maps(seed, 60)[name], _maps(seed, 180)[name]
        enlarged = enlarge_label(small, KINDS[name], Crop(top=7, left=31, height=20, width=20))
        expected = large[..., 21:81, 93:153] * factor
        torch.testing.assert_close(
            enlarged[..., 1::3, 1::3].float(), expected[..., 1::3, 1::3].float(), rtol=1e-5, atol=1e-5
        )


def test_disparity_is_multiplied_as_depth_is_divided() -> None:
    depth, crop = _maps(0, 48)["depth_zbuffer"], Crop(3, 5, 40, 40)
    disparity = enlarge_label(1 / depth, "disparity", crop)
    torch.testing.assert_close(disparity, 1 / enlarge_label(depth, "depth", crop))


@pytest.mark.parametrize("name", ["semseg", "instance", "edge_occlusion"])
def test_no_new_value_appears_in_classes_and_masks(name: str) -> None:
    label = _maps(1, 48)[name]
    enlarged = enlarge_label(label, KINDS[name], Crop(3, 5, 37, 37))
    assert set(enlarged.flatten().tolist()) <= set(label.flatten().tolist())


@pytest.mark.parametrize("side", [47, 40, 33])
def test_an_enlarged_normal_has_unit_length(side: int) -> None:
    normal = enlarge_label(_maps(1, 48)["normal"], "normal", Crop(0, 1, side, side))
    torch.testing.assert_close(normal.norm(dim=0), torch.ones(48, 48))


def test_a_flat_normal_stays_what_it_is() -> None:
    normal = torch.tensor([0.6, 0.0, 0.8])[:, None, None].expand(3, 12, 12)
    torch.testing.assert_close(enlarge_label(normal, "normal", Crop(2, 2, 7, 9)), normal)


@pytest.mark.parametrize("invalid", [0.0, math.nan])
def test_invalid_normals_stay_invalid_and_are_not_mixed_in(invalid: float) -> None:
    normal = torch.tensor([0.6, 0.0, 0.8])[:, None, None].repeat(1, 12, 12)
    normal[:, :, 6:] = invalid
    # The window holds four valid columns of eight; the sixth of twelve lies between the fourth and the fifth.
    enlarged = enlarge_label(normal, "normal", Crop(0, 2, 8, 8))
    valid = (enlarged.nan_to_num() != 0).any(0)
    assert torch.equal(valid, (torch.arange(12) < 6).expand(12, 12))
    torch.testing.assert_close(enlarged[:, valid], normal[:, :1, 0].expand(3, int(valid.sum())))
    rest = enlarged[:, ~valid]
    assert rest.isnan().all() if math.isnan(invalid) else (rest == 0).all()


def test_a_normal_whose_components_sum_to_zero_is_valid() -> None:
    left, right = torch.tensor([1.0, -1.0, 0.0]) / math.sqrt(2), torch.tensor([0.0, -1.0, 1.0]) / math.sqrt(2)
    normal = torch.stack([left, right, right, right], dim=1)[:, None].expand(3, 4, 4)
    # The second of four pixels is a quarter of the way from the first to the second of two.
    between = 0.75 * left + 0.25 * right
    enlarged = enlarge_label(normal, "normal", Crop(0, 0, 2, 2))
    torch.testing.assert_close(enlarged[:, 0, 1], between / between.norm())


@pytest.mark.parametrize(
    ("kind", "expected"), [("values", 2.0), ("mask", 2.0), ("depth", 2 * 0.6), ("curvature", 2 / 0.6)]
)
def test_missing_floats_stay_missing_and_are_not_mixed_in(kind: LabelKind, expected: float) -> None:
    label = torch.full((2, 10, 10), 2.0)
    label[:, 5:] = math.nan
    # The window holds four rows of six; the seventh of ten lies between the fourth and the fifth.
    enlarged = enlarge_label(label, kind, Crop(1, 0, 6, 6))
    assert enlarged[:, 7:].isnan().all()
    torch.testing.assert_close(enlarged[:, :7], torch.full((2, 7, 10), expected))


def test_missing_classes_stay_missing() -> None:
    label = missing_like(torch.zeros(8, 8, dtype=torch.long))
    assert (enlarge_label(label, "classes", Crop(1, 1, 6, 6)) == IGNORE_INDEX).all()


@pytest.mark.parametrize("kind", ["values", "depth", "classes", "normal"])
def test_the_whole_picture_is_the_same_picture(kind: LabelKind) -> None:
    label = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0))
    label = torch.nn.functional.normalize(label, dim=0)
    torch.testing.assert_close(enlarge_label(label, kind, Crop(0, 0, 6, 9)), label)


def test_draws_lie_in_the_picture_and_within_the_scale() -> None:
    transform, generator = JointTransform({}, max_scale=1.5), torch.Generator().manual_seed(0)
    draws = [transform.draw(generator, 40, 64) for _ in range(2000)]
    crops = [draw.crop for draw in draws if draw.crop is not None]
    assert all(crop.top >= 0 and crop.top + crop.height <= 40 for crop in crops)
    assert all(crop.left >= 0 and crop.left + crop.width <= 64 for crop in crops)
    assert {crop.height for crop in crops} == set(range(27, 41))
    assert np.mean([draw.flip for draw in draws]) == pytest.approx(0.5, abs=0.04)


def test_windows_reach_all_borders() -> None:
    transform, generator = JointTransform({}, max_scale=1.25), torch.Generator().manual_seed(0)
    crops = [draw.crop for draw in (transform.draw(generator, 32, 32) for _ in range(2000)) if draw.crop is not None]
    assert {crop.top for crop in crops if crop.height == 26} == set(range(7))


def test_a_seed_repeats_a_draw() -> None:
    transform = JointTransform({})
    first, second = (transform.draw(torch.Generator().manual_seed(3), 32, 32) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_sure_flip_is_sure(flip: float) -> None:
    transform, generator = JointTransform({}, flip=flip), torch.Generator().manual_seed(0)
    assert {transform.draw(generator, 32, 32).flip for _ in range(100)} == {bool(flip)}


def test_image_and_labels_move_together() -> None:
    # A label that is the image shows whether both see the same window.
    image = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    transform = JointTransform({"copy": "values"}, max_scale=1.5)
    for seed in range(20):
        moved, labels = transform(image, {"copy": image}, torch.Generator().manual_seed(seed))
        assert moved.shape == image.shape
        assert torch.equal(moved, labels["copy"])


def test_a_flip_comes_before_the_crop() -> None:
    image, draw = torch.arange(4.0).view(1, 1, 4), Draw(flip=True, crop=Crop(0, 0, 1, 2))
    _, labels = JointTransform({"x": "mask"}).apply(image, {"x": image}, draw)
    assert labels["x"].flatten().tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": -0.1}, r"`flip` should be a probability in \[0, 1\]. Found -0.1."),
        ({"max_scale": 0.9}, "`max_scale` should be at least 1 and finite. Found 0.9."),
        ({"max_scale": math.inf}, "`max_scale` should be at least 1 and finite. Found inf."),
        ({"kinds": {"a": "fixed"}}, '`flip` should be 0 with labels of kind "fixed". Found 0.5 with a.'),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JointTransform(**({"kinds": {}} | options))  # type: ignore[arg-type]


def test_fixed_labels_are_accepted_without_flips() -> None:
    label = torch.rand(1, 8, 8)
    _, labels = JointTransform({"a": "fixed"}, flip=0.0)(label, {"a": label}, torch.Generator().manual_seed(0))
    assert labels["a"].shape == (1, 8, 8)


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`labels` should be among a\. Found b\."):
        JointTransform({"a": "mask"})(torch.zeros(3, 4, 4), {"b": torch.zeros(4, 4)}, torch.Generator())
