"""MT2O on two overlapping digits: each transfer rule, growth and independent batches.

python benchmarks/mt2o_digits.py --seeds 3 --output benchmarks/results/mt2o_digits.json
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

from mtl_lightning.datamodules import MultiDigitsDataModule
from mtl_lightning.modules import MT2OModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task
from mtl_lightning.transfer import NeighborTransfer

ALL = METHODS | {
    "neighbour, decay 0.999": lambda batches, size: {"transfer": NeighborTransfer(decay=0.999)},
    "neighbour, decay 0.99": lambda batches, size: {"transfer": NeighborTransfer(decay=0.99)},
}


def build(hidden: int, size: int, lr: float, arguments: dict[str, Any]) -> MT2OModule:
    """Return the module of one run."""
    accuracy = MulticlassAccuracy(10, average="micro")
    return MT2OModule(
        network=MultiHeadNetwork(MLP(100, [hidden]), {name: nn.Linear(hidden, 10) for name in ("left", "right")}),
        tasks=[Task(name, nn.CrossEntropyLoss(), accuracy) for name in ("left", "right")],
        preferences=simplex_lattice(num_tasks=2, num_divisions=size - 1),
        optimizer=partial(torch.optim.Adam, lr=lr),
        backend="vmap",
        **arguments,
    )


def main() -> None:
    """Run all methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=1500)
    parser.add_argument("--size", type=int, default=8, help="number of subproblems")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--methods", nargs="*", default=list(ALL))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/mt2o_digits.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    settings = {key: value for key, value in vars(options).items() if key in ("batches", "size", "hidden", "lr")}
    runs = compare(
        options.output,
        settings,
        build=partial(build, options.hidden, options.size, options.lr),
        data=lambda seed, factor: MultiDigitsDataModule(batch_size=128 * factor, seed=seed),
        variant="digits",
        methods={name: ALL[name] for name in options.methods},
        seeds=options.seeds,
        batches=options.batches,
        size=options.size,
        validations=30,
    )
    print(table(runs))


if __name__ == "__main__":
    main()
