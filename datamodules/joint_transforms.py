"""Random flips and crops of an image together with its dense labels, by rules that keep the labels true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

#: The value of class labels that says that a label is missing. In float labels it is NaN.
IGNORE_INDEX = -1

#: What the numbers of a label mean, and with it how they change when the image does. See `JointTransform`.
LabelKind = Literal["classes", "mask", "values", "depth", "disparity", "normal", "curvature", "fixed"]


def missing_like(label: Tensor) -> Tensor:
    """Return a label of the same shape and dtype without any value: NaN, or ``IGNORE_INDEX`` for integers.

    Example:
        >>> missing_like(torch.ones(2)), missing_like(torch.ones(2, dtype=torch.long))
        (tensor([nan, nan]), tensor([-1, -1]))
    """
    return torch.full_like(label, torch.nan if label.is_floating_point() else IGNORE_INDEX)


def flip_label(label: Tensor, kind: LabelKind) -> Tensor:
    """Return ``label``, shape ``(..., H, W)``, of the mirrored scene. Normals change the sign of their first channel.

    Raises:
        ValueError: If the kind is ``"fixed"``.
    """
    if kind == "fixed":
        raise ValueError(
            'A label of kind "fixed" should not be flipped. Leave flips out, or supply the mirrored label.'
        )
    flipped = label.flip(-1)
    if kind == "normal":
        flipped[..., 0, :, :] *= -1
    return flipped


class Crop(NamedTuple):
    """The window of a crop, in pixels: ``height`` x ``width`` from row ``top`` and column ``left`` on."""

    top: int
    left: int
    height: int
    width: int


def enlarge_label(label: Tensor, kind: LabelKind, crop: Crop) -> Tensor:
    """Return the window ``crop`` of ``label``, shape ``(C, H, W)`` or ``(H, W)``, enlarged to the shape of ``label``.

    With the enlargement ``s``, the mean of those along the two sides, depth is divided by ``s``; disparity and
    curvature are multiplied by it.
    """
    top, left, height, width = crop
    window = label[..., top : top + height, left : left + width]
    size = (label.shape[-2], label.shape[-1])
    scale = (size[0] / height + size[1] / width) / 2
    # Interpolation would invent classes, widen edges to ramps, and put surfaces in the air between near and far ones.
    if kind not in ("values", "normal", "fixed"):
        nearest = nearest_pixels(window, size)
        factor = {"depth": 1 / scale, "disparity": scale, "curvature": scale}.get(kind)
        return nearest if factor is None else nearest * factor
    return _enlarge_values(window, size, unit=kind == "normal")


def nearest_pixels(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ``values``, shape ``(..., h, w)``, at height and width ``size``: each pixel is the nearest there was.

    Example:
        >>> nearest_pixels(torch.tensor([[1, 2, 3]]), (1, 6)).tolist()
        [[1, 1, 2, 2, 3, 3]]
    """
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).floor().long().clamp(max=old - 1)
        for new, old in zip(size, values.shape[-2:], strict=True)
    )
    # Two selections of whole rows and columns are several times faster than one by a grid of indices.
    return values.index_select(-2, rows).index_select(-1, columns)


def _enlarge_values(window: Tensor, size: tuple[int, int], *, unit: bool) -> Tensor:
    """Interpolate between valid pixels only; a pixel is as invalid as the one nearest to it."""
    maps = window.reshape(1, -1, *window.shape[-2:])
    valid = ~maps.isnan().any(1, keepdim=True)
    if unit:
        valid &= (maps != 0).any(1, keepdim=True)  # data sets mark pixels without a normal by the zero vector
    resized = interpolate(torch.where(valid, maps, 0), size, mode="bilinear", align_corners=False)
    whole = bool(valid.all())
    if unit:
        # Many times faster than `normalize`, whose norm does not care for the order of the memory.
        resized = resized / resized.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    elif not whole:
        share = interpolate(valid.to(maps.dtype), size, mode="bilinear", align_corners=False)
        resized = resized / share.clamp(min=1e-12)
    if not whole:
        resized = torch.where(nearest_pixels(valid, size), resized, nearest_pixels(maps, size))
    return resized.reshape(*window.shape[:-2], *size)


class Draw(NamedTuple):
    """One random transform: whether the scene is mirrored and which window is then enlarged; None for all of it."""

    flip: bool
    crop: Crop | None


class JointTransform:
    """Horizontal flips and enlarged crops of an image and its labels.

    What becomes of a label depends on its kind. A flip reverses the columns of all; of a crop enlarged ``s`` times,

    - ``"classes"`` (integers) and ``"mask"`` (edges, binary maps) take the nearest pixel, so that no new value appears.
      Lines get up to ``ceil(s)`` pixels wide.
    - ``"values"`` (colours, shading, heat maps) are interpolated bilinearly, as the image is.
    - ``"depth"`` takes the nearest pixel and is divided by ``s``; ``"disparity"`` and ``"curvature"`` are multiplied.
    - ``"normal"`` (unit vectors, x to the right) is interpolated and brought back to unit length. Its x changes sign in
      a flip.
    - ``"fixed"`` is like ``"values"`` but cannot be flipped: shading by a light that is not in the middle, say. With
      such a label, ``flip`` has to be 0, unless the caller supplies the label of the mirrored scene.

    Invalid pixels, NaN or ``IGNORE_INDEX`` or, among normals, the zero vector, stay invalid and are not mixed into
    their neighbours.

    The crop is the picture that a camera with ``s`` times the focal length and a shifted principal point takes of a
    scene whose lengths are all divided by ``s``: for that camera depth, along the axis and along the ray, normals and
    curvature are exact, but for the rounding to pixels. Benchmarks read it as a picture by the *same* camera of a scene
    ``s`` times nearer. That is a convention: a wall seen at an angle would have another normal then.

    Args:
        kinds: The kind of each label, by name.
        flip: The probability of a flip.
        max_scale: The largest enlargement, at least 1. It is drawn uniformly from ``[1, max_scale]``, then rounded so
            that the window is a whole number of pixels high and wide. The place of the window is drawn uniformly.

    Raises:
        ValueError: If a number is out of its range, or a label of kind ``"fixed"`` would be flipped.

    Example:
        >>> transform = JointTransform({"depth": "depth", "normal": "normal"}, flip=1.0, max_scale=1.0)
        >>> labels = {"depth": torch.tensor([[[1.0, 2.0]]]), "normal": torch.tensor([[[0.6, 0]], [[0, 0]], [[0.8, 1]]])}
        >>> image, labels = transform(torch.zeros(3, 1, 2), labels, torch.Generator())
        >>> labels["depth"].tolist(), labels["normal"][0].tolist()
        ([[[2.0, 1.0]]], [[-0.0, -0.6000000238418579]])
    """

    def __init__(self, kinds: Mapping[str, LabelKind], *, flip: float = 0.5, max_scale: float = 1.25) -> None:
        if not 0 <= flip <= 1:
            raise ValueError(f"`flip` should be a probability in [0, 1]. Found {flip}.")
        if not 1 <= max_scale < float("inf"):
            raise ValueError(f"`max_scale` should be at least 1 and finite. Found {max_scale}.")
        fixed = [name for name, kind in kinds.items() if kind == "fixed"]
        if fixed and flip > 0:
            raise ValueError(f'`flip` should be 0 with labels of kind "fixed". Found {flip} with {", ".join(fixed)}.')
        self.kinds = dict(kinds)
        self.flip = flip
        self.max_scale = max_scale

    def __call__(
        self, image: Tensor, labels: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``image``, shape ``(3, H, W)``, and ``labels``, shapes ``(C, H, W)`` or ``(H, W)``, after one draw."""
        return self.apply(image, labels, self.draw(generator, image.shape[-2], image.shape[-1]))

    def draw(self, generator: torch.Generator, height: int, width: int) -> Draw:
        """Return a random transform of pictures of ``height`` x ``width``. Every call takes four numbers."""
        flip, scale, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        scale = 1 + scale * (self.max_scale - 1)
        rows, columns = (max(1, round(side / scale)) for side in (height, width))
        crop = Crop(int(down * (height - rows + 1)), int(right * (width - columns + 1)), rows, columns)
        return Draw(flip < self.flip, None if (rows, columns) == (height, width) else crop)

    def apply(self, image: Tensor, labels: Mapping[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``image`` and ``labels`` after the transform ``draw``. The arguments stay as they are.

        Raises:
            ValueError: If the kind of a label is not known.
        """
        unknown = [name for name in labels if name not in self.kinds]
        if unknown:
            raise ValueError(f"`labels` should be among {', '.join(self.kinds)}. Found {', '.join(unknown)}.")
        labels = dict(labels)
        if draw.flip:
            image = image.flip(-1)
            labels = {name: flip_label(label, self.kinds[name]) for name, label in labels.items()}
        if draw.crop is not None:
            image = enlarge_label(image, "values", draw.crop)
            labels = {name: enlarge_label(label, self.kinds[name], draw.crop) for name, label in labels.items()}
        return image, labels
