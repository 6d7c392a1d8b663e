"""The mean of gradients over the ranks, for passes that DDP is kept out of."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def average_gradients(parameters: Iterable[nn.Parameter], reduce: Callable[[Tensor], Tensor]) -> None:
    """Average the gradients over the ranks, in place and in one piece per dtype; every rank has to take part.

    Ranks may have reached different parameters, as by a layer that is dropped at random: a gradient that a rank lacks
    counts as zero there, and one that all lack stays ``None``.

    Args:
        parameters: The same ones, in the same order, on all ranks.
        reduce: From a tensor to its mean over the ranks.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}  # in the same order on all ranks, which a set is not
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for some in by_dtype.values():
        reached = torch.ones(len(some), dtype=some[0].dtype, device=some[0].device)
        lacking = [place for place, parameter in enumerate(some) if parameter.grad is None]
        for place in lacking:
            reached[place] = 0.0
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        flat = reduce(torch.cat([reached, *(gradient.flatten() for gradient in gradients)]))
        reached, *pieces = torch.split(flat, [len(some), *(gradient.numel() for gradient in gradients)])
        elsewhere = reached.tolist() if lacking else []  # waits for the device, but only where something is lacking
        for place, (parameter, gradient, piece) in enumerate(zip(some, gradients, pieces, strict=True)):
            if parameter.grad is not None or elsewhere[place]:
                parameter.grad = gradient.copy_(piece.view_as(gradient))
