"""A penalty on models of a front whose losses are not in the order of their preferences.

References:
    - Dimitriadis, Frossard, Fleuret: Pareto Manifold Learning: Tackling Multiple Tasks via Ensembles of Single-Task
      Models (2023), ICML, arXiv:2210.09759.
"""

from __future__ import annotations

from math import isfinite, log

import torch
from torch import Tensor, nn


class OrderingPenalty(nn.Module):
    r"""The multi-forward regularisation of Pareto manifold learning (Dimitriadis et al., 2023).

    Of several preferences, that with the larger weight on a task should have the smaller loss on it. With the ``K``
    preferences in the order of their weights on task ``t``, and ``(i, j)`` neighbours in it, ``w_it > w_jt``,

        ``R = strength sum_t log(mean_(i, j) exp([f_it - f_jt]_+))``

    It is zero where every task is in order. For ``K = 2`` it is the sum of the differences of the losses that are not.

    Args:
        strength: The factor, not negative. The published configurations have 0 to 5 for a *sum* over preferences;
            modules of this library take the mean of their objectives, so divide by ``K``.

    Raises:
        ValueError: If ``strength`` is negative or not finite.

    Note:
        The published code (github.com/nik-dim/pamal, revision 26adf53) differs: it takes the differences with the other
        sign, which penalises losses that *are* in order; it leaves the penalty out of batches in which it exceeds the
        objective; and it has a temperature in the exponent, 1 in all of its configurations. Pairs of equal weights
        have no order and count as zero.

    Example:
        >>> penalty, preferences = OrderingPenalty(), torch.tensor([[0.2, 0.8], [0.6, 0.4]])
        >>> penalty(torch.tensor([[3.0, 1.0], [1.0, 3.0]]), preferences)  # the larger weight has the smaller loss
        tensor(0.)
        >>> penalty(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), preferences)  # task 0 is out of order by two
        tensor(2.)
    """

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        if not (isfinite(strength) and strength >= 0):
            raise ValueError(f"`strength` should be finite and not negative. Found {strength}.")
        self.strength = strength

    def forward(self, losses: Tensor, preferences: Tensor) -> Tensor:
        """Return the penalty, shape ``()``.

        Args:
            losses: The losses, shape ``(K, T)``, one row per preference.
            preferences: The preferences, shape ``(K, T)``; of some tasks only, where others have no loss.

        Raises:
            ValueError: If the shapes differ or are not of two dimensions.
        """
        if losses.ndim != 2 or losses.shape != preferences.shape:
            raise ValueError(
                "`losses` and `preferences` should both have shape (K, T), one row per preference. "
                f"Found shapes {tuple(losses.shape)} and {tuple(preferences.shape)}."
            )
        num_pairs = len(losses) - 1
        if num_pairs < 1:
            return losses.new_zeros(())
        weights, order = preferences.sort(dim=0, descending=True, stable=True)
        rises = -losses.gather(0, order).diff(dim=0)  # of the larger weight over the smaller, (K - 1, T)
        excess = torch.where(weights.diff(dim=0) < 0, rises, 0.0).relu()
        return self.strength * (torch.logsumexp(excess, dim=0) - log(num_pairs)).sum()
