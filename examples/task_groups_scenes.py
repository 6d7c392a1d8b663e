"""Selective task group updates on rendered rooms: five dense tasks of one network, grouped while it is trained.

    python examples/task_groups_scenes.py

The rooms are rendered on the spot. From 100 of them little is learned; `--rooms 1500 --epochs 8` takes minutes.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from mtl_lightning.callbacks import AffinityCallback, TaskGroupCallback
from mtl_lightning.datamodules import ScenesDataModule
from mtl_lightning.datamodules.scene_tasks import scene_tasks
from mtl_lightning.datamodules.scenes import SCENE_TASKS
from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.networks import DenseHead, EncoderDecoder, MultiHeadNetwork


def main() -> None:
    """Train, and print the affinity from task to task and the groups of the last update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/task_groups_scenes"))
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    names = ["semseg", "depth_zbuffer", "normal", "edge_texture", "keypoints2d"]
    module = TaskGroupModule(
        network=MultiHeadNetwork(
            EncoderDecoder(channels=[8, 16]), {name: DenseHead(8, SCENE_TASKS[name].channels) for name in names}
        ),
        tasks=scene_tasks(names),
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        affinity_decay=0.05,
        warmup_batches=10,  # first every task is alone, so that the affinity of all pairs is measured
    )
    rooms = max(options.rooms // 4, 1)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=[
            AffinityCallback(dirpath=options.output / "affinity"),
            TaskGroupCallback(dirpath=options.output / "groups"),
        ],
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    datamodule = ScenesDataModule(
        tasks=names, size=32, num_train=options.rooms, num_val=rooms, num_test=0, batch_size=10, cache_dir=None
    )
    trainer.fit(module, datamodule=datamodule)

    print("affinity in 1e-3: what a step for the task of the row does to the loss of the column")
    print(" " * 14 + " ".join(f"{name:>13}" for name in names))
    for name, row in zip(names, module.affinity_matrix, strict=True):
        print(f"{name:13} " + " ".join(f"{1e3 * value:13.2f}" for value in row))
    print("groups of the last update:", module.task_groups)
    print(f"tables and figures are in {options.output}")


if __name__ == "__main__":
    main()
