from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mtl_lightning.commands.configuration import Comparison, Run, load_comparison
from mtl_lightning.commands.report import make_report, write_report
from mtl_lightning.commands.results import Result, save_failure, save_result
from mtl_lightning.comparison import Interval
from mtl_lightning.metrics import save_baselines
from tests.commands.cases import FRONT, JOINT, write

SEEDS = (0, 1, 2)
REFERENCE = (3.0, 3.0)


def _save(run: Run, validation: Any, test: Any, accuracy: Any, preferences: Any = (), **machine: Any) -> None:
    """Write a result with the losses ``(P, 2)`` and the accuracies of the left task, ``(P,)``, in both splits."""

    def values(losses: Any) -> dict[str, list[float]]:
        losses = np.asarray(losses, dtype=float)
        return {
            "loss/left": losses[:, 0].tolist(),
            "loss/right": losses[:, 1].tolist(),
            "accuracy/left": list(accuracy),
        }

    costs = {"seconds": 1.0 + run.seed, "cpu_seconds": 2.0, "gradient_evaluations": 100, "peak_memory_mib": math.nan}
    result = Result(
        digest=run.digest,
        name=run.name,
        seed=run.seed,
        population=bool(preferences),
        task_names=["left", "right"],
        preferences=list(preferences),
        selected={"monitor": "val_loss", "mode": "min", "value": 0.5, "epoch": 3},
        validation=values(validation),
        test=values(test),
        cost=costs,
        machine={"device": "cpu", "torch": "2", "lightning": "2", **machine},
    )
    save_result(run, result)


def _comparison(folder: Path, **changes: Any) -> Comparison:
    changes = {"seeds": list(SEEDS), "methods": {"a": JOINT, "b": JOINT, "front": FRONT}, **changes}
    return load_comparison(write(folder, **changes))


def _baselines(folder: Path, **values: float) -> str:
    path = folder / "baselines.json"
    names = {"test_accuracy/left": 0.5, "test_loss/right": 1.0, **values}
    save_baselines(path, names, {name: "accuracy" in name for name in names})
    return str(path)


def _cell(comparison: Comparison, method: str, column: str) -> Interval:
    row = next(row for row in make_report(comparison).table.rows if row.name == method)
    cell = row.cells[column]
    assert isinstance(cell, Interval)
    return cell


@pytest.fixture
def filled(tmp_path: Path) -> Comparison:
    """A comparison of which every run has a result of random numbers."""
    comparison = _comparison(tmp_path, baselines=_baselines(tmp_path))
    generator = np.random.default_rng(0)
    for name, runs in comparison.methods.items():
        for run in runs:
            size = 3 if name == "front" else 1
            losses = generator.uniform(0.5, 2.5, (2, size, 2))
            preferences = [[1.0, 0.0]] * size if size > 1 else []
            _save(run, losses[0], losses[1], generator.uniform(0, 1, size), preferences)
    return comparison


def test_each_cell_is_what_the_results_say(filled: Comparison) -> None:
    contents = {
        (run.name, run.seed): json.loads((run.folder / "result.json").read_text()) for run in filled.runs("compare")
    }
    values: dict[tuple[str, int], list[float]] = {}
    volumes: dict[tuple[str, int], float] = {}
    for key, content in contents.items():
        validation = np.array([content["validation"][f"loss/{name}"] for name in ("left", "right")])
        test = np.array([content["test"][f"loss/{name}"] for name in ("left", "right")])
        member = int(validation.mean(axis=0).argmin())
        values[key] = [content["test"]["accuracy/left"][member], test[1, member]]
        # The area below the reference that the points dominate, by a staircase from left to right.
        height, area = REFERENCE[1], 0.0
        for left, right in sorted(zip(*test, strict=True)):
            if right < height:
                area += (REFERENCE[0] - left) * (height - right)
                height = right
        volumes[key] = area
    for method in ("a", "b", "front"):
        accuracies = [values[method, seed][0] for seed in SEEDS]
        low, high = stats.t.interval(0.95, 2, loc=np.mean(accuracies), scale=stats.sem(accuracies))
        cell = _cell(filled, method, "accuracy/left")
        assert cell.mean - cell.half_width == pytest.approx(low)
        assert cell.mean + cell.half_width == pytest.approx(high)
        gains = [50 * ((values[method, seed][0] - 0.5) / 0.5 - (values[method, seed][1] - 1.0)) for seed in SEEDS]
        assert _cell(filled, method, "delta m (%)").mean == pytest.approx(np.mean(gains))
        ranks = [
            np.mean(
                [
                    1 + sum(values[other, seed][0] > values[method, seed][0] for other in ("a", "b", "front")),
                    1 + sum(values[other, seed][1] < values[method, seed][1] for other in ("a", "b", "front")),
                ]
            )
            for seed in SEEDS
        ]
        assert _cell(filled, method, "mean rank").mean == pytest.approx(np.mean(ranks))
        found = _cell(filled, method, "hypervolume")
        assert found.mean == pytest.approx(np.mean([volumes[method, seed] for seed in SEEDS]))
        assert _cell(filled, method, "seconds").mean == 2.0


def test_the_rows_keep_the_order_of_the_configuration_and_none_is_left_out(filled: Comparison) -> None:
    report = make_report(filled)
    assert [row.name for row in report.table.rows] == ["a", "b", "front"]
    assert report.complete
    assert "peak memory (MiB)" not in report.table.rows[0].cells  # unknown in these results


def test_the_files_hold_the_table_and_all_numbers(filled: Comparison) -> None:
    report, (markdown, page, numbers) = write_report(filled)
    assert markdown.read_text() == report.table.markdown() + "\n"
    assert page.read_text() == report.table.html()
    content = json.loads(numbers.read_text())
    assert len(content["runs"]) == 9
    assert content["missing"] == {}
    means = {method: np.mean(list(of_seeds["hypervolume"].values())) for method, of_seeds in content["values"].items()}
    for method, mean in means.items():
        assert content["table"][method]["hypervolume"]["mean"] == pytest.approx(mean)


def test_the_model_of_a_population_is_chosen_on_validation(tmp_path: Path) -> None:
    """In the test the second model is better; in validation the first has the least mean loss, the third delta m."""
    validation = [[1.0, 1.0], [1.5, 1.5], [1.9, 0.4]]
    test, accuracy, preferences = [[2.0, 2.0], [0.5, 0.5], [1.0, 1.0]], [0.5, 0.9, 0.5], [[1.0, 0.0]] * 3
    methods = {"front": FRONT}
    for member, expected in (("loss", 2.0), ("delta_m", 1.0)):
        baselines = _baselines(tmp_path, **{"val_accuracy/left": 0.9, "val_loss/right": 0.1})
        comparison = _comparison(tmp_path, seeds=[0], methods=methods, member=member, baselines=baselines)
        _save(
            comparison.methods["front"][0], validation, test, accuracy if member == "loss" else [0.5] * 3, preferences
        )
        assert _cell(comparison, "front", "loss/right").mean == expected
        # The volume is that of all three, not of the one.
        assert _cell(comparison, "front", "hypervolume").mean == 2.5 * 2.5


def test_a_model_that_has_failed_is_neither_chosen_nor_in_the_volume(tmp_path: Path) -> None:
    comparison = _comparison(tmp_path, seeds=[0], methods={"front": FRONT})
    losses = [[math.nan, math.nan], [1.0, 1.0]]
    _save(comparison.methods["front"][0], losses, losses, [0.1, 0.6], [[1.0, 0.0]] * 2)
    assert _cell(comparison, "front", "accuracy/left").mean == 0.6
    assert _cell(comparison, "front", "hypervolume").mean == 4.0


def test_a_run_without_a_result_is_named_and_ranks_are_those_of_the_common_seeds(tmp_path: Path) -> None:
    comparison = _comparison(tmp_path, methods={"a": JOINT, "b": JOINT, "c": JOINT})
    for name in ("a", "b"):
        for run in comparison.methods[name]:
            if (name, run.seed) != ("b", 1):
                better = (run.seed == 1) == (name == "b")
                _save(run, [[1.0, 1.0]], [[1.0, 1.0 if better else 2.0]], [0.9 if better else 0.1])
    save_failure(comparison.methods["b"][1], "out of memory")
    report = make_report(comparison)
    assert not report.complete
    seeds = {row.name: row.cells["seeds"] for row in report.table.rows}
    assert seeds == {"a": "3", "b": "2 of 3", "c": "0 of 3"}
    assert report.numbers["a"]["mean rank"] == {0: 1.0, 2: 1.0}
    assert report.numbers["b"]["mean rank"] == {0: 2.0, 2: 2.0}
    notes = "\n".join(report.table.notes)
    assert "No result: b, seed 1, failed: out of memory" in notes
    assert "No result: c, seed 2." in notes
    assert "over the seeds that all methods have: [0, 2]" in notes


def test_tasks_alone_are_a_row_and_the_baselines(tmp_path: Path) -> None:
    comparison = _comparison(tmp_path, methods={"a": JOINT}, single_tasks=True)
    for run in comparison.methods["a"]:
        _save(run, [[1.0, 1.0]], [[1.0, 1.1]], [0.6])
    for task, runs in comparison.single_tasks.items():
        for run in runs:
            left, right = (0.5, 9.0) if task == "left" else (9.0, 0.8 + 0.2 * run.seed)
            _save(run, [[left, right]], [[left, right]], [0.4 + 0.1 * run.seed])
    assert _cell(comparison, "a", "delta m (%)").mean == pytest.approx(50 * (0.1 / 0.5 - 0.1 / 1.0))
    assert _cell(comparison, "single tasks", "delta m (%)").mean == pytest.approx(0.0, abs=1e-12)
    assert _cell(comparison, "single tasks", "loss/right").mean == pytest.approx(1.0)
    volume = 2.5 * np.mean([3.0 - 0.8, 3.0 - 1.0, 3.0 - 1.2])
    assert _cell(comparison, "single tasks", "hypervolume").mean == pytest.approx(volume)
    assert _cell(comparison, "single tasks", "gradient evaluations").mean == 200
    table = make_report(comparison).table
    assert table.best(table.columns[0]) == set()  # of one method that is compared
    (comparison.single_tasks["right"][2].folder / "result.json").unlink()
    table = make_report(comparison).table
    assert "delta m (%)" not in {column.name for column in table.columns}
    assert any("missing right alone, seed 2" in note for note in table.notes)


def test_a_population_waits_for_the_baselines_that_choose_its_model(tmp_path: Path) -> None:
    """The rest of the table is there: other methods, hypervolume and costs."""
    comparison = _comparison(
        tmp_path, methods={"a": JOINT, "front": FRONT}, seeds=[0], single_tasks=True, member="delta_m"
    )
    _save(comparison.methods["a"][0], [[1.0, 1.0]], [[1.0, 1.0]], [0.5])
    _save(comparison.methods["front"][0], [[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2, [0.5] * 2, [[1.0, 0.0], [0.0, 1.0]])
    report = make_report(comparison)
    assert set(report.numbers["front"]) == {"hypervolume", "seconds", "processor seconds", "gradient evaluations"}
    assert report.numbers["front"]["hypervolume"][0] == pytest.approx(2.0)
    assert report.numbers["a"]["accuracy/left"] == {0: 0.5}
    assert report.numbers["a"]["mean rank"] == {0: 1.0}
    assert any("missing left alone, seed 0" in note and "populations" in note for note in report.table.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"miou/left": True}}, r"`metrics` should name values that 'a' logs .* Found 'miou/left'"),
        ({"reference_point": [1.0, 1.0, 1.0]}, r"should hold 2 numbers, one per task. Found 3"),
    ],
)
def test_what_does_not_fit_the_results_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    comparison = _comparison(tmp_path, methods={"a": JOINT}, seeds=[0], **changes)
    _save(comparison.methods["a"][0], [[1.0, 1.0]], [[1.0, 1.0]], [0.5])
    with pytest.raises(ValueError, match=message):
        make_report(comparison)


def test_baselines_have_to_fit_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    save_baselines(path, {"test_loss/right": 1.0}, {"test_loss/right": False})
    with pytest.raises(ValueError, match="should hold test_accuracy/left"):
        make_report(_comparison(tmp_path, baselines=str(path)))
    values = {"test_loss/right": 1.0, "accuracy/left": 0.5}
    save_baselines(path, values, dict.fromkeys(values, True))
    with pytest.raises(ValueError, match="agree on whether higher is better for 'loss/right'"):
        make_report(_comparison(tmp_path, baselines=str(path)))


def test_runs_on_different_machines_are_noted(tmp_path: Path) -> None:
    comparison = _comparison(tmp_path, methods={"a": JOINT}, seeds=[0, 1])
    for run, device in zip(comparison.methods["a"], ("cpu", "cuda H200"), strict=True):
        _save(run, [[1.0, 1.0]], [[1.0, 1.0]], [0.5], device=device)
    assert any("cpu; cuda H200" in note for note in make_report(comparison).table.notes)
