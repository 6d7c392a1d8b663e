"""What training costs: passes, steps, seconds and memory."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtl_lightning.callbacks.measuring import MeasuringCallback, finite, publish
from mtl_lightning.callbacks.objectives import attached
from mtl_lightning.callbacks.output import logged_step, output_folder, write_rows

_MOST_EVENTS = 1024
_MIB = 2**20


@dataclass(frozen=True)
class CostTotals:
    """The cost of a run so far.

    Attributes:
        forwards: Forward passes in training steps, of one rank.
        backwards: Backward passes in training steps, of one rank.
        optimizer_steps: Optimiser steps, of one rank.
        batches: Trained batches, of one rank.
        samples: Trained samples, of one rank; None if a batch does not tell.
        seconds: Seconds in training steps, of the slowest rank.
        peak_memory_mib: The largest memory in MiB, of the rank with most; NaN if unknown.
    """

    forwards: int
    backwards: int
    optimizer_steps: int
    batches: int
    samples: int | None
    seconds: float
    peak_memory_mib: float


class CostCallback(Callback):
    """Counts what training costs, so that methods can be compared at equal cost, on any LightningModule.

    - *Forward passes* are calls of one submodule within training batches. Several calls with a part of the batch each
      count each; a call under ``torch.vmap`` counts once.
    - *Backward passes* are those through Lightning: the returned loss, and ``manual_backward``. Those of
      ``torch.autograd.grad`` and ``Tensor.backward`` are not seen.
    - *Optimiser steps* include those that the scaler of 16-bit precision skips.
    - *Seconds* are those from the start to the end of each training batch: no data loading, no validation, no
      checkpoints. Those of callbacks in this list that act at a batch's start or end count if they stand behind this
      one (start) or before it (end), except measurements (``AffinityCallback``, ``GradientConflictCallback``), which
      are left out with their forward passes. On CUDA they are taken between events on the current stream, which does
      not stop the device.
    - *Peak memory* is ``torch.cuda.max_memory_allocated``, which starts with the process and holds no context and no
      cache; on a CPU the largest resident set of the process, its data included.

    Logged at the end of each epoch, since the start of the run: ``cost/forwards``, ``cost/backwards``,
    ``cost/optimizer_steps``, ``cost/batches``, ``cost/samples`` (if batches tell), ``cost/seconds``,
    ``cost/peak_memory_mib``. Counts are those of one rank; seconds and memory are the largest over ranks. ``cost.csv``
    has a row per epoch, from rank zero and whole or not at all. All of it is part of the checkpoint, so that a resumed
    run goes on counting. ``fast_dev_run`` writes nothing.

    Args:
        module: The dotted name of the submodule whose calls are forward passes. By default ``network.encoder`` or else
            ``network``, also within another submodule; or else the only child with parameters; or else the
            LightningModule's own ``forward``.
        dirpath: The folder; by default ``cost`` in ``trainer.log_dir``, or in ``trainer.default_root_dir``.

    Raises:
        ValueError: Before training, if there is no such submodule.
        OSError: Before training, if the folder is not writable.

    Example:
        >>> callback = CostCallback(module="network.encoder")
        >>> callback.totals.forwards
        0
    """

    def __init__(self, module: str | None = None, dirpath: str | Path | None = None) -> None:
        self.module = module
        self.dirpath = dirpath
        self.folder: Path | None = None
        self._counts = {"forwards": 0, "backwards": 0, "optimizer_steps": 0, "batches": 0}
        self._samples: int | None = 0
        self._seconds = 0.0  # of this rank
        self._peak = math.nan  # of this rank
        self._reduced = (0.0, math.nan)  # seconds and peak of all ranks, at the end of the latest epoch
        self._rows: list[dict[str, int | float | None]] = []
        self._open_epoch: int | None = None  # that of batches whose row is still to be written
        self._handle: RemovableHandle | None = None
        self._in_batch = False
        self._measuring: list[MeasuringCallback] = []
        self._start: Any = None
        self._measured_before = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def totals(self) -> CostTotals:
        """The cost so far; seconds and memory as of the end of the latest epoch."""
        return CostTotals(
            **self._counts, samples=self._samples, seconds=self._reduced[0], peak_memory_mib=self._reduced[1]
        )

    @property
    def history(self) -> list[dict[str, int | float | None]]:
        """One row per epoch: the columns of ``cost.csv``, that is, ``epoch`` and the totals."""
        return [dict(row) for row in self._rows]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check module and folder before anything is trained."""
        if stage == "fit":
            self._find(pl_module)
            self.folder = output_folder(trainer, self.dirpath, default="cost")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to listen."""
        self._remove_hook()
        self._in_batch = False  # a run that was stopped left it as it was
        self._measuring = attached(trainer, MeasuringCallback)  # type: ignore[type-abstract]
        self._handle = self._find(pl_module).register_forward_pre_hook(self._count_forward)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._in_batch = True
        self._measured_before = sum(callback.measure_seconds for callback in self._measuring)
        self._start = _recorded_event() if pl_module.device.type == "cuda" else time.perf_counter()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Count a backward pass."""
        self._counts["backwards"] += self._in_batch

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Count an optimiser step."""
        self._counts["optimizer_steps"] += self._in_batch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; count the batch and its samples."""
        self._in_batch = False
        if pl_module.device.type == "cuda":
            self._events.append((self._start, _recorded_event()))
            if len(self._events) >= _MOST_EVENTS:
                self._read_events(_MOST_EVENTS // 2)  # old enough to have passed, so that nothing waits for them
        else:
            self._seconds += time.perf_counter() - self._start
        self._seconds -= sum(callback.measure_seconds for callback in self._measuring) - self._measured_before
        self._counts["batches"] += 1
        self._open_epoch = trainer.current_epoch
        size = _batch_size(batch)
        self._samples = None if size is None or self._samples is None else self._samples + size

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for the end of an epoch whose last batch was followed by the checkpoint of which this run goes on."""
        if self._open_epoch is not None and self._open_epoch != trainer.current_epoch:
            self._finish_epoch(trainer, pl_module, self._open_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the totals and write the table."""
        self._finish_epoch(trainer, pl_module, trainer.current_epoch, epoch_is_over=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop to listen."""
        self._remove_hook()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop to listen."""
        self._remove_hook()

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, which Lightning can load with ``weights_only=True``."""
        self._read_events(len(self._events))
        return {
            "counts": dict(self._counts),
            "samples": self._samples,
            "seconds": self._seconds,
            "peak": self._peak,
            "reduced": list(self._reduced),
            "rows": self.history,
            "open_epoch": self._open_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self._counts = dict(state_dict["counts"])
        self._samples = state_dict["samples"]
        self._seconds = state_dict["seconds"]
        self._peak = state_dict["peak"]
        self._reduced = (state_dict["reduced"][0], state_dict["reduced"][1])
        self._rows = [dict(row) for row in state_dict["rows"]]
        self._open_epoch = state_dict["open_epoch"]

    def _find(self, pl_module: pl.LightningModule) -> nn.Module:
        modules = dict(pl_module.named_modules(remove_duplicate=False))
        if self.module is not None:
            if self.module not in modules:
                found = ", ".join(repr(name) for name in list(modules)[1:20]) or "none"
                raise ValueError(f"`module` should name a submodule, such as {found}. Found {self.module!r}.")
            return modules[self.module]
        for ending in (".network.encoder", ".network"):
            for name, module in modules.items():
                if f".{name}".endswith(ending):
                    return module
        children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
        return children[0] if len(children) == 1 else pl_module

    def _count_forward(self, module: nn.Module, inputs: Any) -> None:
        if not self._in_batch or any(callback.is_measuring for callback in self._measuring):
            return
        # Lightning lets a wrapper such as DDP call the LightningModule with `training_step` in the place of `forward`.
        own = getattr(module.forward, "__func__", None) is type(module).forward
        self._counts["forwards"] += own or not isinstance(module, pl.LightningModule)

    def _finish_epoch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, epoch_is_over: bool = False
    ) -> None:
        self._open_epoch = None
        self._read_events(len(self._events))
        self._peak = _largest(self._peak, _peak_memory(pl_module.device))
        # A negative number is never the largest, and NaN would spoil it.
        local = torch.tensor(
            [self._seconds, -1.0 if math.isnan(self._peak) else self._peak],
            dtype=torch.float32 if pl_module.device.type == "mps" else torch.float64,
            device=pl_module.device,
        )
        seconds, peak = trainer.strategy.reduce(local, reduce_op="max").tolist()
        self._reduced = (seconds, math.nan if peak < 0 else peak)
        totals = asdict(self.totals)
        self._rows.append({"epoch": epoch} | totals)
        publish(
            trainer,
            pl_module,
            finite({f"cost/{key}": float(value) for key, value in totals.items() if value is not None}),
            logged_step(trainer, epoch_is_over=epoch_is_over),
        )
        if self.folder is not None and trainer.is_global_zero:
            write_rows(self.folder / "cost.csv", list(self._rows[-1]), self._rows)
        if self._counts["forwards"] == 0 and len(self._rows) == 1:
            rank_zero_warn(
                f"No forward pass of {self.module or 'the default submodule'!r} has been seen in the first epoch; name "
                "with `CostCallback(module=...)` a submodule that is called in each."
            )

    def _remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _read_events(self, count: int) -> None:
        for start, end in self._events[:count]:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000.0
        del self._events[:count]


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _peak_memory(device: torch.device) -> float:
    """Return the largest memory of this process so far in MiB, NaN if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    if sys.platform == "win32":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024  # in bytes there, in KiB elsewhere


def _largest(first: float, second: float) -> float:
    return second if math.isnan(first) else first if math.isnan(second) else max(first, second)


def _batch_size(batch: Any) -> int | None:
    """Return the length of the first tensor in ``batch``, None if there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim > 0 else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return next((size for size in map(_batch_size, batch) if size is not None), None)
    return None
