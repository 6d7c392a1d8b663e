from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from mtl_lightning.callbacks import GradientConflictCallback
from mtl_lightning.commands.effort import EffortCallback, peak_memory, resident_memory
from mtl_lightning.datamodules import MultiDigitsDataModule
from mtl_lightning.grouping import AllTogether, OneByOne
from mtl_lightning.growth import Doubling
from mtl_lightning.modules import MT2OModule, TaskGroupModule, WeightedModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task
from tests.commands.cases import OnePerTask

BATCHES = 4


def _module(kind: type[LightningModule], **arguments: Any) -> LightningModule:
    heads: dict[str, nn.Module] = {name: nn.Linear(8, 10) for name in ("left", "right")}
    tasks = [Task(name, nn.CrossEntropyLoss()) for name in heads]
    network = MultiHeadNetwork(MLP(100, [8]), heads)
    optimizer = partial(torch.optim.SGD, lr=0.01)
    return kind(network=network, tasks=tasks, optimizer=optimizer, **arguments)


def _fit(module: LightningModule, callback: EffortCallback, *others: Any, epochs: int = 1, **arguments: Any) -> None:
    data = MultiDigitsDataModule(num_train=64 * BATCHES, num_val=64, num_test=64, batch_size=64)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=bool(others) and isinstance(others[-1], ModelCheckpoint),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, *others],
    )
    trainer.fit(module, datamodule=data, **arguments)


def _front(**arguments: Any) -> LightningModule:
    return _module(MT2OModule, preferences=simplex_lattice(num_tasks=2, num_divisions=3), **arguments)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: _module(WeightedModule), 1),
        (lambda: _module(OnePerTask), 2 + 1),
        (lambda: _module(TaskGroupModule, grouping=AllTogether(), warmup_batches=0, single_group="once"), 1),
        (lambda: _module(TaskGroupModule, grouping=OneByOne(), warmup_batches=0, measure_last=True), 2),
        (lambda: _front(backend="loop"), 4),
        (lambda: _front(backend="vmap"), 4),
        (lambda: _front(backend="vmap", chunk_size=3), 4),
    ],
    ids=["weighted", "by task", "together", "one by one", "loop", "vmap", "chunks"],
)
def test_a_batch_counts_one_for_each_gradient_of_a_network(make: Any, expected: int) -> None:
    callback = EffortCallback(0.0)
    _fit(make(), callback)
    assert callback.effort.gradient_evaluations == expected * BATCHES


def test_a_growing_population_counts_what_it_trains() -> None:
    callback = EffortCallback(0.0)
    _fit(_front(backend="loop", growth=Doubling(every_n_batches=1)), callback)
    assert callback.effort.gradient_evaluations == 1 + 2 + 4 + 4


def test_what_is_measured_does_not_count(tmp_path: Path) -> None:
    callback = EffortCallback(0.0)
    _fit(_module(WeightedModule), callback, GradientConflictCallback(every_n_batches=1, dirpath=tmp_path))
    assert callback.effort.gradient_evaluations == BATCHES


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    first = EffortCallback(0.0)
    last = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    _fit(_module(WeightedModule), first, last)
    second = EffortCallback(0.0)
    _fit(_module(WeightedModule), second, epochs=3, ckpt_path=str(tmp_path / "last.ckpt"))
    assert second.effort.gradient_evaluations == 3 * BATCHES
    assert second.effort.cpu_seconds > first.effort.cpu_seconds > 0
    assert second.effort.fit_seconds > first.effort.cpu_seconds


class _Busy(WeightedModule):
    """Is busy in each batch, and waits in each validation."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        time.sleep(0.2)


def test_seconds_hold_what_they_should_at_least() -> None:
    callback = EffortCallback(0.0)
    _fit(_module(_Busy), callback)
    assert callback.effort.cpu_seconds >= BATCHES * 0.05
    assert callback.effort.fit_seconds >= BATCHES * 0.05 + 0.2


def test_memory_is_the_rise_over_what_there_was_before() -> None:
    before = resident_memory()
    callback = EffortCallback(before)
    ballast = torch.ones(round(peak_memory() - before + 64) * 2**18)  # MiB of float32: beyond the peak so far
    assert callback.effort.memory_rise_mib == pytest.approx(peak_memory() - before)
    assert callback.effort.memory_rise_mib >= ballast.numel() * 4 / 2**20 - 8
