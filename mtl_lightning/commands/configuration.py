"""The configuration file of a comparison, and the runs that it stands for.

A method is what its configuration for ``fit`` holds beyond the parts that all methods share::

    output: runs/digits                   # folder of the runs and the tables; runs/<name of the file> by default
    title: Two overlapping digits         # of the tables; the name of the file by default
    seeds: [0, 1, 2]
    seed_arguments: [data.init_args.seed] # arguments that take the seed of the run, too; none by default
    trainer: {max_epochs: 20}
    data: {class_path: ..., init_args: {...}}
    shared: {network: ..., tasks: ..., optimizer: ...}      # arguments of every model whose constructor takes them
    methods:
      joint: {model: {class_path: mtl_lightning.modules.WeightedModule}}
      front: {model: {class_path: ..., init_args: {...}}, data: {init_args: {batch_size: 256}}, trainer: {...}}
    metrics: {accuracy/left: true, accuracy/right: true}    # test metrics, and whether higher is better
    per: task                             # how delta m averages: tasks (default) or metrics
    reference_point: [2.0, 2.0]           # of the hypervolume, in the test losses, in the order of the tasks
    select:                               # the epoch of each run, on validation
      single: {monitor: val_loss, mode: min}
      population: {monitor: hypervolume, mode: max}
    member: loss                          # of a population, on validation: least mean loss (default), or delta_m
    single_tasks: true                    # train each task alone first; or the parts in which these runs differ
    baselines: FILE                       # or take the baselines of delta m from a file of `save_baselines`

A mapping of a method replaces the shared one if it has another ``class_path``, else they are merged. A method may
have ``select: {monitor: ..., mode: ...}`` and ``seed_arguments`` of its own, which are added to those of all.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml

from mtl_lightning.callbacks.objectives import is_population
from mtl_lightning.pareto import MAX_OBJECTIVES

Command = Literal["compare", "single-tasks"]

_KEYS = {
    "output",
    "title",
    "seeds",
    "seed_arguments",
    "trainer",
    "data",
    "shared",
    "methods",
    "metrics",
    "per",
    "reference_point",
    "select",
    "member",
    "single_tasks",
    "baselines",
}
_METHOD_KEYS = {"model", "trainer", "data", "select", "seed_arguments"}
# What would leave files elsewhere, or train otherwise than the command says.
_TRAINER_REFUSED = {
    "default_root_dir": "the folder of each run takes its place",
    "fast_dev_run": "it keeps no checkpoint; use `max_epochs` and `limit_train_batches`",
    "enable_checkpointing": "the best epoch is read back from its checkpoint",
}
# What every run has anyway; two of a kind would write the same files.
_CALLBACKS_REFUSED = {
    "CostCallback": "each run has one",
    "HypervolumeCallback": "`reference_point` gives each run one",
}
_SINGLE_TASKS = "single_tasks"
_RESERVED = (_SINGLE_TASKS, "single tasks", "logs", "superseded")
_ALONE = "mtl_lightning.commands.single_tasks.SingleTaskModule"


@dataclass(frozen=True)
class Select:
    """What decides on the epoch whose model is tested: a quantity logged in validation, and whether it is minimised."""

    monitor: str
    mode: Literal["min", "max"]


@dataclass(frozen=True)
class Run:
    """One method, or one task alone, with one seed.

    Attributes:
        command: The command that it belongs to.
        name: The method, or the task.
        seed: The seed.
        output: The folder of the comparison.
        content: The configuration, as a file for ``fit`` would hold it.
        select: How the epoch is selected.
        reference_point: That of the hypervolume, if there is one.
    """

    command: Command
    name: str
    seed: int
    output: Path
    content: Mapping[str, Any]
    select: Select
    reference_point: tuple[float, ...] | None = None

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        start = self.output / _SINGLE_TASKS if self.command == "single-tasks" else self.output
        return start / self.name / f"seed_{self.seed}"

    @property
    def label(self) -> str:
        """The name of the run in messages."""
        return f"{self.name}{' alone' if self.command == 'single-tasks' else ''}, seed {self.seed}"

    @cached_property
    def digest(self) -> str:
        """What tells this configuration from others, 16 hexadecimal digits.

        The reference point counts only if it decides on the epoch: tables are made anew for another one.
        """
        decides = "hypervolume" in self.select.monitor
        parts = {
            "fit": self.content,
            "select": [self.select.monitor, self.select.mode],
            "reference_point": self.reference_point if decides else None,
        }
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Comparison:
    """What a configuration file asks for.

    Attributes:
        path: The file.
        output: The folder of all runs and tables.
        title: That of the tables.
        methods: The runs of each method, by name, in the order of the seeds.
        single_tasks: The runs of each task alone, by task; empty if none are asked for.
        seeds: The seeds.
        metrics: From the name of each test metric, ``<metric>/<task>``, to whether higher is better.
        per: Whether tasks or metrics count alike in delta m.
        reference_point: That of the hypervolume, ``T`` numbers.
        member: How the model of a population is chosen for the columns that are of one model.
        baselines: The files of the baselines.
    """

    path: Path
    output: Path
    title: str
    methods: Mapping[str, Sequence[Run]]
    single_tasks: Mapping[str, Sequence[Run]]
    seeds: Sequence[int]
    metrics: Mapping[str, bool]
    per: Literal["task", "metric"]
    reference_point: tuple[float, ...] | None
    member: Literal["loss", "delta_m"]
    baselines: Sequence[Path]

    def runs(self, command: Command) -> list[Run]:
        """Return the runs of a command in their order: seed by seed, so that the first seed is complete early."""
        groups = self.methods if command == "compare" else self.single_tasks
        return [run for of_seed in zip(*groups.values(), strict=True) for run in of_seed]


def load_comparison(path: str | Path, command: Command = "compare") -> Comparison:
    """Return the comparison that the YAML file ``path`` describes; see this module for its keys.

    Classes of models are imported, to see which of the shared arguments they take; nothing is made.

    Args:
        path: The file.
        command: ``"single-tasks"`` needs no methods, and trains each task alone whatever the file says of that.

    Raises:
        OSError: If there is no such file.
        ValueError: If something in it is missing, unknown or out of range.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} should be a YAML file. Found: {' '.join(str(error).split())}.") from error
    try:
        return _read(path, _mapping("The file", content), command)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path, content: Mapping[str, Any], command: Command) -> Comparison:
    _check_keys("The file", content, _KEYS)
    output = content.get("output", str(Path("runs") / path.stem))
    if not isinstance(output, str) or not output:
        raise ValueError(f"`output` should be the path of a folder. Found {output!r}.")
    seeds = _seeds(content.get("seeds"))
    metrics = _metrics(content.get("metrics"))
    reference_point = _reference_point(content.get("reference_point"))
    baselines = content.get("baselines", [])
    baselines = [baselines] if isinstance(baselines, str) else list(_list("`baselines`", baselines))
    single_tasks = content.get("single_tasks", False)
    if baselines and single_tasks:
        raise ValueError("`baselines` or `single_tasks` should be given. Found both; they are the same numbers.")
    if command == "single-tasks" and not single_tasks:
        single_tasks = True
    member = _choice("`member`", content.get("member", "loss"), ("loss", "delta_m"))
    if member == "delta_m" and not (baselines or single_tasks):
        raise ValueError("`member: delta_m` needs `single_tasks: true`, or `baselines` with validation values.")
    shared = _mapping("`shared`", content.get("shared", {}))
    builder = _Builder(content, shared, Path(output), seeds, reference_point)

    methods = _mapping("`methods`", content.get("methods", {}))
    if not methods and command == "compare":
        raise ValueError("`methods` should hold at least one method. Found none.")
    runs: dict[str, list[Run]] = {}
    for key, part in methods.items():
        name = _name(key)  # what YAML reads as a number is a name, too
        if name in runs:
            raise ValueError(f"Each method should have a name of its own. Found {name!r} twice.")
        runs[name] = builder.runs(name, _mapping(f"Method {name!r}", part))
    if methods:
        unused = [name for name in shared if name not in builder.used]
        if unused:
            raise ValueError(f"`shared` should hold arguments of the models. Found {unused}, which none of them takes.")
    alone: dict[str, list[Run]] = {}
    if single_tasks:
        overrides = {} if single_tasks is True else _mapping("`single_tasks`", single_tasks)
        # In the order in which the metrics name them; each of them once.
        tasks = dict.fromkeys(metric.rsplit("/", 1)[1] for metric in metrics)
        alone = {task: builder.single_task(_name(task), overrides) for task in tasks}
    return Comparison(
        path=path,
        output=Path(output),
        title=str(content.get("title", path.stem)),
        methods=runs,
        single_tasks=alone,
        seeds=seeds,
        metrics=metrics,
        per=_choice("`per`", content.get("per", "task"), ("task", "metric")),
        reference_point=reference_point,
        member=member,
        baselines=[Path(str(file)) for file in baselines],
    )


class _Builder:
    """Makes runs of the common parts and those of a method."""

    def __init__(
        self,
        content: Mapping[str, Any],
        shared: Mapping[str, Any],
        output: Path,
        seeds: Sequence[int],
        reference_point: tuple[float, ...] | None,
    ) -> None:
        self.trainer = _mapping("`trainer`", content.get("trainer", {}))
        self.data = _mapping("`data`", content.get("data"))
        self.shared = shared
        self.output = output
        self.seeds = seeds
        self.reference_point = reference_point
        self.seed_arguments = _seed_arguments(content)
        self.select = {
            "single": Select("val_loss", "min"),
            "population": Select("hypervolume", "max"),
        }
        given = _mapping("`select`", content.get("select", {}))
        _check_keys("`select`", given, set(self.select))
        self.select |= {kind: _select(f"`select.{kind}`", part) for kind, part in given.items()}
        self.used: set[str] = set()

    def runs(self, name: str, part: Mapping[str, Any]) -> list[Run]:
        """Return the runs of a method, one per seed."""
        what = f"Method {name!r}"
        _check_keys(what, part, _METHOD_KEYS)
        model = dict(_mapping(f"`model` of {what}", part.get("model")))
        taken, population = _about(model, what)
        select = self.select["population" if population else "single"]
        return self._runs("compare", name, part, model, taken, select)

    def single_task(self, task: str, part: Mapping[str, Any]) -> list[Run]:
        """Return the runs of a task alone, one per seed."""
        _check_keys("`single_tasks`", part, _METHOD_KEYS)
        model = _merged({"class_path": _ALONE}, _mapping("`model` of `single_tasks`", part.get("model", {})))
        model = _merged(model, {"init_args": {"task": task}})
        taken, _ = _about(model, "`single_tasks`")
        return self._runs("single-tasks", task, part, model, taken, Select("val_loss", "min"))

    def _runs(
        self,
        command: Command,
        name: str,
        part: Mapping[str, Any],
        model: Mapping[str, Any],
        taken: set[str],
        select: Select,
    ) -> list[Run]:
        what = f"{name!r}"
        if "select" in part:
            select = _select(f"`select` of {what}", part["select"])
        if command == "compare" and "hypervolume" in select.monitor and self.reference_point is None:
            raise ValueError(
                f"`reference_point` should be given, since {select.monitor!r} selects the epochs of {what}: without it "
                "each run would be measured against a point of its own."
            )
        shared = {key: value for key, value in self.shared.items() if key in taken}
        self.used |= set(shared)
        trainer = _merged(self.trainer, _mapping(f"`trainer` of {what}", part.get("trainer", {})))
        for key, reason in _TRAINER_REFUSED.items():
            if key in trainer:
                raise ValueError(f"`trainer` of {what} should not hold `{key}`: {reason}.")
        for kind in _callbacks(trainer):
            if kind in _CALLBACKS_REFUSED:
                raise ValueError(f"`trainer` of {what} should not hold `{kind}`: {_CALLBACKS_REFUSED[kind]}.")
        content = {
            "trainer": trainer,
            "model": {
                **model,
                "init_args": _merged(shared, _mapping(f"`model` of {what}", model.get("init_args", {}))),
            },
            "data": _merged(self.data, _mapping(f"`data` of {what}", part.get("data", {}))),
        }
        arguments = [*self.seed_arguments, *_seed_arguments(part)]
        runs = []
        for seed in self.seeds:
            own = copy.deepcopy({"seed_everything": seed, **content})
            for argument in arguments:
                _assign(own, argument, seed)
            runs.append(Run(command, name, seed, self.output, own, select, self.reference_point))
        return runs


def _about(model: Mapping[str, Any], what: str) -> tuple[set[str], bool]:
    """Return which arguments a model takes, and whether it is a population, from its class path."""
    class_path = model.get("class_path")
    if not isinstance(class_path, str):
        raise ValueError(f"`model` of {what} should have a `class_path`. Found {dict(model)}.")
    try:
        found = _imported(class_path)
    except (AttributeError, ImportError) as error:
        raise ValueError(f"The class {class_path!r} of {what} should be importable. Found: {error}.") from error
    kind = found if isinstance(found, type) else typing.get_type_hints(found).get("return", object)
    return _arguments(found), is_population(kind)


def _imported(path: str) -> Any:
    """Return the class or function ``path``, also a class method."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name is not None and ".".join(parts[:end]).startswith(error.name):
                continue  # a class, not a module
            raise
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ImportError(f"there is no module {parts[0]!r}")


def _arguments(function: Callable[..., Any]) -> set[str]:
    """Return the names of the arguments, also those that ``**kwargs`` hands on to a base class."""
    owners = function.__mro__ if isinstance(function, type) else (function,)
    names: set[str] = set()
    for owner in owners:
        if isinstance(owner, type) and "__init__" not in vars(owner):
            continue
        signed = vars(owner)["__init__"] if isinstance(owner, type) else owner
        parameters = inspect.signature(signed).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the entries of ``over``; mappings within are merged, too, unless their classes differ."""
    merged = dict(base)
    if "class_path" in over and over["class_path"] != base.get("class_path"):
        return dict(over)
    for key, value in over.items():
        before = merged.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return merged


def _callbacks(trainer: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes of the callbacks, of one or of a list."""
    given = trainer.get("callbacks") or []
    parts = given if isinstance(given, list) else [given]
    paths = [part.get("class_path") if isinstance(part, Mapping) else part for part in parts]
    return [path.rpartition(".")[2] for path in paths if isinstance(path, str)]


def _assign(content: dict[str, Any], argument: str, value: int) -> None:
    *path, last = argument.split(".")
    for key in path:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise ValueError(
                f"`seed_arguments` should name arguments, such as data.init_args.seed. Found {argument!r}."
            )
    content[last] = value


def _seed_arguments(content: Mapping[str, Any]) -> list[str]:
    arguments = _list("`seed_arguments`", content.get("seed_arguments", []))
    for argument in arguments:
        if not isinstance(argument, str) or argument.partition(".")[0] not in ("data", "model", "trainer"):
            raise ValueError(
                "`seed_arguments` should name arguments of `data` or `model`, such as data.init_args.seed. "
                f"Found {argument!r}."
            )
    return list(arguments)


def _seeds(seeds: Any) -> list[int]:
    good = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not good or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` should be a list of different integers of at least 0. Found {seeds!r}.")
    return list(seeds)


def _metrics(metrics: Any) -> dict[str, bool]:
    metrics = _mapping("`metrics`", metrics)
    for name, higher in metrics.items():
        metric, _, task = str(name).rpartition("/")
        if not metric or not task or metric.startswith(("val_", "test_")) or type(higher) is not bool:
            raise ValueError(
                "`metrics` should give for each <metric>/<task>, without the split, whether higher is better: "
                f"{{accuracy/left: true, loss/right: false}}. Found {name!r}: {higher!r}."
            )
    if not metrics:
        raise ValueError("`metrics` should name at least one test metric. Found none.")
    return dict(metrics)


def _reference_point(values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = [value for value in _list("`reference_point`", values) if type(value) in (int, float)]
    if len(numbers) != len(values) or not all(map(math.isfinite, numbers)) or not 2 <= len(numbers) <= MAX_OBJECTIVES:
        raise ValueError(
            f"`reference_point` should hold a finite number for each of 2 to {MAX_OBJECTIVES} tasks. Found {values!r}."
        )
    return tuple(float(value) for value in numbers)


def _select(what: str, part: Any) -> Select:
    part = _mapping(what, part)
    _check_keys(what, part, {"monitor", "mode"})
    monitor = part.get("monitor")
    if not isinstance(monitor, str) or monitor.startswith("test"):
        raise ValueError(f"{what} should `monitor` a quantity of the validation, such as val_loss. Found {monitor!r}.")
    return Select(monitor, _choice(f"`mode` of {what}", part.get("mode"), ("min", "max")))


def _name(name: Any) -> str:
    text = str(name)
    if not text or text.startswith((".", "-")) or "/" in text or text in _RESERVED:
        raise ValueError(
            "A method should have a name that can be that of a folder, without '/', not beginning with '.' or '-', and "
            f"none of {', '.join(_RESERVED)}. Found {name!r}."
        )
    return text


def _choice(what: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{what} should be one of {', '.join(map(repr, choices))}. Found {value!r}.")
    return value


def _mapping(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} should be a mapping. Found {value!r}.")
    return value


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} should be a list. Found {value!r}.")
    return value


def _check_keys(what: str, part: Mapping[str, Any], known: set[str]) -> None:
    unknown = [key for key in part if key not in known]
    if unknown:
        raise ValueError(f"{what} should hold {', '.join(sorted(known))}. Found {', '.join(map(repr, unknown))}.")
