"""Checkpoint files that are written whole or not at all, and read without running code."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.serialization import get_unsafe_globals_in_checkpoint

from mtl_lightning.modules.checkpoints import CheckpointError

_ON_HOST = "cpu"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and reads them with ``weights_only=True``.

    A file is written beside its place, forced to the disk and then renamed, so that at any time the place holds the
    previous checkpoint or the new one: after a process was killed, a machine lost its power, or the disk was full.
    Lightning's own class writes to the system's temporary folder and moves the file. Between two file systems, as on
    most clusters, that is a copy in place, and what is there before is lost if it stops half way.

    The multi-task modules of this package put it in the place of Lightning's ``TorchCheckpointIO``; other modules
    have it with ``Trainer(plugins=[AtomicCheckpointIO()])``. What a killed process leaves is a hidden file,
    ``.<digest>.part``, which the next checkpoint of the same name replaces.

    Limits: files of remote file systems are written as Lightning does, and read as here. ``AsyncCheckpointIO`` of
    Lightning makes a ``TorchCheckpointIO`` of its own and is left as it is.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, f"{folder}/last.ckpt")
        ...     AtomicCheckpointIO().load_checkpoint(f"{folder}/last.ckpt")
        {'state_dict': {}}
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            OSError: If it cannot be written, as on a full disk. A file that was there before is still whole.
            TypeError: If there are ``storage_options``.
        """
        local = _local_path(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Not named after the file: Lightning takes all that is named `hpc_ckpt_...` for checkpoints to go on from.
        temporary = local.with_name(f".{hashlib.sha256(local.name.encode()).hexdigest()[:16]}.part")
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                _save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, local)
        except OSError as error:
            kept = "The file that was there before is whole." if local.exists() else "No file was there before."
            raise OSError(
                error.errno,
                f"The checkpoint {str(local)!r} should be written whole. Found: {error.strerror or error}. {kept} Free "
                "or choose another place",
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(local.parent)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Return the content of the checkpoint at ``path``, tensors on the CPU by default.

        Args:
            path: The file.
            map_location: See ``torch.load``.
            weights_only: ``False`` allows any pickle, which may run any code; otherwise only tensors, plain Python
                values and what ``torch.serialization.add_safe_globals`` was given are read.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If it is truncated, no checkpoint, or holds something that is not allowed.
        """
        return read_checkpoint(path, map_location, weights_only is not False)


def read_checkpoint(path: str | Path | IO[bytes], map_location: Any = _ON_HOST, weights_only: bool = True) -> Any:
    """Return the content of a checkpoint; see :meth:`AtomicCheckpointIO.load_checkpoint`."""
    name = str(path) if isinstance(path, str | Path) else "of the given file"
    try:
        content = _load(path, map_location, weights_only)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # broken files lead to errors of almost any kind
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that comes of seeking in half a file
            raise
        forbidden = _forbidden(path, error) if weights_only else []
        if forbidden:
            raise CheckpointError(
                f"The checkpoint {name} should hold tensors and plain Python values only: reading anything else can "
                f"run code. Found {', '.join(forbidden)}; nothing was run. If you trust the file, allow these with "
                "`torch.serialization.add_safe_globals`."
            ) from error
        if _is_whole(path, weights_only):  # it is its place that fails, such as a device that this machine lacks
            raise
        # Of torch's reasons only the first sentence: the others advise to read the file as any pickle.
        reason = str(error).partition(". ")[0] if isinstance(error, RuntimeError) else type(error).__name__
        raise CheckpointError(
            f"The checkpoint {name} should be a whole file written by a `Trainer`. Found {_size(path)} that cannot be "
            f"read ({reason}). It is truncated or no checkpoint; go on from an earlier one."
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        found = f"the entries {', '.join(map(repr, content))}" if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"The checkpoint {name} should hold a `state_dict`. Found {found or 'no entries'}.")
    return content


class _Recorder:
    """A file that remembers why it could not be written; torch only tells that something went wrong."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    recorder: Any = _Recorder(file)
    try:
        torch.save(checkpoint, recorder)
    except RuntimeError:
        if recorder.error is not None:
            raise recorder.error from None
        raise


def _load(path: str | Path | IO[bytes], map_location: Any, weights_only: bool) -> Any:
    if not isinstance(path, str | Path):
        return torch.load(path, map_location=map_location, weights_only=weights_only)
    if urlsplit(str(path)).scheme in ("http", "https"):
        return torch.hub.load_state_dict_from_url(str(path), map_location=map_location, weights_only=weights_only)
    files = get_filesystem(path)
    if not files.exists(str(path)):
        raise FileNotFoundError(f"There should be a checkpoint at {str(path)!r}. Found none.")
    with files.open(str(path), "rb") as file:
        return torch.load(file, map_location=map_location, weights_only=weights_only)


def _is_whole(path: str | Path | IO[bytes], weights_only: bool) -> bool:
    """Return whether a checkpoint can be read without a place for its tensors."""
    if not isinstance(path, str | Path):
        path.seek(0)
    try:
        _load(path, "meta", weights_only)
    except Exception:
        return False
    return True


def _forbidden(path: str | Path | IO[bytes], error: Exception) -> list[str]:
    """Return the names that a checkpoint would import and that are not allowed; none if that cannot be told."""
    source: Any = path
    if isinstance(path, str | Path):
        source = _local_path(path)
    else:
        path.seek(0)
    # Of a file of torch's older format, or elsewhere, only the first is known.
    first = re.findall(r"GLOBAL (\S+)", str(error))[:1]
    try:
        return first if source is None else list(get_unsafe_globals_in_checkpoint(source)) or first
    except Exception:  # whatever a broken file leads to: it is reported as one
        return first


def _local_path(path: str | Path) -> Path | None:
    text = str(path)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text or "::" in text else Path(path)


def _size(path: str | Path | IO[bytes]) -> str:
    local = _local_path(path) if isinstance(path, str | Path) else None
    return "a file" if local is None else f"a file of {local.stat().st_size} bytes"


def _sync_folder(folder: Path) -> None:
    """Force the new name to the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
