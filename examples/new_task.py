"""Subclass a module for batches and losses of your own.

    python examples/new_task.py

The data are pictures of digits, and a batch is what an existing project may have: a tuple of three tensors. The tasks
are the class of a digit and how much ink it takes, and the loss of the second one reads both predictions: the ink
should also agree with what the predicted classes take on average. That makes two overrides.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy

from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.task import Task


class DigitsModule(TaskGroupModule):
    """Two tasks on digits; any other module of this library is subclassed in the same way."""

    def __init__(self, ink_of_class: Tensor, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("ink_of_class", ink_of_class)

    def unpack_batch(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Turn a batch of the project into inputs and targets by task."""
        images, labels, ink = batch
        return images, {"digit": labels, "ink": ink}

    def task_losses(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of each task in `targets`, those that have labels in the batch."""
        losses = super().task_losses(outputs, targets)  # of each prediction and its target, as `Task` says
        if "ink" in targets:
            expected = outputs["digit"].softmax(dim=1) @ self.ink_of_class
            losses["ink"] = losses["ink"] + 0.1 * nn.functional.l1_loss(outputs["ink"].squeeze(1), expected)
        return losses


def main() -> None:
    """Train, and print what was learned and which tasks were updated together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target).long()
    ink = images.mean(dim=(1, 2)).unsqueeze(1) * 10
    dataset = TensorDataset(images, labels, ink)
    train, val = torch.utils.data.random_split(dataset, [1400, 397], torch.Generator().manual_seed(0))
    known = torch.tensor(train.indices)
    ink_of_class = torch.stack([ink[known][labels[known] == label].mean() for label in range(10)])

    module = DigitsModule(
        ink_of_class,
        network=MultiHeadNetwork(MLP(64, [64]), {"digit": nn.Linear(64, 10), "ink": nn.Linear(64, 1)}),
        tasks=[
            Task("digit", nn.CrossEntropyLoss(), MulticlassAccuracy(10, average="micro")),
            Task("ink", nn.MSELoss(), MeanAbsoluteError()),
        ],
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        warmup_batches=20,  # first each task is alone, so that their affinity is measured
    )
    trainer = Trainer(
        max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=256))

    metrics = trainer.callback_metrics
    print(f"digits read: {metrics['val_accuracy/digit']:.1%}")
    print(f"mean absolute error of the ink: {metrics['val_mean_absolute_error/ink']:.3f}, deviation {ink.std():.3f}")
    print("groups of the last update:", module.task_groups)


if __name__ == "__main__":
    main()
