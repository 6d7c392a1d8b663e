"""What callbacks share that measure something of the tasks every so many batches."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mtl_lightning.callbacks.output import draw, log_picture, logged_step, output_folder, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MeasuringCallback(Callback, ABC):
    """Calls ``measure`` before every n-th training batch, and writes tables and figures.

    Args:
        name: The name of the folder, of the figures and of the state in checkpoints.
        every_n_batches: Measure before the first and then every such number of batches; None for the first batch of
            each epoch.
        dirpath: The folder; by default ``name`` in ``trainer.log_dir``, or in ``trainer.default_root_dir``.
        figure_every: Draw after every such number of epochs; 0 draws when fitting ends only.

    Attributes:
        folder: The folder, None before ``setup`` and with ``fast_dev_run``, which writes nothing.
        batches_seen: How many batches have been trained.
        is_measuring: Whether a measurement is going on, so that others do not take its forward passes for training.
        measure_seconds: Seconds spent in all measurements so far.
    """

    def __init__(self, name: str, every_n_batches: int | None, dirpath: str | Path | None, figure_every: int) -> None:
        if every_n_batches is not None and every_n_batches < 1:
            raise ValueError(f"`every_n_batches` should be at least 1, or None. Found {every_n_batches}.")
        if figure_every < 0:
            raise ValueError(f"`figure_every` should be a number of epochs, or 0. Found {figure_every}.")
        self.name = name
        self.every_n_batches = every_n_batches
        self.dirpath = dirpath
        self.figure_every = figure_every
        self.folder: Path | None = None
        self.batches_seen = 0
        self.is_measuring = False
        self.measure_seconds = 0.0
        self._task_names: list[str] = []
        self._warned = False

    @property
    def state_key(self) -> str:
        """One state per name, so that several instances can be attached."""
        return self._generate_state_key(name=self.name)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The ``T`` tasks, in the order of rows and columns: that of the module, or that in which they were seen."""
        return tuple(self._task_names)

    @abstractmethod
    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Measure on ``batch``, which is trained next."""

    @abstractmethod
    def has_measured(self) -> bool:
        """Return whether there is something to write."""

    @abstractmethod
    def write_tables(self, folder: Path) -> None:
        """Write everything measured so far."""

    @abstractmethod
    def figure(self) -> Figure:
        """Return the latest state as a new ``matplotlib.figure.Figure``, which ``pyplot`` does not manage."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the folder is writable before anything is trained."""
        if stage == "fit":
            self.add_tasks(getattr(pl_module, "task_names", ()))
            self.folder = output_folder(trainer, self.dirpath, default=self.name)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is time."""
        every = self.every_n_batches
        if (batch_idx if every is None else self.batches_seen % every) != 0:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # else the rest of the batch before would count as measuring
        start = time.perf_counter()
        self.is_measuring = True
        try:
            self.measure(trainer, pl_module, batch)
        finally:
            self.is_measuring = False
        seconds = time.perf_counter() - start
        self.measure_seconds += seconds
        slowest = trainer.strategy.reduce(torch.tensor(seconds, device=pl_module.device), reduce_op="max")
        publish(trainer, pl_module, {f"{self.name}_seconds": float(slowest)}, logged_step(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        self.batches_seen += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the tables and, if it is time, the figure."""
        if self.measure_seconds > 0 and not self.has_measured() and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"`{type(self).__name__}` has measured nothing so far: batches should have finite losses of at least "
                "two tasks. Found none when it was time to measure."
            )
        if self.folder is None or not trainer.is_global_zero or not self.has_measured():
            return
        self.write_tables(self.folder)
        if self.figure_every > 0 and (trainer.current_epoch + 1) % self.figure_every == 0:
            picture = draw(self.figure())
            name = f"{self.name}-epoch={trainer.current_epoch:03d}-step={trainer.global_step:06d}.png"
            write_picture(self.folder / name, picture)
            log_picture(trainer, self.name, picture, logged_step(trainer, epoch_is_over=True))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the tables and the final figure."""
        if self.folder is not None and trainer.is_global_zero and self.has_measured():
            self.write_tables(self.folder)
            write_picture(self.folder / f"{self.name}.png", draw(self.figure()))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what a run that was stopped has measured."""
        self.on_fit_end(trainer, pl_module)

    def add_tasks(self, names: Iterable[str]) -> None:
        """Append those tasks that are not known yet."""
        self._task_names += [name for name in names if name not in self._task_names]

    def placed(self, names: list[str], values: Tensor) -> np.ndarray:
        """Return ``values``, shape ``(T', T')``, of some tasks as a matrix of all tasks, shape ``(T, T)``, else NaN."""
        self.add_tasks(names)
        matrix = np.full((len(self._task_names), len(self._task_names)), np.nan)
        places = [self._task_names.index(name) for name in names]
        matrix[np.ix_(places, places)] = values.detach().double().cpu().numpy()
        return matrix

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, which Lightning can load with ``weights_only=True``."""
        return {
            "batches_seen": self.batches_seen,
            "measure_seconds": self.measure_seconds,
            "task_names": list(self._task_names),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.batches_seen = state_dict["batches_seen"]
        self.measure_seconds = state_dict["measure_seconds"]
        known, self._task_names = self._task_names, list(state_dict["task_names"])
        self.add_tasks(known)


def latest_values(matrices: Iterable[np.ndarray], num_tasks: int) -> np.ndarray:
    """Return the last finite value of each entry, shape ``(T, T)``; NaN where there is none.

    ``matrices`` may be smaller, from before all tasks had been seen.
    """
    latest = np.full((num_tasks, num_tasks), np.nan)
    for matrix in matrices:
        part = latest[: len(matrix), : len(matrix)]
        np.copyto(part, matrix, where=np.isfinite(matrix))
    return latest


def publish(trainer: pl.Trainer, pl_module: pl.LightningModule, values: Mapping[str, float], step: int) -> None:
    """Put ``values`` at once where ``pl_module.log`` would put them.

    ``log`` would wait for the next ``log_every_n_steps``, and drop what was measured in between; and it is refused in
    some hooks. Values should be equal on all ranks, and ``step`` that of ``logged_step``.
    """
    tensors = {key: torch.tensor(value, device=pl_module.device) for key, value in values.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Return those ``values`` that are finite: what was not measured has no value, rather than a bad one."""
    return {key: value for key, value in values.items() if math.isfinite(value)}
