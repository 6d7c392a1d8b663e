from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

WriteIdx = Callable[[Path, Tensor], Path]


@pytest.fixture
def write_idx() -> WriteIdx:
    """Return a function that writes a uint8 tensor as an idx file, compressed if the name ends in ``.gz``."""

    def write(path: Path, values: Tensor) -> Path:
        content = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
        content += bytes(values.flatten().tolist())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return write
