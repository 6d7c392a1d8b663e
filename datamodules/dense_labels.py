"""From files to images and dense labels: float32 with NaN, int64 with -1, where a label is missing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl_lightning.datamodules.files import BrokenFileError, read_array, read_colours
from mtl_lightning.datamodules.joint_transforms import IGNORE_INDEX

# Vectors that data sets store have length one; PNG files write "none" as grey, which decodes to a length of 0.01.
_SHORTEST_NORMAL = 0.5


def read_image(path: Path) -> Tensor:
    """Return the image at ``path``, a picture of 8 bits or a ``.npy`` array, as float32 in ``[0, 1]``, ``(3, H, W)``.

    Raises:
        BrokenFileError: If it is no whole image, or has values out of its range.
    """
    array = read_array(path) if path.suffix == ".npy" else read_colours(path)
    floats = array.dtype.kind == "f"
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4):
        raise BrokenFileError.of(path, "an image of shape (H, W, 3)", f"shape {array.shape}")
    image = _channels_first(array[:, :, :3])
    largest = 1 if floats else 255
    # Resizing in the making of a data set overshoots a little; an image of 0 to 255 in floats is another matter.
    if not (image.min() >= -0.1 * largest and image.max() <= 1.1 * largest):
        raise BrokenFileError.of(
            path, f"an image of values from 0 to {largest}", f"{image.min():.4g} to {image.max():.4g}"
        )
    return (image / largest).clamp(0, 1)


def read_classes(
    path: Path, num_classes: int, *, first: int = 0, ignore: Collection[int] = (-1, 255), key: str | None = None
) -> Tensor:
    """Return the class map at ``path``, int64, shape ``(H, W)``: ``first`` becomes class 0, ``ignore`` -1.

    Args:
        path: The file: ``.npy``, ``.mat`` or a picture. Whole numbers may be stored as floats.
        num_classes: The number of classes.
        first: The stored number of class 0.
        ignore: The stored numbers of missing labels.
        key: The variable of a ``.mat`` file.

    Raises:
        BrokenFileError: If it holds no class map, or other numbers.
    """
    array = read_array(path, key)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2:
        raise BrokenFileError.of(path, "a class map of shape (H, W)", f"shape {array.shape}")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        raise BrokenFileError.of(path, "whole numbers of classes", "fractions or NaN")
    stored = torch.from_numpy(array.astype(np.int64))
    missing = torch.zeros_like(stored, dtype=torch.bool)
    for value in ignore:  # for so few values several times faster than `torch.isin`
        missing |= stored == value
    classes = torch.where(missing, IGNORE_INDEX, stored - first)
    wrong = ~missing & ((classes < 0) | (classes >= num_classes))
    if wrong.any():
        raise BrokenFileError.of(
            path,
            f"classes from {first} to {first + num_classes - 1}, or {sorted(ignore)} where there is none",
            f"{int(stored[wrong].min())} to {int(stored[wrong].max())} at {int(wrong.sum())} other pixels",
        )
    return classes


def read_depth(path: Path, *, key: str | None = None) -> Tensor:
    """Return the depth or disparity map at ``path``, float32, shape ``(1, H, W)``; NaN where it is 0 or not finite.

    Raises:
        BrokenFileError: If it holds no such map.
    """
    depth = _as_map(path, read_array(path, key), 1)
    return torch.where(depth.isfinite() & (depth > 0), depth, torch.nan)


def read_normals(path: Path) -> Tensor:
    """Return the unit normals at ``path``, float32, shape ``(3, H, W)``; NaN where there is none.

    Integers ``v`` are decoded to ``2 v / 255 - 1``, black among them is no normal; nor is a vector much too short.

    Raises:
        BrokenFileError: If it holds no such map.
    """
    array = read_array(path)
    normal = _as_map(path, array, 3)
    if array.dtype.kind != "f":
        normal = torch.where((normal != 0).any(0), 2 * normal / 255 - 1, 0)
    length = normal.square().sum(0).sqrt()  # many times faster than the norm along the first dimension
    valid = length.isfinite() & (length > _SHORTEST_NORMAL)
    return torch.where(valid, normal / torch.where(valid, length, 1), torch.nan)


def read_mask(path: Path) -> Tensor:
    """Return the map of 0 and 1 at ``path``, stored so or as 0 to 255; float32, shape ``(1, H, W)``, ends included.

    Raises:
        BrokenFileError: If it holds no such map, or other numbers.
    """
    mask = _as_map(path, read_array(path), 1)
    if (mask < 0).any() or (mask > 255).any():
        raise BrokenFileError.of(path, "numbers from 0 to 255", f"{mask.min():.4g} to {mask.max():.4g}")
    return mask / 255 if mask.max() > 1 else mask  # arrays and pictures come in both forms: only the values tell


def _as_map(path: Path, array: NDArray[Any], channels: int) -> Tensor:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != channels:
        raise BrokenFileError.of(path, f"a map of shape (H, W, {channels})", f"shape {array.shape}")
    return _channels_first(array)


def _channels_first(array: NDArray[Any]) -> Tensor:
    # In float32 before anything else: neither uint8 nor uint16 may take part in arithmetic.
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))
