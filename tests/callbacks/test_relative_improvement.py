from __future__ import annotations

import csv
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from mtl_lightning.callbacks import RelativeImprovementCallback
from mtl_lightning.metrics import Baseline

BASELINES = {"val/left": Baseline(0.5, higher_is_better=False), "val/right": Baseline(0.25, higher_is_better=True)}
HOOKS = ("validation_step", "on_validation_epoch_end")


def _expected(script: Tensor) -> list[float]:
    """The improvement of each validation of a script, shape (V, 2)."""
    left, right = script.double().unbind(dim=1)
    return (50 * ((0.5 - left) / 0.5 + (right - 0.25) / 0.25)).tolist()


class Monitor(pl.Callback):
    """What a callback at the end of each training epoch reads from the trainer."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get("val_delta_m")
        self.values.append(float("-inf") if value is None else value.item())


@pytest.mark.parametrize("hook", HOOKS)
def test_improvement_is_logged_and_never_an_epoch_late(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path, hook: str
) -> None:
    script, monitor = torch.rand(4, 2), Monitor()
    logger = pl.loggers.CSVLogger(tmp_path)
    make_trainer(RelativeImprovementCallback(BASELINES), monitor, max_epochs=4, logger=logger).fit(single(script, hook))
    assert monitor.values == pytest.approx(_expected(script), rel=1e-5)
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        logged = [float(row["val_delta_m"]) for row in csv.DictReader(file) if row["val_delta_m"]]
    assert logged == pytest.approx(_expected(script), rel=1e-5)


@pytest.mark.parametrize("per", ["task", "metric"])
def test_baselines_come_from_a_file(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path, per: Literal["task", "metric"]
) -> None:
    path = tmp_path / "baselines.json"
    path.write_text(json.dumps({name: baseline._asdict() for name, baseline in BASELINES.items()}))
    script, monitor = torch.rand(2, 2), Monitor()
    make_trainer(RelativeImprovementCallback(path, per=per), monitor, max_epochs=2).fit(single(script, HOOKS[0]))
    assert monitor.values == pytest.approx(_expected(script), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 2}])
@pytest.mark.parametrize("hook", HOOKS)
def test_checkpoints_and_early_stopping_follow_the_improvement(
    single: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Path,
    hook: str,
    options: dict[str, Any],
) -> None:
    script = torch.tensor([[0.5, 0.1], [0.5, 0.2], [0.2, 0.4], [0.3, 0.3], [0.2, 0.3], [0.0, 1.0]])
    callback = RelativeImprovementCallback(BASELINES)
    stopping = EarlyStopping("val_delta_m", mode="max", patience=2)
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_delta_m", mode="max", save_top_k=1)
    make_trainer(callback, stopping, checkpoints, max_epochs=20, **options).fit(single(script, hook))
    best = torch.load(checkpoints.best_model_path, weights_only=True)
    assert best["state_dict"]["count"] == 3  # the last one is not reached
    assert checkpoints.best_model_score is not None
    assert checkpoints.best_model_score.item() == pytest.approx(60.0)


@pytest.mark.parametrize("hook", HOOKS)
def test_sanity_check_has_no_improvement(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], hook: str
) -> None:
    class Start(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert "val_delta_m" not in trainer.callback_metrics
            raise KeyError("before training")

    with pytest.raises(KeyError, match="before training"):
        make_trainer(RelativeImprovementCallback(BASELINES), Start()).fit(single(torch.rand(3, 2), hook))


@pytest.mark.parametrize("hook", HOOKS)
def test_validation_that_logs_nothing_new_keeps_the_last_value(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], hook: str
) -> None:
    script, monitor = torch.rand(3, 2), Monitor()
    script[1] = float("inf")  # not logged at all
    callback = RelativeImprovementCallback(BASELINES)
    with pytest.warns(UserWarning, match=r"did not log 'val/left', 'val/right', so it has no 'val_delta_m'"):
        make_trainer(callback, monitor).fit(single(script, hook))
    expected = _expected(script)
    assert monitor.values == pytest.approx([expected[0], expected[0], expected[2]], rel=1e-5)


def test_nan_is_not_hidden_behind_an_older_value(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    script, monitor = torch.rand(2, 2), Monitor()
    script[1, 0] = float("nan")
    make_trainer(RelativeImprovementCallback(BASELINES), monitor, max_epochs=2).fit(single(script, HOOKS[0]))
    assert monitor.values[1] != monitor.values[1]


@pytest.mark.parametrize("hook", HOOKS)
def test_metrics_that_are_never_logged_are_reported(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], hook: str
) -> None:
    callback = RelativeImprovementCallback(BASELINES | {"val/other": Baseline(1.0, higher_is_better=True)})
    with pytest.raises(ValueError, match="Found no 'val/other'"):
        make_trainer(callback).fit(single(torch.rand(3, 2), hook))


def test_missing_file_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="baselines should be in the file"):
        RelativeImprovementCallback(tmp_path / "missing.json")


def test_trainer_validate_has_an_improvement(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    script = torch.rand(2, 2)
    trainer = make_trainer(RelativeImprovementCallback(BASELINES))
    trainer.validate(single(script, HOOKS[1]), verbose=False)
    assert trainer.callback_metrics["val_delta_m"].item() == pytest.approx(_expected(script)[0], rel=1e-5)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("synchronised", [True, False])
def test_ranks_agree(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path, synchronised: bool
) -> None:
    class Report(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            value = trainer.callback_metrics["val_delta_m"].item()
            (tmp_path / f"rank-{trainer.global_rank}.json").write_text(json.dumps(value))

    module = single(torch.rand(2, 2), HOOKS[0])
    script = module.script
    if not synchronised:  # then the values of rank zero count
        module.synchronised = False
        script = script + 0.25
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    callback = RelativeImprovementCallback(BASELINES)
    make_trainer(callback, Report(), max_epochs=2, devices=2, strategy=strategy).fit(module)
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert reports[0] == reports[1] == pytest.approx(_expected(script)[1], rel=1e-5)


def test_both_conventions_can_be_logged_side_by_side(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    baselines = {"val/left": Baseline(0.5, higher_is_better=False)}
    callbacks = RelativeImprovementCallback(BASELINES), RelativeImprovementCallback(baselines, name="val_delta_left")
    trainer = make_trainer(*callbacks, max_epochs=1)
    trainer.fit(single(torch.tensor([[0.25, 0.5]]), HOOKS[0]))
    assert trainer.callback_metrics["val_delta_m"].item() == pytest.approx(75.0)
    assert trainer.callback_metrics["val_delta_left"].item() == pytest.approx(50.0)
