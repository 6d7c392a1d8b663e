import math
from collections.abc import Callable

import moocore
import pytest
import torch
from torch import Tensor

from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.problems import DTLZ2, VLMOP1, Fonseca, MeanPrediction, Problem
from mtl_lightning.scalarization import Chebyshev, Linear

PROBLEMS = [
    pytest.param(Fonseca(5), id="Fonseca"),
    pytest.param(Fonseca(1), id="Fonseca-one-variable"),
    pytest.param(VLMOP1(4), id="VLMOP1"),
    pytest.param(DTLZ2(5), id="DTLZ2"),
]
TWO_OBJECTIVES = PROBLEMS[:3]
problems = pytest.mark.parametrize("problem", PROBLEMS)


# Formulas, rewritten plainly.


def _reference_fonseca(x: list[float]) -> list[float]:
    anchor = 1 / math.sqrt(len(x))
    return [1 - math.exp(-sum((xi - sign * anchor) ** 2 for xi in x)) for sign in (1, -1)]


def _reference_vlmop1(x: list[float]) -> list[float]:
    return [sum((xi - target) ** 2 for xi in x) / len(x) for target in (0, 2)]


def _reference_dtlz2(x: list[float]) -> list[float]:
    z = [math.sin(math.pi * xi / 2) ** 2 for xi in x]
    g = sum((zi - 0.5) ** 2 for zi in z[2:])
    f1 = (1 + g) * math.cos(z[0] * math.pi / 2) * math.cos(z[1] * math.pi / 2)
    f2 = (1 + g) * math.cos(z[0] * math.pi / 2) * math.sin(z[1] * math.pi / 2)
    return [f1, f2, (1 + g) * math.sin(z[0] * math.pi / 2)]


@pytest.mark.parametrize(
    ("problem", "reference"),
    [(Fonseca(5), _reference_fonseca), (VLMOP1(4), _reference_vlmop1), (DTLZ2(5), _reference_dtlz2)],
)
def test_objectives_equal_their_formula(problem: Problem, reference: Callable[[list[float]], list[float]]) -> None:
    x = torch.rand(20, len(problem.x), dtype=torch.float64) * 3 - 1.5
    expected = torch.tensor([reference(row) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(problem.objectives(x), expected)


@problems
def test_objectives_of_a_batch_equal_a_loop(problem: Problem) -> None:
    x = torch.rand(2, 3, len(problem.x))
    loop = torch.stack([torch.stack([problem.objectives(row) for row in rows]) for rows in x])
    torch.testing.assert_close(problem.objectives(x), loop)


# The front.


@problems
def test_front_has_the_points_asked_for(problem: Problem) -> None:
    assert problem.front(17).shape == (17, len(problem.task_names))


@problems
def test_front_points_do_not_dominate_each_other(problem: Problem) -> None:
    assert moocore.is_nondominated(problem.front(300).numpy()).all()


@problems
def test_no_variables_dominate_the_front(problem: Problem) -> None:
    front = problem.front(200)
    values = problem.objectives(torch.rand(2000, len(problem.x)) * 4 - 2)
    dominates = (values[:, None] < front[None] - 1e-6).all(dim=-1)
    assert not bool(dominates.any())


def test_fonseca_front_satisfies_its_equation() -> None:
    f1, f2 = Fonseca(3).front(50).double().unbind(dim=-1)
    # With x = u a, f1 gives 1 - u and f2 gives 1 + u.
    roots = (-torch.log1p(-f1)).sqrt() + (-torch.log1p(-f2)).sqrt()
    torch.testing.assert_close(roots, torch.full((50,), 2.0, dtype=torch.float64), rtol=1e-4, atol=0)


def test_vlmop1_front_satisfies_its_equation() -> None:
    torch.testing.assert_close(VLMOP1(3).front(50).sqrt().sum(dim=-1), torch.full((50,), 2.0))


def test_dtlz2_front_satisfies_its_equation() -> None:
    front = DTLZ2(4).front(50)
    torch.testing.assert_close(front.square().sum(dim=-1), torch.ones(50))


def test_dtlz2_front_is_in_the_positive_octant() -> None:
    assert bool((DTLZ2(4).front(50) >= 0).all())


def test_dtlz2_reaches_the_corners_of_its_front() -> None:
    corners = torch.tensor([[0.0, 0.0, 0.5], [0.0, 1.0, 0.5], [1.0, 0.0, 0.5]])
    torch.testing.assert_close(DTLZ2(3).objectives(corners), torch.eye(3), rtol=0, atol=1e-6)


def test_dtlz2_stays_in_its_box() -> None:
    values = DTLZ2(5).objectives(torch.randn(500, 5) * 10)
    radius = torch.linalg.vector_norm(values, dim=-1)
    assert bool(((values > -1e-6).all(dim=-1) & (radius <= 1 + 3 * 0.25 + 1e-6)).all())


@pytest.mark.parametrize("problem", TWO_OBJECTIVES)
def test_hypervolume_is_that_of_the_front(problem: Problem) -> None:
    front = problem.front(20_000).double().numpy()
    assert moocore.hypervolume(front, ref=problem.reference_point) == pytest.approx(problem.hypervolume, abs=1e-3)


def test_dtlz2_hypervolume_is_that_of_the_front() -> None:
    # The gap of N points shrinks as N^-1/2, so that twice as fine a front halves it.
    problem = DTLZ2(3)
    coarse, fine = (
        moocore.hypervolume(problem.front(size).double().numpy(), ref=problem.reference_point)
        for size in (10_000, 40_000)
    )
    assert 2 * fine - coarse == pytest.approx(problem.hypervolume, abs=1e-3)


def test_the_ends_of_fonsecas_front_have_a_small_hypervolume() -> None:
    problem = Fonseca()
    ends = problem.front(2).double().numpy()
    assert moocore.hypervolume(ends, ref=problem.reference_point) == pytest.approx(0.0363, abs=1e-4)


# What the scalarisations find, against a search along the front.


@pytest.mark.parametrize("problem", [Fonseca(), VLMOP1()])
def test_chebyshev_front_is_best_on_the_front(problem: Fonseca | VLMOP1) -> None:
    preferences = simplex_lattice(2, 10)
    best = Chebyshev()(problem.front(20_001), preferences[:, None]).amin(dim=-1)
    found = Chebyshev()(problem.chebyshev_front(preferences), preferences)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-3)


@pytest.mark.parametrize("problem", [Fonseca(), VLMOP1()])
def test_chebyshev_front_equalises_the_weighted_objectives(problem: Fonseca | VLMOP1) -> None:
    preferences = simplex_lattice(2, 10)[1:-1]
    weighted = preferences * problem.chebyshev_front(preferences)
    torch.testing.assert_close(weighted[:, 0], weighted[:, 1])


def test_linear_front_is_best_on_the_front() -> None:
    problem, preferences = VLMOP1(), simplex_lattice(2, 10)
    best = Linear()(problem.front(20_001), preferences[:, None]).amin(dim=-1)
    torch.testing.assert_close(Linear()(problem.linear_front(preferences), preferences), best, rtol=0, atol=1e-5)


# As a network.


@problems
def test_predicts_every_objective_for_every_input(problem: Problem) -> None:
    predictions = problem(torch.randn(7, 2))
    expected = problem.objectives(problem.x)
    assert {name: prediction.tolist() for name, prediction in predictions.items()} == {
        name: [value] * 7 for name, value in zip(problem.task_names, expected.tolist(), strict=True)
    }


@problems
def test_losses_of_its_tasks_are_the_objectives(problem: Problem) -> None:
    predictions = problem(torch.zeros(4, 1))
    losses = torch.stack([task.loss(predictions[task.name], torch.randn(4)) for task in problem.tasks()])
    torch.testing.assert_close(losses, problem.objectives(problem.x))


@problems
def test_tasks_are_named_like_the_outputs(problem: Problem) -> None:
    assert [task.name for task in problem.tasks()] == list(problem(torch.zeros(1)))


@problems
def test_stacked_problems_equal_a_loop(problem: Problem) -> None:
    x, inputs = torch.rand(3, len(problem.x)), torch.zeros(2, 1)

    def losses(x: Tensor) -> Tensor:
        outputs = torch.func.functional_call(problem, {"x": x}, (inputs,))
        return torch.stack([task.loss(outputs[task.name], inputs) for task in problem.tasks()])

    torch.testing.assert_close(torch.vmap(losses)(x), torch.stack([losses(row) for row in x]))


@problems
def test_stacked_gradients_equal_a_loop(problem: Problem) -> None:
    x = torch.rand(3, len(problem.x))

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: problem.objectives(x).square().sum())(x)

    torch.testing.assert_close(torch.vmap(gradient)(x), torch.stack([gradient(row) for row in x]))


@pytest.mark.parametrize(("make", "low", "high"), [(Fonseca, -0.5, 0.5), (VLMOP1, -2.0, 4.0), (DTLZ2, 0.0, 1.0)])
def test_start_is_uniform_on_its_range(make: Callable[[int], Problem], low: float, high: float) -> None:
    x = make(5000).x.detach()
    torch.testing.assert_close(
        torch.stack([x.min(), x.max()]), torch.tensor([low, high]), rtol=0, atol=0.01 * (high - low)
    )


@problems
def test_reset_follows_the_global_seed(problem: Problem) -> None:
    torch.manual_seed(1)
    problem.reset_parameters()
    first = problem.x.detach().clone()
    torch.manual_seed(1)
    problem.reset_parameters()
    assert torch.equal(problem.x, first)


@problems
def test_reset_draws_anew(problem: Problem) -> None:
    before = problem.x.detach().clone()
    problem.reset_parameters()
    assert not torch.equal(problem.x, before)


@pytest.mark.parametrize(("make", "least"), [(Fonseca, 1), (VLMOP1, 1), (DTLZ2, 3)])
def test_refuses_too_few_variables(make: Callable[[int], Problem], least: int) -> None:
    with pytest.raises(ValueError, match=f"`num_variables` should be at least {least}. Found {least - 1}"):
        make(least - 1)


def test_mean_prediction_ignores_the_target() -> None:
    assert MeanPrediction()(torch.tensor([1.0, 3.0]), torch.tensor(math.nan)) == 2.0
