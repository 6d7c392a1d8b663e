from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest

from mtl_lightning.callbacks.output import output_folder, write_atomically, write_rows


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def write(temporary: Path) -> None:
        assert temporary.parent == tmp_path  # a rename is atomic within a file system only
        temporary.write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("error")
def test_a_file_that_cannot_be_written_is_told_of_once_for_a_folder_and_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    expected = r"Callbacks should be able to write to '.*gone'\. Found: No such file or directory\. Training goes on"
    with pytest.warns(UserWarning, match=expected):
        write_rows(folder / "table.csv", ["a"], [{"a": 1}])
    write_rows(folder / "other.csv", ["a"], [{"a": 1}])
    folder.mkdir()
    write_rows(folder / "table.csv", ["a"], [{"a": 1}])
    assert [path.name for path in folder.iterdir()] == ["table.csv"]


def test_whether_a_file_was_written_is_returned(tmp_path: Path) -> None:
    assert write_atomically(tmp_path / "file", lambda temporary: temporary.touch())
    with pytest.warns(UserWarning, match="Found: Is a directory"):
        assert not write_atomically(tmp_path, lambda temporary: temporary.touch())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_rows_keep_full_precision(tmp_path: Path) -> None:
    write_rows(tmp_path / "table.csv", ["step", "value"], [{"step": 1, "value": 0.1 + 0.2}])
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["value"]) == 0.1 + 0.2
    assert list(tmp_path.iterdir()) == [tmp_path / "table.csv"]


def test_default_folder_lies_in_the_log_folder(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    assert output_folder(make_trainer(), None, "here") == tmp_path / "here"
    logger = pl.loggers.CSVLogger(tmp_path, name="run")
    assert output_folder(make_trainer(logger=logger), None, "here") == tmp_path / "run" / "version_0" / "here"
    assert output_folder(make_trainer(), tmp_path / "there", "here") == tmp_path / "there"
    assert (tmp_path / "there").is_dir()


def test_a_folder_that_cannot_be_made_is_named(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"The folder '.*file/below' should be writable"):
        output_folder(make_trainer(), tmp_path / "file" / "below", "here")


def test_fast_dev_run_has_no_folder(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    assert output_folder(make_trainer(fast_dev_run=True), tmp_path / "there", "here") is None
    assert not (tmp_path / "there").exists()
