"""How the colours of pictures are standardised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

#: Mean and deviation of the three colours, in ``[0, 1]``.
Colours = tuple[tuple[float, float, float], tuple[float, float, float]]
#: How images in ``[0, 1]`` are normalised: by mean and standard deviation of ImageNet, or to ``[-1, 1]``.
Normalize = Literal["imagenet", "symmetric"]
COLOURS: Mapping[str, Colours] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def checked_colours(normalize: str | None, choices: Mapping[str, Colours] = COLOURS) -> Colours | None:
    """Return the mean and deviation that ``normalize`` names; None for None.

    Raises:
        ValueError: If it is not among the choices.
    """
    if normalize is None:
        return None
    if normalize not in choices:
        raise ValueError(f"`normalize` should be one of {', '.join(choices)}, or None. Found {normalize!r}.")
    return choices[normalize]


def standardised(image: Tensor, colours: Colours | None) -> Tensor:
    """Return ``image``, shape ``(3, H, W)`` and in ``[0, 1]``, by mean and deviation; None leaves it as it is.

    Example:
        >>> standardised(torch.ones(3, 1, 1), COLOURS["symmetric"]).flatten()
        tensor([1., 1., 1.])
    """
    if colours is None:
        return image
    mean, std = (torch.tensor(values)[:, None, None] for values in colours)
    return (image - mean) / std
