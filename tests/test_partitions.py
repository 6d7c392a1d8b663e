from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, permutations, product
from typing import Any

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from mtl_lightning.partitions import adjusted_rand_index, matched_labels, pair_flip_rate


def _random_partitions(count: int, num_tasks: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(num_tasks)
    return [torch.randint(1 + index % 4, (num_tasks,), generator=generator).tolist() for index in range(count)]


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 13])
def test_adjusted_rand_index_is_that_of_scikit_learn(num_tasks: int) -> None:
    for first, second in product(_random_partitions(12, num_tasks), repeat=2):
        assert adjusted_rand_index(first, second) == pytest.approx(adjusted_rand_score(first, second))


@pytest.mark.parametrize("labels", [[0], [3, 3, 3], [0, 1, 2], [0, 0, 1, 1, 2]])
def test_equal_partitions_agree_fully_whatever_their_labels(labels: list[int]) -> None:
    renamed = [7 - label for label in labels]
    assert adjusted_rand_index(labels, renamed) == 1.0
    assert pair_flip_rate(labels, renamed) == 0.0


def test_adjusted_rand_index_of_random_partitions_is_zero_on_average() -> None:
    first, second = [0, 0, 0, 1, 1], [0, 0, 1, 1, 2]
    values = [adjusted_rand_index(first, order) for order in permutations(second)]
    assert sum(values) / len(values) == pytest.approx(0.0, abs=1e-12)


def test_together_and_apart_flip_every_pair() -> None:
    assert pair_flip_rate([0, 0, 0, 0], [0, 1, 2, 3]) == 1.0


def test_moving_one_task_flips_the_pairs_it_leaves_and_joins() -> None:
    # Task 2 leaves 0 and 1, and joins 3 and 4.
    assert pair_flip_rate([0, 0, 0, 1, 1], [0, 0, 1, 1, 1]) == 4 / 10


@pytest.mark.parametrize("num_tasks", [1, 4, 6])
def test_matched_labels_name_the_same_partition(num_tasks: int) -> None:
    for previous, labels in product(_random_partitions(10, num_tasks), repeat=2):
        assert pair_flip_rate(matched_labels(previous, labels), labels) == 0.0


def _reference_most_kept(previous: list[int], labels: list[int]) -> int:
    groups, names = sorted(set(labels)), range(len(set(previous)) + len(set(labels)))
    assignments = (dict(zip(groups, choice, strict=True)) for choice in permutations(names, len(groups)))
    return max(sum(chosen[b] == a for a, b in zip(previous, labels, strict=True)) for chosen in assignments)


def test_matched_labels_keep_as_many_tasks_as_possible() -> None:
    partitions = [labels for labels in product(range(3), repeat=4) if labels[0] == 0]
    for previous, labels in combinations(partitions, 2):
        matched = matched_labels(previous, labels)
        kept = sum(a == b for a, b in zip(previous, matched, strict=True))
        assert kept == _reference_most_kept(list(previous), list(labels))


def test_a_new_group_has_a_label_that_was_not_in_use() -> None:
    assert matched_labels([0, 0, 2, 2], [0, 1, 2, 2]) in {(0, 1, 2, 2), (1, 0, 2, 2)}


@pytest.mark.parametrize("function", [adjusted_rand_index, pair_flip_rate, matched_labels])
@pytest.mark.parametrize(("first", "second"), [([], []), ([0, 1], [0])])
def test_partitions_of_different_tasks_are_refused(function: Callable[..., Any], first: Any, second: Any) -> None:
    with pytest.raises(ValueError, match="one label for each of the same tasks"):
        function(first, second)
