"""The mean of task losses over the batches of one optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class LossAverage:
    """The mean of the losses of ``P`` subproblems on ``T`` tasks over some batches, in float32.

    A batch without labels of a task does not count for that task.

    Args:
        num_tasks: The number of tasks ``T``.
    """

    def __init__(self, num_tasks: int) -> None:
        self._counts = [0] * num_tasks
        self._sums: Tensor | None = None

    @property
    def tasks(self) -> tuple[int, ...]:
        """The tasks that had labels in some batch."""
        return tuple(task for task, count in enumerate(self._counts) if count)

    def update(self, losses: Tensor, tasks: Sequence[int]) -> None:
        """Take in the losses of one batch, shape ``(P, T)``; only the columns of ``tasks`` count."""
        if len(tasks) < len(self._counts):
            counted = torch.zeros_like(losses)
            counted[:, list(tasks)] = losses[:, list(tasks)]  # the others hold NaN
            losses = counted
        self._sums = losses if self._sums is None else self._sums + losses
        self._counts = [count + (task in tasks) for task, count in enumerate(self._counts)]

    def compute(self) -> Tensor:
        """Return the means, shape ``(P, T)``; NaN for a task without labels."""
        assert self._sums is not None
        if all(count == 1 for count in self._counts):  # as in most runs
            return self._sums
        return self._sums / torch.tensor([count or torch.nan for count in self._counts], device=self._sums.device)

    def reset(self) -> None:
        """Forget everything."""
        self._sums = None
        self._counts = [0] * len(self._counts)

    def rearrange(self, move: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows of the sums, shape ``(P, T)``, by ``move`` of them."""
        self._sums = None if self._sums is None else move(self._sums)

    def state_dict(self) -> dict[str, Any]:
        """Return sums and counts."""
        return {"sums": self._sums, "counts": list(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take up sums and counts."""
        self._sums = None if state["sums"] is None else state["sums"].to(device)
        self._counts = list(state["counts"])
