from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from mtl_lightning.exact_pareto import EPO, adjustments, floored, nonuniformity
from mtl_lightning.min_norm import min_norm_weights
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.problems import VLMOP1, Fonseca
from tests.test_gradient_weighting import statistics

Array = np.ndarray[Any, np.dtype[np.float64]]


# -------------------------------------------------------------------------------------------------- non-uniformity


def test_the_nonuniformity_is_the_divergence_from_equal_shares() -> None:
    _, losses, preferences = statistics(20, 4)
    shares = (losses * preferences).numpy().T
    np.testing.assert_allclose(nonuniformity(losses, preferences), entropy(shares, np.full_like(shares, 0.25)))


def test_it_is_zero_on_the_ray_and_largest_on_an_axis() -> None:
    preferences = torch.tensor([0.2, 0.3, 0.5])
    assert nonuniformity(2.0 / preferences, preferences) == pytest.approx(0.0, abs=1e-6)
    assert nonuniformity(torch.tensor([0.0, 3.0, 0.0]), preferences) == pytest.approx(math.log(3))
    assert nonuniformity(torch.zeros(3), preferences) == 0


def test_the_adjustments_are_its_slopes_and_orthogonal_to_the_losses() -> None:
    _, losses, preferences = statistics(20, 4)
    leaf = losses.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(nonuniformity(leaf, preferences).sum(), leaf)
    found = adjustments(losses, preferences)
    torch.testing.assert_close(found, slopes * (losses * preferences).sum(dim=1, keepdim=True))
    torch.testing.assert_close((found * losses).sum(dim=1), torch.zeros(20, dtype=torch.float64))


def test_preferences_have_a_floor() -> None:
    found = floored(torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.2, 0.2]]), floor=0.01)
    torch.testing.assert_close(found, torch.tensor([[0.01 / 1.01, 1 / 1.01], [0.5, 0.5], [0.5, 0.5]]))


# --------------------------------------------------------------------------------------------- the linear programs


def _best_vertex(objective: Array, rows: Array, bounds: Array) -> Array:
    """Return the vertex of ``{beta on the simplex, rows beta >= bounds}`` of largest ``objective' beta``."""
    size = len(objective)
    every = np.vstack([np.eye(size), rows])
    limits = np.concatenate([np.zeros(size), bounds])
    best, found = -math.inf, np.full(size, np.nan)
    for tight in combinations(range(len(every)), size - 1):
        system = np.vstack([np.ones(size), every[list(tight)]])
        if np.linalg.matrix_rank(system) < size:
            continue
        vertex = np.linalg.solve(system, np.concatenate([[1.0], limits[list(tight)]]))
        if (every @ vertex >= limits - 1e-9).all() and objective @ vertex > best:
            best, found = float(objective @ vertex), vertex
    return found


def _reference_weights(c: Array, losses: Array, r: Array, tolerance: float) -> Array:
    """One row of the algorithm, by enumeration of all vertices.

    As ``EPO_LP.get_alpha`` in https://github.com/dbmptr/EPOSearch/blob/0293ee98304b0e9d7ee2bff1217e696ec9ef4a2c, but
    for the descent where no weights keep the non-uniformity from rising.
    """
    weighted = r * losses
    shares = weighted / weighted.sum()
    mu = (shares * np.log(shares * len(r))).sum()
    towards = c @ (r * (np.log(shares * len(r)) - mu))
    if mu > tolerance:
        improving = towards > 0
        bounds = np.where(improving, -1e9, towards) if improving.any() else np.zeros(len(r))
        bounds[weighted == weighted.max()] = 0.0
        return _best_vertex(towards, c, bounds)
    least = _best_vertex(towards, c, np.zeros(len(r)))
    return _best_vertex(c.sum(axis=0), np.vstack([c, towards]), np.append(np.zeros(len(r)), min(least @ towards, 0.0)))


@pytest.mark.parametrize("tolerance", [1e-4, 10.0], ids=["balance", "descent"])
@pytest.mark.parametrize("num_tasks", [2, 3, 4])
def test_weights_are_those_of_the_published_programs(num_tasks: int, tolerance: float) -> None:
    gramian, losses, preferences = statistics(30, num_tasks)
    found = EPO(tolerance).weights(gramian, losses, preferences)
    for row in range(30):
        expected = _reference_weights(gramian[row].numpy(), losses[row].numpy(), preferences[row].numpy(), tolerance)
        # Other vertices are far; near the ray this one is known to its slope, which a slack is left.
        np.testing.assert_allclose(found[row].numpy(), expected, atol=2e-3)


def test_rows_do_not_depend_on_each_other() -> None:
    gramian, losses, preferences = statistics(12, 3)
    together = EPO().weights(gramian.view(3, 4, 3, 3), losses.view(3, 4, 3), preferences.view(3, 4, 3)).view(12, 3)
    for row in range(12):
        torch.testing.assert_close(EPO().weights(gramian[row], losses[row], preferences[row]), together[row])


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_off_the_ray_the_largest_weighted_loss_falls_and_the_losses_are_balanced(num_tasks: int) -> None:
    gramian, losses, preferences = statistics(100, num_tasks)
    rates = torch.einsum("nij,nj->ni", gramian, EPO().weights(gramian, losses, preferences))  # at which losses fall
    largest = (preferences * losses).argmax(dim=1, keepdim=True)
    assert (rates.gather(1, largest) >= -1e-4).all()
    # The shortest vector is open to the program, so the non-uniformity falls at least as fast as along it.
    a = adjustments(losses, preferences)
    shortest = torch.einsum("nij,nj->ni", gramian, min_norm_weights(gramian))
    balance = (rates * a).sum(dim=1)
    assert (balance >= (shortest * a).sum(dim=1) - 1e-4).all()
    assert (balance > 0).sum() > 80


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_a_loss_that_is_too_small_may_rise(num_tasks: int) -> None:
    # At a Pareto optimal point the gradients cancel: without an ascent there is no way along the front.
    jacobian = torch.eye(num_tasks, dtype=torch.float64)
    jacobian[-1] = -jacobian[:-1].sum(dim=0)
    gramian = jacobian @ jacobian.T
    losses = torch.ones(num_tasks, dtype=torch.float64)
    losses[-1] = 0.2
    weights = EPO().weights(gramian, losses, torch.full_like(losses, 1 / num_tasks))
    rates = gramian @ weights
    assert (rates[:-1] >= -1e-6).all()
    assert rates[:-1].max() > 0.05
    assert rates[-1] < -0.05
    assert adjustments(losses, torch.full_like(losses, 1 / num_tasks)) @ rates > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_on_the_ray_no_loss_rises(num_tasks: int, dtype: torch.dtype) -> None:
    gramian, _, preferences = statistics(100, num_tasks)
    preferences = preferences.to(dtype)  # the losses miss the ray by rounding
    rates = torch.einsum("nij,nj->ni", gramian, EPO().weights(gramian, 1 / preferences, preferences))
    assert (rates >= -1e-4).all()
    shortest = min_norm_weights(gramian)
    lengths = torch.einsum("ni,nij,nj->n", shortest, gramian, shortest)
    # Their sum falls at least as fast as along the shortest vector, which is open to it.
    assert (rates.sum(dim=1) >= num_tasks * lengths - 1e-4).all()


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_a_gramian_that_rounding_has_made_indefinite_does_not_stop_the_others(num_tasks: int) -> None:
    # No weights meet its constraints: each loss rises with the gradients of the others.
    broken = torch.eye(num_tasks, dtype=torch.float64) - 1
    gramian, losses, preferences = statistics(3, num_tasks)
    expected = EPO().weights(gramian, losses, preferences)
    gramian[1] = broken
    found = EPO().weights(gramian, losses, preferences)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(found[1].sum(), torch.tensor(1.0, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------- where it leads


def _descend(
    objectives: Callable[[Tensor], Tensor], x: Tensor, preferences: Tensor, steps: int, lr: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return the losses at the end, and the gradients of them."""
    rule = EPO(tolerance)
    slopes = torch.vmap(torch.func.jacrev(objectives))
    for step in range(steps):
        jacobian = slopes(x)
        weights = rule.weights(jacobian @ jacobian.mT, objectives(x), preferences, step)
        x = x - lr * torch.einsum("pt,ptd->pd", weights, jacobian)
    return objectives(x), slopes(x)


def _quadratics(x: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - torch.eye(x.shape[-1], dtype=x.dtype)).square().sum(dim=-1) + 0.1


@pytest.mark.parametrize(("num_tasks", "side"), [(2, "first"), (2, "last"), (2, "far"), (3, "first"), (3, "far")])
def test_a_convex_toy_ends_on_the_ray_and_on_the_front(num_tasks: int, side: str) -> None:
    torch.manual_seed(0)
    preferences = 0.2 + 0.6 * torch.rand(6, num_tasks, dtype=torch.float64)
    preferences /= preferences.sum(dim=1, keepdim=True)
    near = 0.01 * torch.randn(6, num_tasks, dtype=torch.float64)
    corners = torch.eye(num_tasks, dtype=torch.float64)
    start = {"first": near + corners[0], "last": near + corners[-1], "far": 300 * near}[side]
    losses, jacobian = _descend(_quadratics, start, preferences, 250, 0.02, 1e-5)
    weighted = preferences * losses
    torch.testing.assert_close(weighted, weighted.mean(dim=1, keepdim=True).expand_as(weighted), rtol=3e-2, atol=0)
    gramian = jacobian @ jacobian.mT
    shortest = min_norm_weights(gramian)
    assert torch.einsum("pi,pij,pj->p", shortest, gramian, shortest).max() < 1e-3


def test_a_convex_front_is_found_where_the_losses_are_equal() -> None:
    problem, preferences = VLMOP1(2), simplex_lattice(2, 6)[1:-1].double()
    for start in (0.1, 1.9):  # near either end
        x = torch.full((5, 2), start, dtype=torch.float64)
        losses, _ = _descend(problem.objectives, x, preferences, 300, 0.05, 1e-6)
        torch.testing.assert_close(losses, problem.chebyshev_front(preferences), rtol=0, atol=5e-3)


def test_a_concave_front_is_found_as_well() -> None:
    torch.manual_seed(0)
    problem, preferences = Fonseca(20), simplex_lattice(2, 6)[1:-1].double()
    x = torch.rand(5, 20, dtype=torch.float64) - 0.5
    losses, _ = _descend(problem.objectives, x, preferences, 200, 0.1, 1e-5)
    torch.testing.assert_close(losses, problem.chebyshev_front(preferences), rtol=0, atol=5e-3)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tolerance": 0.0}, "`tolerance` should be positive. Found 0.0"),
        ({"floor": 0.0}, "`floor` should lie between 0 and 1. Found 0.0"),
        ({"floor": 1.0}, "`floor` should lie between 0 and 1. Found 1.0"),
    ],
)
def test_constructor_refuses(arguments: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EPO(**arguments)


def test_negative_losses_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not negative.*Found -0.5.*lower bound"):
        EPO().weights(torch.eye(2), torch.tensor([-0.5, 1.0]), torch.tensor([0.5, 0.5]))
