"""A light head for dense prediction."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from mtl_lightning.networks.encoder_decoder import group_norm


class DenseHead(nn.Module):
    """A prediction for every pixel: a 1x1 convolution, with or without a hidden layer of 3x3, then upsampling.

    Args:
        in_channels: The number of channels of the features, the encoder's ``out_features``.
        out_channels: The number of channels of the prediction, such as that of classes.
        hidden: The channels of a 3x3 convolution with normalisation and ReLU before the last one. None by default.
        scale_factor: By how much the prediction is upsampled, bilinearly, to the size of the images: the encoder's
            ``stride``.
        norm: From the number of channels to the normalisation of the hidden layer.

    Raises:
        ValueError: If ``scale_factor`` is less than one.

    Example:
        >>> import torch
        >>> head = DenseHead(in_channels=24, out_channels=3, hidden=16, scale_factor=4)
        >>> head(torch.zeros(2, 24, 8, 8)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int | None = None,
        *,
        scale_factor: int = 1,
        norm: Callable[[int], nn.Module] = group_norm,
    ) -> None:
        super().__init__()
        if scale_factor < 1:
            raise ValueError(f"`scale_factor` should be at least 1. Found {scale_factor}.")
        layers: list[nn.Module] = []
        if hidden is not None:
            layers += [nn.Conv2d(in_channels, hidden, 3, padding=1, bias=False), norm(hidden), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(in_channels if hidden is None else hidden, out_channels, 1))
        self.scale_factor = scale_factor

    def forward(self, features: Tensor) -> Tensor:
        """Return the prediction.

        Args:
            features: Shape ``(B, in_channels, height, width)``.

        Returns:
            Shape ``(B, out_channels, height * scale_factor, width * scale_factor)``.
        """
        prediction: Tensor = self.layers(features)
        if self.scale_factor == 1:
            return prediction
        factor = float(self.scale_factor)
        return functional.interpolate(prediction, scale_factor=factor, mode="bilinear", align_corners=False)
