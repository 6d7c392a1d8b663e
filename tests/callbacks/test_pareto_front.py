from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from matplotlib import pyplot
from PIL import Image
from torch import Tensor

from mtl_lightning.callbacks import ParetoFrontCallback
from mtl_lightning.callbacks.pareto_front import _staircase

NAMES: dict[str, Any] = {"val/left": "min", "val/right": "min"}
HOOKS = ("validation_step", "on_validation_epoch_end")


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return [
            {key: value == "True" if key == "nondominated" else float(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def test_archive_of_a_population(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    script = torch.tensor([[[4.0, 1.0], [1.0, 4.0]], [[3.0, 1.0], [2.0, 5.0]]])
    callback = ParetoFrontCallback(dirpath=tmp_path)
    make_trainer(callback, max_epochs=2).fit(population(script))
    columns = ["epoch", "step", "logged_step", "subproblem", "preference/left", "preference/right", "left", "right"]
    columns += ["accuracy/left", "accuracy/right", "nondominated"]
    expected = [
        [0, 4, 3, 0, 0.0, 1.0, 4.0, 1.0, -3.0, 0.0, False],
        [0, 4, 3, 1, 1.0, 0.0, 1.0, 4.0, 0.0, -3.0, True],
        [1, 8, 7, 0, 0.0, 1.0, 3.0, 1.0, -2.0, 0.0, True],
        [1, 8, 7, 1, 1.0, 0.0, 2.0, 5.0, -1.0, -4.0, False],
    ]
    assert callback.archive == [dict(zip(columns, row, strict=True)) for row in expected]
    assert callback.front == callback.archive[1:3]
    assert list(callback.archive[0]) == columns
    assert _read(tmp_path / "archive.csv") == callback.archive
    assert _read(tmp_path / "front.csv") == callback.front
    assert json.loads((tmp_path / "objectives.json").read_text()) == {"left": "min", "right": "min"}


def test_the_archive_tells_the_losses_of_other_objectives_and_skips_a_failed_model(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    script = torch.tensor([[[0.5, 0.25], [torch.nan, 0.5], [0.25, 0.5]]])
    callback = ParetoFrontCallback({"accuracy/left": "max", "accuracy/right": "max"}, dirpath=tmp_path)
    with pytest.warns(UserWarning, match=r"subproblems \[1\]"):
        make_trainer(callback, max_epochs=1).fit(population(script))
    keys = ("subproblem", "accuracy/left", "left", "right")
    assert [[row[key] for key in keys] for row in callback.archive] == [[0, 0.5, 0.5, 0.25], [2, 0.75, 0.25, 0.5]]
    assert json.loads((tmp_path / "objectives.json").read_text()) == callback.objectives


@pytest.mark.parametrize("hook", HOOKS)
def test_front_over_epochs_of_any_module(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path, hook: str
) -> None:
    script = torch.tensor([[0.25, 0.25], [0.5, 0.5], [0.75, 0.75], [0.5, 1.0]])
    callback = ParetoFrontCallback({"val/left": "min", "val/right": "max"}, tmp_path)
    make_trainer(callback, max_epochs=4).fit(single(script, hook))
    keys = ("epoch", "step", "val/left", "val/right", "nondominated")
    assert [[row[key] for key in keys] for row in callback.archive] == [
        [0, 4, 0.25, 0.25, True],
        [1, 8, 0.5, 0.5, False],
        [2, 12, 0.75, 0.75, False],
        [3, 16, 0.5, 1.0, True],
    ]
    assert _read(tmp_path / "front.csv") == [callback.archive[0], callback.archive[3]]


@pytest.mark.parametrize("num_objectives", [2, 3, 5])
def test_figures_are_written(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path, num_objectives: int
) -> None:
    callback = ParetoFrontCallback(dirpath=tmp_path)
    make_trainer(callback, max_epochs=2).fit(population(torch.rand(2, 4, num_objectives)))
    expected = {"front-epoch=000-step=000004.png", "front-epoch=001-step=000008.png", "front.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == expected
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in sorted(expected)]
    assert all(picture.std() > 5 for picture in pictures)  # not blank
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[1], pictures[2])  # nothing was validated after the last epoch
    labels = {axis.get_label_text() for axes in callback.figure().axes for axis in (axes.xaxis, axes.yaxis)}
    if num_objectives < 5:
        assert {"left", "right"} <= {label.split()[0] for label in labels if "lower is better" in label}
    assert "preference for left" in labels


def test_axes_name_the_direction_and_show_front_and_latest_points(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    script = torch.tensor([[100.0, -100.0], [1.0, 1.0], [2.0, 0.5]])
    callback = ParetoFrontCallback({"val/left": "min", "val/right": "max"}, figure_every=0)
    make_trainer(callback).fit(single(script, "validation_step"))
    axes = callback.figure().axes[0]
    assert axes.get_xlabel() == "val/left (lower is better)"
    assert axes.get_ylabel() == "val/right (higher is better)"
    low, high = axes.get_xlim()
    assert 0.5 < low < 1.0
    assert 2.0 < high < 3.0


def test_figures_can_be_drawn_less_often(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    for every, expected in ((2, {"front-epoch=001-step=000008.png", "front.png"}), (0, {"front.png"})):
        folder = tmp_path / str(every)
        make_trainer(ParetoFrontCallback(dirpath=folder, figure_every=every)).fit(population(torch.rand(3, 4, 2)))
        assert {path.name for path in folder.glob("*.png")} == expected


def test_single_point_and_failed_models_can_be_drawn(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    script = torch.full((2, 2, 2), float("nan"))
    script[1, 0] = torch.tensor([0.0, 3.0])
    callback = ParetoFrontCallback(dirpath=tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        make_trainer(callback, max_epochs=2).fit(population(script))
    assert [row["subproblem"] for row in callback.front] == [0]
    assert {path.name for path in tmp_path.glob("*.png")} == {"front-epoch=001-step=000008.png", "front.png"}


@pytest.mark.parametrize("directions", [("min", "min"), ("min", "max"), ("max", "min"), ("max", "max")])
def test_staircase_bounds_what_the_front_dominates(directions: Any) -> None:
    sign = np.array([1.0 if direction == "min" else -1.0 for direction in directions])
    front = np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    expected = np.array([[1.0, 3.0], [2.0, 3.0], [2.0, 2.0], [3.0, 2.0], [3.0, 1.0]])
    np.testing.assert_array_equal(_staircase(front * sign, directions), expected * sign)


def test_tensorboard_receives_the_figure(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="run")
    callback = ParetoFrontCallback()
    make_trainer(callback, logger=logger, max_epochs=2).fit(population(torch.rand(2, 4, 2)))
    events = accumulator.EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    images = events.Images("pareto_front")
    assert [image.step for image in images] == [3, 7]
    assert callback.folder == Path(logger.log_dir, "pareto_front")
    with Image.open(callback.folder / "front.png") as picture:
        assert (images[0].width, images[0].height) == picture.size


def test_loggers_with_log_image_receive_the_figure(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class ImageLogger(pl.loggers.CSVLogger):
        def __init__(self) -> None:
            super().__init__(tmp_path)
            self.images: list[tuple[str, int, tuple[int, ...]]] = []

        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            self.images += [(key, step or 0, image.shape[2:]) for image in images]

    logger = ImageLogger()
    make_trainer(ParetoFrontCallback(), logger=logger, max_epochs=2).fit(population(torch.rand(2, 4, 2)))
    assert logger.images == [("pareto_front", 3, (3,)), ("pareto_front", 7, (3,))]


def _module(kind: str, population: Callable[..., Any], single: Callable[..., Any]) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(3)
    if kind == "population":
        return population(torch.rand(8, 4, 2, generator=generator)), None
    return single(torch.rand(8, 2, generator=generator), kind), NAMES


@pytest.mark.parametrize("interval", [1.0, 2])
@pytest.mark.parametrize("kind", ["population", *HOOKS])
def test_resumed_archive_equals_the_uninterrupted_one(
    population: Callable[..., Any],
    single: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Path,
    kind: str,
    interval: float,
) -> None:
    module, objectives = _module(kind, population, single)
    whole = ParetoFrontCallback(objectives, tmp_path / "whole", figure_every=0)
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=interval == 1.0)
    make_trainer(whole, checkpoints, max_epochs=4, val_check_interval=interval).fit(module)
    middle = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))[1]

    module, objectives = _module(kind, population, single)
    resumed = ParetoFrontCallback(objectives, tmp_path / "resumed", figure_every=0)
    make_trainer(resumed, max_epochs=4, val_check_interval=interval).fit(module, ckpt_path=middle)
    assert len(whole.archive) == (4 if interval == 1.0 else 8) * (4 if kind == "population" else 1)
    assert resumed.archive == whole.archive
    for name in ("archive.csv", "front.csv", "front.png"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sanity_check_leaves_nothing(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Stop(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert pl_module.count == 0
            raise KeyError("before training")

    callback = ParetoFrontCallback(dirpath=tmp_path)
    with pytest.raises(KeyError, match="before training"):
        make_trainer(callback, Stop()).fit(population(torch.rand(3, 4, 2)))
    assert callback.archive == []
    assert list(tmp_path.iterdir()) == []


def test_trainer_validate_adds_its_points(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    callback = ParetoFrontCallback(dirpath=tmp_path)
    make_trainer(callback).validate(population(torch.rand(3, 4, 2)), verbose=False)
    assert len(_read(tmp_path / "archive.csv")) == len(callback.archive) == 4


def test_fast_dev_run_writes_nothing(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    callback = ParetoFrontCallback()
    make_trainer(callback, fast_dev_run=True).fit(population(torch.rand(3, 4, 2)))
    assert len(callback.archive) == 4
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_reported_before_training(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    module = population(torch.rand(3, 4, 2))
    with pytest.raises(OSError, match=r"file/folder' should be writable"):
        make_trainer(ParetoFrontCallback(dirpath=tmp_path / "file" / "folder")).fit(module)
    assert module.weight == 0.0


def test_two_instances_with_their_own_folders(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    losses = ParetoFrontCallback(dirpath=tmp_path / "losses", figure_every=0)
    accuracies = ParetoFrontCallback({"accuracy/left": "max", "accuracy/right": "max"}, tmp_path / "accuracies")
    script = torch.rand(3, 4, 2)
    checkpoints = ModelCheckpoint(tmp_path)
    make_trainer(losses, accuracies, checkpoints).fit(population(script))
    assert [row["nondominated"] for row in losses.archive] == [row["nondominated"] for row in accuracies.archive]
    torch.testing.assert_close(accuracies.archive[0]["accuracy/left"], 1 - losses.archive[0]["left"])

    shared = [ParetoFrontCallback(callback.reader.given, tmp_path) for callback in (losses, accuracies)]
    with pytest.raises(ValueError, match="should have a `dirpath` of its own"):
        make_trainer(*shared).fit(population(script))


def test_a_stopped_run_leaves_its_front(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        make_trainer(ParetoFrontCallback(dirpath=tmp_path, figure_every=0), Stop()).fit(population(torch.rand(3, 4, 2)))
    assert (tmp_path / "front.png").exists()


def test_state_of_other_objectives_is_refused() -> None:
    state = ParetoFrontCallback(NAMES).state_dict()
    state["rows"] = [{"epoch": 0, "step": 1, "subproblem": 0, "other": 1.0}]
    with pytest.raises(ValueError, match="should hold the objectives"):
        ParetoFrontCallback(NAMES).load_state_dict(state)


def test_objective_named_like_a_column_is_refused(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    with pytest.raises(ValueError, match=r"named like a column of the archive. Found \['step'\]"):
        make_trainer(ParetoFrontCallback({"step": "min", "left": "min"})).fit(population(torch.rand(3, 4, 2)))


def test_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`figure_every` should be a number of validations, or 0. Found -1"):
        ParetoFrontCallback(figure_every=-1)


def test_drawing_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one validated point"):
        ParetoFrontCallback(NAMES).figure()


def test_pyplot_does_not_know_the_figures(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    callback = ParetoFrontCallback()
    make_trainer(callback).fit(population(torch.rand(3, 4, 2)))
    assert callback.figure().axes
    assert pyplot.get_fignums() == []


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("kind", ["population", *HOOKS, "unsynchronised"])
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
            (tmp_path / f"rank-{trainer.global_rank}.json").write_text(json.dumps(callback.archive))

    replace = os.replace

    def recording(source: Any, target: Any) -> None:
        with (tmp_path / "writers").open("a") as file:
            file.write(f"{torch.distributed.get_rank()}\n")
        replace(source, target)

    monkeypatch.setattr("mtl_lightning.callbacks.output.os.replace", recording)
    synchronised = kind != "unsynchronised"
    module, objectives = _module(kind if synchronised else "validation_step", population, single)
    script: Tensor = module.script.reshape(8, -1, 2)
    if not synchronised:  # then the values of rank zero count
        module.synchronised = False
        script = script + 0.25
    callback = ParetoFrontCallback(objectives, tmp_path / "front")
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    make_trainer(callback, Report(), max_epochs=2, devices=2, strategy=strategy).fit(module)
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert reports[0] == reports[1]
    names = list(objectives or ("left", "right"))
    values = torch.tensor([[row[name] for name in names] for row in reports[0]])
    torch.testing.assert_close(values, script[:2].reshape(-1, 2))
    assert set((tmp_path / "writers").read_text().split()) == {"0"}
    assert _read(tmp_path / "front" / "archive.csv") == reports[0]
