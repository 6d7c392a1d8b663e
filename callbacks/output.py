"""Where callbacks leave their files, and how: whole or not at all, from rank zero only.

A file that cannot be written, as on a full disk, does not stop a run: there is one warning, the file of before stays as
it is, and the next write tries again. What the tables hold is in the checkpoints as well.
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_told: set[tuple[Path, str]] = set()  # folders that could not be written, and why


def output_folder(trainer: pl.Trainer, dirpath: str | Path | None, default: str) -> Path | None:
    """Return the folder for a callback's files, created and checked to be writable, or None with ``fast_dev_run``.

    All ranks have to call it.

    Args:
        trainer: The trainer.
        dirpath: The folder that the user asks for.
        default: The folder's name in ``trainer.log_dir`` (``trainer.default_root_dir`` without a logger) otherwise.

    Raises:
        OSError: On all ranks, if rank zero cannot write there.
    """
    log_dir = trainer.log_dir  # a broadcast, so every rank reads it
    folder = Path(log_dir or trainer.default_root_dir) / default if dirpath is None else Path(dirpath)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        return None
    _told.difference_update([known for known in _told if known[0] == folder])  # another run is told again
    problem: str | None = None
    if trainer.is_global_zero:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problem = str(error)
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise OSError(f"The folder {str(folder)!r} should be writable; choose another `dirpath`. Found: {problem}.")
    return folder


def write_atomically(path: Path, write: Callable[[Path], None]) -> bool:
    """Let ``write`` fill a temporary file beside ``path``, then put it in the place of ``path`` in one step.

    Returns:
        Whether that was possible. If not, there is one warning for each folder and reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            write(temporary)
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # where nothing can be written, it is the first error that counts
                temporary.unlink(missing_ok=True)
    except OSError as error:
        # Raised, it would stop rank zero alone, and the others would wait for it.
        reason = error.strerror or str(error)
        if (path.parent, reason) not in _told:
            _told.add((path.parent, reason))
            rank_zero_warn(
                f"Callbacks should be able to write to {str(path.parent)!r}. Found: {reason}. Training goes on, and "
                "files that were there before are whole; each is tried again at its next turn."
            )
        return False
    return True


def _sync(path: Path) -> None:
    """Force the content of a file to the disk, so that no machine that loses its power leaves an empty one."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows`` as CSV with a header, numbers in full precision."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def draw(figure: Figure) -> np.ndarray:
    """Return the picture of a ``figure``, shape ``(height, width, 3)``, uint8. It needs no display and no pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def write_picture(path: Path, picture: np.ndarray) -> bool:
    """Write a ``picture``, shape ``(height, width, 3)``, uint8, as PNG; return whether that was possible."""
    from matplotlib.image import imsave

    # Level 1 takes a tenth of the time of the default, for a file a third larger.
    return write_atomically(
        path, lambda temporary: imsave(temporary, picture, format="png", pil_kwargs={"compress_level": 1})
    )


def logged_step(trainer: pl.Trainer, *, epoch_is_over: bool = False) -> int:
    """Return the step under which loggers have what a module logs at this moment.

    Lightning counts for them the batches after which the optimiser may step, from 0: the values of the third one, of a
    validation that follows it and of an epoch that ends with it are all at 2. ``trainer.global_step``, as in the names
    of checkpoints, is how many steps have been made, which is 3 then.

    Args:
        trainer: The trainer.
        epoch_is_over: Whether this is ``on_train_epoch_end``, when Lightning has counted the last batch already.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped - epoch_is_over


def log_picture(trainer: pl.Trainer, key: str, picture: np.ndarray, step: int) -> None:
    """Show a ``picture`` in the loggers that take pictures: TensorBoard, and those with ``log_image`` (W&B)."""
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            logger.log_image(key=key, images=[picture], step=step)
        elif hasattr(experiment, "add_image"):
            # Not `add_figure`: that would draw the figure a second time.
            experiment.add_image(key, picture, step, dataformats="HWC")
