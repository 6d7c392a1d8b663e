"""A small residual network with batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class ConvEncoder(nn.Module):
    """Residual stages of 3x3 convolutions with batch normalisation, then the mean over the image (He et al., 2016).

    One block per stage; every stage but the first halves the image. ReLU is out of place, as ``torch.vmap`` requires of
    tensors that the models share.

    Args:
        channels: The channels of each stage, at least one; the last is the number of features.
        in_channels: The number of channels of the images.

    Raises:
        ValueError: If there is no stage, or one has no channel.

    References:
        - He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (2016), arXiv:1512.03385.

    Example:
        >>> import torch
        >>> encoder = ConvEncoder(channels=(8, 16), in_channels=3)
        >>> encoder(torch.zeros(2, 3, 12, 12)).shape
        torch.Size([2, 16])
    """

    def __init__(self, channels: Sequence[int], in_channels: int = 1) -> None:
        super().__init__()
        if len(channels) < 1 or min(channels) < 1:
            raise ValueError(
                f"`channels` should hold the positive number of channels of each stage. Found {tuple(channels)}."
            )
        widths = [in_channels, *channels]
        self.blocks = nn.Sequential(
            *(
                _Block(width_in, width_out, stride=1 if index == 0 else 2)
                for index, (width_in, width_out) in enumerate(pairwise(widths))
            )
        )
        self.out_features = channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, shape ``(B, channels[-1])``, of images, shape ``(B, in_channels, height, width)``."""
        return self.blocks(images).mean(dim=(-2, -1))


class _Block(nn.Module):
    """Two convolutions and a projected shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        # Batch normalisation has a bias of its own.
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the images after the block, shape ``(B, out_channels, height / stride, width / stride)``."""
        features = self.norm1(self.conv1(images)).relu()
        return (self.norm2(self.conv2(features)) + self.shortcut(images)).relu()
