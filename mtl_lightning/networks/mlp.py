"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from mtl_lightning.stacked_layers import Call


class MLP(nn.Module):
    """A multi-layer perceptron that flattens its inputs, with an activation after every hidden layer.

    Args:
        in_features: The number of elements of one input.
        hidden_features: The widths of the hidden layers.
        out_features: The width of a last layer without activation. By default there is none, as suits an encoder whose
            heads are linear, and the output is that of the last hidden layer.
        activation: A class or function that makes an activation module.

    Raises:
        ValueError: If there is no layer at all, or a width is not positive.

    Example:
        >>> import torch
        >>> encoder = MLP(in_features=64, hidden_features=(32, 16))
        >>> encoder(torch.zeros(5, 1, 8, 8)).shape, encoder.out_features
        (torch.Size([5, 16]), 16)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden_features, *([] if out_features is None else [out_features])]
        if len(widths) < 2:
            raise ValueError("`hidden_features` should hold at least one width if `out_features` is None. Found none.")
        if min(widths) < 1:
            raise ValueError(f"All widths should be positive. Found {widths}.")
        layers: list[nn.Module] = [nn.Flatten()]
        for index, (width_in, width_out) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(width_in, width_out))
            if index < len(hidden_features):
                layers.append(activation())
        self.layers = nn.Sequential(*layers)
        self.out_features = widths[-1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features, shape ``(B, out_features)``, of inputs, shape ``(B, ...)``."""
        return self.layers(inputs)

    def compose(self, call: Call, inputs: Any) -> Any:
        """Return what ``forward`` does, every part evaluated by ``call``; for populations."""
        return call(self.layers, inputs)
