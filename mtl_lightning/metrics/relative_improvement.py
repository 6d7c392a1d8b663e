"""Relative improvement over baselines, known as delta m: one number for a multi-task model.

    delta_m = 100 % / K  sum_k (-1)^(l_k) (M_k - B_k) / |B_k|,     l_k = 1 if lower is better, else 0

``M`` are the values of the model and ``B`` those of the baselines, usually of networks trained for one task each.
Positive is better, always. Two conventions are in use, and give different numbers as soon as tasks differ in how many
metrics they have: ``per="task"`` averages the metrics of each task first, and then the tasks (LibMTL, MTI);
``per="metric"`` averages all metrics (nash, FAMO, which print it with the opposite sign: positive is worse there).

References:
    - Maninis, Radosavovic, Kokkinos: Attentive Single-Tasking of Multiple Tasks (2019), arXiv:1904.08918.
    - Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya: Multi-Task Learning as a Bargaining Game (2022),
      arXiv:2202.01017.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor


class Baseline(NamedTuple):
    """What a metric is compared with: its value, and whether more of it is better."""

    value: float
    higher_is_better: bool


class RelativeImprovement:
    """The relative improvement over fixed baselines, in percent; positive is better.

    Args:
        baselines: Metric name to :class:`Baseline`, or the path of a file of :func:`save_baselines`. The task of a
            metric is what follows the last ``/`` of its name: ``"val_accuracy/left"`` belongs to ``left``.
        per: Whether tasks or metrics count alike; see the module.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file or the mapping holds no usable baselines, or ``per`` is something else.

    Example:
        >>> baselines = {"val_loss/left": Baseline(0.5, False), "val_f1/right": Baseline(0.8, True)}
        >>> improvement = RelativeImprovement(baselines)
        >>> round(improvement({"val_loss/left": 0.45, "val_f1/right": 0.6, "epoch": 3}), 6)  # (10 - 25) / 2
        -7.5
    """

    def __init__(self, baselines: str | Path | Mapping[str, Baseline], per: Literal["task", "metric"] = "task") -> None:
        self.baselines = (
            _checked(baselines, "`baselines`") if isinstance(baselines, Mapping) else load_baselines(baselines)
        )
        _check_per(per)
        self.per = per

    def __call__(self, values: Mapping[str, float | Tensor]) -> float:
        """Return the improvement of ``values``, such as ``trainer.callback_metrics``; other names in it do not matter.

        Raises:
            ValueError: If a metric of the baselines is missing.
        """
        return relative_improvement(values, self.baselines, self.per)

    def __repr__(self) -> str:
        return f"RelativeImprovement({', '.join(self.baselines)}, per={self.per!r})"


def relative_improvement(
    values: Mapping[str, float | Tensor],
    baselines: Mapping[str, Baseline],
    per: Literal["task", "metric"] = "task",
) -> float:
    """Return the relative improvement of ``values`` over ``baselines`` in percent; positive is better.

    It is NaN if one of the values is. A negative baseline counts by its magnitude, so that positive remains better.

    Args:
        values: Metric name to value; names without a baseline do not matter.
        baselines: Metric name to baseline.
        per: ``"task"`` averages the metrics of each task, then the tasks; ``"metric"`` averages all metrics.

    Raises:
        ValueError: If there are no baselines, one is zero or not finite, or has no value.

    Example:
        >>> depth = {"abs/depth": Baseline(2.0, False), "rel/depth": Baseline(1.0, False)}
        >>> baselines = {**depth, "miou/segmentation": Baseline(0.5, True)}
        >>> values = {"abs/depth": 1.0, "rel/depth": 1.0, "miou/segmentation": 0.5}
        >>> relative_improvement(values, baselines), round(relative_improvement(values, baselines, per="metric"), 2)
        (12.5, 16.67)
    """
    _check_per(per)
    baselines = _checked(baselines, "`baselines`")
    missing = [name for name in baselines if name not in values]
    if missing:
        overlap = "none of them" if len(missing) == len(baselines) else f"no {', '.join(map(repr, missing))}"
        raise ValueError(
            f"`values` should hold every metric of the baselines: {', '.join(map(repr, baselines))}. Found {overlap}, "
            f"but {', '.join(map(repr, values)) or 'nothing'}. Log the model under the names of the baselines."
        )
    gains: dict[str, list[float]] = {}
    for name, (base, higher_is_better) in baselines.items():
        gain = (float(values[name]) - base) / abs(base)
        group = name.rsplit("/", 1)[-1] if per == "task" else ""
        gains.setdefault(group, []).append(gain if higher_is_better else -gain)
    return 100 * _mean([_mean(group) for group in gains.values()])


def load_baselines(path: str | Path) -> dict[str, Baseline]:
    """Return the baselines in the JSON file ``path``, metric name to baseline.

    The file reads ``{"val_loss/left": {"value": 0.47, "higher_is_better": false}, ...}``.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file is something else.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The baselines should be in the file {str(path)!r}, which is missing. Write it with `save_baselines`."
        ) from error
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{str(path)!r} should be a JSON file of baselines. Found: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{str(path)!r} should hold an object, metric name to baseline. Found {type(content).__name__}."
        )
    return _checked(content, repr(str(path)))


def save_baselines(
    path: str | Path, values: Mapping[str, float | Tensor], higher_is_better: Mapping[str, bool]
) -> None:
    """Write baselines to the JSON file ``path``, whole or not at all.

    Args:
        path: The file; it is replaced if there is one.
        values: Metric name to value, such as ``trainer.callback_metrics``, or the union of those of several runs.
        higher_is_better: The metrics to be written, and for each whether more of it is better.

    Raises:
        ValueError: If no metric is named, or one has no value, or zero, or no finite one.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "baselines.json")
        >>> save_baselines(path, {"val_loss/left": 0.47, "epoch": 9}, higher_is_better={"val_loss/left": False})
        >>> load_baselines(path)
        {'val_loss/left': Baseline(value=0.47, higher_is_better=False)}
    """
    missing = [name for name in higher_is_better if name not in values]
    if missing:
        raise ValueError(
            f"`values` should hold every metric of `higher_is_better`. Found no {', '.join(map(repr, missing))}, "
            f"but {', '.join(map(repr, values)) or 'nothing'}."
        )
    baselines = _checked(
        {name: Baseline(float(values[name]), higher) for name, higher in higher_is_better.items()}, "`values`"
    )
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        content = {name: baseline._asdict() for name, baseline in baselines.items()}
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(baselines: Mapping[str, Any], source: str) -> dict[str, Baseline]:
    """Return the baselines as floats, or raise a ValueError that names their source."""
    if not baselines:
        raise ValueError(f"{source} should hold at least one metric. Found none.")
    checked = {}
    for name, entry in baselines.items():
        if isinstance(entry, Mapping) and set(entry) == set(Baseline._fields):
            entry = Baseline(**entry)
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            raise ValueError(
                f"{source} should give {name!r} a `value` and `higher_is_better`, and nothing else. Found {entry!r}."
            )
        value, higher_is_better = entry
        if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value) or value == 0:
            raise ValueError(f"{source} should hold a finite number other than zero for {name!r}. Found {value!r}.")
        if not isinstance(higher_is_better, bool):
            raise ValueError(
                f"{source} should say by true or false whether higher is better for {name!r}. "
                f"Found {higher_is_better!r}."
            )
        checked[name] = Baseline(float(value), higher_is_better)
    return checked


def _check_per(per: str) -> None:
    if per not in ("task", "metric"):
        raise ValueError(f"`per` should be 'task' or 'metric'. Found {per!r}.")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
