from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtl_lightning.commands.compare import CLAIMED, compare, single_tasks
from mtl_lightning.commands.configuration import load_comparison
from mtl_lightning.commands.parsing import FitConfiguration
from mtl_lightning.commands.results import load_failure, load_result
from mtl_lightning.commands.training import complete
from mtl_lightning.metrics import load_baselines, save_baselines
from tests.commands.cases import FRONT, JOINT, content, write

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "configs" / "compare_multi_digits.yaml"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration; processes that are started find the classes of these tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return str(write(tmp_path))


def _error(arguments: list[str], command: Any = compare) -> str:
    with pytest.raises(SystemExit, match=r"^mtl-lightning: error: ") as stop:
        command(arguments)
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


def test_the_shipped_comparison_runs_job_by_job_and_ends_in_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())
    small["trainer"] |= {"max_epochs": 1, "accelerator": "cpu"}
    small["data"]["init_args"] = {"batch_size": 64, "num_train": 128, "num_val": 64, "num_test": 64}
    small["seeds"] = [0]
    Path("small.yaml").write_text(yaml.safe_dump(small, sort_keys=False))
    compare(["--config=small.yaml", "--list"])
    jobs = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(jobs) == 2 + 3
    for _, command, *arguments in jobs:
        {"compare": compare, "single-tasks": single_tasks}[command](arguments)
    compare(["--config=small.yaml"])
    output = capsys.readouterr().out
    assert output.count("done before") == 5
    folder = tmp_path / "runs" / "compare_multi_digits"
    table = (folder / "comparison.md").read_text()
    assert table in output
    lines = table.splitlines()
    assert [line.split(" | ")[0] for line in lines[4:8]] == [
        "| single tasks",
        "| equal weights",
        "| uncertainty",
        "| MT2O",
    ]
    numbers = json.loads((folder / "comparison.json").read_text())["values"]
    # One epoch of two batches: one network, one for each task, five subproblems.
    assert {name: of_row["gradient evaluations"]["0"] for name, of_row in numbers.items()} == {
        "single tasks": 4,
        "equal weights": 2,
        "uncertainty": 2,
        "MT2O": 10,
    }
    assert (folder / "comparison.html").read_text().startswith("<!DOCTYPE html>")
    assert set(load_baselines(folder / "single_tasks" / "baselines_val.json")) == {
        "val_accuracy/left",
        "val_accuracy/right",
    }


def _kill_after_an_epoch(arguments: list[str], folder: Path) -> None:
    """Start a run that is held after its first epoch, and kill it there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mtl_lightning.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "HOLD": "1"},
    )
    try:
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_killed_comparison_goes_on_where_it_was_and_after_a_run_that_fails(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    front = {"model": {**FRONT["model"], "class_path": "tests.commands.cases.Held"}}
    methods = {"failing": {"model": {"class_path": "tests.commands.cases.Failing"}}, "front": front}
    changes = {"methods": methods, "trainer": {"max_epochs": 3, "accelerator": "cpu", "devices": 1}}
    write(tmp_path, **changes)
    run = load_comparison(path).methods["front"][0]
    _kill_after_an_epoch(["compare", f"--config={path}", "--only=front", "--seed=0"], run.folder)
    assert load_result(run) is None
    assert not (run.folder / "trained.json").exists()

    error = _error([f"--config={path}"])
    assert error.endswith("no result of failing, seed 0")
    output = capsys.readouterr().out
    assert "[1/2] failing, seed 0: failed, ValueError: this method cannot be trained; see " in output
    assert "[2/2] front, seed 0: hypervolume " in output
    assert "- No result: failing, seed 0, failed: ValueError: this method cannot be trained" in output
    log = (tmp_path / "runs" / "logs" / "compare.front.0.log").read_text()
    assert "Restored all states from the checkpoint" in log  # it did not begin again

    found = load_result(run)
    twin = tmp_path / "twin"
    twin.mkdir()
    whole = complete(load_comparison(write(twin, **changes)).methods["front"][0])
    assert found is not None
    assert (found.selected, found.validation, found.test) == (whole.selected, whole.validation, whole.test)
    for count in ("gradient_evaluations", "batches", "samples", "optimizer_steps"):
        assert found.cost[count] == whole.cost[count]


@pytest.mark.parametrize(("number", "said"), [(9, "9 (SIGKILL)"), (40, "40")])
def test_a_run_that_is_killed_for_good_is_reported(
    number: int,
    said: str,
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, methods={"joint": JOINT})
    run = load_comparison(path).methods["joint"][0]
    FitConfiguration(run.content)  # asks the interpreter for its folders, once
    # A process in the place of the run's that is killed, as one that needs too much memory is.
    monkeypatch.setattr(sys, "executable", _script(tmp_path / "killed", f"kill -{number} $$"))
    assert "no result of joint, seed 0" in _error([f"--config={path}"])
    assert load_failure(run) == f"ended by signal {said}"
    assert f"No result: joint, seed 0, failed: ended by signal {said}" in capsys.readouterr().out


def _script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_run_is_left_to_the_process_that_is_at_it_and_ends_with_its_comparison(path: str, tmp_path: Path) -> None:
    write(tmp_path, methods={"joint": JOINT}, trainer={"max_epochs": 10_000, "accelerator": "cpu", "devices": 1})
    process = subprocess.Popen(
        [sys.executable, "-m", "mtl_lightning.cli", "compare", f"--config={path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    claim = tmp_path / "runs" / ".claims" / "compare.joint.0.lock"
    last = tmp_path / "runs" / "joint" / "seed_0" / "checkpoints" / "last.ckpt"
    while not last.exists():
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.01)
    child = json.loads(claim.read_text())["pid"]
    assert child != process.pid
    with pytest.raises(SystemExit) as stop:
        compare([f"--config={path}", "--only=joint", "--seed=0"])
    assert stop.value.code == CLAIMED
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only=nope"], "`--only` should be one of joint, front. Found nope"),
        (["--seed=7"], "`--seed` should be one of 0. Found 7"),
        (["--sed=7"], "unrecognized arguments: --sed=7"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments: list[str], expected: str, path: str) -> None:
    assert expected in _error([f"--config={path}", *arguments])


def test_a_missing_file_ends_in_one_line(tmp_path: Path) -> None:
    assert "nope.yaml" in _error([f"--config={tmp_path / 'nope.yaml'}"])


def test_a_wrong_argument_of_a_method_is_found_before_anything_is_trained(path: str, tmp_path: Path) -> None:
    wrong = {"model": {**JOINT["model"], "init_args": {"weightin": None}}}
    write(tmp_path, methods={"joint": JOINT, "wrong": wrong})
    error = _error([f"--config={path}"])
    assert "wrong: " in error
    assert "weightin" in error
    assert not Path(content(tmp_path)["output"]).exists()


def test_baselines_that_do_not_fit_are_found_before_anything_is_trained(path: str, tmp_path: Path) -> None:
    baselines = tmp_path / "baselines.json"
    write(tmp_path, baselines=str(baselines))
    assert str(baselines) in _error([f"--config={path}"])
    save_baselines(baselines, {"test_loss/right": 1.0}, {"test_loss/right": False})
    assert "should hold test_accuracy/left" in _error([f"--config={path}"])
    assert not Path(content(tmp_path)["output"]).exists()


def test_a_result_that_cannot_be_read_ends_in_one_line(path: str) -> None:
    result = load_comparison(path).methods["joint"][0].folder / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{")
    assert "should be a JSON file" in _error([f"--config={path}"])


def test_the_baselines_need_all_their_runs(path: str) -> None:
    assert "Found none of left alone, seed 0" in _error([f"--config={path}", "--report"], single_tasks)
