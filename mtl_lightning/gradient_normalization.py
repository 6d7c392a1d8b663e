"""Weights of the losses that make the gradients of the tasks equally long.

References:
    - Dimitriadis, Frossard, Fleuret: Pareto Manifold Learning: Tackling Multiple Tasks via Ensembles of Single-Task
      Models (2023), ICML, arXiv:2210.09759.
"""

from __future__ import annotations

from math import isfinite

from torch import Tensor

from mtl_lightning.gradient_weighting import GradientWeighting


class GradientNormalization(GradientWeighting):
    """The preferences, divided by the norms of the gradients: ``w_t / (|g_t| + xi)``.

    The gradient balancing of Pareto manifold learning (Dimitriadis et al., 2023): a preference then divides the
    gradient, whatever the units of the losses. The length of the step no longer shrinks at the end of training, so the
    learning rate should. Other than the rest of the family it takes the length of the gradients into account: halving
    all of them doubles the weights.

    Args:
        xi: Added to each norm, positive. The default is that of the published code.

    Raises:
        ValueError: If ``xi`` is not positive and finite.

    Note:
        The norms are those in all trained parameters; the published code takes those in the parameters that the tasks
        share.

    Example:
        >>> import torch
        >>> rule, gramian = GradientNormalization(), torch.tensor([[4.0, 0.0], [0.0, 0.01]])
        >>> rule.weights(gramian, torch.ones(2), torch.tensor([0.5, 0.5]))
        tensor([0.2499, 4.9505])
    """

    def __init__(self, xi: float = 1e-3) -> None:
        super().__init__()
        if not (isfinite(xi) and xi > 0):
            raise ValueError(f"`xi` should be positive and finite. Found {xi}.")
        self.xi = xi

    def weights(self, gramian: Tensor, losses: Tensor, preferences: Tensor, step: int = 0) -> Tensor:
        """Return the weights of the losses, shape ``(..., T)``.

        Args:
            gramian: The inner products of the gradients, shape ``(..., T, T)``.
            losses: The losses, shape ``(..., T)``; not looked at.
            preferences: The preferences, shape ``(..., T)``.
            step: Not looked at.
        """
        norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        return preferences / (norms + self.xi)
