"""Flags of the trainer, each with every module."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor

from mtl_lightning.callbacks import HypervolumeCallback, ParetoFrontCallback
from tests.habits.common import MODULES, NUM_BATCHES, every_module, objectives, train_loader, val_loader
from tests.modules.common import trainer


class Batches(Callback):
    """Remembers the inputs of every batch, and the step after which each validation came."""

    def __init__(self) -> None:
        self.train: list[Tensor] = []
        self.val: list[Tensor] = []
        self.test = self.predict = 0
        self.validated_at: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.train.append(batch[0])

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.val.append(batch[0])

    def on_test_batch_start(self, *_: Any) -> None:
        self.test += 1

    def on_predict_batch_start(self, *_: Any) -> None:
        self.predict += 1

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated_at.append(trainer.global_step)


@every_module
def test_fast_dev_run_does_one_batch_of_each_and_leaves_no_file(name: str, tmp_path: Path) -> None:
    batches = Batches()
    callbacks = [batches, ParetoFrontCallback(**objectives(name)), HypervolumeCallback(**objectives(name))]
    run = trainer(callbacks, fast_dev_run=True, default_root_dir=tmp_path)
    module = MODULES[name]()
    run.fit(module, train_loader(), val_loader())
    run.test(module, val_loader(), verbose=False)
    assert (len(batches.train), len(batches.val), batches.test, run.global_step) == (1, 1, 1, 1)
    assert not list(tmp_path.iterdir())


@every_module
def test_overfit_batches_trains_the_same_batches_in_every_epoch(name: str) -> None:
    batches = Batches()
    run = trainer([batches], overfit_batches=2, max_epochs=3)
    run.fit(MODULES[name](), train_loader(), val_loader())
    first = torch.cat(batches.train[:2])
    assert run.global_step == 6
    for start in (2, 4):
        assert torch.equal(torch.cat(batches.train[start : start + 2]), first)
    assert len(batches.val) == 6  # of its own loader, as many


@every_module
def test_limits_of_batches_are_kept(name: str) -> None:
    batches = Batches()
    limits = {f"limit_{split}_batches": 2 for split in ("train", "val", "test", "predict")}
    run = trainer([batches], max_epochs=2, **limits)
    module = MODULES[name]()
    run.fit(module, train_loader(), val_loader())
    run.test(module, val_loader(), verbose=False)
    predictions = run.predict(module, val_loader())
    assert predictions is not None
    assert (len(batches.train), len(batches.val), batches.test, batches.predict, len(predictions)) == (4, 4, 2, 2, 2)
    assert run.global_step == 4


@every_module
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"val_check_interval": 2}, [2, 4, 7, 9]),
        ({"val_check_interval": 0.4}, [2, 4, 7, 9]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6, 9]),
        ({"check_val_every_n_epoch": 2}, [10]),
        ({"limit_val_batches": 0}, []),
    ],
    ids=str,
)
def test_validation_comes_when_the_flags_say(
    name: str, flags: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    batches, volume = Batches(), HypervolumeCallback((5.0, 5.0), **objectives(name), dirpath=tmp_path)
    run = trainer([batches, volume], max_epochs=2, **flags)
    run.fit(MODULES[name](), train_loader(), val_loader())
    assert batches.validated_at == expected
    assert [row["step"] for row in volume.curve] == expected
    assert run.global_step == 2 * NUM_BATCHES


@every_module
def test_max_time_stops_after_a_whole_batch(name: str) -> None:
    run = trainer(max_epochs=-1, max_time=timedelta(microseconds=1))
    module = MODULES[name]()
    run.fit(module, train_loader())
    assert (run.global_step, module.batches_seen) == (1, 1)


@every_module
@pytest.mark.parametrize(("accumulated", "max_steps", "num_batches"), [(1, 7, 7), (2, 4, 7), (2, 3, 5)])
def test_max_steps_counts_the_batches_after_which_the_optimiser_steps(
    name: str, accumulated: int, max_steps: int, num_batches: int
) -> None:
    """The last batch of an epoch steps always: of five batches accumulated by two come three steps."""
    module = MODULES[name](accumulate_batches=accumulated)
    run = trainer(max_epochs=-1, max_steps=max_steps)
    run.fit(module, train_loader())
    assert (run.global_step, module.batches_seen) == (max_steps, num_batches)


@every_module
def test_what_does_not_reach_manual_optimisation_is_refused_by_the_name_of_what_does(name: str) -> None:
    for flags, argument in (
        ({"gradient_clip_val": 1.0}, "gradient_clip_norm"),
        ({"accumulate_grad_batches": 2}, "accumulate_batches"),
    ):
        with pytest.raises(MisconfigurationException, match=rf"{name}\({argument}=...\)"):
            trainer(**flags).fit(MODULES[name](), train_loader())
