"""The LeNets of the papers on Pareto front learning with two digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class LeNetEncoder(nn.Module):
    """Two convolutions and a linear layer: the shared part of the networks for two digits in an image.

    Each convolution is followed by 2x2 max pooling and ReLU, the linear layer by ReLU. Pooling comes before ReLU: the
    two commute, and this order is cheaper. With two heads ``nn.Linear(50, 10)`` on images of shape ``(1, 36, 36)``:

    - ``kernel_sizes=(9, 5)`` is the network of Pareto MTL (Lin et al., 2019), 31,910 parameters;
    - ``kernel_sizes=(5, 5)`` is the one of COSMOS (Ruchte and Grabocka, 2021), 42,350 parameters.

    Args:
        in_channels: The number of channels of the images.
        image_size: The height and width of the images in pixels.
        kernel_sizes: The sizes of the two convolutions' kernels.
        out_features: The number of features.

    Raises:
        ValueError: If the images are too small for the kernels.

    References:
        - Lin, Zhen, Li, Zhang, Kwong: Pareto Multi-Task Learning (2019), arXiv:1912.12854.
        - Ruchte, Grabocka: Scalable Pareto Front Approximation for Deep Multi-Objective Learning (2021),
          arXiv:2103.13392.

    Example:
        >>> LeNetEncoder()(torch.zeros(2, 1, 36, 36)).shape
        torch.Size([2, 50])
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 36,
        kernel_sizes: tuple[int, int] = (9, 5),
        out_features: int = 50,
    ) -> None:
        super().__init__()
        size = image_size
        for kernel_size in kernel_sizes:
            size = (size - kernel_size + 1) // 2
        if size < 1:
            raise ValueError(
                "`image_size` should leave at least one pixel after both convolutions and poolings with "
                f"`kernel_sizes={tuple(kernel_sizes)}`. Found {image_size}."
            )
        self.conv1 = nn.Conv2d(in_channels, 10, kernel_sizes[0])
        self.conv2 = nn.Conv2d(10, 20, kernel_sizes[1])
        self.linear = nn.Linear(20 * size * size, out_features)
        self.out_features = out_features

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, shape ``(B, out_features)``, of images, shape ``(B, in_channels, height, width)``."""
        features = functional.max_pool2d(_channels_last(self.conv1(images)), 2).relu()
        features = functional.max_pool2d(self.conv2(features), 2).relu()
        return self.linear(torch.flatten(features, start_dim=1)).relu()


def _channels_last(features: Tensor) -> Tensor:
    """Return ``features`` in the order in memory in which the CPU pools them three times as fast."""
    # Not by `memory_format`, which vmap does not know.
    return features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if features.device.type == "cpu" else features
