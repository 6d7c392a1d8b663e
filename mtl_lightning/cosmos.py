"""The scalarisation of COSMOS: a weighted sum, and a reward for losses in the direction of the preference.

References:
    - Ruchte, Grabocka: Scalable Pareto Front Approximation for Deep Multi-Objective Learning (2021), ICDM,
      arXiv:2103.13392.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from mtl_lightning.scalarization import Linear, Scalarization


class COSMOS(Scalarization):
    """The weighted sum less a multiple of a cosine, ``sum_t w_t f_t - lambda cos(w, f)`` (Ruchte and Grabocka, 2021).

    The weighted sum draws the losses to the front, the cosine towards the ray of the preference, so that the models of
    a conditioned network spread. The two pull in different ways: in the sum a large weight asks for a *small* loss, on
    the ray it means a *large* one. With a small ``penalty`` the sum decides, with a large one the ray, as in
    :class:`~mtl_lightning.scalarization.PBI`. Like that one it is not monotone: a smaller loss off the ray may count as
    worse. The cosine is bounded and the sum is not, so the multiple is on the scale of the losses.

    Losses should not be negative. If all given tasks have weight zero, or all losses are zero, the cosine is zero.

    Args:
        penalty: ``lambda``, not negative. The paper's experiments with two digits in an image have 2 and 8; there is no
            value for all problems.

    Raises:
        ValueError: If ``penalty`` is negative or not finite.

    Example:
        >>> COSMOS(penalty=2.0)(torch.tensor([3.0, 3.0]), torch.tensor([0.5, 0.5]))
        tensor(1.)
        >>> COSMOS(penalty=2.0)(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0]))
        tensor(0.)
    """

    def __init__(self, penalty: float = 2.0) -> None:
        super().__init__()
        if not (isfinite(penalty) and penalty >= 0):
            raise ValueError(f"`penalty` should be finite and not negative. Found {penalty}.")
        self.penalty = penalty
        self.linear = Linear()

    def forward(self, losses: Tensor, preferences: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the penalised weighted sums, shape ``(...)``."""
        weighted: Tensor = self.linear(losses, preferences, tasks)
        return weighted - self.penalty * torch.cosine_similarity(losses, preferences, dim=-1)
