"""``mtl-lightning compare`` and ``mtl-lightning single-tasks``: all runs of a comparison, one process after another."""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mtl_lightning.commands.claims import ClaimedError
from mtl_lightning.commands.configuration import Command, Comparison, Run, load_comparison
from mtl_lightning.commands.parsing import USER_ERRORS, FitConfiguration, one_line
from mtl_lightning.commands.report import check_baselines, write_report
from mtl_lightning.commands.results import Result, load_failure, load_result, save_failure
from mtl_lightning.commands.single_tasks import write_baselines
from mtl_lightning.commands.training import complete, is_rank_zero

CLAIMED = 75
"""The exit status of a run that another process is at: that of a temporary failure (``EX_TEMPFAIL``)."""

_GRACE_SECONDS = 60.0  # for a run to end its batch when it is asked to stop


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print what is wrong in one line and leave."""
        sys.exit(f"mtl-lightning: error: {one_line(message)}")


def compare(args: Sequence[str]) -> None:
    """Run what a comparison still lacks and write its tables; see ``mtl-lightning compare --help``.

    Args:
        args: The arguments after ``compare``.

    Raises:
        SystemExit: With a message of one line, if the configuration is wrong, or a run has no result in the end.
    """
    _main("compare", args)


def single_tasks(args: Sequence[str]) -> None:
    """Train each task of a comparison alone and write the baselines; see ``mtl-lightning single-tasks --help``.

    Args:
        args: The arguments after ``single-tasks``.

    Raises:
        SystemExit: With a message of one line, if the configuration is wrong, or a run has no result in the end.
    """
    _main("single-tasks", args)


def _main(command: Command, args: Sequence[str]) -> None:
    options = _options(command, args)
    try:
        comparison = load_comparison(options.config, command)
        if command == "single-tasks" or options.only is not None:
            runs = comparison.runs(command)
        else:
            runs = [*comparison.runs("single-tasks"), *comparison.runs("compare")]
        runs = _chosen(runs, options.only, options.seed)
        if options.list:
            for run in runs:
                _say(shlex.join(["mtl-lightning", *_arguments(run, options.config)]))
            return
        if options.report:
            _write(command, comparison)
            return
        if options.only is not None and options.seed is not None:
            _run_here(runs[0])
            return
        if command == "compare":
            check_baselines(comparison)
        for name, run in {(run.command, run.name): run for run in runs}.items():
            _check(run, name[1])
        _run_all(runs, options.config)
        lacking = [run for run in runs if load_result(run) is None]
    except USER_ERRORS as error:
        sys.exit(f"mtl-lightning: error: {one_line(str(error))}")
    try:
        _write(command, comparison)
    except USER_ERRORS as error:
        if not lacking:
            sys.exit(f"mtl-lightning: error: {one_line(str(error))}")
        sys.stdout.write(f"no tables yet: {one_line(str(error))}\n")
    if lacking:
        sys.exit(f"mtl-lightning: error: no result of {'; '.join(run.label for run in lacking)}")


def _options(command: Command, args: Sequence[str]) -> argparse.Namespace:
    what = "METHOD" if command == "compare" else "TASK"
    parser = _Parser(
        prog=f"mtl-lightning {command}",
        description=(
            "Train methods with several seeds, select on validation, test once, and write tables."
            if command == "compare"
            else "Train each task alone with several seeds and write the baselines of delta m."
        ),
        epilog="Runs that are done are skipped, runs that were stopped go on: start it again at any time.",
    )
    parser.add_argument("-c", "--config", required=True, help="The configuration of the comparison.")
    parser.add_argument("--only", metavar=what, help=f"Run this {what.lower()} alone.")
    parser.add_argument("--seed", type=int, metavar="K", help="Run this seed alone; with --only, in this process.")
    parser.add_argument("--list", action="store_true", help="Print the command of each run, as for a cluster job.")
    parser.add_argument("--report", action="store_true", help="Write the tables of the results that are there.")
    return parser.parse_args(list(args))


def _chosen(runs: Sequence[Run], name: str | None, seed: int | None) -> list[Run]:
    for what, wanted, found in (
        ("--only", name, dict.fromkeys(run.name for run in runs)),
        ("--seed", seed, dict.fromkeys(run.seed for run in runs)),
    ):
        if wanted is not None and wanted not in found:
            raise ValueError(f"`{what}` should be one of {', '.join(map(str, found))}. Found {wanted}.")
    return [run for run in runs if name in (None, run.name) and seed in (None, run.seed)]


def _check(run: Run, name: str) -> None:
    """See that the configuration of a run can be read before anything is trained."""
    try:
        FitConfiguration(run.content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _run_here(run: Run) -> None:
    """Complete a run in this process."""
    try:
        result = complete(run)
    except ClaimedError as error:
        sys.stderr.write(f"{run.label}: {error}\n")
        sys.exit(CLAIMED)
    except Exception as error:
        if not isinstance(error, USER_ERRORS):
            traceback.print_exc()
        sys.exit(f"mtl-lightning: error: {one_line(f'{type(error).__name__}: {error}')}")
    if is_rank_zero():
        sys.stdout.write(f"{run.label}: {_described(result)}\n")


def _run_all(runs: Sequence[Run], config: str) -> None:
    """Complete the runs one after another, each in a process of its own; go on after one that fails."""
    for number, run in enumerate(runs, start=1):
        start = f"[{number}/{len(runs)}] {run.label}: "
        done = load_result(run)
        if done is not None:
            _say(f"{start}done before, {_described(done)}")
            continue
        began = time.monotonic()
        log = run.output / "logs" / f"{run.command}.{run.name}.{run.seed}.log"
        status = _run_apart(run, config, log)
        result = load_result(run)
        if result is not None:
            _say(f"{start}{_described(result)}, {time.monotonic() - began:.0f} s in all")
        elif status == CLAIMED:
            _say(f"{start}in work elsewhere")
        else:
            if status < 0:  # it could not say so itself
                save_failure(run, f"ended by signal {_signal(-status)}")
            _say(f"{start}failed, {load_failure(run) or f'exit status {status}'}; see {log}")


def _signal(number: int) -> str:
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:  # of the real-time signals only the first and the last have a name
        return str(number)


def _run_apart(run: Run, config: str, log: Path) -> int:
    """Complete a run in a process of its own, which writes to ``log``, and return its exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mtl_lightning.cli", *_arguments(run, config)]
    with log.open("ab") as output, _terminating() as watched:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        watched.append(process)
        return process.wait()


@contextmanager
def _terminating() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yield a list of processes that are asked to stop if this one is interrupted or terminated."""

    def leave(number: int, frame: Any) -> NoReturn:
        sys.exit(128 + number)

    watched: list[subprocess.Popen[bytes]] = []
    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread, which alone may do this
        before = None
    try:
        yield watched
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        for process in watched:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


def _arguments(run: Run, config: str) -> list[str]:
    return [run.command, f"--config={config}", f"--only={run.name}", f"--seed={run.seed}"]


def _write(command: Command, comparison: Comparison) -> None:
    """Write what the command is there for."""
    if command == "single-tasks":
        paths = write_baselines(comparison)
    else:
        if comparison.single_tasks and all(load_result(run) for run in comparison.runs("single-tasks")):
            write_baselines(comparison)
        report, paths = write_report(comparison)
        _say(report.table.markdown())
    _say("\n".join(str(path) for path in paths))


def _described(result: Result) -> str:
    selected = result.selected
    return f"{selected['monitor']} {selected['value']:.4g} in epoch {selected['epoch']}"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
