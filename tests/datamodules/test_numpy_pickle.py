from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_lightning.datamodules.files import BrokenFileError
from mtl_lightning.datamodules.numpy_pickle import read_numpy_pickle
from tests.datamodules.tables import python2_pickle

CONTENT: dict[str, Any] = {
    "data": np.arange(100, 256, 26, dtype=np.uint8).reshape(2, 3),
    "labels": [3, 1],
    "name": "batch",
}


class _Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def _same(content: Any) -> bool:
    return bool(
        np.array_equal(content["data"], CONTENT["data"])
        and content["data"].dtype == np.uint8
        and content["labels"] == CONTENT["labels"]
        and content["name"] == "batch"
    )


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickles_of_numpy_arrays_are_read(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "file").write_bytes(pickle.dumps(CONTENT, protocol=protocol))
    assert _same(read_numpy_pickle(tmp_path / "file"))


def test_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    content = python2_pickle(CONTENT)
    assert b"_codecs" not in content
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content
    (tmp_path / "file").write_bytes(content)
    assert _same(read_numpy_pickle(tmp_path / "file"))


def test_nothing_is_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    (tmp_path / "file").write_bytes(pickle.dumps({"data": _Runs(target)}))
    with pytest.raises(BrokenFileError, match=r"only\. Found (posix|nt)\.mkdir, which is never run"):
        read_numpy_pickle(tmp_path / "file")
    assert not target.exists()


@pytest.mark.parametrize("harmless", [Path("x"), complex(1, 2), np.float64(3)])
def test_anything_but_arrays_and_builtin_values_is_refused(tmp_path: Path, harmless: Any) -> None:
    (tmp_path / "file").write_bytes(pickle.dumps(harmless))
    with pytest.raises(BrokenFileError, match="which is never run"):
        read_numpy_pickle(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    whole = pickle.dumps(CONTENT)
    (tmp_path / "file").write_bytes(whole[:-10] if content is None else content)
    with pytest.raises(BrokenFileError, match="file should hold a pickle of numbers"):
        read_numpy_pickle(tmp_path / "file")
