"""Every example as a user runs it, with what it prints and what it leaves."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs an example in this process and returns what it prints; files go to ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def run_here(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_here


def run_alone(*command: str, folder: Path) -> list[str]:
    """Run a command of Python in a process of its own; return what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def numbers(line: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+\.\d+", line)]


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    names = [path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")]
    assert names
    assert not [name for name in names if f'"{name}"' not in tested]


def test_a_subclass_learns_tasks_of_its_own(run: Any) -> None:
    accuracy, ink, groups = run("new_task.py")
    assert numbers(accuracy)[0] > 80
    error, deviation = numbers(ink)
    assert error < deviation / 3
    assert sorted(re.findall(r"'(\w+)'", groups)) == ["digit", "ink"]


def test_mt2o_on_a_table_prints_a_front(run: Any, tmp_path: Path) -> None:
    lines = run("mt2o_tabular.py")
    rows = [numbers(line) for line in lines if re.fullmatch(r"\s+\d\.\d\d\s+\d+\.\d\d\s+\d+\.\d\d", line)]
    assert [row[0] for row in rows] == [0.0, 0.17, 0.33, 0.5, 0.67, 0.83, 1.0]
    assert rows[-1][1] < rows[0][1]  # who is all for the heating load knows it best
    assert rows[-1][2] > rows[0][2]
    left = {path.name for path in (tmp_path / "runs" / "mt2o_tabular").iterdir()}
    assert left >= {"best.ckpt", "front.png", "hypervolume.png", "archive.csv"}


def test_task_groups_on_scenes_print_affinity_and_groups(run: Any, tmp_path: Path) -> None:
    lines = run("task_groups_scenes.py", "--rooms=60")
    rows = [numbers(line) for line in lines[2:7]]
    assert [len(row) for row in rows] == [5] * 5
    assert all(row[index] > 0 for index, row in enumerate(rows))  # a step for a task alone makes its loss smaller
    assert len(re.findall(r"'(\w+)'", lines[7])) == 5
    folder = tmp_path / "runs" / "task_groups_scenes"
    assert list((folder / "affinity").glob("*.png"))
    assert list((folder / "groups").glob("*.png"))


def test_callbacks_attach_to_a_module_of_another_project(run: Any, tmp_path: Path) -> None:
    assert "mtl_lightning.modules" not in (FOLDER / "callbacks_only.py").read_text()
    lines = run("callbacks_only.py")
    points = sorted(numbers(line) for line in lines[1:-1])
    assert len(points) > 1
    assert [point[1] for point in points] == sorted(point[1] for point in points)  # less loss costs sparsity
    left = {path.name for path in (tmp_path / "runs" / "callbacks_only").iterdir()}
    assert left >= {"best.ckpt", "front.png", "hypervolume.png"}


def test_an_exported_model_predicts_the_same_where_this_library_is_not_installed(run: Any, tmp_path: Path) -> None:
    has_onnx = importlib.util.find_spec("onnxscript") is not None
    lines = run("export_model.py", "--epochs=2")
    assert lines[0].startswith("chosen: preference")
    # As on a machine without them: an import of any of these fails.
    name = "use_exported_model.py"
    program = (
        "import runpy, sys; sys.modules.update(mtl_lightning=None, lightning=None, torchmetrics=None);"
        "sys.argv[1:] = [];"
        f"runpy.run_path({str(FOLDER / name)!r}, run_name='__main__')"
    )
    found = run_alone("-c", program, folder=tmp_path)
    ways = ["state_dict", "torch.export", "TorchScript"]
    ways += ["ONNX"] if has_onnx and importlib.util.find_spec("onnxruntime") is not None else []
    assert [line.split(":")[0] for line in found] == ways
    assert all(": the same predictions" in line for line in found)


def test_two_processes_print_the_numbers_of_one(run: Any, tmp_path: Path) -> None:
    pair = run_alone(str(FOLDER / "ddp_two_processes.py"), "--epochs=1", folder=tmp_path)
    assert any(line.startswith("2 process(es), 32 steps") for line in pair)
    alone = run("ddp_two_processes.py", "--devices=1", "--epochs=1")
    for start in ("validation losses", "affinity"):
        (one,) = [numbers(line) for line in alone if line.startswith(start)]
        (two,) = [numbers(line) for line in pair if line.startswith(start)]
        assert one
        assert two == pytest.approx(one, abs=2e-4)  # printed with four digits


def test_the_notebook_plays_through(tmp_path: Path) -> None:
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(FOLDER / "mt2o_digits.ipynb", as_version=4)
    kinds = [_kinds(cell) for cell in notebook.cells]
    executor = client.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    executor.execute(env=os.environ | {"PYTHONPATH": str(FOLDER.parent)})
    # What is stored in the file has been there once: text and pictures in the same places.
    assert [_kinds(cell) for cell in notebook.cells] == kinds
    assert sum("image/png" in kind for kind in kinds) == 3
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    first, last = numbers(next(line for line in text.splitlines() if line.startswith("hypervolume")))
    assert last > first


def _kinds(cell: Any) -> set[str]:
    outputs = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
    return {kind for output in outputs for kind in output.get("data", {output["output_type"]: None})}
