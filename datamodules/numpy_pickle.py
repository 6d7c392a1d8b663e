"""Pickles of numbers, texts and NumPy arrays, read without running what else a pickle may hold."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mtl_lightning.datamodules.files import BrokenFileError

# What a pickled array is made of. NumPy renamed the module of the first in its version 2; old files have the old name.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _NumpyUnpickler(pickle.Unpickler):
    """Finds nothing but arrays and their types, so that loading cannot call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name}, which is never run") from None


def read_numpy_pickle(path: str | Path) -> Any:
    """Return the content of a pickle of built-in values and NumPy arrays, also one written by Python 2.

    Strings of Python 2 become texts, a character per byte.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        BrokenFileError: If it is damaged, or names anything but arrays; nothing is run then.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        return _NumpyUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises errors of almost any kind
        raise BrokenFileError.of(path, "a pickle of numbers, texts and NumPy arrays only", str(error)) from error
