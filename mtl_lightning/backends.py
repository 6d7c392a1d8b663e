"""The choice of a backend for a population: both are timed on one batch, as briefly as will do.

The loop is timed on a few subproblems, of which one is like the other. Of vmap the first pass counts if it is clearly
faster, in spite of what warming up costs, or clearly slower and so long that warming up is a small part of it.
Otherwise the next ones count.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mtl_lightning.devices import is_read_at_once

if TYPE_CHECKING:
    from mtl_lightning.population import Chunk, Population

_log = logging.getLogger(__name__)

_SLOW = 0.05  # the seconds of a pass from which on one is enough to time it
_LONG = 0.2  # those of a first pass of which warming up is a small part
_CLEAR = 1.5  # the ratio of times from which on one is enough

Backend = Literal["vmap", "loop"]


class _Cost(NamedTuple):
    """What a pass over all subproblems takes, and the bytes that the graph of one chunk holds."""

    seconds: float
    memory: float


def fastest_backend(population: Population, losses_of: Callable[[Chunk], Tensor], given: Any) -> Backend:
    """Return the backend whose forward and backward passes are faster, with a line in the log.

    Nothing of the population changes.

    Args:
        population: With two subproblems at least.
        losses_of: From some of them to their losses on a batch.
        given: The batch, whose memory is not that of a graph.

    Raises:
        RuntimeError: Where not even the loop can do these passes; what it raises. An error that vmap alone meets is
            logged, and the loop is returned.
    """
    costs: dict[Backend, _Cost] = {}
    trial = _Trial(population, losses_of, given)
    with population.rehearsed():
        population.active_backend = "loop"
        costs["loop"] = trial.loop()
        population.active_backend = "vmap"
        try:
            costs["vmap"] = trial.vmap(costs["loop"].seconds)
        except torch.OutOfMemoryError:
            _log.warning("vmap runs out of memory, so the loop is used; a `chunk_size` would bound it.")
        except RuntimeError as error:  # in the forward or the backward pass, which the loop has just done
            _log.warning("vmap cannot run this network, so the loop is used: %s", error.__cause__ or error)
    chosen = min(costs, key=lambda backend: costs[backend].seconds)
    _log.info(
        "Backend %r for %d subproblems (forward and backward: %s).",
        chosen,
        population.size,
        ", ".join(
            f"{name} {1e3 * cost.seconds:.1f} ms with a graph of {cost.memory / 2**20:.1f} MiB"
            for name, cost in costs.items()
        ),
    )
    return chosen


class _Trial:
    """Forward and backward passes of the active backend."""

    def __init__(self, population: Population, losses_of: Callable[[Chunk], Tensor], given: Any) -> None:
        self.population = population
        self.losses_of = losses_of
        self.given = [population.theta, *(leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor))]

    def loop(self) -> _Cost:
        """Return the cost of the loop."""
        memory, _, _ = self.measured()
        return _Cost(self.best(chunks=2, repeats=2), memory)

    def vmap(self, loop: float) -> _Cost:
        """Return the cost of vmap, given the seconds of the loop."""
        memory, seconds, share = self.measured()
        first = seconds / share
        # With a compiler, or on a GPU, the first pass tells nothing of the others.
        is_plain = self.population.compiler is None and is_read_at_once(self.population.theta)
        if is_plain and (first * _CLEAR < loop or (seconds > _LONG and first > loop * _CLEAR)):
            return _Cost(first, memory)
        return _Cost(self.best(chunks=1, repeats=3, other=loop), memory)

    def best(self, chunks: int, repeats: int, other: float = math.nan) -> float:
        """Return the seconds of a pass over all subproblems, from passes over some chunks, the fastest of a few.

        Args:
            chunks: How many there are in a pass.
            repeats: How many passes at most; one is enough if it takes long, or is far from ``other``.
            other: The seconds of the other backend.
        """
        best = math.inf
        for _ in range(repeats):
            seconds, share = self.timed(chunks)
            best = min(best, seconds / share)
            if seconds > _SLOW or best > other * _CLEAR or best * _CLEAR < other:
                break
        return best

    def measured(self) -> tuple[float, float, float]:
        """Return the bytes that the graph of the first chunk holds, and what :meth:`timed` does; this warms up."""
        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, _unchanged):
            seconds, share = self.timed(chunks=1)
        known = {tensor.untyped_storage().data_ptr() for tensor in self.given if tensor.layout is torch.strided}
        return sum(size for place, size in held.items() if place not in known), seconds, share

    def timed(self, chunks: int) -> tuple[float, float]:
        """Return the seconds that some chunks take, and what share of all subproblems they are."""
        population, members = self.population, 0
        population.theta.grad = None
        _synchronize(population.theta.device)
        start = time.perf_counter()
        every = population.chunks()
        for chunk in islice(every, chunks):
            self.losses_of(chunk).sum().backward()  # type: ignore[no-untyped-call]
            members += len(range(population.size)[chunk.members])
        _synchronize(population.theta.device)
        seconds = time.perf_counter() - start
        every.close()  # which writes zeros for the others, what a whole pass does not
        return seconds, members / population.size


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
