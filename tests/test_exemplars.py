import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtl_lightning.exemplars import best_exemplars, median_preference, normalized_affinity, sorted_tasks

PREFERENCES = [-0.9, 0.0, 0.3, 0.8]


def _random(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(size, size, generator=generator, dtype=torch.float64) * 2 - 1
    return ((values + values.T) / 2).fill_diagonal_(1.0)


def _with_ties(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, (size, size), generator=generator).double() / 2
    return values.tril(-1) + values.tril(-1).T + torch.eye(size, dtype=torch.float64)


def _reference_best_exemplars(similarity: Tensor, preference: float, merge_ties: bool = False) -> list[list[int]]:
    x = similarity.tolist()
    order = sorted_tasks(similarity)
    best: tuple[float, int] | None = None
    chosen: tuple[int, ...] = ()
    for count in range(1, len(x) + 1):
        for exemplars in itertools.combinations(order, count):  # the first in the order come first
            value = sum(preference if i in exemplars else max(x[i][j] for j in exemplars) for i in order)
            key = (round(value, 8), -count if merge_ties else count)
            if best is None or key > best:
                best, chosen = key, exemplars
    clusters: dict[int, list[int]] = {exemplar: [exemplar] for exemplar in chosen}
    for task in order:
        if task not in clusters:
            clusters[max(chosen, key=lambda exemplar: x[task][exemplar])].append(task)
    return sorted(sorted(cluster) for cluster in clusters.values())


def _value(similarity: Tensor, preference: float, partition: list[list[int]]) -> float:
    x = similarity.tolist()
    return sum(preference + max(sum(x[i][j] for i in group if i != j) for j in group) for group in partition)


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_equals_the_search_in_words(size: int, preference: float) -> None:
    for seed in range(6):
        similarity = _random(size, seed)
        assert best_exemplars(similarity, preference) == _reference_best_exemplars(similarity, preference)


@pytest.mark.parametrize("merge_ties", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_ties_follow_the_rule(size: int, merge_ties: bool) -> None:
    for seed in range(15):
        similarity = _with_ties(size, seed)
        for preference in (-0.5, 0.0, 0.5):
            found = best_exemplars(similarity, preference, merge_ties=merge_ties)
            assert found == _reference_best_exemplars(similarity, preference, merge_ties)


@pytest.mark.parametrize("size", [3, 5, 8, 12])
def test_no_partition_has_a_greater_value(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        similarity = _random(size, seed)
        best = _value(similarity, 0.2, best_exemplars(similarity, 0.2))
        for _ in range(50):
            labels = torch.randint(size, (size,), generator=generator).tolist()
            partition = [[task for task in range(size) if labels[task] == label] for label in set(labels)]
            assert _value(similarity, 0.2, partition) <= best + 1e-9


@pytest.mark.parametrize("make", [_random, _with_ties])
@pytest.mark.parametrize("size", [3, 6, 9])
def test_a_value_does_not_depend_on_the_order_of_tasks(size: int, make: Callable[[int, int], Tensor]) -> None:
    for seed in range(5):
        similarity = make(size, seed)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
        permuted = best_exemplars(similarity[order][:, order], 0.25)
        original = best_exemplars(similarity, 0.25)
        assert len(permuted) == len(original)
        assert _value(similarity[order][:, order], 0.25, permuted) == pytest.approx(_value(similarity, 0.25, original))


@pytest.mark.parametrize("size", [2, 4, 9])
def test_a_shift_of_similarities_and_preference_changes_nothing(size: int) -> None:
    for seed in range(10):
        similarity = _random(size, seed)
        assert best_exemplars(similarity + 0.75, 0.25 + 0.75) == best_exemplars(similarity, 0.25)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e6])
def test_a_scale_of_similarities_and_preference_changes_nothing(scale: float) -> None:
    for seed in range(10):
        similarity = _random(6, seed)
        assert best_exemplars(similarity * scale, 0.25 * scale) == best_exemplars(similarity, 0.25)


def test_the_diagonal_is_not_read() -> None:
    similarity = _random(6, 0)
    assert best_exemplars(similarity.clone().fill_diagonal_(7.0), 0.25) == best_exemplars(similarity, 0.25)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_preference_sets_the_number_of_groups(size: int) -> None:
    similarity = _random(size, 1)
    assert best_exemplars(similarity, 10.0) == [[task] for task in range(size)]
    assert best_exemplars(similarity, -10.0) == [list(range(size))]
    counts = [len(best_exemplars(similarity, preference)) for preference in torch.linspace(-3.0, 3.0, 25).tolist()]
    assert counts == sorted(counts)


def test_blocks_are_found_among_the_most_tasks() -> None:
    labels = torch.arange(16) % 3
    similarity = (labels[:, None] == labels).double()
    assert best_exemplars(similarity, 0.5) == [[i for i in range(16) if i % 3 == label] for label in range(3)]


def test_the_similarity_is_left_as_it_is() -> None:
    similarity = _random(5, 0)
    before = similarity.clone()
    best_exemplars(similarity, 0.5)
    assert torch.equal(similarity, before)


def test_refuses_more_tasks_than_can_be_searched() -> None:
    with pytest.raises(ValueError, match=r"`similarity` should be of at most 16 tasks.*Found 17: use affinity propag"):
        best_exemplars(torch.eye(17, dtype=torch.float64), 0.5)


def test_affinities_are_normalised_by_the_target() -> None:
    affinity = torch.tensor([[2.0, 1.0, 0.0], [4.0, 4.0, -8.0], [1.0, 2.0, 8.0]], dtype=torch.float64)
    # 1/4 and 4/2; 0/8 and 1/2; -8/8 and 2/4
    expected = torch.tensor([[1.0, 1.125, 0.25], [1.125, 1.0, -0.25], [0.25, -0.25, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(normalized_affinity(affinity), expected)


@pytest.mark.parametrize("own", [0.0, -1.0, -1e-9])
def test_a_task_that_does_not_help_itself_is_divided_by_the_floor(own: float) -> None:
    affinity = torch.tensor([[own, 0.0], [0.5, 1.0]], dtype=torch.float64)
    assert normalized_affinity(affinity, floor=0.1)[0, 1].item() == pytest.approx(0.5 / 0.1 / 2)


@pytest.mark.parametrize(("include_diagonal", "expected"), [(True, 0.45), (False, 0.3)])
def test_the_preference_is_the_median(include_diagonal: bool, expected: float) -> None:
    # Off the diagonal 0.1, 0.2, 0.3, 0.3, 0.6, 0.7, each twice; on it four ones.
    x = [[1.0, 0.1, 0.2, 0.3], [0.1, 1.0, 0.3, 0.6], [0.2, 0.3, 1.0, 0.7], [0.3, 0.6, 0.7, 1.0]]
    similarity = torch.tensor(x, dtype=torch.float64)
    assert median_preference(similarity, include_diagonal) == pytest.approx(expected)


def test_the_preference_of_a_single_task_is_its_diagonal() -> None:
    assert median_preference(torch.ones(1, 1, dtype=torch.float64), include_diagonal=False) == 1.0


def test_sorted_tasks_follow_a_permutation() -> None:
    similarity = _random(7, 3)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0)).tolist()
    assert [order[task] for task in sorted_tasks(similarity[order][:, order])] == sorted_tasks(similarity)
