"""Multiple-gradient descent for a population: each subproblem takes the direction in which all of its losses fall.

References:
    - Désidéri: Multiple-Gradient Descent Algorithm (MGDA) for Multiobjective Optimization (2012), Comptes Rendus
      Mathématique 350.
    - Sener, Koltun: Multi-Task Learning as Multi-Objective Optimization (2018), arXiv:1810.04650.
"""

from __future__ import annotations

from torch import Tensor

from mtl_lightning.gradient_weighting import GradientWeighting, check_statistics
from mtl_lightning.min_norm import min_norm_weights


class MGDA(GradientWeighting):
    """The weights of the shortest vector in the convex hull of the gradients: no loss rises along it.

    It is zero where there is no such direction, at Pareto stationary points. Preferences are not looked at: where on
    the front a run ends is up to where it starts, so let starts differ (``init="independent"``). For one network rather
    than a population there is :class:`mtl_lightning.aggregation.MGDA`.

    Example:
        >>> import torch
        >>> gramian = torch.diag_embed(torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
        >>> MGDA().weights(gramian, losses=torch.ones(2, 2), preferences=torch.full((2, 2), 0.5))
        tensor([[0.5000, 0.5000],
                [0.7500, 0.2500]])
    """

    def weights(self, gramian: Tensor, losses: Tensor, preferences: Tensor, step: int = 0) -> Tensor:
        """Return the weights of the tasks, on the simplex, shape ``(..., T)``.

        Args:
            gramian: The inner products of the gradients of the tasks, shape ``(..., T, T)``.
            losses: The losses of the tasks, shape ``(..., T)``; not looked at.
            preferences: The preference vectors, shape ``(..., T)``; not looked at.
            step: Not looked at.

        Raises:
            ValueError: If shapes do not fit, or an entry is not finite.
        """
        check_statistics(gramian, losses, preferences)
        return min_norm_weights(gramian)
