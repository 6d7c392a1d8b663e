"""What every module owes between two calls of ``Trainer.fit``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from mtl_lightning.modules import MT2OModule
from mtl_lightning.modules.base import MultiTaskModule
from tests.habits.common import MODULES, every_module
from tests.modules.common import Position, SaveAfterEachBatch, assert_equal_states, loader, mt2o, trainer


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


# ------------------------------------------------------------------------------------------- labels counted on the host


class _TakesLabelsAway(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            batch[1]["a"][:] = torch.nan


class _FillsLabelsIn(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch[1]["a"].nan_to_num_(nan=0.5)


@every_module
@pytest.mark.parametrize("changes", [_TakesLabelsAway(), _FillsLabelsIn()], ids=lambda one: type(one).__name__)
def test_labels_that_change_after_they_were_counted_are_counted_again(
    name: str, changes: Callback, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = list(loader())
    data[2][1]["a"][:] = torch.nan
    states = []
    for ahead in (False, True):
        monkeypatch.setattr(MultiTaskModule, "_counts_ahead", lambda self, ahead=ahead: ahead)
        torch.manual_seed(0)
        module = MODULES[name]()
        trainer([changes]).fit(module, Position(copy.deepcopy(data)))
        states.append(_parameters(module))
    assert_equal_states(states[0], states[1])


class _OwnStep(MT2OModule):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)


class _OwnBatches(MT2OModule):
    def unpack_batch(self, batch: Any) -> Any:
        return super().unpack_batch(batch)


class _OwnTransfer(MT2OModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


@pytest.mark.parametrize(
    ("kind", "expected"), [(MT2OModule, True), (_OwnStep, False), (_OwnBatches, False), (_OwnTransfer, False)]
)
def test_labels_are_counted_ahead_where_nothing_changes_them_on_the_way(kind: Any, expected: bool) -> None:
    module = mt2o()
    module.__class__ = kind
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert not module._counts_ahead()  # there is nothing to wait for
    module._device = torch.device("meta")  # any but the CPU
    assert module._counts_ahead() is expected


class _SkipsBatches(MT2OModule):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1


def test_counts_of_a_batch_that_was_not_trained_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MultiTaskModule, "_counts_ahead", lambda self: True)
    module = mt2o()
    module.__class__ = _SkipsBatches
    trainer().fit(module, loader())
    assert module._counts_on_host is not None
    module.on_before_batch_transfer(None, 0)
    assert module._counts_on_host is None
    trainer().fit(module, loader())
    module.forget_step()
    assert module._counts_on_host is None


def test_the_hook_does_nothing_without_a_trainer() -> None:
    batch = next(iter(loader()))
    assert mt2o().on_before_batch_transfer(batch, 0) is batch
