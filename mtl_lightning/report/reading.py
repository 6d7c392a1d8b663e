"""What a run has left in its folder: fronts, curves, affinities, groups, costs, metrics and checkpoints.

Files are known by what they hold rather than by where they lie, so that callbacks with folders or names of their own
are found as well. Only the folder itself is read, and of checkpoints only their plain values.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mtl_lightning.partitions import matched_labels
from mtl_lightning.report.tables import header, integer, number, read_json, read_rows

_PREFERENCE = "preference/"
_ROW_OF_MODEL = ("epoch", "step", "subproblem", "nondominated")
_AFFINITY = ["epoch", "batch", "from", "to", "value"]
_TIMELINE = ["from_batch", "to_batch", "groups"]
_COST = ["epoch", "forwards", "backwards", "optimizer_steps", "batches", "samples", "seconds", "peak_memory_mib"]
_LOGGED = "logged_step"  # the step of a validation in loggers, not in tables of earlier releases
_ABSENT = -1


@dataclass(frozen=True)
class Model:
    """A validated model.

    Attributes:
        epoch: When it was validated.
        step: Likewise, in steps of the optimiser.
        subproblem: Its index in the population; 0 of a module that trains one model.
        preference: One weight per task, none for a module that trains one model.
        objectives: One value per objective, in its own unit.
        metrics: One value per other metric, NaN where there is none.
        nondominated: Whether no other validated model is better.
    """

    epoch: int
    step: int
    subproblem: int
    preference: tuple[float, ...]
    objectives: tuple[float, ...]
    metrics: tuple[float, ...]
    nondominated: bool


@dataclass(frozen=True)
class Front:
    """All validated models of a run, from ``ParetoFrontCallback``.

    Attributes:
        name: The folder of the table, relative to that of the run.
        objectives: From the name of each objective to ``"min"`` or ``"max"``.
        preference_names: The tasks that the preferences weigh; none for a module that trains one model.
        metric_names: What else is known of each model.
        models: In the order of their validation.
    """

    name: str
    objectives: Mapping[str, str]
    preference_names: tuple[str, ...]
    metric_names: tuple[str, ...]
    models: tuple[Model, ...]


@dataclass(frozen=True)
class Curve:
    """A hypervolume over the run, from ``HypervolumeCallback``: one entry per validation.

    Attributes:
        name: What it is logged as.
        epochs: When.
        steps: Likewise, in steps of the optimiser.
        latest: Of the models of the validation.
        archive: Of all models so far.
        reference_point: From objective to its worst value of interest; empty if it is not known.
    """

    name: str
    epochs: tuple[int, ...]
    steps: tuple[int, ...]
    latest: tuple[float, ...]
    archive: tuple[float, ...]
    reference_point: Mapping[str, float]


@dataclass(frozen=True)
class Affinity:
    """An affinity over the run, from ``AffinityCallback``: one entry per measurement.

    Attributes:
        name: What it is logged as.
        task_names: The ``T`` tasks, of rows and columns.
        epochs: When.
        batches: Likewise, how many batches had been trained.
        matrices: From row to column, ``T`` rows of ``T`` values, NaN where nothing was measured.
    """

    name: str
    task_names: tuple[str, ...]
    epochs: tuple[int, ...]
    batches: tuple[int, ...]
    matrices: tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class Timeline:
    """The task groups over the run, from ``TaskGroupCallback``.

    Attributes:
        task_names: The ``T`` tasks.
        stretches: First and last batch of equal groups, and the label of each task: equal for tasks in one group, as
            far as possible equal to that of the stretch before, -1 for tasks that took no part.
        together: The share of batches in which two tasks were in one group, ``T`` rows; empty if it is not known.
    """

    task_names: tuple[str, ...]
    stretches: tuple[tuple[int, int, tuple[int, ...]], ...]
    together: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file.

    Attributes:
        path: Relative to the folder of the run.
        epoch: When it was written; None if it cannot be read.
        step: Likewise, in steps of the optimiser.
        module: The class of the module, if it is one of this package.
        problem: Why it cannot be read; empty if it can.
    """

    path: str
    epoch: int | None = None
    step: int | None = None
    module: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Run:
    """What a run has left. Whatever is not there is empty or None, and ``missing`` says so.

    Attributes:
        folder: The folder, an absolute path.
        has_config: Whether ``config.yaml`` names the model, as runs of ``mtl-lightning fit`` leave it.
        facts: What is known of the configuration, from heading to text.
        fronts: See :class:`Front`.
        curves: See :class:`Curve`.
        affinities: See :class:`Affinity`.
        timeline: See :class:`Timeline`.
        costs: One row per epoch, from ``CostCallback``; totals since the start.
        metrics: From the name of what ``CSVLogger`` wrote to its steps and values. It counts steps from 0, here they
            are counted from 1, as in the names of checkpoints.
        checkpoints: See :class:`Checkpoint`.
        missing: What could be shown and is not there, and who writes it.
    """

    folder: Path
    has_config: bool
    facts: Mapping[str, str]
    fronts: tuple[Front, ...]
    curves: tuple[Curve, ...]
    affinities: tuple[Affinity, ...]
    timeline: Timeline | None
    costs: tuple[Mapping[str, float], ...]
    metrics: Mapping[str, tuple[tuple[int, float], ...]]
    checkpoints: tuple[Checkpoint, ...]
    missing: tuple[str, ...]


def find_run(path: str | Path) -> Path:
    """Return the folder of a run, absolute: ``path`` itself, or its newest ``version_N``.

    Args:
        path: A folder that holds what a run has left, or ``version_N`` folders of runs.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is none of a run.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"There should be a folder of a run at {str(path)!r}. Found none.")
    folder = folder.resolve()
    if _is_run(folder):
        return folder
    versions = [(int(match[1]), inner) for inner in folder.iterdir() if (match := _VERSION.fullmatch(inner.name))]
    for _, version in sorted(versions, reverse=True):
        if _is_run(version):
            return version
    names = sorted(inner.name for inner in folder.iterdir())
    found = ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise ValueError(
        f"{str(path)!r} should be the folder of a run, with its tables or checkpoints, or hold such folders named "
        f"version_N. Found {found or 'nothing in it'}."
    )


_VERSION = re.compile(r"version_(\d+)")


def read_run(folder: Path) -> Run:
    """Return what a run has left in ``folder``.

    Raises:
        ValueError: If a file is not as its callback writes it.
    """
    tables = {path: header(path) for path in _tables(folder)}
    config = _config(folder)
    checkpoints = tuple(_checkpoint(folder, path) for path in sorted(folder.rglob("*.ckpt")))
    fronts, problems = _fronts(folder, tables)
    curves = tuple(_curve(path, columns[-2]) for path, columns in tables.items() if _is_curve(columns))
    affinities = tuple(_affinity(path) for path, columns in tables.items() if columns == _AFFINITY)
    timelines = [path for path, columns in tables.items() if columns == _TIMELINE]
    costs = [path for path, columns in tables.items() if columns == _COST]
    logged = _newest(path for path in tables if path.name == "metrics.csv")
    metrics = {} if logged is None else _metrics(logged)
    has = {
        "Pareto front": bool(fronts),
        "Hypervolume": bool(curves),
        "Affinity": bool(affinities),
        "Task groups": bool(timelines),
        "Cost": bool(costs),
        "Metrics": bool(metrics),
        "Checkpoints": bool(checkpoints),
        "Configuration": "model" in config,
    }
    return Run(
        folder=folder,
        has_config="model" in config,
        facts=_facts(config, checkpoints),
        fronts=fronts,
        curves=curves,
        affinities=affinities,
        timeline=_timeline(timelines[0]) if timelines else None,
        costs=_costs(costs[0]) if costs else (),
        metrics=metrics,
        checkpoints=checkpoints,
        missing=(*problems, *(f"{what}: {_WRITERS[what]}" for what, there in has.items() if not there)),
    )


_WRITERS = {
    "Pareto front": "ParetoFrontCallback writes pareto_front/archive.csv after each validation.",
    "Hypervolume": "HypervolumeCallback writes pareto_front/hypervolume.csv after each validation.",
    "Affinity": "AffinityCallback writes affinity/affinity.csv after each epoch.",
    "Task groups": "TaskGroupCallback writes task_groups/timeline.csv after each epoch, with a TaskGroupModule.",
    "Cost": "CostCallback writes cost/cost.csv after each epoch.",
    "Metrics": "CSVLogger writes metrics.csv.",
    "Checkpoints": "ModelCheckpoint writes *.ckpt; with a folder of its own it should lie in that of the run.",
    "Configuration": "`mtl-lightning fit` writes config.yaml, from which a model can be made again.",
}


def _tables(folder: Path) -> list[Path]:
    """Return all tables: those of the run itself, of its callbacks, and of loggers with versions."""
    return sorted(path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}.csv"))


def _is_run(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if (folder / "metrics.csv").exists() or any(folder.glob("*.ckpt")) or any(folder.glob("checkpoints/*.ckpt")):
        return True
    tables = [*folder.glob("*.csv")]
    # The files of a version belong to it rather than to the folder around it.
    tables += [path for path in folder.glob("*/*.csv") if not _VERSION.fullmatch(path.parent.name)]
    found = map(header, tables)
    return any(
        set(_ROW_OF_MODEL) <= set(columns) or columns in (_AFFINITY, _TIMELINE, _COST) or _is_curve(columns)
        for columns in found
    )


def _is_curve(columns: Sequence[str]) -> bool:
    own = [column for column in columns if column != _LOGGED]
    return len(own) == 4 and own[:2] == ["epoch", "step"] and own[3] == f"{own[2]}/archive"


def _newest(paths: Iterable[Path]) -> Path | None:
    """Return the table of the run itself, or that of the highest version below it."""

    def rank(path: Path) -> tuple[int, int, str]:
        match = _VERSION.fullmatch(path.parent.name)
        return -len(path.parts), int(match[1]) if match else -1, str(path)

    return max(paths, key=rank, default=None)


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _facts(config: Mapping[str, Any], checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    model, trainer = _entry(config, "model"), _entry(config, "trainer")
    arguments = _entry(model, "init_args")
    found = {
        "Module": model.get("class_path") or next((c.module for c in checkpoints if c.module), None),
        "Network": _entry(arguments, "network").get("class_path"),
        "Data": _entry(config, "data").get("class_path"),
        "Scalarisation": _entry(arguments, "scalarization").get("class_path"),
        "Transfer": _entry(arguments, "transfer").get("class_path"),
        "Grouping": _entry(arguments, "grouping").get("class_path"),
        "Optimiser": _entry(arguments, "optimizer").get("class_path"),
        "Epochs at most": trainer.get("max_epochs"),
        "Seed": config.get("seed_everything"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _entry(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    if isinstance(value, str):  # a class without arguments
        return {"class_path": value}
    return value if isinstance(value, dict) else {}


def _checkpoint(folder: Path, path: Path) -> Checkpoint:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return Checkpoint(name, problem="It is a folder of shards.")
    try:
        # Mapped, so that the parameters, most of the file, are not read.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        epoch, step = int(state["epoch"]), int(state["global_step"])
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        return Checkpoint(name, problem=f"It cannot be read: {reason or type(error).__name__}.")
    record = _entry(_entry(_entry(state, "state_dict"), "_extra_state"), "record")
    return Checkpoint(name, epoch, step, str(_entry(record, "facts").get("module", "")))


def _fronts(folder: Path, tables: Mapping[Path, Sequence[str]]) -> tuple[tuple[Front, ...], list[str]]:
    fronts, problems = [], []
    for path, columns in tables.items():
        if path.name != "archive.csv" or not set(_ROW_OF_MODEL) <= set(columns):
            continue
        name = path.parent.relative_to(folder).as_posix()
        objectives = read_json(path.with_name("objectives.json"))
        if objectives is None:
            problems.append(
                f"Pareto front of {name}: objectives.json beside archive.csv says which way is better; "
                "ParetoFrontCallback writes both."
            )
            continue
        fronts.append(_front(path, name, columns, objectives))
    return tuple(fronts), problems


def _front(path: Path, name: str, columns: Sequence[str], objectives: Any) -> Front:
    directions = set(objectives.values()) if isinstance(objectives, dict) else {objectives}
    if not (isinstance(objectives, dict) and directions <= {"min", "max"} and len(objectives) >= 2):
        raise ValueError(
            f"{str(path.with_name('objectives.json'))!r} should map two objectives or more to 'min' or 'max'. "
            f"Found {objectives}."
        )
    rows = read_rows(path, [*_ROW_OF_MODEL, *objectives])
    preferences = [column for column in columns if column.startswith(_PREFERENCE) and column not in objectives]
    known = {*_ROW_OF_MODEL, _LOGGED, *objectives, *preferences}
    metrics = [column for column in columns if column not in known]
    models = tuple(
        Model(
            epoch=integer(path, row, "epoch"),
            step=integer(path, row, "step"),
            subproblem=integer(path, row, "subproblem"),
            preference=tuple(number(path, row, column) for column in preferences),
            objectives=tuple(number(path, row, column) for column in objectives),
            metrics=tuple(number(path, row, column) for column in metrics),
            nondominated=row["nondominated"] == "True",
        )
        for row in rows
    )
    names = tuple(column.removeprefix(_PREFERENCE) for column in preferences)
    return Front(name, objectives, names, tuple(metrics), models)


def _curve(path: Path, name: str) -> Curve:
    rows = read_rows(path, ["epoch", "step", name, f"{name}/archive"])
    described = _entry({"content": read_json(path.with_suffix(".json"))}, "content")
    return Curve(
        name=name,
        epochs=tuple(integer(path, row, "epoch") for row in rows),
        steps=tuple(integer(path, row, "step") for row in rows),
        latest=tuple(number(path, row, name) for row in rows),
        archive=tuple(number(path, row, f"{name}/archive") for row in rows),
        reference_point=_entry(described, "reference_point"),
    )


def _affinity(path: Path) -> Affinity:
    rows = read_rows(path, _AFFINITY)
    names = list(dict.fromkeys(name for row in rows for name in (row["from"], row["to"])))
    places = {name: place for place, name in enumerate(names)}
    matrices: dict[tuple[int, int], list[list[float]]] = {}
    for row in rows:
        key = integer(path, row, "epoch"), integer(path, row, "batch")
        matrix = matrices.setdefault(key, [[math.nan] * len(names) for _ in names])
        matrix[places[row["from"]]][places[row["to"]]] = number(path, row, "value")
    return Affinity(
        name=path.stem,
        task_names=tuple(names),
        epochs=tuple(epoch for epoch, _ in matrices),
        batches=tuple(batch for _, batch in matrices),
        matrices=tuple(tuple(map(tuple, matrix)) for matrix in matrices.values()),
    )


def _timeline(path: Path) -> Timeline:
    parsed = []
    for row in read_rows(path, _TIMELINE):
        try:
            groups = json.loads(row["groups"])
            names = [str(name) for group in groups for name in group]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{str(path)!r} should hold groups as JSON. Found {row['groups']!r}.") from error
        parsed.append((integer(path, row, "from_batch"), integer(path, row, "to_batch"), groups, names))
    beside = path.with_name("together.csv")
    together = read_rows(beside, ["task"]) if beside.exists() else []
    if together:
        read_rows(beside, ["task", *(row["task"] for row in together)])
    names = [row["task"] for row in together] or list(dict.fromkeys(name for *_, names in parsed for name in names))
    stretches, colours = [], [0] * len(names)
    for first, last, groups, present in parsed:
        group_of = {str(name): index for index, group in enumerate(groups) for name in group}
        places = [place for place, name in enumerate(names) if name in group_of]
        if len(places) != len(present):
            raise ValueError(f"{str(path)!r} should name each of the tasks {names} once at most. Found {groups}.")
        labels = [_ABSENT] * len(names)
        near = matched_labels([colours[place] for place in places], [group_of[names[place]] for place in places])
        for place, label in zip(places, near, strict=True):
            labels[place] = colours[place] = label
        stretches.append((first, last, tuple(labels)))
    shares = tuple(tuple(number(beside, row, name) for name in names) for row in together)
    return Timeline(tuple(names), tuple(stretches), shares)


def _costs(path: Path) -> tuple[Mapping[str, float], ...]:
    return tuple({column: number(path, row, column) for column in _COST} for row in read_rows(path, _COST))


def _metrics(path: Path) -> dict[str, tuple[tuple[int, float], ...]]:
    rows = read_rows(path, ["step"])
    names = sorted(set(rows[0]) - {"step", "epoch"}) if rows else []
    found = {
        name: tuple(
            (integer(path, row, "step") + 1, value) for row in rows if (value := _plain(path, row, name)) is not None
        )
        for name in names
    }
    return {name: values for name, values in found.items() if values}


def _plain(path: Path, row: Mapping[str, str], name: str) -> float | None:
    """Return the number in a row, None without one: loggers take anything."""
    try:
        value = number(path, row, name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
