from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from mtl_lightning.modules.preemption import DeferredSignals
from tests.distributed.ranks import run_ranks
from tests.modules.common import Position, assert_equal_states, loader, mt2o, trainer

CPU = torch.device("cpu")


class _Lightning:
    """A handler that is taken for one of Lightning's."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, number: int, frame: Any) -> None:
        self.seen.append(number)


_Lightning.__module__ = "lightning.pytorch.handlers"


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_wait_and_are_handed_over_once() -> None:
    lightning = _Lightning()
    signal.signal(signal.SIGUSR1, lightning)
    signal.signal(signal.SIGTERM, lightning)
    deferred = DeferredSignals()
    deferred.hold(CPU, world_size=1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert lightning.seen == []
    deferred.deliver(CPU, world_size=1)
    assert lightning.seen == [signal.SIGUSR1, signal.SIGTERM]
    deferred.deliver(CPU, world_size=1)
    assert len(lightning.seen) == 2


def test_what_is_left_is_handed_over_in_the_end() -> None:
    lightning = _Lightning()
    signal.signal(signal.SIGUSR1, lightning)
    deferred = DeferredSignals()
    deferred.hold(CPU, world_size=1)
    os.kill(os.getpid(), signal.SIGUSR1)
    deferred.release(CPU, world_size=1)
    assert lightning.seen == [signal.SIGUSR1]
    handler: Any = signal.getsignal(signal.SIGUSR1)
    assert handler is lightning
    os.kill(os.getpid(), signal.SIGUSR1)
    assert len(lightning.seen) == 2


def test_handlers_of_the_user_are_left_alone() -> None:
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        seen.append(number)

    signal.signal(signal.SIGUSR2, handle)
    deferred = DeferredSignals()
    deferred.hold(CPU, world_size=1)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert seen == [signal.SIGUSR2]
    deferred.release(CPU, world_size=1)


def _hold_on_ranks() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    lightning = _Lightning()
    own: list[int] = []
    signal.signal(signal.SIGTERM, lightning)
    signal.signal(signal.SIGUSR2, lightning)
    signal.signal(signal.SIGUSR1, lightning if rank else lambda number, frame: own.append(number))
    deferred = DeferredSignals()
    deferred.hold(CPU, world_size=2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    deferred.deliver(CPU, world_size=2)
    assert lightning.seen == [signal.SIGUSR2]  # on both
    os.kill(os.getpid(), signal.SIGUSR1)  # which rank 0 would not act on with the others
    assert (own, lightning.seen[1:]) == (([], [signal.SIGUSR1]) if rank else ([signal.SIGUSR1], []))
    deferred.release(CPU, world_size=2)
    torch.distributed.destroy_process_group()


def test_ranks_of_which_one_has_a_handler_of_its_own_agree(tmp_path: Path) -> None:
    run_ranks(_hold_on_ranks, folder=tmp_path, limit=30)


def test_outside_the_main_thread_nothing_is_held_back() -> None:
    lightning = _Lightning()
    signal.signal(signal.SIGUSR1, lightning)
    deferred = DeferredSignals()
    thread = threading.Thread(target=deferred.hold, args=(CPU, 1))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is lightning


class _CopyInside(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]


def test_a_module_is_copied_without_the_handlers() -> None:
    inside = _CopyInside()
    trainer([inside]).fit(mt2o(), loader())
    for module in inside.copies:
        trainer().fit(module, loader())


class _Terminate(Callback):
    """Send a signal to this process in the middle of a validation."""

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_terminated_in_its_validation_goes_on_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 3, "val_check_interval": 2}
    expected, stopped, found = mt2o(), mt2o(), mt2o()
    torch.manual_seed(7)
    run = trainer(**options)
    run.fit(expected, Position(), loader())
    torch.manual_seed(7)
    saving = OnExceptionCheckpoint(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        trainer([saving, _Terminate()], enable_checkpointing=True, **options).fit(stopped, Position(), loader())
    assert stopped.batches_seen < expected.batches_seen
    assert signal.getsignal(signal.SIGTERM) == before
    again = trainer(**options)
    again.fit(found, Position(), loader(), ckpt_path=saving.ckpt_path)
    assert_equal_states(found.state_dict(), expected.state_dict())
    assert again.global_step == run.global_step
