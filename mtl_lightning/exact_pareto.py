r"""Exact Pareto optimal search: the point of the front where a preference's weighted losses are equal.

For a preference ``r`` the ray ``r_1 f_1 = ... = r_T f_T`` crosses the front in the point that is looked for. The same
point minimises the Chebyshev scalarisation; this search finds it with smooth steps, on any front, from any start.

References:
    D. Mahapatra, V. Rajan, "Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent in
    Pareto Optimization", ICML 2020.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import block_diag
from torch import Tensor

from mtl_lightning.gradient_weighting import GradientWeighting, check_statistics, on_host
from mtl_lightning.min_norm import min_norm_weights

# What the rates at which losses fall may be off by, relative to the largest: rounding in double precision.
_SLACK = 1e-9
# What the slope of the non-uniformity may be off by: on the ray there is nothing to it but the rounding of the losses.
_RAY_SLACK = 1e-6
_TINY = 1e-300


class EPO(GradientWeighting):
    r"""Exact Pareto optimal search (EPO): weights that lead to the front along the ray of the preference.

    Off the ray the losses are balanced: the step lowers the non-uniformity ``mu`` of the weighted losses as fast as the
    gradients allow, and may let losses rise that are too small (controlled ascent), but never the largest weighted one.
    On the ray the step descends: no loss rises, and the sum of the losses falls as fast as it can.

    With the Gramian ``C``, the weights ``beta`` on the simplex solve one of two linear programs. ``a`` are the
    adjustments, the gradient of ``mu`` up to a factor; ``(C beta)_j`` is the rate at which ``f_j`` falls.

    - Balance, where ``mu > tolerance``: maximise ``a' C beta``, with ``(C beta)_j >= 0`` for the tasks of the largest
      ``r_j f_j``, and ``(C beta)_j >= min((C a)_j, 0)`` for the others whose ``(C a)_j`` is not positive. If it is
      positive for none, no loss may rise.
    - Descent, elsewhere: maximise ``1' C beta``, with ``C beta >= 0``, among the weights that do not raise ``mu``.

    The larger a preference, the smaller its loss, as with :class:`~mtl_lightning.scalarization.Chebyshev`.

    Args:
        tolerance: The non-uniformity up to which a point counts as on the ray, positive. It is a Kullback-Leibler
            divergence in nats. The default is that of the published code.
        floor: Preferences below it, as a share of their sum, are raised to it, or to ``1 / T`` if that is less: a
            preference of zero would ask for losses of zero of all other tasks. Between 0 and 1.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        Losses should not be negative. Departures from the published code: where no weights keep ``mu`` from rising
        in the descent, those that raise it least are taken, where that code falls back on the preference itself; and
        preferences have a floor. For networks that code multiplies the weights by ``T``: its learning rates are to be
        multiplied by that here. Scaling all losses by one factor changes nothing, nor does reordering the tasks.

        The programs are solved on the host: those of two tasks in closed form, others in one call for all rows, by the
        dual simplex method. Where a loss has its minimum at zero, a search that comes from afar may rest there: the
        share of that loss is zero then, and no small step changes the non-uniformity.

    Example:
        >>> import torch
        >>> rule = EPO()
        >>> gramian = torch.tensor([[1.0, -0.2], [-0.2, 1.0]])
        >>> rule.weights(gramian, losses=torch.tensor([3.0, 1.0]), preferences=torch.tensor([0.5, 0.5]))
        tensor([1., 0.])
        >>> nonuniformity(torch.tensor([3.0, 1.0]), preferences=torch.tensor([0.25, 0.75]))
        tensor(0.)
    """

    def __init__(self, tolerance: float = 1e-4, floor: float = 1e-2) -> None:
        super().__init__()
        if not tolerance > 0:
            raise ValueError(f"`tolerance` should be positive. Found {tolerance}.")
        if not 0 < floor < 1:
            raise ValueError(f"`floor` should lie between 0 and 1. Found {floor}.")
        self.tolerance = tolerance
        self.floor = floor

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"tolerance={self.tolerance}, floor={self.floor}"

    def weights(self, gramian: Tensor, losses: Tensor, preferences: Tensor, step: int = 0) -> Tensor:
        """Return the weights of the tasks, on the simplex, shape ``(..., T)``.

        Args:
            gramian: The inner products of the gradients of the tasks, shape ``(..., T, T)``.
            losses: The losses of the tasks, not negative, shape ``(..., T)``.
            preferences: The preference vectors ``r``, shape ``(..., T)``.
            step: Not looked at.

        Raises:
            ValueError: If shapes do not fit, an entry is not finite, or a loss is negative.
        """
        check_statistics(gramian, losses, preferences)
        num_tasks = gramian.shape[-1]
        c = on_host(gramian).reshape(-1, num_tasks, num_tasks)
        c = c / c.diagonal(dim1=-2, dim2=-1).amax(dim=-1).clamp(min=_TINY)[:, None, None]
        r = floored(on_host(preferences), self.floor).reshape(-1, num_tasks)
        f = on_host(losses).reshape(-1, num_tasks)

        balancing = nonuniformity(f, r) > self.tolerance
        beta = torch.empty_like(f)
        a = adjustments(f, r)
        beta[balancing] = _balance(c[balancing], a[balancing], (r * f)[balancing])
        beta[~balancing] = _descend(c[~balancing], a[~balancing])
        return beta.reshape(losses.shape).to(gramian)


def nonuniformity(losses: Tensor, preferences: Tensor) -> Tensor:
    """Return how far the weighted losses are from equal, shape ``(...)``: zero on the ray, ``log T`` at most.

    It is the Kullback-Leibler divergence, in nats, of the shares ``r_t f_t / sum_s r_s f_s`` from equal shares.

    Args:
        losses: The losses of the tasks, not negative, shape ``(..., T)``. If all are zero, so is the result.
        preferences: The preference vectors ``r``, shape ``(..., T)``.

    Raises:
        ValueError: If a loss is negative.

    Example:
        >>> nonuniformity(torch.tensor([[1.0, 2.0], [1.0, 0.0]]), torch.tensor([2 / 3, 1 / 3]))
        tensor([0.0000, 0.6931])
    """
    shares = _shares(losses, preferences)
    return torch.xlogy(shares, shares * shares.shape[-1]).sum(dim=-1)


def adjustments(losses: Tensor, preferences: Tensor) -> Tensor:
    """Return ``a_t = r_t (log(T s_t) - mu)``, with the shares ``s`` of the non-uniformity ``mu``, shape ``(..., T)``.

    Divided by ``sum_t r_t f_t`` it is the gradient of the non-uniformity with respect to the losses, and so orthogonal
    to them. The logarithm of a loss of zero is taken at the smallest number of the dtype.

    Args:
        losses: The losses of the tasks, not negative, shape ``(..., T)``.
        preferences: The preference vectors ``r``, shape ``(..., T)``.

    Raises:
        ValueError: If a loss is negative.

    Example:
        >>> adjustments(torch.tensor([3.0, 1.0]), torch.tensor([0.5, 0.5]))
        tensor([ 0.1373, -0.4120])
    """
    shares = _shares(losses, preferences)
    tiny = torch.finfo(shares.dtype).tiny
    logarithms = (shares * shares.shape[-1]).clamp(min=tiny).log()
    return preferences * (logarithms - nonuniformity(losses, preferences).unsqueeze(-1))


def floored(preferences: Tensor, floor: float) -> Tensor:
    """Return the preferences with sum one and no entry much below ``floor``, or ``1 / T`` if that is smaller."""
    num_tasks = preferences.shape[-1]
    shares = preferences / preferences.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(preferences.dtype).tiny)
    raised = shares.clamp(min=min(floor, 1 / num_tasks))
    return raised / raised.sum(dim=-1, keepdim=True)


def _shares(losses: Tensor, preferences: Tensor) -> Tensor:
    if bool((losses < 0).any()):
        raise ValueError(
            "Exact Pareto optimal search needs losses that are not negative: it compares their ratios. Found "
            f"{losses.min().item():.6g}. Add to each loss what makes its lower bound zero."
        )
    weighted = preferences * losses
    total = weighted.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weighted / total, 1.0 / losses.shape[-1])


def _balance(c: Tensor, a: Tensor, weighted: Tensor) -> Tensor:
    falls = torch.einsum("nij,nj->ni", c, a)  # at which the losses fall in the direction that balances them best
    largest = weighted == weighted.amax(dim=-1, keepdim=True)
    bounds = torch.where(falls > 0, c.amin(dim=-1), falls)  # of a convex combination: no constraint
    bounds = torch.where((falls > 0).any(dim=-1, keepdim=True), bounds, 0.0)
    return _maximise(falls, c, bounds.masked_fill(largest, 0.0))


def _descend(c: Tensor, a: Tensor) -> Tensor:
    falls = torch.einsum("nij,nj->ni", c, a)
    balanced = _maximise(falls, c, torch.zeros_like(a))
    attained = (falls * balanced).sum(dim=-1, keepdim=True).clamp(max=0.0) - _RAY_SLACK
    rows = torch.cat([c, falls.unsqueeze(1)], dim=1)
    return _maximise(c.sum(dim=-1), rows, torch.cat([torch.zeros_like(a), attained], dim=-1))


def _maximise(objective: Tensor, rows: Tensor, bounds: Tensor) -> Tensor:
    """Return the ``beta`` on the simplex of largest ``objective' beta`` with ``rows beta >= bounds``, ``(N, T)``.

    Where there is none, the weights of the shortest gradient: no loss rises along it.

    Args:
        objective: Shape ``(N, T)``.
        rows: Shape ``(N, K, T)``; the first ``T`` of the ``K`` are the Gramian.
        bounds: Shape ``(N, K)``.
    """
    num_tasks = objective.shape[-1]
    # All constraints count alike, however small the gradients that they are of.
    scales = rows.abs().amax(dim=-1, keepdim=True).clamp(min=_TINY)
    goal = objective / objective.abs().amax(dim=-1, keepdim=True).clamp(min=_TINY)
    limits = bounds / scales.squeeze(-1) - _SLACK
    solve = _maximise_on_line if num_tasks == 2 else _maximise_by_simplex
    beta, solved = solve(goal, rows / scales, limits)
    if not bool(solved.all()):
        beta[~solved] = min_norm_weights(rows[~solved, :num_tasks])
    return beta


def _maximise_on_line(objective: Tensor, rows: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the solutions for two tasks, ``beta = (t, 1 - t)``, and where there are any, shape ``(N,)``."""
    slopes, heights = rows[..., 0] - rows[..., 1], bounds - rows[..., 1]
    ends = heights / slopes
    low = torch.where(slopes > 0, ends, 0.0).amax(dim=-1).clamp(min=0.0)
    high = torch.where(slopes < 0, ends, 1.0).amin(dim=-1).clamp(max=1.0)
    solved = (low <= high) & ((slopes != 0) | (heights <= 0)).all(dim=-1)
    t = torch.where(objective[:, 0] >= objective[:, 1], high, low)
    return torch.stack([t, 1 - t], dim=-1), solved


def _maximise_by_simplex(objective: Tensor, rows: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the solutions for any number of tasks, and where there are any, shape ``(N,)``."""
    size, num_tasks = objective.shape
    if not size:
        return objective, torch.ones(0, dtype=torch.bool)
    # One program with blocks: a call costs more than its arithmetic.
    solution = linprog(
        -objective.flatten().numpy(),
        A_ub=block_diag(list(-rows.numpy()), format="csc"),
        b_ub=-bounds.flatten().numpy(),
        A_eq=block_diag([np.ones((1, num_tasks))] * size, format="csc"),
        b_eq=np.ones(size),
        method="highs-ds",
    )
    if solution.status == 0:
        beta = torch.from_numpy(solution.x).reshape(size, num_tasks).clamp(min=0.0)
        return beta / beta.sum(dim=-1, keepdim=True), torch.ones(size, dtype=torch.bool)
    if size == 1:
        return torch.zeros_like(objective), torch.zeros(1, dtype=torch.bool)
    # One without a solution leaves the others without an answer.
    alone = [_maximise_by_simplex(*(tensor[i : i + 1] for tensor in (objective, rows, bounds))) for i in range(size)]
    return torch.cat([beta for beta, _ in alone]), torch.cat([solved for _, solved in alone])
