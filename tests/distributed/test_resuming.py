"""A run that is stopped between any two batches goes on as if it had not been, on as many ranks or on others."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtl_lightning.aggregation import UPGrad
from mtl_lightning.modules import GradientModule, MultiTaskModule, ParetoSetModule
from mtl_lightning.networks import MLP, MultiHeadNetwork, PreferenceConcatenation
from mtl_lightning.preferences import simplex_lattice
from tests.distributed.common import BATCHES, TARGETS, SaveEachBatch, assert_close, finish, load, network, tasks
from tests.distributed.common import KINDS as SOME_KINDS
from tests.distributed.ranks import ranked_trainer, run_ranks
from tests.modules.common import trainer

INSIDE = (2, BATCHES + 3)  # batches after which runs go on: after a step, and between the two batches of another


def _gradient(**arguments: Any) -> GradientModule:
    return GradientModule(network(), tasks(), partial(torch.optim.SGD, lr=0.05), aggregator=UPGrad(), **arguments)


def _pareto_set(**arguments: Any) -> ParetoSetModule:
    torch.manual_seed(0)
    heads: dict[str, nn.Module] = {name: nn.Linear(8, 1) for name in TARGETS}
    conditioned = PreferenceConcatenation(MultiHeadNetwork(MLP(7 + len(TARGETS), [8]), heads))
    preferences = simplex_lattice(num_tasks=3, num_divisions=2)
    return ParetoSetModule(conditioned, tasks(), preferences, partial(torch.optim.SGD, lr=0.05), **arguments)


KINDS: dict[str, Callable[..., MultiTaskModule]] = SOME_KINDS | {"gradient": _gradient, "pareto_set": _pareto_set}


def _make(name: str) -> MultiTaskModule:
    return KINDS[name](accumulate_batches=2)


def _noisy() -> MultiTaskModule:
    return KINDS["task_groups"](network=network(dropout=0.3), optimizer=partial(torch.optim.Adam, lr=1e-2))


def _run_on_ranks(folder: Path) -> None:
    rank = os.environ["LOCAL_RANK"]
    saving = [SaveEachBatch(folder / "noisy")]
    finish(ranked_trainer(max_epochs=2, callbacks=saving), _noisy(), folder / f"noisy-{rank}.pt", world_size=2)
    checkpoint = folder / "noisy" / f"batch-{INSIDE[0]}.ckpt"
    path = folder / f"noisy-after-{rank}.pt"
    finish(ranked_trainer(max_epochs=2), _noisy(), path, world_size=2, ckpt_path=checkpoint)
    for name in KINDS:
        here = folder / name
        saving = [SaveEachBatch(here / "two")]
        finish(ranked_trainer(max_epochs=2, callbacks=saving), _make(name), here / f"two-{rank}.pt", world_size=2)
        for writer in ("one", "two"):
            for batch in INSIDE:
                path = here / f"two-after-{writer}-{batch}-{rank}.pt"
                checkpoint = here / writer / f"batch-{batch}.ckpt"
                finish(ranked_trainer(max_epochs=2), _make(name), path, world_size=2, ckpt_path=checkpoint)


def test_resumed_on_the_same_and_on_another_number_of_ranks_equals_uninterrupted(tmp_path: Path) -> None:
    for name in KINDS:
        here = tmp_path / name
        here.mkdir()
        finish(trainer([SaveEachBatch(here / "one")], max_epochs=2), _make(name), here / "one.pt")
    run_ranks(_run_on_ranks, [tmp_path], folder=tmp_path / "logs", limit=200)
    for rank in (0, 1):  # random numbers are those of the rank and the batch
        assert_close(load(tmp_path / f"noisy-after-{rank}.pt"), load(tmp_path / f"noisy-{rank}.pt"), tolerance=0.0)
    for name in KINDS:
        here = tmp_path / name
        one, two = load(here / "one.pt"), load(here / "two-0.pt")
        assert_close(two, one)
        assert_close(load(here / "two-1.pt"), two, tolerance=0.0)
        for batch in INSIDE:
            # What is accumulated is averaged over the ranks by the checkpoint, and by the step once more.
            same = 1e-6 if name != "task_groups" and batch == INSIDE[1] else 0.0
            for rank in (0, 1):
                assert_close(load(here / f"two-after-two-{batch}-{rank}.pt"), two, same)
                assert_close(load(here / f"two-after-one-{batch}-{rank}.pt"), one)
            for writer, expected, tolerance in (("one", one, 0.0), ("two", one, 1e-6)):
                path = here / f"one-after-{writer}-{batch}.pt"
                checkpoint = here / writer / f"batch-{batch}.ckpt"
                finish(trainer(max_epochs=2), _make(name), path, ckpt_path=checkpoint)
                assert_close(load(path), expected, tolerance)
