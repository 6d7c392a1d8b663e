"""Rows that travel between real processes are those that plain indexing picks, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mtl_lightning.population_shards import RowExchange, Shards
from tests.distributed.ranks import run_ranks

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64),
)
SHAPES = ((), (3,), (2, 5), (0,), (1, 0, 4))
CPU = torch.device("cpu")


def _rows(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    values = torch.randint(0, 2 if dtype == torch.bool else 120, (size, *shape), generator=generator)
    rows = values.to(dtype)
    if dtype.is_floating_point and rows.numel():
        rows.view(-1)[:: max(rows.numel() // 3, 1)] = torch.nan  # a failed subproblem travels like the others
    return rows


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


def _rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def _join() -> None:
    dist.init_process_group("gloo", rank=_rank(), timeout=timedelta(seconds=20))


def _in_groups(check: Callable[[Shards], None], sizes: tuple[int, ...]) -> None:
    """Run a check on all processes, and in a group of which the first process of all is no member."""
    _join()
    world = dist.new_group()
    others = dist.new_group(list(range(1, dist.get_world_size())))
    for size in sizes:
        check(Shards(size, world))
        if dist.get_rank():
            check(Shards(size, others))
    dist.barrier()  # one that ends takes its connections with it


def _check_blocks(shards: Shards) -> None:
    lengths = [len(block) for block in shards.blocks]
    assert [index for block in shards.blocks for index in block] == list(range(shards.size))
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)
    assert all(index in shards.blocks[shards.owner(index)] for index in range(shards.size))
    assert list(range(shards.size))[shards.members] == list(shards.own)


def _check_moves(shards: Shards) -> None:
    _check_blocks(shards)
    for dtype in DTYPES:
        for shape in SHAPES:
            every = _rows(shards.size, shape, dtype)
            own = every[shards.members].clone()
            _same(shards.gather(own), every)
            _same(shards.collect(own), every)
            # Only the first process knows what is spread.
            given = every if shards.rank == 0 else torch.zeros_like(every)
            _same(shards.scatter(given, CPU), own)
            for index in range(shards.size):
                _same(shards.fetch(own, index), every[index])


def _check_strides(shards: Shards) -> None:
    every = _rows(shards.size, (4, 3), torch.float32).transpose(1, 2)
    own = every[shards.members]
    _same(shards.gather(own), every)
    _same(shards.collect(own), every)
    _same(shards.scatter(every if shards.rank == 0 else torch.zeros_like(every), CPU), own)
    _same(shards.fetch(own, shards.size - 1), every[-1])


def _check_rearranging(shards: Shards) -> None:
    generator = torch.Generator().manual_seed(shards.size)
    for size in (1, shards.size, 2 * shards.size + 1):
        new = shards.resized(size)
        for dtype in (torch.float32, torch.bool):
            every = _rows(shards.size, (3,), dtype)
            parents = torch.randint(0, shards.size, (size,), generator=generator).tolist()
            found = shards.rearrange(every[shards.members].clone(), parents, new)
            _same(found, every[parents][new.members])


def _check_exchange(shards: Shards) -> None:
    generator = torch.Generator().manual_seed(shards.size)
    size = shards.size
    patterns: list[Tensor | None] = [None, torch.zeros(size, size, dtype=torch.bool), torch.ones(size, size).bool()]
    patterns += [torch.rand(size, size, generator=generator) < 0.3 for _ in range(3)]
    for givers in patterns:
        exchange = RowExchange(shards, givers)
        wanted = set(range(size)) if givers is None else givers[shards.members].any(dim=0).nonzero().flatten().tolist()
        held = sorted({*shards.own, *wanted})
        assert exchange.held == held
        assert exchange.rows_received == len(held) - len(shards.own)
        for dtype in (torch.float32, torch.bfloat16, torch.bool):
            for width in (5, 0):
                every = _rows(size, (width,), dtype)
                exchange.start(every[shards.members].clone())
                shards.gather(every[shards.members])  # other exchanges may come between
                _same(exchange.finish(), every[held])


@pytest.mark.parametrize("check", [_check_moves, _check_strides, _check_rearranging, _check_exchange])
def test_rows_are_those_of_plain_indexing(check: Callable[[Shards], None], tmp_path: Path) -> None:
    # Fewer subproblems than processes, as many, and what cannot be divided.
    run_ranks(_in_groups, [check, (1, 3, 5)], world_size=3, folder=tmp_path)


@pytest.mark.parametrize("check", [_check_moves, _check_strides, _check_rearranging, _check_exchange])
def test_one_process_has_all_rows(check: Callable[[Shards], None]) -> None:
    for size in (1, 4):
        check(Shards(size))


def _count_received() -> None:
    _join()
    shards = Shards(12, dist.new_group())
    chain = torch.eye(12, dtype=torch.bool).roll(1, dims=1) | torch.eye(12, dtype=torch.bool).roll(-1, dims=1)
    chain[0, -1] = chain[-1, 0] = False
    # Neighbours of a block of four lie at its two ends, whatever the number of subproblems.
    assert RowExchange(shards, chain).rows_received == (2 if shards.rank == 1 else 1)
    assert RowExchange(shards, None).rows_received == 8
    dist.barrier()


def test_a_sparse_exchange_brings_the_neighbours_only(tmp_path: Path) -> None:
    run_ranks(_count_received, world_size=3, folder=tmp_path)


def test_a_population_without_subproblems_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`size` should be at least 1\. Found 0"):
        Shards(0)
