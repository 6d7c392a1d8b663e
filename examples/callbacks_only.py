"""Attach the callbacks to a LightningModule that knows nothing of this library.

    python examples/callbacks_only.py

`Digits` is any project's module. It logs two things that pull in different directions: the loss, and how many weights
are as good as zero. Every validation is a point of these two; the callbacks keep the points that no other one beats in
both.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mtl_lightning.callbacks import HypervolumeCallback, ParetoFrontCallback


class Digits(LightningModule):
    """Classifies digits by ever fewer weights: automatic optimisation, nothing of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss with a price on every weight, which rises from the fifth epoch on."""
        images, labels = batch
        size = sum(weight.abs().sum() for weight in self.network.parameters())
        price = 4e-4 * max(self.current_epoch - 4, 0)
        return nn.functional.cross_entropy(self.network(images), labels) + price * size

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log both sides."""
        images, labels = batch
        weights = torch.cat([weight.flatten() for weight in self.network.parameters()])
        self.log("val_loss", nn.functional.cross_entropy(self.network(images), labels), prog_bar=True)
        self.log("val_sparsity", (weights.abs() < 0.01).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main() -> None:
    """Train, and print the points that no other one beats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("runs/callbacks_only"))
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    digits = load_digits()
    dataset = TensorDataset(torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target).long())
    train, val = torch.utils.data.random_split(dataset, [1400, 397], torch.Generator().manual_seed(0))

    objectives = {"val_loss": "min", "val_sparsity": "max"}
    front = ParetoFrontCallback(objectives, dirpath=options.output, figure_every=0)
    # A loss above 1 or no sparsity at all is of no interest: that corner is the reference point.
    volume = HypervolumeCallback((1.0, 0.0), objectives, dirpath=options.output)
    # They are metrics like any other, so that Lightning's own callbacks can follow them.
    best = ModelCheckpoint(
        options.output, "best", monitor="hypervolume/archive", mode="max", enable_version_counter=False
    )
    stop = EarlyStopping("hypervolume/archive", mode="max", patience=5)
    trainer = Trainer(
        max_epochs=options.epochs, callbacks=[front, volume, best, stop], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Digits(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=397))

    print("epoch   loss  sparsity")
    for row in front.archive:
        if row["nondominated"]:
            print(f"{row['epoch']:5d}  {row['val_loss']:5.3f}  {row['val_sparsity']:8.3f}")
    print(f"hypervolume of all points: {best.best_model_score:.3f}; figures are in {options.output}")


if __name__ == "__main__":
    main()
