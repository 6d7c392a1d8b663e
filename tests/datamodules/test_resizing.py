from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lightning.datamodules.joint_transforms import LabelKind
from mtl_lightning.datamodules.resizing import check_image_size, fitted_size, pad_centred, resize_image, resize_label


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _normals(height: int, width: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(3, height, width, generator=_generator()), dim=0)


@pytest.mark.parametrize("size", [(8, 6), (16, 12), (5, 17)])
def test_a_constant_stays_constant(size: tuple[int, int]) -> None:
    torch.testing.assert_close(resize_image(torch.full((3, 8, 12), 0.4), size), torch.full((3, *size), 0.4))


def test_halving_averages_as_much_as_it_shrinks() -> None:
    # A checkerboard, of which a bilinear picture without averaging keeps one colour.
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float()[None]
    assert resize_image(board, (4, 4)).sub(0.5).abs().max() < 0.05


@pytest.mark.parametrize("kind", ["classes", "mask", "depth", "disparity", "curvature"])
@pytest.mark.parametrize("size", [(4, 6), (16, 24), (3, 5)])
def test_no_value_appears_that_was_not_there(kind: LabelKind, size: tuple[int, int]) -> None:
    label = torch.rand(1, 8, 12, generator=_generator())
    resized = resize_label(label, kind, size)
    assert resized.shape == (1, *size)
    assert torch.isin(resized, label).all()


@pytest.mark.parametrize("factor", [2, 3])
def test_the_nearest_pixel_of_a_multiple_is_repetition(factor: int) -> None:
    label = torch.randint(-1, 9, (4, 5), generator=_generator())
    expected = label.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    assert torch.equal(resize_label(label, "classes", (4 * factor, 5 * factor)), expected)


def test_depth_without_value_is_not_mixed_into_neighbours() -> None:
    # Interpolating 65535 and 1000, as values, gives 9067.
    depth = torch.full((1, 8, 8), 1000.0)
    depth[:, ::3, ::2] = torch.nan
    resized = resize_label(depth, "depth", (5, 5))
    assert resized.isnan().any()
    assert (resized[~resized.isnan()] == 1000).all()


def test_values_are_interpolated_between_valid_pixels_only() -> None:
    label = torch.full((1, 8, 8), 2.0)
    label[:, :3] = torch.nan
    resized = resize_label(label, "values", (4, 4))
    torch.testing.assert_close(resized[~resized.isnan()], torch.full((12 - 4 * int(resized[0, 1, 0].isnan()),), 2.0))


@pytest.mark.parametrize("missing", [0.0, torch.nan])
@pytest.mark.parametrize("size", [(4, 6), (16, 24), (5, 7)])
def test_normals_keep_their_length_and_the_invalid_stay_out(missing: float, size: tuple[int, int]) -> None:
    normal = _normals(8, 12)
    normal[:, :2, :4] = missing
    resized = resize_label(normal, "normal", size)
    valid = ~resized.isnan().any(0)
    torch.testing.assert_close(resized[:, valid].norm(dim=0), torch.ones(int(valid.sum())))
    hole = torch.zeros(8, 12, dtype=torch.int64)
    hole[:2, :4] = 1
    assert torch.equal(valid, resize_label(hole, "classes", size) == 0)


def test_normals_beside_a_hole_are_those_of_the_surface() -> None:
    normal = torch.tensor([0.6, 0.0, 0.8])[:, None, None].expand(3, 8, 8).clone()
    normal[:, :, :3] = 0
    resized = resize_label(normal, "normal", (5, 5))
    valid = ~resized.isnan().any(0)
    torch.testing.assert_close(resized[:, valid].T, torch.tensor([0.6, 0.0, 0.8]).expand(int(valid.sum()), 3))


def test_normals_whose_components_cancel_are_no_holes() -> None:
    # A mask of those whose sum is not zero would drop them.
    normal = torch.tensor([0.5**0.5, -(0.5**0.5), 0.0])[:, None, None].expand(3, 4, 4)
    torch.testing.assert_close(resize_label(normal, "normal", (2, 2)), normal[:, :2, :2])


def test_opposite_normals_that_cancel_have_no_direction() -> None:
    normal = torch.zeros(3, 2, 2)
    normal[0] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert resize_label(normal, "normal", (1, 1)).isnan().all()


@pytest.mark.parametrize("kind", ["classes", "values", "normal", "depth"])
def test_the_same_size_changes_nothing(kind: LabelKind) -> None:
    label = _normals(4, 5)
    assert resize_label(label, kind, (4, 5)) is label


@pytest.mark.parametrize(
    ("stored", "expected"),
    [((375, 500), (375, 500)), ((500, 375), (500, 375)), ((600, 800), (384, 512)), ((2000, 3), (512, 1))],
)
def test_pictures_are_shrunk_to_fit_and_never_enlarged(stored: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted_size(*stored, (512, 512)) == expected


def test_padding_is_on_all_sides_alike() -> None:
    padded = pad_centred(torch.ones(2, 3, dtype=torch.int64), (5, 6), -1)
    assert padded.shape == (5, 6)
    assert (padded == 1).nonzero().amin(0).tolist() == [1, 1]
    assert (padded == 1).sum() == 6
    assert (padded == -1).sum() == 24


@pytest.mark.parametrize(("size", "expected"), [(None, None), (5, (5, 5)), ((3, 4), (3, 4))])
def test_one_number_is_both_sides(size: Any, expected: Any) -> None:
    assert check_image_size(size) == expected


@pytest.mark.parametrize("size", [0, (0, 5), (5, -1)])
def test_a_size_without_pixels_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=r"`image_size` should be at least 1 pixel high and wide"):
        check_image_size(size)
