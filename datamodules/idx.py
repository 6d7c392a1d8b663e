"""The idx file format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_UINT8 = 0x08


def read_idx(path: str | Path, ndim: int) -> Tensor:
    """Return the array of an idx file as a uint8 tensor with ``ndim`` dimensions.

    The file begins with two zero bytes, the type (8 for unsigned bytes), the number of dimensions and each dimension as
    a big-endian 32-bit number; the values follow. A name that ends in ``.gz`` is decompressed.

    Args:
        path: The file.
        ndim: The number of dimensions that it should have.

    Raises:
        ValueError: If the file is damaged, of another kind, or not exactly as long as its header says.

    References:
        - LeCun, Cortes, Burges: The MNIST database of handwritten digits. http://yann.lecun.com/exdb/mnist/.
    """
    path = Path(path)
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, "a whole gzip file", str(error)) from error
    header = 4 + 4 * ndim
    magic = bytes((0, 0, _UINT8, ndim))
    if content[:4] != magic:
        raise _damaged(
            path,
            f"an idx file of {ndim}-dimensional bytes, which begins with {magic.hex()}",
            content[:4].hex() or "none",
        )
    if len(content) < header:
        raise _damaged(path, f"a header of {header} bytes", f"{len(content)} bytes")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if len(content) != header + prod(shape):
        raise _damaged(path, f"{header + prod(shape)} bytes for its shape {shape}", f"{len(content)} bytes")
    # A bytearray may be written to, as torch expects of what a tensor lives in.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].view(shape)


def _damaged(path: Path, expected: str, found: str) -> ValueError:
    return ValueError(f"{path} should hold {expected}. Found {found}. Delete it and fetch it again.")
