"""Transfer rules: who gives how much of its parameters to whom.

In every step of MT2O the parameters of the ``P`` subproblems are mixed by a matrix ``M``, shape ``(P, P)``, whose rows
are non-negative and sum to one: ``theta_i <- sum_j m_ij theta_j + Delta_i``, where ``Delta_i`` is the step of the
optimiser. A rule returns ``M``.

What is known of mixing: constant mass biases every subproblem towards its neighbours (for a ``mu``-strongly convex
objective and step size ``alpha`` by at most ``m D / (alpha mu)``, with ``m`` the mass received and ``D`` the distance
of the optima), so the mass has to vanish, and under SGD faster than the step size. The paper's own choice of
coefficients is not known to the authors of this library; none of these rules is presented as the paper's.

References:
    L. Bai, A. Gupta, Y.-S. Ong, "Multi-Task Learning with Multi-Task Optimization", arXiv 2403.16162.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lightning.scalarization import Linear, Scalarization


@dataclass(frozen=True)
class TransferContext:
    """What a rule may look at, before the step.

    Attributes:
        preferences: The preference vectors, shape ``(P, T)``.
        losses: The task losses of each subproblem on the batch, shape ``(P, T)``, float32, equal on all ranks. Columns
            of tasks without labels in the batch hold NaN.
        parameters: The flattened trainable parameters, shape ``(P, D)``. In a population that is spread over processes
            they are there for rules that hear of all subproblems; for those that name their givers they are ``None``.
        step: How many transfers there have been.
        learning_rate: The learning rate of the optimiser.
        healthy: Which subproblems are finite, shape ``(P,)``; the others take no part.
        tasks: The tasks with labels in the batch.
        scalarization: The scalarisation in use.
    """

    preferences: Tensor
    losses: Tensor
    parameters: Tensor | None
    step: int
    learning_rate: float
    healthy: Tensor
    tasks: tuple[int, ...]
    scalarization: Scalarization

    @staticmethod
    def of(
        preferences: Tensor,
        losses: Tensor | None = None,
        parameters: Tensor | None = None,
        step: int = 0,
        learning_rate: float = 1e-3,
        healthy: Tensor | None = None,
        scalarization: Scalarization | None = None,
    ) -> TransferContext:
        """Return a context with neutral values for what is left out: for trying rules outside a training run."""
        size, num_tasks = preferences.shape
        return TransferContext(
            preferences=preferences,
            losses=torch.zeros(size, num_tasks) if losses is None else losses,
            parameters=torch.zeros(size, 1) if parameters is None else parameters,
            step=step,
            learning_rate=learning_rate,
            healthy=torch.ones(size, dtype=torch.bool) if healthy is None else healthy,
            tasks=tuple(range(num_tasks)),
            scalarization=Linear() if scalarization is None else scalarization,
        )

    @cached_property
    def pairs(self) -> Tensor:
        """Who may give to whom: both healthy, and not oneself. Shape ``(P, P)``, bool."""
        return (self.healthy.unsqueeze(0) & self.healthy.unsqueeze(1)).fill_diagonal_(False)

    @cached_property
    def distances(self) -> Tensor:
        """Euclidean distances between the parameters of subproblems, shape ``(P, P)``.

        Raises:
            RuntimeError: If the parameters of other processes are not at hand.
        """
        if self.parameters is None:
            raise RuntimeError(
                "A rule that reads parameters should hear of all subproblems: its `givers` should return None. Found "
                "givers, so that parameters are not exchanged among all processes."
            )
        # Not through matrix products: they lose all digits between copies that have hardly moved apart.
        rows = self.parameters.detach().float().nan_to_num(0.0, 0.0, 0.0)
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.nan_to_num(posinf=torch.finfo(distances.dtype).max)  # a diverging subproblem is far away

    @cached_property
    def objectives(self) -> Tensor:
        """The objective of subproblem ``i`` at the parameters of subproblem ``j``, shape ``(P, P)``.

        It costs no evaluation: the task losses of every subproblem on the shared batch are known.
        """
        size, losses, preferences = len(self.preferences), self.losses, self.preferences
        if len(self.tasks) < losses.shape[1]:
            losses, preferences = losses[:, list(self.tasks)], preferences[:, list(self.tasks)]
        losses, preferences = losses.expand(size, -1, -1), preferences.unsqueeze(1).expand(-1, size, -1)
        return self.scalarization(losses, preferences, tasks=self.tasks)


class TransferRule(nn.Module):
    """Base of the rules. A rule says in :meth:`received` what each subproblem receives; the rest it keeps.

    State that changes belongs into buffers or into ``get_extra_state``, so that it is in checkpoints.
    """

    def received(self, context: TransferContext) -> Tensor:
        """Return what subproblem ``i`` receives from ``j``, shape ``(P, P)``: non-negative, rows sum to at most one.

        The diagonal and subproblems that are not healthy are disregarded.
        """
        raise NotImplementedError(f"{type(self).__name__} should implement `received`.")

    def givers(self, preferences: Tensor) -> Tensor | None:
        """Return from whom each subproblem may receive, shape ``(P, P)``, bool, or ``None`` for from all.

        It depends on the preferences alone. With it processes that share a population exchange the parameters of
        givers only; such a rule cannot read :attr:`TransferContext.parameters`.
        """
        return None

    def is_over(self, step: int, dtype: torch.dtype) -> bool:
        """Return whether nothing is given from transfer ``step`` on, as far as parameters of ``dtype`` can tell.

        A transfer that is over costs nothing. A rule whose mass does not vanish for good says no, and so do the rules
        of this library for a subclass with a ``received`` of its own.
        """
        return False

    def forward(self, context: TransferContext) -> Tensor:
        """Return the transfer matrix ``M``, shape ``(P, P)``: non-negative, rows sum to one."""
        given = torch.where(context.pairs, self.received(context), 0.0)
        return given + torch.diag((1.0 - given.sum(dim=1)).clamp(min=0.0))  # a sum of one may be rounded up

    def reset(self, subproblems: Sequence[int] | None = None) -> None:
        """Forget what was measured on these subproblems, or on all: they have been replaced."""


class NoTransfer(TransferRule):
    """The identity: ``P`` independent runs.

    Example:
        >>> import torch
        >>> NoTransfer()(TransferContext.of(torch.tensor([[1.0, 0.0], [0.0, 1.0]])))
        tensor([[1., 0.],
                [0., 1.]])
    """

    def is_over(self, step: int, dtype: torch.dtype) -> bool:
        """Return ``True``."""
        return type(self).received is NoTransfer.received  # a subclass may give something

    def received(self, context: TransferContext) -> Tensor:
        """Return zeros, shape ``(P, P)``."""
        return torch.zeros_like(context.pairs, dtype=context.preferences.dtype)


class NeighborTransfer(TransferRule):
    """Mixing with the subproblems of similar preference, with a mass that fades.

    ``m_ij = strength * decay^t * R_ij`` for ``j != i``, with ``R_ij`` proportional to ``exp(-|w_i - w_j|^2 / 2 h^2)``
    over the nearest preference vectors of ``w_i``, and the rows of ``R`` summing to one.

    Args:
        strength: The mass received in the first transfer, in [0, 1].
        decay: Its factor per transfer, in (0, 1]. At one the mass never vanishes and every subproblem stays biased. The
            default halves the mass every 69 transfers, so that it is gone long before the end of most runs.
        num_neighbors: How many neighbours give. Those at the same distance as the last are counted in, so that the
            matrix does not depend on the order of the subproblems.
        bandwidth: ``h``, in units of the preference space; by default the mean distance to the nearest neighbour.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> preferences = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
        >>> NeighborTransfer(strength=0.4, num_neighbors=1)(TransferContext.of(preferences))
        tensor([[0.6000, 0.4000, 0.0000],
                [0.2000, 0.6000, 0.2000],
                [0.0000, 0.4000, 0.6000]])
    """

    def __init__(
        self, strength: float = 0.5, decay: float = 0.99, num_neighbors: int = 2, bandwidth: float | None = None
    ) -> None:
        super().__init__()
        self.strength = _in_range("strength", strength, 0.0, 1.0)
        self.decay = _in_range("decay", decay, torch.finfo(torch.float32).tiny, 1.0)
        self._neighborhood = _Neighborhood(num_neighbors, bandwidth)

    def givers(self, preferences: Tensor) -> Tensor:
        """Return the neighbours, shape ``(P, P)``, bool."""
        return self._neighborhood.near(preferences)

    def is_over(self, step: int, dtype: torch.dtype) -> bool:
        """Return whether one minus the mass is one, in ``dtype`` or float32: after 1,656 transfers by default."""
        return type(self).received is NeighborTransfer.received and _is_lost(self._mass(step), dtype)

    def _mass(self, step: int) -> float:
        return self.strength * self.decay**step

    def received(self, context: TransferContext) -> Tensor:
        """Return the kernel over the neighbours, scaled to the present mass; shape ``(P, P)``."""
        return self._mass(context.step) * self._neighborhood(context.preferences)


class ProportionalTransfer(TransferRule):
    """Mixing with neighbours, with a mass proportional to the learning rate: ``m_ij = min(rate * lr, 1) * R_ij``.

    With SGD it equals a fixed regulariser: the gradient step on ``rate / 2 * sum_j R_ij |theta_i - theta_j|^2`` with
    the others held. It therefore biases as long as it acts, unless the learning rate is scheduled faster to zero.

    Args:
        rate: The strength of the regulariser, at least 0.
        num_neighbors: See :class:`NeighborTransfer`.
        bandwidth: See :class:`NeighborTransfer`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        L. Bai, Y.-S. Ong, T. He, A. Gupta, "Multi-task gradient descent for multi-task learning", Memetic Computing
        2020.
    """

    def __init__(self, rate: float = 1.0, num_neighbors: int = 2, bandwidth: float | None = None) -> None:
        super().__init__()
        self.rate = _in_range("rate", rate, 0.0, torch.finfo(torch.float32).max)
        self._neighborhood = _Neighborhood(num_neighbors, bandwidth)

    def givers(self, preferences: Tensor) -> Tensor:
        """Return the neighbours, shape ``(P, P)``, bool."""
        return self._neighborhood.near(preferences)

    def received(self, context: TransferContext) -> Tensor:
        """Return the kernel over the neighbours times ``rate * lr``; shape ``(P, P)``."""
        return min(self.rate * context.learning_rate, 1.0) * self._neighborhood(context.preferences)


class DistanceTransfer(TransferRule):
    """Receiving from those one has come closer to.

    With ``D_ij(t)`` the distance of the parameters: ``raw_ij = max(0, D_ij(t-1) - D_ij(t))`` and
    ``m_ij = raw_ij / (sum_k raw_ik + D_i(0))``, where ``D_i(0) = sum_k D_ik(0)``. Two guards were found necessary:
    from a common start ``D(0)`` is zero and the rule unstable, and under gradient noise some distances always shrink,
    so that it never switches off. ``D_i(0)`` is therefore at least ``floor * (P - 1) * |theta|`` with ``|theta|`` the
    mean norm of the parameters, and the mass received is at most ``cap * decay^t``.

    Args:
        cap: The largest mass received in the first transfer, in [0, 1].
        decay: The factor of the cap per transfer, in (0, 1].
        floor: The least initial distance, relative to the norm of the parameters.

    Raises:
        ValueError: If an argument is out of range.

    References:
        L. Bai, Y.-S. Ong, T. He, A. Gupta, "Multi-task gradient descent for multi-task learning", Memetic Computing
        2020, for the rule; the guards are this library's.
    """

    def __init__(self, cap: float = 0.5, decay: float = 0.999, floor: float = 1e-2) -> None:
        super().__init__()
        self.cap = _in_range("cap", cap, 0.0, 1.0)
        self.decay = _in_range("decay", decay, torch.finfo(torch.float32).tiny, 1.0)
        self.floor = _in_range("floor", floor, 0.0, float("inf"))
        self._initial: Tensor | None = None
        self._previous: Tensor | None = None

    def is_over(self, step: int, dtype: torch.dtype) -> bool:
        """Return whether one minus the largest mass is one, in ``dtype`` or float32."""
        mass = self.cap * self.decay**step
        return type(self).received is DistanceTransfer.received and _is_lost(mass, dtype)

    def received(self, context: TransferContext) -> Tensor:
        """Return the approaches of the last step, normalised; zero in the first call. Shape ``(P, P)``."""
        distances = context.distances
        if self._initial is None or self._previous is None:
            assert context.parameters is not None
            norms = context.parameters.detach().float().nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
            norms = norms.clamp(max=torch.finfo(norms.dtype).max / len(norms))  # the norm of huge parameters overflows
            least = self.floor * (len(norms) - 1) * norms.mean()
            self._initial = distances.sum(dim=1).clamp(min=least)
            self._previous = distances
        initial, previous = self._initial.to(distances.device), self._previous.to(distances.device)
        raw = torch.where(context.pairs, (previous - distances).clamp(min=0.0), 0.0)
        total = raw.sum(dim=1)
        shares = raw / (total + initial).clamp(min=torch.finfo(raw.dtype).tiny).unsqueeze(1)
        self._previous = distances
        return _capped(shares, self.cap * self.decay**context.step)

    def reset(self, subproblems: Sequence[int] | None = None) -> None:
        """Forget the distances to these subproblems, or all."""
        if subproblems is None:
            self._initial = self._previous = None
        elif self._previous is not None:
            self._previous = self._previous.clone()
            self._previous[list(subproblems)] = self._previous[:, list(subproblems)] = 0.0  # no approach is seen

    def get_extra_state(self) -> dict[str, Any]:
        """Return the distances at the start and at the last transfer."""
        return {"initial": self._initial, "previous": self._previous}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the distances of a checkpoint."""
        self._initial, self._previous = state["initial"], state["previous"]


class AdvantageTransfer(TransferRule):
    """Receiving from those neighbours whose model serves my preference better than my own.

    ``F_i(theta_j)`` is known for all pairs, because every subproblem's task losses on the batch are. With ``A_ij`` the
    positive part of the relative advantage ``(F_i(theta_i) - F_i(theta_j)) / |F_i(theta_i)|``, smoothed over batches,
    ``m_ij = strength * A_ij / (sum_k A_ik + sensitivity)`` over the neighbours of ``i``. Where each model is the best
    for its own preference the mass is zero, so the rule switches off by itself, as far as the noise of
    ``F_i(theta_i) - F_i(theta_j)`` allows.

    Args:
        strength: The largest mass received, in [0, 1].
        sensitivity: The relative advantage at which half of it is received, above 0.
        smoothing: The share of the old value in the moving average of advantages, in [0, 1).
        num_neighbors: See :class:`NeighborTransfer`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> preferences = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> losses = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # each is better at what the other wants
        >>> AdvantageTransfer(sensitivity=0.5)(TransferContext.of(preferences, losses))
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """

    def __init__(
        self, strength: float = 0.5, sensitivity: float = 0.05, smoothing: float = 0.9, num_neighbors: int = 2
    ) -> None:
        super().__init__()
        self.strength = _in_range("strength", strength, 0.0, 1.0)
        self.sensitivity = _in_range("sensitivity", sensitivity, torch.finfo(torch.float32).tiny, float("inf"))
        self.smoothing = _in_range("smoothing", smoothing, 0.0, 1.0)
        if smoothing == 1.0:
            raise ValueError("`smoothing` should be below 1, or nothing new is ever seen. Found 1.0.")
        self._neighborhood = _Neighborhood(num_neighbors, None)
        self._average: Tensor | None = None

    def givers(self, preferences: Tensor) -> Tensor:
        """Return the neighbours, shape ``(P, P)``, bool."""
        return self._neighborhood.near(preferences)

    def received(self, context: TransferContext) -> Tensor:
        """Return the smoothed relative advantages over the neighbours, normalised; shape ``(P, P)``."""
        objectives = context.objectives
        own = objectives.diagonal().unsqueeze(1)
        relative = (own - objectives) / own.abs().clamp(min=torch.finfo(objectives.dtype).tiny)
        # The bound keeps sums finite where an objective is nearly zero; it is far above any sensitivity.
        bound = 1.0 / torch.finfo(relative.dtype).eps
        relative = torch.where(context.pairs, relative, 0.0).clamp(min=-bound, max=bound)
        if self._average is not None:
            relative = torch.lerp(relative, self._average.to(relative.device), self.smoothing)
        self._average = relative
        near = self._neighborhood.near(context.preferences)
        gain = torch.where(near & context.pairs, relative.clamp(min=0.0), 0.0)
        return self.strength * gain / (gain.sum(dim=1, keepdim=True) + self.sensitivity)

    def reset(self, subproblems: Sequence[int] | None = None) -> None:
        """Forget the advantages of and over these subproblems, or all."""
        if subproblems is None:
            self._average = None
        elif self._average is not None:
            self._average = self._average.clone()
            self._average[list(subproblems)] = self._average[:, list(subproblems)] = 0.0

    def get_extra_state(self) -> dict[str, Any]:
        """Return the smoothed advantages."""
        return {"average": self._average}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the smoothed advantages of a checkpoint."""
        self._average = state["average"]


def check_matrix(matrix: Tensor, size: int, rule: TransferRule) -> None:
    """Raise an error unless ``matrix`` is a transfer matrix. It reads values, so it is not for every step.

    Raises:
        ValueError: If the shape is not ``(P, P)``, an entry is negative or not finite, or a row does not sum to one.
    """
    name = type(rule).__name__
    if matrix.shape != (size, size):
        raise ValueError(f"{name} should return shape ({size}, {size}). Found {tuple(matrix.shape)}.")
    if not torch.isfinite(matrix).all() or (matrix < -1e-6).any():
        raise ValueError(
            f"{name} should return finite, non-negative entries. Found {matrix.min().item():g} as the least."
        )
    sums = matrix.sum(dim=1)
    if ((sums - 1.0).abs() > 1e-4).any():
        raise ValueError(f"The rows that {name} returns should sum to one. Found sums {sums.tolist()}.")


class _Neighborhood:
    """Gaussian weights over the nearest preference vectors; rows sum to one. Remembers the last preferences."""

    def __init__(self, num_neighbors: int, bandwidth: float | None) -> None:
        if num_neighbors < 1:
            raise ValueError(f"`num_neighbors` should be at least 1. Found {num_neighbors}.")
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"`bandwidth` should be positive, or None. Found {bandwidth}.")
        self.num_neighbors = num_neighbors
        self.bandwidth = bandwidth
        self._preferences: Tensor | None = None
        self._weights = torch.empty(0, 0)
        self._near = torch.empty(0, 0, dtype=torch.bool)

    def __call__(self, preferences: Tensor) -> Tensor:
        """Return the weights, shape ``(P, P)``."""
        self._update(preferences)
        return self._weights

    def near(self, preferences: Tensor) -> Tensor:
        """Return which subproblems are neighbours, whose weights may underflow; shape ``(P, P)``, bool."""
        self._update(preferences)
        return self._near

    def _update(self, preferences: Tensor) -> None:
        if self._preferences is not preferences:
            self._weights, self._near = self._compute(preferences)
            self._preferences = preferences

    def _compute(self, preferences: Tensor) -> tuple[Tensor, Tensor]:
        size = len(preferences)
        if size == 1:
            weights = torch.zeros(1, 1, dtype=preferences.dtype, device=preferences.device)
            return weights, weights > 0
        points = preferences.double()
        distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        distances = distances.fill_diagonal_(torch.inf)
        reach = distances.sort(dim=1).values[
            :, min(self.num_neighbors, size - 1) - 1 : min(self.num_neighbors, size - 1)
        ]
        near = distances <= reach * (1 + 1e-6) + 1e-12
        bandwidth = self.bandwidth or distances.min(dim=1).values.mean().clamp(min=1e-12)
        logits = (-0.5 * (distances / bandwidth).square()).masked_fill(~near, -torch.inf)
        return logits.softmax(dim=1).to(preferences.dtype), near


def _capped(shares: Tensor, cap: float) -> Tensor:
    total = shares.sum(dim=1, keepdim=True)
    return shares * (cap / total.clamp(min=torch.finfo(shares.dtype).tiny)).clamp(max=1.0)


def _is_lost(mass: float, dtype: torch.dtype) -> bool:
    # In half precision already far larger masses vanish beside one, but not beside parameters that are nearly zero.
    return mass < torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 4


def _in_range(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ValueError(f"`{name}` should lie in [{low:g}, {high:g}]. Found {value}.")
    return float(value)
