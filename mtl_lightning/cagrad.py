"""Conflict-averse gradient descent.

References:
    - Liu, Liu, Jin, Stone, Liu: Conflict-Averse Gradient Descent for Multi-task Learning (2021), arXiv:2110.14048.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from mtl_lightning.aggregation import GradientAggregator
from mtl_lightning.min_norm import min_norm_weights
from mtl_lightning.nnls import nonnegative_least_squares


class CAGrad(GradientAggregator):
    """The vector near the mean gradient that is best for the task that gains least (CAGrad; Liu et al., 2021).

    ``max_d min_t <g_t, d>`` over ``|d - g_0| <= c |g_0|``, with ``g_0`` the mean of the gradients ``g_t`` (equation 2).
    The solution is ``g_0`` and a positive combination of the gradients of length ``c |g_0|``.

    Args:
        c: How far the vector may be from the mean gradient, by the length of that; at least 0. With zero it is the mean
            gradient; the paper has numbers below one, with which only minima of the mean loss are stationary. The
            default is ours.

    Raises:
        ValueError: If ``c`` is negative or not finite.

    Note:
        The problem is solved to rounding, as a projection onto ``{d: <g_t, d> >= m for all t}`` for the ``m`` at which
        it is just near enough, where the official code ends an iteration. Where the gradients have a hull that contains
        zero, the best vector need not be unique; it is the one nearest to the mean gradient here. The official code may
        divide by ``1 + c^2`` in addition.

    Example:
        >>> aggregator = CAGrad(c=0.5)
        >>> aggregator.resolve(["depth", "edges"])
        >>> aggregator(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor([1.5000, 1.5000])
    """

    def __init__(self, c: float = 0.5) -> None:
        super().__init__()
        if not (isfinite(c) and c >= 0):
            raise ValueError(f"`c` should be finite and at least 0. Found {c}.")
        self.c = float(c)

    def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
        """Return the weights of the mean gradient and what is added to it."""
        mean = torch.full((len(gramian),), 1 / len(gramian), dtype=torch.float64)
        return mean + conflict_averse_weights(gramian, self.c)


def conflict_averse_weights(gramian: Tensor, c: float) -> Tensor:
    """Return the weights of what CAGrad adds to the mean gradient, shape ``(T,)``, float64.

    Args:
        gramian: Of the gradients, shape ``(T, T)``, float64.
        c: The radius, by the length of the mean gradient.
    """
    products = gramian.mean(dim=0)  # of the mean gradient with all gradients
    radius = c * float(products.mean().clamp_min(0).sqrt())
    nothing = torch.zeros_like(products)
    if radius == 0:
        return nothing
    # The distance to {d: <g_t, d> >= m} grows with m and is convex in it: from the right, Newton's method falls to the
    # m whose distance is the radius, and never below it.
    margin, found = 0.0, _nearest(gramian, products, 0.0)
    distance = _length(gramian, found)
    if distance < radius:
        # The mean gradient can be bettered for all tasks at once, unless there is no direction for it.
        shortest = min_norm_weights(gramian)
        size = _length(gramian, shortest)
        if size <= 1e-7 * float(shortest @ gramian.diagonal().clamp_min(0).sqrt()):  # of its terms: rounding
            return found
        margin = float(shortest @ products) + radius * size  # no vector that is near enough does better
        found = _nearest(gramian, products, margin)
        distance = _length(gramian, found)
    for _ in range(50):  # a handful, for the distance is piecewise a conic section
        excess = distance - radius
        if excess <= 1e-10 * radius:
            break
        margin -= excess * distance / float(found.sum())
        found = _nearest(gramian, products, margin)
        distance = _length(gramian, found)
    return found * (radius / distance) if distance > radius else found


def _nearest(gramian: Tensor, products: Tensor, margin: float) -> Tensor:
    """Return the weights of the shortest vector to add for products of at least ``margin``."""
    return nonnegative_least_squares(gramian, margin - products)


def _length(gramian: Tensor, weights: Tensor) -> float:
    return float((weights @ gramian @ weights).clamp_min(0).sqrt())
