from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lightning.adaptive_weighting import FAMO, DynamicTaskPrioritization, GradNorm
from mtl_lightning.scalarization import Chebyshev, SmoothChebyshev, TrackedIdeal
from mtl_lightning.weighting import (
    DynamicWeightAverage,
    Equal,
    Fixed,
    GeometricMean,
    IMTLLoss,
    LossWeighting,
    RandomWeights,
    Scalarized,
    ScaleInvariant,
    Uncertainty,
)

NAMES = ("a", "b", "c", "d")
Make = Callable[[], LossWeighting]
FAMILY: dict[str, Make] = {
    "Equal": Equal,
    "Fixed": lambda: Fixed({"a": 0.5, "c": 3.0}),
    "ScaleInvariant": ScaleInvariant,
    "GeometricMean": GeometricMean,
    "RandomWeights": RandomWeights,
    "Uncertainty": Uncertainty,
    "IMTLLoss": IMTLLoss,
    "DynamicWeightAverage": DynamicWeightAverage,
    "Scalarized": lambda: Scalarized(SmoothChebyshev(ideal=TrackedIdeal(4)), {"b": 2.0}),
    "FAMO": lambda: FAMO(lr=0.2, minimum={"c": 0.01}),
    "DynamicTaskPrioritization": lambda: DynamicTaskPrioritization({"b": lambda preds, target: preds.mean()}),
    "GradNorm": lambda: GradNorm(lr=0.1),
}
family = pytest.mark.parametrize("name", FAMILY)


def _but(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in FAMILY if name not in names])


def resolved(weighting: LossWeighting, names: Sequence[str] = NAMES) -> LossWeighting:
    weighting.resolve(names)
    return weighting


def _positive(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def _learn(
    weighting: LossWeighting,
    steps: int = 7,
    scale: Tensor | float = 1.0,
    order: Sequence[int] = range(4),
    seed: int = 1,
) -> None:
    """Let a weighting observe a run, with an epoch that ends after every third step."""
    order = list(order)
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.1) if any(True for _ in weighting.parameters()) else None
    for step in range(steps):
        rows = _positive(4, 4, seed=100 * seed + step)[:, order]
        losses, after, norms = (rows[:3] * scale).unbind()
        indicators = torch.where(torch.tensor([index in (0, 1) for index in order]), rows[3], torch.nan)
        weighting.observe_batch(losses, indicators)
        if optimizer is not None:
            optimizer.zero_grad()
            weighting(losses).backward()
            optimizer.step()
        weighting.observe_gradients(losses, norms)
        weighting.observe(losses)
        weighting.observe_step(losses, after)
        if step % 3 == 2:
            weighting.end_epoch()


# ----------------------------------------------------------------------------------------------- what all members owe


@family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_objective_is_a_scalar_of_the_dtype_of_the_losses(name: str, dtype: torch.dtype) -> None:
    weighting = resolved(FAMILY[name]())
    _learn(weighting)
    objective = weighting(_positive(4).to(dtype))
    assert objective.shape == ()
    assert objective.dtype == dtype


@family
def test_no_weight_is_negative(name: str) -> None:
    weighting = resolved(FAMILY[name]())
    for seed in range(3):
        _learn(weighting, seed=seed)
        assert (weighting.slopes(_positive(4)) >= 0).all()


@family
def test_the_slopes_are_the_derivatives(name: str) -> None:
    weighting, losses = resolved(FAMILY[name]()), _positive(4)
    _learn(weighting)
    if name == "FAMO":
        # The normalisation counts as a constant.
        shares = weighting.slopes(losses) * (losses - torch.tensor([0.0, 0.0, 0.01, 0.0]))
        torch.testing.assert_close(shares / shares.sum(), weighting.get_buffer("logits").softmax(dim=0))
        return
    assert torch.autograd.gradcheck(weighting, losses.requires_grad_())


@family
def test_the_objective_changes_no_state(name: str) -> None:
    weighting, losses = resolved(FAMILY[name]()), _positive(4)
    _learn(weighting)
    before = copy.deepcopy(weighting.state_dict())
    first = weighting(losses)
    assert torch.equal(first, weighting(losses))
    assert torch.equal(weighting.slopes(losses), weighting.slopes(losses))
    _assert_equal(weighting.state_dict(), before)


def _assert_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert found[key] == value


@_but("RandomWeights")
def test_the_order_of_the_tasks_does_not_matter(name: str) -> None:
    order = [2, 0, 3, 1]
    plain, permuted = resolved(FAMILY[name]()), resolved(FAMILY[name](), [NAMES[index] for index in order])
    _learn(plain)
    _learn(permuted, order=order)
    losses = _positive(4)
    torch.testing.assert_close(permuted(losses[order]), plain(losses))
    torch.testing.assert_close(permuted.slopes(losses[order]), plain.slopes(losses)[order])


@family
def test_the_order_of_the_given_tasks_does_not_matter(name: str) -> None:
    weighting, losses = resolved(FAMILY[name]()), _positive(4)
    _learn(weighting)
    torch.testing.assert_close(weighting(losses[[3, 1]], [3, 1]), weighting(losses[[1, 3]], [1, 3]))
    torch.testing.assert_close(weighting(losses[[1, 0, 3, 2]], [1, 0, 3, 2]), weighting(losses))


def _state_of(weighting: LossWeighting, task: int) -> dict[str, Tensor]:
    return {key: value[task].clone() for key, value in weighting.state_dict().items() if isinstance(value, Tensor)}


# Its weights are drawn together.
@_but("RandomWeights")
def test_a_task_that_is_missing_keeps_its_state(name: str) -> None:
    weighting = resolved(FAMILY[name]())
    _learn(weighting)
    before, seen = _state_of(weighting, 2), _state_of(weighting, 1)
    losses, tasks = _positive(3), [0, 1, 3]
    weighting.observe_batch(losses, _positive(3, seed=2), tasks)
    weighting.observe(losses, tasks)
    weighting.observe_step(losses, 0.5 * losses.square(), tasks)
    weighting.observe_gradients(losses, _positive(3, seed=3), tasks)
    _assert_equal(_state_of(weighting, 2), before)
    if name in ("DynamicWeightAverage", "FAMO", "DynamicTaskPrioritization", "GradNorm"):
        assert any(not torch.equal(value, seen[key]) for key, value in _state_of(weighting, 1).items())


# Those whose state or definition has a scale of its own.
@_but("Uncertainty", "IMTLLoss", "Scalarized", "DynamicTaskPrioritization", "FAMO")
@pytest.mark.parametrize("scale", [1e-2, 1e3])
def test_a_common_unit_of_the_losses_does_not_change_the_proportions_of_the_weights(name: str, scale: float) -> None:
    plain, scaled, losses = resolved(FAMILY[name]()), resolved(FAMILY[name]()), _positive(4)
    _learn(plain)
    _learn(scaled, scale=scale)
    expected, found = plain.slopes(losses), scaled.slopes(scale * losses)
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("make", "tolerance"), [(ScaleInvariant, 1e-12), (GeometricMean, 1e-12), (FAMO, 1e-5)])
def test_the_unit_of_each_loss_does_not_change_the_proportions_of_the_weighted_losses(
    make: Make, tolerance: float
) -> None:
    units = torch.tensor([1e-2, 1.0, 30.0, 1e3], dtype=torch.float64)
    plain, scaled, losses = resolved(make()), resolved(make()), _positive(4)
    _learn(plain)
    _learn(scaled, scale=units)
    expected, found = plain.slopes(losses) * losses, scaled.slopes(units * losses) * (units * losses)
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=tolerance, atol=0)


@family
def test_a_run_goes_on_from_its_state_dict(name: str) -> None:
    weighting = resolved(FAMILY[name]())
    _learn(weighting, steps=5)
    stream = io.BytesIO()
    torch.save(weighting.state_dict(), stream)
    stream.seek(0)
    again = resolved(FAMILY[name]())
    again.load_state_dict(torch.load(stream, weights_only=True))
    _learn(weighting, seed=2)
    _learn(again, seed=2)
    _assert_equal(again.state_dict(), weighting.state_dict())
    assert torch.equal(again(_positive(4)), weighting(_positive(4)))


@family
def test_resolve_starts_anew(name: str) -> None:
    weighting, fresh = FAMILY[name](), resolved(FAMILY[name]())
    if name == "Scalarized":
        weighting = Scalarized()
        fresh = resolved(Scalarized())
    resolved(weighting)
    _learn(weighting)
    resolved(weighting)
    _assert_equal(weighting.state_dict(), fresh.state_dict())


@family
def test_buffers_stay_exact_in_half_precision(name: str) -> None:
    weighting = resolved(FAMILY[name]())
    _learn(weighting)
    before = {key: value.clone() for key, value in weighting.named_buffers() if not key.startswith("scalarization")}
    after = dict(weighting.to(torch.bfloat16).named_buffers())
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True)


@family
def test_learns_the_same_in_float32(name: str) -> None:
    weighting = resolved(FAMILY[name]())
    _learn(weighting)
    losses = _positive(4)
    torch.testing.assert_close(weighting(losses.float()).double(), weighting(losses), rtol=1e-5, atol=1e-5)


@family
def test_losses_of_zero_have_finite_slopes(name: str) -> None:
    slopes = resolved(FAMILY[name]()).slopes(torch.tensor([0.0, 1.0, 2.0, 0.0]))
    assert slopes.isfinite().all()


@family
def test_is_of_no_use_before_it_has_names(name: str) -> None:
    with pytest.raises(RuntimeError, match="`resolve` should be called"):
        FAMILY[name]()(torch.ones(4))


@family
@pytest.mark.parametrize(
    ("losses", "tasks", "match"),
    [
        (torch.ones(3), None, r"should have shape \(4,\).*\(3,\)"),
        (torch.ones(2, 4), None, r"\(2, 4\)"),
        (torch.ones(2), [0, 0], "different tasks below 4"),
        (torch.ones(2), [0, 4], "different tasks below 4"),
        (torch.ones(2), [0, -1], "different tasks below 4"),
        (torch.ones(2), [0], r"shape \(1,\)"),
        (torch.ones(0), [], "shape"),
    ],
    ids=str,
)
def test_refuses_losses_that_do_not_fit(name: str, losses: Tensor, tasks: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        resolved(FAMILY[name]())(losses, tasks)


def test_refuses_to_have_no_tasks() -> None:
    with pytest.raises(ValueError, match="at least one name"):
        Equal().resolve([])


# ---------------------------------------------------------------------------------------------- formulas of the members


def _reference_smooth(f: Sequence[float]) -> float:
    return 0.1 * math.log(math.fsum(math.exp(loss / 4 / 0.1) for loss in f))


@pytest.mark.parametrize(
    ("weighting", "reference"),
    [
        (Equal(), math.fsum),
        (Fixed([1.0, 0.0, 2.0, 0.5]), lambda f: f[0] + 2 * f[2] + 0.5 * f[3]),
        (Fixed({"c": 2.0}), lambda f: f[0] + f[1] + 2 * f[2] + f[3]),
        (ScaleInvariant(), lambda f: math.fsum(map(math.log, f))),
        (GeometricMean(), lambda f: math.prod(f) ** 0.25),
        (Uncertainty(initial=0.3), lambda f: sum(x / (2 * math.exp(0.3)) + 0.15 for x in f)),
        (IMTLLoss(initial=0.3), lambda f: sum(math.exp(0.3) * x - 0.3 for x in f)),
        (Scalarized(), _reference_smooth),
        (Scalarized(Chebyshev(), [1.0, 1.0, 0.0, 2.0]), lambda f: max(f[0] / 4, f[1] / 4, f[3] / 2)),
    ],
)
def test_equals_its_formula(weighting: LossWeighting, reference: Callable[[Sequence[float]], float]) -> None:
    losses = _positive(4)
    resolved(weighting)
    assert float(weighting(losses).detach()) == pytest.approx(reference(losses.tolist()), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e30])
def test_the_geometric_mean_of_many_losses_neither_vanishes_nor_overflows(scale: float) -> None:
    weighting = resolved(GeometricMean(), [str(index) for index in range(40)])
    assert float(weighting(torch.full((40,), scale))) == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize(
    ("weighting", "optimum", "weighted"),
    [(Uncertainty(), lambda f: f.log(), 0.5), (IMTLLoss(), lambda f: -f.log(), 1.0)],
    ids=["Uncertainty", "IMTLLoss"],
)
def test_learned_weights_reach_their_optimum(
    weighting: LossWeighting, optimum: Callable[[Tensor], Tensor], weighted: float
) -> None:
    losses = torch.tensor([0.1, 1.0, 5.0, 20.0])
    resolved(weighting)
    optimizer = torch.optim.LBFGS(weighting.parameters(), lr=0.5, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        objective: Tensor = weighting(losses)
        objective.backward()  # type: ignore[no-untyped-call]
        return objective

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    (found,) = weighting.parameters()
    torch.testing.assert_close(found.detach(), optimum(losses), rtol=0, atol=1e-3)
    torch.testing.assert_close(weighting.slopes(losses) * losses, torch.full((4,), weighted), rtol=0, atol=1e-3)


def _reference_dwa(epochs: Sequence[Sequence[Sequence[float]]], temperature: float) -> list[float]:
    """``w_k = K exp(r_k / T) / sum_i exp(r_i / T)``, with ``r_k = L_k(t - 1) / L_k(t - 2)``."""
    means = [[math.fsum(column) / len(epoch) for column in zip(*epoch, strict=True)] for epoch in epochs]
    if len(means) < 2:
        return [1.0] * len(epochs[0][0])
    rates = [last / before for last, before in zip(means[-1], means[-2], strict=True)]
    exponentials = [math.exp(rate / temperature) for rate in rates]
    return [len(rates) * value / math.fsum(exponentials) for value in exponentials]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("num_epochs", [1, 2, 3])
def test_dwa_goes_by_the_fall_of_the_mean_losses(num_epochs: int, temperature: float) -> None:
    weighting = resolved(DynamicWeightAverage(temperature))
    epochs = [_positive(5, 4, seed=epoch) for epoch in range(num_epochs)]
    for epoch in epochs:
        for losses in epoch:
            weighting.observe(losses)
        weighting.end_epoch()
    expected = _reference_dwa([epoch.tolist() for epoch in epochs], temperature)
    torch.testing.assert_close(weighting.slopes(torch.ones(4, dtype=torch.float64)).tolist(), expected)


def test_dwa_counts_a_task_as_steady_that_had_no_loss_in_an_epoch() -> None:
    weighting = resolved(DynamicWeightAverage(), ["a", "b"])
    for losses, tasks in (([1.0, 1.0], [0, 1]), ([0.5], [0]), ([0.25, 3.0], [0, 1])):
        weighting.observe(torch.tensor(losses), tasks)
        weighting.end_epoch()
    expected = 2 * torch.tensor([0.5, 1.0]).div(2).softmax(dim=0)
    torch.testing.assert_close(weighting.slopes(torch.ones(2)), expected)


def test_random_weights_are_the_softmax_of_normal_numbers() -> None:
    weighting, rows = resolved(RandomWeights()), []
    for _ in range(4000):
        rows.append(weighting.slopes(torch.ones(4, dtype=torch.float64)))
        weighting.observe(torch.ones(4))
    found = torch.stack(rows)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4000, dtype=torch.float64))
    centred = found.log() - found.log().mean(dim=1, keepdim=True)  # normal numbers less their mean
    covariance = torch.eye(4, dtype=torch.float64) - 0.25
    torch.testing.assert_close(centred.mean(dim=0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=0.06)
    torch.testing.assert_close(centred.T.cov(), covariance, rtol=0, atol=0.08)
    torch.testing.assert_close(centred.pow(4).mean(dim=0), torch.full((4,), 3 * 0.75**2).double(), rtol=0.15, atol=0)


def test_random_weights_repeat_with_the_seed() -> None:
    same, again, other = (resolved(RandomWeights(seed)) for seed in (3, 3, 4))
    for weighting in (same, again, other):
        _learn(weighting, steps=3)
    losses = _positive(4)
    assert torch.equal(same.slopes(losses), again.slopes(losses))
    assert not torch.equal(same.slopes(losses), other.slopes(losses))


def test_scalarized_tracks_the_ideal_point() -> None:
    ideal = TrackedIdeal(4)
    weighting = resolved(Scalarized(SmoothChebyshev(ideal=ideal)))
    weighting.observe(torch.tensor([3.0, 1.0]), [0, 2])
    assert ideal().tolist() == [3.0, 0.0, 1.0, 0.0]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Fixed([1.0, -1.0]), "`weights` should be finite and not negative. Found -1"),
        (lambda: Fixed({"a": math.nan}), "`weights` should be finite"),
        (lambda: DynamicWeightAverage(0.0), "`temperature` should be positive"),
        (lambda: Scalarized(preference=[math.inf]), "`preference` should be finite"),
        (lambda: resolved(Fixed({"e": 1.0})), "`weights` should name tasks, 'a', 'b', 'c', 'd'. Found 'e'"),
        (lambda: resolved(Fixed([1.0, 1.0])), "`weights` should have one entry per task, 4. Found 2"),
        (lambda: resolved(Scalarized(preference=[0.0] * 4)), "positive entry"),
    ],
)
def test_refuses_numbers(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_refuses_another_kind_of_scalarization() -> None:
    wrong: Any = "chebyshev"
    with pytest.raises(TypeError, match="`scalarization`"):
        Scalarized(wrong)
