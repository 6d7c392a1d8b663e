import io
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mtl_lightning.preferences import simplex_lattice, simplex_sample
from mtl_lightning.problems import VLMOP1, Fonseca, Problem
from mtl_lightning.scalarization import (
    PBI,
    AugmentedChebyshev,
    Chebyshev,
    Linear,
    Scalarization,
    SmoothChebyshev,
    TrackedIdeal,
)

IDEAL = (0.1, -0.2, 0.05)
FAMILY = [
    pytest.param(Linear(), id="Linear"),
    pytest.param(Chebyshev(), id="Chebyshev"),
    pytest.param(Chebyshev(ideal=IDEAL), id="Chebyshev-ideal"),
    pytest.param(AugmentedChebyshev(rho=0.1), id="AugmentedChebyshev"),
    pytest.param(AugmentedChebyshev(rho=0.1, ideal=IDEAL), id="AugmentedChebyshev-ideal"),
    pytest.param(SmoothChebyshev(mu=0.1), id="SmoothChebyshev"),
    pytest.param(SmoothChebyshev(mu=1e-30), id="SmoothChebyshev-tiny"),
    pytest.param(SmoothChebyshev(mu=0.1, ideal=IDEAL), id="SmoothChebyshev-ideal"),
    pytest.param(PBI(), id="PBI"),
    pytest.param(PBI(theta=0.5, ideal=IDEAL), id="PBI-ideal"),
]
MONOTONE = [param for param in FAMILY if not param.id.startswith("PBI")]  # type: ignore[union-attr]
# Members that treat all tasks alike, whatever their order.
SYMMETRIC = [param for param in FAMILY if not param.id.endswith("ideal")]  # type: ignore[union-attr]
family = pytest.mark.parametrize("scalarization", FAMILY)


def _inputs(num_rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    losses = torch.rand(num_rows, 3, dtype=torch.float64).mul(2).to(dtype)
    return losses, simplex_sample(3, num_rows).to(dtype)


# Formulas, rewritten plainly.


def _reference_linear(f: Sequence[float], w: Sequence[float]) -> float:
    return math.fsum(wi * fi for fi, wi in zip(f, w, strict=True))


def _reference_chebyshev(f: Sequence[float], w: Sequence[float]) -> float:
    return max(wi * fi for fi, wi in zip(f, w, strict=True))


def _reference_augmented(f: Sequence[float], w: Sequence[float]) -> float:
    return _reference_chebyshev(f, w) + 0.1 * math.fsum(f)


def _reference_smooth(f: Sequence[float], w: Sequence[float]) -> float:
    top = _reference_chebyshev(f, w)
    total = math.fsum(math.exp((wi * fi - top) / 0.1) for fi, wi in zip(f, w, strict=True))
    return top + 0.1 * math.log(total)


def _reference_pbi(f: Sequence[float], w: Sequence[float]) -> float:
    norm = math.hypot(*w)
    d1 = math.fsum(fi * wi for fi, wi in zip(f, w, strict=True)) / norm
    d2 = math.hypot(*(fi - d1 * wi / norm for fi, wi in zip(f, w, strict=True)))
    return d1 + 5.0 * d2


FORMULAS = [
    pytest.param(Linear(), _reference_linear, id="Linear"),
    pytest.param(Chebyshev(), _reference_chebyshev, id="Chebyshev"),
    pytest.param(AugmentedChebyshev(rho=0.1), _reference_augmented, id="AugmentedChebyshev"),
    pytest.param(SmoothChebyshev(mu=0.1), _reference_smooth, id="SmoothChebyshev"),
    pytest.param(PBI(), _reference_pbi, id="PBI"),
]
Reference = Callable[[Sequence[float], Sequence[float]], float]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 1e3, 1e30])
@pytest.mark.parametrize(("scalarization", "reference"), FORMULAS)
def test_equals_its_formula(scalarization: Scalarization, reference: Reference, scale: float) -> None:
    losses, preferences = _inputs()
    losses = losses * scale
    expected = [reference(f, w) for f, w in zip(losses.tolist(), preferences.tolist(), strict=True)]
    torch.testing.assert_close(scalarization(losses, preferences), torch.tensor(expected), rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize(("scalarization", "reference"), FORMULAS)
def test_equals_its_formula_at_the_corners(scalarization: Scalarization, reference: Reference) -> None:
    losses, corners = _inputs(3)[0], torch.eye(3)
    expected = [reference(f, w) for f, w in zip(losses.tolist(), corners.tolist(), strict=True)]
    torch.testing.assert_close(scalarization(losses, corners), torch.tensor(expected))


@pytest.mark.parametrize("make", [Chebyshev, AugmentedChebyshev, SmoothChebyshev, PBI])
def test_measures_from_the_ideal_point(make: Callable[..., Scalarization]) -> None:
    losses, preferences = _inputs()
    shifted = make()(losses - torch.tensor(IDEAL), preferences)
    torch.testing.assert_close(make(ideal=IDEAL)(losses, preferences), shifted)


# What all members owe.


@family
def test_gives_one_objective_per_row(scalarization: Scalarization) -> None:
    assert scalarization(torch.rand(4, 5, 3), simplex_sample(3, 5)).shape == (4, 5)


@family
def test_batch_equals_loop(scalarization: Scalarization) -> None:
    losses, preferences = _inputs()
    loop = torch.stack([scalarization(f, w) for f, w in zip(losses, preferences, strict=True)])
    torch.testing.assert_close(scalarization(losses, preferences), loop)


@family
def test_vmap_equals_batch(scalarization: Scalarization) -> None:
    losses, preferences = _inputs()
    torch.testing.assert_close(torch.vmap(scalarization)(losses, preferences), scalarization(losses, preferences))


@family
def test_gradient_under_vmap_equals_loop(scalarization: Scalarization) -> None:
    losses, preferences = _inputs()
    gradient = torch.func.grad(scalarization)
    loop = torch.stack([gradient(f, w) for f, w in zip(losses, preferences, strict=True)])
    torch.testing.assert_close(torch.vmap(gradient)(losses, preferences), loop)


@pytest.mark.parametrize("scalarization", SYMMETRIC)
def test_is_invariant_to_the_order_of_tasks(scalarization: Scalarization) -> None:
    losses, preferences = _inputs()
    order = [2, 0, 1]
    torch.testing.assert_close(
        scalarization(losses[:, order], preferences[:, order]), scalarization(losses, preferences)
    )


@pytest.mark.parametrize("scalarization", SYMMETRIC)
def test_gradient_at_a_tie_treats_tasks_alike(scalarization: Scalarization) -> None:
    (gradient,) = torch.autograd.grad(scalarization(losses := _tie(), torch.full((3,), 1 / 3)), losses)
    torch.testing.assert_close(gradient, gradient.mean().expand(3))


def _tie() -> Tensor:
    return torch.full((3,), 2.0, requires_grad=True)


@pytest.mark.parametrize("scalarization", MONOTONE)
def test_a_lower_loss_never_raises_it(scalarization: Scalarization) -> None:
    losses, preferences = torch.randn(200, 3), simplex_lattice(3, 4).repeat(14, 1)[:200]
    task = torch.arange(200) % 3
    lower = losses - torch.rand(200, 1) * torch.nn.functional.one_hot(task, 3)
    assert bool((scalarization(lower, preferences) <= scalarization(losses, preferences) + 1e-6).all())


@family
def test_gradient_equals_finite_differences(scalarization: Scalarization) -> None:
    if isinstance(scalarization, SmoothChebyshev) and scalarization.mu < 1e-6:
        scalarization = SmoothChebyshev(mu=1e-3)
    losses, preferences = _inputs(dtype=torch.float64)
    losses.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: scalarization(f, preferences), (losses,), eps=1e-7)


@family
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("preference", [(1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.2, 0.3, 0.5)])
def test_gradient_is_finite(scalarization: Scalarization, scale: float, preference: Sequence[float]) -> None:
    losses = (torch.tensor([0.2, 0.3, 0.5]) * scale).requires_grad_()
    (gradient,) = torch.autograd.grad(scalarization(losses, torch.tensor(preference)), losses)
    assert bool(gradient.isfinite().all())


@family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_keeps_the_dtype(scalarization: Scalarization, dtype: torch.dtype) -> None:
    assert scalarization(*_inputs(dtype=dtype)).dtype == dtype


@family
def test_keeps_the_device(scalarization: Scalarization) -> None:
    losses, preferences = _inputs()
    assert scalarization(losses.to("meta"), preferences.to("meta")).device.type == "meta"


@family
def test_missing_tasks_take_no_part(scalarization: Scalarization) -> None:
    losses, preferences = _inputs()
    columns = [2, 0]
    ideal = getattr(scalarization, "ideal", None)
    alone = type(scalarization)(**_options(scalarization), **({} if ideal is None else {"ideal": ideal[columns]}))
    torch.testing.assert_close(
        scalarization(losses[:, columns], preferences[:, columns], columns),
        alone(losses[:, columns], preferences[:, columns]),
    )


def _options(scalarization: Scalarization) -> dict[str, float]:
    return {name: getattr(scalarization, name) for name in ("rho", "mu", "theta") if hasattr(scalarization, name)}


@family
def test_one_task_alone_works(scalarization: Scalarization) -> None:
    losses, preferences = _inputs()
    assert bool(scalarization(losses[:, :1], preferences[:, :1], [0]).isfinite().all())


@family
def test_refuses_columns_that_disagree(scalarization: Scalarization) -> None:
    with pytest.raises(ValueError, match=r"both have shape \(..., T\).*\(6, 3\) and \(6, 2\)"):
        scalarization(torch.rand(6, 3), torch.rand(6, 2))


@family
def test_refuses_columns_that_disagree_with_tasks(scalarization: Scalarization) -> None:
    with pytest.raises(ValueError, match=r"each of the 1 `tasks`. Found shape \(6, 2\)"):
        scalarization(torch.rand(6, 2), torch.rand(6, 2), [1])


@family
def test_refuses_a_batch_without_tasks(scalarization: Scalarization) -> None:
    with pytest.raises(ValueError, match="at least one column"):
        scalarization(torch.rand(6, 0), torch.rand(6, 0), [])


# Smooth Chebyshev.


@pytest.mark.parametrize("mu", [1e-6, 1e-2, 1.0, 100.0])
def test_smooth_chebyshev_lies_within_its_bound(mu: float) -> None:
    losses, preferences = _inputs(100, torch.float64)
    excess = SmoothChebyshev(mu)(losses, preferences) - Chebyshev()(losses, preferences)
    assert bool(((excess >= 0) & (excess <= mu * math.log(3) * (1 + 1e-9))).all())


def test_smooth_chebyshev_reaches_its_bound_at_a_tie() -> None:
    value = SmoothChebyshev(mu=0.5)(torch.full((4,), 2.0), torch.full((4,), 0.25))
    torch.testing.assert_close(value, torch.tensor(0.5 + 0.5 * math.log(4)))


def test_smooth_chebyshev_tends_to_chebyshev() -> None:
    losses, preferences = _inputs()
    torch.testing.assert_close(SmoothChebyshev(mu=1e-30)(losses, preferences), Chebyshev()(losses, preferences))


def test_smooth_chebyshev_gradient_is_the_weighted_softmax() -> None:
    losses, preferences = _inputs()
    (gradient,) = torch.autograd.grad(SmoothChebyshev(mu=0.3)(losses.requires_grad_(), preferences).sum(), losses)
    torch.testing.assert_close(gradient, preferences * (preferences * losses / 0.3).softmax(dim=-1))


# PBI.


def test_pbi_on_the_ray_is_the_distance_along_it() -> None:
    preferences = simplex_sample(3, 5)
    values = PBI(theta=100.0)(2 * preferences, preferences)
    torch.testing.assert_close(values, 2 * torch.linalg.vector_norm(preferences, dim=-1), rtol=1e-4, atol=0)


def test_pbi_without_penalty_is_linear_in_unit_weights() -> None:
    losses, preferences = _inputs()
    unit = preferences / torch.linalg.vector_norm(preferences, dim=-1, keepdim=True)
    torch.testing.assert_close(PBI(theta=0.0)(losses, preferences), Linear()(losses, unit))


def test_pbi_gradient_exactly_on_the_ray_is_the_ray() -> None:
    losses = torch.tensor([2.0, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(PBI()(losses, torch.tensor([1.0, 0.0])), losses)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 0.0]))


def test_pbi_of_tasks_of_weight_zero_is_the_penalty_alone() -> None:
    value = PBI(theta=2.0)(torch.tensor([3.0, 4.0]), torch.zeros(2), tasks=[1, 2])
    torch.testing.assert_close(value, torch.tensor(10.0))


def test_pbi_may_rise_when_a_loss_falls() -> None:
    preference = torch.tensor([0.5, 0.5])
    assert PBI()(torch.tensor([0.0, 1.0]), preference) > PBI()(torch.tensor([0.5, 1.0]), preference)


# The ideal point.


def test_tracked_ideal_is_zero_before_the_first_observation() -> None:
    assert TrackedIdeal(3)().tolist() == [0.0, 0.0, 0.0]


def test_tracked_ideal_is_the_minimum_of_all_observations() -> None:
    ideal, observed = TrackedIdeal(3), torch.randn(5, 4, 3)
    for losses in observed:
        ideal.observe(losses)
    torch.testing.assert_close(ideal(), observed.amin(dim=(0, 1)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tracked_ideal_ignores_losses_that_are_not_finite(value: float) -> None:
    ideal = TrackedIdeal(2)
    ideal.observe(torch.tensor([[3.0, 1.0], [value, 2.0]]))
    assert ideal().tolist() == [3.0, 1.0]


def test_tracked_ideal_observes_the_given_tasks_only() -> None:
    ideal = TrackedIdeal(3)
    ideal.observe(torch.tensor([[5.0, 7.0]]), tasks=[2, 0])
    assert ideal().tolist() == [7.0, 0.0, 5.0]


def test_tracked_ideal_refuses_a_wrong_number_of_columns() -> None:
    with pytest.raises(ValueError, match=r"should have shape \(..., 3\), one column per task. Found shape \(5, 2\)"):
        TrackedIdeal(3).observe(torch.rand(5, 2))


@pytest.mark.parametrize("make", [Chebyshev, AugmentedChebyshev, SmoothChebyshev, PBI])
def test_tracked_ideal_measures_like_a_fixed_one(make: Callable[..., Scalarization]) -> None:
    losses, preferences = _inputs()
    tracking = make(ideal=TrackedIdeal(3))
    tracking.observe(torch.tensor(IDEAL))
    torch.testing.assert_close(tracking(losses, preferences), make(ideal=IDEAL)(losses, preferences))


def test_tracked_ideal_observes_during_a_step() -> None:
    scalarization, losses = Chebyshev(ideal=TrackedIdeal(2)), torch.ones(2, requires_grad=True)
    objective = scalarization(losses, torch.tensor([0.6, 0.4]))
    scalarization.observe(losses)
    objective.backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx([0.6, 0.0])


def test_tracked_ideal_keeps_no_graph() -> None:
    ideal = TrackedIdeal(2)
    ideal.observe(torch.ones(2, requires_grad=True))
    assert not ideal().requires_grad


def test_tracked_ideal_survives_a_checkpoint() -> None:
    before, after = PBI(ideal=TrackedIdeal(3)), PBI(ideal=TrackedIdeal(3))
    before.observe(torch.tensor([0.3, math.nan, -1.0]))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True))
    for scalarization in (before, after):
        scalarization.observe(torch.tensor([0.5, 0.4, -2.0]))
    losses, preferences = _inputs()
    assert torch.equal(before(losses, preferences), after(losses, preferences))


@pytest.mark.parametrize("make", [Chebyshev, AugmentedChebyshev, SmoothChebyshev, PBI])
def test_a_fixed_ideal_does_not_move(make: Callable[..., Scalarization]) -> None:
    scalarization, (losses, preferences) = make(ideal=IDEAL), _inputs()
    before = scalarization(losses, preferences)
    scalarization.observe(torch.full((3,), -10.0))
    assert torch.equal(scalarization(losses, preferences), before)


def test_a_fixed_ideal_is_a_copy() -> None:
    point = torch.zeros(3)
    scalarization = Chebyshev(ideal=point)
    point += 1
    assert scalarization(torch.ones(3), torch.ones(3) / 3) == pytest.approx(1 / 3)


@pytest.mark.parametrize("ideal", [(1.0, math.nan), torch.zeros(2, 2), (math.inf, 0.0)])
def test_refuses_an_ideal_that_is_not_a_point(ideal: Tensor | Sequence[float]) -> None:
    with pytest.raises(ValueError, match="`ideal` should hold one finite number per task"):
        Chebyshev(ideal=ideal)


@pytest.mark.parametrize("ideal", [IDEAL, TrackedIdeal(3)])
def test_refuses_losses_that_do_not_fit_the_ideal(ideal: Sequence[float] | TrackedIdeal) -> None:
    with pytest.raises(ValueError, match=r"should have shape \(..., 3\), one column per entry of `ideal`"):
        Chebyshev(ideal=ideal)(torch.rand(2), torch.rand(2))


@pytest.mark.parametrize("tasks", [[0, 3], [1, 1], [-1, 0]])
def test_refuses_tasks_that_the_ideal_does_not_know(tasks: list[int]) -> None:
    with pytest.raises(ValueError, match="`tasks` should be different indices below 3"):
        Chebyshev(ideal=IDEAL)(torch.rand(2), torch.rand(2), tasks)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(("make", "name"), [(AugmentedChebyshev, "rho"), (SmoothChebyshev, "mu")])
def test_refuses_a_factor_that_is_not_positive(make: Callable[[float], Scalarization], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` should be positive and finite"):
        make(value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_pbi_refuses_a_negative_penalty(value: float) -> None:
    with pytest.raises(ValueError, match="`theta` should be finite and not negative"):
        PBI(value)


# Each finds the optimum of its own theory, by gradient descent on all preferences at once.

INTERIOR = torch.tensor([[0.2, 0.8], [0.35, 0.65], [0.5, 0.5], [0.7, 0.3]])


def _descend(problem: Problem, scalarization: Scalarization, start: Tensor, num_steps: int = 2000) -> Tensor:
    """Return the variables after Adam with a step that falls linearly to zero, shape ``(P, n)``."""
    x = start.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=num_steps)
    for _ in range(num_steps):
        adam.zero_grad()
        scalarization(problem.objectives(x), INTERIOR).sum().backward()
        adam.step()
        decay.step()
    return x.detach()


def _start(size: int = 4) -> Tensor:
    return torch.rand(4, size) - 0.5


def test_linear_finds_its_optimum_on_a_convex_front() -> None:
    found = _descend(VLMOP1(3), Linear(), _start(3))
    torch.testing.assert_close(found, 2 * INTERIOR[:, 1:].expand(4, 3), rtol=0, atol=1e-3)


def test_linear_runs_to_an_end_of_a_concave_front() -> None:
    problem = Fonseca(4)
    values = problem.objectives(_descend(problem, Linear(), _start()))
    assert bool((values.amin(dim=-1) < 0.02).all())


@pytest.mark.parametrize("scalarization", [Chebyshev(), SmoothChebyshev(mu=1e-3), AugmentedChebyshev(rho=1e-4)])
@pytest.mark.parametrize("problem", [Fonseca(4), VLMOP1(4)])
def test_chebyshev_finds_the_weighted_tie_on_the_front(problem: Fonseca | VLMOP1, scalarization: Scalarization) -> None:
    values = problem.objectives(_descend(problem, scalarization, _start()))
    torch.testing.assert_close(values, problem.chebyshev_front(INTERIOR), rtol=0, atol=0.02)


def test_pbi_finds_the_point_where_its_ray_meets_the_front() -> None:
    problem = Fonseca(4)
    values = problem.objectives(_descend(problem, PBI(), _start()))
    # On the ray of w the losses are proportional to w, which is where Chebyshev with the weights exchanged has its tie.
    torch.testing.assert_close(values, problem.chebyshev_front(INTERIOR.flip(-1)), rtol=0, atol=0.02)


def test_augmented_chebyshev_prefers_the_better_of_two_ties() -> None:
    losses = torch.tensor([[1.0, 0.2], [1.0, 0.9]])
    better, worse = AugmentedChebyshev(rho=1e-3)(losses, torch.tensor([0.5, 0.5]))
    assert better < worse
