"""The transfer of parameters: ``(M - I) theta`` for a population that may be spread over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtl_lightning.devices import may_be_any
from mtl_lightning.population import Population
from mtl_lightning.population_shards import RowExchange, Shards

_MANY_ROWS = 64  # from which on a product with all of them costs more than sums over the few that give


class Mixing:
    """Computes what a transfer adds to the parameters, and mixes the buffers.

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
        device = population.theta.device
        givers = None if givers is None else givers.cpu()
        self.exchange = RowExchange(shards, givers)
        self._held = torch.tensor(self.exchange.held, dtype=torch.long, device=device)
        self._own = torch.arange(shards.own.start, shards.own.stop, device=device)
        self._sources: tuple[Tensor, Tensor, Tensor] | None = None
        if givers is not None:
            heard, places, is_heard = self._find_sources(givers)
            self._sources = (heard.to(device), places.to(device), is_heard.to(device))
        own_places = [self.exchange.held.index(index) for index in shards.own]
        self._own_places = torch.tensor(own_places, dtype=torch.long, device=device).unsqueeze(1)
        self._memory: Tensor | None = None  # of the latest step
        self._started = False

    def start(self) -> None:
        """Send off the parameters; they must not change before :meth:`step`."""
        theta = self.population.theta.detach()
        self.exchange.start(theta if self._sources is None else self._picked(theta))
        self._started = True

    @torch.no_grad()
    def receive(self) -> Tensor:
        """Return the parameters of the subproblems that this process hears of.

        With givers these are the columns that are mixed. Without them they are all columns of all subproblems, shape
        ``(P, D)``, since a rule that hears of all may read them.
        """
        if not self._started:
            self.start()
        self._started = False
        return self.exchange.finish()

    @torch.no_grad()
    def step(self, rows: Tensor, matrix: Tensor, healthy: Tensor) -> Tensor:
        """Return ``(M - I) theta`` for the subproblems of this process, shape ``(p, D)``, until the next call.

        Args:
            rows: What :meth:`receive` returned.
            matrix: ``M``, shape ``(P, P)``; its rows sum to one.
            healthy: Shape ``(P,)``, bool. The rows of the others may hold NaN; ``M`` gives them no weight.
        """
        rows = self._picked(rows) if self._sources is None else rows
        memory = self._memory_for(rows) if self._sources is None or self._are_few(rows) else None
        mixed = self._product(rows, matrix, healthy, memory)
        theta = self.population.theta
        if mixed.shape[1] == theta.shape[1]:
            return mixed
        step = torch.zeros_like(theta)
        pieces = torch.split(mixed, [part.stop - part.start for part in self._columns], dim=1)
        for part, piece in zip(self._columns, pieces, strict=True):
            step[:, part] = piece
        return step

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
            rows = self.exchange.finish()
            # Infinite entries are constants, such as those of attention masks, and stay.
            step = self._product(rows.masked_fill(~rows.isfinite(), 0.0), matrix, healthy)
            widths = [buffer.shape[1:].numel() for buffer in some]
            for buffer, piece in zip(some, torch.split(step, widths, dim=1), strict=True):
                buffer.add_(piece.view_as(buffer))

    def _picked(self, theta: Tensor) -> Tensor:
        if self._columns == [slice(0, theta.shape[1])]:
            return theta
        if not self._columns:
            return theta[:, :0]
        return torch.cat([theta[:, part] for part in self._columns], dim=1)

    def _product(self, rows: Tensor, matrix: Tensor, healthy: Tensor, memory: Tensor | None = None) -> Tensor:
        """Return the rows of ``(M - I) theta`` of this process, zero for a subproblem that is sick, in ``memory``."""
        weights = (matrix - torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype))[self.shards.members]
        some_are_sick = may_be_any(~healthy)
        if some_are_sick:
            weights = weights.masked_fill(~healthy[self.shards.members].unsqueeze(1), 0.0)
        if self._sources is None:
            return torch.mm(weights.to(rows.dtype), self._without_sick(rows, healthy, some_are_sick), out=memory)
        heard, places, is_heard = self._sources
        weights = torch.where(is_heard, weights.gather(1, heard), 0.0).to(rows.dtype)
        if self._are_few(rows):
            rows = self._without_sick(rows, healthy, some_are_sick)
            dense = weights.new_zeros(len(weights), len(rows)).scatter_add_(1, places, weights)
            return torch.mm(dense, rows, out=memory)
        if some_are_sick:  # who is not heard is replaced by the listener, without weight
            is_well = healthy[heard]
            places, weights = torch.where(is_well, places, self._own_places), weights.masked_fill(~is_well, 0.0)
        product = nn.functional.embedding_bag(places, rows, per_sample_weights=weights, mode="sum")
        if some_are_sick:
            product.masked_fill_(~healthy[self.shards.members].unsqueeze(1), 0.0)
        return product

    def _without_sick(self, rows: Tensor, healthy: Tensor, some_are_sick: bool) -> Tensor:
        # NaN times zero is NaN, so that no weight is not enough to keep a sick row out.
        return rows.masked_fill(~healthy[self._held].unsqueeze(1), 0.0) if some_are_sick else rows

    def _are_few(self, rows: Tensor) -> bool:
        """Return whether a product with all rows is faster than one sum for each listener, and gives the same.

        On the CPU it sums in the order of the rows as well, except for a single listener; and it can use the memory of
        the last step again, without which large rows take several times as long.
        """
        is_exact = rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64)
        return is_exact and len(rows) <= _MANY_ROWS and len(self._own) > 1

    def _memory_for(self, rows: Tensor) -> Tensor:
        shape = (len(self._own), rows.shape[1])
        if self._memory is None or (self._memory.shape, self._memory.dtype) != (shape, rows.dtype):
            self._memory = rows.new_empty(shape)
        return self._memory

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
