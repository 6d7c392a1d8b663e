"""How a module's validation becomes points in objective space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mtl_lightning.callbacks.output import output_folder
from mtl_lightning.pareto import MAX_OBJECTIVES
from mtl_lightning.protocols import PopulationProtocol
from mtl_lightning.task import Task

Direction = Literal["min", "max"]

_CallbackT = TypeVar("_CallbackT", bound=Callback)

_VALIDATION = "val_"  # what a module of this library puts before the names of what it logs in a validation
_LOSS = "val_loss/"


@dataclass(frozen=True)
class Points:
    """The points of one validation, those that are not finite left out.

    Attributes:
        values: The objectives in the user's units, shape ``(N, T)``, float64 on the CPU.
        subproblems: The index of each point's model, ``N`` numbers.
        preferences: The preference vector of each point's model, one column per task, shape ``(N, tasks)``, or None for
            a module that trains one model.
    """

    values: Tensor
    subproblems: tuple[int, ...]
    preferences: Tensor | None = None


@dataclass(frozen=True)
class _Reading:
    """What one rank found: the points, or why there are none."""

    points: Points | None = None
    missing: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    available: tuple[str, ...] = ()


class ObjectiveReader:
    """Turns every validation of a module into points, equal on all ranks.

    A module that satisfies ``PopulationProtocol`` gives one point per model: by default its validation losses, all
    minimised; otherwise those of ``objectives``, which names entries of ``metric_values`` or, for a loss, tasks. The
    names under which the means over the models are logged, ``val_loss/<task>`` and ``val_<metric>/<task>``, stand for
    the values of each model as well. Any other module gives one point per validation, of the metrics that it logs under
    the names of ``objectives``; one that is trained on :class:`~mtl_lightning.task.Task` objects logs
    ``val_loss/<task>``, and these are its objectives by default.

    Args:
        objectives: From the name of each objective to ``"min"`` or ``"max"``.

    Raises:
        ValueError: If fewer than two objectives are given, or a direction is neither ``"min"`` nor ``"max"``.
    """

    def __init__(self, objectives: Mapping[str, Direction] | None = None) -> None:
        if objectives is not None:
            _check_objectives(objectives)
        self.given: dict[str, Direction] | None = None if objectives is None else dict(objectives)
        self.objectives: dict[str, Direction] = dict(objectives or {})
        self.preference_names: tuple[str, ...] = ()
        self._before: dict[str, Any] = {}
        self._warned_nonfinite = False
        self._warned_stale = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the ``T`` objectives; empty before ``setup`` if the module decides."""
        return tuple(self.objectives)

    @property
    def signs(self) -> Tensor:
        """1 for each minimised objective and -1 for each maximised one, shape ``(T,)``."""
        signs = [1.0 if direction == "min" else -1.0 for direction in self.objectives.values()]
        return torch.tensor(signs, dtype=torch.float64)

    def setup(self, pl_module: pl.LightningModule) -> None:
        """Resolve the objectives of ``pl_module``.

        Raises:
            ValueError: If none are given and the module does not bring its own, or if there are more than 31.
        """
        if is_population(pl_module):
            self.preference_names = tuple(pl_module.task_names)
            default = self.preference_names
        else:
            default = tuple(f"{_LOSS}{name}" for name in _trained_tasks(pl_module))
        if self.given is not None:
            return
        if not default:
            raise ValueError(
                "`objectives` should name logged validation metrics and their directions, such as "
                "{'val_loss/left': 'min', 'val_accuracy/right': 'max'}, unless the module is one of this library or "
                "has `task_names`, `preferences`, `objective_values` and `metric_values` "
                f"(`mtl_lightning.protocols.PopulationProtocol`). Found none, and a {type(pl_module).__name__}."
            )
        self.objectives = dict.fromkeys(default, "min")
        _check_objectives(self.objectives)

    def start(self, trainer: pl.Trainer) -> None:
        """Remember what was logged before this validation, so that an old value is never taken for a new one."""
        metrics = trainer.callback_metrics
        self._before = {name: metrics[name] for name in self.names if name in metrics}

    def check_names(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the sanity check: warn of unknown names before training, not only after the first epoch.

        No error yet: a module may log nothing in the sanity check, and its few batches may hold no label of a task.
        """
        reading = trainer.strategy.broadcast(self._read(trainer, pl_module))
        if reading.missing:
            rank_zero_warn(_unknown(reading) + " This becomes an error if it holds after the first validation.")

    def read(self, trainer: pl.Trainer, pl_module: pl.LightningModule, final: bool) -> Points | None:
        """Return the points of the validation that is ending, or None if they are not there.

        All ranks have to call it; rank zero's points count, so that all ranks agree on them.

        Args:
            trainer: The trainer.
            pl_module: The module.
            final: Whether nothing more will be logged in this validation, that is, whether this is
                ``on_validation_end``; then what is missing is reported.

        Raises:
            ValueError: If ``final`` and an objective has never been logged, or a population has no such metric.
        """
        reading = trainer.strategy.broadcast(self._read(trainer, pl_module))
        if reading.missing and (final or is_population(pl_module)):
            raise ValueError(_unknown(reading))
        if reading.stale and final and not self._warned_stale:
            self._warned_stale = True
            rank_zero_warn(
                f"This validation did not log {_listed(reading.stale)}, so it adds no point. "
                "Further cases are not reported."
            )
        if reading.points is None:
            return None
        return self._finite(reading.points)

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> _Reading:
        if is_population(pl_module):
            return self._read_population(pl_module)
        metrics = trainer.callback_metrics
        missing = tuple(name for name in self.names if name not in metrics)
        if missing:
            return _Reading(missing=missing, available=tuple(metrics))
        # A value that is logged again is another object, even if it is equal.
        stale = tuple(name for name, before in self._before.items() if metrics[name] is before)
        if stale:
            return _Reading(stale=stale)
        values = torch.tensor([[float(metrics[name]) for name in self.names]], dtype=torch.float64)
        return _Reading(Points(values, subproblems=(0,)))

    def _read_population(self, pl_module: PopulationProtocol) -> _Reading:
        # Both reads are collective. Which of them happen depends on the objectives only, so all ranks do the same.
        columns: dict[str, Tensor] = {}
        if any(_is_loss(name, pl_module.task_names) for name in self.names):
            columns |= dict(zip(pl_module.task_names, pl_module.objective_values.unbind(dim=1), strict=True))
        if any(not _is_loss(name, pl_module.task_names) for name in self.names):
            columns |= {name: value for name, value in pl_module.metric_values.items() if name not in columns}
        found = {name: found_as(name, columns) for name in self.names}
        missing = tuple(name for name, column in found.items() if column is None)
        if missing:
            return _Reading(missing=missing, available=(*pl_module.task_names, *pl_module.metric_values))
        values = torch.stack([_plain(columns[column]) for column in found.values() if column is not None], dim=1)
        return _Reading(Points(values, tuple(range(len(values))), _plain(pl_module.preferences)))

    def _finite(self, points: Points) -> Points:
        finite = points.values.isfinite().all(dim=1)
        if finite.all():
            return points
        if not self._warned_nonfinite:
            self._warned_nonfinite = True
            bad = [points.subproblems[index] for index in (~finite).nonzero().flatten().tolist()]
            rank_zero_warn(
                f"Points with a NaN or infinite objective are left out, at first those of subproblems {bad}. "
                "Further cases are not reported."
            )
        return Points(
            points.values[finite],
            tuple(index for index, keep in zip(points.subproblems, finite.tolist(), strict=True) if keep),
            None if points.preferences is None else points.preferences[finite],
        )


class ObjectivesCallback(Callback, ABC):
    """Calls ``observe`` once per validation with its points, as soon as they are complete.

    That is in ``on_validation_epoch_end``, where values can still be logged, if the module's metrics are there; and in
    ``on_validation_end`` if the module logs some of them in its own ``on_validation_epoch_end``, which runs after that
    of the callbacks. The sanity check is not observed. Nothing here draws random numbers or builds a graph.

    Args:
        objectives: See ``ObjectiveReader``.
        dirpath: The folder for files; by default ``pareto_front`` in ``trainer.log_dir``, or in
            ``trainer.default_root_dir`` without a logger.

    Attributes:
        folder: The folder, None before ``setup`` and with ``fast_dev_run``, which writes nothing.
    """

    def __init__(self, objectives: Mapping[str, Direction] | None = None, dirpath: str | Path | None = None) -> None:
        self.reader = ObjectiveReader(objectives)
        self.dirpath = dirpath
        self.folder: Path | None = None
        self._observed = False

    @property
    def objectives(self) -> Mapping[str, Direction]:
        """The objectives and their directions; empty before ``setup`` if the module decides."""
        return dict(self.reader.objectives)

    @abstractmethod
    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, points: Points, can_log: bool) -> None:
        """Use the ``points`` of a validation; ``can_log`` tells whether ``pl_module.log`` is allowed now."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Resolve the objectives and check that the folder is writable, before anything is trained."""
        if stage in ("fit", "validate"):
            self.reader.setup(pl_module)
            self.folder = output_folder(trainer, self.dirpath, default="pareto_front")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember what was logged before."""
        self._observed = False
        self.reader.start(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Observe the points if they are complete."""
        if not trainer.sanity_checking:
            self._observe(trainer, pl_module, final=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Observe the points unless that has been done."""
        if trainer.sanity_checking:
            self.reader.check_names(trainer, pl_module)
        elif not self._observed:
            self._observe(trainer, pl_module, final=True)

    def _observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, final: bool) -> None:
        points = self.reader.read(trainer, pl_module, final)
        if points is not None:
            self._observed = True
            self.observe(trainer, pl_module, points, can_log=not final)


def attached(trainer: pl.Trainer, kind: type[_CallbackT]) -> list[_CallbackT]:
    """Return the callbacks of ``trainer`` that are of this ``kind``."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return [callback for callback in callbacks if isinstance(callback, kind)]


def is_population(pl_module: object) -> TypeGuard[PopulationProtocol]:
    """Return whether ``pl_module`` has the members of ``PopulationProtocol``, without evaluating any of them.

    ``isinstance`` would read the values (before Python 3.12), which is a collective, or overlook buffers (since 3.12).
    """
    return {"task_names", "preferences", "objective_values", "metric_values"} <= set(dir(pl_module))


def found_as(name: str, columns: Container[str]) -> str | None:
    """Return which of ``columns``, tasks and metrics of a population, an objective is; None if it is none of them.

    Example:
        >>> columns = ("left", "right", "accuracy/right")
        >>> [found_as(name, columns) for name in ("left", "val_loss/left", "val_accuracy/right", "val_loss")]
        ['left', 'left', 'accuracy/right', None]
    """
    candidates = (name, name.removeprefix(_LOSS), name.removeprefix(_VALIDATION))
    return next((candidate for candidate in candidates if candidate in columns), None)


def _is_loss(name: str, task_names: Container[str]) -> bool:
    return name in task_names or name.removeprefix(_LOSS) in task_names


def _trained_tasks(pl_module: object) -> list[str]:
    """Return the names of the tasks of a module of this library, none of any other one."""
    tasks = getattr(pl_module, "tasks", ())
    is_ours = isinstance(tasks, Sequence) and all(isinstance(task, Task) for task in tasks)
    return [task.name for task in tasks] if is_ours else []


def _check_objectives(objectives: Mapping[str, str]) -> None:
    if not 2 <= len(objectives) <= MAX_OBJECTIVES:
        raise ValueError(f"`objectives` should name 2 to {MAX_OBJECTIVES} objectives. Found {len(objectives)}.")
    for name, direction in objectives.items():
        if direction not in ("min", "max"):
            raise ValueError(f"The direction of objective {name!r} should be 'min' or 'max'. Found {direction!r}.")


def _plain(values: Tensor) -> Tensor:
    return values.detach().to(device="cpu", dtype=torch.float64, copy=True)


def _unknown(reading: _Reading) -> str:
    return (
        f"`objectives` should name metrics of the validation. Found {_listed(reading.missing)}; "
        f"available: {_listed(reading.available) or 'none'}."
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
