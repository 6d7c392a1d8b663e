import itertools
import math

import pytest
import torch
from torch import Tensor

from mtl_lightning.growth import Doubling, Growth, Stage
from mtl_lightning.preferences import riesz_energy, simplex_lattice, simplex_sample

DUPLICATES = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.5, 0.5]])
CASES = [
    pytest.param(torch.tensor([[0.3, 0.7]]), id="P1"),
    pytest.param(simplex_lattice(2, 1), id="P2"),
    pytest.param(simplex_lattice(2, 2), id="P3"),
    pytest.param(simplex_lattice(2, 9), id="P10"),
    pytest.param(simplex_lattice(2, 9).flip(0), id="P10-reversed"),
    pytest.param(simplex_lattice(3, 3), id="T3-lattice"),
    pytest.param(riesz_energy(3, 7, num_steps=10), id="T3-P7"),
    pytest.param(simplex_sample(4, 13, generator=torch.Generator().manual_seed(1)), id="T4-P13"),
    pytest.param(torch.full((6, 2), 0.5), id="all-equal"),
    pytest.param(DUPLICATES, id="duplicates"),
    pytest.param(simplex_lattice(2, 6).double(), id="float64"),
]
cases = pytest.mark.parametrize("preferences", CASES)


def _stages(preferences: Tensor) -> list[Stage]:
    return Doubling(every_n_batches=1).stages(preferences)


def _leaves(stages: list[Stage]) -> list[list[set[int]]]:
    """Return, for each stage and subproblem, which final subproblems descend from it."""
    leaves = [[{index} for index in range(len(stages[-1].preferences))]]
    for stage, parent_stage in zip(reversed(stages[1:]), reversed(stages[:-1]), strict=True):
        parts: list[set[int]] = [set() for _ in parent_stage.preferences]
        for child, parent in enumerate(stage.parents):
            parts[parent] |= leaves[0][child]
        leaves.insert(0, parts)
    return leaves


@cases
def test_there_are_as_many_stages_as_doublings(preferences: Tensor) -> None:
    assert len(_stages(preferences)) == math.ceil(math.log2(len(preferences))) + 1


@cases
def test_stages_double_until_all_are_live(preferences: Tensor) -> None:
    sizes = [len(stage.preferences) for stage in _stages(preferences)]
    assert sizes == [min(2**level, len(preferences)) for level in range(len(sizes))]


@cases
def test_the_last_stage_is_the_preferences_in_their_order(preferences: Tensor) -> None:
    assert torch.equal(_stages(preferences)[-1].preferences, preferences)


@cases
def test_the_first_stage_is_the_centre(preferences: Tensor) -> None:
    first = _stages(preferences)[0]
    assert first.parents == ()
    torch.testing.assert_close(first.preferences, preferences.mean(dim=0, keepdim=True))


@cases
def test_every_stage_is_on_the_simplex(preferences: Tensor) -> None:
    for stage in _stages(preferences):
        assert (stage.preferences >= 0).all()
        torch.testing.assert_close(stage.preferences.sum(dim=1), torch.ones(len(stage.preferences)).to(preferences))


@cases
def test_every_subproblem_has_one_or_two_children(preferences: Tensor) -> None:
    stages = _stages(preferences)
    for stage, children in itertools.pairwise(stages):
        counts = [children.parents.count(parent) for parent in range(len(stage.preferences))]
        assert len(children.parents) == len(children.preferences)
        assert all(count in (1, 2) for count in counts)
        assert sum(counts) == len(children.parents)


@cases
def test_every_subproblem_stands_for_the_mean_of_its_descendants(preferences: Tensor) -> None:
    stages = _stages(preferences)
    for stage, parts in zip(stages, _leaves(stages), strict=True):
        means = torch.stack([preferences[sorted(part)].mean(dim=0) for part in parts])
        torch.testing.assert_close(stage.preferences, means)


@cases
def test_descendants_partition_the_preferences(preferences: Tensor) -> None:
    for parts in _leaves(_stages(preferences)):
        assert sorted(index for part in parts for index in part) == list(range(len(preferences)))


@cases
def test_halves_differ_by_one_at_most(preferences: Tensor) -> None:
    stages = _stages(preferences)
    leaves = _leaves(stages)
    for level, stage in enumerate(stages[1:], start=1):
        for parent, part in enumerate(leaves[level - 1]):
            sizes = [len(leaves[level][child]) for child, own in enumerate(stage.parents) if own == parent]
            assert len(part) == 1 or sorted(sizes) == [len(part) // 2, (len(part) + 1) // 2]


def _clusters(preferences: Tensor, order: list[int]) -> list[set[frozenset[int]]]:
    """Return the clusters of each stage when the preferences come in another order, by their original index."""
    return [
        {frozenset(order[leaf] for leaf in part) for part in parts} for parts in _leaves(_stages(preferences[order]))
    ]


@pytest.mark.parametrize(
    "preferences",
    [
        *(pytest.param(simplex_lattice(2, size - 1), id=f"lattice-P{size}") for size in (2, 3, 4, 5, 7, 10)),
        pytest.param(simplex_sample(2, 9, generator=torch.Generator().manual_seed(0)), id="T2-sample"),
        pytest.param(simplex_sample(3, 11, generator=torch.Generator().manual_seed(0)), id="T3-sample"),
        pytest.param(simplex_lattice(3, 3), id="T3-lattice"),
        pytest.param(simplex_lattice(3, 1), id="T3-corners"),
    ],
)
def test_the_order_of_the_preferences_does_not_matter(preferences: Tensor) -> None:
    expected = _clusters(preferences, list(range(len(preferences))))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        order = torch.randperm(len(preferences), generator=generator).tolist()
        assert _clusters(preferences, order) == expected


@pytest.mark.parametrize("num_divisions", [3, 7, 9])
def test_with_two_tasks_every_subproblem_stands_for_an_interval(num_divisions: int) -> None:
    for parts in _leaves(_stages(simplex_lattice(2, num_divisions))):
        assert all(max(part) - min(part) == len(part) - 1 for part in parts)


@pytest.mark.parametrize("every_n_batches", [1, 3, 100])
def test_a_stage_lasts_for_the_interval(every_n_batches: int) -> None:
    growth = Doubling(every_n_batches)
    live = [growth.stage_at(batch, 4) for batch in range(6 * every_n_batches)]
    assert live == [min(stage, 3) for stage in range(6) for _ in range(every_n_batches)]


def test_one_stage_is_always_live() -> None:
    assert {Doubling(2).stage_at(batch, 1) for batch in range(10)} == {0}


@pytest.mark.parametrize("every_n_batches", [0, -1])
def test_an_interval_of_no_batch(every_n_batches: int) -> None:
    with pytest.raises(ValueError, match=f"`every_n_batches` should be at least 1. Found {every_n_batches}"):
        Doubling(every_n_batches)


def test_a_schedule_has_to_say_when() -> None:
    class Never(Growth):
        pass

    with pytest.raises(NotImplementedError, match="Never should implement `stage_at`"):
        Never().stage_at(0, 1)
