"""The bargaining solution among the gradients of the tasks.

References:
    - Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya: Multi-Task Learning as a Bargaining Game (2022),
      arXiv:2202.01017.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from mtl_lightning.aggregation import GradientAggregator

RIDGE = 1e-12  # of the matrix of cosines; bounds the weights where gradients cancel out


class NashMTL(GradientAggregator):
    """The vector on which the tasks agree as on the Nash bargaining solution (Nash-MTL; Navon et al., 2022).

    It maximises the product of the tasks' gains ``<g_t, d>`` over vectors of one length, and so gains for every task.
    Its weights solve ``G w = 1 / w`` with all ``w > 0`` (claim 3.1). The unit of a loss does not change its direction.

    Args:
        max_norm: The largest length of the vector, as in the official code; ``None`` for no bound.

    Raises:
        ValueError: If ``max_norm`` is not positive.

    Note:
        The weights are those that minimise ``w' G w / 2 - sum_t log w_t``, a convex function, found by Newton's method
        to rounding; the paper has a sequence of convex problems for a general solver. As in the official code, ``G``
        is divided by its norm before, so that the length, ``(T |G|)^(1/2)``, follows that of the gradients; by the
        equation itself it would always be ``T^(1/2)``. Weights kept for several steps are not offered, for it is the
        gradients that cost. Where gradients cancel out, as at a Pareto stationary point, there is no solution, and the
        vector is near zero. A gradient of zero has no weight.

    Example:
        >>> aggregator = NashMTL()
        >>> aggregator.resolve(["depth", "edges"])
        >>> aggregator(torch.tensor([[100.0, 0.0], [0.0, 1.0]]))
        tensor([0.7071, 0.7071])
    """

    def __init__(self, max_norm: float | None = 1.0) -> None:
        super().__init__()
        if max_norm is not None and not (isfinite(max_norm) and max_norm > 0):
            raise ValueError(f"`max_norm` should be positive and finite, or None. Found {max_norm}.")
        self.max_norm = max_norm

    def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
        """Return the positive weights with ``G w = |G| / w``, less where the vector would be too long."""
        size = torch.linalg.matrix_norm(gramian)
        lengths = gramian.diagonal().clamp_min(0).sqrt()
        (moving,) = torch.nonzero(lengths, as_tuple=True)
        weights = torch.zeros_like(lengths)
        if not len(moving):
            return weights
        lengths = lengths[moving]
        correlations = gramian[moving][:, moving] / lengths[:, None] / lengths
        found = bargaining_weights(correlations)
        weights[moving] = size.sqrt() / lengths * found
        # By the equation that was solved, and as long as rounding may make it: where gradients cancel out, `w' G w` is
        # rounding times the square of large weights.
        rounding = 4 * len(found) * torch.finfo(torch.float64).eps
        norm = float((size * (len(found) - (RIDGE - rounding) * found.square().sum())).clamp_min(0).sqrt())
        if self.max_norm is not None and norm > self.max_norm:
            weights *= self.max_norm / norm
        return weights


def bargaining_weights(correlations: Tensor) -> Tensor:
    """Return the positive ``w`` with ``C w = 1 / w``, shape ``(T,)``, float64.

    Args:
        correlations: ``C``, positive semi-definite with a diagonal of ones, shape ``(T, T)``, float64.

    Example:
        >>> bargaining_weights(torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
        tensor([0.8165, 0.8165], dtype=torch.float64)
    """
    matrix = correlations + RIDGE * torch.eye(len(correlations), dtype=torch.float64)
    # The right length along the diagonal to begin with, or as near as the ridge lets it be.
    weights = torch.full((len(matrix),), 1.0, dtype=torch.float64)
    weights *= (len(matrix) / (weights @ matrix @ weights).clamp_min(RIDGE)).sqrt()
    for _ in range(200):
        # In units of the weights themselves, where the Hessian is the identity and a positive semi-definite matrix.
        scaled = weights[:, None] * matrix * weights
        slope = scaled.sum(dim=1) - 1
        hessian = scaled + torch.eye(len(matrix), dtype=torch.float64)
        step = torch.linalg.solve(hessian, -slope)
        decrement = float((-slope @ step).clamp_min(0).sqrt())
        # A self-concordant function: this step stays in the domain and converges from anywhere (Nesterov, Nemirovskii).
        weights = weights * (1 + step / (1 + decrement if decrement > 0.25 else 1.0))
        if decrement <= 1e-8:  # it has squared with this step
            break
    return weights
