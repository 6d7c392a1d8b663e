"""Ranks that are killed, stopped, slow or sick."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mtl_lightning.callbacks import HypervolumeCallback, ParetoFrontCallback
from tests.distributed.common import BATCHES, KINDS, TARGETS, Report, assert_close, finish, load, tasks
from tests.distributed.ranks import Ranks, ranked_trainer, run_ranks
from tests.modules.common import trainer

# --------------------------------------------------------------------------------------------------------------- killed


def _recorders(folder: Path) -> list[Callback]:
    return [
        ParetoFrontCallback(dirpath=folder, figure_every=0),
        HypervolumeCallback(reference_point=(9.0, 9.0, 9.0), dirpath=folder),
    ]


def _numbers(path: Path) -> torch.Tensor:
    text = path.read_text().replace("True", "1").replace("False", "0")
    rows = [[float(value) for value in row] for row in csv.reader(text.splitlines()[1:])]
    return torch.tensor(rows, dtype=torch.float64)


def _train_with_checkpoints(folder: Path, seconds: float, ckpt_path: str | None) -> None:
    saving = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=1, save_last=True)
    run = ranked_trainer(
        max_epochs=3, callbacks=[*_recorders(folder / "tables"), saving, Report()], enable_checkpointing=True
    )
    end = folder / f"end-{os.environ['LOCAL_RANK']}.pt"
    finish(run, KINDS["mt2o"](tasks=tasks(seconds)), end, world_size=2, ckpt_path=ckpt_path)


def test_after_the_death_of_a_rank_nothing_is_lost(tmp_path: Path) -> None:
    finish(trainer(_recorders(tmp_path / "expected"), max_epochs=3), KINDS["mt2o"](), tmp_path / "expected.pt")
    folder = tmp_path / "logs"
    with Ranks(_train_with_checkpoints, [tmp_path, 0.02, None], folder=folder) as ranks:
        batch = BATCHES + 3
        ranks.wait_for(lambda: f"begins {batch}\n" in ranks.log(1), f"batch {batch}")
        ranks.send(1, signal.SIGKILL)
        assert ranks.join() == [1, -signal.SIGKILL], ranks.report()
        # The other one does not wait for the limit, and says what has happened.
        assert "Found one that has ended or does not answer" in ranks.log(0), ranks.report()
    run_ranks(_train_with_checkpoints, [tmp_path, 0.0, "last"], folder=folder)
    for rank in (0, 1):
        assert_close(load(tmp_path / f"end-{rank}.pt"), load(tmp_path / "expected.pt"))
    for name in ("archive.csv", "hypervolume.csv"):
        found, expected = (_numbers(tmp_path / where / name) for where in ("tables", "expected"))
        assert len(expected) >= 3
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- slow, stopped, sick


class _Dawdle(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1:
            time.sleep(0.05 if batch_idx else 0.3)


class _Poison(Callback):
    """Make a label infinite, in one batch."""

    def __init__(self, row: int) -> None:
        self.row = row

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        size = trainer.world_size
        if pl_module.batches_seen == 2 and self.row % size == trainer.global_rank:
            batch[1][TARGETS[1]][self.row // size] = torch.inf


def _train_slow_and_sick(folder: Path) -> None:
    rank = os.environ["LOCAL_RANK"]
    for name, make in KINDS.items():
        finish(ranked_trainer(max_epochs=1, callbacks=[_Dawdle()]), make(), folder / f"slow-{name}-{rank}.pt", 2)
        run = ranked_trainer(max_epochs=1, callbacks=[_Poison(row=5)])
        try:
            finish(run, make(), folder / f"sick-{name}-{rank}.pt", 2)
        except FloatingPointError as error:
            (folder / f"sick-{name}-{rank}.txt").write_text(str(error))
            torch.distributed.barrier()


@pytest.mark.filterwarnings("ignore:The loss of task", "ignore:Not finite after")
def test_slow_ranks_and_labels_that_are_not_finite_on_one_rank(tmp_path: Path) -> None:
    run_ranks(_train_slow_and_sick, [tmp_path], folder=tmp_path / "logs")
    for name, make in KINDS.items():
        finish(trainer(max_epochs=1), make(), tmp_path / f"well-{name}.pt")
        for rank in (0, 1):
            assert_close(load(tmp_path / f"slow-{name}-{rank}.pt"), load(tmp_path / f"well-{name}.pt"))
    for name in ("task_groups", "weighted"):  # the task is left out of that batch, on all ranks
        finish(trainer([_Poison(row=5)], max_epochs=1), KINDS[name](), tmp_path / "alone.pt")
        alone = load(tmp_path / "alone.pt")
        for rank in (0, 1):
            assert_close(load(tmp_path / f"sick-{name}-{rank}.pt"), alone)
        weight = f"network.heads.{TARGETS[1]}.weight"
        assert not torch.equal(alone["state"][weight], load(tmp_path / f"well-{name}.pt")["state"][weight])
    for rank in (0, 1):  # all subproblems at once: there is none to restart them from
        assert "Not finite after 3 batches" in (tmp_path / f"sick-mt2o-{rank}.txt").read_text()


def _train_for_long(seconds: float) -> None:
    run = ranked_trainer(timeout=seconds, max_epochs=1000, callbacks=[Report()])
    finish(run, KINDS["weighted"](), Path(os.devnull), world_size=2)


def test_a_rank_that_stops_to_answer_ends_the_run_in_time(tmp_path: Path) -> None:
    with Ranks(_train_for_long, [2.0], folder=tmp_path, limit=90) as ranks:
        ranks.wait_for(lambda: "ends 3\n" in ranks.log(1), "batch 3")
        ranks.send(1, signal.SIGSTOP)
        assert ranks.join([0]) == [1]
        log = ranks.log(0)
        assert "within the limit of `DDPStrategy(timeout=timedelta(...))`" in log, ranks.report()
        assert "does not answer, whose limit here is 2 seconds" in log, ranks.report()
