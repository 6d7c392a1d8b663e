"""Runs of MT2O with their hypervolume against gradient evaluations and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch import Tensor

from mtl_lightning.modules import MT2OModule
from mtl_lightning.pareto import hypervolume


class Curve(Callback):
    """Hypervolume of the validation losses against gradient evaluations and seconds of training.

    A gradient evaluation is one backward pass of one subproblem on one batch. Seconds are of training, validation left
    out: on a GPU by the clock, on the CPU of processor time, which other load on the machine hardly changes.

    Args:
        reference: The reference point, shape ``(T,)``.
    """

    def __init__(self, reference: Tensor) -> None:
        self.reference = reference
        self.now: Callable[[], float] = time.process_time
        self.points: list[dict[str, float]] = []
        self.evaluations = 0
        self.seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        if pl_module.device.type == "cuda":
            self.now = _synchronized_clock
        self._since = self.now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Count."""
        self.evaluations += pl_module.population.size

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self.seconds += self.now() - self._since

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep a point and start the clock."""
        value = hypervolume(pl_module.objective_values, self.reference)
        point = {"evaluations": self.evaluations, "seconds": round(self.seconds, 4), "hypervolume": round(value, 6)}
        self.points.append(point)
        self._since = self.now()


def run(
    build: Callable[[], MT2OModule],
    data: LightningDataModule,
    batches: int,
    reference: Tensor,
    seed: int,
    accelerator: str = "cpu",
    validations: int = 20,
) -> dict[str, Any]:
    """Train one population; return its curve, and hypervolume and losses on the test set."""
    seed_everything(seed, verbose=False)
    module = build()
    curve = Curve(reference)
    trainer = Trainer(
        max_steps=batches,
        max_epochs=-1,
        val_check_interval=max(1, batches // validations),
        check_val_every_n_epoch=None,
        accelerator=accelerator,
        devices=1,
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    losses = module.objective_values
    return {
        "curve": curve.points,
        "seconds": curve.seconds,
        "evaluations": curve.evaluations,
        "test_hypervolume": hypervolume(losses, reference),
        "test_losses": [[round(loss, 6) for loss in row] for row in losses.tolist()],
    }


def reach(curve: Sequence[dict[str, float]], target: float, what: str) -> float | None:
    """Return how much of ``what`` the curve needed to reach the target, between validations by interpolation."""
    before = {"evaluations": 0.0, "seconds": 0.0, "hypervolume": 0.0}
    for point in curve:
        if point["hypervolume"] >= target:
            gained = point["hypervolume"] - before["hypervolume"]
            share = (target - before["hypervolume"]) / gained if gained else 1.0
            return before[what] + share * (point[what] - before[what])
        before = point
    return None


def _synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
