"""The augmentation of the NYUv2 and Cityscapes benchmarks: one of few enlargements, and flips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mtl_lightning.datamodules.joint_transforms import Crop, Draw, JointTransform, LabelKind


class ScaleChoice(JointTransform):
    """A ``JointTransform`` that draws the enlargement from a list, each with the same probability.

    That depth is divided by the enlargement and the first channel of mirrored normals negated is part of the benchmark
    (Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention. 2019. arXiv:1803.10704; code of 2021). Here
    disparity is multiplied, normals are brought back to unit length, and pictures are interpolated between the centres
    of pixels, not their corners.

    Args:
        kinds: The kind of each label, by name.
        flip: The probability of a flip.
        scales: The enlargements, each at least 1.

    Raises:
        ValueError: If there is no scale, or a number is out of its range.

    Example:
        >>> transform = ScaleChoice({"depth": "depth"}, scales=(2.0,))
        >>> transform.draw(torch.Generator(), 32, 48).crop[2:]
        (16, 24)
    """

    def __init__(
        self, kinds: Mapping[str, LabelKind], *, flip: float = 0.5, scales: Sequence[float] = (1.0, 1.2, 1.5)
    ) -> None:
        if not scales or min(scales) < 1:
            raise ValueError(f"`scales` should hold at least one number, none under 1. Found {tuple(scales)}.")
        super().__init__(kinds, flip=flip, max_scale=max(scales))
        self.scales = tuple(scales)

    def draw(self, generator: torch.Generator, height: int, width: int) -> Draw:
        """Return a random transform of pictures of ``height`` x ``width``. Every call takes four numbers."""
        flip, choice, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        scale = self.scales[int(choice * len(self.scales))]
        rows, columns = (max(1, round(side / scale)) for side in (height, width))
        crop = Crop(int(down * (height - rows + 1)), int(right * (width - columns + 1)), rows, columns)
        return Draw(flip < self.flip, None if (rows, columns) == (height, width) else crop)
