"""The transfer of parameters: ``(M - I) theta`` for a population that may be spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mtl_lightning.devices import is_read_at_once, may_be_any
from mtl_lightning.population import Population
from mtl_lightning.population_shards import RowExchange, Shards

_MANY_ROWS = 64  # from which on a product with all of them costs more than sums over the few that give

# How many columns are mixed at a time: a call costs little beside them, and what is read once is still in the caches
# when it is written. No multiple of 4096 bytes, at whose distances rows push each other out of the caches.
_COLUMNS_AT_ONCE = 2**16 + 16
_NUMBERS_TRIED = 2**15  # sums in another order differ in one of a thousand, and more often
_NARROW = 16  # fewer columns are left to kernels of their own, which sum in an order of their own

_Multiply = Callable[[Tensor, Tensor | None], Tensor]


class Mixing:
    """Adds ``(M - I) theta`` to the parameters, and mixes the buffers.

    Only rows that may have weight are exchanged among processes, while they compute the gradients: a transfer uses the
    parameters of before the step. Where a rule names its givers the sum runs over them in a fixed order, so that the
    result does not depend on the number of processes, to the last bit.

    Args:
        population: The subproblems of this process.
        shards: Who holds which subproblem.
        givers: Whom each subproblem may hear of, shape ``(P, P)``, bool; ``None`` for all.
        patterns: Shell patterns of the names of the parameters and buffers that are mixed; all by default.

    Raises:
        ValueError: If a pattern matches nothing.
    """

    def __init__(
        self,
        population: Population,
        shards: Shards,
        givers: Tensor | None = None,
        patterns: Sequence[str] | None = None,
    ) -> None:
        self.population = population
        self.shards = shards
        self.patterns = patterns
        self._columns = population.columns(patterns)
        self._takes_all = self._columns == [slice(0, population.theta.shape[1])]
        device = population.theta.device
        givers = None if givers is None else givers.cpu()
        self.exchange = RowExchange(shards, givers)
        self._held = torch.tensor(self.exchange.held, dtype=torch.long, device=device)
        self._identity = torch.eye(shards.size, device=device)[shards.members]
        self._listens: Tensor | None = None
        self._sources: tuple[Tensor, Tensor, Tensor] | None = None
        if givers is not None:
            self._listens = givers[shards.members].to(device) | (self._identity > 0)
            heard, places, is_heard = self._find_sources(givers)
            self._sources = (heard.to(device), places.to(device), is_heard.to(device))
        own_places = [self.exchange.held.index(index) for index in shards.own]
        self._own_places = torch.tensor(own_places, dtype=torch.long, device=device).unsqueeze(1)
        self._memory: Tensor | None = None  # of the latest step
        self._agrees: dict[tuple[torch.dtype, int], bool] = {}
        self._started = False

    def start(self) -> None:
        """Send off the parameters; they must not change before they are mixed."""
        theta = self.population.theta.detach()
        self.exchange.start(theta if self._sources is None else self._picked(theta))
        self._started = True

    @torch.no_grad()
    def receive(self) -> Tensor:
        """Return the parameters of the subproblems that this process hears of.

        With givers these are the columns that are mixed. Without them they are all columns of all subproblems, shape
        ``(P, D)``, since a rule that hears of all may read them. In one process they may be the parameters themselves.
        """
        if not self._started:
            self.start()
        self._started = False
        return self.exchange.finish()

    @torch.no_grad()
    def mix(self, rows: Tensor, matrix: Tensor, healthy: Tensor) -> None:
        """Add ``(M - I) theta`` to the parameters of this process.

        Where all parameters are mixed on a CPU it is done part by part, in the memory of one part. The parameters of
        before are gone then, with ``rows`` if they are the same.

        Args:
            rows: What :meth:`receive` returned.
            matrix: ``M``, shape ``(P, P)``; its rows sum to one.
            healthy: Shape ``(P,)``, bool. The rows of the others may hold NaN; ``M`` gives them no weight.
        """
        theta = self.population.theta.data
        if not (self._takes_all and is_read_at_once(theta) and self._multiplies(rows)):
            self.add(self.step(rows, matrix, healthy))
            return
        multiply = self._multiplication(matrix, healthy, rows.dtype, True)
        for part in _parts(theta.shape[1]):
            theta[:, part].add_(multiply(rows[:, part], self._memory_for(rows, part.stop - part.start)))

    @torch.no_grad()
    def step(self, rows: Tensor, matrix: Tensor, healthy: Tensor) -> Tensor:
        """Return what :meth:`mix` would add to the columns that are mixed, until the next call; see there."""
        return self._mixed(self._picked(rows) if self._sources is None else rows, matrix, healthy, is_kept=True)

    @torch.no_grad()
    def add(self, step: Tensor) -> None:
        """Add what :meth:`step` returned to the parameters of this process."""
        theta = self.population.theta.data
        pieces = torch.split(step, [part.stop - part.start for part in self._columns], dim=1)
        for part, piece in zip(self._columns, pieces, strict=True):
            theta[:, part].add_(piece)

    @torch.no_grad()
    def mix_buffers(self, matrix: Tensor, healthy: Tensor) -> None:
        """Replace every floating-point buffer by its mixture under ``matrix``; others stay."""
        buffers = self.population.floating_buffers(self.patterns)
        if not buffers:
            return
        for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
            some = [buffer for buffer in buffers if buffer.dtype == dtype]
            own = torch.cat([buffer.reshape(len(buffer), buffer.shape[1:].numel()) for buffer in some], dim=1)
            self.exchange.start(own)
            # Infinite entries are constants, such as those of attention masks, and stay.
            rows = self.exchange.finish()
            rows = rows.masked_fill(~rows.isfinite(), 0.0)
            step = self._mixed(rows, matrix, healthy)
            widths = [buffer.shape[1:].numel() for buffer in some]
            for buffer, piece in zip(some, torch.split(step, widths, dim=1), strict=True):
                buffer.add_(piece.view_as(buffer))

    def _picked(self, theta: Tensor) -> Tensor:
        if self._takes_all:
            return theta
        if not self._columns:
            return theta[:, :0]
        return torch.cat([theta[:, part] for part in self._columns], dim=1)

    def _mixed(self, rows: Tensor, matrix: Tensor, healthy: Tensor, is_kept: bool = False) -> Tensor:
        """Return the rows of ``(M - I) theta`` of this process; ``is_kept`` tells whether in memory that is kept."""
        multiplies = self._multiplies(rows)
        multiply = self._multiplication(matrix, healthy, rows.dtype, multiplies)
        if not (multiplies and is_read_at_once(rows)):
            return multiply(rows, None)
        width = rows.shape[1]
        mixed = self._memory_for(rows, width) if is_kept else rows.new_empty(len(self._own_places), width)
        for part in _parts(width):
            multiply(rows[:, part], mixed[:, part])
        return mixed

    def _multiplication(self, matrix: Tensor, healthy: Tensor, dtype: torch.dtype, multiplies: bool) -> _Multiply:
        """Return what gives the rows of ``(M - I) theta`` of this process, zero for a subproblem that is sick.

        Args:
            matrix: ``M``, shape ``(P, P)``.
            healthy: Shape ``(P,)``, bool.
            dtype: That of the rows.
            multiplies: Whether with all rows, or by a sum for each listener.
        """
        sick = ~healthy
        some_are_sick = may_be_any(sick)
        weights = matrix[self.shards.members] - self._identity
        if some_are_sick:
            weights = weights.masked_fill(sick[self.shards.members].unsqueeze(1), 0.0)
        if self._listens is not None:
            weights = torch.where(self._listens, weights, 0.0)
        weights = weights.to(dtype)
        if multiplies or self._sources is None:
            weights = weights[:, self._held] if self.shards.is_spread else weights
            # NaN times zero is NaN, so that no weight is not enough to keep a sick row out.
            out = sick[self._held].unsqueeze(1) if some_are_sick else None

            def multiply(rows: Tensor, memory: Tensor | None) -> Tensor:
                return torch.mm(weights, rows if out is None else rows.masked_fill(out, 0.0), out=memory)

            return multiply
        heard, places, counts = self._sources
        weights = torch.where(counts, weights.gather(1, heard), 0.0)
        if some_are_sick:  # who is not heard is replaced by the listener, without weight
            is_well = healthy[heard]
            places, weights = torch.where(is_well, places, self._own_places), weights.masked_fill(~is_well, 0.0)

        def sum_up(rows: Tensor, _: Tensor | None) -> Tensor:
            total = nn.functional.embedding_bag(places, rows, per_sample_weights=weights, mode="sum")
            return total.masked_fill_(sick[self.shards.members].unsqueeze(1), 0.0) if some_are_sick else total

        return sum_up

    def _multiplies(self, rows: Tensor) -> bool:
        """Return whether a product with all rows is faster than one sum for each listener, and gives the same.

        It can use the memory of the last step again, without which large rows take several times as long. Whether it
        sums in the order of the rows as well depends on processor and library, and is tried.
        """
        if self._sources is None:
            return True
        own, width = len(self._own_places), rows.shape[1]
        is_wide = rows.dtype in (torch.float32, torch.float64)  # others are rounded more than once
        if not (is_read_at_once(rows) and is_wide and len(rows) <= _MANY_ROWS and own > 1 and width >= _NARROW):
            return False
        if (rows.dtype, width) not in self._agrees:
            widths = {part.stop - part.start for part in _parts(width)}
            self._agrees[rows.dtype, width] = all(self._try(rows, some) for some in widths)
        return self._agrees[rows.dtype, width]

    def _try(self, rows: Tensor, width: int) -> bool:
        """Return whether product and sums of numbers at random are equal to the last bit, all of many."""
        generator, size = torch.Generator().manual_seed(0), self.shards.size
        matrix, healthy = torch.rand(size, size, generator=generator), torch.ones(size, dtype=torch.bool)
        product, sums = (self._multiplication(matrix, healthy, rows.dtype, one) for one in (True, False))
        for _ in range(-(-_NUMBERS_TRIED // (len(self._own_places) * width))):
            numbers = torch.randn(len(rows), width, generator=generator, dtype=rows.dtype)
            if not torch.equal(product(numbers, None), sums(numbers, None)):
                return False
        return True

    def _memory_for(self, rows: Tensor, width: int) -> Tensor:
        """Return memory of shape ``(p, width)``, the same for calls of the same kind."""
        size = len(self._own_places) * width
        if self._memory is None or len(self._memory) < size or self._memory.dtype != rows.dtype:
            self._memory = rows.new_empty(size)
        return self._memory[:size].view(len(self._own_places), width)

    def _find_sources(self, givers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return whom every subproblem hears of, where that row is, and whether it counts, each of shape ``(p, K)``.

        Everyone hears of itself and of its givers, in their order; who has fewer than others hears of the last one
        again, without weight.
        """
        lists = [sorted({index, *givers[index].nonzero().flatten().tolist()}) for index in range(self.shards.size)]
        length = max(map(len, lists))
        own = [lists[index] for index in self.shards.own]
        heard = [some + some[-1:] * (length - len(some)) for some in own]
        places = {index: place for place, index in enumerate(self.exchange.held)}
        shape = (len(own), length)
        return (
            torch.tensor(heard, dtype=torch.long).view(shape),
            torch.tensor([[places[index] for index in some] for some in heard], dtype=torch.long).view(shape),
            torch.tensor([[place < len(some) for place in range(length)] for some in own], dtype=torch.bool).view(
                shape
            ),
        )


def _parts(width: int) -> Iterator[slice]:
    """Yield slices of at most so many columns, the last one of a few more if little is left."""
    start = 0
    while start < width:
        stop = start + _COLUMNS_AT_ONCE
        stop = width if width - stop < _NARROW else stop
        yield slice(start, stop)
        start = stop
