"""Watching over the losses of tasks, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from mtl_lightning.devices import Sent


class TaskHealth(nn.Module):
    """Counts the losses that are not finite, and tells of them and of losses that are not positive.

    What is counted is read on the host one batch later, when the device has long been done with it.

    Args:
        task_names: The names of the ``T`` tasks.
        max_nonfinite: How many losses in a row may be not finite.
        warns_of_nonpositive: Whether to tell of losses that are zero or negative.
        observed: What is not finite where a loss is given that is not, in messages.

    Attributes:
        in_a_row: How many losses of each task were not finite since the last one that was, shape ``(T,)``, int64.
        total: How many were not finite in all, shape ``(T,)``, int64.
    """

    in_a_row: Tensor
    total: Tensor
    nonpositive: Tensor

    def __init__(
        self,
        task_names: Sequence[str],
        max_nonfinite: int,
        warns_of_nonpositive: bool = True,
        observed: str = "loss",
    ) -> None:
        super().__init__()
        self.observed = observed
        self.warns_of_nonpositive = warns_of_nonpositive
        self.task_names = tuple(task_names)
        self.max_nonfinite = max_nonfinite
        self.register_buffer("in_a_row", torch.zeros(len(self.task_names), dtype=torch.int64))
        self.register_buffer("total", torch.zeros(len(self.task_names), dtype=torch.int64))
        self.register_buffer("nonpositive", torch.zeros(len(self.task_names), dtype=torch.int64))
        self.known_total: list[int] = [0] * len(self.task_names)  # as last read
        self._warned: set[tuple[str, str]] = set()
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._pending: Sent | None = None

    @torch.no_grad()
    def observe(self, tasks: Sequence[int], losses: Tensor) -> None:
        """Take in the losses of ``tasks``, which have labels; ``losses`` has shape ``(T,)``."""
        mask = self._mask(tasks)
        failed = mask & ~losses.isfinite()
        self.total.add_(failed)
        self.in_a_row.copy_(torch.where(failed, self.in_a_row + 1, torch.where(mask, 0, self.in_a_row)))
        self.nonpositive.add_(mask & (losses <= 0))

    def finish_batch(self) -> None:
        """Report what was counted up to the batch before, and send off what is counted now.

        Raises:
            FloatingPointError: If a task has failed more often in a row than it may; on all ranks alike.
        """
        self.report()
        self._pending = Sent(torch.stack([self.in_a_row, self.total, self.nonpositive]))

    def report(self) -> None:
        """Read what was sent off, and report it.

        Raises:
            FloatingPointError: See :meth:`finish_batch`.
        """
        if self._pending is None:
            return
        in_a_row, self.known_total, nonpositive = self._pending.read().tolist()
        self._pending = None
        for task, name in enumerate(self.task_names):
            if in_a_row[task] >= self.max_nonfinite:
                raise FloatingPointError(
                    f"The {self.observed} of task {name!r} should be finite. Found {in_a_row[task]} in a row that "
                    "were not (`max_nonfinite`). Lower the learning rate, set `gradient_clip_norm`, or look for "
                    "invalid values in its targets."
                )
            if self.known_total[task]:
                self._warn(
                    name,
                    f"The {self.observed} of task {name!r} is not finite. The task is left out of such batches; see "
                    "the log.",
                )
            if nonpositive[task] and self.warns_of_nonpositive:
                self._warn(
                    name,
                    f"The loss of task {name!r} is zero or negative. It is trained, but kept out of the affinity, "
                    "which is a ratio of losses. Add a constant to the loss if its affinity matters.",
                )

    def _warn(self, name: str, message: str) -> None:
        if (name, message) not in self._warned:
            self._warned.add((name, message))
            rank_zero_warn(message)

    def _mask(self, tasks: Sequence[int]) -> Tensor:
        key = tuple(tasks)
        if key not in self._masks or self._masks[key].device != self.in_a_row.device:
            self._masks[key] = torch.zeros_like(self.in_a_row, dtype=torch.bool)
            for task in key:
                self._masks[key][task].fill_(True)  # an index made of Python numbers would be copied to the device
        return self._masks[key]
