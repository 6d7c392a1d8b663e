"""How benchmarks keep and summarise their numbers."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def summary(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and 95 % confidence interval (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.0)
    return f"{mean:.{digits}f} ± {quantile * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def machine() -> dict[str, Any]:
    """Return what the numbers were made on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Write the result whole or not at all; runs, if it holds any, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    text = json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1)
    if "runs" in result:
        runs = ",\n  ".join(json.dumps(run) for run in result["runs"])
        text = f'{text[:-2]},\n "runs": [\n  {runs}\n ]\n}}'
    part.write_text(text + "\n")
    os.replace(part, path)
