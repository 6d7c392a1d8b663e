from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mtl_lightning.ordering import OrderingPenalty
from mtl_lightning.preferences import simplex_sample


def _reference_penalty(losses: list[list[float]], preferences: list[list[float]], strength: float) -> float:
    """The formula of the docstring, pair by pair."""
    total = 0.0
    for task in range(len(losses[0])):
        order = sorted(range(len(losses)), key=lambda row: preferences[row][task], reverse=True)
        terms = []
        for larger, smaller in pairwise(order):
            assert preferences[larger][task] > preferences[smaller][task]
            terms.append(math.exp(max(0.0, losses[larger][task] - losses[smaller][task])))
        total += math.log(sum(terms) / len(terms))
    return strength * total


def _cases(rows: int, tasks: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(rows, tasks, generator=generator, dtype=torch.float64) * 4
    return losses, simplex_sample(tasks, rows, generator=generator).double()


@pytest.mark.parametrize(("rows", "tasks"), [(2, 2), (4, 2), (3, 3), (6, 5)])
def test_it_is_the_formula(rows: int, tasks: int) -> None:
    losses, preferences = _cases(rows, tasks)
    expected = _reference_penalty(losses.tolist(), preferences.tolist(), 0.7)
    assert float(OrderingPenalty(0.7)(losses, preferences)) == pytest.approx(expected)


def test_losses_in_order_cost_nothing_and_have_no_slope() -> None:
    _, preferences = _cases(5, 3)
    losses = (1 - preferences).requires_grad_()  # the larger the weight, the smaller the loss
    value = OrderingPenalty()(losses, preferences)
    (slopes,) = torch.autograd.grad(value, losses)
    assert float(value) == pytest.approx(0.0, abs=1e-12)
    assert not slopes.any()


def test_a_step_along_the_slope_restores_the_order() -> None:
    preferences = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    losses = torch.tensor([[2.0, 1.0], [1.0, 0.5]], requires_grad=True)  # task 0 is out of order, task 1 is not
    (slopes,) = torch.autograd.grad(OrderingPenalty()(losses, preferences), losses)
    assert slopes[:, 0].tolist() == pytest.approx([1.0, -1.0])
    assert slopes[:, 1].tolist() == [0.0, 0.0]


def test_the_order_of_rows_and_tasks_does_not_matter() -> None:
    losses, preferences = _cases(5, 3)
    rows, tasks = [3, 0, 4, 1, 2], [2, 0, 1]
    moved = OrderingPenalty()(losses[rows][:, tasks], preferences[rows][:, tasks])
    torch.testing.assert_close(moved, OrderingPenalty()(losses, preferences))


def test_a_constant_added_to_a_task_changes_nothing() -> None:
    losses, preferences = _cases(4, 2)
    shifted = losses + torch.tensor([5.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(OrderingPenalty()(shifted, preferences), OrderingPenalty()(losses, preferences))


def test_one_preference_has_no_order() -> None:
    assert float(OrderingPenalty()(*_cases(1, 2))) == 0.0


def test_equal_weights_have_no_order() -> None:
    preferences = torch.full((2, 2), 0.5)
    assert float(OrderingPenalty()(torch.tensor([[5.0, 1.0], [1.0, 5.0]]), preferences)) == 0.0


def test_large_differences_do_not_overflow() -> None:
    preferences = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    losses = torch.tensor([[1e6, 0.0], [0.0, 0.0]])
    assert float(OrderingPenalty()(losses, preferences)) == pytest.approx(1e6)


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_it_refuses_a_strength(strength: float) -> None:
    with pytest.raises(ValueError, match="`strength` should be finite and not negative"):
        OrderingPenalty(strength)


@pytest.mark.parametrize(("losses", "preferences"), [((2,), (2,)), ((3, 2), (2, 2))])
def test_it_refuses_shapes(losses: tuple[int, ...], preferences: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one row per preference"):
        OrderingPenalty()(torch.ones(losses), torch.ones(preferences))
