r"""Pareto multi-task learning: one point of the front in each of several sectors of the losses.

References:
    X. Lin, H.-L. Zhen, Z. Li, Q. Zhang, S. Kwong, "Pareto Multi-Task Learning", NeurIPS 2019, arXiv 1912.12854.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_lightning.gradient_weighting import GradientWeighting, check_statistics, on_host
from mtl_lightning.min_norm import min_norm_weights

# Preferences nearer than this count as equal: their sectors are one.
_TIE_TOLERANCE = 1e-6


class ParetoMTL(GradientWeighting):
    r"""Pareto MTL: descent for all tasks within the sector of each preference.

    With ``u_k`` the preferences at unit length, the losses of subproblem ``k`` should be nearest to ``u_k`` in angle:

        ``G_j(f) = (u_j - u_k)' f <= 0    for all j``

    The step is the shortest vector in the convex hull of the gradients of all ``f_t``, and of all ``G_j`` that are
    violated: against it all of them fall, or the point is critical. In the first steps, a subproblem outside its sector
    looks at the ``G_j`` alone. Where no constraint is violated, this is :class:`~mtl_lightning.mgda.MGDA`.

    A preference is a direction in the space of losses here, as with :class:`~mtl_lightning.scalarization.PBI`: the
    larger it is, the *larger* the share of its loss.

    Args:
        initial_steps: For how many steps of the optimiser a subproblem outside its sector looks for it without regard
            to the losses. The published code gives it the first fifth of a run on its synthetic problem, and two epochs
            at most on pictures.

    Raises:
        ValueError: If ``initial_steps`` is negative.

    Note:
        Which ``G_j`` count as violated does not depend on the length of ``f``; that of the losses' scales to each other
        is in the preferences. The weights may be negative; their absolute values sum to one, so that a step is no
        smaller where many sectors are narrow. In the published code for networks they sum to ``T`` in the descent: its
        learning rates are to be multiplied by that here. Other departures from that code: a subproblem inside its
        sector descends from the first step on, and one that leaves it in the initial steps looks for it again.

    Example:
        >>> import torch
        >>> rule = ParetoMTL(initial_steps=0)
        >>> preferences = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
        >>> rule.weights(torch.eye(2).expand(3, 2, 2), losses=torch.ones(3, 2), preferences=preferences)
        tensor([[0.6464, 0.3536],
                [0.5000, 0.5000],
                [0.3536, 0.6464]])
    """

    def __init__(self, initial_steps: int = 500) -> None:
        super().__init__()
        if initial_steps < 0:
            raise ValueError(f"`initial_steps` should not be negative. Found {initial_steps}.")
        self.initial_steps = initial_steps

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"initial_steps={self.initial_steps}"

    def weights(self, gramian: Tensor, losses: Tensor, preferences: Tensor, step: int = 0) -> Tensor:
        """Return the weights of the tasks, absolute values of sum one, shape ``(P, T)``.

        Args:
            gramian: The inner products of the gradients of the tasks, shape ``(P, T, T)``.
            losses: The losses of the tasks, shape ``(P, T)``.
            preferences: The preference vectors of all ``P`` subproblems, whose sectors bound each other, shape
                ``(P, T)``.
            step: How many steps of the optimiser there have been.

        Raises:
            ValueError: If shapes do not fit, or an entry is not finite.
        """
        check_statistics(gramian, losses, preferences)
        if losses.ndim != 2:
            raise ValueError(
                f"`losses` should have shape (P, T), all subproblems at once. Found shape {tuple(losses.shape)}."
            )
        matrices, directions = on_host(gramian), _unit(on_host(preferences))
        constraints = directions - directions.unsqueeze(1)  # row j of matrix k is u_j - u_k
        violated = torch.einsum("kjt,kt->kj", constraints, _unit(on_host(losses))) > 0
        violated &= constraints.norm(dim=-1) > _TIE_TOLERANCE

        weights = torch.empty_like(directions)
        for k, matrix in enumerate(matrices):
            rows = constraints[k, violated[k]]  # the gradients of the G_j, as combinations of those of the f_t
            if step >= self.initial_steps or not len(rows):
                rows = torch.cat([torch.eye(len(matrix), dtype=rows.dtype), rows])
            weights[k] = min_norm_weights(rows @ matrix @ rows.T) @ rows
        return (weights / weights.abs().sum(dim=-1, keepdim=True)).to(gramian)


def _unit(vectors: Tensor) -> Tensor:
    """Return the vectors at length one, shape ``(..., T)``; a vector of zeros stands for equal entries."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths, vectors.shape[-1] ** -0.5)
