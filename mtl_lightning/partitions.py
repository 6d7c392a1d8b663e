"""How much two partitions of the same tasks agree.

A partition is given by its labels: ``T`` integers, equal for tasks in the same group. Which integers they are means
nothing.

References:
    L. Hubert, P. Arabie, "Comparing Partitions", Journal of Classification 2, 1985.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations

import numpy as np
from scipy.optimize import linear_sum_assignment


def adjusted_rand_index(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the Rand index of two partitions, adjusted for chance: 1 if they are equal, 0 on average for random ones.

    Args:
        first: The labels of one partition, ``T`` integers.
        second: The labels of the other one.

    Raises:
        ValueError: If there are no labels, or their numbers differ.

    Example:
        >>> adjusted_rand_index([0, 0, 1, 1], [5, 5, 2, 2])
        1.0
        >>> round(adjusted_rand_index([0, 0, 1, 1], [0, 0, 1, 2]), 3)
        0.571
    """
    _check(first, second)
    in_both = _count_pairs(zip(first, second, strict=True))
    in_first, in_second = _count_pairs(first), _count_pairs(second)
    if in_both == in_first == in_second:
        return 1.0  # also where there is nothing to adjust: all tasks together, or each alone, in both
    expected = in_first * in_second / math.comb(len(first), 2)
    return (in_both - expected) / ((in_first + in_second) / 2 - expected)


def pair_flip_rate(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the share of task pairs that are together in one partition and apart in the other, in [0, 1].

    Args:
        first: The labels of one partition, ``T`` integers.
        second: The labels of the other one.

    Raises:
        ValueError: If there are no labels, or their numbers differ.

    Example:
        >>> round(pair_flip_rate([0, 0, 1, 1], [0, 0, 1, 2]), 3)
        0.167
    """
    _check(first, second)
    pairs = list(combinations(range(len(first)), 2))
    flips = sum((first[a] == first[b]) != (second[a] == second[b]) for a, b in pairs)
    return flips / len(pairs) if pairs else 0.0


def matched_labels(previous: Sequence[int], labels: Sequence[int]) -> tuple[int, ...]:
    """Return the partition ``labels``, renamed so that as many tasks as possible keep their ``previous`` label.

    A group without a predecessor gets the smallest label from 0 on that neither partition uses yet.

    Args:
        previous: The labels to stay close to, ``T`` integers.
        labels: The labels to rename, ``T`` integers.

    Raises:
        ValueError: If there are no labels, or their numbers differ.

    Example:
        >>> matched_labels([0, 0, 1, 1], [1, 0, 0, 0])
        (0, 1, 1, 1)
        >>> matched_labels([0, 0, 1, 1], [7, 7, 5, 6])
        (0, 0, 1, 2)
    """
    _check(previous, labels)
    old, new = sorted(set(previous)), list(dict.fromkeys(labels))
    overlap = np.zeros((len(new), len(old)), dtype=np.int64)
    for before, now in zip(previous, labels, strict=True):
        overlap[new.index(now), old.index(before)] += 1
    matches = zip(*(axis.tolist() for axis in linear_sum_assignment(overlap, maximize=True)), strict=True)
    names = {new[row]: old[column] for row, column in matches if overlap[row, column] > 0}
    free = (label for label in range(len(old) + len(new)) if label not in old)
    for label in new:
        if label not in names:
            names[label] = next(free)
    return tuple(names[label] for label in labels)


def _count_pairs(labels: Iterable[Hashable]) -> int:
    """Return how many pairs have the same label."""
    return sum(math.comb(count, 2) for count in Counter(labels).values())


def _check(first: Sequence[int], second: Sequence[int]) -> None:
    if len(first) == 0 or len(first) != len(second):
        raise ValueError(
            f"Two partitions should have one label for each of the same tasks. Found {len(first)} and {len(second)}."
        )
