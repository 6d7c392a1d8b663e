"""A training script as a user would write it, for the launchers: ``program.py STRATEGY DEVICES NODES OUTPUT``."""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from mtl_lightning.datamodules import MultiDigitsDataModule
from mtl_lightning.growth import Doubling
from mtl_lightning.modules import MT2OModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.strategies import PopulationParallelStrategy
from mtl_lightning.task import Task


def main(strategy: str, devices: int, nodes: int, output: str) -> None:
    """Train five models of two digits, and let the first process write them and their validation losses."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    module = MT2OModule(
        network=MultiHeadNetwork(MLP(100, [16]), {"left": nn.Linear(16, 10), "right": nn.Linear(16, 10)}),
        tasks=[Task("left", nn.CrossEntropyLoss()), Task("right", nn.CrossEntropyLoss())],
        preferences=simplex_lattice(num_tasks=2, num_divisions=4),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        growth=Doubling(every_n_batches=3),
        backend="loop",
    )
    made: Any = "auto"
    started: dict[str, Any] = {"process_group_backend": "gloo", "timeout": timedelta(seconds=60)}
    if strategy == "ddp":
        made = DDPStrategy(**started)
    elif strategy == "population":
        made = PopulationParallelStrategy(**started)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=made,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch_size = 32 // (devices * nodes) if strategy == "ddp" else 32
    data = MultiDigitsDataModule(num_train=160, num_val=96, num_test=32, batch_size=batch_size)
    trainer.fit(module, datamodule=data)
    values = module.objective_values
    if trainer.is_global_zero:
        torch.save({"theta": module.population.theta.detach(), "values": values}, output)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
