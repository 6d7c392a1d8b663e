"""Signals by which a cluster takes a machine back, acted on between two batches and by all ranks together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

_OWNER = "lightning.pytorch"


class DeferredSignals:
    """Holds back the signals that Lightning has handlers for, until a checkpoint of the run is exact.

    Lightning acts at once: on the signal for requeueing (SLURM sends ``SIGUSR1``) it writes a checkpoint wherever the
    run is, also between the step of the optimiser and its count, and each rank by itself, although a checkpoint is a
    meeting of all ranks. Here a signal is remembered only; :meth:`deliver`, called by all ranks between two batches,
    hands it to Lightning's handler on all of them, as soon as one has received it.

    Handlers of the user's own are left alone, and with them, on all ranks, the signals that some rank has one for.

    Example:
        >>> deferred = DeferredSignals()
        >>> deferred.hold(torch.device("cpu"), world_size=1)
        >>> deferred.deliver(torch.device("cpu"), world_size=1)
        >>> deferred.release(torch.device("cpu"), world_size=1)
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._received: set[int] = set()

    def __reduce__(self) -> Any:
        # Handlers lead to the trainer, which is no part of a copy of the module.
        return DeferredSignals, ()

    def hold(self, device: torch.device, world_size: int) -> None:
        """Begin to hold back signals. All ranks have to call it."""
        self._handlers, self._received = {}, set()
        found: dict[int, Callable[[int, FrameType | None], Any]] = {}
        # Only in the main thread can handlers be set, so that Lightning has none elsewhere.
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in sorted(signal.valid_signals())}
            found = {
                number: handler
                for number, handler in handlers.items()
                if callable(handler) and type(handler).__module__.startswith(_OWNER)
            }
        numbers = list(found)
        if world_size > 1:
            flags = torch.tensor([number in found for number in range(signal.NSIG)], device=device).int()
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN)
            numbers = [number for number, flag in enumerate(flags.tolist()) if flag]
        for number in numbers:
            self._handlers[number] = found[number]
            signal.signal(number, self._receive)

    def deliver(self, device: torch.device, world_size: int) -> None:
        """Hand over what any rank has received. All ranks have to call it between the same two batches."""
        if not self._handlers:
            return
        received = sorted(self._received)
        if world_size > 1:
            flags = torch.tensor([number in self._received for number in self._handlers], device=device).int()
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            received = [number for number, flag in zip(self._handlers, flags.tolist(), strict=True) if flag]
        for number in received:
            self._received.discard(number)
            self._handlers[number](number, None)

    def release(self, device: torch.device, world_size: int) -> None:
        """Hand over what is left, and give the signals back to Lightning. All ranks have to call it."""
        self.deliver(device, world_size)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.add(number)
