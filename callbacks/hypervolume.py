"""The hypervolume over training: one number for the progress of a whole front."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from mtl_lightning.callbacks.objectives import Direction, ObjectivesCallback, Points, attached
from mtl_lightning.callbacks.output import draw, logged_step, write_atomically, write_picture, write_rows
from mtl_lightning.palette import GRID, INK, MODEL
from mtl_lightning.pareto import hypervolume, is_nondominated

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HypervolumeCallback(ObjectivesCallback):
    """Logs the hypervolume of each validation's points, on any LightningModule; larger is better.

    With a module that trains a population (``mtl_lightning.protocols.PopulationProtocol``, such as ``MT2OModule``) the
    points of a validation are those of its models; with any other module it is one point, from metrics that it logs.
    Points with a NaN or infinite objective are left out, with one warning. The value is exact or approximate as
    ``mtl_lightning.pareto.hypervolume_method`` says.

    Logged after each validation, in the product of the objectives' units:

    - ``hypervolume``: of the points of this validation, also in the progress bar;
    - ``hypervolume/archive``: of all points validated so far.

    ``ModelCheckpoint`` and ``EarlyStopping`` can monitor both, ``mode="max"``. If the module logs an objective in its
    own ``on_validation_epoch_end``, the values are published in ``on_validation_end``: an ``EarlyStopping`` that acts
    there (that is, with ``val_check_interval`` or ``check_val_every_n_epoch`` other than 1) has to stand behind this
    callback in the trainer's list, or it finds no value at first and then that of the validation before.

    Files, from rank zero and each whole or not at all: ``hypervolume.csv`` (``epoch``, ``step``,
    ``logged_step`` as in the archive of ``ParetoFrontCallback``, and both values) and ``hypervolume.json``
    (``reference_point``, from objective to number) after each validation, and the curve, ``hypervolume.png``, when
    fitting ends. ``trainer.validate`` adds a row as well,
    ``fast_dev_run`` writes nothing. Curve, reference point and front are part of the checkpoint.

    Args:
        reference_point: The worst value of interest of each objective, in its own unit and in the order of the
            objectives; for one that is maximised it is a lower bound. By default taken once, from the first validation
            (the sanity check does not count): the worst value of each objective, worse by 10 % of its magnitude. Give
            it to compare runs.
        objectives: From the name of each objective to ``"min"`` or ``"max"``. For a population, tasks (their validation
            loss) or keys of ``metric_values``, by default all tasks; for any other module names of logged metrics, by
            default ``val_loss/<task>`` of all tasks for a module of this library, and required for another.
        dirpath: The folder; by default ``pareto_front`` in ``trainer.log_dir``, or in ``trainer.default_root_dir``.
        name: What replaces ``hypervolume`` in keys and file names, so that several instances can be attached.

    Raises:
        ValueError: If the objectives or the reference point are not usable, in the constructor or before training.
        OSError: Before training, if the folder is not writable.

    Example:
        >>> callback = HypervolumeCallback(reference_point=(2.0, 0.5), objectives={"loss": "min", "accuracy": "max"})
        >>> callback.reference_point
        (2.0, 0.5)
    """

    def __init__(
        self,
        reference_point: Sequence[float] | None = None,
        objectives: Mapping[str, Direction] | None = None,
        dirpath: str | Path | None = None,
        *,
        name: str = "hypervolume",
    ) -> None:
        super().__init__(objectives, dirpath)
        self.name = name
        self._given = None if reference_point is None else tuple(float(value) for value in reference_point)
        if self._given is not None and not all(math.isfinite(value) for value in self._given):
            raise ValueError(f"`reference_point` should be finite. Found {self._given}.")
        if objectives is not None:
            self._check_length()
        self._reference_point = self._given
        self._front: list[list[float]] = []
        self._curve: list[dict[str, int | float]] = []
        self._warned_zero = False

    @property
    def state_key(self) -> str:
        """One state per name and set of objectives, so that several instances can be attached."""
        return self._generate_state_key(name=self.name, objectives=self.reader.given)

    @property
    def reference_point(self) -> tuple[float, ...] | None:
        """The reference point in use, in the units of the objectives; None until it is known."""
        return self._reference_point

    @property
    def curve(self) -> list[dict[str, int | float]]:
        """One row per validation: the columns of ``hypervolume.csv``."""
        return [dict(row) for row in self._curve]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check objectives, reference point and folder before anything is trained."""
        super().setup(trainer, pl_module, stage)
        if self.objectives:
            self._check_length()
        twins = [other for other in attached(trainer, HypervolumeCallback) if other is not self]
        if any(twin.name == self.name for twin in twins):
            raise ValueError(f"Each `HypervolumeCallback` should have a `name` of its own. Found {self.name!r} twice.")

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, points: Points, can_log: bool) -> None:
        """Compute and publish the hypervolume of ``points`` and of all points so far."""
        signs = self.reader.signs
        if self._reference_point is None and len(points.values) > 0:
            self._reference_point = tuple((signs * _beyond_worst(signs * points.values)).tolist())
            rank_zero_info(f"The reference point of {self.name!r} is {self._described(self._reference_point)}.")
        self._extend_front(points.values)
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "logged_step": logged_step(trainer),
            self.name: self._hypervolume(points.values),
            f"{self.name}/archive": self._hypervolume(self._front_values()),
        }
        self._curve.append(row)
        if row[f"{self.name}/archive"] == 0.0:
            self._warn_zero()
        self._publish(trainer, pl_module, row, can_log)
        if self.folder is not None and trainer.is_global_zero:
            write_rows(self._path(self.folder, "csv"), list(row), self._curve)
            self._write_reference_point(self._path(self.folder, "json"))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curve."""
        if self.folder is not None and trainer.is_global_zero and self._curve:
            write_picture(self._path(self.folder, "png"), draw(self.figure()))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw the curve of a run that was stopped."""
        self.on_fit_end(trainer, pl_module)

    def figure(self) -> Figure:
        """Return the curve as a new ``matplotlib.figure.Figure``, which ``pyplot`` does not manage.

        Raises:
            ValueError: If there has been no validation yet.
        """
        if not self._curve:
            raise ValueError("There should be at least one validation to draw. Found none.")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.0, 4.2), dpi=130, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        steps = [row["step"] for row in self._curve]
        archive, latest = f"{self.name}/archive", self.name
        axes.plot(steps, [row[archive] for row in self._curve], color=INK, linewidth=1.2, label="all points so far")
        marker = "o" if len(steps) <= 40 else None
        axes.plot(
            steps,
            [row[latest] for row in self._curve],
            color=MODEL,
            linewidth=1.8,
            marker=marker,
            markersize=4.5,
            markeredgecolor="white",
            label="points of the validation",
        )
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(f"{self.name} (higher is better)")
        if self._reference_point is not None:
            axes.set_title(f"reference point: {self._described(self._reference_point)}", fontsize=10)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
        return figure

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, which Lightning can load with ``weights_only=True``."""
        return {
            "objectives": dict(self.objectives),
            "reference_point": None if self._reference_point is None else list(self._reference_point),
            "front": [list(row) for row in self._front],
            "curve": self.curve,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curve of a checkpoint, with its reference point unless the constructor was given one.

        Raises:
            ValueError: If its objectives are not those of this callback.
        """
        if self.objectives and state_dict["objectives"] not in ({}, self.objectives):
            raise ValueError(
                f"The hypervolume in the checkpoint should be of the objectives {dict(self.objectives)}. "
                f"Found {state_dict['objectives']}."
            )
        saved = None if state_dict["reference_point"] is None else tuple(state_dict["reference_point"])
        if self._given is None:
            self._reference_point = saved
        elif saved is not None and saved != self._given:
            rank_zero_warn(
                f"The curve of {self.name!r} in the checkpoint was computed with the reference point {saved}; from "
                f"here on it is {self._given}."
            )
        self._front = [list(row) for row in state_dict["front"]]
        self._curve = [dict(row) for row in state_dict["curve"]]

    def _check_length(self) -> None:
        if self._given is not None and len(self._given) != len(self.objectives):
            raise ValueError(
                f"`reference_point` should hold {len(self.objectives)} values, one for each of "
                f"{list(self.objectives)}. Found {len(self._given)}."
            )

    def _extend_front(self, values: Tensor) -> None:
        candidates = torch.cat([self._front_values(), values])
        self._front = candidates[is_nondominated(candidates * self.reader.signs)].tolist()

    def _front_values(self) -> Tensor:
        return torch.tensor(self._front, dtype=torch.float64).reshape(-1, len(self.objectives))

    def _hypervolume(self, values: Tensor) -> float:
        if self._reference_point is None:  # no point has been finite yet
            return 0.0
        signs = self.reader.signs
        return hypervolume(values * signs, torch.tensor(self._reference_point, dtype=torch.float64) * signs)

    def _warn_zero(self) -> None:
        if self._warned_zero or not self._front or self._reference_point is None:
            return
        self._warned_zero = True
        signs = self.reader.signs
        best = (self._front_values() * signs).amin(dim=0) * signs
        rank_zero_warn(
            "The hypervolume is 0: no point is better in every objective at once than the reference point "
            f"({self._described(self._reference_point)}). The best values so far are {self._described(best.tolist())}. "
            "That is normal while training has just begun; otherwise choose for each objective a `reference_point` "
            "that is worse than what all useful points reach."
        )

    def _publish(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: Mapping[str, int | float], can_log: bool
    ) -> None:
        values = {key: float(row[key]) for key in (self.name, f"{self.name}/archive")}
        if can_log:
            # Ranks have equal values; "max" keeps them to the last bit, where a mean over three ranks would not.
            for key, value in values.items():
                pl_module.log(key, value, prog_bar=key == self.name, sync_dist=True, reduce_fx="max")
            return
        # Lightning refuses `log` in `on_validation_end`, so the values are put where it would have put them.
        tensors = {key: torch.tensor(value, device=pl_module.device) for key, value in values.items()}
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)
        trainer.progress_bar_metrics[self.name] = values[self.name]
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=logged_step(trainer))

    def _path(self, folder: Path, suffix: str) -> Path:
        return folder / f"{self.name.replace('/', '-')}.{suffix}"

    def _write_reference_point(self, path: Path) -> None:
        values = self._reference_point
        point = {} if values is None else dict(zip(self.objectives, values, strict=True))
        text = json.dumps({"reference_point": point}, ensure_ascii=False) + "\n"

        def write(temporary: Path) -> None:
            temporary.write_text(text, encoding="utf-8")

        write_atomically(path, write)

    def _described(self, values: Sequence[float]) -> str:
        return ", ".join(f"{name} {value:.6g}" for name, value in zip(self.objectives, values, strict=True))


def _beyond_worst(values: Tensor) -> Tensor:
    """Return the largest of ``values``, shape ``(N, T)``, increased by 10 % of its magnitude, shape ``(T,)``."""
    worst = values.amax(dim=0)
    return worst + 0.1 * worst.abs()
