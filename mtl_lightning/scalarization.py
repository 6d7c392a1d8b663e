"""Scalarisations: from the losses of the tasks and a preference vector to one objective.

All are minimised and work on trailing dimensions: losses and preferences, shape ``(..., T)``, to objectives, shape
``(...)``. Which one to use:

- ``Linear`` only finds the convex part of the Pareto front. On a concave front it runs to the ends.
- ``Chebyshev`` finds every Pareto-optimal point for some preference, on any front, and equalises the weighted losses
  ``w_t (f_t - z_t)``: the *larger* the weight, the smaller the loss. Its gradient sees one task at a time.
- ``SmoothChebyshev`` is its differentiable version and usually the better choice with gradient descent.
- ``AugmentedChebyshev`` excludes weakly optimal points.
- ``PBI`` follows the ray of the preference: a large weight means a *large* share of the loss.

All but ``Linear`` measure the losses from the ideal point ``z``, a lower bound of each. Zero, the default, suits losses
whose minimum is near zero.

References:
    - Miettinen: Nonlinear Multiobjective Optimization (1999), Kluwer.
    - Wierzbicki: The Use of Reference Objectives in Multiobjective Optimization (1980), Springer.
    - Steuer, Choo: An Interactive Weighted Tchebycheff Procedure for Multiple Objective Programming (1983),
      Math. Programming 26.
    - Lin, Zhang, Yang, Liu, Wang, Zhang: Smooth Tchebycheff Scalarization for Multi-Objective Optimization (2024),
      arXiv:2402.19078.
    - Zhang, Li: MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition (2007), IEEE TEVC 11(6).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn


class Scalarization(nn.Module):
    """The base of all scalarisations: losses and preferences, shape ``(..., T)``, to objectives, shape ``(...)``.

    A subclass overrides ``forward``. It may override ``observe`` to learn from the losses of the run; what it learns
    belongs into buffers whose shape is fixed by the constructor, so that checkpoints restore it.
    """

    def forward(self, losses: Tensor, preferences: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the objectives, shape ``(...)``.

        Args:
            losses: The losses of the tasks, shape ``(..., T)``.
            preferences: The preference vectors, shape ``(..., T)``; leading dimensions broadcast.
            tasks: If some tasks have no loss in this batch, the indices of those that have. ``losses`` and
                ``preferences`` then hold their columns only, in this order, and the others take no part.
        """
        raise NotImplementedError

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Learn from the losses, shape ``(..., T)``, of one optimiser step; by default nothing.

        Modules call it once per step with losses that are already reduced over ranks, so that all ranks learn the same.
        """


class Linear(Scalarization):
    """The weighted sum ``sum_t w_t f_t``.

    Example:
        >>> Linear()(torch.tensor([1.0, 3.0]), torch.tensor([0.25, 0.75]))
        tensor(2.5000)
    """

    def forward(self, losses: Tensor, preferences: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the weighted sums, shape ``(...)``."""
        _check_columns(losses, preferences, tasks)
        return (preferences * losses).sum(dim=-1)


class TrackedIdeal(nn.Module):
    """An ideal point that follows the run: the least finite loss observed of each task, zero before the first.

    Losses of batches are noisy, so it lies somewhat below what the model reaches on average.

    Args:
        num_tasks: The number of tasks ``T``.

    Example:
        >>> ideal = TrackedIdeal(num_tasks=2)
        >>> ideal.observe(torch.tensor([[3.0, float("nan")], [2.0, float("nan")]]))
        >>> ideal()
        tensor([2., 0.])
    """

    minimum: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"`num_tasks` should be at least 1. Found {num_tasks}.")
        self.register_buffer("minimum", torch.full((num_tasks,), float("inf")))

    def forward(self) -> Tensor:
        """Return the ideal point, shape ``(T,)``."""
        return torch.where(self.minimum.isinf(), 0.0, self.minimum)

    @torch.no_grad()
    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Lower the ideal point, or its entries of ``tasks``, to the finite ones of ``losses``, shape ``(..., T)``."""
        num_tasks = len(self.minimum)
        columns = list(range(num_tasks)) if tasks is None else _check_tasks(tasks, num_tasks)
        if losses.ndim < 1 or losses.shape[-1] != len(columns):
            raise ValueError(
                f"`losses` should have shape (..., {len(columns)}), one column per task. "
                f"Found shape {tuple(losses.shape)}."
            )
        rows = losses.detach().to(self.minimum).reshape(-1, len(columns))
        if rows.numel() > 0:
            rows = torch.where(rows.isfinite(), rows, float("inf"))
            self.minimum[columns] = torch.minimum(self.minimum[columns], rows.amin(dim=0))


class _FromIdeal(Scalarization):
    """A scalarisation of the losses' distances ``f - z`` from the ideal point.

    Args:
        ideal: The ideal point ``z``: ``T`` numbers; a ``TrackedIdeal``; or, by default, zero for every task.
    """

    ideal: Tensor | TrackedIdeal | None

    def __init__(self, ideal: Sequence[float] | Tensor | TrackedIdeal | None = None) -> None:
        super().__init__()
        if ideal is None or isinstance(ideal, TrackedIdeal):
            self.ideal = ideal
            return
        point = torch.as_tensor(ideal, dtype=torch.get_default_dtype()).detach().clone()
        if point.ndim != 1 or not bool(point.isfinite().all()):
            raise ValueError(f"`ideal` should hold one finite number per task, shape (T,). Found {point.tolist()}.")
        self.register_buffer("ideal", point)

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Let a tracked ideal point follow the losses, shape ``(..., T)``; a fixed one stays."""
        if isinstance(self.ideal, TrackedIdeal):
            self.ideal.observe(losses, tasks)

    def distances(self, losses: Tensor, preferences: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """Return ``f - z``, shape ``(..., T)``, for the given columns, after a check of all shapes."""
        _check_columns(losses, preferences, tasks)
        if self.ideal is None:
            return losses
        point = self.ideal() if isinstance(self.ideal, TrackedIdeal) else self.ideal
        if tasks is not None:
            point = point[_check_tasks(tasks, len(point))]
        if losses.shape[-1] != len(point):
            raise ValueError(
                f"`losses` should have shape (..., {len(point)}), one column per entry of `ideal`. "
                f"Found shape {tuple(losses.shape)}."
            )
        return losses - point.to(losses)


class Chebyshev(_FromIdeal):
    """The largest weighted distance from the ideal point, ``max_t w_t (f_t - z_t)`` (Miettinen, 1999).

    Without the absolute value of the textbook, as in Wierzbicki's (1980) achievement functions: the two agree where
    ``z`` is a lower bound, and below it a smaller loss stays better.

    At a tie, the gradient is the mean of the gradients of the largest terms. It is a subgradient like any of them, but
    unlike the one of the first task it does not depend on the order of the tasks.

    Args:
        ideal: The ideal point ``z``: ``T`` numbers; a ``TrackedIdeal``; or, by default, zero for every task.

    Example:
        >>> Chebyshev()(torch.tensor([1.0, 3.0]), torch.tensor([0.75, 0.25]))
        tensor(0.7500)
        >>> Chebyshev(ideal=(0.0, 2.0))(torch.tensor([[1.0, 3.0], [0.0, 6.0]]), torch.tensor([0.5, 0.5]))
        tensor([0.5000, 2.0000])
    """

    def forward(self, losses: Tensor, preferences: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the largest weighted distances, shape ``(...)``."""
        return (preferences * self.distances(losses, preferences, tasks)).amax(dim=-1)


class AugmentedChebyshev(_FromIdeal):
    """Chebyshev with a small sum, ``max_t w_t (f_t - z_t) + rho sum_t (f_t - z_t)`` (Steuer and Choo, 1983).

    The sum breaks ties between points that Chebyshev cannot tell apart, so that the optimum is Pareto-optimal and not
    only weakly so. It also gives every task a gradient, even at weight zero.

    Args:
        rho: The factor of the sum, positive. A large one hides concave parts of the front. The default is ours.
        ideal: The ideal point ``z``: ``T`` numbers; a ``TrackedIdeal``; or, by default, zero for every task.

    Example:
        >>> AugmentedChebyshev(rho=0.1)(torch.tensor([1.0, 3.0]), torch.tensor([0.75, 0.25]))
        tensor(1.1500)
    """

    def __init__(self, rho: float = 0.01, *, ideal: Sequence[float] | Tensor | TrackedIdeal | None = None) -> None:
        super().__init__(ideal)
        self.rho = _check_positive("rho", rho)

    def forward(self, losses: Tensor, preferences: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the largest weighted distances plus ``rho`` times the sums, shape ``(...)``."""
        distances = self.distances(losses, preferences, tasks)
        return (preferences * distances).amax(dim=-1) + self.rho * distances.sum(dim=-1)


class SmoothChebyshev(_FromIdeal):
    """The smooth maximum ``mu log sum_t exp(w_t (f_t - z_t) / mu)`` (Lin et al., 2024).

    It exceeds ``Chebyshev`` by at most ``mu log T``, and tends to it as ``mu`` tends to zero.

    Args:
        mu: The width of the smoothing, positive, on the scale of the weighted losses. Those within about ``mu`` of the
            largest share its gradient. The default is ours.
        ideal: The ideal point ``z``: ``T`` numbers; a ``TrackedIdeal``; or, by default, zero for every task.

    Example:
        >>> losses, preference = torch.tensor([1.0, 3.0]), torch.tensor([0.75, 0.25])
        >>> SmoothChebyshev(mu=0.1)(losses, preference)
        tensor(0.8193)
        >>> SmoothChebyshev(mu=1e-6)(losses, preference)
        tensor(0.7500)
    """

    def __init__(self, mu: float = 0.1, *, ideal: Sequence[float] | Tensor | TrackedIdeal | None = None) -> None:
        super().__init__(ideal)
        self.mu = _check_positive("mu", mu)

    def forward(self, losses: Tensor, preferences: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the smooth maxima of the weighted distances, shape ``(...)``."""
        weighted = preferences * self.distances(losses, preferences, tasks)
        # Taken out before the division, since a weighted loss over a tiny mu overflows. It cancels in the gradient.
        largest = weighted.detach().amax(dim=-1, keepdim=True)
        return largest.squeeze(-1) + self.mu * torch.logsumexp((weighted - largest) / self.mu, dim=-1)


class PBI(_FromIdeal):
    """Penalty-based boundary intersection, ``d1 + theta d2`` (Zhang and Li, 2007).

    ``d1 = <f - z, w> / |w|`` is the distance from the ideal point along the ray of ``w``, and
    ``d2 = |f - z - d1 w / |w||`` the distance from that ray; the optimum is where the ray meets the front. On the ray,
    ``f - z`` is proportional to ``w``: a large weight means a *large* loss. It is not monotone: with a large ``theta``
    a smaller loss off the ray may count as worse.

    The gradient of ``d2`` on the ray, where it has none, is zero. If all given tasks have weight zero, so is ``d1``.

    Args:
        theta: The penalty for leaving the ray, not negative. The default is the one of the paper.
        ideal: The ideal point ``z``: ``T`` numbers; a ``TrackedIdeal``; or, by default, zero for every task.

    Example:
        >>> PBI()(torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8]))
        tensor(5.)
        >>> PBI(theta=2.0)(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
        tensor(3.)
    """

    def __init__(self, theta: float = 5.0, *, ideal: Sequence[float] | Tensor | TrackedIdeal | None = None) -> None:
        super().__init__(ideal)
        if not (isfinite(theta) and theta >= 0):
            raise ValueError(f"`theta` should be finite and not negative. Found {theta}.")
        self.theta = theta

    def forward(self, losses: Tensor, preferences: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the penalised distances along the rays, shape ``(...)``."""
        distances = self.distances(losses, preferences, tasks)
        norm = torch.linalg.vector_norm(preferences, dim=-1, keepdim=True)
        direction = preferences / torch.where(norm > 0, norm, 1.0)
        along = (distances * direction).sum(dim=-1, keepdim=True)
        return along.squeeze(-1) + self.theta * _norm(distances - along * direction)


def _norm(vectors: Tensor) -> Tensor:
    """Return the Euclidean norms, shape ``(...)``, without overflow of the squares, and with gradient zero at zero."""
    scale = vectors.detach().abs().amax(dim=-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale.squeeze(-1) * torch.linalg.vector_norm(vectors / scale, dim=-1)


def _check_columns(losses: Tensor, preferences: Tensor, tasks: Sequence[int] | None) -> None:
    """Raise an error unless the trailing dimensions of both agree with each other and with ``tasks``."""
    if losses.ndim < 1 or preferences.ndim < 1 or losses.shape[-1] != preferences.shape[-1]:
        raise ValueError(
            "`losses` and `preferences` should both have shape (..., T), one column per task. "
            f"Found shapes {tuple(losses.shape)} and {tuple(preferences.shape)}."
        )
    if losses.shape[-1] < 1:
        raise ValueError("`losses` should have at least one column: a batch without any label has no objective.")
    if tasks is not None and len(tasks) != losses.shape[-1]:
        raise ValueError(
            f"`losses` should have one column for each of the {len(tasks)} `tasks`. Found shape {tuple(losses.shape)}."
        )


def _check_tasks(tasks: Sequence[int], num_tasks: int) -> list[int]:
    """Return ``tasks`` as a list, or raise an error if they are not indices of different tasks."""
    columns = [int(task) for task in tasks]
    if len(set(columns)) != len(columns) or not all(0 <= column < num_tasks for column in columns):
        raise ValueError(f"`tasks` should be different indices below {num_tasks}. Found {columns}.")
    return columns


def _check_positive(name: str, value: float) -> float:
    if not (isfinite(value) and value > 0):
        raise ValueError(f"`{name}` should be positive and finite. Found {value}.")
    return value
