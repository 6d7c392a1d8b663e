"""How many samples a second the data sets of files give, and where the time goes.

Every layout is written anew with rendered scenes, at a size like that of the real files. Milliseconds per sample:
reading the bytes (which the system keeps in memory), decoding them into tensors, resizing and checking, augmentation
and normalisation, and the rest of the loader, with batches of 8. One thread and no other process.

    python benchmarks/dataloaders.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from record import machine, save

sys.path.insert(0, str(Path(__file__).parents[1]))  # the writers of the layouts are those of the tests

from mtl_lightning.datamodules.scene_rendering import render
from tests.datamodules import layouts
from tests.datamodules.dense_cases import CASES


def enlarge(height: int, width: int) -> None:
    """Let the writers draw pictures of this size, nearest pixels of half the size."""
    layouts.HEIGHT, layouts.WIDTH = height, width

    @cache
    def scene(seed: int) -> dict[str, Any]:
        maps = render(seed, width // 2)
        large = {name: values.repeat(2, axis=-1).repeat(2, axis=-2) for name, values in maps.items()}
        return {
            name: values[:height] if values.ndim == 2 else values[:, :height].transpose(1, 2, 0)
            for name, values in large.items()
        }

    layouts.scene = scene  # type: ignore[assignment]


def rate(function: Callable[[], int], seconds: float) -> float:
    """Return milliseconds per sample of a function that returns how many samples it made."""
    function()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += function()
    return 1e3 * (time.perf_counter() - began) / count


def measure(case: Any, root: Path, seconds: float) -> dict[str, Any]:
    """Return the figures of one layout."""
    case.write(root)

    def dataset(**options: Any) -> Any:
        module = case.datamodule(root, **options)
        module.prepare_data()
        module.setup("fit")
        return module, module.datasets["train"]

    _, plain = dataset(augment=False, normalize=None)
    module, full = dataset(augment=True, batch_size=8)
    paths = [files.path(key) for files in plain.files.values() for key in plain.keys]

    def read_bytes() -> int:
        for path in paths:
            path.read_bytes()
        return len(plain)

    def decode() -> int:
        for files in plain.files.values():
            for key in plain.keys:
                files.read(files.path(key))
        return len(plain)

    def items(data: Any) -> int:
        return sum(1 for _ in data)

    def epoch(loader: Any) -> int:
        return sum(len(batch[0]) for batch in loader)

    loader = module.train_dataloader()
    stages: dict[str, Callable[[], int]] = {
        "read": read_bytes,
        "decode": decode,
        "item": lambda: items(plain),
        "augmented": lambda: items(full),
        "loader": lambda: epoch(loader),
    }
    # In turn, and the least of several: the allocator gets faster with every picture at first.
    rounds = [{name: rate(stage, seconds / 3) for name, stage in stages.items()} for _ in range(3)]
    steps = {name: min(one[name] for one in rounds) for name in stages}
    image, labels = full[0]
    return {
        "layout": case.name,
        "size": list(image.shape[-2:]),
        "tasks": len(labels),
        "milliseconds": {
            "read": steps["read"],
            "decode": steps["decode"] - steps["read"],
            "resize, check": steps["item"] - steps["decode"],
            "augment, normalise": steps["augmented"] - steps["item"],
            "loader": steps["loader"] - steps["augmented"],
        },
        "per_second": 1e3 / steps["loader"],
    }


def main() -> None:
    """Measure all layouts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=288)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each step of each layout")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/dataloaders.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    enlarge(options.height, options.width)
    rows = []
    for number, case in enumerate(CASES):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            rows.append(measure(case, Path(folder) / str(number), options.seconds))
    stages = list(rows[0]["milliseconds"])
    print(f"| layout | size | tasks | {' | '.join(stages)} | samples a second |")
    print("|---|---|---|" + "---|" * (len(stages) + 1))
    for row in rows:
        cells = " | ".join(f"{row['milliseconds'][stage]:.1f}" for stage in stages)
        size = " x ".join(map(str, row["size"]))
        print(f"| {row['layout']} | {size} | {row['tasks']} | {cells} | {row['per_second']:.0f} |")
    settings = {"height": options.height, "width": options.width, "seconds": options.seconds}
    save(options.output, {"machine": machine(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
