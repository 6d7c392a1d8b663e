"""A network that sees the preference as a part of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtl_lightning.conditioned import ConditionedNetwork


class PreferenceConcatenation(ConditionedNetwork):
    """A network whose inputs are extended by the preference, as in COSMOS (Ruchte and Grabocka, 2021).

    Of inputs of shape ``(B, C, ...)`` dimension 1 grows: features by ``T`` features, images by ``T`` channels, each
    filled with the weight of one task. The network has to be made for ``C + T``.

    Args:
        network: Maps the extended inputs to a dict of predictions, task name to tensor. It becomes a part of this one.
        embedding: What is appended in place of the preference: a module that maps it, shape ``(1, T)``, to a tensor of
            shape ``(1, E)`` or ``(1, E, ...)``, which fits the inputs in all but the first two dimensions. For images
            the paper's code learns one; see :class:`PreferenceUpsampling`.

    References:
        - Ruchte, Grabocka: Scalable Pareto Front Approximation for Deep Multi-Objective Learning (2021), ICDM,
          arXiv:2103.13392.

    Example:
        >>> from mtl_lightning.networks import LeNetEncoder, MultiHeadNetwork
        >>> heads = {"left": nn.Linear(50, 10), "right": nn.Linear(50, 10)}
        >>> network = PreferenceConcatenation(MultiHeadNetwork(LeNetEncoder(in_channels=1 + 2), heads))
        >>> outputs = network(torch.zeros(4, 1, 36, 36), torch.tensor([0.3, 0.7]))
        >>> {name: tuple(output.shape) for name, output in outputs.items()}
        {'left': (4, 10), 'right': (4, 10)}
    """

    def __init__(self, network: nn.Module, embedding: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.embedding = embedding

    def condition(self, preference: Tensor) -> Tensor:
        """Return what is appended to one sample, shape ``(1, E)`` or ``(1, E, ...)``."""
        extension = preference.unsqueeze(0)
        if self.embedding is None:
            return extension
        dtype = next((parameter.dtype for parameter in self.embedding.parameters()), extension.dtype)
        embedded: Tensor = self.embedding(extension.to(dtype))
        return embedded

    def predict(self, inputs: Tensor, condition: Any) -> dict[str, Tensor]:
        """Return the predictions for inputs of shape ``(B, C, ...)`` that are extended by ``condition``.

        Raises:
            TypeError: If the inputs are no floating-point tensor.
            ValueError: If they have less than two dimensions, or the extension does not fit them.
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(f"The inputs should be a floating-point tensor, shape (B, C, ...). Found {found}.")
        if inputs.ndim < 2:
            raise ValueError(f"The inputs should have shape (B, C, ...). Found shape {tuple(inputs.shape)}.")
        extension = condition.reshape(*condition.shape, *(1,) * (inputs.ndim - condition.ndim))
        wanted = (1, extension.shape[1], *inputs.shape[2:])
        if extension.ndim != inputs.ndim or any(
            found not in (1, size) for found, size in zip(extension.shape, wanted, strict=True)
        ):
            raise ValueError(
                f"`embedding` should return a shape that fits inputs of shape {tuple(inputs.shape)}. "
                f"Found shape {tuple(condition.shape)}."
            )
        extension = extension.to(inputs.dtype).expand(len(inputs), *wanted[1:])
        outputs: dict[str, Tensor] = self.network(torch.cat([inputs, extension], dim=1))
        return outputs


class PreferenceUpsampling(nn.Module):
    """An embedding of the preference as an image, learned by two transposed convolutions, as in COSMOS's code.

    They make 10 x 10 pixels of the preference, with ReLU after each, which nearest neighbours bring to the size of the
    images. With ``LeNetEncoder(in_channels=3, kernel_sizes=(5, 5))`` and two heads the network has 43,058 parameters,
    as that code.

    Args:
        num_tasks: The number of tasks ``T``, and of channels.
        image_size: The height and width of the images in pixels.

    Raises:
        ValueError: If one of them is not positive.

    Example:
        >>> PreferenceUpsampling(num_tasks=2, image_size=36)(torch.tensor([[0.3, 0.7]])).shape
        torch.Size([1, 2, 36, 36])
    """

    def __init__(self, num_tasks: int, image_size: int | tuple[int, int]) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if num_tasks < 1 or min(size) < 1:
            raise ValueError(f"`num_tasks` and `image_size` should be positive. Found {num_tasks} and {image_size}.")
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(num_tasks, num_tasks, kernel_size=4, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(num_tasks, num_tasks, kernel_size=6, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.Upsample(size),
        )

    def forward(self, preference: Tensor) -> Tensor:
        """Return an image, shape ``(1, T, height, width)``, of the preference, shape ``(1, T)``."""
        return self.layers(preference[:, :, None, None])
