"""The page of the results is that of the committed numbers, and what it calls a tie is one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.generate_results import (
    CURVES,
    INDEPENDENT,
    MT2O,
    PATH,
    PROBLEMS,
    Problem,
    at_equal_evaluations,
    configuration,
    direction,
    keep_curves,
    page,
    read,
    set_tables,
    single_tables,
    spread,
    standings,
    within_seeds,
)
from mtl_lightning.comparison import Interval

SEEDS = [0, 1, 2]
TASKS = ["Y1", "Y2"]


def _difference(one: float, other: float) -> float:
    return one - other


def _run(name: str, seed: int, losses: list[list[float]], validation: list[list[float]] | None = None) -> Any:
    """A run of models with the given losses, shape (models, tasks), which are their metrics, too."""

    def values(points: list[list[float]]) -> Any:
        columns = [[point[index] for point in points] for index in range(len(TASKS))]
        return {
            f"{metric}/{task}": column
            for metric in ("loss", "mean_absolute_error")
            for task, column in zip(TASKS, columns, strict=True)
        }

    return {
        "name": name,
        "seed": seed,
        "task_names": TASKS,
        "selected": {"epoch": 3},
        "validation": values(validation or losses),
        "test": values(losses),
        "cost": {"samples": 4600, "batches": 80, "optimizer_steps": 80},
    }


def _problem(
    errors: dict[str, float], sets: dict[str, list[list[float]]] | None = None, missing: dict[str, str] | None = None
) -> Problem:
    """``enb`` with made-up results: methods with this error in every task, and sets with these losses."""
    values: dict[str, Any] = {}
    runs = []
    for name, error in errors.items():
        seeds = [seed for seed in SEEDS if f"{name}, seed {seed}" not in (missing or {})]
        metrics = {f"mean_absolute_error/{task}": {str(seed): error + 0.01 * seed for seed in seeds} for task in TASKS}
        values[name] = metrics | {
            "delta m (%)": {str(seed): -error for seed in seeds},
            "hypervolume": {str(seed): (1 - error) ** 2 for seed in seeds},
            "gradient evaluations": {str(seed): 80.0 for seed in seeds},
            "processor seconds": {str(seed): 1.0 for seed in seeds},
            "peak memory (MiB)": {str(seed): 50.0 for seed in seeds},
        }
        runs += [_run(name, seed, (sets or {}).get(name, [[error, error]])) for seed in seeds]
    content = {
        "command": "python benchmarks/comparison.py --data DATA --problems enb",
        "machine": {"device": "2 CPU cores", "torch": "2.15.0"},
        "scale": "small",
        "title": "enb",
        "values": values,
        "runs": runs,
        "missing": missing or {},
    }
    return Problem("enb", content, {})


def _rows(text: str) -> list[str]:
    """The methods of the first table of a text, from top to bottom."""
    return [row.strip("*") for row in re.findall(r"^\| ([^|]+) \|", text.partition("\n\n")[0], re.MULTILINE)[1:]]


# The page


def test_the_page_is_that_of_the_committed_numbers() -> None:
    assert PATH.read_text(encoding="utf-8") == page(read()), "run `python docs/generate_results.py`"


def test_every_problem_is_on_the_page_with_its_command() -> None:
    text = PATH.read_text(encoding="utf-8")
    for name in PROBLEMS:
        assert f"`python benchmarks/comparison.py --data DATA --problems {name}`" in text


def test_a_problem_without_any_run_is_named_with_the_reason() -> None:
    failed = _problem({}, missing={"DWA, seed 0": "not run"})
    text = page([failed])
    assert "## enb" not in text
    assert "- enb (not run): `python benchmarks/comparison.py" in text


def test_every_method_of_every_result_is_in_a_table() -> None:
    for problem in (problem for problem in read() if problem.content["runs"]):
        (part,) = re.findall(rf"^## {re.escape(problem.name)}\n(.*?)(?=^## |\Z)", page([problem]), re.M | re.S)
        methods = configuration(problem.name, "small", "DATA", Path("runs"))["methods"]
        assert not [name for name in methods if f"| {name} |" not in part and f"| **{name}** |" not in part]


def test_results_of_another_scale_are_refused() -> None:
    problem = _problem({"equal weights": 0.2})
    with pytest.raises(ValueError, match=r"scale 'small'.*Found 'full' for enb"):
        page([Problem("enb", {**problem.content, "scale": "full"}, {})])


# Ranks and ties


def test_places_follow_the_mean_and_equal_means_share_one() -> None:
    values = {"a": {0: 2.0, 1: 4.0}, "b": {0: 3.0, 1: 3.0}, "c": {0: 9.0, 1: 9.0}, "d": {0: 1.0, 1: math.inf}}
    assert [(one.name, one.place) for one in standings(values, higher_is_better=False)] == [
        ("a", 1),
        ("b", 1),
        ("c", 3),
        ("d", 4),
    ]
    assert [one.name for one in standings(values, higher_is_better=True)] == ["c", "a", "b", "d"]


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_level_with_the_best_are_those_that_seeds_do_not_tell_apart(higher_is_better: bool) -> None:
    sign = 1 if higher_is_better else -1
    values = {
        "best": {0: 1.00, 1: 2.00, 2: 3.00},
        "near": {0: 0.90, 1: 2.05, 2: 2.95},
        "below": {0: 0.90, 1: 1.90, 2: 2.91},
        "broken": {0: 1.00, 1: 2.00, 2: sign * math.inf},
    }
    values = {name: {seed: sign * value for seed, value in seeds.items()} for name, seeds in values.items()}
    found = {one.name: one.level for one in standings(values, higher_is_better)}
    assert found == {"best": True, "near": True, "below": False, "broken": False}


def test_intervals_of_methods_that_are_level_overlap() -> None:
    """The deviation of a difference is at most the sum of the deviations."""
    generator = torch.Generator().manual_seed(0)
    level = 0
    for _ in range(200):
        drawn = torch.randn(2, 3, generator=generator, dtype=torch.float64) + torch.tensor([[2.0], [0.0]])
        first, second = standings({str(i): dict(enumerate(row)) for i, row in enumerate(drawn.tolist())}, True)
        level += second.level
        if second.level:
            widths = first.interval.half_width + second.interval.half_width
            assert first.interval.mean - second.interval.mean <= widths
    assert 0 < level < 200


def test_what_seeds_share_cancels_in_a_difference() -> None:
    split = {0: 10.0, 1: -20.0, 2: 30.0}
    method = {seed: value + 1.0 for seed, value in split.items()}
    difference = within_seeds(method, split, _difference)
    assert difference is not None
    assert (difference.mean, difference.half_width, direction(difference)) == (1.0, 0.0, 1)
    assert within_seeds({0: 1.0}, {1: 1.0}, _difference) is None


def test_a_difference_of_one_seed_is_a_tie() -> None:
    assert direction(within_seeds({0: 5.0}, {0: 1.0}, _difference)) == 0


def test_a_tie_is_an_interval_that_covers_zero() -> None:
    found = [direction(Interval(mean, 1.0, 3)) for mean in (1.01, 1.0, 0.0, -1.0, -1.01, math.nan)]
    assert found == [1, 0, 0, 0, -1, 0]


def test_digits_are_as_many_as_the_interval_needs() -> None:
    assert spread(Interval(0.9, 0.0, 3)) == "0.900 ± 0.000"
    assert spread(Interval(0.90512, 0.00042, 3)) == "0.9051 ± 0.0004"
    assert spread(Interval(1234.5, 67.8, 3)) == "1234 ± 68"
    assert spread(Interval(-1e-15, 1.0, 3), 1) == "0.0 ± 1.0"
    assert spread(Interval(0.5, math.nan, 1)) == "0.500"
    assert spread(Interval(math.nan, math.nan, 3)) == "not finite"


# Equal evaluations


def test_at_equal_evaluations_the_cheaper_one_counts_whole() -> None:
    cheap, dear = [0.2, 0.6], [0.1, 0.2, 0.3, 0.9]
    assert at_equal_evaluations(cheap, 100, dear, 400) == pytest.approx(0.6 / 0.1)
    assert at_equal_evaluations(dear, 400, cheap, 200) == pytest.approx(0.2 / 0.6)


def test_an_epoch_that_is_not_whole_counts_for_the_other_only() -> None:
    assert at_equal_evaluations([0.4], 150, [0.1, 0.2, 0.3, 0.9], 400) == pytest.approx(0.4 / 0.2)
    assert at_equal_evaluations([0.4, 0.5], 400, [0.2], 300) == pytest.approx(0.4 / 0.2)
    assert at_equal_evaluations([0.4], 400, [0.2], 300) is None


def test_no_ratio_to_a_volume_of_zero() -> None:
    assert at_equal_evaluations([0.4], 100, [0.0], 100) is None


def test_curves_are_read_from_the_runs(tmp_path: Path) -> None:
    problem = _problem(dict.fromkeys(("equal weights", MT2O, INDEPENDENT), 0.2))
    for method, volumes in ((MT2O, (0.1, 0.5)), (INDEPENDENT, (0.2, 0.25))):
        folder = tmp_path / "enb" / method / "seed_1" / "pareto_front"
        folder.mkdir(parents=True)
        lines = ["epoch,step,hypervolume", *(f"{epoch},8,{volume}" for epoch, volume in enumerate(volumes))]
        (folder / "hypervolume.csv").write_text("\n".join(lines) + "\n")
    keep_curves(tmp_path, [problem], tmp_path / "curves.json")
    kept = json.loads((tmp_path / "curves.json").read_text())["enb"]
    assert kept[MT2O] == {"1": [0.1, 0.5]}
    assert kept[INDEPENDENT] == {"1": [0.2, 0.25]}


def test_the_committed_curves_are_of_sets_and_end_with_their_runs() -> None:
    problems = [problem for problem in read() if problem.curves]
    assert bool(problems) == CURVES.exists()
    for problem in problems:
        epochs = problem.configuration["trainer"]["max_epochs"]
        lengths = {len(curve) for seeds in problem.curves.values() for curve in seeds.values()}
        assert lengths <= {epochs}
        assert set(problem.curves) == set(problem.sets)


# Tables


def test_single_networks_are_sorted_by_rank_with_the_losing_ones() -> None:
    text = single_tables(_problem({"equal weights": 0.3, "DWA": 0.1, "PCGrad": 0.2, "single tasks": 0.05}))
    assert _rows(text)[:3] == ["DWA", "PCGrad", "equal weights"]
    assert _rows(text)[-1] == "single tasks"
    assert "| DWA | 0.110 ± 0.025 | 0.110 ± 0.025 | -0.1 ± 0.0 | 1.0 ± 0.0 | 80 | 1.00 | 50 |" in text


def test_a_method_without_a_result_is_listed_with_its_reason() -> None:
    missing = {f"DWA, seed {seed}": "RuntimeError: out of\nmemory" for seed in SEEDS}
    text = single_tables(_problem({"equal weights": 0.3, "DWA": 0.1, "PCGrad": 0.2}, missing=missing))
    (line,) = re.findall(r"^\| DWA \|.*", text, re.MULTILINE)
    assert "no result (seed 0: RuntimeError: out of memory; seed 1:" in line


def test_a_method_without_all_seeds_is_not_ranked() -> None:
    problem = _problem({"equal weights": 0.3, "DWA": 0.1, "PCGrad": 0.2}, missing={"DWA, seed 2": "not run"})
    text = single_tables(problem)
    assert list(problem.ranks) == ["equal weights", "PCGrad"]
    assert "DWA has 2 of 3 seeds (seed 2: not run)" in text
    assert _rows(text).index("DWA") > _rows(text).index("equal weights")


def test_sets_are_sorted_by_hypervolume_above_what_they_have_to_beat() -> None:
    errors = {"equal weights": 0.3, "DWA": 0.1, "single tasks": 0.4, MT2O: 0.15, INDEPENDENT: 0.05}
    assert _rows(set_tables(_problem(errors)))[:2] == [INDEPENDENT, MT2O]
    assert _rows(set_tables(_problem(errors)))[-2:] == ["one point: DWA", "one point: single tasks"]


def test_the_best_model_for_a_task_is_chosen_on_validation() -> None:
    problem = _problem({"equal weights": 0.3})
    test, validation = [[0.1, 0.9], [0.2, 0.3]], [[0.6, 0.1], [0.5, 0.2]]
    problem.content["runs"].append(_run(MT2O, 0, test, validation))
    assert problem.members(MT2O) == {"mean_absolute_error/Y1": {0: 0.2}, "mean_absolute_error/Y2": {0: 0.9}}


def test_the_non_dominated_are_counted_in_the_test_losses() -> None:
    points = [[0.1, 0.9], [0.9, 0.1], [0.95, 0.2], [math.nan, 0.0]]
    problem = _problem({"equal weights": 0.3, MT2O: 0.2}, {MT2O: points})
    assert problem.nondominated(MT2O) == "2 of 4"


def test_what_numbers_say_names_the_loser() -> None:
    errors = {"equal weights": 0.2, "task groups": 0.4, "DWA": 0.1, MT2O: 0.3, INDEPENDENT: 0.2, "single tasks": 0.3}
    text = page([_problem(errors)])
    assert "Best mean rank of 3 methods with one network: DWA, 1.0 ± 0.0 (level: no other)." in text
    assert "Task groups are number 3 (3.0 ± 0.0, behind)." in text
    assert "MT2O is number 2 (0.490 ± 0.000, behind)." in text
    assert "below that of independent runs" in text
    assert "The one point of DWA has 0.810 ± 0.000, more than MT2O's set." in text
