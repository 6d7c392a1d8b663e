"""Small runs on real data, for processes that are stopped and started again."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn

from mtl_lightning.datamodules.multi_target import MultiTargetDataModule
from mtl_lightning.grouping import Threshold
from mtl_lightning.losses import MaskedMSELoss
from mtl_lightning.modules import MT2OModule, MultiTaskModule, TaskGroupModule, WeightedModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task
from mtl_lightning.weighting import Uncertainty

TARGETS = ("SLUMP_cm", "FLOW_cm", "Compressive_Strength_Mpa")
BATCHES = 6  # of an epoch: 82 samples in batches of 16 over all ranks


class Slow(nn.Module):
    """A loss that takes its time, so that a signal finds the process inside a batch."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.loss = MaskedMSELoss()
        self.seconds = seconds

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        time.sleep(self.seconds)
        loss: Tensor = self.loss(preds, target)
        return loss


def data(world_size: int = 1, num_workers: int = 0) -> MultiTargetDataModule:
    """Return a table of which each batch holds 16 samples over all ranks."""
    return MultiTargetDataModule(name="slump", batch_size=16 // world_size, num_workers=num_workers, test_fraction=0.0)


def network(dropout: float = 0.0, width: int = 8) -> MultiHeadNetwork:
    torch.manual_seed(0)
    encoder = nn.Sequential(MLP(7, [width]), nn.Dropout(dropout))
    return MultiHeadNetwork(encoder, {name: nn.Linear(width, 1) for name in TARGETS})


def tasks(seconds: float = 0.0) -> list[Task]:
    return [Task(name, Slow(seconds if name == TARGETS[0] else 0.0)) for name in TARGETS]


def mt2o(**arguments: Any) -> MT2OModule:
    defaults: dict[str, Any] = {
        "network": network(),
        "tasks": tasks(),
        "preferences": simplex_lattice(num_tasks=3, num_divisions=2),
        "optimizer": partial(torch.optim.SGD, lr=0.05),
        "backend": "loop",
    }
    return MT2OModule(**(defaults | arguments))


def task_groups(**arguments: Any) -> TaskGroupModule:
    defaults: dict[str, Any] = {
        "network": network(),
        "tasks": tasks(),
        "optimizer": partial(torch.optim.SGD, lr=0.05),
        "grouping": Threshold(0.0),
        "warmup_batches": 3,
        "affinity_decay": 0.1,
    }
    return TaskGroupModule(**(defaults | arguments))


def weighted(**arguments: Any) -> WeightedModule:
    defaults: dict[str, Any] = {
        "network": network(),
        "tasks": tasks(),
        "optimizer": partial(torch.optim.SGD, lr=0.05),
        "weighting": Uncertainty(),
    }
    return WeightedModule(**(defaults | arguments))


KINDS: dict[str, Callable[..., MultiTaskModule]] = {"mt2o": mt2o, "task_groups": task_groups, "weighted": weighted}


class SaveEachBatch(Callback):
    """Write a checkpoint after every batch, named by the number of batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"batch-{pl_module.batches_seen}.ckpt")


class Report(Callback):
    """Print a line before each batch, and another after it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        print(f"begins {pl_module.batches_seen + 1}", flush=True)  # noqa: T201

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        print(f"ends {pl_module.batches_seen}", flush=True)  # noqa: T201


def finish(
    trainer: Trainer, module: MultiTaskModule, path: Path, world_size: int = 1, ckpt_path: Path | str | None = None
) -> None:
    """Train, and write to ``path`` what this rank ends with; ``ckpt_path`` is where it goes on from, if anywhere."""
    # A process that goes on has another random state, and what counts is that of the checkpoint.
    seed_everything(5 if ckpt_path is None else 99)
    trainer.fit(module, datamodule=data(world_size), ckpt_path=None if ckpt_path is None else str(ckpt_path))
    state: dict[str, Any] = {"state": module.state_dict(), "steps": trainer.global_step}
    state["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save(state, path)


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Compare two ends of runs; with tolerance 0, bit for bit, extra states included."""
    assert found["steps"] == expected["steps"]
    assert found["metrics"].keys() == expected["metrics"].keys()
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        other = found["state"][name]
        if not isinstance(value, Tensor):
            assert tolerance or _plain(other) == _plain(value), name
        elif tolerance and value.is_floating_point():
            torch.testing.assert_close(other, value, rtol=10 * tolerance, atol=tolerance, equal_nan=True, msg=name)
        else:
            assert torch.equal(torch.nan_to_num(other), torch.nan_to_num(value)), name
    for name, number in expected["metrics"].items():
        if name.startswith("val"):
            limit = 10 * tolerance * abs(number)
            assert abs(found["metrics"][name] - number) <= limit, name


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.nan_to_num(value).tolist()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
