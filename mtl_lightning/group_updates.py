"""The course of selective task group updates: which groups step in a batch, in which order, and what they teach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtl_lightning.affinity import ProximalAffinity
from mtl_lightning.devices import Sent
from mtl_lightning.grouping import GroupingRule, check_partition
from mtl_lightning.seeds import mix_seed


class _ReadAhead:
    """The affinity on its way from the device, which goes on with its work meanwhile."""

    def __init__(self) -> None:
        self._sent: Sent | None = None
        self._versions: list[tuple[int, int]] = []

    def send(self, affinity: ProximalAffinity) -> None:
        """Send off the matrix as it will be after what the device has been given to do."""
        self._sent, self._versions = Sent(affinity.matrix), self._versions_of(affinity)

    def take(self, affinity: ProximalAffinity) -> Tensor:
        """Return the matrix on the host: what was sent off, unless the affinity has changed since."""
        sent, self._sent = self._sent, None
        if sent is None or self._versions != self._versions_of(affinity):
            return affinity.matrix.cpu()
        return sent.read()

    @staticmethod
    def _versions_of(affinity: ProximalAffinity) -> list[tuple[int, int]]:
        return [(id(tensor), tensor._version) for tensor in (affinity.average, affinity.counts)]

    def __reduce__(self) -> Any:
        return type(self), ()  # the versions are not those of a copy


class GroupUpdates(nn.Module):
    """The partition of the tasks, the order of the groups in a batch, and the affinity measured between their steps.

    In each batch

    ::

        for group in updates.begin(batch, seed):
            losses of all tasks, on the same batch and with the same random numbers
            updates.observe(group, losses)
            one step for the losses of this group
        if the last step is to be measured:
            updates.observe(None, losses)

    From a CUDA device the affinity is sent to the host with the last of these losses, before the backward pass that
    follows them: the groups of the next batch are made while the device is busy with that pass.

    Args:
        grouping: The rule that makes groups from the affinity.
        affinity: The tracker of the affinity.
        warmup_batches: For how many batches every task is alone, so that the affinity of all of them is measured; rules
            that do not read the affinity need none, and get none.
        regroup_every: After how many batches the rule is asked again.
        shuffle: Whether groups are updated in random order, or in that of their first task.
        single_group: Whether a group that is all alone steps once on a batch, or twice, as in the official code, where
            the second pass measures the first step.

    Attributes:
        partition: The groups now in use; a list of lists of task indices.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> from mtl_lightning.grouping import Fixed
        >>> updates = GroupUpdates(Fixed([[0, 1], [2]]), ProximalAffinity(num_tasks=3), shuffle=False)
        >>> for group in updates.begin(batch=0, seed=0):
        ...     losses = torch.tensor([0.5, 0.5, 2.0]) if 0 in group else torch.tensor([0.18, 0.045, 3.38])
        ...     updates.observe(group, losses)
        >>> updates.affinity.matrix[0]
        tensor([ 0.3200,  0.4550, -0.3450], dtype=torch.float64)
    """

    def __init__(
        self,
        grouping: GroupingRule,
        affinity: ProximalAffinity,
        *,
        warmup_batches: int = 100,
        regroup_every: int = 1,
        shuffle: bool = True,
        single_group: Literal["repeat", "once"] = "repeat",
    ) -> None:
        super().__init__()
        if warmup_batches < 0:
            raise ValueError(f"`warmup_batches` should be at least 0. Found {warmup_batches}.")
        if regroup_every < 1:
            raise ValueError(f"`regroup_every` should be at least 1. Found {regroup_every}.")
        if single_group not in ("repeat", "once"):
            raise ValueError(f"`single_group` should be 'repeat' or 'once'. Found {single_group!r}.")
        self.grouping = grouping
        self.affinity = affinity
        self.warmup_batches = warmup_batches
        self.regroup_every = regroup_every
        self.shuffle = shuffle
        self.single_group = single_group
        self.partition: list[list[int]] = [[task] for task in range(affinity.num_tasks)]
        self._regrouped_at: int | None = None
        self._stepped: Sequence[int] | None = None
        self._before: Tensor | None = None
        self._read_ahead = _ReadAhead()
        self._next_batch = 0

    def begin(self, batch: int, seed: int) -> list[list[int]]:
        """Return the groups of a batch, in the order of their updates.

        Args:
            batch: The number of the batch, from zero.
            seed: Of the order, with ``batch``; equal on all ranks.

        Raises:
            ValueError: If the rule returns no partition.
        """
        self.forget()
        self._next_batch = batch + 1
        if self._is_due(batch):
            reads = self.grouping.reads_affinity
            self.partition = self.grouping(self._read_ahead.take(self.affinity) if reads else self.affinity.matrix)
            check_partition(self.partition, self.affinity.num_tasks, self.grouping)
            self._regrouped_at = batch
        order = list(self.partition)
        if self.shuffle and len(order) > 1:
            # From the seed and the batch alone: ranks agree, and a resumed run goes on as it would have.
            generator = torch.Generator().manual_seed(mix_seed(seed, batch))
            order = [order[place] for place in torch.randperm(len(order), generator=generator).tolist()]
        return order * 2 if len(order) == 1 and self.single_group == "repeat" else order

    def observe(self, group: Sequence[int] | None, losses: Tensor, *, is_last: bool = False) -> None:
        """Take up the losses of all tasks just before the step of ``group``: they are those after the step before it.

        Args:
            group: The tasks that step next; ``None`` after the last step.
            losses: Of all tasks, shape ``(T,)``, unweighted; NaN where there is none.
            is_last: Whether nothing else is observed in this batch, so that the affinity may be sent to the host.
        """
        if self._stepped is not None and self._before is not None:
            self.affinity.update(self._stepped, self._before, losses, next_group=group)
        self._stepped, self._before = group, losses
        is_read_next = self.grouping.reads_affinity and self._is_due(self._next_batch)
        if is_last and is_read_next and self.affinity.average.is_cuda:
            self._read_ahead.send(self.affinity)

    def forget(self) -> None:
        """Leave the last step unmeasured: at the end of a batch, or if that step did not happen."""
        self._stepped = self._before = None

    def _is_due(self, batch: int) -> bool:
        reads = self.grouping.reads_affinity
        if reads and batch < self.warmup_batches:
            return False
        return self._regrouped_at is None or batch - self._regrouped_at >= self.regroup_every

    def get_extra_state(self) -> dict[str, Any]:
        """Return the partition and its age."""
        return {"partition": self.partition, "regrouped_at": self._regrouped_at}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the partition of a checkpoint."""
        self.partition, self._regrouped_at = state["partition"], state["regrouped_at"]
