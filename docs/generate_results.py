"""Write ``docs/results.md`` from the committed numbers of ``benchmarks/comparison.py``, words and all.

python docs/generate_results.py
python docs/generate_results.py --runs runs/comparison    # first keep the hypervolumes in validation of these runs
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mtl_lightning.comparison import Interval, confidence_interval, mean_ranks
from mtl_lightning.metrics.relative_improvement import Baseline, relative_improvement
from mtl_lightning.pareto import is_nondominated

ROOT = Path(__file__).parents[1]
if str(ROOT / "benchmarks") not in sys.path:
    sys.path.insert(0, str(ROOT / "benchmarks"))
_comparison = importlib.import_module("comparison")
PROBLEMS: tuple[str, ...] = _comparison.PROBLEMS
configuration: Callable[[str, str, str, Path], dict[str, Any]] = _comparison.configuration

PATH = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results" / "comparison"
CURVES = ROOT / "benchmarks" / "results" / "comparison_curves.json"

MT2O, GROUPS, EQUAL, INDEPENDENT, ALONE = "MT2O", "task groups", "equal weights", "independent runs", "single tasks"
OURS = (MT2O, "MT2O, without growth", GROUPS, "task groups, one by one")
RANK, DELTA, VOLUME = "mean rank", "delta m (%)", "hypervolume"
EVALUATIONS, SECONDS, MEMORY = "gradient evaluations", "processor seconds", "peak memory (MiB)"
_SETS = ("MT2OModule", "GradientPopulationModule", "ParetoSetModule")
_MOST_INLINE = 4  # metrics; a table with more has them in a table of their own

Seeds = Mapping[int, float]
"""One number per seed."""


# How methods stand to one another


@dataclass(frozen=True)
class Standing:
    """Where a method stands among others in one column.

    Attributes:
        name: The method.
        place: 1 for the best mean; equal means share a place, and a mean that is not finite comes last.
        interval: The mean over the seeds with its confidence interval.
        level: Whether this is a tie with the best: the interval of the differences with the same seed covers zero. Then
            the intervals of the two overlap, too; that alone would not do, as it is mostly the splits that widen them.
    """

    name: str
    place: int
    interval: Interval
    level: bool


def standings(values: Mapping[str, Seeds], higher_is_better: bool) -> list[Standing]:
    """Return the methods from the best mean to the worst.

    Example:
        >>> seeds = {"a": {0: 1.0, 1: 1.0}, "b": {0: 3.0, 1: 3.0}, "c": {0: math.nan, 1: 1.0}}
        >>> [(one.name, one.place, one.level) for one in standings(seeds, higher_is_better=True)]
        [('b', 1, True), ('a', 2, False), ('c', 3, False)]
    """
    intervals = {name: confidence_interval(list(seeds.values())) for name, seeds in values.items() if seeds}
    # Rounded, because the mean of the same ranks in another order may differ in the last digit.
    costs = {
        name: round(-one.mean if higher_is_better else one.mean, 9) if math.isfinite(one.mean) else math.inf
        for name, one in intervals.items()
    }
    ordered = sorted(intervals, key=costs.__getitem__)

    def level(name: str) -> bool:
        difference = within_seeds(values[name], values[ordered[0]], lambda one, best: one - best)
        return name == ordered[0] or (math.isfinite(intervals[name].mean) and not direction(difference))

    return [
        Standing(name, 1 + sum(cost < costs[name] for cost in costs.values()), intervals[name], level(name))
        for name in ordered
    ]


def within_seeds(first: Seeds, second: Seeds, of: Callable[[float, float], float]) -> Interval | None:
    """Return the interval of a function of two methods' values with the same seed, None if they share no seed.

    Example:
        >>> print(within_seeds({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0, 2: 9.0}, lambda one, other: one - other))
        0.5000 ± 0
    """
    shared = [of(first[seed], second[seed]) for seed in first if seed in second]
    return confidence_interval(shared) if shared else None


def direction(difference: Interval | None) -> int:
    """Return 1 or -1 where an interval lies above or below zero, 0 for a tie: where it covers zero or is unknown.

    Example:
        >>> [direction(Interval(mean, 0.1, 3)) for mean in (0.2, 0.05, -0.2)]
        [1, 0, -1]
    """
    if difference is None or not math.isfinite(difference.mean) or math.isnan(difference.half_width):
        return 0
    return (difference.mean > difference.half_width) - (difference.mean < -difference.half_width)


# What is read


@dataclass(frozen=True)
class Problem:
    """The results of one problem.

    Attributes:
        name: One of ``PROBLEMS``.
        content: The file of its results.
        curves: From method to seed to the hypervolume in validation after each epoch; empty if it was not kept.
    """

    name: str
    content: Mapping[str, Any]
    curves: Mapping[str, Mapping[str, Sequence[float]]]

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """The configuration of the comparison."""
        return configuration(self.name, self.content["scale"], "DATA", Path("runs"))

    @cached_property
    def full(self) -> dict[str, Any]:
        """That of full scale."""
        return configuration(self.name, "full", "DATA", Path("runs"))

    @property
    def seeds(self) -> list[int]:
        """The seeds."""
        return list(self.configuration["seeds"])

    @property
    def metrics(self) -> dict[str, bool]:
        """The metrics, and whether more of them is better."""
        return dict(self.configuration["metrics"])

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return list(self.content["runs"][-1]["task_names"])

    @cached_property
    def sets(self) -> list[str]:
        """The methods that end with a set of models."""
        methods = self.configuration["methods"]
        return [name for name in methods if methods[name]["model"]["class_path"].endswith(_SETS)]

    @property
    def single(self) -> list[str]:
        """The methods that end with one network."""
        return [name for name in self.configuration["methods"] if name not in self.sets]

    def values(self, method: str, column: str) -> dict[int, float]:
        """Return a column of a method, empty where it has none."""
        found = self.content["values"].get(method, {}).get(column, {})
        return {int(seed): float(value) for seed, value in found.items()}

    def complete(self, names: Iterable[str]) -> list[str]:
        """Return those of the methods that have a result for every seed: only these are ranked."""
        metric = next(iter(self.metrics))
        return [name for name in names if set(self.values(name, metric)) == set(self.seeds)]

    @cached_property
    def ranks(self) -> dict[str, dict[int, float]]:
        """The mean rank over the metrics among the methods that end with one network."""
        names = self.complete(self.single)
        if not names:
            return {}
        values = [[[self.values(name, m)[seed] for m in self.metrics] for name in names] for seed in self.seeds]
        ranks = mean_ranks(torch.tensor(values, dtype=torch.float64), list(self.metrics.values()))
        return {name: dict(zip(self.seeds, ranks[:, i].tolist(), strict=True)) for i, name in enumerate(names)}

    @property
    def places(self) -> list[Standing]:
        """The methods that end with one network, by mean rank."""
        return standings(self.ranks, higher_is_better=False)

    @property
    def volumes(self) -> list[Standing]:
        """The methods that end with a set, by hypervolume."""
        return standings({name: self.values(name, VOLUME) for name in self.complete(self.sets)}, higher_is_better=True)

    def runs(self, method: str) -> list[Mapping[str, Any]]:
        """Return the runs of a method."""
        return [run for run in self.content["runs"] if run["name"] == method]

    def cost(self, method: str, name: str) -> float:
        """Return the mean over the seeds of a cost of ``Result.cost``."""
        return statistics.fmean(float(run["cost"][name]) for run in self.runs(method))

    def ratio(self, first: str, second: str, column: str) -> float:
        """Return the ratio of the means of a column."""
        means = [statistics.fmean(self.values(name, column).values()) for name in (first, second)]
        return means[0] / means[1]

    def members(self, method: str) -> dict[str, dict[int, float]]:
        """Return for each metric, by seed, the test value of the model that is best in it in validation."""
        found: dict[str, dict[int, float]] = {name: {} for name in self.metrics}
        for run in self.runs(method):
            for name, higher in self.metrics.items():
                validation = [float(value) for value in run["validation"][name]]
                costs = [(-value if higher else value) if math.isfinite(value) else math.inf for value in validation]
                found[name][int(run["seed"])] = float(run["test"][name][costs.index(min(costs))])
        return found

    def members_delta(self, method: str) -> dict[int, float]:
        """Return by seed delta m of the models that are best for each task."""
        members = self.members(method)
        baselines = {}
        for name, higher in self.metrics.items():
            alone = self.values(ALONE, name)
            if len(alone) < len(self.seeds):
                return {}
            baselines[name] = Baseline(statistics.fmean(alone.values()), higher)
        seeds = next(iter(members.values()))
        return {seed: relative_improvement({n: members[n][seed] for n in members}, baselines) for seed in seeds}

    def nondominated(self, method: str) -> str:
        """Return how many models of a set no other dominates in the test losses, of how many, on average."""
        counts, sizes = [], []
        for run in self.runs(method):
            losses = [[float(value) for value in run["test"][f"loss/{task}"]] for task in run["task_names"]]
            points = torch.tensor(losses, dtype=torch.float64).mT
            finite = points[points.isfinite().all(dim=1)]
            counts.append(int(is_nondominated(finite).sum()) if len(finite) else 0)
            sizes.append(len(points))
        return f"{statistics.fmean(counts):.3g} of {statistics.fmean(sizes):.3g}"

    def why(self, method: str) -> str:
        """Return why a method has no result of some seed, empty if it has all."""
        missing = {label: why for label, why in self.content["missing"].items() if label.startswith(f"{method}, seed ")}
        return "; ".join(f"{label.rsplit(', ', 1)[1]}: {' '.join(str(why).split())}" for label, why in missing.items())


def read(folder: Path = RESULTS, curves: Path = CURVES) -> list[Problem]:
    """Return the problems that have results."""
    kept = json.loads(curves.read_text(encoding="utf-8")) if curves.exists() else {}
    paths = {name: folder / f"{name}.json" for name in PROBLEMS}
    return [
        Problem(name, json.loads(path.read_text(encoding="utf-8")), kept.get(name, {}))
        for name, path in paths.items()
        if path.exists()
    ]


def keep_curves(runs: Path, problems: Sequence[Problem], path: Path = CURVES) -> None:
    """Keep the hypervolumes in validation of the methods that end with a set, one method a line."""
    parts = []
    for problem in problems:
        lines = []
        for method in problem.sets:
            found = {}
            for seed in problem.seeds:
                file = runs / problem.name / method / f"seed_{seed}" / "pareto_front" / "hypervolume.csv"
                if file.exists():
                    with file.open(encoding="utf-8", newline="") as opened:
                        found[str(seed)] = [round(float(row[VOLUME]), 5) for row in csv.DictReader(opened)]
            lines.append(f"  {json.dumps(method)}: {json.dumps(found)}")
        parts.append(f" {json.dumps(problem.name)}: {{\n" + ",\n".join(lines) + "\n }")
    _write(path, "{\n" + ",\n".join(parts) + "\n}\n")


# How it is written


def number(value: float) -> str:
    """Return a number with three significant digits, integers of more whole.

    Example:
        >>> [number(value) for value in (0.012345, 9.996, 1234.5, math.nan)]
        ['0.0123', '10.0', '1,234', 'not finite']
    """
    return f"{value:,.{_decimals(value)}f}" if math.isfinite(value) else "not finite"


def spread(interval: Interval | None, decimals: int | None = None) -> str:
    """Return a mean and its interval, with three significant digits of the mean, or with more if the interval has none.

    Args:
        interval: The interval; a dash if there is none.
        decimals: How many decimals to write instead.

    Example:
        >>> spread(Interval(0.91234, 0.0312, 3)), spread(Interval(0.91234, 0.00031, 3)), spread(None)
        ('0.912 ± 0.031', '0.9123 ± 0.0003', '—')
    """
    if interval is None:
        return "—"
    if not math.isfinite(interval.mean):
        return "not finite"
    if not math.isfinite(interval.half_width):
        return f"{interval.mean:.{_decimals(interval.mean) if decimals is None else decimals}f}"
    if decimals is None:
        decimals = _decimals(interval.mean)
        if 0 < interval.half_width < 0.5 * 10**-decimals:
            decimals = min(6, _decimals(interval.half_width) - 2)
    # Plus zero, because a rounded mean may be minus zero.
    return f"{round(interval.mean, decimals) + 0.0:.{decimals}f} ± {interval.half_width:.{decimals}f}"


def _decimals(value: float) -> int:
    if value == 0 or not math.isfinite(value):
        return 2
    return max(0, 2 - int(f"{abs(value):.2e}".partition("e")[2]))


def _mean(seeds: Seeds) -> str:
    return number(statistics.fmean(seeds.values())) if seeds else "—"


def _interval(seeds: Seeds, decimals: int | None = None) -> str:
    return spread(confidence_interval(list(seeds.values())) if seeds else None, decimals)


def _name(method: str) -> str:
    return f"**{method}**" if method in OURS else method


def _listed(names: Sequence[str], most: int = 6) -> str:
    """Return names, which may hold commas, in a sentence."""
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return "; ".join([*names[:most], *more])


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _metric(name: str, higher: bool) -> str:
    metric, _, task = name.rpartition("/")
    return f"{metric.replace('_', ' ')}, `{task}` {'↑' if higher else '↓'}"


# The tables of a problem


def single_tables(problem: Problem) -> str:
    """Return the table of the methods that end with one network, from the best mean rank to the worst."""
    inline = problem.metrics if len(problem.metrics) <= _MOST_INLINE else {}
    headings = ["method", *(_metric(*one) for one in inline.items()), "delta m (%) ↑", "mean rank ↓"]
    headings += [EVALUATIONS, "CPU seconds", MEMORY]
    order = [one.name for one in problem.places]
    order += [name for name in problem.single if name not in order]

    def row(method: str) -> list[str]:
        if not problem.runs(method) and method != ALONE:
            return [_name(method), f"no result ({problem.why(method)})", *[""] * (len(headings) - 2)]
        cells = [_interval(problem.values(method, name)) for name in inline]
        cells += [_interval(problem.values(method, DELTA), 1), _interval(problem.ranks.get(method, {}), 1)]
        return [_name(method), *cells, *_costs(problem, method)]

    parts = [_table(headings, map(row, [*order, ALONE]))]
    if not inline:
        headings = ["method", *(_metric(*one) for one in problem.metrics.items())]
        having = [method for method in [*order, ALONE] if problem.values(method, next(iter(problem.metrics)))]
        rows = [[_name(m), *(_interval(problem.values(m, name)) for name in problem.metrics)] for m in having]
        parts.append(_folded("The metrics of each task", _table(headings, rows)))
    return "\n\n".join([*parts, *_lacking(problem, problem.single)])


def set_tables(problem: Problem) -> str:
    """Return the table of the methods that end with a set of models, from the largest hypervolume to the least."""
    inline = problem.metrics if len(problem.metrics) <= _MOST_INLINE else {}
    headings = ["method", "hypervolume ↑", "non-dominated", "delta m (%) of one model ↑"]
    headings += ["delta m (%) of the best model for each task ↑"]
    headings += [*(_metric(*one) for one in inline.items()), EVALUATIONS, "CPU seconds", MEMORY]
    order = [one.name for one in problem.volumes]
    order += [name for name in problem.sets if name not in order]

    def row(method: str) -> list[str]:
        if not problem.runs(method):
            return [_name(method), f"no result ({problem.why(method)})", *[""] * (len(headings) - 2)]
        members = problem.members(method)
        cells = [_interval(problem.values(method, VOLUME)), problem.nondominated(method)]
        cells += [_interval(problem.values(method, DELTA), 1), _interval(problem.members_delta(method), 1)]
        return [_name(method), *cells, *(_interval(members[name]) for name in inline), *_costs(problem, method)]

    def point(method: str) -> list[str]:
        delta = _interval(problem.values(method, DELTA), 1)
        cells = [_interval(problem.values(method, VOLUME)), "1 of 1", delta, delta]
        cells += [_interval(problem.values(method, name)) for name in inline]
        return [f"*one point: {method}*", *cells, *_costs(problem, method)]

    rows = [*map(row, order), *(point(method) for method in _points(problem))]
    parts = [_table(headings, rows)]
    if not inline:
        headings = ["method", *(_metric(*one) for one in problem.metrics.items())]
        members = {method: problem.members(method) for method in order if problem.runs(method)}
        rows = [[_name(m), *(_interval(found[name]) for name in problem.metrics)] for m, found in members.items()]
        parts.append(_folded("The best model for each task", _table(headings, rows)))
    return "\n\n".join([*parts, *_lacking(problem, problem.sets)])


def _points(problem: Problem) -> list[str]:
    """Return what a set has to beat: the one network of the largest hypervolume, and one network for each task."""
    alone = [ALONE] if problem.values(ALONE, VOLUME) else []
    return [*(one.name for one in _single_volumes(problem)[:1]), *alone]


def _single_volumes(problem: Problem) -> list[Standing]:
    volumes = {name: problem.values(name, VOLUME) for name in problem.complete(problem.single)}
    return standings(volumes, higher_is_better=True)


def _costs(problem: Problem, method: str) -> list[str]:
    evaluations = problem.values(method, EVALUATIONS)
    seconds, memory = problem.values(method, SECONDS), problem.values(method, MEMORY)
    whole = f"{statistics.fmean(evaluations.values()):,.0f}" if evaluations else "—"
    return [whole, _mean(seconds), f"{statistics.fmean(memory.values()):,.0f}" if memory else "—"]


def _lacking(problem: Problem, methods: Sequence[str]) -> list[str]:
    """Return a sentence on methods with results of some seeds, which are not ranked."""
    some = [name for name in methods if problem.runs(name) and problem.why(name)]
    found = [
        f"{name} has {len(problem.runs(name))} of {len(problem.seeds)} seeds ({problem.why(name)})" for name in some
    ]
    return [f"Not ranked: {'; '.join(found)}."] if found else []


def _folded(title: str, text: str) -> str:
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{text}\n\n</details>'


# The tables of all problems


def single_summary(problems: Sequence[Problem]) -> str:
    """Return the mean rank of each method in each problem, and where it stands in all of its problems.

    Problems differ in how many methods they have, so what is averaged is the share of the way from rank 1 to the last.
    """
    shares: dict[str, list[float]] = {}
    cells: dict[str, dict[str, str]] = {}
    for problem in problems:
        for one in problem.places:
            if len(problem.ranks) > 1:
                shares.setdefault(one.name, []).append((one.interval.mean - 1) / (len(problem.ranks) - 1))
            cells.setdefault(one.name, {})[problem.name] = f"{one.interval.mean:.1f}{' =' if one.level else ''}"
    headings = ["method", *(f"{problem.name} (of {len(problem.ranks)})" for problem in problems)]
    rows = [
        [
            _name(name),
            *(cells[name].get(problem.name, "—") for problem in problems),
            f"{100 * statistics.fmean(shares[name]):.0f} %",
            str(len(shares[name])),
        ]
        for name in sorted(shares, key=lambda name: statistics.fmean(shares[name]))
    ]
    return _table([*headings, "of the way from first to last ↓", "problems"], rows)


def set_summary(problems: Sequence[Problem]) -> str:
    """Return the hypervolume of each set over that of independent runs, and the evaluations over theirs."""
    ratios: dict[str, list[float]] = {}
    cells: dict[str, dict[str, str]] = {}
    for problem in problems:
        for one in problem.volumes:
            ratio = _volume_ratio(problem, one.name)
            if ratio is None or not math.isfinite(ratio.mean):
                continue
            cost = problem.ratio(one.name, INDEPENDENT, EVALUATIONS)
            text = f"{spread(ratio, 3)} (x {number(cost)})" if one.name != INDEPENDENT else "1 (x 1)"
            ratios.setdefault(one.name, []).append(ratio.mean)
            cells.setdefault(one.name, {})[problem.name] = text
    rows = [
        [_name(name), *(cells[name].get(p.name, "—") for p in problems), f"{_geometric(ratios[name]):.3f}"]
        for name in sorted(ratios, key=lambda name: -_geometric(ratios[name]))
    ]
    return _table(["method", *(problem.name for problem in problems), "geometric mean ↑"], rows)


def _geometric(ratios: Sequence[float]) -> float:
    """Return the geometric mean, so that half and twice the volume cancel out; 0 if one of them is 0."""
    return math.exp(statistics.fmean(map(math.log, ratios))) if min(ratios) > 0 else 0.0


def _volume_ratio(problem: Problem, method: str) -> Interval | None:
    # Only where every volume is positive: a run that does not reach the reference point has volume 0.
    other = {seed: value for seed, value in problem.values(INDEPENDENT, VOLUME).items() if value > 0}
    return within_seeds(problem.values(method, VOLUME), other, lambda one, two: one / two)


def at_equal_evaluations(
    curve: Sequence[float], evaluations: float, other: Sequence[float], other_evaluations: float
) -> float | None:
    """Return the ratio of the best values of two curves up to the gradient evaluations that both have had.

    All epochs of a curve are taken to cost alike; where they do not, as in a population that grows, the curve should be
    the one of fewer evaluations, which counts whole. The epoch in which the evaluations are reached does not count for
    the first curve and counts for the second; None if that leaves the first without a value, or the second without one
    that is positive.

    Args:
        curve: A value after each epoch.
        evaluations: Those of the whole curve.
        other: The curve to compare with.
        other_evaluations: Those of the whole of it.

    Example:
        >>> at_equal_evaluations([0.5, 0.6, 0.7, 0.9], 400, [0.4, 0.5], 200)  # 0.6 after two epochs of four
        1.2
    """
    budget = min(evaluations, other_evaluations)
    own = curve[: math.floor(len(curve) * budget / evaluations)]
    its = other[: math.ceil(len(other) * budget / other_evaluations)]
    if not own or not its or max(its) <= 0:
        return None
    return max(own) / max(its)


def equal_summary(problems: Sequence[Problem]) -> str:
    """Return the hypervolume in validation of each set over that of independent runs at equal gradient evaluations."""
    ratios: dict[str, list[float]] = {}
    cells: dict[str, dict[str, str]] = {}
    having = [problem for problem in problems if INDEPENDENT in problem.curves and problem.runs(INDEPENDENT)]
    for problem in having:
        whole = problem.values(INDEPENDENT, EVALUATIONS)
        for name in problem.complete(problem.sets):
            own = problem.values(name, EVALUATIONS)
            curves, others = problem.curves.get(name, {}), problem.curves[INDEPENDENT]
            if name == INDEPENDENT or not set(curves) <= set(others):
                continue
            found = [
                at_equal_evaluations(curve, own[int(seed)], others[seed], whole[int(seed)])
                for seed, curve in curves.items()
            ]
            values = [value for value in found if value is not None]
            if values and len(values) == len(found):
                interval = confidence_interval(values)
                ratios.setdefault(name, []).append(interval.mean)
                cells.setdefault(name, {})[problem.name] = spread(interval, 3)
    if not ratios:
        return ""
    rows = [
        [_name(name), *(cells[name].get(p.name, "—") for p in having), f"{_geometric(ratios[name]):.3f}"]
        for name in sorted(ratios, key=lambda name: -_geometric(ratios[name]))
    ]
    return _table(["method", *(problem.name for problem in having), "geometric mean ↑"], rows)


def budget_table(problems: Sequence[Problem]) -> str:
    """Return how much was trained, beside full scale and the published protocols."""
    rows = []
    for problem in problems:
        (epochs, full_epochs) = (one["trainer"]["max_epochs"] for one in (problem.configuration, problem.full))
        having = next(name for name in (*problem.single, *problem.sets) if problem.runs(name))
        samples, batches = problem.cost(having, "samples"), problem.cost(having, "batches")
        given = {
            key: one["data"]["init_args"] for key, one in (("small", problem.configuration), ("full", problem.full))
        }
        size = given["small"].get("num_train", samples / epochs)
        whole = full_epochs * given["full"].get("num_train", size)
        last, runs = _last_epochs(problem)
        rows.append(
            [
                f"[{problem.name}](#{_anchor(problem)})",
                str(len(problem.tasks)),
                str(len(problem.seeds)),
                f"{size:,.0f} x {epochs}",
                f"{batches:,.0f}",
                _fraction(samples, whole),
                _published(problem, samples, size),
                f"{last} of {runs}",
            ]
        )
    headings = ["problem", "tasks", "seeds", "samples x epochs", "batches", "of full scale", "of a published protocol"]
    return _table([*headings, "best in the last epoch"], rows)


def _published(problem: Problem, samples: float, size: float) -> str:
    data = problem.configuration["data"]["class_path"]
    if data.endswith("MultiMNISTDataModule"):
        return f"{_fraction(samples, 108_000 * 100)} of Pareto MTL's and COSMOS's"
    if problem.name == "rf1":
        return f"{_fraction(samples, 6_303 * 100)} of EPO's"
    return "none"


def _fraction(part: float, whole: float) -> str:
    if part >= whole:
        return "all" if part == whole else f"{part / whole:.1f} x"
    return f"1/{whole / part:,.3g}" if whole / part < 1000 else f"1/{whole / part:,.0f}"


def _last_epochs(problem: Problem) -> tuple[int, int]:
    """Return in how many runs the last epoch was the best in validation, and the number of runs."""
    runs = [run for name in (*problem.single, *problem.sets) for run in problem.runs(name)]
    last = problem.configuration["trainer"]["max_epochs"] - 1
    return sum(run["selected"]["epoch"] == last for run in runs), len(runs)


# What the numbers say


def reading(problems: Sequence[Problem]) -> str:
    """Return what can be read from the numbers, first over all problems, then for each."""
    return "\n".join([*_overall(problems), "", *(f"- {_of_problem(problem)}" for problem in problems)])


def _overall(problems: Sequence[Problem]) -> list[str]:
    lines = []
    having = [p for p in problems if {MT2O, INDEPENDENT} <= {one.name for one in p.volumes}]
    if having:
        signs = {p.name: direction(_volume_difference(p, MT2O, INDEPENDENT)) for p in having}
        costs = [p.ratio(MT2O, INDEPENDENT, EVALUATIONS) for p in having]
        lines.append(
            f"- **MT2O** beside independent runs, by the difference of hypervolume within seeds: {_counted(signs)}. It "
            f"takes {_range(costs)} of their gradient evaluations. Its places among the sets: "
            f"{_places({p.name: p.volumes for p in having}, MT2O)}."
        )
        above = [p.name for p in having if _single_above(p)]
        lines.append(
            "- One network with one point has a larger mean hypervolume than the whole set of MT2O in "
            + (f"{len(above)} of {len(having)} problems: {_listed(above, 9)}." if above else "none of the problems.")
        )
    having = [p for p in problems if {GROUPS, EQUAL} <= set(p.ranks)]
    if having:
        signs = {p.name: direction(_delta_difference(p, GROUPS, EQUAL)) for p in having}
        costs = [p.ratio(GROUPS, EQUAL, EVALUATIONS) for p in having]
        steps = [p.cost(GROUPS, "optimizer_steps") / p.cost(EQUAL, "optimizer_steps") for p in having]
        lines.append(
            f"- **Task groups** beside equal weights, by the difference of delta m within seeds: {_counted(signs)}. "
            f"They take {_range(steps)} the optimiser steps and {_range(costs)} the gradient evaluations. Their places "
            f"among the single networks: {_places({p.name: p.places for p in having}, GROUPS)}."
        )
        if all("task groups, one by one" in p.ranks for p in having):
            signs = {p.name: direction(_delta_difference(p, GROUPS, "task groups, one by one")) for p in having}
            lines.append(f"- Task groups beside one task after another, likewise: {_counted(signs)}.")
    for what, found in (
        ("single networks", {p.name: p.places for p in problems}),
        ("sets", {p.name: p.volumes for p in problems}),
    ):
        first: dict[str, list[str]] = {}
        for name, places in found.items():
            for one in places:
                if one.place == 1:
                    first.setdefault(one.name, []).append(name)
        if first:
            ordered = sorted(first, key=lambda name: -len(first[name]))
            lines.append(f"- First among the {what}: {'; '.join(f'{n} ({_listed(first[n], 9)})' for n in ordered)}.")
    return lines


def _of_problem(problem: Problem) -> str:
    parts = [f"**{problem.name}**.", *_of_single(problem)]
    if problem.volumes:
        parts += _of_sets(problem)
    missing = [name for name in (*problem.single, *problem.sets) if problem.why(name)]
    if missing:
        parts.append(f"Without a result of every seed: {_listed(missing, 9)}.")
    return " ".join(parts)


def _of_single(problem: Problem) -> list[str]:
    places = problem.places
    if len(places) < 2:
        return []
    parts = [f"Best mean rank of {len(places)} methods with one network: {_first(places, 1)}."]
    own = next((one for one in places if one.name == GROUPS), None)
    if own is not None and EQUAL in problem.ranks:
        if own.place > 1:
            parts.append(
                f"Task groups are number {own.place} ({spread(own.interval, 1)}, {'level' if own.level else 'behind'})."
            )
        difference = _delta_difference(problem, GROUPS, EQUAL)
        if difference is not None:
            parts.append(f"The delta m of task groups is {_versus(difference, 'equal weights', 1, ' points')}.")
        other = "task groups, one by one"
        columns = [*problem.metrics, EVALUATIONS]
        if other in problem.ranks and all(problem.values(GROUPS, c) == problem.values(other, c) for c in columns):
            parts.append("All their values are those of one task after another: every group was a single task.")
    return parts


def _of_sets(problem: Problem) -> list[str]:
    volumes = problem.volumes
    parts = [f"Largest hypervolume of {len(volumes)} sets: {_first(volumes)}."]
    own = next((one for one in volumes if one.name == MT2O), None)
    if own is None:
        return parts
    if own.place > 1:
        parts.append(f"MT2O is number {own.place} ({spread(own.interval)}, {'level' if own.level else 'behind'}).")
    difference = _volume_difference(problem, MT2O, INDEPENDENT)
    if difference is not None:
        evaluations, seconds = (problem.ratio(MT2O, INDEPENDENT, column) for column in (EVALUATIONS, SECONDS))
        parts.append(
            f"Its hypervolume is {_versus(difference, 'independent runs', 3)}, for x {number(evaluations)} the "
            f"gradient evaluations and x {number(seconds)} the CPU seconds."
        )
    if above := _single_above(problem):
        parts.append(f"The one point of {above.name} has {spread(above.interval)}, more than MT2O's set.")
    return parts


def _first(places: Sequence[Standing], decimals: int | None = None) -> str:
    """Return who is first, and who is level with the first."""
    first = [one.name for one in places if one.place == 1]
    level = [one.name for one in places if one.place > 1 and one.level]
    return (
        f"{_listed(first)}, {spread(places[0].interval, decimals)} (level: {_listed(level) if level else 'no other'})"
    )


def _single_above(problem: Problem) -> Standing | None:
    """Return the one network of the largest hypervolume if that is larger than MT2O's."""
    own = next(one for one in problem.volumes if one.name == MT2O)
    best = _single_volumes(problem)[:1]
    return best[0] if best and best[0].interval.mean > own.interval.mean else None


def _volume_difference(problem: Problem, first: str, second: str) -> Interval | None:
    return within_seeds(problem.values(first, VOLUME), problem.values(second, VOLUME), lambda one, other: one - other)


def _delta_difference(problem: Problem, first: str, second: str) -> Interval | None:
    return within_seeds(problem.values(first, DELTA), problem.values(second, DELTA), lambda one, other: one - other)


def _versus(difference: Interval, other: str, decimals: int, unit: str = "") -> str:
    what = {1: "above", 0: "a tie with", -1: "below"}[direction(difference)]
    sign = "+" if difference.mean >= 0 else ""
    return f"{what} that of {other} (difference within seeds {sign}{spread(difference, decimals)}{unit})"


def _counted(signs: Mapping[str, int]) -> str:
    parts = []
    for sign, what in ((1, "above"), (0, "tie"), (-1, "below")):
        names = [name for name, found in signs.items() if found == sign]
        parts.append(f"{what} in {len(names)}" + (f" ({_listed(names, 9)})" if names else ""))
    return ", ".join(parts)


def _places(found: Mapping[str, Sequence[Standing]], method: str) -> str:
    texts = []
    for name, places in found.items():
        own = next(one for one in places if one.name == method)
        texts.append(f"{own.place} of {len(places)}{', level' if own.level and own.place > 1 else ''} ({name})")
    return "; ".join(texts)


def _range(ratios: Sequence[float]) -> str:
    low, high = number(min(ratios)), number(max(ratios))
    return f"x {low}" if low == high else f"x {low} to x {high}"


# The page

_BUDGET = """**Read it as a comparison at a small budget**: {where}, one thread for each run, two runs beside one
another, no GPU. In {last} of {runs} runs the last epoch was the best in validation: training was not at its end. What
is compared is then how far a method gets in a short time, where longer or more steps are of advantage."""
_NOTHING = "**There are no results yet.**"
_INTRODUCTION = """# Results

All methods beside one another: those that end with one network, and those that end with a set of models to choose from.
Numbers, words and order on this page are made by `python docs/generate_results.py` from the files in the folder
`benchmarks/results/comparison`, which `benchmarks/comparison.py` writes by [`mtl-lightning compare`](compare.md).

BUDGET

`python benchmarks/comparison.py --data DATA --scale full` is the same at about the published budgets, for a GPU; it has
not been run.

## How

- **The same for all**: network, optimiser, batches, epochs, seeds and splits. The optimiser is Adam without a schedule,
  with learning rate RATES. COSMOS's network takes the preference beside its inputs, PHN and PaMaL make one from the
  same network. Settings of the methods are those in `benchmarks/comparison.py`, the same in all problems but for
  COSMOS's penalty and for what counts batches. There is no search over learning rates or settings, for no method.
- **Selection on validation**: the epoch of least validation loss for one network, of the largest hypervolume of the
  validation losses for a set. The test split is read once, after that.
- **Equal epochs, not equal cost**: a method that takes the gradient of each task pays for each, a population for each
  of its networks, task groups for each group. Gradient evaluations, passes forward and backward of one network over one
  batch, are in every table. CPU seconds are those in training batches, without data loading and validation. Two runs
  shared the cores, so small differences in them mean nothing.
- **Losses**: tables of targets (`enb`, `rf1`) have features and targets standardised on the training rows and the mean
  squared error, so that 1 is the variance of a target; overlapping digits and garments have cross entropy in nats;
  rendered rooms, of 32 x 32 pixels here and 128 x 128 at full scale, those of
  [their data set](datasets.md#rendered-scenes). All methods begin from the same losses, without weights.
- **Reference points** of the hypervolume: 1 in each loss for tables, which is to predict the mean; (2, 2) for digits
  and garments. There is none for rooms. Populations have 8 models in tables and 6 otherwise; conditioned networks are
  evaluated at 25 preferences, which can only add to their hypervolume.
- **delta m**: relative improvement over one network for each task, in percent of its mean test values. **Mean rank**:
  over the metrics, among the methods of the table. Of a set, delta m is that of the one model with the least mean
  validation loss, and beside it that of the best model for each task, chosen on validation likewise.
- **±** is half the width of the 95 % confidence interval over the seeds (Student's t): with three seeds 2.5 standard
  deviations, with two 9. Splits change with the seed, which makes intervals wide. Differences **within seeds** compare
  runs on the same split; they are a tie if their interval covers 0. A method is **level** with the best mean if its
  difference to it is a tie. Then the intervals of the two overlap, but not all that overlap are level. Nothing is
  corrected for the number of comparisons: of twenty intervals of methods that do not differ, one misses 0 by chance.
- `rf1` is a time series whose rows are drawn into splits, so neighbours of test rows are in training: its errors are
  flattering, for all methods alike.
- Our two methods are in bold."""
_TRAINED = """What was trained, in samples that a network has seen; the last column counts the runs in which no
earlier epoch was better in validation:"""
_PUBLISHED = """**Why hypervolumes do not compare with published ones.** Methods for the overlapping digits are
published with 120,000 pairs, of which PHN and COSMOS hold out a tenth, 100 epochs (PHN 150) and batches of 256:
Pareto MTL with SGD (learning rate 0.001, momentum 0.9, halved at 15, 30, 45, 60, 75 and 90 epochs) and 5 preferences,
COSMOS with Adam and 25 test rays at the reference point (2, 2). What was trained here is the fraction in the table,
on CPU cores for lack of a GPU. Their pairs come from a generator that was not published, ours are [drawn
anew](datasets.md#multimnist). [MT2O](mt2o.md#which-transfer-and-does-it-help) names the published bands. EPO's `rf1`
has raw features and targets, a network with tanh, SGD with learning rate 0.0001, 100 epochs on 6,303 rows and no
hypervolume. For `enb` and our rooms there is no published protocol that we know of."""
_RANKS = """Mean rank over the metrics in each problem; = where a method is level with the first. Problems have
different methods, so the order is by how far a method is on the way from rank 1 to the last, on average over its
problems."""
_RATIOS = """Hypervolume of the test losses over that of independent runs with the same seed, at the end of training,
and how many times their gradient evaluations it took. — where independent runs have no volume."""
_EQUAL = """At **equal gradient evaluations**: the best hypervolume in validation up to the evaluations that both have
had, over that of independent runs. There is a value after each epoch; an epoch that is not whole counts for
independent runs, not for the other. — where a method has no whole epoch by then."""


def introduction(problems: Sequence[Problem]) -> str:
    """Return what was compared, and how."""
    machines = {(p.content["machine"]["device"], p.content["machine"]["torch"].partition("+")[0]) for p in problems}
    where = "; ".join(f"{device}, torch {release}" for device, release in sorted(machines))
    last, runs = zip(*map(_last_epochs, problems), strict=True) if problems else ((), ())
    beginning = _BUDGET.format(where=where, last=sum(last), runs=sum(runs)) if problems else _NOTHING
    parts = [_INTRODUCTION.replace("BUDGET", beginning).replace("RATES", learning_rates(problems))]
    if problems:
        parts += [_TRAINED, budget_table(problems), _PUBLISHED]
    return "\n\n".join(parts)


def learning_rates(problems: Sequence[Problem]) -> str:
    """Return the learning rates with the problems that they are of."""
    rates: dict[float, list[str]] = {}
    for problem in problems:
        optimizer = problem.configuration["shared"]["optimizer"]
        rates.setdefault(optimizer["init_args"]["lr"], []).append(problem.name)
    return " and ".join(f"{rate} ({', '.join(names)})" for rate, names in sorted(rates.items())) or "of each problem"


def summaries(problems: Sequence[Problem]) -> str:
    """Return the tables over all problems."""
    single = [problem for problem in problems if len(problem.ranks) > 1]
    sets = [problem for problem in problems if any(one.name == INDEPENDENT for one in problem.volumes)]
    parts = []
    if single:
        parts += [
            "## One network: mean ranks",
            _RANKS,
            single_summary(single),
        ]
    if sets:
        parts += [
            "## Sets: hypervolume beside independent runs",
            _RATIOS,
            set_summary(sets),
        ]
        if equal := equal_summary(sets):
            parts += [_EQUAL, equal]
    return "\n\n".join(parts)


def section(problem: Problem) -> str:
    """Return the tables of one problem."""
    parts = [f"## {problem.name}", f"{problem.content['title']}. `{problem.content['command']}`"]
    parts += ["One network:", single_tables(problem)]
    if problem.sets:
        point = ", ".join(f"{value:g}" for value in problem.configuration["reference_point"])
        what = "Sets of models, hypervolume up to "
        what += (
            f"({point})" if len(problem.tasks) < 4 else f"{problem.configuration['reference_point'][0]:g} in each loss"
        )
        each = "; metrics are those of the best model for each task" if len(problem.metrics) <= _MOST_INLINE else ""
        parts += [f"{what}{each}:", set_tables(problem)]
    return "\n\n".join(parts)


def _anchor(problem: Problem) -> str:
    return problem.name.replace("+", "")


def page(problems: Sequence[Problem]) -> str:
    """Return the whole page.

    Raises:
        ValueError: If results are not of the small scale that the introduction describes.
    """
    for problem in problems:
        if problem.content["scale"] != "small":
            raise ValueError(
                "Results should be of the scale 'small', which the introduction describes. Found "
                f"{problem.content['scale']!r} for {problem.name}: describe there what was run."
            )
    measured = [problem for problem in problems if any(map(problem.runs, (*problem.single, *problem.sets)))]
    parts = [introduction(measured)]
    if measured:
        parts += ["## What the numbers say", reading(measured), summaries(measured), *map(section, measured)]
    lacking = [name for name in PROBLEMS if name not in {problem.name for problem in measured}]
    if lacking:
        # A problem whose runs have all failed has a file, too.
        why = {problem.name: sorted(set(problem.content["missing"].values())) for problem in problems}
        lines = [
            f"- {name}{f' ({_listed(why[name], 2)})' if name in why else ''}: "
            f"`python benchmarks/comparison.py --data DATA --problems {name}`"
            for name in lacking
        ]
        parts.append("\n".join(["## Not measured", "", *lines]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="The folder of the runs, whose hypervolumes in validation to keep.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--page", type=Path, default=PATH)
    arguments = parser.parse_args()
    if arguments.runs is not None:
        keep_curves(arguments.runs, read(arguments.results, arguments.curves), arguments.curves)
    _write(arguments.page, page(read(arguments.results, arguments.curves)))


if __name__ == "__main__":
    main()
