"""Growth: start with few subproblems and split them until every preference has its own.

With a common start, neighbouring subproblems barely differ at first, so that training ``P`` of them wastes work. A
growing population starts with one subproblem at the centre of the preferences and splits each into two children, which
inherit the parameters, the buffers and the state of the optimiser: a transfer of mass one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Stage(NamedTuple):
    """A set of live subproblems.

    Attributes:
        preferences: Their preference vectors, shape ``(p, T)``.
        parents: For each, the subproblem of the stage before from which it inherits; empty in the first stage.
    """

    preferences: Tensor
    parents: tuple[int, ...]


class Growth:
    """Base of the growth schedules: a tree over the preferences, and when to go one level down.

    The tree halves the preferences along their principal axis, again and again, until each is alone; a subproblem
    stands for a part by the mean of its preferences. With ``P`` preferences there are ``ceil(log2 P) + 1`` stages.
    """

    def stages(self, preferences: Tensor) -> list[Stage]:
        """Return the stages from one subproblem to all ``P``; the last holds ``preferences`` in their own order.

        Args:
            preferences: The final preference vectors, shape ``(P, T)``.
        """
        parts: list[list[int]] = [list(range(len(preferences)))]
        stages = [Stage(_centres(preferences, parts), ())]
        while any(len(part) > 1 for part in parts):
            children = [(half, parent) for parent, part in enumerate(parts) for half in _halves(preferences, part)]
            children.sort(key=lambda child: min(child[0]))
            parts = [part for part, _ in children]
            stages.append(Stage(_centres(preferences, parts), tuple(parent for _, parent in children)))
        return stages

    def stage_at(self, batch: int, num_stages: int) -> int:
        """Return which stage is live in batch ``batch``, counted from zero over the whole run."""
        raise NotImplementedError(f"{type(self).__name__} should implement `stage_at`.")


class Doubling(Growth):
    """Doubling the number of subproblems at equal intervals: 1, 2, 4, ... up to ``P``.

    Args:
        every_n_batches: How many batches each stage but the last is trained for.

    Raises:
        ValueError: If the interval is less than one batch.

    Example:
        >>> from mtl_lightning.preferences import simplex_lattice
        >>> growth = Doubling(every_n_batches=100)
        >>> stages = growth.stages(simplex_lattice(num_tasks=2, num_divisions=3))
        >>> [len(stage.preferences) for stage in stages]
        [1, 2, 4]
        >>> [growth.stage_at(batch, len(stages)) for batch in (0, 99, 100, 250, 10_000)]
        [0, 0, 1, 2, 2]
    """

    def __init__(self, every_n_batches: int) -> None:
        if every_n_batches < 1:
            raise ValueError(f"`every_n_batches` should be at least 1. Found {every_n_batches}.")
        self.every_n_batches = every_n_batches

    def stage_at(self, batch: int, num_stages: int) -> int:
        """Return which stage is live in batch ``batch``, counted from zero over the whole run."""
        return min(batch // self.every_n_batches, num_stages - 1)


def _centres(preferences: Tensor, parts: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack(
        [preferences[list(part)].mean(dim=0) if len(part) > 1 else preferences[part[0]] for part in parts]
    )


def _halves(preferences: Tensor, part: list[int]) -> list[list[int]]:
    if len(part) == 1:
        return [part]
    # In an order of their own, so that neither rounding nor ties depend on the order of the preferences.
    part = sorted(part, key=lambda index: (preferences[index].tolist(), index))
    points = preferences[part].double()
    axis = torch.linalg.svd(points - points.mean(dim=0), full_matrices=False).Vh[0]
    axis = axis * torch.sign(axis[axis.abs().argmax()])  # the sign of a singular vector is arbitrary
    along = (points @ axis).tolist()
    ordered = sorted(range(len(part)), key=lambda place: (round(along[place], 9), place))
    middle = (len(part) + 1) // 2
    return [sorted(part[place] for place in ordered[:middle]), sorted(part[place] for place in ordered[middle:])]
