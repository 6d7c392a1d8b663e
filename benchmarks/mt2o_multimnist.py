"""MT2O on MultiMNIST with LeNet: each transfer rule, growth and independent batches, beside the published band.

The full size is that of the published protocol (120,000 pairs, 100 epochs, 25 preferences):

    python benchmarks/mt2o_multimnist.py --root data --batches 46900 --size 25 --batch-size 256 --lr 1e-3

The defaults are a size that a CPU finishes in about an hour, and what the committed numbers are of:

    python benchmarks/mt2o_multimnist.py --root data
"""

from __future__ import annotations

import argparse
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from curves import METHODS, compare, table
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from mtl_lightning.datamodules import MultiMNISTDataModule
from mtl_lightning.modules import MT2OModule
from mtl_lightning.networks import LeNetEncoder, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task

# What methods with LeNet reach at the full size, after Chen and Kwok, NeurIPS 2022, table 1, and a result file of
# COSMOS; the reference point (2, 2) is inferred there.
PUBLISHED = {"mnist": (2.8, 3.0), "fashion": (2.1, 2.35), "fashion+mnist": (2.65, 2.92)}


def build(size: int, lr: float, backend: str, arguments: dict[str, Any]) -> MT2OModule:
    """Return the module of one run."""
    accuracy = MulticlassAccuracy(10, average="micro")
    return MT2OModule(
        network=MultiHeadNetwork(LeNetEncoder(), {name: nn.Linear(50, 10) for name in ("left", "right")}),
        tasks=[Task(name, nn.CrossEntropyLoss(), accuracy) for name in ("left", "right")],
        preferences=simplex_lattice(num_tasks=2, num_divisions=size - 1),
        optimizer=partial(torch.optim.Adam, lr=lr),
        backend=backend,  # type: ignore[arg-type]
        **arguments,
    )


def main() -> None:
    """Run all methods on all variants and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the MNIST and Fashion-MNIST files")
    parser.add_argument("--variants", nargs="*", default=list(PUBLISHED))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=5, help="number of subproblems")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--num-val", type=int, default=1000, help="validation pairs")
    parser.add_argument("--num-test", type=int, default=4000, help="test pairs")
    parser.add_argument("--validations", type=int, default=15)
    parser.add_argument("--backend", default="loop", choices=["loop", "vmap", "auto"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/mt2o_multimnist.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    names = ("batches", "batch_size", "size", "lr", "num_val", "num_test", "validations", "backend", "threads")
    settings = {name: getattr(options, name) for name in names}
    for variant in options.variants:
        runs = compare(
            options.output,
            settings,
            build=partial(build, options.size, options.lr, options.backend),
            data=lambda seed, factor, variant=variant: MultiMNISTDataModule(
                variant,
                root=options.root,
                num_val=options.num_val,
                num_test=options.num_test,
                batch_size=options.batch_size * factor,
                seed=seed,
            ),
            variant=variant,
            methods={name: METHODS[name] for name in options.methods},
            seeds=options.seeds,
            batches=options.batches,
            size=options.size,
            validations=options.validations,
        )
        low, high = PUBLISHED[variant]
        print(f"\n{variant}; published at the full size: {low} to {high}\n\n{table(runs)}\n", flush=True)


if __name__ == "__main__":
    main()
