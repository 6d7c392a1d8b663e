"""The tables of a comparison: what the results of its runs say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mtl_lightning.commands.configuration import Comparison, Run
from mtl_lightning.commands.results import Result, load_failure, load_result, write_json, write_text
from mtl_lightning.commands.single_tasks import baseline_values, metric_value
from mtl_lightning.comparison import Column, ComparisonTable, Interval, Row, confidence_interval, mean_ranks
from mtl_lightning.metrics.relative_improvement import Baseline, load_baselines, relative_improvement
from mtl_lightning.pareto import hypervolume

SINGLE_TASKS = "single tasks"
_COSTS = {
    "seconds": "seconds",
    "cpu_seconds": "processor seconds",
    "gradient_evaluations": "gradient evaluations",
    "peak_memory_mib": "peak memory (MiB)",
}


@dataclass(frozen=True)
class Report:
    """The tables of a comparison.

    Attributes:
        table: The table of means over the seeds.
        numbers: From method to column to one number per seed, by seed.
        complete: Whether every run has a result.
    """

    table: ComparisonTable
    numbers: Mapping[str, Mapping[str, Mapping[int, float]]]
    complete: bool


def write_report(comparison: Comparison) -> tuple[Report, list[Path]]:
    """Write ``comparison.md``, ``comparison.html`` and ``comparison.json``, and return the report and their paths.

    Raises:
        ValueError: If the results do not hold what the configuration asks for.
    """
    report = make_report(comparison)
    paths = [comparison.output / f"comparison.{suffix}" for suffix in ("md", "html", "json")]
    write_text(paths[0], report.table.markdown() + "\n")
    write_text(paths[1], report.table.html())
    runs = [*comparison.runs("single-tasks"), *comparison.runs("compare")]
    content = {
        "title": comparison.title,
        "table": {row.name: {name: _plain(cell) for name, cell in row.cells.items()} for row in report.table.rows},
        "values": report.numbers,
        "notes": list(report.table.notes),
        "runs": [asdict(result) for run in runs if (result := load_result(run)) is not None],
        "missing": {run.label: load_failure(run) or "not run" for run in runs if load_result(run) is None},
    }
    write_json(paths[2], content)
    return report, paths


def make_report(comparison: Comparison) -> Report:
    """Return the report on the results that are there; see ``docs/compare.md`` for what each column is."""
    results = {name: _found(runs) for name, runs in comparison.methods.items()}
    baselines, notes = _baselines(comparison)
    numbers: dict[str, dict[str, dict[int, float]]] = {}
    if comparison.single_tasks:
        numbers[SINGLE_TASKS] = _numbers_alone(comparison, baselines["test"])
    for name, of_method in results.items():
        numbers[name] = _transposed({seed: _numbers(comparison, r, baselines) for seed, r in of_method.items()})
    ranked_seeds = _add_ranks(comparison, {name: numbers[name] for name in results})

    columns = _columns(comparison, baselines)
    rows = []
    for name, of_row in numbers.items():
        cells: dict[str, Interval | str] = {
            column: confidence_interval(list(of_seeds.values())) for column, of_seeds in of_row.items() if of_seeds
        }
        done = _seeds_done(comparison, name)
        cells["seeds"] = str(done) if done == len(comparison.seeds) else f"{done} of {len(comparison.seeds)}"
        rows.append(Row(name, {c.name: cells[c.name] for c in columns if c.name in cells}, name in results))
    notes += _notes(comparison, results, ranked_seeds)
    runs = [*comparison.runs("single-tasks"), *comparison.runs("compare")]
    complete = all(load_result(run) is not None for run in runs)
    return Report(ComparisonTable(comparison.title, columns, rows, notes), numbers, complete)


def _columns(comparison: Comparison, baselines: Mapping[str, Mapping[str, Baseline]]) -> list[Column]:
    columns = [Column(name, higher) for name, higher in comparison.metrics.items()]
    if baselines["test"]:
        columns.append(Column("delta m (%)", higher_is_better=True))
    columns.append(Column("mean rank", higher_is_better=False))
    if comparison.reference_point is not None:
        columns.append(Column("hypervolume", higher_is_better=True))
    return [*columns, *(Column(name) for name in _COSTS.values()), Column("seeds")]


def _found(runs: Sequence[Run]) -> dict[int, Result]:
    """Return the results that are there, by seed."""
    return {run.seed: result for run in runs if (result := load_result(run)) is not None}


def _numbers(
    comparison: Comparison, result: Result, baselines: Mapping[str, Mapping[str, Baseline]]
) -> dict[str, float]:
    """Return the columns of one run."""
    numbers: dict[str, float] = {}
    if comparison.member == "loss" or baselines["val"] or not result.population:
        member = select_member(comparison, result, baselines["val"])
        numbers = {name: metric_value(result, "test", name, member) for name in comparison.metrics}
        if baselines["test"]:
            numbers["delta m (%)"] = relative_improvement(numbers, baselines["test"], comparison.per)
    if comparison.reference_point is not None:
        numbers["hypervolume"] = _hypervolume(comparison, result.losses(result.test))
    return numbers | {column: float(result.cost[key]) for key, column in _COSTS.items()}


def select_member(comparison: Comparison, result: Result, baselines: Mapping[str, Baseline]) -> int:
    """Return the model of a population that stands for it where a column is of one model, chosen on validation.

    That is the one of the least mean loss over the tasks, or of the largest delta m; 0 for a single model. Models whose
    values are not finite are passed over.

    Args:
        comparison: The comparison, whose ``member`` says which of the two.
        result: The result of a run.
        baselines: The baselines of the validation metrics.
    """
    size = len(next(iter(result.validation.values())))
    if size == 1:
        return 0
    if comparison.member == "loss":
        costs = result.losses(result.validation).mean(dim=1)
    else:
        gains = [
            relative_improvement(
                {name: metric_value(result, "val", name, member) for name in comparison.metrics},
                baselines,
                comparison.per,
            )
            for member in range(size)
        ]
        costs = -torch.tensor(gains, dtype=torch.float64)
    return int(torch.where(costs.isfinite(), costs, torch.inf).argmin())


def _hypervolume(comparison: Comparison, losses: torch.Tensor) -> float:
    assert comparison.reference_point is not None
    if losses.shape[1] != len(comparison.reference_point):
        raise ValueError(
            f"`reference_point` should hold {losses.shape[1]} numbers, one per task. "
            f"Found {len(comparison.reference_point)}."
        )
    return hypervolume(losses[losses.isfinite().all(dim=1)], comparison.reference_point)


def _numbers_alone(comparison: Comparison, baselines: Mapping[str, Baseline]) -> dict[str, dict[int, float]]:
    """Return the columns of the tasks alone, for the seeds for which all of them are there."""
    by_task = {task: _found(runs) for task, runs in comparison.single_tasks.items()}
    numbers = {}
    for seed in comparison.seeds:
        if not all(seed in of_task for of_task in by_task.values()):
            continue
        results = {task: of_task[seed] for task, of_task in by_task.items()}
        values = {name: metric_value(results[name.rsplit("/", 1)[1]], "test", name) for name in comparison.metrics}
        numbers[seed] = dict(values)
        if baselines:
            numbers[seed]["delta m (%)"] = relative_improvement(values, baselines, comparison.per)
        if comparison.reference_point is not None:
            point = torch.tensor([[r.test[f"loss/{task}"][0] for task, r in results.items()]], dtype=torch.float64)
            numbers[seed]["hypervolume"] = _hypervolume(comparison, point)
        for key, column in _COSTS.items():
            costs = [float(result.cost[key]) for result in results.values()]
            # One network after another: their costs add up, their memory does not.
            numbers[seed][column] = max(costs) if key == "peak_memory_mib" else sum(costs)
    return _transposed(numbers)


def check_baselines(comparison: Comparison) -> None:
    """See that files of baselines hold what the tables need, before anything is trained for them.

    Raises:
        OSError: If there is no such file.
        ValueError: If a metric is missing in them, or they disagree on whether more of it is better.
    """
    if comparison.baselines:
        _baselines(comparison)


def _baselines(comparison: Comparison) -> tuple[dict[str, dict[str, Baseline]], list[str]]:
    """Return the baselines of test and validation by metric, empty where there are none, and notes on them."""
    none: dict[str, dict[str, Baseline]] = {"test": {}, "val": {}}
    if comparison.single_tasks:
        missing = [run.label for run in comparison.runs("single-tasks") if load_result(run) is None]
        if missing:
            what = "no delta m" if comparison.member == "loss" else "no delta m, and no metrics of populations"
            return none, [f"There is {what}: of the baselines are missing {', '.join(missing)}."]
        for split, found in none.items():
            for name, seeds in baseline_values(comparison, split).items():
                found[name] = Baseline(confidence_interval(seeds).mean, comparison.metrics[name])
        number = len(comparison.seeds)
        return none, [f"The baselines of delta m are the means of each task alone over {number} seeds."]
    for path in comparison.baselines:
        for name, baseline in load_baselines(path).items():
            split = "val" if name.startswith("val_") else "test"
            none[split][name.removeprefix(f"{split}_")] = baseline
    for split, found in none.items():
        lacking = [name for name in comparison.metrics if name not in found]
        if comparison.baselines and lacking and (split == "test" or comparison.member == "delta_m"):
            raise ValueError(f"`baselines` should hold {split}_{lacking[0]}. Found no such metric in their files.")
        none[split] = {name: found[name] for name in comparison.metrics if name in found}
        for name, baseline in none[split].items():
            if baseline.higher_is_better != comparison.metrics[name]:
                raise ValueError(f"`metrics` and `baselines` should agree on whether higher is better for {name!r}.")
    files = ", ".join(str(path) for path in comparison.baselines)
    return none, [f"The baselines of delta m are those of {files}."] if files else []


def _add_ranks(comparison: Comparison, numbers: Mapping[str, dict[str, dict[int, float]]]) -> list[int]:
    """Add the mean ranks for the seeds that all methods with any result have in common; return these seeds."""
    metrics = list(comparison.metrics)
    present = [of_method for of_method in numbers.values() if metrics[0] in of_method]
    seeds = [seed for seed in comparison.seeds if all(seed in of_method[metrics[0]] for of_method in present)]
    if not present or not seeds:
        return []
    values = torch.tensor(
        [[[of_method[name][seed] for name in metrics] for of_method in present] for seed in seeds], dtype=torch.float64
    )
    ranks = mean_ranks(values, list(comparison.metrics.values()))
    for of_method, column in zip(present, ranks.unbind(dim=1), strict=True):
        of_method["mean rank"] = dict(zip(seeds, column.tolist(), strict=True))
    return seeds


def _notes(comparison: Comparison, results: Mapping[str, Mapping[int, Result]], ranked: Sequence[int]) -> list[str]:
    flat = [result for of_method in results.values() for result in of_method.values()]
    notes = [
        "Test values of the epoch that is best in validation: mean ± half width of the 95 % confidence interval over "
        "the seeds (Student's t). Bold is the best mean of a column, whether or not the difference is significant."
    ]
    if any(result.population for result in flat):
        rule = "the least mean loss over the tasks" if comparison.member == "loss" else "the largest delta m"
        notes.append(
            "Of a population, metrics, delta m and mean rank are those of the one model with "
            f"{rule} in validation; the hypervolume is that of all its models."
        )
    notes.append(
        "The mean rank is over the metrics, 1 is best"
        + ("." if len(ranked) == len(comparison.seeds) else f"; over the seeds that all methods have: {list(ranked)}.")
    )
    if comparison.reference_point is not None:
        point = ", ".join(f"{value:g}" for value in comparison.reference_point)
        notes.append(f"The hypervolume is that of the test losses up to the reference point ({point}).")
    notes.append(
        "Seconds are those in training batches, without data loading and validation. A gradient evaluation is a pass "
        "forward and backward of one network over one batch. Peak memory is that of CUDA, on a CPU the rise of the "
        "resident set over that before model and data were made."
    )
    if comparison.single_tasks:
        notes.append(
            f"Of {SINGLE_TASKS} seconds and gradient evaluations are sums over the tasks; they are not ranked, and "
            "never bold."
        )
    for run in [*comparison.runs("single-tasks"), *comparison.runs("compare")]:
        if load_result(run) is None:
            failure = load_failure(run)
            notes.append(f"No result: {run.label}" + (f", failed: {failure}" if failure else "."))
    kinds = {str(sorted(result.machine.items())) for result in flat}
    if len(kinds) > 1:
        devices = sorted({str(result.machine["device"]) for result in flat})
        versions = sorted({f"torch {r.machine['torch']}, lightning {r.machine['lightning']}" for r in flat})
        notes.append(f"Not all runs were made alike, so costs may not compare: {'; '.join(devices + versions)}.")
    return notes


def _seeds_done(comparison: Comparison, name: str) -> int:
    if name == SINGLE_TASKS:
        return min(len(_found(runs)) for runs in comparison.single_tasks.values())
    return len(_found(comparison.methods[name]))


def _transposed(numbers: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """Return column to seed to number, from seed to column to number."""
    columns: dict[str, dict[int, float]] = {}
    for seed, of_seed in numbers.items():
        for column, value in of_seed.items():
            if not (column == _COSTS["peak_memory_mib"] and math.isnan(value)):  # unknown on this system
                columns.setdefault(column, {})[seed] = value
    return columns


def _plain(cell: Interval | str) -> Any:
    return asdict(cell) if isinstance(cell, Interval) else cell
