from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from mtl_lightning.cli import main
from mtl_lightning.commands.run_report import report
from mtl_lightning.report import page, read_run


def _run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["epoch", "step", "val_loss"], [0, 4, 0.5], [1, 9, 0.25]])
    return folder


def test_the_page_lies_in_the_folder_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _run(tmp_path / "run")
    path = report([str(folder)])
    assert path == folder / "report.html"
    assert path.read_text(encoding="utf-8") == page(read_run(folder))
    assert capsys.readouterr().out == f"{path}\n"
    first = path.read_bytes()
    assert report([str(folder)]).read_bytes() == first  # its own page is no part of the run


def test_the_newest_version_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 9, 10):
        _run(tmp_path / "run" / f"version_{number}")
    monkeypatch.chdir(tmp_path)
    path = report(["run", "--output=pages/page.html"])
    assert path == Path("pages/page.html")
    assert path.read_text(encoding="utf-8") == page(read_run(tmp_path / "run" / "version_10"))
    assert capsys.readouterr().out == "version_10 is the newest run in run\npages/page.html\n"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "should be a folder of a run"),
        ("empty", "Found nothing in it"),
        ("broken", "should hold numbers in column 'step'"),
        ("output", "Is a directory"),
    ],
)
def test_what_cannot_be_shown_ends_in_one_line(kind: str, expected: str, tmp_path: Path) -> None:
    folder, arguments = tmp_path / "run", []
    if kind == "empty":
        folder.mkdir()
    elif kind != "missing":
        _run(folder)
    if kind == "broken":
        (folder / "metrics.csv").write_text("epoch,step,val_loss\n0,x,1\n")
    if kind == "output":
        arguments = [f"--output={tmp_path}"]
    with pytest.raises(SystemExit, match=r"^mtl-lightning: error: ") as stop:
        report([str(folder), *arguments])
    assert expected in str(stop.value.code)
    assert "\n" not in str(stop.value.code)


def test_the_command_line_knows_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["mtl-lightning", "report", str(folder)])
    main()
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
