"""Ranks as processes of their own, which can be killed, stopped and told apart, under a hard limit of time."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import Self

_FORK = multiprocessing.get_context("fork")
_CLASH = "address already in use"


class Ranks:
    """``world_size`` processes that run ``function(*arguments)``, each with the environment of its rank.

    They are forked, so that nothing is imported again; inside, :func:`ranked_trainer` makes a trainer of such a rank.
    Use it as a context: no process outlives it.

    Args:
        function: What each process runs.
        arguments: Its arguments.
        world_size: The number of processes.
        folder: Where the processes leave their logs, ``rank-<r>.log``.
        environment: From a rank to further variables.
        limit: How many seconds the processes have in all. What each was doing then is in its log.
    """

    def __init__(
        self,
        function: Callable[..., None],
        arguments: Sequence[Any] = (),
        *,
        world_size: int = 2,
        folder: Path,
        environment: Callable[[int], Mapping[str, str]] = lambda rank: {},
        limit: float = 120.0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
        self._end = time.monotonic() + limit
        port = _free_port()
        self.processes = []
        for rank in range(world_size):
            variables = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(world_size),
                "NODE_RANK": "0",
                "LOCAL_RANK": str(rank),
                **environment(rank),
            }
            process = _FORK.Process(
                target=_run, args=(function, arguments, variables, self.logs[rank], limit), daemon=True
            )
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()  # also ends one that was stopped
            process.join()

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until ``condition`` holds.

        Raises:
            AssertionError: If it does not before all processes have ended, or before the limit.
        """
        while not condition():
            alive = any(process.is_alive() for process in self.processes)
            if (not alive and not condition()) or time.monotonic() > self._end:
                raise AssertionError(f"waited in vain for {what}\n{self.report()}")
            time.sleep(0.01)

    def join(self, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Wait for the end of ``ranks``, by default of all, and return their exit codes.

        Raises:
            AssertionError: If they do not end before the limit.
        """
        chosen = [self.processes[rank] for rank in (range(len(self.processes)) if ranks is None else ranks)]
        for process in chosen:
            process.join(max(0.0, self._end - time.monotonic()))
            if process.is_alive():
                raise AssertionError(f"a rank has not ended in time\n{self.report()}")
        return [process.exitcode for process in chosen]

    def succeed(self) -> None:
        """Wait for the end of all ranks.

        Raises:
            AssertionError: If one fails or does not end before the limit.
        """
        codes = self.join()
        assert not any(codes), f"ranks have ended with {codes}\n{self.report()}"

    def log(self, rank: int) -> str:
        """Return what a rank has printed so far."""
        return self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""

    def report(self) -> str:
        """Return the end of all logs."""
        states = ["running" if process.is_alive() else f"ended with {process.exitcode}" for process in self.processes]
        return "\n".join(f"---- rank {rank}, {state}\n{self.log(rank)[-6000:]}" for rank, state in enumerate(states))


def run_ranks(function: Callable[..., None], arguments: Sequence[Any] = (), **options: Any) -> None:
    """Run ``function`` on all ranks to a good end; see :class:`Ranks`. Once more if another process took the port."""
    for attempt in range(3):
        with Ranks(function, arguments, **options) as ranks:
            codes = ranks.join()
            clash = any(_CLASH in ranks.log(rank).lower() for rank in range(len(codes)))
            if attempt < 2 and any(codes) and clash:
                continue
            ranks.succeed()
            return


def ranked_trainer(world_size: int = 2, timeout: float = 60.0, **arguments: Any) -> Trainer:
    """Return a quiet trainer for the process of a rank; gloo waits ``timeout`` seconds for the other ranks."""
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=timeout))
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": world_size,
        "strategy": strategy if world_size > 1 else "auto",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(defaults | arguments))


def _run(
    function: Callable[..., None], arguments: Sequence[Any], variables: Mapping[str, str], log: Path, limit: float
) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # What the test runner has put in their place would keep what is printed.
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        faulthandler.dump_traceback_later(max(limit - 2.0, limit / 2), file=file)
        os.environ.update(variables)
        code = 1
        try:
            function(*arguments)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # At once: what else the test runner would do at its end is not this process's.
            os._exit(code)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
