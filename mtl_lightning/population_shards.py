"""A population spread over processes: who holds which subproblem, and how rows travel between them.

Of ``P`` subproblems each of ``W`` processes holds a block of consecutive ones, ``p`` of them, as rows of its tensors,
shape ``(p, ...)``. Everything here moves rows as they are, to the last bit and whatever their dtype. Every process of
the group has to make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Shards:
    """The distribution of ``P`` subproblems over the processes of a group.

    Blocks are as equal as they can be; the first processes hold one more if ``P`` is not divisible by ``W``, and with
    fewer subproblems than processes the last ones hold none.

    Args:
        size: The number of subproblems ``P``.
        group: The process group; without one this process holds all of them.

    Attributes:
        size: ``P``.
        count: The number of processes ``W``.
        rank: The place of this process in the group.

    Example:
        >>> Shards(size=5).members
        slice(0, 5, None)
    """

    def __init__(self, size: int, group: Any = None) -> None:
        if size < 1:
            raise ValueError(f"`size` should be at least 1. Found {size}.")
        self.size = size
        self.group = group
        self.count = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        small, larger = divmod(size, self.count)
        starts = [small * rank + min(rank, larger) for rank in range(self.count + 1)]
        self.blocks = [range(start, stop) for start, stop in pairwise(starts)]

    @property
    def is_spread(self) -> bool:
        """Whether there are several processes."""
        return self.count > 1

    @property
    def own(self) -> range:
        """The subproblems of this process, ``p`` of them."""
        return self.blocks[self.rank]

    @property
    def members(self) -> slice:
        """The same as a slice."""
        return slice(self.own.start, self.own.stop)

    def owner(self, index: int) -> int:
        """Return the process, by its place in the group, that holds subproblem ``index``."""
        return next(rank for rank, block in enumerate(self.blocks) if index in block)

    def resized(self, size: int) -> Shards:
        """Return the distribution of another number of subproblems over the same processes."""
        return Shards(size, self.group)

    @torch.no_grad()
    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all subproblems, shape ``(P, ...)``, from those of each process, shape ``(p, ...)``."""
        if not self.is_spread:
            return rows
        longest = len(self.blocks[0])
        padded = rows.new_empty(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather([_bytes(part) for part in parts], _bytes(padded), group=self.group)
        return torch.cat([part[: len(block)] for part, block in zip(parts, self.blocks, strict=True)])

    @torch.no_grad()
    def collect(self, rows: Tensor) -> Tensor:
        """Return the rows of all subproblems in the memory of the host, shape ``(P, ...)``, on every process.

        One block at a time passes through the device, so that a population need not fit on it.
        """
        if not self.is_spread:
            return rows.cpu()
        blocks = []
        for rank, block in enumerate(self.blocks):
            part = rows.contiguous() if rank == self.rank else rows.new_empty(len(block), *rows.shape[1:])
            self._broadcast(part, rank)
            blocks.append(part.cpu())
        return torch.cat(blocks)

    @torch.no_grad()
    def scatter(self, rows: Tensor, device: torch.device) -> Tensor:
        """Return this process's rows, ``(p, ...)``, of what the first process holds of all, ``(P, ...)``."""
        if not self.is_spread:
            return rows.to(device)
        own = rows[:0]
        for rank, block in enumerate(self.blocks):
            part = rows[block.start : block.stop].to(device, copy=True, memory_format=torch.contiguous_format)
            self._broadcast(part, 0)
            if rank == self.rank:
                own = part
        return own.to(device)

    @torch.no_grad()
    def fetch(self, rows: Tensor, index: int) -> Tensor:
        """Return the row of subproblem ``index`` on every process, shape ``(...)``."""
        owner = self.owner(index)
        row = rows.new_empty(rows.shape[1:])
        if owner == self.rank:
            row.copy_(rows[index - self.own.start])
        self._broadcast(row, owner)
        return row

    @torch.no_grad()
    def rearrange(self, rows: Tensor, parents: Sequence[int], new: Shards) -> Tensor:
        """Return rows that continue others: row ``i`` of the result is the row of subproblem ``parents[i]``.

        Args:
            rows: The rows of this process, shape ``(p, ...)``.
            parents: For each subproblem of ``new`` the one it continues.
            new: The distribution of the result.
        """
        if not self.is_spread:
            return rows.index_select(0, torch.as_tensor(parents, device=rows.device))
        result = rows.new_empty(len(new.own), *rows.shape[1:])
        for parent in sorted(set(parents)):
            owner = self.owner(parent)
            holders = {new.owner(index) for index, source in enumerate(parents) if source == parent}
            here = [index - new.own.start for index in new.own if parents[index] == parent]
            if holders == {owner}:
                if here:
                    result[here] = rows[parent - self.own.start]
            else:
                row = self.fetch(rows, parent)
                if here:
                    result[here] = row
        return result

    def _broadcast(self, tensor: Tensor, rank: int) -> None:
        if self.is_spread and tensor.numel():
            dist.broadcast(_bytes(tensor), dist.get_global_rank(self.group, rank), group=self.group)


class RowExchange:
    """Brings to each process the rows that it needs of the others, while it computes something else.

    Where every subproblem hears of few others, processes send each other the rows that are asked for; otherwise all
    rows go to all.

    Args:
        shards: Who holds which subproblem.
        givers: Whom each subproblem hears of, shape ``(P, P)``, bool; ``None`` for all.

    Attributes:
        held: The subproblems whose rows :meth:`finish` returns, in ascending order; all of them if ``givers`` is
            ``None``.
        rows_received: How many rows this process receives in each exchange.
    """

    def __init__(self, shards: Shards, givers: Tensor | None) -> None:
        self.shards = shards
        self._wanted = [_wanted(givers, block) for block in shards.blocks]
        own = shards.own
        received = [index for index in self._wanted[shards.rank] if index not in own]
        self.held = list(range(shards.size)) if givers is None else sorted({*own, *received})
        self.rows_received = len(received) if givers is not None else shards.size - len(own)
        self._is_sparse = givers is not None
        self._works: list[Any] = []
        self._kept: list[Tensor] = []
        self._parts: dict[int, Tensor] = {}

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Send off rows, shape ``(p, N)``; they must not change before :meth:`finish`."""
        shards = self.shards
        self._parts = {shards.rank: rows}
        if not shards.is_spread:
            return
        if not self._is_sparse:
            padded = rows.new_empty(len(shards.blocks[0]), *rows.shape[1:])
            padded[: len(rows)] = rows
            parts = [torch.empty_like(padded) for _ in range(shards.count)]
            self._kept = [padded]
            self._works = [
                dist.all_gather([_bytes(part) for part in parts], _bytes(padded), group=shards.group, async_op=True)
            ]
            self._parts |= {
                rank: part[: len(block)]
                for rank, (part, block) in enumerate(zip(parts, shards.blocks, strict=True))
                if rank != shards.rank
            }
            return
        operations = []
        for rank in range(shards.count):
            if rank == shards.rank:
                continue
            peer = dist.get_global_rank(shards.group, rank)
            sent = [index - shards.own.start for index in self._wanted[rank] if index in shards.own]
            asked = [index for index in self._wanted[shards.rank] if index in shards.blocks[rank]]
            if sent:
                self._kept.append(rows[sent])
                operations.append(dist.P2POp(dist.isend, _bytes(self._kept[-1]), peer, group=shards.group))
            if asked:
                self._parts[rank] = rows.new_empty(len(asked), *rows.shape[1:])
                operations.append(dist.P2POp(dist.irecv, _bytes(self._parts[rank]), peer, group=shards.group))
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def finish(self) -> Tensor:
        """Return the rows of the subproblems in :attr:`held`, shape ``(len(held), N)``."""
        for work in self._works:
            work.wait()
        parts = [self._parts[rank] for rank in sorted(self._parts)]
        self._works, self._kept, self._parts = [], [], {}
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _wanted(givers: Tensor | None, block: range) -> list[int]:
    if givers is None or not block:
        return []
    return givers[block.start : block.stop].any(dim=0).nonzero().flatten().tolist()


def _bytes(tensor: Tensor) -> Tensor:
    # Backends differ in the dtypes that they move; all of them move bytes.
    return tensor.view(-1).view(torch.uint8)
