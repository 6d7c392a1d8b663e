"""MT2O on a table with two targets: the heating and the cooling load of buildings (Energy efficiency, UCI).

    python examples/mt2o_tabular.py

One run gives seven models, from all for the heating load to all for the cooling load. The table is in the package.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from mtl_lightning.callbacks import HypervolumeCallback, ParetoFrontCallback
from mtl_lightning.datamodules import MultiTargetDataModule
from mtl_lightning.datamodules.multi_target import multi_target_tasks
from mtl_lightning.growth import Doubling
from mtl_lightning.modules import MT2OModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.transfer import NeighborTransfer


def main() -> None:
    """Train seven models at once, test the best front, and print a table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/mt2o_tabular"))
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    datamodule = MultiTargetDataModule(name="enb", batch_size=64)
    datamodule.setup()
    names = datamodule.target_names  # Y1 is the heating load, Y2 the cooling load, both in kWh/m2
    module = MT2OModule(
        network=MultiHeadNetwork(MLP(datamodule.num_features, [4]), {name: nn.Linear(4, 1) for name in names}),
        tasks=multi_target_tasks(names, datamodule.target_scales),
        preferences=simplex_lattice(num_tasks=2, num_divisions=6),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        transfer=NeighborTransfer(),
        # One model at first, then two, four and seven: while they hardly differ, one does the work of all.
        growth=Doubling(every_n_batches=64),
        backend="vmap",
    )
    best = ModelCheckpoint(options.output, "best", monitor="hypervolume", mode="max", enable_version_counter=False)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=[
            ParetoFrontCallback(dirpath=options.output, figure_every=0),
            HypervolumeCallback(reference_point=(1.0, 1.0), dirpath=options.output),
            best,
        ],
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule)
    trainer.test(module, datamodule=datamodule, ckpt_path="best", verbose=False)

    print("preference   mean absolute error in kWh/m2")
    print("for heating  heating  cooling")
    errors = [module.metric_values[f"absolute_error/{name}"] for name in names]
    for preference, heating, cooling in zip(module.preferences[:, 0], *errors, strict=True):
        print(f"{preference:11.2f}  {heating:7.2f}  {cooling:7.2f}")
    print(f"best hypervolume in validation: {best.best_model_score:.4f}; figures are in {options.output}")


if __name__ == "__main__":
    main()
