from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lightning.adaptive_weighting import FAMO, DynamicTaskPrioritization, GradNorm

NAMES = ("a", "b", "c")


def _positive(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------- FAMO


def _reference_famo(befores: Tensor, afters: Tensor, lr: float, weight_decay: float, minimum: Tensor) -> Tensor:
    """The weights of the losses before every step.

    https://github.com/Cranial-XIX/FAMO/blob/0a6ad06/methods/weight_methods.py
    """
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=lr, weight_decay=weight_decay)
    rows = []
    for before, after in zip(befores, afters, strict=True):
        losses = before.clone().requires_grad_()
        distances = losses - minimum + 1e-8
        shares = logits.softmax(dim=0)
        constant = (shares / distances).sum().detach()
        objective: Any = (distances.log() * shares / constant).sum()
        rows.append(torch.autograd.grad(objective, losses)[0])
        change = (before - minimum + 1e-8).log() - (after - minimum + 1e-8).log()
        (logits.grad,) = torch.autograd.grad(logits.softmax(dim=0), logits, grad_outputs=change)
        adam.step()
        adam.zero_grad()
    return torch.stack(rows)


@pytest.mark.parametrize("minimum", [(0.0, 0.0, 0.0), (0.05, 0.0, 0.02)])
@pytest.mark.parametrize(("lr", "weight_decay"), [(0.025, 1e-3), (0.1, 0.0), (0.1, 0.5)])
def test_famo_equals_the_official_loop(lr: float, weight_decay: float, minimum: tuple[float, ...]) -> None:
    befores, afters = _positive(30, 3), _positive(30, 3, seed=1)
    expected = _reference_famo(befores, afters, lr, weight_decay, _tensor(*minimum))
    weighting = FAMO(lr, weight_decay, minimum)
    weighting.resolve(NAMES)
    for before, after, row in zip(befores, afters, expected, strict=True):
        torch.testing.assert_close(weighting.slopes(before), row, rtol=1e-9, atol=1e-9)
        weighting.observe_step(before, after)


def test_famo_moves_no_weight_if_all_losses_fall_at_the_same_rate() -> None:
    weighting = FAMO(weight_decay=0.0)
    weighting.resolve(NAMES)
    for seed in range(5):
        before = 1e6 * _positive(3, seed=seed)  # the constant in the logarithm is nothing beside it
        weighting.observe_step(before, 0.7 * before)
    torch.testing.assert_close(weighting.logits, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_famo_gives_weight_to_the_loss_that_falls_least() -> None:
    weighting = FAMO()
    weighting.resolve(NAMES)
    for _ in range(20):
        weighting.observe_step(_tensor(1.0, 2.0, 3.0), _tensor(0.5, 1.9, 1.8))
    assert weighting.logits.argmax() == 1


def test_famo_passes_over_a_step_after_which_a_loss_is_not_finite() -> None:
    weighting = FAMO()
    weighting.resolve(NAMES)
    weighting.observe_step(_positive(3), _positive(3, seed=1))
    before = {key: value.clone() for key, value in weighting.state_dict().items()}
    weighting.observe_step(_positive(3), _tensor(1.0, math.nan, 1.0))
    weighting.observe_step(_positive(3), _tensor(1.0, math.inf, 1.0))
    assert all(torch.equal(value, before[key]) for key, value in weighting.state_dict().items())


# ------------------------------------------------------------------------------------------------------------------ DTP


def _reference_dtp(rows: Tensor, gamma: float, decay: float) -> list[float]:
    """``-(1 - k)^gamma log k`` of ``k <- decay k_new + (1 - decay) k``."""
    weights = []
    for column in rows.T.tolist():
        average = column[0]
        for value in column[1:]:
            average = decay * value + (1 - decay) * average
        weights.append(-((1 - average) ** gamma) * math.log(average))
    return weights


@pytest.mark.parametrize(("gamma", "decay"), [(0.0, 1.0), (1.0, 0.3), (2.5, 0.1)])
def test_dtp_equals_its_formula(gamma: float, decay: float) -> None:
    weighting = DynamicTaskPrioritization(gamma=gamma, decay=decay)
    weighting.resolve(NAMES)
    rows = 0.8 * _positive(9, 3)
    for row in rows:
        weighting.observe_batch(torch.ones(3), row)
    expected = _tensor(*_reference_dtp(rows, gamma, decay))
    torch.testing.assert_close(weighting.slopes(_positive(3)), expected)


def test_dtp_starts_with_weights_of_one() -> None:
    weighting = DynamicTaskPrioritization()
    weighting.resolve(NAMES)
    weighting.observe_batch(torch.ones(2), _tensor(0.5, 0.5), tasks=[0, 2])
    assert weighting.slopes(torch.ones(3))[1] == 1.0


def test_dtp_takes_the_exponential_of_the_loss_for_a_task_without_indicator() -> None:
    weighting = DynamicTaskPrioritization(gamma=0.0, decay=1.0)
    weighting.resolve(NAMES)
    losses = _tensor(0.5, 1.0, 2.0)
    weighting.observe_batch(losses, _tensor(0.5, math.nan, math.nan))
    torch.testing.assert_close(weighting.slopes(losses), _tensor(math.log(2), 1.0, 2.0))


def test_dtp_keeps_the_average_where_an_indicator_is_not_defined() -> None:
    weighting = DynamicTaskPrioritization({"a": torch.dot}, decay=0.5)
    weighting.resolve(NAMES)
    weighting.observe_batch(torch.ones(3), _tensor(0.25, 0.5, 0.5))
    weighting.observe_batch(torch.ones(3), _tensor(math.nan, 0.5, math.nan))
    torch.testing.assert_close(weighting.average, _tensor(0.25, 0.5, 0.25 + 0.5 * math.exp(-1)))


def test_dtp_gives_no_weight_to_a_task_that_is_done_perfectly_and_a_finite_one_to_one_that_fails() -> None:
    weighting = DynamicTaskPrioritization(floor=0.01)
    weighting.resolve(NAMES)
    weighting.observe_batch(torch.ones(3), _tensor(1.0, 0.0, 7.0))
    torch.testing.assert_close(weighting.slopes(torch.ones(3)), torch.tensor([0.0, -0.99 * math.log(0.01), 0.0]))


# ------------------------------------------------------------------------------------------------------------- GradNorm


def _reference_gradnorm(losses: Tensor, norms: Tensor, alpha: float, lr: float) -> Tensor:
    """The weights after every update, by differentiating ``L_grad`` of the paper."""
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=lr)
    rows = []
    for row, norm in zip(losses, norms, strict=True):
        gradients = weights * norm
        left = row / losses[0]
        aims = (gradients.mean() * (left / left.mean()) ** alpha).detach()
        difference: Any = (gradients - aims).abs().sum()
        adam.zero_grad()
        difference.backward()
        adam.step()
        with torch.no_grad():
            weights *= 3 / weights.sum()
        rows.append(weights.detach().clone())
    return torch.stack(rows)


@pytest.mark.parametrize(("alpha", "lr"), [(0.0, 0.01), (0.5, 0.025), (1.5, 0.025)])
def test_gradnorm_equals_the_formulas_of_the_paper(alpha: float, lr: float) -> None:
    losses, norms = _positive(30, 3), _positive(30, 3, seed=1)
    expected = _reference_gradnorm(losses, norms, alpha, lr)
    weighting = GradNorm(alpha, lr)
    weighting.resolve(NAMES)
    for row, norm, after in zip(losses, norms, expected, strict=True):
        weighting.observe_gradients(row, norm)
        torch.testing.assert_close(weighting.slopes(torch.ones(3, dtype=torch.float64)), after, rtol=1e-9, atol=1e-9)


def test_gradnorm_without_restoring_force_makes_the_gradients_equal() -> None:
    weighting = GradNorm(alpha=0.0, lr=0.01)
    weighting.resolve(NAMES)
    norms = _tensor(1.0, 2.0, 4.0)
    for _ in range(400):
        weighting.observe_gradients(_tensor(1.0, 1.0, 1.0), norms)
    weighted = weighting.weights * norms
    torch.testing.assert_close(weighted / weighted.mean(), torch.ones(3, dtype=torch.float64), rtol=0, atol=0.05)


def test_gradnorm_favours_the_task_that_is_slow() -> None:
    weighting = GradNorm(alpha=1.0, lr=0.01)
    weighting.resolve(NAMES)
    for left in (1.0, *[0.5] * 100):
        weighting.observe_gradients(_tensor(1.0, left, left), torch.ones(3))
    assert weighting.weights.argmax() == 0
    assert float(weighting.weights.sum()) == pytest.approx(3.0)


@pytest.mark.parametrize("norms", [(1.0, math.nan, 1.0), (math.inf, 1.0, 1.0)])
def test_gradnorm_passes_over_norms_that_are_not_finite(norms: tuple[float, ...]) -> None:
    weighting = GradNorm()
    weighting.resolve(NAMES)
    weighting.observe_gradients(_positive(3), _positive(3, seed=1))
    before = weighting.weights.clone()
    weighting.observe_gradients(_positive(3), _tensor(*norms))
    torch.testing.assert_close(weighting.weights, before)


def test_gradnorm_keeps_weights_positive() -> None:
    weighting = GradNorm(alpha=3.0, lr=0.5)
    weighting.resolve(NAMES)
    for seed in range(50):
        weighting.observe_gradients(_positive(3, seed=seed), _tensor(1e-3, 1.0, 1e3))
        assert (weighting.weights > 0).all()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FAMO(lr=0.0), "`lr` should be positive"),
        (lambda: FAMO(weight_decay=-1.0), "`weight_decay`"),
        (lambda: FAMO(minimum=[-1.0]), "`minimum` should be finite and not negative"),
        (lambda: FAMO(minimum={"z": 1.0}).resolve(NAMES), "`minimum` should name tasks, 'a', 'b', 'c'. Found 'z'"),
        (lambda: DynamicTaskPrioritization(gamma=-0.1), "`gamma`"),
        (lambda: DynamicTaskPrioritization(decay=0.0), "`decay`"),
        (lambda: DynamicTaskPrioritization(floor=1.0), "`floor`"),
        (lambda: DynamicTaskPrioritization({"z": torch.dot}).resolve(NAMES), "`indicators` should name tasks"),
        (lambda: GradNorm(alpha=math.nan), "`alpha`"),
        (lambda: GradNorm(lr=-1.0), "`lr`"),
        (lambda: GradNorm(floor=0.0), "`floor`"),
    ],
)
def test_refuses_numbers(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_dtp_refuses_an_indicator_that_cannot_be_called() -> None:
    wrong: Any = {"a": 0.5}
    with pytest.raises(TypeError, match=r"indicator of task 'a' should be callable. Found float"):
        DynamicTaskPrioritization(wrong)


@pytest.mark.parametrize("hook", ["observe_step", "observe_gradients", "observe_batch"])
def test_refuses_values_of_another_shape(hook: str) -> None:
    owner = {"observe_step": FAMO, "observe_gradients": GradNorm, "observe_batch": DynamicTaskPrioritization}[hook]()
    owner.resolve(NAMES)
    with pytest.raises(ValueError, match=r"Found \(2,\)"):
        getattr(owner, hook)(torch.ones(3), torch.ones(2))
