"""What every module owes between two calls of ``Trainer.fit``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from mtl_lightning.modules.base import MultiTaskModule
from tests.habits.common import MODULES, every_module
from tests.modules.common import Position, SaveAfterEachBatch, assert_equal_states, loader, trainer


def batches() -> Position:
    return Position(list(loader()))


class _BrokenOffError(Exception):
    pass


class _RaisesBetweenBatches(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise _BrokenOffError


class _RaisesBeforeStep(Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        raise _BrokenOffError


class _Stops(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = True


def _break_off(module: MultiTaskModule, end: Callback) -> None:
    """Train a part of the first step."""
    run = trainer([end])
    try:
        run.fit(module, batches())
    except _BrokenOffError:
        pass
    else:
        assert isinstance(end, _Stops)
    assert run.global_step == 0


def _parameters(module: MultiTaskModule) -> dict[str, Any]:
    return dict(module.named_parameters())


@every_module
@pytest.mark.parametrize(
    "end", [_RaisesBetweenBatches(), _RaisesBeforeStep(), _Stops()], ids=lambda end: type(end).__name__
)
def test_a_step_that_broke_off_is_forgotten(name: str, end: Callback) -> None:
    module = MODULES[name](accumulate_batches=2)
    expected = copy.deepcopy(module)
    _break_off(module, end)
    expected.batches_seen = module.batches_seen  # random numbers depend on it
    for each in (module, expected):
        torch.manual_seed(0)  # or the seed would be the last one of the run before
        trainer(num_sanity_val_steps=1).fit(each, batches(), batches())
    assert_equal_states(_parameters(module), _parameters(expected))


@every_module
def test_a_checkpoint_takes_the_place_of_a_step_that_broke_off(name: str, tmp_path: Path) -> None:
    expected, save = MODULES[name](accumulate_batches=2), SaveAfterEachBatch(tmp_path)
    trainer([save]).fit(expected, batches())
    for path in save.paths[:2]:  # within a step, and after one
        module = MODULES[name](accumulate_batches=2)
        _break_off(module, _RaisesBetweenBatches())
        trainer().fit(module, batches(), ckpt_path=str(path))
        assert_equal_states(_parameters(module), _parameters(expected))
