"""Loggers with every module: scalars and figures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from mtl_lightning.callbacks import AffinityCallback, HypervolumeCallback, ParetoFrontCallback
from tests.habits.common import MODULES, every_module, objectives, train_loader, val_loader
from tests.modules.common import trainer

SCALARS = {"train_loss", "train_loss/a", "val_loss", "val_loss/b", "val_mean_absolute_error/a", "hypervolume"}


def _train(name: str, logger: Any, folder: Path) -> set[str]:
    """Train two epochs; return the names of the figures that are due."""
    callbacks: list[Any] = [
        ParetoFrontCallback(**objectives(name)),
        HypervolumeCallback((20.0, 20.0), **objectives(name)),
    ]
    if name == "TaskGroupModule":
        callbacks.append(AffinityCallback())
    run = trainer(callbacks, max_epochs=2, logger=logger, log_every_n_steps=1, default_root_dir=folder)
    run.fit(MODULES[name](), train_loader(), val_loader())
    return {"pareto_front"}


@every_module
def test_csv_takes_scalars(name: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    _train(name, logger, tmp_path)
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= SCALARS
    for key in SCALARS:
        values = [float(row[key]) for row in rows if row[key]]
        assert len(values) == (10 if key.startswith("train") else 2), key
    assert {int(row["step"]) for row in rows if row["hypervolume"]} == {4, 9}  # the steps begin at zero


@every_module
def test_tensorboard_takes_scalars_and_figures(name: str, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    figures = _train(name, logger, tmp_path)
    logger.experiment.flush()
    events = accumulator.EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) >= SCALARS
    assert set(events.Tags()["images"]) >= figures
    assert [event.step for event in events.Scalars("hypervolume")] == [4, 9]
    assert len(events.Images("pareto_front")) == 2


@every_module
def test_wandb_takes_scalars_and_figures_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    figures = _train(name, logger, tmp_path)
    run = logger.experiment
    summary = dict(run.summary)
    wandb.finish()
    assert set(summary) >= SCALARS | figures
    pictures = list((tmp_path / "wandb").rglob("media/images/*.png"))
    assert {path.name.rsplit("_", 2)[0] for path in pictures} >= figures
