from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from mtl_lightning.callbacks import HypervolumeCallback, ParetoFrontCallback

NAMES: dict[str, Any] = {"val/left": "min", "val/right": "min"}
HOOKS = ("validation_step", "on_validation_epoch_end")


def _reference_hypervolume(points: Tensor, reference: tuple[float, float]) -> float:
    """A sweep over two objectives: slices between neighbouring first coordinates."""
    area, lowest = 0.0, reference[1]
    for x, y in sorted(points.tolist()):
        if x < reference[0] and y < lowest:
            area += (reference[0] - x) * (lowest - y)
            lowest = y
    return area


def _expected(script: Tensor, reference: tuple[float, float]) -> tuple[list[float], list[float]]:
    """The hypervolume of each validation, and of all validations so far, of a script of shape (V, P, 2)."""
    script = script.double()
    latest = [_reference_hypervolume(points, reference) for points in script]
    archive = [_reference_hypervolume(script[: end + 1].flatten(0, 1), reference) for end in range(len(script))]
    return latest, archive


def _column(callback: HypervolumeCallback, key: str) -> list[float]:
    return [row[key] for row in callback.curve]


class Monitor(pl.Callback):
    """What a callback at the end of each training epoch, as a checkpoint, reads from the trainer."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.archive: list[float] = []
        self.progress: list[Any] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.values.append(trainer.callback_metrics["hypervolume"].item())
        self.archive.append(trainer.callback_metrics["hypervolume/archive"].item())
        self.progress.append(
            (trainer.progress_bar_metrics.get("hypervolume"), "hypervolume/archive" in trainer.progress_bar_metrics)
        )


def test_hypervolume_of_a_population_is_logged_and_written(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    script = torch.rand(4, 5, 2)
    latest, archive = _expected(script, (1.0, 0.9))
    callback, monitor = HypervolumeCallback((1.0, 0.9), dirpath=tmp_path), Monitor()
    make_trainer(callback, monitor, max_epochs=4).fit(population(script))
    assert _column(callback, "hypervolume") == pytest.approx(latest)
    assert _column(callback, "hypervolume/archive") == pytest.approx(archive)
    assert monitor.values == pytest.approx(latest)
    assert monitor.archive == pytest.approx(archive)
    assert [value for value, _ in monitor.progress] == pytest.approx(latest)
    assert not any(shown for _, shown in monitor.progress)
    with (tmp_path / "hypervolume.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == callback.curve
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 4), (1, 8), (2, 12), (3, 16)]
    assert (tmp_path / "hypervolume.png").stat().st_size > 1000
    described = json.loads((tmp_path / "hypervolume.json").read_text())
    assert described == {"reference_point": {"left": 1.0, "right": 0.9}}


@pytest.mark.parametrize("hook", HOOKS)
def test_hypervolume_of_any_module_is_never_an_epoch_late(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path, hook: str
) -> None:
    script = torch.rand(4, 2)
    latest, archive = _expected(script.unsqueeze(1), (1.0, 1.0))
    logger = pl.loggers.CSVLogger(tmp_path)
    callback, monitor = HypervolumeCallback((1.0, 1.0), NAMES), Monitor()
    make_trainer(callback, monitor, max_epochs=4, logger=logger).fit(single(script, hook))
    assert monitor.values == pytest.approx(latest)
    assert monitor.archive == pytest.approx(archive)
    assert [value for value, _ in monitor.progress] == pytest.approx(latest)
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        logged = [float(row["hypervolume"]) for row in csv.DictReader(file) if row["hypervolume"]]
    assert logged == pytest.approx(latest)


# The best value is that of the third validation; the last one is not reached.
PEAK = torch.tensor([[0.8, 0.8], [0.6, 0.6], [0.2, 0.2], [0.5, 0.5], [0.4, 0.4], [0.0, 0.0]])


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 2}])
@pytest.mark.parametrize("kind", ["population", *HOOKS])
def test_checkpoints_and_early_stopping_follow_the_hypervolume(
    population: Callable[..., Any],
    single: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Path,
    kind: str,
    options: dict[str, Any],
) -> None:
    module = population(PEAK.unsqueeze(1)) if kind == "population" else single(PEAK, kind)
    callback = HypervolumeCallback((1.0, 1.0), None if kind == "population" else NAMES)
    stopping = EarlyStopping("hypervolume", mode="max", patience=2)
    checkpoints = ModelCheckpoint(tmp_path, monitor="hypervolume", mode="max", save_top_k=1)
    make_trainer(callback, stopping, checkpoints, max_epochs=20, **options).fit(module)
    assert len(callback.curve) == 5  # the third was the best, and the two after it use up the patience
    best = torch.load(checkpoints.best_model_path, weights_only=True)
    assert best["state_dict"]["count"] == 3
    assert checkpoints.best_model_score is not None
    assert checkpoints.best_model_score.item() == pytest.approx(0.64)


def test_maximised_objectives_have_the_reference_point_in_their_own_units(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    script = torch.rand(2, 5, 2)
    mirrored = HypervolumeCallback((0.9, 0.2), {"left": "min", "accuracy/right": "max"}, name="mirrored")
    plain = HypervolumeCallback((0.9, 0.8))  # accuracy is 1 - loss
    make_trainer(mirrored, plain, max_epochs=2).fit(population(script))
    assert _column(mirrored, "mirrored") == pytest.approx(_column(plain, "hypervolume"))
    assert min(_column(plain, "hypervolume")) > 0.0


def test_default_reference_point_comes_from_the_first_validation(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    script = torch.tensor([[[1.0, 0.2], [2.0, 0.1]], [[50.0, 50.0], [1.0, 0.05]]])
    callback = HypervolumeCallback(objectives={"left": "min", "accuracy/right": "max"})
    assert callback.reference_point is None
    with caplog.at_level(logging.INFO):
        make_trainer(callback, max_epochs=2).fit(population(script))
    # The worst values are a loss of 2 and an accuracy of 0.8; the sanity check's zeros do not count.
    assert callback.reference_point == pytest.approx((2.2, 0.72))
    assert _column(callback, "hypervolume") == pytest.approx([1.2 * 0.08 + 0.2 * 0.1, 1.2 * 0.23])
    messages = [record.getMessage() for record in caplog.records if "reference point" in record.getMessage()]
    assert messages == ["The reference point of 'hypervolume' is left 2.2, accuracy/right 0.72."]


def test_reference_point_waits_for_a_finite_point(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    script = torch.ones(3, 2, 2)
    script[0] = float("nan")
    callback, monitor = HypervolumeCallback(), Monitor()
    with pytest.warns(UserWarning, match="left out"):
        make_trainer(callback, monitor).fit(population(script))
    assert callback.reference_point == pytest.approx((1.1, 1.1))
    assert monitor.values == pytest.approx([0.0, 0.01, 0.01])


def test_reference_point_that_no_point_reaches_is_reported_once(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    script = torch.tensor([[[0.25, 2.0], [3.0, 0.5]]]).repeat(3, 1, 1)
    callback = HypervolumeCallback((1.0, -1.0), {"left": "min", "accuracy/right": "max"})
    with pytest.warns(UserWarning, match="hypervolume is 0") as record:
        make_trainer(callback).fit(population(script + torch.tensor([0.0, 1.0])))
    messages = [str(warning.message) for warning in record if "hypervolume is 0" in str(warning.message)]
    assert len(messages) == 1
    assert "(left 1, accuracy/right -1)" in messages[0]
    assert "best values so far are left 0.25, accuracy/right -0.5" in messages[0]
    assert _column(callback, "hypervolume") == [0.0] * 3


def test_two_names_can_be_logged_side_by_side(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    callbacks = [HypervolumeCallback((1.0, 1.0), dirpath=tmp_path, name=name) for name in ("one", "other/two")]
    trainer = make_trainer(*callbacks, ModelCheckpoint(tmp_path))
    trainer.fit(population(torch.rand(3, 4, 2)))
    assert {"one", "one/archive", "other/two", "other/two/archive"} <= set(trainer.callback_metrics)
    assert {"one.csv", "other-two.csv"} == {path.name for path in tmp_path.glob("*.csv")}
    twins = [HypervolumeCallback((value, 1.0), {"left": "min", key: "max"}) for value, key in ((1.0, "a"), (2.0, "b"))]
    with pytest.raises(ValueError, match="should have a `name` of its own"):
        make_trainer(*twins).fit(population(torch.rand(3, 4, 2)))


def _module(kind: str, population: Callable[..., Any], single: Callable[..., Any]) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(3)
    if kind == "population":
        return population(torch.rand(8, 4, 2, generator=generator)), None
    return single(torch.rand(8, 2, generator=generator), kind), NAMES


@pytest.mark.parametrize("interval", [1.0, 2])
@pytest.mark.parametrize("kind", ["population", *HOOKS])
def test_resumed_run_equals_the_uninterrupted_one(
    population: Callable[..., Any],
    single: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Path,
    kind: str,
    interval: float,
) -> None:
    module, objectives = _module(kind, population, single)
    whole = HypervolumeCallback(objectives=objectives, dirpath=tmp_path / "whole")
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=interval == 1.0)
    make_trainer(whole, checkpoints, max_epochs=4, val_check_interval=interval).fit(module)
    middle = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))[1]

    module, objectives = _module(kind, population, single)
    resumed = HypervolumeCallback(objectives=objectives, dirpath=tmp_path / "resumed")
    make_trainer(resumed, max_epochs=4, val_check_interval=interval).fit(module, ckpt_path=middle)
    assert resumed.reference_point == whole.reference_point
    assert len(whole.curve) == (4 if interval == 1.0 else 8)
    assert resumed.curve == whole.curve
    for name in ("hypervolume.csv", "hypervolume.png"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_given_reference_point_wins_over_that_of_the_checkpoint() -> None:
    state = HypervolumeCallback((1.0, 1.0), NAMES).state_dict()
    other = HypervolumeCallback((2.0, 2.0), NAMES)
    with pytest.warns(UserWarning, match=r"with the reference point \(1.0, 1.0\); from here on it is \(2.0, 2.0\)"):
        other.load_state_dict(state)
    assert other.reference_point == (2.0, 2.0)


def test_state_of_other_objectives_is_refused() -> None:
    state = HypervolumeCallback((1.0, 1.0), {"a": "min", "b": "max"}).state_dict()
    with pytest.raises(ValueError, match="should be of the objectives"):
        HypervolumeCallback((1.0, 1.0), NAMES).load_state_dict(state)


def test_reference_point_of_another_length_is_refused_before_training(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    with pytest.raises(ValueError, match=r"should hold 2 values, one for each of \['val/left', 'val/right'\]. Found 3"):
        HypervolumeCallback((1.0, 1.0, 1.0), NAMES)
    module = population(torch.rand(3, 4, 2))
    with pytest.raises(ValueError, match=r"should hold 2 values, one for each of \['left', 'right'\]. Found 3"):
        make_trainer(HypervolumeCallback((1.0, 1.0, 1.0))).fit(module)
    assert module.weight == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_reference_point_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="`reference_point` should be finite"):
        HypervolumeCallback((1.0, bad))


def test_sanity_check_leaves_nothing(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Stop(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            raise KeyError("before training")

    callback = HypervolumeCallback(dirpath=tmp_path)
    with pytest.raises(KeyError, match="before training"):
        make_trainer(callback, Stop()).fit(population(torch.rand(3, 4, 2)))
    assert callback.curve == []
    assert callback.reference_point is None
    assert list(tmp_path.iterdir()) == []


def test_stopped_run_leaves_its_curve(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            raise KeyError("after one epoch")

    with pytest.raises(KeyError, match="after one epoch"):
        make_trainer(HypervolumeCallback(dirpath=tmp_path), Stop()).fit(population(torch.rand(3, 4, 2)))
    assert {path.name for path in tmp_path.iterdir()} == {f"hypervolume.{end}" for end in ("csv", "json", "png")}


def test_unwritable_folder_is_reported_before_training(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    module = population(torch.rand(3, 4, 2))
    with pytest.raises(OSError, match=r"file/folder' should be writable"):
        make_trainer(HypervolumeCallback(dirpath=tmp_path / "file" / "folder")).fit(module)
    assert module.weight == 0.0


def test_drawing_without_validations_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one validation"):
        HypervolumeCallback().figure()


def test_both_callbacks_share_a_folder_and_a_module(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    front, volume = ParetoFrontCallback(NAMES, figure_every=0), HypervolumeCallback(objectives=NAMES)
    make_trainer(front, volume).fit(single(torch.rand(3, 2), "on_validation_epoch_end"))
    expected = {"archive.csv", "front.csv", "front.png", "objectives.json"}
    expected |= {"hypervolume.csv", "hypervolume.json", "hypervolume.png"}
    assert {path.name for path in (tmp_path / "pareto_front").iterdir()} == expected


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("kind", ["population", *HOOKS])
def test_ranks_agree_and_only_rank_zero_writes(
    population: Callable[..., Any],
    single: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    class Report(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            report = {
                "curve": callback.curve,
                "reference": callback.reference_point,
                "logged": trainer.callback_metrics["hypervolume"].item(),
            }
            (tmp_path / f"rank-{trainer.global_rank}.json").write_text(json.dumps(report))

    replace = os.replace

    def recording(source: Any, target: Any) -> None:
        with (tmp_path / "writers").open("a") as file:
            file.write(f"{torch.distributed.get_rank()}\n")
        replace(source, target)

    monkeypatch.setattr("mtl_lightning.callbacks.output.os.replace", recording)
    module, objectives = _module(kind, population, single)
    script: Tensor = module.script.reshape(8, -1, 2)
    callback = HypervolumeCallback((1.0, 1.0), objectives, tmp_path / "front")
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    make_trainer(callback, Report(), devices=2, strategy=strategy).fit(module)
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert reports[0] == reports[1]
    latest, archive = _expected(script[:3], (1.0, 1.0))
    assert [row["hypervolume"] for row in reports[0]["curve"]] == pytest.approx(latest, rel=1e-5)
    assert [row["hypervolume/archive"] for row in reports[0]["curve"]] == pytest.approx(archive, rel=1e-5)
    assert reports[0]["logged"] == pytest.approx(latest[-1], rel=1e-5)
    assert set((tmp_path / "writers").read_text().split()) == {"0"}
