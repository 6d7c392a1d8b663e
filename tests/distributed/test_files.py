"""Files that a killed process or a full disk may not harm."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from matplotlib.image import imread

from mtl_lightning.callbacks import (
    AffinityCallback,
    CostCallback,
    HypervolumeCallback,
    ParetoFrontCallback,
    TaskGroupCallback,
)
from mtl_lightning.callbacks.output import write_picture, write_rows
from mtl_lightning.modules.checkpoint_io import AtomicCheckpointIO
from tests.distributed.common import KINDS, TARGETS, assert_close, finish, load
from tests.distributed.ranks import Ranks
from tests.modules.common import trainer

# Each writes a large file that is all one number, and reads it back: the numbers that it found.


def _write_checkpoint(path: Path, number: int) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.full((2_000_000,), float(number))}}, path)


def _read_checkpoint(path: Path) -> set[float]:
    return set(AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["a"].unique().tolist())


def _write_rows(path: Path, number: int) -> None:
    write_rows(path, ("a", "b"), [{"a": number, "b": number}] * 30_000)


def _read_rows(path: Path) -> set[float]:
    lines = path.read_text().splitlines()
    assert len(lines) == 30_001
    return {float(value) for line in lines[1:] for value in line.split(",")}


def _write_picture(path: Path, number: int) -> None:
    write_picture(path, np.full((2000, 2000, 3), number % 256, dtype=np.uint8))


def _read_picture(path: Path) -> set[float]:
    picture = imread(path)
    assert picture.shape[:2] == (2000, 2000)
    return set(np.unique(np.round(picture[..., :3] * 255)).tolist())


FILES: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], set[float]]]] = {
    "checkpoint": (_write_checkpoint, _read_checkpoint),
    "table": (_write_rows, _read_rows),
    "picture": (_write_picture, _read_picture),
}


def _write_again_and_again(write: Callable[[Path, int], None], path: Path, started: Path) -> None:
    for number in range(2, 200):
        (started / str(number)).touch()
        write(path, number)


@pytest.mark.parametrize("kind", FILES)
def test_a_process_killed_while_it_writes_leaves_a_whole_file(kind: str, tmp_path: Path) -> None:
    write, read = FILES[kind]
    folder, started = tmp_path / "files", tmp_path / "started"
    started.mkdir()
    folder.mkdir()
    path = folder / "file"
    write(path, 1)
    inside = 0
    for _ in range(4):
        with Ranks(_write_again_and_again, [write, path, started], world_size=1, folder=tmp_path / "logs") as ranks:
            # A file beside the other one: half of it, or so, is on the disk.
            ranks.wait_for(lambda: _half_written(folder, path) is not None, "a file that is being written")
            ranks.send(0, signal.SIGKILL)
            assert ranks.join() == [-signal.SIGKILL]
        inside += _half_written(folder, path) is not None
        assert len(read(path)) == 1
    assert inside  # else nothing was tested
    write(path, 3)
    assert read(path) == {3.0}


def _half_written(folder: Path, path: Path) -> Path | None:
    return next((other for other in folder.iterdir() if other != path), None)


# ----------------------------------------------------------------------------------------------------------- full disks

_NO_DISK = 77


def _mount(folder: Path, megabytes: int) -> None:
    """Mount a small disk, for this process and its children only; leave if that is not allowed."""
    new_mounts = 0x00020000
    flag = ctypes.CDLL(None, use_errno=True).unshare(new_mounts)
    command = f"mount --make-rprivate / && mount -t tmpfs -o size={megabytes}m tmpfs '{folder}'"
    if flag != 0 or subprocess.run(command, shell=True, check=False).returncode != 0:
        os._exit(_NO_DISK)


def _limit(folder: Path, megabytes: int) -> None:
    """Let no file grow beyond a size, which everybody may ask for."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, megabytes << 20))


DISKS = {"full": (_mount, "No space left on device"), "limited": (_limit, "File too large")}


def _run(function: Callable[..., None], arguments: list[Any], tmp_path: Path) -> None:
    with Ranks(function, arguments, world_size=1, folder=tmp_path / "logs") as ranks:
        if ranks.join() == [_NO_DISK]:
            pytest.skip("a disk can be mounted by root only")
        ranks.succeed()


def _fill_with_checkpoints(disk: str, folder: Path) -> None:
    prepare, reason = DISKS[disk]
    prepare(folder, 4)
    path = folder / "last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"state_dict": {"a": torch.ones(1000)}}, path)
    for count in (1, 300):  # in one piece, and in many
        large = {"state_dict": {str(index): torch.ones(2_000_000 // count) for index in range(count)}}
        with pytest.raises(OSError, match=f"should be written whole. Found: {reason}. The file that was there before"):
            plugin.save_checkpoint(large, path)
        assert [found.name for found in folder.iterdir()] == ["last.ckpt"]
        assert plugin.load_checkpoint(path)["state_dict"]["a"].sum() == 1000
    with pytest.raises(OSError, match="No file was there before"):
        plugin.save_checkpoint(large, folder / "new.ckpt")
    plugin.save_checkpoint({"state_dict": {"a": torch.zeros(1000)}}, path)
    assert plugin.load_checkpoint(path)["state_dict"]["a"].sum() == 0


@pytest.mark.parametrize("disk", DISKS)
def test_a_full_disk_leaves_the_last_checkpoint_whole(disk: str, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    _run(_fill_with_checkpoints, [disk, folder], tmp_path)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


class _Fill(Callback):
    """Fill the disk after the first epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0 and not (self.folder / "other").exists():
            self.before = {path.name: path.read_bytes() for path in self.folder.glob("*.*")}
            with pytest.raises(OSError, match="No space"):
                _fill(self.folder / "other")


def _recorders(folder: Path) -> list[Callback]:
    objectives: dict[str, Any] = {f"val_loss/{name}": "min" for name in TARGETS}
    return [
        ParetoFrontCallback(objectives, dirpath=folder),
        HypervolumeCallback((9.0, 9.0, 9.0), objectives, dirpath=folder),
        AffinityCallback(dirpath=folder, figure_every=0),
        TaskGroupCallback(dirpath=folder, figure_every=0),
        CostCallback(dirpath=folder),
    ]


def _complaints(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    messages = (str(warning.message) for warning in caught)
    return [message for message in messages if "Callbacks should be able to write" in message]


def _train_on_a_full_disk(folder: Path, end: Path) -> None:
    _mount(folder, 1)
    fill = _Fill(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        finish(trainer([*_recorders(folder), fill], max_epochs=3), KINDS["task_groups"](), end)
    (message,) = _complaints(caught)
    assert "Found: No space left on device. Training goes on" in message
    assert fill.before
    assert "archive.csv" in fill.before
    kept = {name: (folder / name).read_bytes() for name in fill.before}
    assert kept == fill.before
    assert not list(folder.glob(".*"))


def test_a_full_disk_does_not_stop_training_for_a_table_or_a_figure(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    _run(_train_on_a_full_disk, [folder, tmp_path / "full.pt"], tmp_path)
    finish(trainer(_recorders(tmp_path / "enough"), max_epochs=3), KINDS["task_groups"](), tmp_path / "enough.pt")
    found, expected = load(tmp_path / "full.pt"), load(tmp_path / "enough.pt")
    for end in (found, expected):  # a clock
        end["metrics"] = {name: value for name, value in end["metrics"].items() if "seconds" not in name}
    assert_close(found, expected, tolerance=0.0)


class _Remove(Callback):
    """Put a file in the place of the folder after the first epoch, and the folder again before the last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.folder.rename(self.folder.with_name("away"))
            self.folder.touch()
        elif trainer.current_epoch == 2:
            self.folder.unlink()
            self.folder.with_name("away").rename(self.folder)


def test_a_folder_that_is_gone_for_a_while_is_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    run = trainer([*_recorders(folder), _Remove(folder)], max_epochs=3)
    with pytest.warns(UserWarning, match="Callbacks should be able to write to .* Found: Not a directory") as caught:
        finish(run, KINDS["task_groups"](), tmp_path / "end.pt")
    assert len(_complaints(caught)) == 1
    finish(trainer(_recorders(tmp_path / "expected"), max_epochs=3), KINDS["task_groups"](), tmp_path / "expected.pt")
    for name in ("archive.csv", "hypervolume.csv"):  # with the rows of the time between
        assert (folder / name).read_text() == (tmp_path / "expected" / name).read_text()
