from __future__ import annotations

import pickle
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from mtl_lightning.modules.checkpoint_io import AtomicCheckpointIO
from mtl_lightning.modules.checkpoints import CheckpointError
from tests.modules.common import loader, mt2o, trainer

CONTENT = {"state_dict": {"a": torch.arange(1000.0)}, "epoch": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "below" / "run.ckpt")
    return tmp_path / "below" / "run.ckpt"


def test_what_was_written_is_read(path: Path) -> None:
    for place in (path, str(path), f"file://{path}"):
        content = AtomicCheckpointIO().load_checkpoint(place)
        assert torch.equal(content["state_dict"]["a"], CONTENT["state_dict"]["a"])  # type: ignore[index]
        assert content["epoch"] == 3
    assert list(path.parent.iterdir()) == [path]


def test_addresses_are_written_to(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(CONTENT, f"file://{tmp_path}/run.ckpt")
    AtomicCheckpointIO().save_checkpoint(CONTENT, "memory://run.ckpt")
    for place in (tmp_path / "run.ckpt", "memory://run.ckpt"):
        assert AtomicCheckpointIO().load_checkpoint(place)["epoch"] == 3
    AtomicCheckpointIO().remove_checkpoint("memory://run.ckpt")
    with pytest.raises(FileNotFoundError, match=r"There should be a checkpoint at 'memory://run\.ckpt'"):
        AtomicCheckpointIO().load_checkpoint("memory://run.ckpt")


def test_what_cannot_be_written_leaves_nothing(path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "function": lambda: None}, path)
    assert list(path.parent.iterdir()) == [path]
    assert AtomicCheckpointIO().load_checkpoint(path)["epoch"] == 3


def test_a_folder_in_the_place_of_the_file_is_named(path: Path) -> None:
    with pytest.raises(OSError, match=r"The checkpoint '.*below' should be written whole\. Found: Is a directory"):
        AtomicCheckpointIO().save_checkpoint(CONTENT, path.parent)
    assert list(path.parent.parent.iterdir()) == [path.parent]


def test_half_a_file_is_not_taken_for_a_checkpoint_by_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `hpc_ckpt_*`, Lightning reads the newest, whatever comes before and after that in the name."""
    seen: list[str] = []

    def look(*_: Any) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr("os.fsync", look)
    AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "hpc_ckpt_1.ckpt")
    assert seen
    assert "hpc_ckpt_" not in seen[0]


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 0.5, -1, -30])
def test_half_a_file_is_refused(kept: float, path: Path) -> None:
    data = path.read_bytes()
    size = round(kept * len(data)) if isinstance(kept, float) else kept % len(data)
    path.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=rf"Found a file of {size} bytes that cannot be read .* It is truncated"):
        AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "Found list"),
        ({"model": 1}, "Found the entries 'model'"),
        ({}, "Found no entries|Found the entries"),
    ],
    ids=str,
)
def test_other_files_of_torch_are_refused(content: Any, found: str, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"should hold a `state_dict`. {found}"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_other_files_are_refused(path: Path) -> None:
    path.write_text("a,b\n1,2\n")
    with pytest.raises(CheckpointError, match="a file of 8 bytes that cannot be read"):
        AtomicCheckpointIO().load_checkpoint(path)


def _refuse(storage: Any, location: str) -> Any:
    raise RuntimeError("Attempting to deserialize object on a CUDA device but torch.cuda.is_available() is False.")


def test_a_whole_file_that_has_no_place_is_not_called_truncated(path: Path) -> None:
    with pytest.raises(RuntimeError, match="Attempting to deserialize"):
        AtomicCheckpointIO().load_checkpoint(path, map_location=_refuse)


def test_what_the_user_trusts_is_read(path: Path) -> None:
    content = CONTENT | {"limit": timedelta(seconds=3), "sorted": OrderedDict(a=1)}
    AtomicCheckpointIO().save_checkpoint(content, path)
    with pytest.raises(CheckpointError, match=r"Found datetime\.timedelta; nothing was run"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=False)["limit"] == timedelta(seconds=3)
    with torch.serialization.safe_globals([timedelta]):
        assert AtomicCheckpointIO().load_checkpoint(path)["limit"] == timedelta(seconds=3)


class _Own(TorchCheckpointIO):
    pass


def test_modules_bring_it_along_unless_the_user_has_chosen() -> None:
    plain, chosen = trainer(), trainer(plugins=[_Own()])
    given = trainer(strategy=SingleDeviceStrategy("cpu", checkpoint_io=_Own()))
    for run, kind in ((plain, AtomicCheckpointIO), (chosen, _Own), (given, _Own)):
        run.fit(mt2o(), loader())
        assert type(run.strategy.checkpoint_io) is kind
