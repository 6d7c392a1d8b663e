from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from mtl_lightning.cagrad import CAGrad


def _aggregator(num_tasks: int, c: float) -> CAGrad:
    aggregator = CAGrad(c)
    aggregator.resolve([str(task) for task in range(num_tasks)])
    return aggregator


def _gradients(num_tasks: int, size: int, seed: int, kind: str = "plain") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tasks, size, generator=generator, dtype=torch.float64)
    if kind == "scales":
        rows *= torch.logspace(-3, 3, num_tasks, dtype=torch.float64)[:, None]
    if kind == "agreeing":
        rows += 3 * torch.randn(size, generator=generator, dtype=torch.float64)
    return rows


@pytest.mark.parametrize("kind", ["plain", "scales", "agreeing"])
@pytest.mark.parametrize("num_tasks", [2, 3, 11, 40])
@pytest.mark.parametrize("c", [0.2, 0.5, 0.99, 2.0])
def test_the_worst_gain_equals_its_bound(c: float, num_tasks: int, kind: str) -> None:
    # Any weights on the simplex bound the worst gain from above, by duality: equality proves both to be optimal.
    for seed in range(3):
        rows = _gradients(num_tasks, 2 * num_tasks, seed, kind)
        mean = rows.mean(dim=0)
        radius = c * mean.norm()
        weights = _aggregator(num_tasks, c).weights(rows @ rows.T)
        vector = weights @ rows
        assert (vector - mean).norm() <= radius * (1 + 1e-9)
        added = weights - 1 / num_tasks
        assert (added >= -1e-12).all()
        simplex = added / added.sum()
        bound = simplex @ (rows @ mean) + radius * (simplex @ rows).norm()
        lengths = rows.norm(dim=1)
        assert ((bound - rows @ vector) / (lengths * vector.norm())).max() < 1e-7


def test_two_tasks_agree_with_a_search() -> None:
    for seed in range(5):
        rows = _gradients(2, 3, seed)
        mean = rows.mean(dim=0)
        radius = float(0.4 * mean.norm())
        # On the sphere, in the plane of the two gradients.
        basis = torch.linalg.svd(rows, full_matrices=False).Vh
        angles = torch.linspace(0, 2 * torch.pi, 200001, dtype=torch.float64)
        vectors = mean + radius * torch.stack([angles.cos(), angles.sin()], dim=1) @ basis
        best = (vectors @ rows.T).min(dim=1).values.max()
        found = _aggregator(2, 0.4)(rows)
        assert float((rows @ found).min()) == pytest.approx(float(best), rel=1e-6, abs=1e-8)


def test_the_weights_are_those_of_the_dual_problem_of_the_paper() -> None:
    rows = _gradients(4, 9, seed=1)
    mean = rows.mean(dim=0)
    radius = float(0.5 * mean.norm())
    matrix, target = rows.numpy(), (rows @ mean).numpy()

    def objective(weights: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
        return float(weights @ target + radius * np.linalg.norm(weights @ matrix))

    best = scipy.optimize.minimize(
        objective,
        np.full(4, 0.25),
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    added = torch.from_numpy(best.x) @ rows
    torch.testing.assert_close(_aggregator(4, 0.5)(rows), mean + radius * added / added.norm(), rtol=1e-4, atol=1e-4)


def test_without_a_radius_it_is_the_mean_gradient() -> None:
    rows = _gradients(5, 7, seed=0)
    torch.testing.assert_close(_aggregator(5, 0.0)(rows), rows.mean(dim=0))


def test_at_a_pareto_stationary_point_it_is_the_nearest_vector_that_harms_no_task() -> None:
    # The first two cancel out, so that the worst gain is zero at best: along the third axis.
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    found = _aggregator(3, 0.9)(rows)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_where_no_vector_is_better_for_all_tasks_it_stays_near_and_harms_none() -> None:
    moved = 0
    for seed in range(100):
        rows = _gradients(5, 6, seed)
        rows *= torch.tensor([[1.0], [1.0], [1.0], [1e3], [1e-3]], dtype=torch.float64)
        first, second = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows[2] = -(first * rows[0] + second * rows[1])
        rows = rows.float().double()  # up to rounding the three cancel out
        mean = rows.mean(dim=0)
        found = _aggregator(5, 0.99)(rows)
        assert (found - mean).norm() <= 0.99 * mean.norm() * (1 + 1e-9)
        if (found - mean).norm() < 0.98 * mean.norm():  # else the radius is too small for it
            assert (rows @ found / rows.norm(dim=1)).min() >= -1e-5 * mean.norm()
            moved += 1
    assert moved > 20


def test_gradients_that_sum_to_zero_do_not_move() -> None:
    assert not _aggregator(2, 0.5)(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).any()


@pytest.mark.parametrize("c", [-0.1, float("nan"), float("inf")])
def test_the_radius_is_checked(c: float) -> None:
    with pytest.raises(ValueError, match="`c` should be finite and at least 0"):
        CAGrad(c)
