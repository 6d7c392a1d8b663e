from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_lightning.datamodules.dense_labels import read_classes, read_depth, read_image, read_mask, read_normals
from mtl_lightning.datamodules.files import BrokenFileError


def _write(path: Path, values: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return path


def _colours(shape: tuple[int, ...] = (4, 6, 3)) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.npy"])
def test_bytes_of_an_image_are_divided_by_255(tmp_path: Path, name: str) -> None:
    image = read_image(_write(tmp_path / name, _colours()))
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, torch.from_numpy(_colours().transpose(2, 0, 1) / 255).float())


def test_an_image_of_floats_stays_as_it_is(tmp_path: Path) -> None:
    values = _colours() / 255
    assert torch.equal(
        read_image(_write(tmp_path / "a.npy", values)), torch.from_numpy(values.transpose(2, 0, 1)).float()
    )


def test_a_grey_image_gets_three_channels(tmp_path: Path) -> None:
    image = read_image(_write(tmp_path / "a.png", _colours((4, 6))))
    assert image.shape == (3, 4, 6)
    assert torch.equal(image[0], image[2])


def test_transparency_is_left_out(tmp_path: Path) -> None:
    assert read_image(_write(tmp_path / "a.png", _colours((4, 6, 4)))).shape == (3, 4, 6)


@pytest.mark.parametrize("values", [_colours().astype(np.float32), np.full((4, 6, 3), np.nan), -np.ones((4, 6, 3))])
def test_an_image_of_floats_should_be_in_its_range(tmp_path: Path, values: Any) -> None:
    with pytest.raises(BrokenFileError, match=r"a\.npy should hold an image of values from 0 to 1"):
        read_image(_write(tmp_path / "a.npy", values))


@pytest.mark.parametrize("shape", [(4, 6, 2), (6,), (1, 4, 6, 3)])
def test_an_image_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(BrokenFileError, match=r"an image of shape \(H, W, 3\)\. Found shape"):
        read_image(_write(tmp_path / "a.npy", np.zeros(shape)))


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 1)])
def test_classes_are_integers_of_any_stored_type(tmp_path: Path, dtype: type[Any], shape: tuple[int, ...]) -> None:
    stored = np.array([0, 3, 12, -1], dtype).reshape(shape)
    classes = read_classes(_write(tmp_path / "a.npy", stored), 13)
    assert classes.dtype == torch.int64
    assert classes.tolist() == [[0, 3], [12, -1]]


def test_minus_one_in_unsigned_bytes_is_no_class(tmp_path: Path) -> None:
    stored = np.array([[0, -1]], np.int64).astype(np.uint8)
    assert read_classes(_write(tmp_path / "a.png", stored), 13).tolist() == [[0, -1]]


def test_the_first_class_is_renumbered(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.png", np.array([[0, 1, 40, 255]], np.uint8))
    assert read_classes(path, 40, first=1, ignore=(0, 255)).tolist() == [[-1, 0, 39, -1]]


def test_a_label_out_of_range_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.npy", np.array([[0, 13, 14, -1]]))
    with pytest.raises(BrokenFileError, match=r"a\.npy should hold classes from 0 to 12.* Found 13 to 14 at 2 other"):
        read_classes(path, 13)


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_fractions_are_no_classes(tmp_path: Path, value: float) -> None:
    with pytest.raises(BrokenFileError, match="whole numbers of classes"):
        read_classes(_write(tmp_path / "a.npy", np.array([[0.0, value]])), 13)


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 1)])
def test_depth_that_is_none_is_nan(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored = np.array([0.0, 1.5, np.inf, -1.0]).reshape(shape)
    depth = read_depth(_write(tmp_path / "a.npy", stored))
    assert depth.shape == (1, 2, 2)
    assert depth.dtype == torch.float32
    torch.testing.assert_close(depth[0], torch.tensor([[torch.nan, 1.5], [torch.nan, torch.nan]]), equal_nan=True)


def test_a_real_normal_whose_components_cancel_is_kept(tmp_path: Path) -> None:
    # A mask of those whose sum is not zero would drop it.
    stored = np.array([[[0.7071068, -0.7071068, 0.0], [0.0, 0.0, 0.0]]])
    normal = read_normals(_write(tmp_path / "a.npy", stored))
    torch.testing.assert_close(normal[:, 0, 0], torch.tensor([0.5**0.5, -(0.5**0.5), 0.0]))
    assert normal[:, 0, 1].isnan().all()


def test_normals_in_bytes_are_decoded_to_unit_vectors(tmp_path: Path) -> None:
    vectors = torch.nn.functional.normalize(
        torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0)), dim=-1
    ).numpy()
    normal = read_normals(_write(tmp_path / "a.png", np.rint((vectors + 1) * 127.5).astype(np.uint8)))
    torch.testing.assert_close(normal.norm(dim=0), torch.ones(5, 7))
    torch.testing.assert_close(normal.permute(1, 2, 0), torch.from_numpy(vectors), atol=0.01, rtol=0)


@pytest.mark.parametrize("value", [0, 127, 128])
def test_black_and_grey_are_no_normals(tmp_path: Path, value: int) -> None:
    # Decoded, none of them is exactly zero.
    stored = np.array([[[value] * 3, [255, 128, 128]]], np.uint8)
    normal = read_normals(_write(tmp_path / "a.png", stored))
    assert normal.isnan().tolist() == [[[True, False]]] * 3


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("a.png", np.array([[0, 255, 51]], np.uint8)),
        ("a.npy", np.array([[0, 255, 51]], np.uint8)),
        ("a.npy", np.array([[0.0, 1.0, 0.2]])),
    ],
)
def test_masks_are_from_0_to_1(tmp_path: Path, name: str, stored: Any) -> None:
    torch.testing.assert_close(read_mask(_write(tmp_path / name, stored)), torch.tensor([[[0.0, 1.0, 0.2]]]))


def test_a_mask_of_bits_stays_as_it_is(tmp_path: Path) -> None:
    assert read_mask(_write(tmp_path / "a.png", np.array([[False, True]]))).tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("read", [read_depth, read_normals, read_mask])
def test_maps_of_another_shape_are_refused(tmp_path: Path, read: Any) -> None:
    with pytest.raises(BrokenFileError, match=r"a map of shape \(H, W, .\)\. Found shape \(4, 6, 2\)"):
        read(_write(tmp_path / "a.npy", np.zeros((4, 6, 2))))


def test_an_image_with_a_palette_is_read_in_its_colours(tmp_path: Path) -> None:
    colours = np.repeat(np.array([[255, 0, 0], [0, 0, 255]], dtype=np.uint8)[None], 3, axis=0)
    Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    expected = torch.from_numpy(colours.transpose(2, 0, 1) / 255).float()
    torch.testing.assert_close(read_image(tmp_path / "a.png"), expected, atol=0.02, rtol=0)


def test_an_image_for_printing_is_read_in_its_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg")  # red
    assert read_image(tmp_path / "a.jpg")[:, 0, 0].round(decimals=1).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("wrong", [-1, 256])
def test_a_mask_of_other_numbers_is_refused(tmp_path: Path, wrong: int) -> None:
    values = np.zeros((4, 6), dtype=np.int32)
    values[1, 2] = wrong
    with pytest.raises(BrokenFileError, match=r"a\.npy should hold numbers from 0 to 255"):
        read_mask(_write(tmp_path / "a.npy", values))
