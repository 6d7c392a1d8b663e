"""Which tasks help which: the affinity over training, read or measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mtl_lightning.callbacks.heat_map import heat_map
from mtl_lightning.callbacks.measuring import MeasuringCallback, finite, latest_values, publish
from mtl_lightning.callbacks.output import logged_step, write_rows
from mtl_lightning.callbacks.task_losses import LossesFn, Measurement, ParametersFn, TaskGradients
from mtl_lightning.protocols import TaskGroupProtocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Literal["look_ahead", "gradient"]
"""How the affinity is measured: see :class:`AffinityCallback`."""


class AffinityCallback(MeasuringCallback):
    r"""Shows the affinity from each task to each other one, on any LightningModule.

    A module that keeps an affinity itself (``mtl_lightning.protocols.TaskGroupProtocol``, such as ``TaskGroupModule``)
    is read, at the end of each epoch or after every n-th batch. With any other module, and with ``losses_fn``, it is
    measured before a batch, on that batch. With the losses ``L_k``, their gradients ``g_i`` on the shared parameters
    ``theta`` and the learning rate ``lr``, the affinity from task ``i`` to task ``k`` is

    - ``"look_ahead"``: ``1 - L_k(theta - lr g_i) / L_k(theta)`` (Fifty et al.), the share of its loss that ``k`` is
      spared by a step for ``i``. It costs ``1 + T`` forward and ``T`` backward passes. The difference is lost below
      about 1e-6 of the loss in float32, and below 1e-2 in 16-bit precision, where the other measure serves better;
    - ``"gradient"``: its first order, ``lr <g_i, g_k> / L_k(theta)``, for one forward and ``T`` backward passes and the
      memory of ``T`` gradients.

    It is not defined for losses that are not positive. Measuring leaves the training as it is, to the last bit: see
    :class:`~mtl_lightning.callbacks.task_losses.TaskGradients`, also for DDP, where losses and gradients are those of
    all ranks. The first measurement costs ``T`` more backward passes unless ``parameters_fn`` is given.

    Logged, at once and under the step of the batch: ``affinity/<from>/<to>``, without unit; ``affinity_seconds``, the
    duration of the latest measurement; ``affinity``, the figure, to TensorBoard and W&B. Files, from rank zero and each
    whole or not at all:

    - ``affinity.csv``, after each epoch: ``epoch``, ``batch`` (how many were trained before), ``from``, ``to``,
      ``value``;
    - ``affinity-epoch=003-step=000123.png`` and, when fitting ends, ``affinity.png``: the latest values.

    All values are part of the checkpoint, ``T^2`` numbers each time. ``fast_dev_run`` writes nothing. The total of
    seconds is ``measure_seconds``; ``CostCallback`` does not count them.

    Args:
        every_n_batches: Measure before the first and then every such number of batches, or read after every such
            number; by default measure on the first batch of each epoch, or read at the end of each.
        losses_fn: From module and batch to the losses, task name to tensor of shape ``()``; by default the module's
            ``batch_losses(batch)`` or ``task_losses(batch)``. It should neither log nor update metrics.
        parameters_fn: From the module to the shared parameters; by default those that at least two losses depend on.
        measure: What is measured.
        learning_rate: ``lr``, by default that of the optimiser's first parameter group at the time.
        dirpath: The folder; by default ``affinity`` in ``trainer.log_dir``, or in ``trainer.default_root_dir``.
        figure_every: Draw after every such number of epochs; 0 draws ``affinity.png`` only.
        name: What takes the place of ``affinity`` in all names above, so that several instances can be attached.

    Raises:
        ValueError: If an argument is not usable; before training, if the module cannot be asked for its losses.
        OSError: Before training, if the folder is not writable.

    Example:
        >>> callback = AffinityCallback(every_n_batches=100, measure="gradient")
        >>> callback.matrix.shape
        torch.Size([0, 0])

    References:
        C. Fifty, E. Amid, Z. Zhao, T. Yu, R. Anil, C. Finn, "Efficiently Identifying Task Groupings for Multi-Task
        Learning", NeurIPS 2021, arXiv 2109.04617.
    """

    def __init__(
        self,
        every_n_batches: int | None = None,
        losses_fn: LossesFn | None = None,
        parameters_fn: ParametersFn | None = None,
        *,
        measure: Measure = "look_ahead",
        learning_rate: float | None = None,
        dirpath: str | Path | None = None,
        figure_every: int = 1,
        name: str = "affinity",
    ) -> None:
        super().__init__(name, every_n_batches, dirpath, figure_every)
        if measure not in get_args(Measure):
            raise ValueError(f"`measure` should be one of {get_args(Measure)}. Found {measure!r}.")
        if learning_rate is not None and not learning_rate > 0:
            raise ValueError(f"`learning_rate` should be positive, or None. Found {learning_rate}.")
        self.gradients = TaskGradients(losses_fn, parameters_fn)
        self.measured = measure
        self.learning_rate = learning_rate
        self._reads = False
        self._records: list[tuple[int, int, np.ndarray]] = []
        self._open_epoch: int | None = None  # that of batches after which the affinity is still to be read

    @property
    def matrix(self) -> Tensor:
        """The latest affinity from row to column, shape ``(T, T)``, float64; NaN where nothing was measured."""
        return torch.from_numpy(self._latest())

    @property
    def history(self) -> list[dict[str, int | float | str]]:
        """All values, in order, as rows for a table: the columns of ``affinity.csv``."""
        return [
            {"epoch": epoch, "batch": batch, "from": source, "to": target, "value": float(matrix[row, column])}
            for epoch, batch, matrix in self._records
            for row, source in enumerate(self.task_names[: len(matrix)])
            for column, target in enumerate(self.task_names[: len(matrix)])
            if np.isfinite(matrix[row, column])
        ]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check module and folder before anything is trained."""
        if stage == "fit":
            self._reads = self.gradients.losses_fn is None and keeps_affinity(pl_module)
            if not self._reads:
                self.gradients.setup(trainer, pl_module)
                if self.measured == "look_ahead" and not any(bits in str(trainer.precision) for bits in ("32", "64")):
                    rank_zero_warn(
                        f"The look-ahead affinity should be measured in 32 bits. Found {trainer.precision!r}, in which "
                        "the losses before and after a small step hardly differ; use `measure='gradient'`."
                    )
        super().setup(trainer, pl_module, stage)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is time."""
        if not self._reads:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and read if it is time."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._reads:
            return
        if self.every_n_batches is None:
            self._open_epoch = trainer.current_epoch
        elif self.batches_seen % self.every_n_batches == 0:
            self._read(trainer, pl_module, trainer.current_epoch)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for the end of an epoch whose last batch was followed by the checkpoint of which this run goes on."""
        if self._open_epoch is not None and self._open_epoch != trainer.current_epoch:
            self._read(trainer, pl_module, self._open_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read if it is time; write the table and, if it is time, the figure."""
        if self._open_epoch is not None:
            self._read(trainer, pl_module, self._open_epoch, epoch_is_over=True)
        super().on_train_epoch_end(trainer, pl_module)

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Measure and publish the affinity on ``batch``."""
        learning_rate = self._learning_rate(trainer)
        with self.gradients.measure(trainer, pl_module, batch, seed=self.batches_seen) as measurement:
            if measurement is None:
                return
            take = _look_ahead if self.measured == "look_ahead" else _first_order
            values = take(measurement, learning_rate)
            values[:, ~(measurement.losses > 0)] = torch.nan
            self._add(trainer, pl_module, trainer.current_epoch, measurement.names, values, logged_step(trainer))

    def has_measured(self) -> bool:
        """Return whether there is a value."""
        return bool(self._records)

    def write_tables(self, folder: Path) -> None:
        """Write ``<name>.csv``."""
        write_rows(folder / f"{self.name}.csv", ("epoch", "batch", "from", "to", "value"), self.history)

    def figure(self) -> Figure:
        """Return the latest affinity as a new ``matplotlib.figure.Figure``, which ``pyplot`` does not manage.

        Raises:
            ValueError: If there is none yet.
        """
        if not self._records:
            raise ValueError("There should be at least one measurement to draw. Found none.")
        epoch, batch, _ = self._records[-1]
        return heat_map(
            self._latest(),
            self.task_names,
            title=f"What a step for one task does to the loss of another\nepoch {epoch}, after {batch} batches",
            labels=("from the task of the step", "to the task of the loss"),
            value="affinity, share of the loss (positive: helps)",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all values as plain numbers, which Lightning can load with ``weights_only=True``."""
        return super().state_dict() | {
            "records": [[epoch, batch, matrix.tolist()] for epoch, batch, matrix in self._records],
            "open_epoch": self._open_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        super().load_state_dict(state_dict)
        self._records = [(epoch, batch, np.array(rows)) for epoch, batch, rows in state_dict["records"]]
        self._open_epoch = state_dict["open_epoch"]

    def _read(self, trainer: pl.Trainer, pl_module: Any, epoch: int, epoch_is_over: bool = False) -> None:
        self._open_epoch = None
        step = logged_step(trainer, epoch_is_over=epoch_is_over)
        self._add(trainer, pl_module, epoch, list(pl_module.task_names), pl_module.affinity_matrix, step)

    def _add(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        epoch: int,
        names: list[str],
        values: Tensor,
        step: int,
    ) -> None:
        matrix = self.placed(names, values)
        matrix[~np.isfinite(matrix)] = np.nan
        self._records.append((epoch, self.batches_seen, matrix))
        entries = zip(self.task_names, matrix, strict=True)
        keys = {
            f"{self.name}/{source}/{target}": float(value)
            for source, row in entries
            for target, value in zip(self.task_names, row, strict=True)
        }
        publish(trainer, pl_module, finite(keys), step)

    def _latest(self) -> np.ndarray:
        return latest_values((matrix for _, _, matrix in self._records), len(self.task_names))

    def _learning_rate(self, trainer: pl.Trainer) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        if not trainer.optimizers:
            raise ValueError("`learning_rate` should be given for a module without an optimizer. Found None.")
        return float(trainer.optimizers[0].param_groups[0]["lr"])


def keeps_affinity(pl_module: object) -> TypeGuard[TaskGroupProtocol]:
    """Return whether ``pl_module`` has an affinity of its own, without evaluating it."""
    return {"task_names", "affinity_matrix"} <= set(dir(pl_module))


def _look_ahead(measurement: Measurement, learning_rate: float) -> Tensor:
    """Return the affinity, shape ``(T, T)``, from the losses after a step for each single task."""
    rows = [measurement.losses_after(learning_rate * measurement.gradient(name)) for name in measurement.names]
    return 1.0 - torch.stack(rows) / measurement.losses


def _first_order(measurement: Measurement, learning_rate: float) -> Tensor:
    """Return its first order in the learning rate, shape ``(T, T)``."""
    return learning_rate * measurement.gramian() / measurement.losses
