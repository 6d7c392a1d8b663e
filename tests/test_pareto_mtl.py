from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from mtl_lightning.gradient_weighting import GradientWeighting
from mtl_lightning.mgda import MGDA
from mtl_lightning.pareto_mtl import ParetoMTL
from mtl_lightning.preferences import simplex_lattice, simplex_sample
from mtl_lightning.problems import DTLZ2, Fonseca


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _sectors(losses: Tensor, preferences: Tensor) -> Tensor:
    """Return the preference nearest in angle to each row of losses."""
    return (_unit(losses) @ _unit(preferences).T).argmax(dim=1)


def _statistics(size: int, num_tasks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Jacobians, losses and preferences, at random."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(size, num_tasks, 12, generator=generator, dtype=torch.float64)
    losses = torch.rand(size, num_tasks, generator=generator, dtype=torch.float64)
    return jacobian, losses, simplex_sample(num_tasks, size, generator=generator).double()


# ---------------------------------------------------------------------------------------------------- the direction


def _reference_direction(jacobian: Tensor, losses: Tensor, preferences: Tensor, k: int, initial: bool) -> Tensor:
    """The shortest vector in the hull of the gradients of tasks and of violated constraints, by a general solver."""
    u = _unit(preferences)
    constraints = [(u[j] - u[k]) @ jacobian for j in range(len(u)) if j != k and (u[j] - u[k]) @ losses > 0]
    vectors = torch.stack(constraints if initial and constraints else [*jacobian, *constraints])
    gramian = (vectors @ vectors.T).numpy()
    size = len(gramian)
    solution = minimize(
        lambda w: w @ gramian @ w,
        np.full(size, 1 / size),
        jac=lambda w: 2 * gramian @ w,
        bounds=[(0, 1)] * size,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return torch.from_numpy(solution.x) @ vectors


@pytest.mark.parametrize("initial", [True, False], ids=["initial", "descent"])
@pytest.mark.parametrize("num_tasks", [2, 3])
def test_the_direction_is_the_shortest_vector_of_the_hull(num_tasks: int, initial: bool) -> None:
    jacobian, losses, preferences = _statistics(12, num_tasks)
    weights = ParetoMTL(initial_steps=10).weights(
        jacobian @ jacobian.mT, losses, preferences, step=9 if initial else 10
    )
    torch.testing.assert_close(weights.abs().sum(dim=1), torch.ones(12, dtype=torch.float64))
    for k in range(12):
        found = weights[k] @ jacobian[k]
        expected = _reference_direction(jacobian[k], losses[k], preferences, k, initial)
        torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [0, 1], ids=["initial", "descent"])
def test_violated_constraints_fall_and_in_the_descent_the_losses_as_well(step: int) -> None:
    jacobian, losses, preferences = _statistics(40, 3)
    weights = ParetoMTL(initial_steps=1).weights(jacobian @ jacobian.mT, losses, preferences, step)
    u = _unit(preferences)
    outside = 0
    for k in range(40):
        direction = weights[k] @ jacobian[k]
        violated = (u - u[k]) @ losses[k] > 0
        outside += bool(violated.any())
        assert ((u - u[k])[violated] @ (jacobian[k] @ direction) > 0).all()
        if step == 1:
            assert (jacobian[k] @ direction > 0).all()
    assert 20 < outside < 40


def test_inside_its_sector_a_subproblem_follows_mgda() -> None:
    jacobian, _, preferences = _statistics(10, 3)
    gramian, losses = jacobian @ jacobian.mT, 2 * preferences
    for step in (0, 1000):
        found = ParetoMTL(initial_steps=100).weights(gramian, losses, preferences, step)
        torch.testing.assert_close(found, MGDA().weights(gramian, losses, preferences))


def test_equal_preferences_share_a_sector() -> None:
    jacobian, losses, preferences = _statistics(4, 2)
    gramian = jacobian @ jacobian.mT
    alone = ParetoMTL(0).weights(gramian, losses, preferences)
    # The same directions, to within the rounding of their length.
    again = torch.cat([preferences, 3 * preferences])
    twice = ParetoMTL(0).weights(torch.cat([gramian, gramian]), torch.cat([losses, losses]), again)
    torch.testing.assert_close(twice, torch.cat([alone, alone]))


# ------------------------------------------------------------------------------------------------- where it leads


class _WeightedSum(GradientWeighting):
    def weights(self, gramian: Tensor, losses: Tensor, preferences: Tensor, step: int = 0) -> Tensor:
        return preferences


def _descend(
    rule: GradientWeighting, objectives: Callable[[Tensor], Tensor], x: Tensor, preferences: Tensor, lr: float
) -> Tensor:
    slopes = torch.vmap(torch.func.jacrev(objectives))
    for step in range(100):
        jacobian = slopes(x)
        weights = rule.weights(jacobian @ jacobian.mT, objectives(x), preferences, step)
        x = x - lr * torch.einsum("pt,ptd->pd", weights, jacobian)
    return objectives(x)


def test_every_sector_of_a_concave_front_is_found_where_the_weighted_sum_finds_the_ends() -> None:
    # The synthetic problem of the paper, with its step size, its number of steps and its share of initial ones.
    torch.manual_seed(0)
    problem = Fonseca(20)
    start = torch.rand(10, 20, dtype=torch.float64) - 0.5
    angles = torch.linspace(0, math.pi / 2, 10, dtype=torch.float64)
    preferences = torch.stack([angles.cos(), angles.sin()], dim=1)
    preferences /= preferences.sum(dim=1, keepdim=True)

    losses = _descend(ParetoMTL(initial_steps=20), problem.objectives, start, preferences, lr=1.0)
    assert torch.equal(_sectors(losses, preferences), torch.arange(10))
    front = problem.front(2000).double()
    assert torch.cdist(losses, front).amin(dim=1).max() < 0.03

    ends = _descend(_WeightedSum(), problem.objectives, start, preferences, lr=1.0)
    assert len(set(_sectors(ends, preferences).tolist())) <= 4
    assert torch.minimum(ends[:, 0], ends[:, 1]).max() < 0.1


def test_every_sector_of_three_objectives_is_found() -> None:
    torch.manual_seed(0)
    preferences = simplex_lattice(3, 4).double()
    preferences = preferences[(preferences > 0).all(dim=1)]
    start = torch.rand(len(preferences), 5, dtype=torch.float64) * 0.6 + 0.2
    losses = _descend(ParetoMTL(initial_steps=50), DTLZ2(5).objectives, start, preferences, lr=0.1)
    assert torch.equal(_sectors(losses, preferences), torch.arange(len(preferences)))


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_negative_number_of_initial_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="`initial_steps` should not be negative"):
        ParetoMTL(initial_steps=-1)


def test_one_subproblem_without_the_others_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(P, T\), all subproblems at once. Found shape \(2,\)"):
        ParetoMTL().weights(torch.eye(2), torch.ones(2), torch.ones(2))
