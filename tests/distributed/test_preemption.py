"""A cluster takes its machines back: signals that arrive inside a batch, as SLURM and others send them."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from tests.distributed.common import KINDS, Report, assert_close, finish, load, tasks
from tests.distributed.ranks import Ranks, ranked_trainer, run_ranks
from tests.modules.common import trainer

EPOCHS = 2


def _train(folder: Path, name: str, world_size: int, seconds: float, ckpt_path: Path | None, saves: bool) -> None:
    callbacks = [Report(), *([OnExceptionCheckpoint(folder)] if saves else [])]
    options: dict[str, Any] = {"callbacks": callbacks, "enable_checkpointing": saves}
    run = ranked_trainer(world_size, max_epochs=EPOCHS, default_root_dir=str(folder), **options)
    end = folder / f"end-{os.environ['LOCAL_RANK']}.pt"
    finish(run, KINDS[name](tasks=tasks(seconds)), end, world_size, ckpt_path)


def _uninterrupted(folder: Path, name: str) -> dict[str, Any]:
    finish(trainer(max_epochs=EPOCHS), KINDS[name](), folder / "uninterrupted.pt")
    return load(folder / "uninterrupted.pt")


def _signal_inside(ranks: Ranks, batch: int, number: signal.Signals, order: tuple[int, ...], pause: float) -> None:
    """Send a signal to ranks one after another, the first in the middle of ``batch``."""
    ranks.wait_for(lambda: f"begins {batch}\n" in ranks.log(order[0]), f"batch {batch}")
    for rank in order:
        time.sleep(pause)
        ranks.send(rank, number)


def _slurm(folder: Path, world_size: int) -> Callable[[int], Mapping[str, str]]:
    """Return the environment of a job, with an `scontrol` that writes down what it is told."""
    script = folder / "bin" / "scontrol"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/requeued"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def environment(rank: int) -> dict[str, str]:
        return {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "train",
            "SLURM_NTASKS": str(world_size),
            "SLURM_NTASKS_PER_NODE": str(world_size),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "PATH": f"{script.parent}:{os.environ['PATH']}",
        }

    return environment


@pytest.mark.parametrize(("name", "order"), [("mt2o", (1, 0)), ("task_groups", (0, 1)), ("weighted", (0,))])
def test_a_job_that_slurm_requeues_goes_on_exactly(name: str, order: tuple[int, ...], tmp_path: Path) -> None:
    expected = _uninterrupted(tmp_path, name)
    world_size = len(order)
    environment = _slurm(tmp_path, world_size)
    options: dict[str, Any] = {"world_size": world_size, "environment": environment, "folder": tmp_path / "logs"}
    with Ranks(_train, [tmp_path, name, world_size, 0.05, None, False], **options) as ranks:
        _signal_inside(ranks, 3, signal.SIGUSR1, order, pause=0.02)
        ranks.wait_for((tmp_path / "requeued").exists, "the requeueing")
        # The job is ended when it is in the queue again, in the middle of another batch.
        _signal_inside(ranks, 5, signal.SIGTERM, order, pause=0.02)
        codes = ranks.join()
        assert all(codes), ranks.report()
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    assert not any(tmp_path.glob("end-*.pt"))
    run_ranks(_train, [tmp_path, name, world_size, 0.0, None, False], **options)  # finds the checkpoint by itself
    for rank in range(world_size):
        assert_close(load(tmp_path / f"end-{rank}.pt"), expected, tolerance=0.0 if world_size == 1 else 1e-6)


@pytest.mark.parametrize(("name", "world_size"), [("task_groups", 1), ("mt2o", 2), ("weighted", 2)])
def test_a_run_that_is_terminated_goes_on_exactly(name: str, world_size: int, tmp_path: Path) -> None:
    expected = _uninterrupted(tmp_path, name)
    options: dict[str, Any] = {"world_size": world_size, "folder": tmp_path / "logs"}
    with Ranks(_train, [tmp_path, name, world_size, 0.05, None, True], **options) as ranks:
        # One rank only is told: the others have to stop with it.
        _signal_inside(ranks, 3, signal.SIGTERM, (world_size - 1,), pause=0.02)
        codes = ranks.join()
        assert all(codes), ranks.report()
        assert all("ends 3\n" in ranks.log(rank) for rank in range(world_size)), ranks.report()
        assert not any("begins 5\n" in ranks.log(rank) for rank in range(world_size)), ranks.report()
    checkpoint = tmp_path / "on_exception.ckpt"
    run_ranks(_train, [tmp_path, name, world_size, 0.0, checkpoint, False], **options)
    for rank in range(world_size):
        assert_close(load(tmp_path / f"end-{rank}.pt"), expected, tolerance=0.0 if world_size == 1 else 1e-6)
