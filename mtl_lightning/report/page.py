"""The page of a run: one file of HTML that needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import mtl_lightning
from mtl_lightning import palette
from mtl_lightning.report.reading import Affinity, Checkpoint, Curve, Front, Model, Run, Timeline

_T = TypeVar("_T")

# How much is shown at most, so that a page of a long run stays one that a browser opens at once.
_MOST_EARLIER = 4000
_MOST_MEASUREMENTS = 200
_MOST_VALUES = 1000


def page(run: Run) -> str:
    """Return the page of a run as HTML.

    Equal runs in equal folders give equal pages. All text of the run reaches the page as data, which its one script
    shows as text; a policy in the page forbids any other script, and every request.

    Example:
        >>> from pathlib import Path
        >>> run = Run(Path("/runs/a"), False, {}, (), (), (), None, (), {}, (), ("Cost: CostCallback writes it.",))
        >>> text = page(run)
        >>> text.startswith("<!DOCTYPE html>"), "http" in text.replace("http-equiv", "")
        (True, True)
    """
    folder = files("mtl_lightning.report")
    template, style, script = (
        folder.joinpath(f"page.{end}").read_text(encoding="utf-8") for end in ("html", "css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": html.escape(_title(run.folder)),
        "colours": _colours(),
        "style": style,
        "data": _embedded(_content(run)),
        "script": script,
    }
    for name, text in parts.items():
        before, mark, after = template.partition(f"{{{{{name}}}}}")
        assert mark, name
        # What is filled in is not looked at again, whatever it holds.
        parts[name], template = before + text, after
    # A lone surrogate, as of a file name that is not UTF-8, could not be written; in JSON its escape means the same.
    return ("".join(parts.values()) + template).encode("utf-8", "backslashreplace").decode("utf-8")


def write_page(run: Run, path: Path) -> None:
    """Write the page of a run, whole or not at all; folders are made.

    Raises:
        OSError: If that is not possible. A page that was there before is then as it was.
    """
    text = page(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _title(folder: Path) -> str:
    return f"{folder.parent.name} / {folder.name}" if folder.name.startswith("version_") else folder.name


def _colours() -> str:
    """Return the colours of the figures as variables of the style, which replaces some of them in the dark."""
    names = {"earlier": palette.EARLIER, "front": palette.INK, "grid": palette.GRID, "alone": palette.ALONE}
    variables = {**names, "model": palette.MODEL}
    # As numbers, to be mixed with the ground.
    mixed = {"helps": palette.HELPS, "hurts": palette.HURTS}
    variables |= {name: " ".join(map(str, palette.channels(colour))) for name, colour in mixed.items()}
    return f":root {{ {' '.join(f'--{name}: {value};' for name, value in variables.items())} }}"


def _embedded(content: Any) -> str:
    """Return JSON that can stand in a script element: nothing in it can end the element or open another."""
    text = json.dumps(_finite(content), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(content: Any) -> Any:
    """Return ``content`` with None in the place of NaN and infinities, which JSON has not."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def _content(run: Run) -> dict[str, Any]:
    return {
        "title": _title(run.folder),
        "folder": str(run.folder),
        "release": mtl_lightning.__version__,
        "facts": dict(run.facts),
        "palette": {
            "groups": palette.GROUPS,
            "preference": [palette.channels(colour) for colour in palette.PREFERENCE],
            "strength": palette.STRENGTH,
        },
        "checkpoints": [_checkpoint(run, checkpoint) for checkpoint in run.checkpoints],
        "fronts": [_front(run, front) for front in run.fronts],
        "curves": [_curve(curve) for curve in run.curves],
        "affinities": [_affinity(affinity) for affinity in run.affinities],
        "timeline": None if run.timeline is None else _timeline(run.timeline),
        "costs": [dict(row) for row in run.costs],
        "metrics": {name: _thinned(values, _MOST_VALUES) for name, values in run.metrics.items()},
        "missing": list(run.missing),
    }


def _checkpoint(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": checkpoint.path,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "problem": checkpoint.problem,
        "code": "" if checkpoint.problem else _code(run, checkpoint),
    }


def _code(run: Run, checkpoint: Checkpoint) -> str:
    """Return the lines that load the module of a checkpoint; the last one is an assignment to ``model``."""
    folder, path = _literal(str(run.folder)), _literal(checkpoint.path)
    if run.has_config:
        return f"from mtl_lightning.cli import load\n\nmodel = load({folder}, {path})"
    whole = _literal(str(run.folder / checkpoint.path))
    return (
        "import torch\n\n"
        f"# `module` is to be made as for the run, which has left no config.yaml: module = "
        f"{checkpoint.module or 'YourModule'}(...)\n"
        f'module.load_state_dict(torch.load({whole}, map_location="cpu", weights_only=True)["state_dict"])\n'
        "model = module.eval()"
    )


def _literal(text: str) -> str:
    """Return the Python literal of a string, in double quotes where it is a plain one."""
    return f'"{text}"' if text.isprintable() and not set(text) & {'"', "\\"} else repr(text)


def _front(run: Run, front: Front) -> dict[str, Any]:
    at: dict[tuple[int, int], list[str]] = {}
    for checkpoint in run.checkpoints:
        if checkpoint.epoch is not None and checkpoint.step is not None:
            at.setdefault((checkpoint.epoch, checkpoint.step), []).append(checkpoint.path)
    latest = (front.models[-1].epoch, front.models[-1].step) if front.models else None
    shown: list[Model] = []
    earlier: list[Model] = []
    for model in front.models:
        when = (model.epoch, model.step)
        (shown if when in at or when == latest or model.nondominated else earlier).append(model)
    # What can be picked: the validations of checkpoints, the best first; without any, the latest validation.
    choices = sorted(at.keys() & {(model.epoch, model.step) for model in front.models})
    volumes = {
        when: value
        for curve in run.curves[:1]
        for when, value in zip(zip(curve.epochs, curve.steps, strict=True), curve.latest, strict=True)
    }
    choices.sort(key=lambda when: (volumes.get(when, -math.inf), when), reverse=True)
    return {
        "name": front.name,
        "objectives": [
            {"name": _named(front, name), "direction": direction} for name, direction in front.objectives.items()
        ],
        "preferences": list(front.preference_names),
        "metrics": [_named(front, name) for name in front.metric_names],
        "choices": [
            {"epoch": when[0], "step": when[1], "path": path, "volume": volumes.get(when)}
            for when in choices
            for path in sorted(at[when])
        ]
        or [
            {"epoch": when[0], "step": when[1], "path": None, "volume": volumes.get(when)} for when in [latest] if when
        ],
        "models": [_model(model) for model in shown],
        "earlier": [list(model.objectives) for model in _thinned(earlier, _MOST_EARLIER)],
        "number": len(front.models),
    }


def _named(front: Front, name: str) -> str:
    """Return what a column is called: one named like a task is its loss."""
    return f"{name} loss" if name in front.preference_names else name


def _model(model: Model) -> dict[str, Any]:
    preference = ", ".join(map(_shortest, model.preference))
    return {
        "epoch": model.epoch,
        "step": model.step,
        "subproblem": model.subproblem,
        "preference": list(model.preference),
        "objectives": list(model.objectives),
        "metrics": list(model.metrics),
        "nondominated": model.nondominated,
        # Exactly that of the model, so that what is selected cannot be another one.
        "code": f".select(({preference}))" if preference else "",
    }


def _shortest(value: float) -> str:
    """Return the shortest text that gives ``value`` back, as float32 if it is one."""
    single = np.float32(value)
    return str(single) if float(single) == value else repr(value)


def _curve(curve: Curve) -> dict[str, Any]:
    rows = list(zip(curve.epochs, curve.steps, curve.latest, curve.archive, strict=True))
    return {
        "name": curve.name,
        "reference": [{"name": name, "value": value} for name, value in curve.reference_point.items()],
        "rows": [list(row) for row in _thinned(rows, _MOST_VALUES)],
    }


def _affinity(affinity: Affinity) -> dict[str, Any]:
    rows = list(zip(affinity.epochs, affinity.batches, affinity.matrices, strict=True))
    return {
        "name": affinity.name,
        "tasks": list(affinity.task_names),
        "rows": [
            {"epoch": epoch, "batch": batch, "matrix": matrix}
            for epoch, batch, matrix in _thinned(rows, _MOST_MEASUREMENTS)
        ],
        "number": len(rows),
    }


def _timeline(timeline: Timeline) -> dict[str, Any]:
    return {"tasks": timeline.task_names, "stretches": timeline.stretches, "together": timeline.together}


def _thinned(values: Sequence[_T], most: int) -> list[_T]:
    """Return at most so many of ``values``, evenly, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]
