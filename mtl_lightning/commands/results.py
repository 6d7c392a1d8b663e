"""What a run leaves: its result, or why there is none, in files that are whole or not there."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch

import mtl_lightning
from mtl_lightning.callbacks.output import write_atomically
from mtl_lightning.commands.configuration import Run

Values = dict[str, list[float]]
"""Losses and metrics, ``loss/<task>`` or ``<metric>/<task>``, to one number per model."""


@dataclass(frozen=True)
class Result:
    """The result of a run. A single model counts as a population of one.

    Attributes:
        digest: That of the configuration.
        name: The method, or the task.
        seed: The seed.
        population: Whether it is of a population.
        task_names: The ``T`` tasks.
        preferences: Of the ``P`` models, shape ``(P, T)``; empty for a single model.
        selected: ``monitor``, ``mode``, ``value`` and ``epoch`` of the checkpoint that was tested.
        validation: The values of that checkpoint in validation.
        test: Its values in the test.
        cost: ``seconds``, ``cpu_seconds``, ``fit_seconds``, ``gradient_evaluations``, ``forwards``, ``backwards``,
            ``optimizer_steps``, ``batches``, ``samples`` and ``peak_memory_mib``.
        machine: What it was made on, with the versions.
    """

    digest: str
    name: str
    seed: int
    population: bool
    task_names: list[str]
    preferences: list[list[float]]
    selected: Mapping[str, Any]
    validation: Values
    test: Values
    cost: Mapping[str, float]
    machine: Mapping[str, Any]

    def losses(self, split: Mapping[str, Sequence[float]]) -> torch.Tensor:
        """Return the losses of the models in ``validation`` or ``test``, shape ``(P, T)``, float64.

        Raises:
            ValueError: If the module does not log them.
        """
        missing = [name for name in self.task_names if f"loss/{name}" not in split]
        if missing or not self.task_names:
            raise ValueError(f"{self.name!r} should log val_loss/<task> and test_loss/<task>. Found none of {missing}.")
        return torch.tensor([split[f"loss/{name}"] for name in self.task_names], dtype=torch.float64).mT


def save_result(run: Run, result: Result) -> None:
    """Write the result of a run."""
    write_json(run.folder / "result.json", asdict(result))
    (run.folder / "failure.json").unlink(missing_ok=True)


def load_result(run: Run) -> Result | None:
    """Return the result of a run, None if there is none of its present configuration.

    Raises:
        ValueError: If the file is broken, or of a release that writes other results.
    """
    path = run.folder / "result.json"
    content = read_json(path)
    if content is None or content.get("digest") != run.digest:
        return None
    try:
        return Result(**content)
    except TypeError as error:
        raise ValueError(
            f"{str(path)!r} should be a result of this release. Found: {error}. Delete it to make it anew."
        ) from error


def save_failure(run: Run, message: str) -> None:
    """Write why a run has ended without a result."""
    write_json(run.folder / "failure.json", {"digest": run.digest, "error": message})


def load_failure(run: Run) -> str | None:
    """Return why the latest attempt of the present configuration has failed, None if it has not."""
    content = read_json(run.folder / "failure.json")
    return str(content["error"]) if content is not None and content.get("digest") == run.digest else None


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what is in a JSON file of :func:`write_json`, None if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} should be a JSON file. Found: {error}. Delete it to make it anew.") from error
    found = _restored(content)
    return found if isinstance(found, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all; numbers that are not finite, which JSON has not, as strings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: _write(temporary, text))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: _write(temporary, text))


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a run is made on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} {name}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "mtl_lightning": mtl_lightning.__version__,
    }


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_restored(entry) for entry in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
