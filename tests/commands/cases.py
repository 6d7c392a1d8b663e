"""Comparisons small enough for tests, and what they name by class."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from mtl_lightning.datamodules import MultiDigitsDataModule
from mtl_lightning.modules import MT2OModule, WeightedModule


class WatchedDigits(MultiDigitsDataModule):
    """Two digits whose test labels are shifted, and whose test split is refused until the training is done.

    Args:
        trained: The file that says that the training is done.
        shift: By how much the labels of the test are wrong.
    """

    def __init__(self, trained: str, shift: int) -> None:
        super().__init__(num_train=512, num_val=128, num_test=128, batch_size=64)
        self.trained = trained
        self.shift = shift

    def test_dataloader(self) -> DataLoader[Any]:
        assert Path(self.trained).exists()
        loader = super().test_dataloader()
        assert isinstance(loader, DataLoader)
        collate = loader.collate_fn

        def shifted(samples: Any) -> Any:
            images, labels = collate(samples)
            return images, {name: (label + self.shift) % 10 for name, label in labels.items()}

        return DataLoader(loader.dataset, batch_size=64, collate_fn=shifted)


class OnePerTask(WeightedModule):
    """Takes the gradient of each task by ``torch.autograd.grad`` before the step."""

    def own_losses(self, outputs: Any, part: Any) -> dict[int, Tensor]:
        own = super().own_losses(outputs, part)
        first = next(self.network.parameters())
        for loss in own.values():
            torch.autograd.grad(loss, first, retain_graph=True)
        return own


class Held(MT2OModule):
    """Waits at the start of the second epoch, to be killed there, where the environment has ``HOLD``."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == 1 and "HOLD" in os.environ:
            time.sleep(3600)


class Failing(WeightedModule):
    """Fails in its first batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise ValueError("this method\ncannot be trained")


NETWORK = {
    "class_path": "mtl_lightning.networks.MultiHeadNetwork",
    "init_args": {
        "encoder": {
            "class_path": "mtl_lightning.networks.MLP",
            "init_args": {"in_features": 100, "hidden_features": [8]},
        },
        "heads": {
            name: {"class_path": "torch.nn.Linear", "init_args": {"in_features": 8, "out_features": 10}}
            for name in ("left", "right")
        },
    },
}
TASKS = [
    {
        "name": name,
        "loss": "torch.nn.CrossEntropyLoss",
        "metrics": {
            "class_path": "torchmetrics.classification.MulticlassAccuracy",
            "init_args": {"num_classes": 10, "average": "micro"},
        },
    }
    for name in ("left", "right")
]
JOINT = {"model": {"class_path": "mtl_lightning.modules.WeightedModule"}}
FRONT = {
    "model": {
        "class_path": "mtl_lightning.modules.MT2OModule",
        "init_args": {"preferences": [[0.8, 0.2], [0.5, 0.5], [0.2, 0.8]], "backend": "loop"},
    }
}


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the content of a configuration with some keys changed; those that are None are left out."""
    whole = {
        "output": str(folder / "runs"),
        "title": "digits",
        "seeds": [0],
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
        "data": {
            "class_path": "mtl_lightning.datamodules.MultiDigitsDataModule",
            "init_args": {"num_train": 256, "num_val": 64, "num_test": 64, "batch_size": 64},
        },
        "shared": {
            "network": NETWORK,
            "tasks": TASKS,
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
        },
        "methods": {"joint": JOINT, "front": FRONT},
        "metrics": {"accuracy/left": True, "loss/right": False},
        "reference_point": [3.0, 3.0],
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


def write(folder: Path, **changes: Any) -> Path:
    """Write a configuration and return its path."""
    path = folder / "digits.yaml"
    path.write_text(yaml.safe_dump(content(folder, **changes), sort_keys=False))
    return path
