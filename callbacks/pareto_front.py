"""The archive of all validated points, and its Pareto front as a table and as a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from mtl_lightning.callbacks.objectives import Direction, ObjectivesCallback, Points, attached, found_as, is_population
from mtl_lightning.callbacks.output import draw, log_picture, logged_step, write_atomically, write_picture, write_rows
from mtl_lightning.palette import EARLIER, GRID, INK, MODEL, PREFERENCE
from mtl_lightning.pareto import is_nondominated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PREFERENCE = "preference/"
_OWN_COLUMNS = ("epoch", "step", "logged_step", "subproblem", "nondominated")


class ParetoFrontCallback(ObjectivesCallback):
    """Keeps every validated point and shows the Pareto front that they form, on any LightningModule.

    With a module that trains a population (``mtl_lightning.protocols.PopulationProtocol``, such as ``MT2OModule``) each
    validation adds one point per model; with any other module, one point, from metrics that it logs. The archive is
    part of the checkpoint. Points with a NaN or infinite objective are left out, with one warning.

    Logged: ``pareto_front``, the figure, to TensorBoard and W&B; no numbers. Files, from rank zero and each whole or
    not at all:

    - ``archive.csv``, after each validation: ``epoch``, ``step`` (``trainer.global_step``, as in the names of
      checkpoints), ``logged_step`` (that of the validation in loggers and their ``metrics.csv``, for which Lightning
      counts batches from 0), ``subproblem``, ``preference/<task>`` for a population, one column per objective in its
      own unit, for a population its other losses and metrics, and ``nondominated``;
    - ``front.csv``, after each validation: its non-dominated rows;
    - ``objectives.json``, after each validation: ``"min"`` or ``"max"`` of each objective;
    - ``front-epoch=003-step=000123.png``, after each validation, and ``front.png`` when fitting ends: two objectives as
      a plane, three in space, more as parallel coordinates. Axes span the front and the latest points, so that the
      first epochs do not squeeze the rest.

    ``trainer.validate`` adds its points as well, under the trainer's epoch and step. ``fast_dev_run`` writes nothing.
    A figure takes 0.2 to 0.3 s on one CPU core (0.3 to 0.5 s with TensorBoard), a table of a few hundred points some
    milliseconds; ``figure_every`` spares short epochs.

    Args:
        objectives: From the name of each objective to ``"min"`` or ``"max"``. For a population, tasks (their validation
            loss) or keys of ``metric_values``, by default all tasks; for any other module names of logged metrics, by
            default ``val_loss/<task>`` of all tasks for a module of this library, and required for another.
        dirpath: The folder; by default ``pareto_front`` in ``trainer.log_dir``, or in ``trainer.default_root_dir``.
        figure_every: Draw after every such number of validations; 0 draws ``front.png`` only.

    Raises:
        ValueError: If the objectives or ``figure_every`` are not usable; before training, if the module needs
            ``objectives`` or two instances share a folder.
        OSError: Before training, if the folder is not writable.

    Example:
        >>> callback = ParetoFrontCallback(objectives={"val_loss/left": "min", "val_accuracy/right": "max"})
        >>> callback.front
        []
    """

    def __init__(
        self,
        objectives: Mapping[str, Direction] | None = None,
        dirpath: str | Path | None = None,
        *,
        figure_every: int = 1,
    ) -> None:
        super().__init__(objectives, dirpath)
        if figure_every < 0:
            raise ValueError(f"`figure_every` should be a number of validations, or 0. Found {figure_every}.")
        self.figure_every = figure_every
        self._rows: list[dict[str, int | float]] = []
        self._num_validations = 0

    @property
    def state_key(self) -> str:
        """One state per set of objectives, so that several instances can be attached."""
        return self._generate_state_key(objectives=self.reader.given)

    @property
    def archive(self) -> list[dict[str, int | float | bool]]:
        """All validated points, in order, as rows for a table: the columns of ``archive.csv``."""
        return [{**row, "nondominated": keep} for row, keep in zip(self._rows, self._nondominated(), strict=True)]

    @property
    def front(self) -> list[dict[str, int | float | bool]]:
        """The rows of ``archive`` that no other row dominates; of equal points the first."""
        return [row for row in self.archive if row["nondominated"]]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check objectives and folder before anything is trained."""
        super().setup(trainer, pl_module, stage)
        clashes = sorted(set(_OWN_COLUMNS) & set(self.objectives))
        if clashes:
            raise ValueError(f"An objective should not be named like a column of the archive. Found {clashes}.")
        twins = [other for other in attached(trainer, ParetoFrontCallback) if other is not self]
        if any(twin.folder is not None and twin.folder == self.folder for twin in twins):
            raise ValueError(
                f"Each `ParetoFrontCallback` should have a `dirpath` of its own. Found {str(self.folder)!r} twice."
            )

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, points: Points, can_log: bool) -> None:
        """Add the points, write the tables, draw the figure."""
        self._rows += self._as_rows(trainer, points, self._others(pl_module))
        self._num_validations += 1
        if self.folder is None or not trainer.is_global_zero or len(points.values) == 0:
            return
        self._write_tables(self.folder)
        if self.figure_every > 0 and self._num_validations % self.figure_every == 0:
            picture = draw(self.figure())
            name = f"front-epoch={trainer.current_epoch:03d}-step={trainer.global_step:06d}.png"
            write_picture(self.folder / name, picture)
            log_picture(trainer, "pareto_front", picture, logged_step(trainer))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the final front."""
        if self.folder is not None and trainer.is_global_zero and self._rows:
            write_picture(self.folder / "front.png", draw(self.figure()))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw the front of a run that was stopped."""
        self.on_fit_end(trainer, pl_module)

    def figure(self) -> Figure:
        """Return the front as a new ``matplotlib.figure.Figure``, which ``pyplot`` does not manage.

        Raises:
            ValueError: If there are no points yet.
        """
        if not self._rows:
            raise ValueError("There should be at least one validated point to draw. Found none.")
        latest = (self._rows[-1]["epoch"], self._rows[-1]["step"])
        is_latest = np.array([(row["epoch"], row["step"]) == latest for row in self._rows])
        columns = [key for key in self._rows[-1] if key.startswith(_PREFERENCE)]
        weights = [row[columns[0]] for row, keep in zip(self._rows, is_latest, strict=True) if keep and columns]
        return _draw_front(
            values=self._values().numpy(),
            nondominated=np.array(self._nondominated()),
            is_latest=is_latest,
            weights=np.array(weights) if columns else None,
            weights_label=f"preference for {columns[0].removeprefix(_PREFERENCE)}" if columns else "",
            objectives=self.objectives,
            title=f"Epoch {latest[0]}, after {latest[1]} steps",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the archive as plain numbers, which Lightning can load with ``weights_only=True``."""
        return {"rows": [dict(row) for row in self._rows], "num_validations": self._num_validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the archive of a checkpoint.

        Raises:
            ValueError: If its objectives are not those of this callback.
        """
        rows = state_dict["rows"]
        if rows and self.objectives and not set(self.objectives) <= set(rows[0]):
            raise ValueError(
                f"The archive in the checkpoint should hold the objectives {list(self.objectives)}. "
                f"Found the columns {list(rows[0])}."
            )
        self._rows = [dict(row) for row in rows]
        self._num_validations = state_dict["num_validations"]

    def _others(self, pl_module: pl.LightningModule) -> dict[str, list[float]]:
        """Return what else a population knows of its models, one value for each, by name. All ranks have to call it."""
        if not is_population(pl_module):
            return {}
        found = dict(zip(pl_module.task_names, pl_module.objective_values.unbind(dim=1), strict=True))
        found |= dict(pl_module.metric_values)
        taken = {*_OWN_COLUMNS, *self.objectives, *(_PREFERENCE + name for name in self.reader.preference_names)}
        taken |= {column for name in self.objectives if (column := found_as(name, found)) is not None}
        return {name: values.detach().double().cpu().tolist() for name, values in found.items() if name not in taken}

    def _as_rows(
        self, trainer: pl.Trainer, points: Points, others: Mapping[str, Sequence[float]]
    ) -> list[dict[str, int | float]]:
        rows: list[dict[str, int | float]] = []
        for index, (subproblem, values) in enumerate(zip(points.subproblems, points.values.tolist(), strict=True)):
            row: dict[str, int | float] = {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "logged_step": logged_step(trainer),
                "subproblem": subproblem,
            }
            if points.preferences is not None:
                keys = [_PREFERENCE + name for name in self.reader.preference_names]
                row |= dict(zip(keys, points.preferences[index].tolist(), strict=True))
            row |= dict(zip(self.objectives, values, strict=True))
            rows.append(row | {name: column[subproblem] for name, column in others.items()})
        return rows

    def _values(self) -> Tensor:
        rows = [[row[name] for name in self.objectives] for row in self._rows]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1)

    def _nondominated(self) -> list[bool]:
        return is_nondominated(self._values() * self.reader.signs).tolist() if self._rows else []

    def _write_tables(self, folder: Path) -> None:
        archive = self.archive
        columns = list(archive[-1])
        write_rows(folder / "archive.csv", columns, archive)
        write_rows(folder / "front.csv", columns, [row for row in archive if row["nondominated"]])
        text = json.dumps(dict(self.objectives), ensure_ascii=False) + "\n"

        def write(temporary: Path) -> None:
            temporary.write_text(text, encoding="utf-8")

        write_atomically(folder / "objectives.json", write)


def _draw_front(
    values: np.ndarray,
    nondominated: np.ndarray,
    is_latest: np.ndarray,
    weights: np.ndarray | None,
    weights_label: str,
    objectives: Mapping[str, Direction],
    title: str,
) -> Figure:
    """Draw ``values``, shape ``(N, T)``; masks have shape ``(N,)``, ``weights`` that of the latest points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.25), dpi=130, layout="constrained", facecolor="white")
    axes: Any = figure.add_subplot(projection="3d" if values.shape[1] == 3 else None)
    shown = _within(values, *_limits(values[nondominated | is_latest]))
    earlier, latest, front = values[~is_latest & shown], values[is_latest], values[nondominated]
    mapping = None if weights is None else _colour_mapping()
    colours = MODEL if mapping is None else mapping.to_rgba(weights)
    if values.shape[1] == 2:
        _draw_plane(axes, earlier, latest, front, colours, objectives)
    elif values.shape[1] == 3:
        _draw_space(axes, earlier, latest, front, colours, objectives)
    else:
        _draw_parallel(axes, earlier, latest, front, colours, objectives)
    axes.set_title(f"{title}: {nondominated.sum()} of {len(values)} validated points are non-dominated", fontsize=10.5)
    if mapping is not None:
        bar: Any = figure.colorbar(mapping, ax=axes, pad=0.1 if values.shape[1] == 3 else 0.02)
        bar.set_label(weights_label)
        bar.outline.set_visible(False)
    return figure


def _colour_mapping() -> Any:
    """Return the colours of weights from 0 to 1, whatever weights there are: a preference keeps its colour."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    return ScalarMappable(Normalize(0.0, 1.0), LinearSegmentedColormap.from_list("preference", PREFERENCE))


def _limits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = values.min(axis=0), values.max(axis=0)
    margin = 0.07 * (high - low)
    margin[margin == 0.0] = np.maximum(0.05 * np.abs(low), 1e-3)[margin == 0.0]
    return low - margin, high + margin


def _within(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.all((values >= low) & (values <= high), axis=1)


def _labels(objectives: Mapping[str, Direction]) -> list[str]:
    better = {"min": "lower is better", "max": "higher is better"}
    return [f"{name} ({better[direction]})" for name, direction in objectives.items()]


def _staircase(front: np.ndarray, directions: Sequence[Direction]) -> np.ndarray:
    """Return the corners of the region that ``front``, shape ``(N, 2)``, dominates, shape ``(2 N - 1, 2)``."""
    sign = np.array([1.0 if direction == "min" else -1.0 for direction in directions])
    ordered = (front * sign)[np.argsort(front[:, 0] * sign[0])]
    inner = np.stack([ordered[1:, 0], ordered[:-1, 1]], axis=1)
    corners = np.empty((2 * len(ordered) - 1, 2))
    corners[0::2], corners[1::2] = ordered, inner
    return corners * sign


def _draw_plane(
    axes: Axes,
    earlier: np.ndarray,
    latest: np.ndarray,
    front: np.ndarray,
    colours: Any,
    objectives: Mapping[str, Direction],
) -> None:
    low, high = _limits(np.concatenate([front, latest]))
    corners = _staircase(front, list(objectives.values()))
    axes.scatter(
        earlier[:, 0],
        earlier[:, 1],
        s=14,
        color=EARLIER,
        linewidths=0,
        alpha=0.7,
        label="earlier validations",
        zorder=2,
    )
    axes.plot(corners[:, 0], corners[:, 1], color=INK, linewidth=1.1, label="non-dominated so far", zorder=3)
    axes.scatter(front[:, 0], front[:, 1], s=14, color=INK, linewidths=0, zorder=3)
    axes.scatter(
        latest[:, 0],
        latest[:, 1],
        s=62,
        c=colours,
        edgecolors="white",
        linewidths=0.9,
        label="this validation",
        zorder=4,
    )
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    first, second = _labels(objectives)
    axes.set_xlabel(first)
    axes.set_ylabel(second)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _draw_space(
    axes: Any,
    earlier: np.ndarray,
    latest: np.ndarray,
    front: np.ndarray,
    colours: Any,
    objectives: Mapping[str, Direction],
) -> None:
    low, high = _limits(np.concatenate([front, latest]))
    axes.scatter(*earlier.T, s=10, color=EARLIER, linewidths=0, alpha=0.6, label="earlier validations")
    axes.scatter(*front.T, s=14, color=INK, linewidths=0, label="non-dominated so far")
    axes.scatter(
        *latest.T, s=55, c=colours, edgecolors="white", linewidths=0.8, depthshade=False, label="this validation"
    )
    for x, y, z in latest:  # a line to the floor tells where a point stands
        axes.plot([x, x], [y, y], [low[2], z], color=EARLIER, linewidth=0.7)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    axes.view_init(elev=22.0, azim=40.0)
    axes.set_box_aspect(None, zoom=0.86)  # leaves room for the labels, which the layout does not know in space
    axes.tick_params(labelsize=8)
    for set_label, label in zip((axes.set_xlabel, axes.set_ylabel, axes.set_zlabel), _labels(objectives), strict=True):
        set_label(label.replace(" (", "\n("), labelpad=9, fontsize=9)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_parallel(
    axes: Axes,
    earlier: np.ndarray,
    latest: np.ndarray,
    front: np.ndarray,
    colours: Any,
    objectives: Mapping[str, Direction],
) -> None:
    from matplotlib.collections import LineCollection

    positions = list(range(len(objectives)))
    low, high = _limits(np.concatenate([front, latest]))
    maximised = np.array([direction == "max" for direction in objectives.values()])
    bottom, top = np.where(maximised, high, low), np.where(maximised, low, high)

    def lines(values: np.ndarray) -> list[np.ndarray]:
        return [np.stack([positions, row], axis=1) for row in (values - bottom) / (top - bottom)]

    groups = (
        (earlier, EARLIER, 0.7, "earlier validations"),
        (front, INK, 0.9, "non-dominated so far"),
        (latest, colours, 2.0, "this validation"),
    )
    for order, (values, colour, width, label) in enumerate(groups):
        axes.add_collection(
            LineCollection(lines(values), colors=colour, linewidths=width, label=label, zorder=2 + order)
        )
    for position, at_bottom, at_top in zip(positions, bottom, top, strict=True):
        axes.axvline(position, color=INK, linewidth=0.8, zorder=1)
        axes.text(position, -0.02, f"{at_bottom:.4g}", ha="center", va="top", fontsize=8)
        axes.text(position, 1.02, f"{at_top:.4g}", ha="center", va="bottom", fontsize=8)
    axes.set_xlim(-0.3, len(objectives) - 0.7)
    axes.set_ylim(-0.08, 1.08)
    axes.set_xticks(positions, [label.replace(" (", "\n(") for label in _labels(objectives)], fontsize=8)
    axes.set_yticks([])
    axes.set_ylabel("every axis: further down is better")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
