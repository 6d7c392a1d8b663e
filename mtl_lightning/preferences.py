"""Preference vectors: weights of the tasks, shape ``(P, T)``, every row on the simplex.

A row is non-negative and sums to one; column ``t`` says how much task ``t`` counts. Row ``i`` is the preference of
subproblem ``i``. The functions that make preferences return them on the CPU in the default dtype; modules move them.

References:
    - Das, Dennis: Normal-Boundary Intersection: A New Method for Generating the Pareto Surface in Nonlinear
      Multicriteria Optimization Problems (1998), SIAM J. Optim. 8(3).
    - Blank, Deb, Dhebar, Bandaru, Seada: Generating Well-Spaced Points on a Unit Simplex for Evolutionary
      Many-Objective Optimization (2021), IEEE Trans. Evol. Comput. 25(1).
    - Duchi, Shalev-Shwartz, Singer, Chandra: Efficient Projections onto the l1-Ball for Learning in High Dimensions
      (2008), ICML.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

_SUM_TOLERANCE = 1e-4
# Distances that are equal on paper differ by rounding; below this they count as ties.
_TIE_TOLERANCE = 1e-6


def simplex_lattice(num_tasks: int, num_divisions: int) -> Tensor:
    """Return all weights that are multiples of ``1 / num_divisions``, shape ``(P, T)`` (Das and Dennis, 1998).

    ``P = C(num_divisions + T - 1, T - 1)``. Rows are in ascending lexicographic order; for two tasks row ``i`` is
    ``(i / H, 1 - i / H)``, so the first row is all on the last task.

    Args:
        num_tasks: The number of tasks ``T``, at least 2.
        num_divisions: The number ``H`` of divisions of each edge, at least 1. Below ``T`` every row has a zero.

    Example:
        >>> simplex_lattice(num_tasks=2, num_divisions=4).tolist()
        [[0.0, 1.0], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]
        >>> simplex_lattice(num_tasks=3, num_divisions=9).shape
        torch.Size([55, 3])
    """
    _check_at_least("num_tasks", num_tasks, 2)
    _check_at_least("num_divisions", num_divisions, 1)
    # A composition of H into T parts is a choice of T - 1 bars among H + T - 1 places; parts are the gaps.
    end = num_divisions + num_tasks - 1
    bars = torch.tensor(list(combinations(range(end), num_tasks - 1)), device="cpu")
    padded = torch.nn.functional.pad(torch.nn.functional.pad(bars, (1, 0), value=-1), (0, 1), value=end)
    return (padded.diff(dim=-1) - 1).to(torch.get_default_dtype()) / num_divisions


def simplex_sample(
    num_tasks: int,
    num_preferences: int,
    concentration: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return independent draws from the symmetric Dirichlet distribution, shape ``(P, T)``.

    Args:
        num_tasks: The number of tasks ``T``, at least 2.
        num_preferences: The number of draws ``P``, at least 1.
        concentration: 1 is uniform on the simplex, smaller values favour its corners, larger ones its centre.
        generator: The source of randomness. By default torch's global generator.

    Example:
        >>> preferences = simplex_sample(3, 5, generator=torch.Generator().manual_seed(0))
        >>> preferences.shape, torch.allclose(preferences.sum(-1), torch.ones(5))
        (torch.Size([5, 3]), True)
    """
    _check_at_least("num_tasks", num_tasks, 2)
    _check_at_least("num_preferences", num_preferences, 1)
    if not 0.0 < concentration < float("inf"):
        raise ValueError(f"`concentration` should be positive and finite. Found {concentration}.")
    # torch's public Dirichlet takes no generator, and underflows at small concentrations where NumPy's does not.
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    draws = np.random.default_rng(seed).dirichlet([concentration] * num_tasks, size=num_preferences)
    return torch.from_numpy(draws).to(torch.get_default_dtype())


def riesz_energy(
    num_tasks: int,
    num_preferences: int,
    *,
    power: float | None = None,
    num_steps: int = 1000,
    seed: int = 0,
) -> Tensor:
    """Return exactly ``P`` well-spread preferences for any ``P`` and ``T``, shape ``(P, T)``.

    They minimise the Riesz energy ``sum_{i<j} |w_i - w_j|^-s`` (Blank et al., 2021), by Adam on its logarithm. Rows are
    in ascending lexicographic order and the result is the same for the same seed.

    It departs from the paper in three ways: the ``T`` corners are always included if ``P >= T`` and stay fixed, the
    start is chosen among random points one by one, each as far as possible from the others, and iterates return to the
    simplex by Euclidean projection (Duchi et al., 2008) rather than by clipping and rescaling.

    Args:
        num_tasks: The number of tasks ``T``, at least 2.
        num_preferences: The number of preferences ``P``, at least 1. A single one is the centre.
        power: The exponent ``s`` of the energy, positive. By default ``T ** 2``, as in the paper.
        num_steps: The number of Adam steps; each costs ``O(P ** 2 * T)``.
        seed: Seeds the start. The global generator is left alone.

    Example:
        >>> preferences = riesz_energy(num_tasks=3, num_preferences=7)
        >>> preferences.shape
        torch.Size([7, 3])
        >>> [round(weight, 2) for weight in riesz_energy(2, 5)[:, 0].tolist()]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    _check_at_least("num_tasks", num_tasks, 2)
    _check_at_least("num_preferences", num_preferences, 1)
    _check_at_least("num_steps", num_steps, 0)
    power = float(num_tasks**2) if power is None else power
    if not 0.0 < power < float("inf"):
        raise ValueError(f"`power` should be positive and finite. Found {power}.")
    if num_preferences == 1:
        return torch.full((1, num_tasks), 1.0 / num_tasks, device="cpu")

    corners = torch.eye(num_tasks, dtype=torch.float64, device="cpu")
    fixed = corners if num_preferences >= num_tasks else corners[:0]
    start = _farthest_points(fixed, num_preferences, num_tasks, np.random.default_rng(seed))
    with torch.enable_grad():
        points = _minimise_energy(start, len(fixed), power, num_steps)
    order = np.lexsort(points.numpy().T[::-1])
    return points[torch.from_numpy(order)].to(torch.get_default_dtype())


def nearest_preferences(preferences: Tensor, num_neighbors: int) -> Tensor:
    """Return the indices of the nearest other preferences, nearest first, shape ``(P, K)``, int64.

    Distances are Euclidean. Ties, to within 1e-6, go to the lower index. A row is never its own neighbour, even among
    equal rows. ``K`` is ``num_neighbors``, or ``P - 1`` if there are no more: a population that grows from one
    subproblem needs no special case.

    Args:
        preferences: The preference vectors, shape ``(P, T)``.
        num_neighbors: The number of neighbours, at least 1.

    Example:
        >>> nearest_preferences(simplex_lattice(num_tasks=2, num_divisions=3), num_neighbors=2).tolist()
        [[1, 2], [0, 2], [1, 3], [2, 1]]
    """
    _check_at_least("num_neighbors", num_neighbors, 1)
    if preferences.ndim != 2:
        raise ValueError(f"`preferences` should have shape (P, T). Found shape {tuple(preferences.shape)}.")
    rows = preferences.detach().double()
    distances = torch.linalg.vector_norm(rows[:, None] - rows[None], dim=-1)
    distances = (distances / _TIE_TOLERANCE).round().fill_diagonal_(float("inf"))
    return distances.argsort(dim=-1, stable=True)[:, : min(num_neighbors, len(rows) - 1)]


def as_preference(preference: Tensor | Sequence[float], num_tasks: int) -> Tensor:
    """Return the point of the simplex in the direction of ``preference``, on the CPU, float64, shape ``(T,)``.

    Args:
        preference: A weight for each task, of any sum: positive multiples of one another are the same preference.
        num_tasks: The number of tasks ``T``.

    Raises:
        ValueError: If there is not one weight per task, one is negative or not finite, or all are zero.

    Example:
        >>> as_preference((3, 7), num_tasks=2)
        tensor([0.3000, 0.7000], dtype=torch.float64)
    """
    weights = torch.as_tensor(preference, dtype=torch.float64, device="cpu").detach()
    if weights.shape != (num_tasks,):
        raise ValueError(
            f"`preference` should have shape ({num_tasks},), one weight per task. Found shape {tuple(weights.shape)}."
        )
    if not weights.isfinite().all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"`preference` should hold finite weights of at least 0, not all of them 0. Found {weights.tolist()}."
        )
    weights = weights / weights.max()  # or the sum of large weights would overflow
    return weights / weights.sum()


def check_preferences(preferences: Tensor | Sequence[Sequence[float]], num_tasks: int | None = None) -> Tensor:
    """Return ``preferences`` as a contiguous floating-point tensor, shape ``(P, T)``, or raise an error.

    Floating-point tensors keep their dtype and device; anything else becomes the default dtype.

    Args:
        preferences: The preference vectors, a tensor or nested lists, shape ``(P, T)``.
        num_tasks: The number of tasks ``T`` that they should have. By default any number from 2.

    Raises:
        ValueError: If the shape is not ``(P, T)`` with ``P >= 1`` and ``T >= 2``, if there is not one column per task,
            or if a row is not on the simplex: finite, non-negative and of sum one to within 1e-4.

    Example:
        >>> check_preferences([[0.25, 0.75], [1, 0]]).shape
        torch.Size([2, 2])
        >>> check_preferences([[0.5, 0.5], [0.5, 0.6]])
        Traceback (most recent call last):
        ValueError: Every row of `preferences` should sum to one. Found row 1 with sum 1.1.
    """
    tensor = torch.as_tensor(preferences)
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    shape = tuple(tensor.shape)
    if tensor.ndim != 2:
        raise ValueError(f"`preferences` should have shape (P, T), one row per subproblem. Found shape {shape}.")
    if shape[0] < 1 or shape[1] < 2:
        raise ValueError(f"`preferences` should have at least one row and two columns. Found shape {shape}.")
    if num_tasks is not None and shape[1] != num_tasks:
        raise ValueError(f"`preferences` should have shape (P, {num_tasks}), one column per task. Found shape {shape}.")
    rows = tensor.detach().double()
    if (row := _first(~rows.isfinite().all(dim=-1))) is not None:
        raise ValueError(f"`preferences` should be finite. Found row {row} = {rows[row].tolist()}.")
    if (row := _first((rows < 0).any(dim=-1))) is not None:
        raise ValueError(f"`preferences` should not be negative. Found row {row} = {_rounded(rows[row])}.")
    sums = rows.sum(dim=-1)
    if (row := _first((sums - 1).abs() > _SUM_TOLERANCE)) is not None:
        raise ValueError(f"Every row of `preferences` should sum to one. Found row {row} with sum {sums[row]:.6g}.")
    return tensor.contiguous()


def _farthest_points(fixed: Tensor, num_points: int, num_tasks: int, rng: np.random.Generator) -> Tensor:
    """Return ``fixed`` followed by points chosen one by one, each the farthest of a random pool, ``(P, T)``."""
    pool = torch.from_numpy(rng.dirichlet([1.0] * num_tasks, size=max(1000, 20 * num_points)))
    chosen = list(fixed) if len(fixed) else [pool[0]]
    distances = torch.cdist(pool, torch.stack(chosen)).amin(dim=-1)
    while len(chosen) < num_points:
        chosen.append(pool[distances.argmax()])
        distances = torch.minimum(distances, torch.linalg.vector_norm(pool - chosen[-1], dim=-1))
    return torch.stack(chosen)


def _minimise_energy(start: Tensor, num_fixed: int, power: float, num_steps: int) -> Tensor:
    """Return the iterate of least energy, shape ``(P, T)``, the first ``num_fixed`` rows as they were."""
    fixed, free = start[:num_fixed], start[num_fixed:].clone().requires_grad_()
    if len(free) == 0:
        return start
    best, best_energy = start, float("inf")
    step_size = 0.1 * float(torch.pdist(start).min())
    adam = torch.optim.Adam([free], lr=step_size)
    for step in range(num_steps + 1):
        points = torch.cat([fixed, free])
        # The logarithm keeps the energy finite where its terms overflow; Adam is blind to the change of scale.
        energy = torch.logsumexp(-power * torch.pdist(points).log(), dim=0)
        if energy.detach() < best_energy:
            best, best_energy = points.detach(), float(energy.detach())
        if step == num_steps:
            break
        (gradient,) = torch.autograd.grad(energy, free)
        free.grad = gradient - gradient.mean(dim=-1, keepdim=True)  # along the simplex
        adam.param_groups[0]["lr"] = step_size * (1 - step / num_steps)
        with torch.device("cpu"):  # where older releases make the optimiser's counter, whatever the device context
            adam.step()
        free.data = _project_to_simplex(free.data)
    return best


def _project_to_simplex(points: Tensor) -> Tensor:
    """Return the nearest points of the simplex, shape ``(..., T)`` (Duchi et al., 2008)."""
    descending = points.sort(dim=-1, descending=True).values
    counts = torch.arange(1, points.shape[-1] + 1, dtype=points.dtype, device=points.device)
    thresholds = (descending.cumsum(dim=-1) - 1) / counts
    support = (descending > thresholds).sum(dim=-1, keepdim=True)
    return (points - thresholds.gather(-1, support - 1)).clamp_min(0)


def _check_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"`{name}` should be at least {minimum}. Found {value}.")


def _first(mask: Tensor) -> int | None:
    """Return the index of the first true element of ``mask``, shape ``(P,)``, or None."""
    return int(mask.int().argmax()) if bool(mask.any()) else None


def _rounded(row: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in row.tolist()]
