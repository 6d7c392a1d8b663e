from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lightning.report import find_run, read_run

NAMES = ("depth&amp;<b>", "<!--<script>alert(1)", '"quoted\\${x}')


def _write(path: Path, *rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def test_the_front_is_the_archive_of_the_callback(trained: tuple[Path, list[Any]]) -> None:
    folder, (archive, volume) = trained
    run = read_run(folder)
    (front,) = run.fronts
    assert front.name == "pareto_front"
    assert front.preference_names == NAMES
    assert front.objectives == dict.fromkeys(NAMES, "min")
    assert len(front.models) == 30
    for model, row in zip(front.models, archive.archive, strict=True):
        assert (model.epoch, model.step, model.subproblem) == (row["epoch"], row["step"], row["subproblem"])
        assert model.preference == tuple(row[f"preference/{name}"] for name in NAMES)
        assert model.objectives == tuple(row[name] for name in NAMES)
        assert model.nondominated == row["nondominated"]
    (curve,) = run.curves
    assert curve.steps == (3, 6, 9)
    assert list(curve.latest) == [row["hypervolume"] for row in volume.curve]
    assert curve.reference_point == dict.fromkeys(NAMES, 4.0)


def test_one_validation_has_one_step_in_front_curve_metrics_and_checkpoints(
    trained: tuple[Path, list[Any]], single: Path
) -> None:
    run = read_run(trained[0])
    assert {model.step for model in run.fronts[0].models} == {3, 6, 9}
    assert run.curves[0].steps == (3, 6, 9)
    for name in ("val_loss", "hypervolume"):
        assert [step for step, _ in run.metrics[name]] == [3, 6, 9]
    run = read_run(single)
    assert [model.step for model in run.fronts[0].models] == [3, 6, 9]
    assert [step for step, _ in run.metrics["val_loss"]] == [3, 6, 9]
    assert {one.step for one in run.checkpoints} == {3, 6, 9}


def test_the_step_in_loggers_is_no_metric_and_tables_without_it_are_read(
    trained: tuple[Path, list[Any]], copied: Callable[[Path], Path]
) -> None:
    folder = copied(trained[0])
    expected = read_run(folder)
    assert "logged_step" not in expected.fronts[0].metric_names
    for name in ("archive", "hypervolume"):  # as releases before have written them
        path = folder / "pareto_front" / f"{name}.csv"
        with path.open(newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
        place = columns.index("logged_step")
        _write(path, *([*row[:place], *row[place + 1 :]] for row in (columns, *rows)))
    run = read_run(folder)
    assert (run.fronts, run.curves) == (expected.fronts, expected.curves)


def test_metrics_of_each_model_are_read(configured: Path) -> None:
    (front,) = read_run(configured).fronts
    assert front.metric_names == ("accuracy/left", "accuracy/right")
    assert all(0 <= value <= 1 for model in front.models for value in model.metrics)


def test_checkpoints_tell_when_they_were_written(configured: Path, single: Path) -> None:
    run = read_run(configured)
    assert {(one.path, one.epoch, one.step) for one in run.checkpoints} >= {("checkpoints/last.ckpt", 2, 12)}
    found = {one.path: (one.epoch, one.step, one.module) for one in read_run(single).checkpoints}
    assert found == {
        "checkpoints/last.ckpt": (2, 9, "WeightedModule"),
        **{f"checkpoints/step={step}.ckpt": (step // 3 - 1, step, "WeightedModule") for step in (3, 6, 9)},
    }


def test_the_configuration_is_summarised(configured: Path) -> None:
    run = read_run(configured)
    assert run.has_config
    assert run.facts["Module"] == "mtl_lightning.modules.MT2OModule"
    assert run.facts["Data"] == "mtl_lightning.datamodules.MultiDigitsDataModule"
    assert (run.facts["Seed"], run.facts["Epochs at most"]) == ("0", "3")


def test_affinity_groups_and_cost_are_those_of_the_callbacks(grouped: tuple[Path, list[Any]]) -> None:
    folder, (affinity, groups, cost) = grouped
    run = read_run(folder)
    (read,) = run.affinities
    assert read.task_names == NAMES
    assert read.batches == tuple(range(1, 10))
    torch.testing.assert_close(
        torch.tensor(read.matrices[-1], dtype=torch.float64), affinity.matrix, rtol=0, atol=0, equal_nan=True
    )
    assert run.timeline is not None
    assert run.timeline.task_names == NAMES
    rebuilt = [
        (
            first,
            last,
            {frozenset(name for name, one in zip(NAMES, labels, strict=True) if one == label) for label in labels},
        )
        for first, last, labels in run.timeline.stretches
    ]
    assert rebuilt == [(first, last, set(map(frozenset, found))) for first, last, found in groups.timeline]
    assert [list(row) for row in run.timeline.together] == groups.together.tolist()
    assert run.costs[-1]["forwards"] == cost.totals.forwards
    assert run.costs[-1]["seconds"] == cost.totals.seconds
    assert run.metrics[f"val_loss/{NAMES[0]}"][-1][0] == 9  # in the file from 0


def test_what_is_missing_is_named_with_its_writer(grouped: tuple[Path, list[Any]], configured: Path) -> None:
    heads = [text.partition(":")[0] for text in read_run(grouped[0]).missing]
    assert heads == ["Pareto front", "Hypervolume", "Configuration"]
    missing = read_run(configured).missing
    assert [text.partition(":")[0] for text in missing] == ["Affinity", "Task groups", "Cost"]
    assert all("Callback" in text for text in missing)


def test_a_front_without_its_directions_is_not_guessed(configured: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(configured)
    (folder / "pareto_front" / "objectives.json").unlink()
    run = read_run(folder)
    assert run.fronts == ()
    assert "objectives.json" in run.missing[0]
    assert len(run.curves) == 1


def test_a_broken_or_dangerous_checkpoint_is_reported_and_nothing_is_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "run",))

    torch.save({"epoch": 0, "global_step": 1, "state_dict": {}}, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "shards.ckpt").mkdir()
    torch.save({"epoch": 0, "global_step": 1, "state_dict": {"bomb": Bomb()}}, tmp_path / "bomb.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    found = {one.path: one for one in read_run(tmp_path).checkpoints}
    assert found.pop("whole.ckpt").problem == ""
    assert len(found) == 5
    for checkpoint in found.values():
        assert checkpoint.problem.startswith("It ")
        assert checkpoint.problem.endswith(".")
        assert "\n" not in checkpoint.problem
        assert checkpoint.step is None
    assert not (tmp_path / "run").exists()


def test_a_group_keeps_its_label_while_it_keeps_its_tasks(tmp_path: Path) -> None:
    _write(
        tmp_path / "task_groups" / "timeline.csv",
        ["from_batch", "to_batch", "groups"],
        [0, 4, '[["a", "b"], ["c"]]'],
        [5, 5, '[["c"], ["b", "a"]]'],
        [6, 8, '[["c", "a", "b"]]'],
        [9, 9, '[["b"]]'],
    )
    timeline = read_run(tmp_path).timeline
    assert timeline is not None
    assert timeline.task_names == ("a", "b", "c")
    first, second, third, fourth = (labels for _, _, labels in timeline.stretches)
    assert first == second == (first[0], first[0], first[2])
    assert first[0] != first[2]
    assert third == (first[0],) * 3
    assert fourth == (-1, first[0], -1)


def test_callbacks_with_names_and_folders_of_their_own_are_found(tmp_path: Path) -> None:
    _write(tmp_path / "late" / "late.csv", ["epoch", "batch", "from", "to", "value"], [0, 1, "a", "b", 0.5])
    _write(tmp_path / "x" / "a-b.csv", ["epoch", "step", "a/b", "a/b/archive"], [0, 1, 2.0, 3.0])
    _write(tmp_path / "x" / "other.csv", ["epoch", "anything"], [0, 1])
    run = read_run(tmp_path)
    assert [affinity.name for affinity in run.affinities] == ["late"]
    assert run.affinities[0].matrices[0][0][1] == 0.5
    assert math.isnan(run.affinities[0].matrices[0][1][0])
    assert [(curve.name, curve.latest, curve.reference_point) for curve in run.curves] == [("a/b", (2.0,), {})]


def test_the_newest_version_is_taken(tmp_path: Path, single: Path) -> None:
    for name in ("version_9", "version_10"):
        shutil.copytree(single, tmp_path / name)
    (tmp_path / "version_11").mkdir()
    _write(tmp_path / "version_12" / "notes.csv", ["a"], [1])
    assert find_run(tmp_path) == tmp_path / "version_10"
    assert find_run(tmp_path / "version_9") == tmp_path / "version_9"
    assert find_run(tmp_path / "version_9" / ".." / "version_10") == tmp_path / "version_10"


def test_the_metrics_of_the_newest_logger_are_taken(tmp_path: Path) -> None:
    for version in (2, 10):
        _write(tmp_path / "logs" / f"version_{version}" / "metrics.csv", ["epoch", "step", "x"], [0, 1, version])
    assert read_run(tmp_path).metrics == {"x": ((2, 10.0),)}


@pytest.mark.parametrize("kind", ["nothing", "folder", "neighbours"])
def test_a_folder_without_a_run_is_refused(kind: str, tmp_path: Path, single: Path) -> None:
    if kind == "nothing":
        with pytest.raises(FileNotFoundError, match=r"should be a folder of a run at .* Found none"):
            find_run(tmp_path / "nope")
        return
    if kind == "neighbours":
        shutil.copytree(single, tmp_path / "first" / "version_0")
    with pytest.raises(ValueError, match=r"should be the folder of a run.* Found") as error:
        find_run(tmp_path)
    assert ("'first'" if kind == "neighbours" else "nothing in it") in str(error.value)


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        (
            "late/late.csv",
            [["epoch", "batch", "from", "to", "value"], [0, 1, "a", "b", "x"]],
            "numbers in column 'value'",
        ),
        (
            "late/late.csv",
            [["epoch", "batch", "from", "to", "value"], [0, 1.5, "a", "b", 1]],
            "integers in column 'batch'",
        ),
        ("late/late.csv", [["epoch", "batch", "from", "to", "value"], [0, 1, "a"]], "5 entries in each row"),
        ("t/timeline.csv", [["from_batch", "to_batch", "groups"], [0, 1, "[["]], "groups as JSON"),
        ("t/timeline.csv", [["from_batch", "to_batch", "groups"], [0, 1, '[["a", "a"]]']], "once at most"),
    ],
)
def test_a_table_that_is_not_as_it_should_be_is_named(
    name: str, rows: list[list[Any]], expected: str, tmp_path: Path
) -> None:
    path = _write(tmp_path / name, *rows)
    with pytest.raises(ValueError, match="should") as error:
        read_run(tmp_path)
    assert str(path) in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
