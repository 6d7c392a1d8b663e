"""What a run costs beyond what ``CostCallback`` counts: gradient evaluations, processor time, rise in memory."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mtl_lightning.callbacks.measuring import MeasuringCallback
from mtl_lightning.callbacks.objectives import attached

_MIB = 2**20


@dataclass(frozen=True)
class Effort:
    """The effort of a run, of one rank.

    Attributes:
        gradient_evaluations: Passes forward and backward of one network over one batch; see :class:`EffortCallback`.
        cpu_seconds: Processor seconds of all threads in training batches: no data loading, no validation.
        fit_seconds: Seconds from the start of training to the end of ``fit``, all included.
        memory_rise_mib: By how many MiB the largest resident set of the process exceeds that before model and data were
            made; NaN if unknown.
    """

    gradient_evaluations: int
    cpu_seconds: float
    fit_seconds: float
    memory_rise_mib: float


class EffortCallback(Callback):
    """Counts the :class:`Effort` of a run; it is part of the checkpoint, so that a resumed run goes on counting.

    A gradient evaluation is a pass forward and backward of one network over one batch. A batch counts

    - for a population of networks (an attribute ``population`` with ``size`` and ``chunks()``): one for each network in
      training and each of its backward passes, however many networks share a pass under ``vmap``. Backward passes are
      those through Lightning, at least one;
    - for any other module: the number of passes forward with a graph through ``network.encoder`` (or ``network``, or
      the module), or the number of times that a gradient reaches the first trained parameter there, whichever is
      larger. That is one for a weighted loss, one for each group of tasks, one for each drawn preference, and one for
      each task where gradients of the tasks are taken one by one, by ``torch.autograd.grad`` too.

    What other callbacks measure does not count.

    Args:
        resident_before: The resident set before model and data were made, in MiB: :func:`resident_memory`.

    Example:
        >>> EffortCallback(resident_before=300.0).effort.gradient_evaluations
        0
    """

    def __init__(self, resident_before: float) -> None:
        self.resident_before = resident_before
        self._evaluations = 0
        self._cpu_seconds = 0.0
        self._fit_seconds = 0.0
        self._rise = math.nan
        self._forwards, self._backwards, self._reached = 0, 0, 0  # of the batch
        self._in_batch = False
        self._cpu_start = 0.0
        self._fit_start: float | None = None
        self._measuring: list[MeasuringCallback] = []
        self._handles: list[RemovableHandle] = []

    @property
    def effort(self) -> Effort:
        """The effort so far."""
        running = 0.0 if self._fit_start is None else time.perf_counter() - self._fit_start
        return Effort(self._evaluations, self._cpu_seconds, self._fit_seconds + running, self._latest_rise())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and begin to listen."""
        self._fit_start = time.perf_counter()
        self._measuring = attached(trainer, MeasuringCallback)  # type: ignore[type-abstract]
        self._in_batch = False
        self._remove_hooks()
        if _population(pl_module) is None:
            watched = _watched(pl_module)
            self._handles.append(watched.register_forward_pre_hook(self._count_forward))
            trained = next((p for p in watched.parameters() if p.requires_grad), None)
            if trained is not None:
                handle: RemovableHandle = trained.register_hook(self._count_gradient)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a batch."""
        self._in_batch = True
        self._forwards, self._backwards, self._reached = 0, 0, 0
        self._cpu_start = time.process_time()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """See a backward pass."""
        self._backwards += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        self._cpu_seconds += time.process_time() - self._cpu_start
        self._in_batch = False
        population = _population(pl_module)
        if population is None:
            self._evaluations += max(self._forwards if self._reached else 0, self._reached)
        elif self._backwards:
            parts = sum(1 for _ in population.chunks())
            self._evaluations += population.size * max(1, round(self._backwards / parts))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        if self._fit_start is not None:
            self._fit_seconds += time.perf_counter() - self._fit_start
            self._fit_start = None
        self._remove_hooks()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop to listen."""
        self._remove_hooks()

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, which Lightning can load with ``weights_only=True``."""
        effort = self.effort
        return {
            "evaluations": effort.gradient_evaluations,
            "cpu_seconds": effort.cpu_seconds,
            "fit_seconds": effort.fit_seconds,
            "rise": effort.memory_rise_mib,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self._evaluations = state_dict["evaluations"]
        self._cpu_seconds = state_dict["cpu_seconds"]
        self._fit_seconds = state_dict["fit_seconds"]
        self._rise = state_dict["rise"]

    def _count_forward(self, module: nn.Module, inputs: Any) -> None:
        self._forwards += self._in_batch and torch.is_grad_enabled() and not self._is_measuring()

    def _count_gradient(self, gradient: Tensor) -> None:
        self._reached += self._in_batch and not self._is_measuring()

    def _is_measuring(self) -> bool:
        return any(callback.is_measuring for callback in self._measuring)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _latest_rise(self) -> float:
        rise = peak_memory() - self.resident_before
        return rise if math.isnan(self._rise) else max(rise, self._rise)


def resident_memory() -> float:
    """Return the resident set of this process in MiB; its largest so far where the system does not tell."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        import resource

        return int(pages.read_text().split()[1]) * resource.getpagesize() / _MIB
    return peak_memory()


def peak_memory() -> float:
    """Return the largest resident set of this process so far in MiB, NaN if it is unknown."""
    if sys.platform == "win32":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024  # in bytes there, in KiB elsewhere


def _population(pl_module: pl.LightningModule) -> Any:
    """Return the networks that the module trains at once, None if it trains one."""
    population = getattr(pl_module, "population", None)
    return population if hasattr(population, "size") and hasattr(population, "chunks") else None


def _watched(pl_module: pl.LightningModule) -> nn.Module:
    """Return the part of the module that stands for the network."""
    modules = dict(pl_module.named_modules())
    return next((modules[name] for name in ("network.encoder", "network") if name in modules), pl_module)
