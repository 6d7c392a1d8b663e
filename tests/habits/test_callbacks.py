"""Callbacks of Lightning, each with every module."""

from __future__ import annotations

import copy
import csv
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_summary.model_summary import summarize
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader

from mtl_lightning.callbacks import HypervolumeCallback
from mtl_lightning.growth import Doubling
from mtl_lightning.modules import MultiTaskModule, PopulationModule, habits
from mtl_lightning.networks import ParetoManifold
from tests.habits.common import MODULES, NUM_BATCHES, every_module, objectives, train_loader, val_loader
from tests.modules.common import Pairs, network, trainer

WeightAveraging: Any = getattr(lightning_callbacks, "WeightAveraging", None)
needs_averaging = pytest.mark.skipif(WeightAveraging is None, reason="Lightning 2.5 has no WeightAveraging")


def parameters(module: LightningModule) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


class Watch(Callback):
    """Remembers the parameters at the start of every epoch and after every step, and the learning rates."""

    def __init__(self) -> None:
        self.at_epochs: list[list[Tensor]] = []
        self.after_steps: list[list[Tensor]] = []
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.at_epochs.append(parameters(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.after_steps.append(parameters(pl_module))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


checked_module = pytest.mark.parametrize("name", MODULES)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What Lightning and this package write to the log; what a run of before was told is told again."""
    monkeypatch.setattr(habits, "_told", set())
    caplog.set_level("INFO")
    return caplog


# ------------------------------------------------------------------------------------------------------ ModelCheckpoint


@every_module
def test_the_checkpoint_of_the_largest_hypervolume_is_kept_and_found_again(name: str, tmp_path: Path) -> None:
    volume = HypervolumeCallback((20.0, 20.0), **objectives(name), dirpath=tmp_path / "front")
    best = ModelCheckpoint(tmp_path / "best", monitor="hypervolume", mode="max", save_top_k=1)
    # Once it climbs instead of descending, the last epoch is no longer the best one.
    climb = partial(LambdaLR, lr_lambda=lambda epoch: 1.0 if epoch < 2 else -0.2)
    module = MODULES[name](lr_scheduler=climb)
    trainer([volume, best], max_epochs=4, enable_checkpointing=True).fit(module, train_loader(), val_loader())
    values = [row["hypervolume"] for row in volume.curve]
    assert len(values) == 4
    assert max(values) > max(values[-1], 0.0)
    assert best.best_model_score is not None
    assert float(best.best_model_score) == pytest.approx(max(values), rel=1e-6)

    again = HypervolumeCallback((20.0, 20.0), **objectives(name), dirpath=tmp_path / "again")
    trainer([again]).validate(MODULES[name](), val_loader(), ckpt_path=best.best_model_path, verbose=False)
    assert again.curve[-1]["hypervolume"] == pytest.approx(max(values), rel=1e-6)


@every_module
def test_checkpoints_come_every_so_many_steps(name: str, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    run = trainer([saved], max_epochs=2, enable_checkpointing=True)
    run.fit(MODULES[name](), train_loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=4.ckpt", "step=8.ckpt"]


@needs_averaging  # of the same release
@checked_module
def test_nobody_is_told_to_save_the_state_before_the_step(name: str, tmp_path: Path) -> None:
    """What is saved is the state after the step, as in Lightning's automatic optimisation."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer([ModelCheckpoint(tmp_path, every_n_train_steps=4)], enable_checkpointing=True)
        run.fit(MODULES[name](), train_loader())
    assert not [str(warning.message) for warning in caught if "pre-optimization" in str(warning.message)]


@every_module
def test_checkpoints_count_updates_when_batches_are_accumulated(name: str, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer([saved], max_epochs=2, enable_checkpointing=True)
    run.fit(MODULES[name](accumulate_batches=2), train_loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]


@checked_module
def test_it_is_told_once_that_checkpoints_by_the_clock_are_not_written(
    name: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        saved = ModelCheckpoint(tmp_path, train_time_interval=timedelta(0), save_top_k=-1)
        trainer([saved], enable_checkpointing=True).fit(MODULES[name](), train_loader())
    assert not list(tmp_path.iterdir())  # if this fails, Lightning writes them, and nothing is to be told
    assert log.text.count("`ModelCheckpoint(train_time_interval=...)` saves nothing") == 1


@checked_module
def test_it_is_told_once_what_counts_batches_when_they_are_accumulated(
    name: str, log: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        run = trainer()
        run.fit(MODULES[name](accumulate_batches=2), train_loader())
    assert log.text.count("With `accumulate_batches`") == 1
    assert (run.global_step, run.estimated_stepping_batches) == (3, NUM_BATCHES)


def test_task_groups_tell_once_what_global_step_counts(log: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        trainer().fit(MODULES["TaskGroupModule"](), train_loader())
    assert log.text.count("counts updates of all groups") == 1


@checked_module
def test_accumulation_by_a_callback_is_refused_by_the_name_of_ours(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"{name}\(accumulate_batches=...\)"):
        trainer([GradientAccumulationScheduler({0: 2})]).fit(MODULES[name](), train_loader())


# ----------------------------------------------------------------------------------------- EarlyStopping, learning rate


@every_module
@pytest.mark.parametrize("interval", [1.0, 0.4])
def test_early_stopping_on_the_hypervolume_waits_for_its_patience(name: str, interval: float, tmp_path: Path) -> None:
    volume = HypervolumeCallback((20.0, 20.0), **objectives(name), dirpath=tmp_path)
    # Nothing improves by so much, so the first validation stays the best.
    stop = EarlyStopping("hypervolume", mode="max", min_delta=1e9, patience=2)
    run = trainer([volume, stop], max_epochs=10, val_check_interval=interval)
    run.fit(MODULES[name](), train_loader(), val_loader())
    assert len(volume.curve) == 3
    assert volume.curve[-1]["step"] == run.global_step == (15 if interval == 1.0 else 7)


@every_module
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_learning_rate_that_is_monitored_is_the_one_of_the_schedule(
    name: str, interval: str, tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer([LearningRateMonitor()], max_epochs=3, logger=logger, log_every_n_steps=1, default_root_dir=tmp_path)
    schedule = partial(StepLR, step_size=1, gamma=0.5)
    run.fit(MODULES[name](lr_scheduler=schedule, lr_scheduler_interval=interval), train_loader())
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rates = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    count = 3 if interval == "epoch" else 3 * NUM_BATCHES
    assert rates == pytest.approx([0.05 * 0.5**index for index in range(count)])


# -------------------------------------------------------------------------------------------------- averages of weights


@every_module
def test_stochastic_weight_averaging_ends_with_the_mean_over_epochs(name: str) -> None:
    watch = Watch()
    average = StochasticWeightAveraging(
        swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1, annealing_strategy="linear"
    )
    run = trainer([watch, average], max_epochs=4)
    module = MODULES[name]()
    run.fit(module, train_loader(), val_loader())
    # Lightning takes the parameters in at the start of the second, third and fourth epoch.
    for found, *taken in zip(parameters(module), *watch.at_epochs[1:], strict=True):
        assert torch.allclose(found, torch.stack(taken).mean(dim=0), rtol=1e-5, atol=1e-6)
    assert watch.rates[0] == 0.05
    assert watch.rates[-1] == pytest.approx(0.01)


def _with_batch_norm(name: str) -> MultiTaskModule:
    plain = network(dropout=0.1)
    return MODULES[name](network=ParetoManifold(plain, num_tasks=2) if name == "ParetoSetModule" else plain)


@checked_module
def test_stochastic_weight_averaging_is_refused_with_batch_normalisation(name: str) -> None:
    """It would go on training in the epoch in which it computes the statistics."""
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    with pytest.raises(MisconfigurationException, match=r"batch normalisation\. Take `WeightAveraging`"):
        trainer([average], max_epochs=2).fit(_with_batch_norm(name), train_loader())


def test_averages_of_a_population_that_grows_are_refused() -> None:
    module = MODULES["MT2OModule"](growth=Doubling(every_n_batches=2))
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    with pytest.raises(MisconfigurationException, match="Found `growth`"):
        trainer([average], max_epochs=2).fit(module, train_loader())


@needs_averaging
@pytest.mark.parametrize(
    "name",
    MODULES,
)
def test_the_mean_of_weights_over_steps_is_that_of_the_steps(name: str) -> None:
    watch, average = Watch(), WeightAveraging()
    module = MODULES[name]()
    trainer([watch, average], max_epochs=2).fit(module, train_loader(), val_loader())
    for found, *taken in zip(parameters(module), *watch.after_steps, strict=True):
        assert torch.allclose(found, torch.stack(taken).mean(dim=0), rtol=1e-5, atol=1e-6)


@needs_averaging
@every_module
def test_a_moving_average_of_weights_is_that_of_the_steps(name: str) -> None:
    watch = Watch()
    average = WeightAveraging(avg_fn=lambda average, current, count: 0.8 * average + 0.2 * current)
    module = MODULES[name]()
    run = trainer([watch, average], max_epochs=2)
    run.fit(module, train_loader(), val_loader())
    validated = float(run.callback_metrics["val_loss"])
    assert len(watch.after_steps) == 2 * NUM_BATCHES
    expected = copy.deepcopy(watch.after_steps[0])
    for step in watch.after_steps[1:]:
        expected = [0.8 * average + 0.2 * current for average, current in zip(expected, step, strict=True)]
    for found, wanted in zip(parameters(module), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert trainer().validate(module, val_loader(), verbose=False)[0]["val_loss"] == pytest.approx(validated, rel=1e-5)


@needs_averaging
@every_module
def test_a_run_with_a_moving_average_is_resumed_exactly(name: str, tmp_path: Path) -> None:
    def run(**arguments: Any) -> Any:
        return trainer(
            [WeightAveraging(avg_fn=lambda average, current, count: 0.8 * average + 0.2 * current)], **arguments
        )

    loader = DataLoader(Pairs(8 * NUM_BATCHES), batch_size=8)
    whole, first, second = (MODULES[name](optimizer=partial(torch.optim.Adam, lr=0.01)) for _ in range(3))
    seed_everything(0, verbose=False)
    run(max_epochs=2).fit(whole, loader)
    seed_everything(0, verbose=False)
    begun = run(max_epochs=1)
    saved = ModelCheckpoint(tmp_path)
    begun.callbacks.append(saved)
    begun.fit(first, loader)
    run(max_epochs=2).fit(second, loader, ckpt_path=saved.best_model_path)
    for found, expected in zip(parameters(second), parameters(whole), strict=True):
        assert torch.equal(found, expected)


# --------------------------------------------------------------------------------------------------------- ModelSummary


@every_module
@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary], ids=lambda kind: kind.__name__)
def test_the_summary_counts_every_parameter_once(
    name: str, kind: type[ModelSummary], capsys: pytest.CaptureFixture[str], log: pytest.LogCaptureFixture
) -> None:
    if kind is RichModelSummary:
        pytest.importorskip("rich")
    module = MODULES[name]()
    summary = summarize(module, max_depth=2)
    one = sum(parameter.numel() for parameter in network().parameters())
    if isinstance(module, PopulationModule):
        # Every tensor of a row begins at a multiple of 16 numbers; what lies between is counted.
        assert summary.total_parameters == module.population.theta.numel() >= 3 * one
    else:
        assert summary.total_parameters == (2 * one if name == "ParetoSetModule" else one)  # a manifold has T networks
    assert summary.trainable_parameters == summary.total_parameters
    trainer([kind(max_depth=2)], enable_model_summary=True, max_steps=1).fit(module, train_loader())
    assert "Trainable params" in "".join(capsys.readouterr()) + log.text
