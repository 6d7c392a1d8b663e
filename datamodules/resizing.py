"""Pictures and dense labels at another size, by rules that keep the labels true."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from mtl_lightning.datamodules.joint_transforms import LabelKind, missing_like, nearest_pixels


def check_image_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return ``image_size`` as height and width, of which a single number stands for both; None remains.

    Raises:
        ValueError: If a side is less than 1.
    """
    if image_size is None:
        return None
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"`image_size` should be at least 1 pixel high and wide, or None. Found {image_size}.")
    return height, width


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ``image``, shape ``(C, H, W)``, at height and width ``size``: bilinear, averaged where it shrinks."""
    if image.shape[-2:] == size:
        return image
    return interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def resize_label(label: Tensor, kind: LabelKind, size: tuple[int, int]) -> Tensor:
    """Return ``label``, shape ``(C, H, W)`` or ``(H, W)``, of the same scene at height and width ``size``.

    Classes, masks, depth, disparity and curvature take the nearest pixel, so that no value appears that was not there.
    Other kinds are interpolated between valid pixels as the image is, normals then brought back to unit length; a pixel
    is as invalid (NaN or, among normals, the zero vector) as the one nearest to it. Since the same camera takes the
    picture with other pixels, no number is rescaled: ``JointTransform`` does that to the crops it enlarges.

    Example:
        >>> depth = torch.tensor([[[1.0, 1.0, 9.0, torch.nan]]])
        >>> resize_label(depth, "depth", (1, 2)), resize_label(depth, "values", (1, 2))
        (tensor([[[1., nan]]]), tensor([[[2.1429,    nan]]]))
    """
    if label.shape[-2:] == size:
        return label
    if kind not in ("values", "normal", "fixed"):
        return nearest_pixels(label, size)
    valid = ~label.isnan().any(0, keepdim=True)
    if kind == "normal":
        valid &= (label != 0).any(0, keepdim=True)  # not the sum, in which components cancel
    resized = resize_image(torch.where(valid, label, 0), size)
    kept = nearest_pixels(valid, size)
    if kind == "normal":
        length = resized.square().sum(0, keepdim=True).sqrt()  # many times faster than `norm`
        kept &= length > 1e-6  # opposite normals may cancel, and then there is no direction
        resized = resized / length.clamp(min=1e-6)
    elif not valid.all():
        resized = resized / resize_image(valid.to(label.dtype), size).clamp(min=1e-12)
    return torch.where(kept, resized, missing_like(resized))


def fitted_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of a picture that is shrunk, not enlarged, until it fits into ``size``; the ratio is kept.

    Example:
        >>> fitted_size(300, 400, (200, 200)), fitted_size(30, 40, (200, 200))
        ((150, 200), (30, 40))
    """
    scale = min(1.0, size[0] / height, size[1] / width)
    return min(size[0], max(1, round(height * scale))), min(size[1], max(1, round(width * scale)))


def pad_centred(values: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    """Return ``values``, shape ``(..., H, W)``, in the middle of a map of height and width ``size`` of ``fill``."""
    down, right = size[0] - values.shape[-2], size[1] - values.shape[-1]
    return pad(values, (right // 2, right - right // 2, down // 2, down - down // 2), value=fill)
