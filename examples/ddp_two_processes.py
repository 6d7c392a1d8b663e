"""Train on two processes with DDP; on a cluster it is the same with more `devices` and `num_nodes`.

    python examples/ddp_two_processes.py
    python examples/ddp_two_processes.py --devices 1

Both print the same numbers: the batch is divided between the processes, and everything that decides, gradients, losses
and with them the groups of tasks, is that of the whole batch.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from mtl_lightning.datamodules import MultiDigitsDataModule
from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.task import Task


def main() -> None:
    """Train, and print losses and affinity from the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="number of processes")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    module = TaskGroupModule(
        network=MultiHeadNetwork(MLP(100, [32]), {"left": nn.Linear(32, 10), "right": nn.Linear(32, 10)}),
        tasks=[Task("left", nn.CrossEntropyLoss()), Task("right", nn.CrossEntropyLoss())],
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        warmup_batches=10,
    )
    # Batches of 64 pairs in all. Sizes that can be divided, so that no process has to see a pair twice.
    datamodule = MultiDigitsDataModule(num_train=2048, num_val=512, batch_size=64 // options.devices)
    trainer = Trainer(
        strategy="ddp" if options.devices > 1 else "auto", devices=options.devices, accelerator="cpu",
        max_epochs=options.epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule)

    if trainer.is_global_zero:
        losses = {name: f"{trainer.callback_metrics[f'val_loss/{name}']:.4f}" for name in module.task_names}
        print(f"{trainer.world_size} process(es), {trainer.global_step} steps of 64 pairs")
        print("validation losses:", losses)
        print("affinity:", [[f"{value:.4f}" for value in row] for row in module.affinity_matrix])


if __name__ == "__main__":
    main()
