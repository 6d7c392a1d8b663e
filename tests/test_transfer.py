import copy
import inspect
import io
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lightning import transfer
from mtl_lightning.preferences import simplex_lattice, simplex_sample
from mtl_lightning.scalarization import PBI, AugmentedChebyshev, Chebyshev, Linear, Scalarization, SmoothChebyshev
from mtl_lightning.transfer import (
    AdvantageTransfer,
    DistanceTransfer,
    NeighborTransfer,
    NoTransfer,
    ProportionalTransfer,
    TransferContext,
    TransferRule,
    check_matrix,
)


def _rules() -> list[type[TransferRule]]:
    """Return the concrete rules that can be constructed without arguments."""
    classes = [value for value in vars(transfer).values() if inspect.isclass(value) and issubclass(value, TransferRule)]
    return [
        rule
        for rule in classes
        if rule is not TransferRule
        # `nn.Module` without a constructor of its own takes `*args` and `**kwargs`.
        and all(
            p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            for p in inspect.signature(rule).parameters.values()
        )
    ]


rules = pytest.mark.parametrize("rule_type", _rules(), ids=lambda rule: rule.__name__)
# The default arguments, and those that leave nothing to a subproblem itself.
variants = pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(rule, id=rule.__name__) for rule in _rules()),
        pytest.param(lambda: NeighborTransfer(strength=1.0, decay=1.0, num_neighbors=3), id="NeighborTransfer-all"),
        pytest.param(lambda: ProportionalTransfer(rate=1e6, num_neighbors=3), id="ProportionalTransfer-all"),
        pytest.param(lambda: DistanceTransfer(cap=1.0, decay=1.0, floor=0.0), id="DistanceTransfer-all"),
        pytest.param(lambda: AdvantageTransfer(strength=1.0, sensitivity=1e-6), id="AdvantageTransfer-all"),
        pytest.param(lambda: AdvantageTransfer(smoothing=0.0), id="AdvantageTransfer-rough"),
    ],
)


def _magnitude(rng: random.Random, exponent: float) -> float:
    return 10.0 ** rng.uniform(-exponent, exponent)


def _run(rng: random.Random, calls: int = 4, huge: bool = True) -> list[TransferContext]:
    """Return random states that could follow each other in one run."""
    size, num_tasks = rng.randint(1, 8), rng.randint(2, 4)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    preferences = simplex_sample(num_tasks, size, generator=generator)
    if rng.random() < 0.3:
        preferences = preferences[torch.randint(size, (size,), generator=generator)]
    scalarization = rng.choice([Linear(), Chebyshev(), SmoothChebyshev(), AugmentedChebyshev(), PBI()])
    scale, step_size = _magnitude(rng, 6), _magnitude(rng, 6)
    parameters = scale * torch.randn(size, 5, generator=generator)
    if rng.random() < 0.3:
        parameters = parameters[:1].repeat(size, 1)
    contexts = []
    for call in range(calls):
        parameters = parameters + step_size * torch.randn(size, 5, generator=generator)
        losses = torch.rand(size, num_tasks, generator=generator) * _magnitude(rng, 20)
        losses = losses * 10.0 ** (rng.choice([0, 6]) * torch.rand(size, num_tasks, generator=generator))
        if rng.random() < 0.4:
            losses[torch.rand(size, num_tasks, generator=generator) < 0.4] = 0.0
        if rng.random() < 0.2:
            losses = -losses
        seen = parameters.clone()
        if huge and rng.random() < 0.1:
            seen[rng.randrange(size)] *= 1e25 / scale  # on its way to infinity, yet finite
        tasks = tuple(sorted(rng.sample(range(num_tasks), rng.randint(1, num_tasks))))
        losses[:, [task for task in range(num_tasks) if task not in tasks]] = torch.nan
        healthy = torch.rand(size, generator=generator) > rng.choice([0.0, 0.0, 0.3, 1.0])
        for index in (~healthy).nonzero().flatten().tolist():
            sick = rng.choice([torch.nan, torch.inf, -torch.inf])
            if rng.random() < 0.5:
                losses[index, rng.choice(tasks)] = sick
            else:
                seen[index, rng.randrange(5)] = sick
        contexts.append(
            TransferContext(
                preferences=preferences,
                losses=losses,
                parameters=seen,
                step=call if rng.random() < 0.5 else rng.randrange(10**6),
                learning_rate=_magnitude(rng, 4),
                healthy=healthy,
                tasks=tasks,
                scalarization=scalarization,
            )
        )
    return contexts


def _runs(huge: bool = True) -> Iterator[list[TransferContext]]:
    """Return 1,000 random states, in 250 runs of four."""
    rng = random.Random(0)
    for _ in range(250):
        yield _run(rng, huge=huge)


def _permuted(context: TransferContext, order: Tensor, preferences: Tensor) -> TransferContext:
    return TransferContext(
        preferences=preferences,
        losses=context.losses[order],
        parameters=None if context.parameters is None else context.parameters[order],
        step=context.step,
        learning_rate=context.learning_rate,
        healthy=context.healthy[order],
        tasks=context.tasks,
        scalarization=context.scalarization,
    )


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - matrix.diag().diag()


# ------------------------------------------------------------------------------------------- owed by all rules


@variants
def test_rows_sum_to_one(make: Any) -> None:
    for contexts in _runs():
        rule = make()
        for context in contexts:
            matrix = rule(context)
            assert matrix.shape == (len(context.preferences),) * 2
            torch.testing.assert_close(matrix.sum(dim=1), torch.ones(len(matrix)), rtol=0, atol=1e-5)


@variants
def test_entries_are_finite_and_not_negative(make: Any) -> None:
    for contexts in _runs():
        rule = make()
        for context in contexts:
            matrix = rule(context)
            assert matrix.isfinite().all()
            assert matrix.min() >= 0


@variants
def test_unhealthy_subproblems_neither_give_nor_receive(make: Any) -> None:
    for contexts in _runs():
        rule = make()
        for context in contexts:
            matrix = _off_diagonal(rule(context))
            assert not matrix[~context.healthy].any()
            assert not matrix[:, ~context.healthy].any()


@variants
def test_the_order_of_the_subproblems_does_not_matter(make: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for contexts in _runs(huge=False):
        rule, permuted_rule = make(), make()
        order = torch.randperm(len(contexts[0].preferences), generator=generator)
        preferences = contexts[0].preferences[order]
        for context in contexts:
            expected = rule(context)[order][:, order]
            matrix = permuted_rule(_permuted(context, order, preferences))
            torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-5, equal_nan=True)


@variants
def test_a_single_subproblem_keeps_everything(make: Any) -> None:
    rule = make()
    for step in range(3):
        context = TransferContext.of(torch.tensor([[0.4, 0.6]]), torch.rand(1, 2), torch.randn(1, 5), step)
        assert torch.equal(rule(context), torch.ones(1, 1))


@rules
def test_state_round_trip(rule_type: type[TransferRule]) -> None:
    rng = random.Random(1)
    for _ in range(20):
        contexts = _run(rng, calls=6, huge=False)
        uninterrupted, resumed = rule_type(), rule_type()
        for context in contexts[:3]:
            uninterrupted(context)
        buffer = io.BytesIO()
        torch.save(uninterrupted.state_dict(), buffer)
        buffer.seek(0)
        resumed.load_state_dict(torch.load(buffer, weights_only=True))
        for context in contexts[3:]:
            assert torch.equal(resumed(context), uninterrupted(context))


@rules
def test_a_fresh_state_can_be_loaded(rule_type: type[TransferRule]) -> None:
    rng = random.Random(2)
    contexts = _run(rng, huge=False)
    rule, fresh = rule_type(), rule_type()
    for context in contexts:
        rule(context)
    rule.load_state_dict(rule_type().state_dict())
    for context in contexts:
        assert torch.equal(rule(context), fresh(context))


@rules
def test_a_saved_state_does_not_follow_the_rule(rule_type: type[TransferRule]) -> None:
    contexts = _run(random.Random(3), calls=6, huge=False)
    rule, other = rule_type(), rule_type()
    for context in contexts[:3]:
        rule(context)
    state = rule.state_dict()
    expected = copy.deepcopy(state)
    for context in contexts[3:]:
        rule(context)
        rule.reset([0])
    other.load_state_dict(state)
    reference = rule_type()
    reference.load_state_dict(expected)
    assert torch.equal(other(contexts[3]), reference(contexts[3]))


@rules
def test_reset_forgets_everything(rule_type: type[TransferRule]) -> None:
    rng = random.Random(4)
    for _ in range(20):
        contexts = _run(rng, calls=6, huge=False)
        rule, fresh = rule_type(), rule_type()
        for context in contexts[:3]:
            rule(context)
        rule.reset()
        for context in contexts[3:]:
            assert torch.equal(rule(context), fresh(context))


@rules
def test_a_rule_may_go_on_with_another_number_of_subproblems_after_a_reset(rule_type: type[TransferRule]) -> None:
    rule = rule_type()
    for size in (2, 5, 3):
        context = TransferContext.of(simplex_lattice(2, size - 1), torch.rand(size, 2), torch.randn(size, 4))
        rule.reset()
        for _ in range(2):
            assert rule(context).shape == (size, size)


@rules
def test_resetting_nothing_changes_nothing(rule_type: type[TransferRule]) -> None:
    contexts = _run(random.Random(5), huge=False)
    rule, other = rule_type(), rule_type()
    for context in contexts:
        rule.reset([])
        assert torch.equal(rule(context), other(context))


@rules
def test_the_inputs_are_left_alone(rule_type: type[TransferRule]) -> None:
    rng = random.Random(6)
    for _ in range(20):
        rule = rule_type()
        for context in _run(rng):
            assert context.parameters is not None
            fields = (context.preferences, context.losses, context.parameters, context.healthy)
            before = [field.clone() for field in fields]
            rule(context)
            for field, expected in zip(fields, before, strict=True):
                torch.testing.assert_close(field, expected, rtol=0, atol=0, equal_nan=True)


@rules
def test_parameters_that_require_gradients_leave_no_graph(rule_type: type[TransferRule]) -> None:
    rule = rule_type()
    for _ in range(2):
        parameters = torch.randn(3, 4, requires_grad=True)
        assert not rule(TransferContext.of(simplex_lattice(2, 2), torch.rand(3, 2), parameters)).requires_grad


# --------------------------------------------------------------------------------------------------- the context


@pytest.mark.parametrize("tasks", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize(
    "scalarization",
    [
        Linear(),
        Chebyshev(),
        Chebyshev(ideal=(0.1, 0.2, 0.3)),
        SmoothChebyshev(ideal=(0.1, 0.2, 0.3)),
        AugmentedChebyshev(),
        PBI(),
    ],
)
def test_objectives_of_all_pairs(scalarization: Scalarization, tasks: tuple[int, ...]) -> None:
    preferences, losses = simplex_sample(3, 5), torch.rand(5, 3)
    losses[:, [task for task in range(3) if task not in tasks]] = torch.nan
    context = TransferContext(
        preferences=preferences,
        losses=losses,
        parameters=torch.zeros(5, 1),
        step=0,
        learning_rate=0.1,
        healthy=torch.ones(5, dtype=torch.bool),
        tasks=tasks,
        scalarization=scalarization,
    )
    columns = list(tasks)
    for i in range(5):
        for j in range(5):
            expected = scalarization(losses[j, columns], preferences[i, columns], tasks=tasks)
            torch.testing.assert_close(context.objectives[i, j], expected)


def test_distances_of_all_pairs() -> None:
    parameters = torch.randn(4, 6)
    context = TransferContext.of(simplex_sample(2, 4), parameters=parameters)
    for i in range(4):
        for j in range(4):
            expected = math.dist(parameters[i].tolist(), parameters[j].tolist())
            assert context.distances[i, j].item() == pytest.approx(expected, rel=1e-5)


def test_distances_of_copies_that_have_hardly_moved_apart() -> None:
    parameters = 100 * torch.randn(1, 1000).repeat(2, 1)
    parameters[1, 0] += 1e-3
    context = TransferContext.of(simplex_sample(2, 2), parameters=parameters)
    moved = abs(parameters[1, 0].double() - parameters[0, 0].double()).item()
    assert context.distances[0, 1].item() == pytest.approx(moved, rel=1e-5)


def test_pairs_are_healthy_and_different() -> None:
    context = TransferContext.of(simplex_sample(2, 3), healthy=torch.tensor([True, False, True]))
    assert context.pairs.tolist() == [[False, False, True], [False, False, False], [True, False, False]]


# ------------------------------------------------------------------------------------------------ NeighborTransfer


def _reference_kernel(preferences: Tensor, num_neighbors: int, bandwidth: float | None) -> list[list[float]]:
    rows = preferences.double().tolist()
    size = len(rows)
    if size == 1:
        return [[0.0]]
    distances = [[math.dist(a, b) for b in rows] for a in rows]
    others = [[j for j in range(size) if j != i] for i in range(size)]
    if bandwidth is None:
        bandwidth = sum(min(distances[i][j] for j in others[i]) for i in range(size)) / size
    kernel = [[0.0] * size for _ in range(size)]
    for i in range(size):
        reach = sorted(distances[i][j] for j in others[i])[min(num_neighbors, size - 1) - 1]
        near = [j for j in others[i] if distances[i][j] <= reach + 1e-6]
        exponents = {j: -(distances[i][j] ** 2) / (2 * bandwidth**2) for j in near}
        largest = max(exponents.values())
        weights = {j: math.exp(exponent - largest) for j, exponent in exponents.items()}
        for j in near:
            kernel[i][j] = weights[j] / sum(weights.values())
    return kernel


@pytest.mark.parametrize("num_neighbors", [1, 2, 3, 100])
@pytest.mark.parametrize("bandwidth", [None, 0.05, 0.5])
@pytest.mark.parametrize(
    "preferences", [simplex_lattice(2, 6), simplex_lattice(3, 3), simplex_lattice(2, 1), simplex_lattice(4, 2)]
)
def test_neighbors_give_by_the_kernel(preferences: Tensor, num_neighbors: int, bandwidth: float | None) -> None:
    rule = NeighborTransfer(strength=0.8, decay=0.9, num_neighbors=num_neighbors, bandwidth=bandwidth)
    kernel = torch.tensor(_reference_kernel(preferences, num_neighbors, bandwidth))
    matrix = rule(TransferContext.of(preferences, step=5))
    torch.testing.assert_close(_off_diagonal(matrix), 0.8 * 0.9**5 * kernel, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 10, 1000, 10**6])
def test_the_mass_of_neighbors_fades(step: int) -> None:
    matrix = NeighborTransfer(strength=0.7, decay=0.99)(TransferContext.of(simplex_sample(3, 6), step=step))
    torch.testing.assert_close(
        _off_diagonal(matrix).sum(dim=1), torch.full((6,), 0.7 * 0.99**step), rtol=1e-5, atol=1e-6
    )


def test_neighbors_at_the_same_distance_give_alike() -> None:
    matrix = NeighborTransfer(strength=0.6, decay=1.0, num_neighbors=1)(TransferContext.of(torch.eye(3)))
    torch.testing.assert_close(matrix, torch.full((3, 3), 0.3) + 0.1 * torch.eye(3))


def test_equal_preferences_are_neighbors() -> None:
    preferences = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    matrix = NeighborTransfer(strength=0.5, num_neighbors=1)(TransferContext.of(preferences))
    torch.testing.assert_close(matrix, torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]))


def test_the_kernel_follows_the_preferences() -> None:
    rule = NeighborTransfer()
    for preferences in (simplex_lattice(2, 3), simplex_lattice(2, 5), simplex_lattice(2, 3).flip(0)):
        context = TransferContext.of(preferences)
        assert torch.equal(rule(context), NeighborTransfer()(context))


# -------------------------------------------------------------------------------------------- ProportionalTransfer


@pytest.mark.parametrize(("rate", "learning_rate", "mass"), [(2.0, 0.1, 0.2), (1.0, 1e-3, 1e-3), (5.0, 0.5, 1.0)])
def test_the_mass_is_proportional_to_the_learning_rate(rate: float, learning_rate: float, mass: float) -> None:
    preferences = simplex_lattice(2, 4)
    matrix = ProportionalTransfer(rate)(TransferContext.of(preferences, learning_rate=learning_rate))
    expected = mass * torch.tensor(_reference_kernel(preferences, 2, None))
    torch.testing.assert_close(_off_diagonal(matrix), expected, rtol=1e-4, atol=1e-6)


def test_with_sgd_it_is_the_gradient_step_on_the_regularizer() -> None:
    preferences = simplex_lattice(2, 4)
    theta, targets = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    rate, learning_rate = 0.7, 0.3

    matrix = ProportionalTransfer(rate)(TransferContext.of(preferences, learning_rate=learning_rate)).double()
    mixed = matrix @ theta - learning_rate * (theta - targets)

    kernel = torch.tensor(_reference_kernel(preferences, 2, None), dtype=torch.float64)
    own = theta.clone().requires_grad_()
    objective = 0.5 * (own - targets).square().sum()
    for i in range(5):
        for j in range(5):
            objective = objective + rate / 2 * kernel[i, j] * (own[i] - theta[j]).square().sum()
    (gradient,) = torch.autograd.grad(objective, own)
    torch.testing.assert_close(mixed, theta - learning_rate * gradient, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ DistanceTransfer


def _reference_distance(thetas: Sequence[Tensor], cap: float, decay: float, floor: float) -> list[Tensor]:
    """Return the matrices of all transfers, by the formula."""
    size = len(thetas[0])
    history = [[[math.dist(a, b) for b in theta.tolist()] for a in theta.tolist()] for theta in thetas]
    norm = sum(math.hypot(*row) for row in thetas[0].tolist()) / size
    initial = [max(sum(history[0][i]), floor * (size - 1) * norm) for i in range(size)]
    matrices = []
    for step, distances in enumerate(history):
        before = history[max(step - 1, 0)]
        matrix = torch.eye(size)
        for i in range(size):
            raw = [max(0.0, before[i][j] - distances[i][j]) for j in range(size)]
            shares = [value / (sum(raw) + initial[i]) if value else 0.0 for value in raw]
            limit = cap * decay**step
            if sum(shares) > limit:
                shares = [share * limit / sum(shares) for share in shares]
            for j in range(size):
                matrix[i, j] += shares[j]
            matrix[i, i] -= sum(shares)
        matrices.append(matrix)
    return matrices


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("arguments", [(0.5, 0.999, 1e-2), (0.05, 0.5, 1e-2), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0)])
def test_approaches_are_given_by_the_formula(arguments: tuple[float, float, float], common: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    thetas = [torch.randn(1 if common else 5, 7, generator=generator).expand(5, 7)]
    for _ in range(6):
        thetas.append(thetas[-1] + torch.randn(5, 7, generator=generator))
    rule = DistanceTransfer(*arguments)
    for step, (theta, expected) in enumerate(zip(thetas, _reference_distance(thetas, *arguments), strict=True)):
        matrix = rule(TransferContext.of(simplex_lattice(2, 4), parameters=theta, step=step))
        torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-5)


def test_the_first_call_is_the_identity() -> None:
    context = TransferContext.of(simplex_lattice(2, 4), parameters=torch.randn(5, 7))
    assert torch.equal(DistanceTransfer()(context), torch.eye(5))


@pytest.mark.parametrize("step", [0, 1, 50, 10_000])
def test_the_mass_of_approaches_stays_below_the_cap(step: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        rule = DistanceTransfer(cap=0.3, decay=0.99, floor=0.0)
        for factor in (1.0, 0.01):  # all come together
            theta = factor * torch.randn(5, 7, generator=generator)
            matrix = rule(TransferContext.of(simplex_lattice(2, 4), parameters=theta, step=step))
            assert (_off_diagonal(matrix).sum(dim=1) <= 0.3 * 0.99**step * (1 + 1e-5) + 1e-40).all()


def test_no_approach_is_no_transfer() -> None:
    rule = DistanceTransfer()
    theta = torch.randn(5, 7)
    for factor in (1.0, 2.0, 3.0):
        matrix = rule(TransferContext.of(simplex_lattice(2, 4), parameters=factor * theta))
    assert torch.equal(matrix, torch.eye(5))


def test_a_jump_that_was_reset_is_no_approach() -> None:
    rule = DistanceTransfer()
    theta = torch.randn(4, 7)
    preferences = simplex_lattice(2, 3)
    rule(TransferContext.of(preferences, parameters=theta))
    theta = 0.9 * theta
    theta[2] = theta[1]  # replaced by a copy of its neighbour
    rule.reset([2])
    matrix = _off_diagonal(rule(TransferContext.of(preferences, parameters=theta)))
    assert not matrix[2].any()
    assert not matrix[:, 2].any()
    assert matrix[0, 1] > 0


def test_approaches_are_seen_again_after_a_reset() -> None:
    rule = DistanceTransfer()
    theta, preferences = torch.randn(4, 7), simplex_lattice(2, 3)
    rule(TransferContext.of(preferences, parameters=theta))
    rule.reset([2])
    rule(TransferContext.of(preferences, parameters=theta))
    matrix = _off_diagonal(rule(TransferContext.of(preferences, parameters=0.9 * theta)))
    assert (matrix[2, [0, 1, 3]] > 0).all()


def test_a_diverging_subproblem_does_not_reach_the_others() -> None:
    rule = DistanceTransfer()
    theta = torch.randn(3, 4)
    theta[2] = 1e25  # finite, but its square is not
    for factor in (1.0, 0.9):
        matrix = rule(TransferContext.of(simplex_lattice(2, 2), parameters=factor * theta))
    assert matrix.isfinite().all()


# ----------------------------------------------------------------------------------------------- AdvantageTransfer


def _reference_advantage(
    preferences: Tensor, history: Sequence[Tensor], strength: float, sensitivity: float, smoothing: float, k: int
) -> Tensor:
    """Return the matrix after a history of losses, for the weighted sum."""
    size = len(preferences)
    average = [[0.0] * size for _ in range(size)]
    for call, losses in enumerate(history):
        for i in range(size):
            values = [sum(w * f for w, f in zip(preferences[i].tolist(), row, strict=True)) for row in losses.tolist()]
            for j in range(size):
                relative = (values[i] - values[j]) / abs(values[i])
                average[i][j] = relative if call == 0 else smoothing * average[i][j] + (1 - smoothing) * relative
    rows = preferences.tolist()
    matrix = torch.eye(size)
    for i in range(size):
        others = sorted((math.dist(rows[i], rows[j]), j) for j in range(size) if j != i)
        reach = others[min(k, size - 1) - 1][0]
        gains = {j: max(0.0, average[i][j]) for distance, j in others if distance <= reach + 1e-6}
        for j, gain in gains.items():
            matrix[i, j] = strength * gain / (sum(gains.values()) + sensitivity)
            matrix[i, i] -= matrix[i, j]
    return matrix


@pytest.mark.parametrize("arguments", [(0.5, 0.05, 0.9, 2), (1.0, 1e-3, 0.0, 1), (0.2, 1.0, 0.5, 10)])
@pytest.mark.parametrize("num_tasks", [2, 3])
def test_advantages_are_given_by_the_formula(num_tasks: int, arguments: tuple[float, float, float, int]) -> None:
    preferences = simplex_lattice(num_tasks, 3)
    history = [torch.rand(len(preferences), num_tasks) for _ in range(4)]
    rule = AdvantageTransfer(*arguments)
    for call, losses in enumerate(history):
        matrix = rule(TransferContext.of(preferences, losses, step=call))
        expected = _reference_advantage(preferences, history[: call + 1], *arguments)
        torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_received_where_each_model_is_best_for_its_own_preference() -> None:
    preferences = simplex_lattice(2, 5)
    front = torch.stack([(1 - preferences[:, 0]) ** 2, (1 - preferences[:, 1]) ** 2], dim=1)  # optimal for each
    rule = AdvantageTransfer()
    for _ in range(3):
        assert torch.equal(rule(TransferContext.of(preferences, front)), torch.eye(6))


def test_all_neighbors_may_give_wherever_their_preferences_lie() -> None:
    preferences = torch.tensor([[0.0, 1.0], [0.001, 0.999], [0.5, 0.5], [0.501, 0.499], [0.999, 0.001], [1.0, 0.0]])
    losses = torch.ones(6, 2)
    losses[2] = 0.1  # the second nearest to the first, and far better
    matrix = AdvantageTransfer(num_neighbors=2)(TransferContext.of(preferences, losses))
    assert matrix[0, 2] > 0.1


@pytest.mark.parametrize("worse", [1.0, 10.0, 1e6])
def test_an_objective_of_zero_is_no_trouble(worse: float) -> None:
    rule = AdvantageTransfer()
    losses = torch.tensor([[0.0, 1.0], [worse, 0.5], [worse, 0.0]])
    for _ in range(3):
        matrix = rule(TransferContext.of(simplex_lattice(2, 2).flip(0), losses))
        assert matrix.isfinite().all()


def test_what_was_measured_before_a_reset_is_forgotten() -> None:
    preferences = simplex_lattice(2, 3)
    latest = torch.rand(4, 2)
    matrices = []
    for past in (0.1, 10.0):
        rule = AdvantageTransfer()
        losses = torch.ones(4, 2)
        losses[2] = past
        rule(TransferContext.of(preferences, losses))
        rule.reset([2])
        matrices.append(rule(TransferContext.of(preferences, latest)))
    assert torch.equal(matrices[0], matrices[1])


def test_a_reset_keeps_what_was_measured_on_others() -> None:
    preferences = simplex_lattice(2, 3)
    rule, untouched = AdvantageTransfer(num_neighbors=1), AdvantageTransfer(num_neighbors=1)
    for one in (rule, untouched):
        one(TransferContext.of(preferences, torch.tensor([[1.0, 1.0], [0.1, 0.1], [1.0, 1.0], [1.0, 1.0]])))
    rule.reset([3])
    context = TransferContext.of(preferences, torch.ones(4, 2))
    matrix = rule(context)
    assert matrix[0, 1] > 0
    assert torch.equal(matrix[0], untouched(context)[0])


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("rule_type", "arguments", "name"),
    [
        *((rule, {name: value}, name) for rule, name in [
            (NeighborTransfer, "strength"),
            (NeighborTransfer, "decay"),
            (DistanceTransfer, "cap"),
            (DistanceTransfer, "decay"),
            (AdvantageTransfer, "strength"),
            (AdvantageTransfer, "smoothing"),
        ] for value in (-0.1, 1.1, math.nan)),
        *((rule, {name: value}, name) for rule, name in [
            (ProportionalTransfer, "rate"),
            (DistanceTransfer, "floor"),
            (AdvantageTransfer, "sensitivity"),
        ] for value in (-0.1, math.nan)),
        (NeighborTransfer, {"decay": 0.0}, "decay"),
        (DistanceTransfer, {"decay": 0.0}, "decay"),
        (AdvantageTransfer, {"sensitivity": 0.0}, "sensitivity"),
        (AdvantageTransfer, {"smoothing": 1.0}, "smoothing"),
        *((rule, {"num_neighbors": 0}, "num_neighbors")
          for rule in (NeighborTransfer, ProportionalTransfer, AdvantageTransfer)),
        *((rule, {"bandwidth": value}, "bandwidth")
          for rule in (NeighborTransfer, ProportionalTransfer) for value in (0.0, -1.0, math.nan)),
    ],
)  # fmt: skip
def test_arguments_out_of_range(rule_type: type[TransferRule], arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` should"):
        rule_type(**arguments)


def test_a_rule_has_to_say_what_is_received() -> None:
    class Nothing(TransferRule):
        pass

    with pytest.raises(NotImplementedError, match="Nothing should implement `received`"):
        Nothing()(TransferContext.of(simplex_lattice(2, 2)))


def test_a_rule_need_not_mind_the_diagonal_and_the_unhealthy() -> None:
    class Constant(TransferRule):
        def received(self, context: TransferContext) -> Tensor:
            return torch.full((3, 3), 0.25).index_fill(1, torch.tensor([1]), torch.nan)

    healthy = torch.tensor([True, False, True])
    matrix = Constant()(TransferContext.of(simplex_lattice(2, 2), healthy=healthy))
    torch.testing.assert_close(matrix, torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75]]))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(2), r"NoTransfer should return shape \(3, 3\). Found \(2, 2\)"),
        (torch.ones(3), r"NoTransfer should return shape \(3, 3\). Found \(3,\)"),
        (torch.eye(3) * torch.nan, "NoTransfer should return finite, non-negative entries"),
        (
            torch.eye(3).masked_fill(torch.eye(3) > 0, torch.inf),
            "NoTransfer should return finite, non-negative entries",
        ),
        (torch.tensor([[1.5, -0.5, 0], [0, 1, 0], [0, 0, 1]]), "Found -0.5 as the least"),
        (torch.tensor([[0.5, 0.4, 0], [0, 1, 0], [0, 0, 1]]), "NoTransfer returns should sum to one"),
        (2 * torch.eye(3), "NoTransfer returns should sum to one"),
    ],
)
def test_what_is_no_transfer_matrix(matrix: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_matrix(matrix, 3, NoTransfer())


@pytest.mark.parametrize("matrix", [torch.eye(3), torch.full((3, 3), 1 / 3), torch.rand(3, 3).softmax(dim=1)])
def test_what_is_a_transfer_matrix(matrix: Tensor) -> None:
    check_matrix(matrix, 3, NoTransfer())


# -------------------------------------------------------------------------------------------------------- the end of it


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_mixing_is_over_where_the_own_weight_rounds_to_one(decay: float) -> None:
    rule = NeighborTransfer(strength=0.5, decay=decay)
    last = max(step for step in range(3000) if not rule.is_over(step, torch.float32))
    kept = [1 - torch.tensor(0.5, dtype=torch.float64) * decay**step for step in (last, last + 1)]
    assert kept[0].float() < 1
    assert kept[1].float() == 1
    assert not rule.is_over(last + 1, torch.float64)
    assert rule.is_over(last + 1, torch.bfloat16)
    assert not rule.is_over(last, torch.bfloat16)  # small parameters still see it


def test_mixing_that_does_not_fade_is_never_over() -> None:
    assert not NeighborTransfer(decay=1.0).is_over(10**9, torch.float32)
    assert not DistanceTransfer(decay=1.0).is_over(10**9, torch.float32)
    assert not ProportionalTransfer().is_over(10**9, torch.float32)
    assert not AdvantageTransfer().is_over(10**9, torch.float32)


def test_no_transfer_is_over_from_the_start() -> None:
    assert NoTransfer().is_over(0, torch.float32)


def test_the_cap_of_the_distance_rule_fades_away() -> None:
    rule = DistanceTransfer(cap=0.5, decay=0.9)
    assert not rule.is_over(0, torch.float32)
    assert rule.is_over(1000, torch.float32)
