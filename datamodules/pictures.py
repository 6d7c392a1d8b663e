"""Labelled pictures, each a file or a slice of an array, as float tensors of one size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from mtl_lightning.datamodules.colours import Colours, standardised
from mtl_lightning.datamodules.files import file_problem, first_few, read_colours
from mtl_lightning.datamodules.joint_transforms import JointTransform
from mtl_lightning.datamodules.resizing import resize_image

OnBroken = Literal["raise", "skip"]


def read_picture(path: Path) -> Tensor:
    """Return the picture at ``path`` in colours, uint8, shape ``(3, H, W)``.

    Raises:
        FileNotFoundError: If there is no such file.
        BrokenFileError: If it is cut off, no picture, or has more than 8 bits.
    """
    return torch.from_numpy(read_colours(path)).permute(2, 0, 1)


def prepare_picture(pixels: Tensor, image_size: tuple[int, int] | None, colours: Colours | None) -> Tensor:
    """Return uint8 ``pixels``, shape ``(3, h, w)``, as float32 at ``image_size``, in ``[0, 1]`` or standardised.

    Example:
        >>> prepare_picture(torch.full((3, 4, 4), 51, dtype=torch.uint8), (2, 1), None).tolist()[0]
        [[0.20000000298023224], [0.20000000298023224]]
    """
    image = pixels.float() / 255
    if image_size is not None:
        image = resize_image(image, image_size)
    return standardised(image, colours)


def picture_augmentation(image: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``image``, shape ``(3, H, W)``, half the time mirrored, and a crop of it, enlarged 1 to 1.25 times."""
    return JointTransform({}, flip=0.5, max_scale=1.25)(image, {}, generator)[0]


def check_on_broken(on_broken: str) -> None:
    """Raise a ``ValueError`` if ``on_broken`` is not one of its two choices."""
    if on_broken not in ("raise", "skip"):
        raise ValueError(f"`on_broken` should be 'raise' or 'skip'. Found {on_broken!r}.")


class PictureFiles(Dataset[tuple[Tensor, Tensor]]):
    """Files of pictures with their labels, as ``(image, label)``: float32, shape ``(3, H, W)``, and a label's tensor.

    Args:
        paths: The files.
        labels: Their labels, shape ``(N, ...)``.
        image_size: The height and width; None leaves pictures as they are.
        colours: The mean and deviation to standardise colours by; None leaves them in ``[0, 1]``.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, image_size: tuple[int, int] | None, colours: Colours | None
    ) -> None:
        self.paths = [str(path) for path in paths]  # many times smaller than paths when sent to a worker
        self.labels = labels
        self.image_size = image_size
        self.colours = colours

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = prepare_picture(read_picture(Path(self.paths[index])), self.image_size, self.colours)
        return image, self.labels[index]


def without_broken(paths: Sequence[Path], on_broken: OnBroken) -> Tensor:
    """Return which of the files to use, bool, shape ``(N,)``: all, or with ``"skip"`` those that look whole.

    Files are judged by their beginning and end, as ``file_problem`` does. What is left out is said, once.
    """
    if on_broken == "raise":
        return torch.ones(len(paths), dtype=torch.bool)
    problems = [file_problem(path) for path in paths]
    broken = [f"{path} ({problem})" for path, problem in zip(paths, problems, strict=True) if problem]
    if broken:
        rank_zero_warn(f"{len(broken)} of {len(paths)} pictures cannot be read and are left out: {first_few(broken)}.")
    return torch.tensor([problem is None for problem in problems])
