from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl_lightning.nash import NashMTL, bargaining_weights


def _aggregator(num_tasks: int, max_norm: float | None = None) -> NashMTL:
    aggregator = NashMTL(max_norm)
    aggregator.resolve([str(task) for task in range(num_tasks)])
    return aggregator


def _gradients(num_tasks: int, size: int, seed: int, scales: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tasks, size, generator=generator, dtype=torch.float64)
    return rows * torch.logspace(-4, 4, num_tasks, dtype=torch.float64)[:, None] if scales else rows


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11, 40])
@pytest.mark.parametrize("scales", [False, True])
def test_the_weights_solve_the_equation_of_the_paper(num_tasks: int, scales: bool) -> None:
    for seed in range(4):
        rows = _gradients(num_tasks, num_tasks + 5, seed, scales)
        gramian = rows @ rows.T
        weights = _aggregator(num_tasks).weights(gramian)
        assert (weights > 0).all()
        # Claim 3.1, for the Gramian divided by its norm.
        torch.testing.assert_close(weights * (gramian / gramian.norm() @ weights), torch.ones_like(weights))


def test_the_weights_are_positive_where_gradients_nearly_cancel_out() -> None:
    # There a full step of Newton's method may leave the positive weights, and end at another solution.
    for seed in range(40):
        rows = _gradients(11, 11, seed)
        rows[:, 0] = 0.1
        rows /= rows.norm(dim=1, keepdim=True)
        weights = bargaining_weights(rows @ rows.T)
        assert (weights > 0).all()
        torch.testing.assert_close(weights * (rows @ (weights @ rows)), torch.ones_like(weights))


def test_the_product_of_the_gains_is_the_largest() -> None:
    rows = _gradients(3, 6, seed=2)
    found = _aggregator(3)(rows)
    best = (rows @ found / found.norm()).log().sum()
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        others = found + size * found.norm() * torch.randn(500, 6, generator=generator, dtype=torch.float64)
        gains = others @ rows.T / others.norm(dim=1, keepdim=True)
        values = gains[(gains > 0).all(dim=1)].log().sum(dim=1)
        assert (values < best).all()


@pytest.mark.parametrize("cosine", [-0.999, -0.5, 0.0, 0.9])
def test_two_tasks_have_a_closed_form(cosine: float) -> None:
    # By symmetry w (1 + cos) = 1 / w, over the lengths of the gradients.
    correlations = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
    expected = torch.full((2,), (1 + cosine) ** -0.5, dtype=torch.float64)
    torch.testing.assert_close(bargaining_weights(correlations), expected)


def test_the_unit_of_a_loss_does_not_change_the_direction() -> None:
    rows = _gradients(4, 9, seed=0)
    one, other = _aggregator(4)(rows), _aggregator(4)(rows * torch.tensor([[1e-5], [1.0], [300.0], [1e6]]))
    torch.testing.assert_close(one / one.norm(), other / other.norm())


def test_the_length_is_that_of_the_gradients_up_to_a_bound() -> None:
    rows = _gradients(3, 9, seed=0)
    free = float((3 * (rows @ rows.T).norm()).sqrt())
    assert float(_aggregator(3)(rows).norm()) == pytest.approx(free)
    assert float(_aggregator(3, max_norm=0.5)(rows).norm()) == pytest.approx(0.5)
    assert float(_aggregator(3, max_norm=0.5)(1e-3 * rows).norm()) == pytest.approx(1e-3 * free)


def test_gradients_that_cancel_out_hardly_move() -> None:
    rows = torch.tensor([[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]], dtype=torch.float64)
    for scaled in (rows, rows * torch.tensor([[1e-3], [1.0], [1e4]])):
        assert float(_aggregator(3)(scaled).norm()) < 1e-3 * float(scaled.norm())


@pytest.mark.parametrize("num_tasks", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-6])
def test_in_single_precision_gradients_that_cancel_out_keep_to_the_bound(num_tasks: int, noise: float) -> None:
    # Weights are in the millions there, and times the rounding of the gradients longer than any step should be.
    rows = _gradients(num_tasks, 20000, seed=0)
    rows[-1] = -rows[:-1].sum(dim=0) + noise * rows[-1]
    found = _aggregator(num_tasks, max_norm=1.0)(rows.float())
    assert float(found.norm()) <= 1.0 + 1e-3


def test_a_gradient_of_zero_has_no_weight() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    weights = _aggregator(3).weights(rows @ rows.T)
    assert weights[1] == 0
    torch.testing.assert_close(weights[[0, 2]], _aggregator(2).weights(rows[[0, 2]] @ rows[[0, 2]].T))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_the_bound_is_checked(max_norm: float) -> None:
    with pytest.raises(ValueError, match="`max_norm` should be positive and finite, or None"):
        NashMTL(max_norm)
