"""A small encoder-decoder for dense prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional


def group_norm(channels: int) -> nn.Module:
    """Return group normalisation in at most eight groups, as many as divide ``channels``.

    Unlike batch normalisation it treats each image by itself: several forward passes with a batch, or parts of a batch
    on several devices, give the same numbers as one.
    """
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class EncoderDecoder(nn.Module):
    """Stages of convolutions down to a coarse map and back, with shortcuts between equal resolutions.

    The order follows U-Net (Ronneberger et al., 2015): two 3x3 convolutions per stage, and every stage but the first
    halves the image. The way back is lighter: coarse features pass a 1x1 convolution, are upsampled to their nearest
    neighbours, added to those of the stage, and pass one 3x3 convolution. ``(16, 32, 64)`` has 86,480 parameters. ReLU
    is out of place, as ``torch.vmap`` requires of tensors that the models share.

    Args:
        channels: The channels of each stage, at least one.
        in_channels: The number of channels of the images.
        stride: How many pixels a feature stands for, in height and in width: 1, 2, 4, up to the coarsest stage. Above 1
            the last steps back are left out, and heads upsample; see :class:`DenseHead`.
        norm: From the number of channels to a normalisation. Another than the default may couple the images of a batch.

    Attributes:
        out_features: The number of channels of the features.

    Raises:
        ValueError: If there is no stage, one has no channel, or ``stride`` is not that of a stage; in a call, if the
            coarsest stage does not divide the size of the images.

    References:
        - Ronneberger, Fischer, Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation (2015),
          arXiv:1505.04597.

    Example:
        >>> import torch
        >>> encoder = EncoderDecoder(channels=(8, 16, 32))
        >>> encoder(torch.zeros(2, 3, 16, 24)).shape
        torch.Size([2, 8, 16, 24])
    """

    def __init__(
        self,
        channels: Sequence[int] = (24, 48, 96),
        in_channels: int = 3,
        *,
        stride: int = 1,
        norm: Callable[[int], nn.Module] = group_norm,
    ) -> None:
        super().__init__()
        if len(channels) < 1 or min(channels) < 1:
            raise ValueError(
                f"`channels` should hold the positive number of channels of each stage. Found {tuple(channels)}."
            )
        strides = [2**stage for stage in range(len(channels))]
        if stride not in strides:
            raise ValueError(f"`stride` should be one of the stages', {strides}. Found {stride}.")
        self.stages = nn.ModuleList(
            nn.Sequential(
                *_convolution(width_in, width_out, norm, stride=1 if stage == 0 else 2),
                *_convolution(width_out, width_out, norm),
            )
            for stage, (width_in, width_out) in enumerate(pairwise([in_channels, *channels]))
        )
        last = strides.index(stride)
        back = list(pairwise(channels[last:]))[::-1]  # from coarse to fine
        self.reductions = nn.ModuleList(nn.Conv2d(coarse, fine, 1, bias=False) for fine, coarse in back)
        self.refinements = nn.ModuleList(nn.Sequential(*_convolution(fine, fine, norm)) for fine, _ in back)
        self.stride = stride
        self.out_features = channels[last]

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images.

        Args:
            images: Shape ``(B, in_channels, height, width)``.

        Returns:
            Shape ``(B, out_features, height / stride, width / stride)``.

        Raises:
            ValueError: If the coarsest stage does not divide the height and the width.
        """
        coarsest = 2 ** (len(self.stages) - 1)
        height, width = images.shape[-2:]
        if height % coarsest or width % coarsest:
            raise ValueError(
                f"The height and width of `images` should be multiples of {coarsest}, as {len(self.stages)} stages "
                f"halve them {len(self.stages) - 1} times. Found {height} and {width}."
            )
        maps: list[Tensor] = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        features = maps.pop()
        for reduction, refinement in zip(self.reductions, self.refinements, strict=True):
            upsampled = functional.interpolate(reduction(features), scale_factor=2.0, mode="nearest")
            features = refinement(maps.pop() + upsampled)
        return features


def _convolution(
    in_channels: int, out_channels: int, norm: Callable[[int], nn.Module], stride: int = 1
) -> tuple[nn.Module, ...]:
    # Normalisation has a bias of its own.
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return convolution, norm(out_channels), nn.ReLU()
