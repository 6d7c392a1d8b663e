"""The smallest modules that the callbacks can observe, and a quiet trainer.

Both modules follow a script: validation number ``v`` shows ``script[v]``, and the sanity check shows zeros, which no
other point can dominate, so that it would be noticed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class _Scripted(pl.LightningModule):
    count: Tensor

    def __init__(self, script: Tensor) -> None:
        super().__init__()
        self.script = script
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("count", torch.tensor(0))

    def scene(self) -> Tensor:
        """What the validation now running shows."""
        return self.script[int(self.count) - 1] if self.count > 0 else torch.zeros_like(self.script[0])

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.count += 1

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.weight - 1.0).square().sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=2)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=2)


class Population(_Scripted):
    """Satisfies ``PopulationProtocol``; ``script`` has shape ``(V, P, T)``."""

    def __init__(self, script: Tensor) -> None:
        super().__init__(script)
        weights = torch.linspace(0, 1, script.shape[1])
        rest = (1 - weights) / (script.shape[2] - 1)
        self.register_buffer("preferences", torch.stack([weights, *[rest] * (script.shape[2] - 1)], dim=1))

    @property
    def task_names(self) -> tuple[str, ...]:
        return ("left", "right", "third", "fourth", "fifth")[: self.script.shape[2]]

    @property
    def objective_values(self) -> Tensor:
        if not self.trainer.validating and not self.trainer.training and not self.trainer.sanity_checking:
            raise RuntimeError("read before the first validation")
        values = self.scene().clone()
        if torch.distributed.is_initialized():  # hangs unless every rank reads
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        return values

    @property
    def metric_values(self) -> Mapping[str, Tensor]:
        return {f"accuracy/{name}": 1.0 - value for name, value in zip(self.task_names, self.scene().T, strict=True)}


class Single(_Scripted):
    """A plain module that logs two metrics, ``val/left`` and ``val/right``, in one of two hooks.

    ``script`` has shape ``(V, 2)``; a row that holds infinity is not logged at all. Under DDP rank zero is 0.25 above
    the script and the others are below it, so that the mean of two is the script's.
    """

    def __init__(self, script: Tensor, hook: str) -> None:
        super().__init__(script)
        self.hook = hook
        self.synchronised = True

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.hook == "validation_step":
            self._log_scene()

    def on_validation_epoch_end(self) -> None:
        if self.hook == "on_validation_epoch_end":
            self._log_scene()

    def _log_scene(self) -> None:
        left, right = self.scene().tolist()
        if left != float("inf"):
            offset = 0.25 if self.global_rank == 0 else -0.25
            offset *= self.trainer.world_size > 1
            self.log_dict({"val/left": left + offset, "val/right": right + offset}, sync_dist=self.synchronised)


@pytest.fixture
def population() -> Callable[[Tensor], Population]:
    return Population


@pytest.fixture
def single() -> Callable[[Tensor, str], Single]:
    return Single


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(callbacks=list(callbacks), **(defaults | options))

    return make


@pytest.fixture
def forked() -> Iterator[None]:
    """Restore what launching processes leaves behind in the parent."""
    environment, rank = dict(os.environ), getattr(rank_zero_only, "rank", None)
    yield
    os.environ.clear()
    os.environ.update(environment)
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
