from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_lightning.datamodules.colours import COLOURS
from mtl_lightning.datamodules.files import BrokenFileError
from mtl_lightning.datamodules.pictures import (
    PictureFiles,
    picture_augmentation,
    prepare_picture,
    read_picture,
    without_broken,
)

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)


def _save(path: Path, mode: str = "RGB") -> Path:
    Image.fromarray(PIXELS).convert(mode).save(path)
    return path


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    pixels = read_picture(_save(tmp_path / "a.png"))
    assert torch.equal(pixels, torch.from_numpy(PIXELS).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_pictures_of_any_mode_are_read_in_colours(tmp_path: Path, mode: str) -> None:
    pixels = read_picture(_save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), mode))
    expected = np.array(Image.fromarray(PIXELS).convert(mode).convert("RGB"))
    assert torch.equal(pixels, torch.from_numpy(expected).permute(2, 0, 1))


def test_colours_are_in_the_unit_interval_or_standardised() -> None:
    pixels = torch.from_numpy(PIXELS).permute(2, 0, 1)
    plain = prepare_picture(pixels, None, None)
    assert torch.equal(plain, pixels.float() / 255)
    assert torch.allclose(prepare_picture(pixels, None, COLOURS["symmetric"]), 2 * plain - 1)
    mean, std = COLOURS["imagenet"]
    assert torch.allclose(prepare_picture(pixels, None, (mean, std))[1], (plain[1] - mean[1]) / std[1])


def test_resizing_keeps_a_plain_picture_plain() -> None:
    image = prepare_picture(torch.full((3, 7, 5), 100, dtype=torch.uint8), (3, 9), None)
    assert image.shape == (3, 3, 9)
    assert torch.allclose(image, torch.tensor(100 / 255))


def test_half_of_the_augmented_pictures_are_mirrored_and_all_are_crops() -> None:
    ramp = torch.arange(20.0).expand(3, 20, 20)
    generator = torch.Generator().manual_seed(0)
    images = [picture_augmentation(ramp, generator) for _ in range(200)]
    rising = sum(bool(image[0, 0, -1] > image[0, 0, 0]) for image in images)
    assert 70 < rising < 130
    assert all(image.shape == ramp.shape for image in images)
    widths = torch.stack([(image[0, 0, -1] - image[0, 0, 0]).abs() for image in images])
    assert widths.min() >= 14
    assert widths.std() > 0.5


def test_broken_files_are_left_out_and_said(tmp_path: Path) -> None:
    paths = [_save(tmp_path / f"{name}.jpg") for name in "abc"]
    paths[1].write_bytes(paths[1].read_bytes()[:-50])
    paths.append(tmp_path / "none.jpg")
    with pytest.warns(
        UserWarning, match=r"2 of 4 pictures .* left out: .*b\.jpg \(it is cut off.*none\.jpg \(it is missing"
    ):
        kept = without_broken(paths, "skip")
    assert kept.tolist() == [True, False, True, False]
    assert without_broken(paths, "raise").all()


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = _save(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    with pytest.raises(BrokenFileError, match=r"a\.png should hold a whole picture"):
        PictureFiles([path], torch.zeros(1), None, None)[0]


def test_a_missing_file_stays_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "none.png")
