import copy
import inspect
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lightning import grouping
from mtl_lightning.grouping import (
    AffinityPropagation,
    AllTogether,
    Exemplars,
    Fisher,
    Fixed,
    GroupingRule,
    Heterogeneous,
    OneByOne,
    RandomGroups,
    SizeMatchedRandom,
    Threshold,
    check_partition,
)

# Rules whose constructor wants something; the others enter by themselves.
MAKERS: dict[type[GroupingRule], Callable[[int], GroupingRule]] = {
    Fixed: lambda size: Fixed([list(range(0, size, 2)), *([list(range(1, size, 2))] if size > 1 else [])]),
    RandomGroups: lambda size: RandomGroups(min(size, 2)),
    SizeMatchedRandom: lambda size: SizeMatchedRandom(AffinityPropagation()),
    Fisher: lambda size: _fisher(size),
}
RULES: list[type[GroupingRule]] = [
    value
    for value in vars(grouping).values()
    if inspect.isclass(value) and issubclass(value, GroupingRule) and value is not GroupingRule
]
rules = pytest.mark.parametrize("rule_type", RULES, ids=lambda rule: rule.__name__)
# Those whose partition is a function of the affinity alone, as long as messages converge.
readers = pytest.mark.parametrize("rule_type", [AffinityPropagation, Exemplars, Heterogeneous, Threshold])
propagations = pytest.mark.parametrize("rule_type", [AffinityPropagation, Heterogeneous])

SINGLETONS = [[0], [1], [2], [3]]
PAIRS = [[0, 1], [2, 3]]
MIXED = [[0.20, 0.09, -0.09, -0.11], [0.09, 0.20, -0.11, -0.09], [-0.09, -0.11, 0.20, 0.09], [-0.11, -0.09, 0.09, 0.20]]
POSITIVE = [[1.0, 0.9, 0.5, 0.4], [0.9, 1.0, 0.45, 0.5], [0.5, 0.45, 1.0, 0.9], [0.4, 0.5, 0.9, 1.0]]
# One step of each task from the start in the example of three quadratic losses with a shared scalar.
SINGLE_STEPS = [[0.36, 0.36, -0.21], [0.36, 0.75, -0.44], [-0.96, -2.24, 0.75]]
# Two related pairs, and two that conflict.
CROSSED = [[0.20, 0.18, -0.10, 0.08], [0.18, 0.20, 0.07, -0.09], [-0.10, 0.07, 0.20, 0.18], [0.08, -0.09, 0.18, 0.20]]
# Too few iterations for the messages to settle.
NEVER: dict[str, Any] = {"max_iter": 3, "convergence_iter": 2}

DEGENERATE = [
    pytest.param(torch.zeros, id="zeros"),
    pytest.param(torch.ones, id="ones"),
    pytest.param(lambda t, _: torch.eye(t), id="identity"),
    pytest.param(lambda t, _: -torch.eye(t), id="negative-self"),
    pytest.param(lambda t, _: torch.ones(t, t) - torch.eye(t), id="no-self"),
    pytest.param(lambda t, _: torch.ones(t, t).tril(), id="triangle"),
    pytest.param(lambda t, _: torch.full((t, t), -1.0), id="all-harm"),
    pytest.param(lambda t, _: torch.randn(t, t).sign(), id="signs"),
    pytest.param(lambda t, _: torch.randn(t, t) * 1e30, id="huge"),
    pytest.param(lambda t, _: torch.randn(t, t).double() * 1e-310, id="subnormal"),
    pytest.param(lambda t, _: torch.full((t, t), torch.finfo(torch.float64).max, dtype=torch.float64), id="greatest"),
    pytest.param(lambda t, _: torch.randn(t, t) * torch.logspace(-20, 10, t), id="wide"),
    pytest.param(lambda t, _: torch.outer(torch.rand(t), torch.rand(t)), id="rank-one"),
    pytest.param(lambda t, _: torch.outer(torch.randn(t), torch.randn(t)), id="rank-one-signed"),
    pytest.param(lambda t, _: torch.randn(t, t).fill_diagonal_(-1.0), id="negative-diagonal"),
    pytest.param(lambda t, _: torch.randn(t, t) * 1e-30, id="tiny"),
    pytest.param(lambda t, _: torch.full((t, t), 1e-8), id="constant"),
    pytest.param(lambda t, _: torch.arange(t * t).remainder(2).reshape(t, t), id="chessboard"),
    pytest.param(lambda t, _: torch.randn(t, t).bfloat16(), id="bfloat16"),
    pytest.param(lambda t, _: torch.randint(-2, 3, (t, t)), id="integers"),
    pytest.param(lambda t, _: torch.randn(t, t, requires_grad=True), id="with-gradient"),
]


def _make(rule_type: Any, size: int) -> GroupingRule:
    rule: GroupingRule = MAKERS[rule_type](size) if rule_type in MAKERS else rule_type()
    return rule


def _fisher(size: int, *arguments: Any) -> Fisher:
    rule = Fisher(*arguments)
    roots = torch.rand(size, 10, generator=torch.Generator().manual_seed(size))
    rule.update(roots @ roots.T)
    return rule


def _random(size: int, seed: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    affinity = low + (high - low) * torch.rand(size, size, generator=generator, dtype=torch.float64)
    return affinity.fill_diagonal_(1.0)


def _preference(similarity: Tensor, include_diagonal: bool = True) -> float:
    size = len(similarity)
    entries = sorted(similarity[i, j].item() for i in range(size) for j in range(size) if include_diagonal or i != j)
    return (entries[(len(entries) - 1) // 2] + entries[len(entries) // 2]) / 2


def _partition_value(similarity: Tensor, preference: float, partition: list[list[int]]) -> float:
    x = similarity.tolist()
    return sum(preference + max(sum(x[i][j] for i in group if i != j) for j in group) for group in partition)


def _reference_values(similarity: Tensor, preference: float) -> dict[tuple[int, ...], float]:
    """Return the objective of every set of exemplars."""
    values: dict[tuple[int, ...], float] = {}
    for count in range(1, len(similarity) + 1):
        sets = list(itertools.combinations(range(len(similarity)), count))
        best = similarity[:, torch.tensor(sets)].max(dim=-1).values  # of each task in each set
        best = best.scatter(0, torch.tensor(sets).T, preference)  # exemplars have the preference
        values.update(zip(sets, best.sum(dim=0).tolist(), strict=True))
    return values


def _permuted(partition: list[list[int]], order: list[int]) -> list[list[int]]:
    return sorted(sorted(order[task] for task in group) for group in partition)


def _reloaded(rule: GroupingRule, fresh: GroupingRule) -> GroupingRule:
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


# Theory of the published rule.


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-1.0, 0.0)], ids=["mixed", "positive", "negative"])
@pytest.mark.parametrize(("size", "share", "draws"), [(3, 1.0, 40), (4, 0.99, 100), (5, 0.97, 60), (6, 0.93, 40)])
def test_the_exemplars_maximise_the_objective(size: int, share: float, draws: int, low: float, high: float) -> None:
    found = []
    for seed in range(draws):
        affinity, rule = _random(size, seed, low, high), AffinityPropagation()
        partition = rule(affinity)
        if rule.converged:
            similarity = rule.similarity(affinity)
            preference = _preference(similarity)
            best = max(_reference_values(similarity, preference).values())
            found.append(_partition_value(similarity, preference, partition) >= best - 1e-9)
    assert len(found) >= 0.9 * draws
    assert sum(found) >= share * len(found) - 1


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_the_exemplars_of_heterogeneous_groups_maximise_the_objective(size: int) -> None:
    found = []
    for seed in range(30):
        affinity, rule = _random(size, seed), Heterogeneous(damping=0.9, max_iter=1000)
        partition = rule(affinity)
        if rule.converged:
            similarity = rule.similarity(affinity)
            best = max(_reference_values(similarity, _preference(similarity)).values())
            found.append(_partition_value(similarity, _preference(similarity), partition) >= best - 1e-9)
    assert len(found) >= 0.9 * 30
    assert sum(found) >= 0.9 * len(found)


def test_the_exemplars_maximise_the_objective_for_the_most_tasks_of_the_experiments() -> None:
    found = []
    for seed in range(60):
        affinity, rule = _random(11, seed), AffinityPropagation()
        partition = rule(affinity)
        if rule.converged:
            similarity = rule.similarity(affinity)
            best = max(_reference_values(similarity, _preference(similarity)).values())
            found.append(_partition_value(similarity, _preference(similarity), partition) >= best - 1e-9)
    assert len(found) >= 0.85 * 60
    assert sum(found) >= 0.86 * len(found)


@pytest.mark.parametrize(
    ("affinity", "expected"),
    [
        pytest.param(MIXED, PAIRS, id="mixed"),
        pytest.param((torch.tensor(MIXED).double() / 0.2 + 0.4).fill_diagonal_(1.0).tolist(), PAIRS, id="shifted"),
        pytest.param(POSITIVE, PAIRS, id="positive"),
    ],
)
@pytest.mark.parametrize("merge_ties", [False, True])
def test_known_matrices(affinity: list[list[float]], expected: list[list[int]], merge_ties: bool) -> None:
    rule = AffinityPropagation(merge_ties=merge_ties)
    assert rule(torch.tensor(affinity, dtype=torch.float64)) == expected
    assert rule.converged


@pytest.mark.parametrize(("affinity", "objective"), [(MIXED, 0.9), (POSITIVE, 3.2)])
def test_the_known_optima_are_unique_in_groups(affinity: list[list[float]], objective: float) -> None:
    similarity = AffinityPropagation().similarity(torch.tensor(affinity, dtype=torch.float64))
    values = _reference_values(similarity, _preference(similarity))
    assert max(values.values()) == pytest.approx(objective, abs=1e-9)
    optima = {exemplars for exemplars, value in values.items() if value > objective - 1e-9}
    assert optima == {(0, 2), (0, 3), (1, 2), (1, 3)}  # one of each pair


def test_single_steps_have_the_similarities_of_the_closed_form() -> None:
    affinity = torch.tensor(SINGLE_STEPS, dtype=torch.float64)
    similarity = AffinityPropagation().similarity(affinity)
    expected = torch.tensor([[1.0, 0.74, -1.473333], [0.74, 1.0, -1.786667], [-1.473333, -1.786667, 1.0]])
    torch.testing.assert_close(similarity, expected.double(), atol=1e-6, rtol=0.0)
    values = _reference_values(similarity, _preference(similarity))
    assert values[(0, 1, 2)] == pytest.approx(2.22)
    assert values[(0, 2)] == pytest.approx(2.22)


@pytest.mark.parametrize(("merge_ties", "expected"), [(False, [[0], [1], [2]]), (True, [[0, 1], [2]])])
def test_the_tie_of_single_steps_follows_the_rule(merge_ties: bool, expected: list[list[int]]) -> None:
    rule = AffinityPropagation(merge_ties=merge_ties)
    assert rule(torch.tensor(SINGLE_STEPS, dtype=torch.float64)) == expected
    assert rule.converged


@pytest.mark.parametrize("merge_ties", [False, True])
@pytest.mark.parametrize("size", [3, 5])
def test_ties_go_to_more_groups_or_to_fewer(size: int, merge_ties: bool) -> None:
    followed = []
    for seed in range(60):
        affinity, rule = _random(size, seed), AffinityPropagation(merge_ties=merge_ties)
        partition = rule(affinity)
        similarity = rule.similarity(affinity)
        preference = _preference(similarity)
        values = _reference_values(similarity, preference)
        best = max(values.values())
        sizes = {len(exemplars) for exemplars, value in values.items() if value > best - 1e-9}
        if rule.converged and len(sizes) > 1:
            followed.append(len(partition) == (min(sizes) if merge_ties else max(sizes)))
    assert len(followed) >= 10
    assert sum(followed) >= (1.0 if size == 3 else 0.85) * len(followed)  # messages are a heuristic


@pytest.mark.parametrize("seed", range(20))
def test_three_tasks_merge_the_best_pair_or_none(seed: int) -> None:
    affinity = _random(3, seed)
    similarity = AffinityPropagation().similarity(affinity)
    pair = max(itertools.combinations(range(3), 2), key=lambda pair: similarity[pair].item())
    merged = sorted([list(pair), [({0, 1, 2} - set(pair)).pop()]])
    assert AffinityPropagation()(affinity) == [[0], [1], [2]]
    assert AffinityPropagation(merge_ties=True)(affinity) == merged
    assert AffinityPropagation(include_diagonal=False)(affinity) == merged
    assert AffinityPropagation(include_diagonal=False, merge_ties=True)(affinity) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("value", "together", "opposite"),
    [(-2.0, False, True), (0.999, False, True), (1.0, False, False), (1.001, True, False), (5.0, True, False)],
)
def test_two_tasks_are_together_if_they_help_each_other_more_than_themselves(
    value: float, together: bool, opposite: bool
) -> None:
    # The mean over both directions counts: here E_01 / E_11 = value - 1 and E_10 / E_00 = value + 1.
    affinity = torch.tensor([[0.5, 0.25 * (value - 1)], [0.5 * (value + 1), 0.25]], dtype=torch.float64)
    assert AffinityPropagation()(affinity) == ([[0, 1]] if together else [[0], [1]])
    assert Heterogeneous()(affinity) == ([[0, 1]] if opposite else [[0], [1]])


def test_two_tasks_at_exactly_one_are_a_tie() -> None:
    assert AffinityPropagation()(torch.ones(2, 2)) == [[0], [1]]
    assert AffinityPropagation(merge_ties=True)(torch.ones(2, 2)) == [[0, 1]]


@pytest.mark.parametrize("shift", [-3.0, -0.25, 0.25, 0.5])
@pytest.mark.parametrize(("size", "share"), [(3, 1.0), (4, 1.0), (5, 0.9), (6, 0.9), (8, 0.8)])
def test_a_constant_on_the_off_diagonal_changes_nothing(size: int, share: float, shift: float) -> None:
    same = []
    for seed in range(10):
        affinity = _random(size, seed, -0.45, 0.45)
        rule, shifted_rule = AffinityPropagation(), AffinityPropagation()
        partition, shifted = rule(affinity), shifted_rule((affinity + shift).fill_diagonal_(1.0))
        if rule.converged and shifted_rule.converged:
            same.append(partition == shifted)
    assert len(same) >= 8
    assert sum(same) >= share * len(same)  # rounding turns messages that settle late


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 7.0, 1e6])
@propagations
def test_the_scale_of_a_target_does_not_count(rule_type: type[AffinityPropagation], scale: float) -> None:
    affinity = _random(5, 0)
    assert rule_type()(affinity * scale) == rule_type()(affinity)
    columns = torch.tensor([1.0, 2.0, 0.5, 4.0, 0.125])
    assert rule_type()(affinity * columns) == rule_type()(affinity)


def test_only_the_mean_of_both_directions_counts() -> None:
    affinity = _random(6, 1)
    assert AffinityPropagation()(affinity) == AffinityPropagation()((affinity + affinity.T) / 2)


def test_heterogeneous_groups_part_the_pairs() -> None:
    assert Heterogeneous()(torch.tensor(CROSSED)) == [[0, 2], [1, 3]]
    assert AffinityPropagation()(torch.tensor(CROSSED)) == PAIRS


def test_the_state_of_the_global_generator_does_not_count() -> None:
    affinity = _random(7, 2)
    partitions = []
    for seed in range(3):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        partitions.append(AffinityPropagation()(affinity))
        assert torch.equal(before, torch.get_rng_state())
    assert partitions[0] == partitions[1] == partitions[2]


# Exact exemplars.


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-1.0, 0.0)], ids=["mixed", "positive", "negative"])
@pytest.mark.parametrize("dissimilar", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 11])
def test_the_best_exemplars_always_maximise_the_objective(size: int, dissimilar: bool, low: float, high: float) -> None:
    for seed in range(8):
        affinity = _random(size, seed, low, high)
        similarity = (Heterogeneous() if dissimilar else AffinityPropagation()).similarity(affinity)
        preference = _preference(similarity)
        best = max(_reference_values(similarity, preference).values())
        value = _partition_value(similarity, preference, Exemplars(dissimilar=dissimilar)(affinity))
        assert value == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("merge_ties", [False, True])
@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_messages_and_search_agree_where_messages_find_the_optimum(size: int, merge_ties: bool) -> None:
    same = []
    for seed in range(20):
        rule, affinity = AffinityPropagation(merge_ties=merge_ties), _random(size, seed)
        partition = rule(affinity)
        if rule.converged:
            same.append(partition == Exemplars(merge_ties=merge_ties)(affinity))
    assert len(same) >= 15
    assert sum(same) >= 0.9 * len(same)


@pytest.mark.parametrize(
    "affinity",
    [MIXED, POSITIVE, (torch.tensor(MIXED).double() / 0.2 + 0.4).fill_diagonal_(1.0).tolist()],
    ids=["mixed", "positive", "shifted"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("merge_ties", [False, True])
def test_the_best_exemplars_of_known_matrices(
    affinity: list[list[float]], dtype: torch.dtype, merge_ties: bool
) -> None:
    assert Exemplars(merge_ties=merge_ties)(torch.tensor(affinity, dtype=dtype)) == PAIRS


@pytest.mark.parametrize(("merge_ties", "expected"), [(False, [[0], [1], [2]]), (True, [[0, 1], [2]])])
def test_the_best_exemplars_of_single_steps_tie(merge_ties: bool, expected: list[list[int]]) -> None:
    assert Exemplars(merge_ties=merge_ties)(torch.tensor(SINGLE_STEPS, dtype=torch.float64)) == expected


@pytest.mark.parametrize("seed", range(10))
def test_the_best_exemplars_of_three_tasks_are_the_best_pair_or_none(seed: int) -> None:
    affinity = _random(3, seed)
    similarity = AffinityPropagation().similarity(affinity)
    pair = max(itertools.combinations(range(3), 2), key=lambda pair: similarity[pair].item())
    merged = sorted([list(pair), [({0, 1, 2} - set(pair)).pop()]])
    assert Exemplars()(affinity) == [[0], [1], [2]]
    assert Exemplars(merge_ties=True)(affinity) == merged
    assert Exemplars(include_diagonal=False)(affinity) == merged
    assert Exemplars(include_diagonal=False, merge_ties=True)(affinity) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("value", "together", "opposite"),
    [(-2.0, False, True), (0.999, False, True), (1.0, False, False), (1.001, True, False), (5.0, True, False)],
)
def test_the_best_exemplars_of_two_tasks(value: float, together: bool, opposite: bool) -> None:
    affinity = torch.tensor([[0.5, 0.25 * (value - 1)], [0.5 * (value + 1), 0.25]], dtype=torch.float64)
    assert Exemplars()(affinity) == ([[0, 1]] if together else [[0], [1]])
    assert Exemplars(dissimilar=True)(affinity) == ([[0, 1]] if opposite else [[0], [1]])
    assert Exemplars(merge_ties=True)(torch.ones(2, 2)) == [[0, 1]]


def test_the_best_dissimilar_exemplars_part_the_pairs() -> None:
    assert Exemplars(dissimilar=True)(torch.tensor(CROSSED)) == [[0, 2], [1, 3]]
    assert Exemplars()(torch.tensor(CROSSED)) == PAIRS


@pytest.mark.parametrize("shift", [-3.0, -0.25, 0.5])
@pytest.mark.parametrize("size", [3, 4, 5, 8, 10])
def test_a_constant_on_the_off_diagonal_never_changes_the_best_exemplars(size: int, shift: float) -> None:
    for seed in range(10):
        affinity = _random(size, seed, -0.45, 0.45)
        assert Exemplars()((affinity + shift).fill_diagonal_(1.0)) == Exemplars()(affinity)


def test_the_best_exemplars_keep_their_groups_at_zeros() -> None:
    rule = Exemplars()
    assert rule(torch.zeros(4, 4)) == SINGLETONS
    assert rule(torch.tensor(POSITIVE)) == PAIRS
    assert _reloaded(rule, Exemplars())(torch.zeros(4, 4)) == PAIRS
    assert rule(torch.zeros(4, 4)) == PAIRS
    with pytest.raises(ValueError, match=r"should have shape \(4, 4\), as in the calls before.*Found \(3, 3\)"):
        rule(torch.zeros(3, 3))
    rule.reset()
    assert rule(torch.zeros(4, 4)) == SINGLETONS


def test_the_best_exemplars_are_not_searched_among_too_many() -> None:
    message = "`Exemplars` should be given at most 16 tasks.*Found 17: use `AffinityPropagation`"
    with pytest.raises(ValueError, match=message):
        Exemplars()(torch.eye(17))
    with pytest.raises(ValueError, match=message):
        Exemplars().resolve([str(task) for task in range(17)])


@pytest.mark.parametrize("floor", [0.0, 1.5, float("nan")])
def test_the_floor_of_exemplars_is_checked(floor: float) -> None:
    with pytest.raises(ValueError, match=r"`floor` should lie in \(0, 1\]"):
        Exemplars(floor=floor)


# Fisher information.

ROOTS = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, 1.0], [0.1, 0.0, 1.0, 1.0]])


def test_fisher_similarities_are_cosines() -> None:
    rule = Fisher()
    rule.update(ROOTS @ ROOTS.T)
    cosines = torch.nn.functional.cosine_similarity(ROOTS[:, None], ROOTS, dim=-1).double()
    assert rule.similarity is not None
    torch.testing.assert_close(rule.similarity, cosines, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("inner", [None, Exemplars(), AffinityPropagation(), Threshold(0.5)])
def test_fisher_groups_similar_tasks(inner: GroupingRule | None) -> None:
    rule = Fisher(inner)
    rule.update(ROOTS @ ROOTS.T)
    assert rule(torch.zeros(4, 4)) == PAIRS


@pytest.mark.parametrize("inner", [Exemplars(dissimilar=True), Heterogeneous(damping=0.9, max_iter=1000)])
def test_fisher_groups_dissimilar_tasks(inner: GroupingRule) -> None:
    rule = Fisher(inner)
    rule.update(torch.tensor([[4.0, 3.0, 0.0, 1.0], [3.0, 4.0, 1.0, 0.0], [0.0, 1.0, 4.0, 3.0], [1.0, 0.0, 3.0, 4.0]]))
    assert rule(torch.zeros(4, 4)) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e8])
def test_the_scale_of_a_loss_does_not_count_in_fisher_groups(scale: float) -> None:
    rule, scaled, scales = Fisher(), Fisher(), torch.tensor([1.0, scale, 1.0, 1.0])
    rule.update(ROOTS @ ROOTS.T)
    scaled.update((ROOTS * scales[:, None]) @ (ROOTS * scales[:, None]).T)
    assert rule.similarity is not None
    assert scaled.similarity is not None
    torch.testing.assert_close(scaled.similarity, rule.similarity, atol=1e-6, rtol=0.0)


def test_fisher_does_not_read_the_affinity() -> None:
    rule = _fisher(5)
    assert rule(torch.full((5, 5), float("nan"))) == rule(torch.randn(5, 5))


def test_before_the_first_update_fisher_leaves_every_task_alone() -> None:
    rule = Fisher(AllTogether())
    assert rule(torch.zeros(3, 3)) == [[0], [1], [2]]
    rule.update(torch.ones(3, 3))
    assert rule(torch.zeros(3, 3)) == [[0, 1, 2]]
    rule.reset()
    assert rule(torch.zeros(3, 3)) == [[0], [1], [2]]


def test_a_task_without_gradients_resembles_none() -> None:
    rule = Fisher(Threshold(1e-6))
    rule.update(torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert rule(torch.zeros(3, 3)) == [[0, 1], [2]]


def test_the_last_update_of_fisher_counts_and_is_in_checkpoints() -> None:
    rule = Fisher()
    rule.update(torch.eye(4))
    rule.update(ROOTS @ ROOTS.T)
    assert _reloaded(rule, Fisher())(torch.zeros(4, 4)) == PAIRS
    assert _reloaded(Fisher(), rule)(torch.zeros(4, 4)) == SINGLETONS


def test_fisher_hands_names_on() -> None:
    rule = Fisher(Fixed([["a", "c"], ["b"]]))
    rule.resolve(["a", "b", "c"])
    rule.update(torch.eye(3))
    assert rule(torch.zeros(3, 3)) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (torch.zeros(3), r"`gramian` should have shape \(T, T\).*Found \(3,\)"),
        (torch.zeros(2, 3), r"Found \(2, 3\)"),
        (torch.zeros(0, 0), r"Found \(0, 0\)"),
        (torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), r"finite products of roots, at least 0. Found -0.5"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "Found nan"),
    ],
)
def test_the_gramian_of_fisher_is_checked(gramian: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fisher().update(gramian)


def test_fisher_wants_the_tasks_of_its_update() -> None:
    with pytest.raises(ValueError, match=r"`affinity` should have shape \(4, 4\), as the Gramian.*Found \(3, 3\)"):
        _fisher(4)(torch.zeros(3, 3))


def test_fisher_is_refreshed_after_a_batch_at_least() -> None:
    with pytest.raises(ValueError, match=r"`refresh_every` should be at least 1 batch. Found 0"):
        Fisher(refresh_every=0)


# What happens without convergence.


@propagations
def test_without_convergence_tasks_are_alone_at_first(rule_type: Any) -> None:
    rule = rule_type(**NEVER)
    assert rule(torch.tensor(MIXED)) == SINGLETONS
    assert not rule.converged


@propagations
def test_without_convergence_the_groups_are_kept(rule_type: Any) -> None:
    rule = rule_type()
    first = rule(torch.tensor(CROSSED))
    assert rule.converged
    assert len(first) == 2
    rule.max_iter, rule.convergence_iter = 3, 2
    assert rule(torch.eye(4) + 0.1 * torch.randn(4, 4)) == first
    assert not rule.converged
    rule.reset()
    assert rule(torch.eye(4)) == SINGLETONS


@propagations
def test_a_matrix_of_zeros_keeps_the_groups(rule_type: Any) -> None:
    rule = rule_type()
    assert rule(torch.zeros(4, 4)) == SINGLETONS
    first = rule(torch.tensor(CROSSED))
    assert len(first) == 2
    assert rule(torch.zeros(4, 4)) == first


def test_groups_are_not_kept_for_another_number_of_tasks() -> None:
    rule = AffinityPropagation()
    rule(torch.tensor(POSITIVE))
    with pytest.raises(ValueError, match=r"should have shape \(4, 4\), as in the calls before.*Found \(3, 3\)"):
        rule(torch.zeros(3, 3))
    rule.reset()
    assert rule(torch.zeros(3, 3)) == [[0], [1], [2]]


def test_no_warning_leaves_the_rule() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AffinityPropagation(**NEVER)(torch.tensor(MIXED))
        AffinityPropagation()(torch.ones(4, 4))


def test_what_is_returned_can_be_changed() -> None:
    rule = AffinityPropagation()
    rule(torch.tensor(POSITIVE))[0].append(7)
    assert rule(torch.zeros(4, 4)) == PAIRS


# The other rules.


@pytest.mark.parametrize("threshold", [-0.3, 0.0, 0.2])
@pytest.mark.parametrize("seed", range(10))
def test_all_pairs_in_a_group_pass_the_threshold(seed: int, threshold: float) -> None:
    affinity = _random(6, seed)
    partition = Threshold(threshold)(affinity)
    for group in partition:
        assert all(affinity[i, j] >= threshold for i in group for j in group if i != j)
    for first, second in itertools.combinations(partition, 2):  # and no two groups could be one
        pairs = [(i, j) for i in first for j in second]
        assert not all(affinity[i, j] >= threshold and affinity[j, i] >= threshold for i, j in pairs)


def test_the_best_pair_decides_who_gets_the_task_between() -> None:
    affinity = torch.tensor([[1.0, 0.2, -0.1], [0.2, 1.0, 0.3], [-0.1, 0.3, 1.0]])
    assert Threshold()(affinity) == [[0], [1, 2]]


def test_among_equal_pairs_the_first_decides() -> None:
    affinity = torch.tensor([[1.0, 0.2, -0.1], [0.2, 1.0, 0.2], [-0.1, 0.2, 1.0]])
    assert Threshold()(affinity) == [[0, 1], [2]]


def test_one_direction_is_not_enough() -> None:
    assert Threshold()(torch.tensor([[1.0, 5.0], [-0.01, 1.0]])) == [[0], [1]]


@pytest.mark.parametrize(("threshold", "groups"), [(0.0, 1), (1e-9, 3), (-1.0, 1), (float("inf"), 3)])
def test_zeros_are_compared_like_any_value(threshold: float, groups: int) -> None:
    assert len(Threshold(threshold)(torch.zeros(3, 3))) == groups


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_extremes(size: int) -> None:
    assert OneByOne()(torch.randn(size, size)) == [[task] for task in range(size)]
    assert AllTogether()(torch.randn(size, size)) == [list(range(size))]


def test_fixed_groups_are_found_by_name() -> None:
    rule = Fixed([("c", "a"), ("b",)])
    rule.resolve(["a", "b", "c"])
    assert rule(torch.randn(3, 3)) == [[0, 2], [1]]
    rule.resolve(["b", "c", "a"])
    assert rule(torch.randn(3, 3)) == [[0], [1, 2]]


def test_fixed_groups_by_index_need_no_names() -> None:
    rule = Fixed([[2], [1, 0]])
    assert rule(torch.zeros(3, 3)) == [[0, 1], [2]]
    rule.resolve(["a", "b", "c"])
    assert rule(torch.zeros(3, 3)) == [[0, 1], [2]]


@pytest.mark.parametrize(("size", "num_groups"), [(1, 1), (5, 2), (6, 4), (7, 7)])
def test_random_groups_are_as_many_as_wanted_and_of_almost_equal_size(size: int, num_groups: int) -> None:
    rule = RandomGroups(num_groups)
    for _ in range(5):
        sizes = [len(group) for group in rule(torch.zeros(size, size))]
        assert len(sizes) == num_groups
        assert max(sizes) - min(sizes) <= 1


def test_all_pairs_are_together_equally_often_in_random_groups() -> None:
    rule, count = RandomGroups(2), torch.zeros(4, 4)
    for _ in range(1500):
        for group in rule(count):
            for pair in itertools.combinations(group, 2):
                count[pair] += 1
    shares = count[torch.triu(torch.ones(4, 4), 1) > 0] / 1500  # of one in three, with a deviation of 0.012
    torch.testing.assert_close(shares, torch.full((6,), 1 / 3), atol=0.05, rtol=0.0)


@pytest.mark.parametrize("make", [lambda seed: RandomGroups(3, seed=seed), lambda seed: _matched(seed)])
def test_random_groups_follow_their_seed_only(make: Callable[[int], GroupingRule]) -> None:
    affinity = torch.eye(9)
    runs = []
    for seed, outer in ((0, 0), (0, 1), (1, 0)):
        torch.manual_seed(outer)
        rule = make(seed)
        runs.append([rule(affinity) for _ in range(5)])
    assert runs[0] == runs[1] != runs[2]
    assert len({str(partition) for partition in runs[0]}) > 1


def _matched(seed: int) -> GroupingRule:
    return SizeMatchedRandom(Fixed([[0, 1, 2, 3, 4, 5], [6], [7, 8]]), seed=seed)


def test_matched_groups_have_the_sizes_of_the_rule() -> None:
    rule = _matched(0)
    for _ in range(5):
        assert sorted(len(group) for group in rule(torch.eye(9))) == [1, 2, 6]


def test_matched_groups_hand_names_and_resets_on() -> None:
    inner = AffinityPropagation()
    rule = SizeMatchedRandom(inner)
    rule(torch.tensor(POSITIVE))
    assert inner.previous == PAIRS
    rule.reset()
    assert inner.previous is None
    named = SizeMatchedRandom(Fixed([["a"], ["b", "c"]]))
    named.resolve(["a", "b", "c"])
    assert sorted(map(len, named(torch.zeros(3, 3)))) == [1, 2]


# What all rules owe.


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("size", [1, 2, 3, 6])
@rules
def test_every_rule_returns_a_partition(
    rule_type: type[GroupingRule], size: int, kind: Callable[[int, int], Tensor]
) -> None:
    affinity = kind(size, size)
    before = affinity.clone()
    rule = _make(rule_type, size)
    for _ in range(2):
        partition = rule(affinity)
        check_partition(partition, size, rule)
        assert partition == sorted(sorted(group) for group in partition)
        assert all(type(task) is int for group in partition for task in group)
    assert torch.equal(affinity, before)


@readers
@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_the_order_of_the_tasks_does_not_count(rule_type: type[GroupingRule], size: int) -> None:
    for seed in range(10):
        affinity = _random(size, seed)
        order = torch.randperm(size).tolist()
        permuted = rule_type()(affinity[order][:, order])
        rule = rule_type()
        expected = rule(affinity)
        assert getattr(rule, "converged", True) or permuted == expected == [[task] for task in range(size)]
        assert _permuted(permuted, order) == expected


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("size", [2, 3, 4, 6])
@rules
def test_equal_rules_agree_on_degenerate_matrices(
    rule_type: type[GroupingRule], size: int, kind: Callable[[int, int], Tensor]
) -> None:
    affinity = kind(size, size)
    assert _make(rule_type, size)(affinity) == _make(rule_type, size)(affinity.clone())


@rules
def test_equal_rules_return_equal_partitions(rule_type: type[GroupingRule]) -> None:
    first, second = _make(rule_type, 6), _make(rule_type, 6)
    for seed in range(4):
        assert first(_random(6, seed)) == second(_random(6, seed))


@rules
def test_a_rule_continues_from_its_state(rule_type: type[GroupingRule]) -> None:
    rule = _make(rule_type, 6)
    for seed in range(3):
        rule(_random(6, seed))
    others = [_reloaded(rule, _make(rule_type, 6)), copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))]
    run = [torch.zeros(6, 6), *(_random(6, seed) for seed in range(3, 6))]
    expected = [rule(affinity) for affinity in run]
    for other in others:
        assert [other(affinity) for affinity in run] == expected


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (2, 3, 3)])
@rules
def test_every_rule_wants_a_square_matrix(rule_type: type[GroupingRule], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`affinity` should have shape \(T, T\)") as error:
        _make(rule_type, 3)(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [2, 4])
@readers
def test_rules_that_read_the_affinity_want_finite_entries(
    rule_type: type[GroupingRule], size: int, value: float
) -> None:
    affinity = torch.eye(size)
    affinity[1, 0] = value
    rule = rule_type()
    with pytest.raises(ValueError, match=f"`affinity` should be finite.*Found {value} from task 1 to task 0"):
        rule(affinity)
    with pytest.raises(ValueError, match="should be finite"):
        SizeMatchedRandom(rule)(affinity)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.4}, r"`damping` should lie in \[0.5, 1\). Found 0.4"),
        ({"damping": 1.0}, "`damping` should lie in"),
        ({"damping": float("nan")}, "`damping` should lie in"),
        ({"convergence_iter": 0}, "`convergence_iter` should be at least 1"),
        ({"max_iter": 50}, "less than `max_iter`, or nothing ever converges. Found 50 and 50"),
        ({"floor": 0.0}, r"`floor` should lie in \(0, 1\]. Found 0.0"),
        ({"floor": float("nan")}, "`floor` should lie in"),
    ],
)
@propagations
def test_affinity_propagation_checks_its_arguments(rule_type: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule_type(**arguments)


def test_a_threshold_is_a_number() -> None:
    with pytest.raises(ValueError, match=r"`threshold` should be a number. Found nan"):
        Threshold(float("nan"))


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([], ValueError, "should hold a group at least. Found none"),
        ([["a"], []], ValueError, "Found an empty group"),
        (["ab", "c"], TypeError, "should hold sequences of tasks. Found 'ab'"),
        ([0, 1], TypeError, "should hold sequences of tasks. Found 0"),
        ([["a", 1]], TypeError, "all tasks by name, or all by index"),
        ([[0.5]], TypeError, "all tasks by name, or all by index"),
        ([["a", "b"], ["a"]], ValueError, "in one group only. Found 'a' more than once"),
        ([[0, 0]], ValueError, "Found 0 more than once"),
    ],
)
def test_fixed_groups_are_checked(groups: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fixed(groups)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["a"], ["b", "d"]], "the tasks 'a', 'b', 'c' once. Found 'd' unknown and 'c' missing"),
        ([["a"], ["b"]], "Found none unknown and 'c' missing"),
        ([[0], [1, 3]], "Found 3 unknown and 2 missing"),
    ],
)
def test_fixed_groups_have_to_fit_the_tasks(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fixed(groups).resolve(["a", "b", "c"])


def test_names_have_to_be_looked_up() -> None:
    with pytest.raises(ValueError, match="should be given the names of the tasks with `resolve`"):
        Fixed([["a"]])(torch.zeros(1, 1))


def test_fixed_groups_have_to_fit_the_affinity() -> None:
    with pytest.raises(ValueError, match=r"Fixed should return groups that hold each of the tasks 0 to 3 once"):
        Fixed([[0, 1], [2]])(torch.zeros(4, 4))


def test_there_are_at_most_as_many_random_groups_as_tasks() -> None:
    with pytest.raises(ValueError, match=r"`num_groups` should be at least 1. Found 0"):
        RandomGroups(0)
    with pytest.raises(ValueError, match=r"at most the number of tasks, 2. Found 3"):
        RandomGroups(3).resolve(["a", "b"])
    with pytest.raises(ValueError, match=r"at most the number of tasks, 2. Found 3"):
        RandomGroups(3)(torch.zeros(2, 2))


@pytest.mark.parametrize("groups", [[[0]], [[0, 1], [1]], [[0, 1], []], [[0], [2]], [[0, 1, 1]]])
def test_no_partition_is_noticed(groups: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="OneByOne should return groups that hold each of the tasks 0 to 1 once"):
        check_partition(groups, 2, OneByOne())


def test_the_base_has_no_rule() -> None:
    with pytest.raises(NotImplementedError, match="GroupingRule should implement `groups`"):
        GroupingRule()(torch.zeros(2, 2))
