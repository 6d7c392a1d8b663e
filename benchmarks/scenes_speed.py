"""Scenes rendered, and read from a file, per second and process: the numbers of the documentation of the scenes.

OMP_NUM_THREADS=1 python benchmarks/scenes_speed.py --output benchmarks/results/scenes_speed.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from record import machine, save
from torch.utils.data import DataLoader

from mtl_lightning.datamodules.scenes import ScenesDataModule

SIZES = (32, 64, 128, 224)


def measure(size: int, count: int) -> dict[str, float]:
    """Return what ``count`` scenes of ``size`` take: the default tasks, all tasks in the file."""
    with tempfile.TemporaryDirectory() as folder:
        plain, augmented = (
            ScenesDataModule(size=size, num_train=count, num_val=0, num_test=0, augment=augment, cache_dir=folder)
            for augment in (False, True)
        )
        start = time.perf_counter()
        plain.prepare_data()
        seconds = time.perf_counter() - start
        rates = {"rendered": count / seconds}
        for name, datamodule in (("read", plain), ("read and augmented", augmented)):
            datamodule.setup()
            loader = datamodule.dataloader("train")
            assert isinstance(loader, DataLoader)
            start = time.perf_counter()
            for _ in loader:
                pass
            rates[name] = count / (time.perf_counter() - start)
        rates["kilobytes"] = sum(path.stat().st_size for path in Path(folder).iterdir()) / count / 1000
    return rates


def main() -> None:
    """Measure all sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="about how long each size is rendered")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scenes_speed.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(32, 20)  # the first pictures pay for imports and memory
    rows = {size: measure(size, max(20, round(options.seconds * 1e6 / (size + 24) ** 2))) for size in SIZES}
    save(options.output, {"machine": machine(), "scenes_per_second": {str(size): row for size, row in rows.items()}})
    print("| size | rendered per second | read per second | read and augmented per second | kB per scene |")
    print("|---|---|---|---|---|")
    for size, row in rows.items():
        print(f"| {size} | {' | '.join(f'{value:.0f}' for value in row.values())} |")


if __name__ == "__main__":
    main()
