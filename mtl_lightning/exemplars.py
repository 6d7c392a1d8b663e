"""Exemplar clustering: the similarity of tasks, and the exact optimum of affinity propagation's objective.

A set ``S`` of exemplars, not empty, has the value ``|S| p + sum_{i not in S} max_{j in S} X_ij``, with the similarity
``X``, shape ``(T, T)``, and the preference ``p``. The greater ``p``, the more exemplars. Every other task joins the
exemplar that it resembles most. Affinity propagation looks for the best set by passing messages; for as few tasks as
most networks have, all ``2^T - 1`` sets can be compared.

References:
    B. J. Frey, D. Dueck, "Clustering by passing messages between data points", Science 315, 2007.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_TASKS = 16  # 65,535 sets and some 10 MB


def normalized_affinity(affinity: Tensor, floor: float = 1e-6) -> Tensor:
    """Return ``X``, shape ``(T, T)``: ``E_sk / E_kk``, symmetrised, with a unit diagonal.

    Args:
        affinity: ``E`` from row to column, shape ``(T, T)``, finite.
        floor: The least ``E_kk``, as a share of the greatest absolute entry of ``E``; above 0.
    """
    least = max(floor * affinity.abs().max().item(), torch.finfo(affinity.dtype).tiny)
    ratios = affinity / affinity.diagonal().clamp(min=least)  # column k by the self-affinity of task k
    return ((ratios + ratios.T) / 2).fill_diagonal_(1.0)


def median_preference(similarity: Tensor, include_diagonal: bool = True) -> float:
    """Return the median of ``similarity``, shape ``(T, T)``; of an even number the mean of the middle two.

    Args:
        similarity: The similarity of the tasks.
        include_diagonal: Whether its diagonal counts. A single task has nothing else.
    """
    matrix = similarity.numpy()
    if not include_diagonal and len(matrix) > 1:
        matrix = matrix[~np.eye(len(matrix), dtype=bool)]
    return float(np.median(matrix))


def sorted_tasks(similarity: Tensor) -> list[int]:
    """Return the tasks in an order that does not depend on their numbers, unless two have the same similarities.

    Args:
        similarity: The similarity of the tasks, shape ``(T, T)``.
    """
    rows = [sorted(row, reverse=True) for row in similarity.tolist()]
    return sorted(range(len(rows)), key=lambda task: (rows[task], task))


def best_exemplars(similarity: Tensor, preference: float, *, merge_ties: bool = False) -> list[list[int]]:
    """Return the clusters of the best exemplars, each ascending, by comparison of all sets.

    Sets whose values differ by less than a relative ``1e-9`` tie. A tie goes to more exemplars (to fewer if
    ``merge_ties``), and then to those that come first in :func:`sorted_tasks`; so does a task that resembles several
    exemplars equally.

    Args:
        similarity: ``X``, shape ``(T, T)``, float64 on the CPU; symmetric, and its diagonal is not read.
        preference: The value ``p`` of an exemplar.
        merge_ties: Whether a tie goes to fewer exemplars.

    Raises:
        ValueError: If there are more than 16 tasks.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]], dtype=torch.float64)
        >>> best_exemplars(similarity, preference=0.5)
        [[0, 1], [2]]
    """
    size = len(similarity)
    if size > MOST_TASKS:
        raise ValueError(
            f"`similarity` should be of at most {MOST_TASKS} tasks for an exact search. Found {size}: use affinity "
            "propagation."
        )
    order = sorted_tasks(similarity)
    matrix = similarity.numpy()[np.ix_(order, order)]
    members, ranks = _sets(size)
    nearest = np.full((size, 2**size), -np.inf)  # of each task the similarity to the nearest member of each set
    for place in range(size):
        half = 2**place  # sets of the last tasks only, then each of them together with the task before these
        task = size - 1 - place
        np.maximum(nearest[:, :half], matrix[:, task : task + 1], out=nearest[:, half : 2 * half])
    np.copyto(nearest, preference, where=members)
    values = nearest.sum(axis=0)
    values[0] = -np.inf  # the empty set
    tolerance = 1e-9 * max(1.0, abs(preference)) + 1e-13 * np.abs(matrix).max()
    tied = np.flatnonzero(values >= values.max() - tolerance)
    best = tied[np.argmax(ranks[int(merge_ties), tied])]
    exemplars = np.flatnonzero(members[:, best])
    nearest_exemplar = exemplars[np.argmax(matrix[:, exemplars], axis=1)]
    nearest_exemplar[exemplars] = exemplars
    clusters: dict[int, list[int]] = {}
    for task, exemplar in zip(order, nearest_exemplar.tolist(), strict=True):
        clusters.setdefault(exemplar, []).append(task)
    return sorted(sorted(cluster) for cluster in clusters.values())


@lru_cache(maxsize=4)
def _sets(size: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return who is in which set, shape ``(T, 2^T)``, and the ranks in ties, to more and to fewer, ``(2, 2^T)``."""
    numbers = np.arange(2**size, dtype=np.int64)
    # The first task is the highest bit: among sets of one size, the greatest number has the first tasks.
    members: NDArray[Any] = (numbers >> np.arange(size - 1, -1, -1)[:, None]) & 1
    counts = members.sum(axis=0)
    ranks = np.stack([counts * 2**size + numbers, -counts * 2**size + numbers])
    return members.astype(bool), ranks
