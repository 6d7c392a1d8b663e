"""How much the gradients of the tasks point against one another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from mtl_lightning.callbacks.heat_map import heat_map
from mtl_lightning.callbacks.measuring import MeasuringCallback, finite, latest_values, publish
from mtl_lightning.callbacks.output import logged_step, write_rows
from mtl_lightning.callbacks.task_losses import LossesFn, ParametersFn, TaskGradients

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GradientConflictCallback(MeasuringCallback):
    """Measures the cosines between the gradients of the tasks on the shared parameters, on any LightningModule.

    Two tasks conflict where the cosine is negative: to first order, a step for one then raises the loss of the other.
    Measured before every n-th batch, on that batch, for one forward and ``T`` backward passes and the memory of ``T``
    gradients. That leaves the training as it is, to the last bit: see
    :class:`~mtl_lightning.callbacks.task_losses.TaskGradients`. Under DDP the gradients are averaged over the ranks
    before their cosines are taken. A task without labels in the batch, or with a zero gradient, has no cosine.

    Logged, at once and under the step of the batch, all without unit but the norms:

    - ``gradient_cosine/<a>/<b>``, for each pair once, and ``gradient_cosine``, their mean;
    - ``gradient_conflict``: the share of pairs whose cosine is negative, in [0, 1];
    - ``gradient_norm/<task>``, in the unit of the loss per that of the parameters;
    - ``gradient_conflict_seconds``: of the latest measurement, in seconds;
    - ``gradient_conflict``, the figure of the latest cosines, to TensorBoard and W&B.

    Files, from rank zero and each whole or not at all: ``gradient_cosine.csv`` (``epoch``, ``batch``, ``first``,
    ``second``, ``cosine``) and ``gradient_conflict.csv`` (``epoch``, ``batch``, ``conflict``, ``mean_cosine``,
    ``norm/<task>``) after each epoch; ``gradient_conflict-epoch=003-step=000123.png`` and, when fitting ends,
    ``gradient_conflict.png``. All values are part of the checkpoint. ``fast_dev_run`` writes nothing. The total of
    seconds is ``measure_seconds``; ``CostCallback`` does not count them.

    Args:
        every_n_batches: Measure before the first and then every such number of batches; None for the first batch of
            each epoch.
        losses_fn: From module and batch to the losses, task name to tensor of shape ``()``; by default the module's
            ``batch_losses(batch)`` or ``task_losses(batch)``. It should neither log nor update metrics.
        parameters_fn: From the module to the shared parameters; by default those that at least two losses depend on.
        dirpath: The folder; by default ``gradient_conflict`` in ``trainer.log_dir``, or in
            ``trainer.default_root_dir``.
        figure_every: Draw after every such number of epochs; 0 draws ``gradient_conflict.png`` only.
        name: What takes the place of ``gradient`` in all names above, so that several instances can be attached, for
            example one for each layer.

    Raises:
        ValueError: If an argument is not usable; before training, if the module cannot be asked for its losses.
        OSError: Before training, if the folder is not writable.

    Example:
        >>> callback = GradientConflictCallback(every_n_batches=200)
        >>> callback.cosines.shape
        torch.Size([0, 0])

    References:
        T. Yu, S. Kumar, A. Gupta, S. Levine, K. Hausman, C. Finn, "Gradient Surgery for Multi-Task Learning", NeurIPS
        2020, arXiv 2001.06782.
    """

    def __init__(
        self,
        every_n_batches: int | None = 50,
        losses_fn: LossesFn | None = None,
        parameters_fn: ParametersFn | None = None,
        *,
        dirpath: str | Path | None = None,
        figure_every: int = 1,
        name: str = "gradient",
    ) -> None:
        super().__init__(f"{name}_conflict", every_n_batches, dirpath, figure_every)
        self.gradients = TaskGradients(losses_fn, parameters_fn)
        self._prefix = name
        self._records: list[tuple[int, int, np.ndarray, list[float]]] = []

    @property
    def cosines(self) -> Tensor:
        """The latest cosines, shape ``(T, T)``, float64; NaN where nothing was measured."""
        return torch.from_numpy(self._latest())

    @property
    def history(self) -> list[dict[str, int | float]]:
        """One row per measurement, for a table: the columns of ``gradient_conflict.csv``."""
        return [
            {"epoch": epoch, "batch": batch, **_summary(cosines)}
            | {
                f"norm/{task}": norms[index] if index < len(norms) else float("nan")
                for index, task in enumerate(self.task_names)
            }
            for epoch, batch, cosines, norms in self._records
        ]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check module and folder before anything is trained."""
        if stage == "fit":
            self.gradients.setup(trainer, pl_module)
        super().setup(trainer, pl_module, stage)

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Measure and publish the cosines on ``batch``."""
        with self.gradients.measure(trainer, pl_module, batch, seed=self.batches_seen) as measurement:
            if measurement is None:
                return
            gramian = self.placed(measurement.names, measurement.gramian())
        norms = np.sqrt(np.diag(gramian))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = gramian / np.outer(norms, norms)
        cosines = np.where(np.isfinite(cosines), cosines.clip(-1.0, 1.0), np.nan)
        self._records.append((trainer.current_epoch, self.batches_seen, cosines, norms.tolist()))
        summary = _summary(cosines)
        values = {f"{self._prefix}_cosine/{first}/{second}": value for first, second, value in self._pairs(cosines)}
        values |= {f"{self._prefix}_cosine": summary["mean_cosine"], f"{self._prefix}_conflict": summary["conflict"]}
        values |= {
            f"{self._prefix}_norm/{task}": norm for task, norm in zip(self.task_names, norms.tolist(), strict=True)
        }
        publish(trainer, pl_module, finite(values), logged_step(trainer))

    def has_measured(self) -> bool:
        """Return whether there is a value."""
        return bool(self._records)

    def write_tables(self, folder: Path) -> None:
        """Write ``<name>_cosine.csv`` and ``<name>_conflict.csv``."""
        rows = [
            {"epoch": epoch, "batch": batch, "first": first, "second": second, "cosine": value}
            for epoch, batch, cosines, _ in self._records
            for first, second, value in self._pairs(cosines)
        ]
        write_rows(folder / f"{self._prefix}_cosine.csv", ("epoch", "batch", "first", "second", "cosine"), rows)
        history = self.history
        write_rows(folder / f"{self.name}.csv", list(history[-1]), history)

    def figure(self) -> Figure:
        """Return the latest cosines as a new ``matplotlib.figure.Figure``, which ``pyplot`` does not manage.

        Raises:
            ValueError: If there are none yet.
        """
        if not self._records:
            raise ValueError("There should be at least one measurement to draw. Found none.")
        epoch, batch, cosines, _ = self._records[-1]
        share = _summary(cosines)["conflict"]
        return heat_map(
            self._latest(),
            self.task_names,
            title=f"Gradients in epoch {epoch}, after {batch} batches\n{share:.0%} of the pairs conflict",
            labels=("task", "task"),
            value="cosine (negative: conflict)",
            limits=(-1.0, 1.0),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all values as plain numbers, which Lightning can load with ``weights_only=True``."""
        records = [[epoch, batch, cosines.tolist(), norms] for epoch, batch, cosines, norms in self._records]
        return super().state_dict() | {"records": records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        super().load_state_dict(state_dict)
        self._records = [
            (epoch, batch, np.array(cosines), list(norms)) for epoch, batch, cosines, norms in state_dict["records"]
        ]

    def _pairs(self, cosines: np.ndarray) -> list[tuple[str, str, float]]:
        rows, columns = np.triu_indices(len(cosines), k=1)
        pairs = zip(rows.tolist(), columns.tolist(), cosines[rows, columns].tolist(), strict=True)
        return [
            (self.task_names[row], self.task_names[column], value) for row, column, value in pairs if value == value
        ]

    def _latest(self) -> np.ndarray:
        return latest_values((cosines for _, _, cosines, _ in self._records), len(self.task_names))


def _summary(cosines: np.ndarray) -> dict[str, float]:
    """Return the share of negative cosines and their mean, over those pairs that have one; NaN if none has."""
    values = cosines[np.triu_indices(len(cosines), k=1)]
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return {"conflict": float("nan"), "mean_cosine": float("nan")}
    return {"conflict": float((values < 0).mean()), "mean_cosine": float(values.mean())}
