"""Means over the ranks, for passes that DDP is kept out of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


def average_gradients(parameters: Iterable[nn.Parameter], reduce: Callable[[Tensor], Tensor]) -> None:
    """Average the gradients over the ranks, in place; every rank has to take part. See :func:`mean_gradients`."""
    parameters = list(parameters)
    for parameter, mean in zip(parameters, mean_gradients(parameters, reduce), strict=True):
        if mean is not None:
            parameter.grad = (torch.empty_like(parameter) if parameter.grad is None else parameter.grad).copy_(mean)


@torch.no_grad()
def mean_gradients(parameters: Iterable[nn.Parameter], reduce: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """Return the means of the gradients over the ranks, in one piece per dtype; every rank has to take part.

    Ranks may have reached different parameters, as by a layer that is dropped at random: a gradient that a rank lacks
    counts as zero there, and one that all lack stays ``None``.

    Args:
        parameters: The same ones, in the same order, on all ranks.
        reduce: From a tensor to its mean over the ranks.
    """
    parameters = list(parameters)
    found: list[Tensor | None] = [None] * len(parameters)
    by_dtype: dict[torch.dtype, list[int]] = {}  # in the same order on all ranks, which a set is not
    for index, parameter in enumerate(parameters):
        by_dtype.setdefault(parameter.dtype, []).append(index)
    for indices in by_dtype.values():
        some = [parameters[index] for index in indices]
        reached = torch.ones(len(some), dtype=some[0].dtype, device=some[0].device)
        lacking = [place for place, parameter in enumerate(some) if parameter.grad is None]
        for place in lacking:
            reached[place] = 0.0
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        reached, *means = _mean([reached, *gradients], reduce)
        elsewhere = reached.tolist() if lacking else []  # waits for the device, but only where something is lacking
        for place, index in enumerate(indices):
            if some[place].grad is not None or elsewhere[place]:
                found[index] = means[place]
    return found


@torch.no_grad()
def average_statistics(network: nn.Module, reduce: Callable[[Tensor], Tensor]) -> None:
    """Average the floating-point buffers of a network over the ranks, in place; every rank has to take part."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    # In double precision, so that three times a third of a buffer that is the same on all ranks is that buffer.
    means = [buffer.double() for buffer in buffers]
    average_tensors(means, reduce)
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean)


@torch.no_grad()
def average_tensors(tensors: Iterable[Tensor], reduce: Callable[[Tensor], Tensor]) -> None:
    """Average tensors over the ranks, in place and in one piece per dtype; every rank has to take part.

    Args:
        tensors: As many of the same shapes and dtypes, in the same order, on all ranks.
        reduce: From a tensor to its mean over the ranks.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for some in by_dtype.values():
        for tensor, mean in zip(some, _mean(some, reduce), strict=True):
            tensor.copy_(mean)


def _mean(tensors: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
    flat = reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]
