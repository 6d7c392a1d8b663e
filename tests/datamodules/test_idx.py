from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtl_lightning.datamodules.idx import read_idx

WriteIdx = Callable[[Path, Tensor], Path]
IMAGES = torch.arange(24, dtype=torch.uint8).view(2, 3, 4) + 230


@pytest.mark.parametrize("name", ["images", "images.gz"])
@pytest.mark.parametrize("values", [IMAGES, IMAGES[:, 0, 0], IMAGES[:0]], ids=["3 dimensions", "1 dimension", "empty"])
def test_what_was_written_is_read(tmp_path: Path, write_idx: WriteIdx, name: str, values: Tensor) -> None:
    found = read_idx(write_idx(tmp_path / name, values), values.ndim)
    assert found.dtype == torch.uint8
    assert torch.equal(found, values)


@pytest.mark.parametrize("kept", [3, 12, -8, -1])
def test_a_broken_off_gzip_file_is_refused(tmp_path: Path, write_idx: WriteIdx, kept: int) -> None:
    path = write_idx(tmp_path / "images.gz", IMAGES)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"images\.gz should hold a whole gzip file\. Found .*\. Delete it and fetch"):
        read_idx(path, 3)


@pytest.mark.parametrize("position", [0, 15, -6])
def test_a_gzip_file_with_a_wrong_byte_is_refused(tmp_path: Path, write_idx: WriteIdx, position: int) -> None:
    path = write_idx(tmp_path / "images.gz", IMAGES)
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"images\.gz should hold a whole gzip file"):
        read_idx(path, 3)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_the_wrong_length_is_refused(tmp_path: Path, write_idx: WriteIdx, suffix: str, change: int) -> None:
    path = write_idx(tmp_path / "images", IMAGES)
    content = path.read_bytes() + b"\0"
    content = content[: len(content) + change - 1]
    path = path.with_name(f"images{suffix}")
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(
        ValueError, match=rf"should hold 40 bytes for its shape \(2, 3, 4\)\. Found {40 + change} bytes"
    ):
        read_idx(path, 3)


def test_a_file_of_other_dimensions_is_refused(tmp_path: Path, write_idx: WriteIdx) -> None:
    path = write_idx(tmp_path / "labels", IMAGES[:, 0, 0])
    with pytest.raises(ValueError, match=r"labels should hold an idx file of 3-dim.* 00000803\. Found 00000801"):
        read_idx(path, 3)


def test_a_file_of_another_type_is_refused(tmp_path: Path, write_idx: WriteIdx) -> None:
    path = write_idx(tmp_path / "images", IMAGES)
    path.write_bytes(b"\0\0\x0d" + path.read_bytes()[3:])
    with pytest.raises(ValueError, match=r"begins with 00000803\. Found 00000d03"):
        read_idx(path, 3)


@pytest.mark.parametrize(("kept", "message"), [(0, "Found none"), (10, "a header of 16 bytes. Found 10 bytes")])
def test_a_file_without_a_whole_header_is_refused(tmp_path: Path, write_idx: WriteIdx, kept: int, message: str) -> None:
    path = write_idx(tmp_path / "images", IMAGES)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=message):
        read_idx(path, 3)
