from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from mtl_lightning.callbacks import (
    AffinityCallback,
    CostCallback,
    GradientConflictCallback,
    HypervolumeCallback,
    ParetoFrontCallback,
    RelativeImprovementCallback,
    TaskGroupCallback,
)
from mtl_lightning.callbacks.output import output_folder, write_atomically, write_rows
from mtl_lightning.metrics import Baseline
from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.task import Task

TASKS = ("a", "b")
# Of each of these Lightning or a callback has one value for each validation, or for each end of an epoch.
OF_A_VALIDATION = ("val_loss", "val_loss/a", "hypervolume", "hypervolume/archive", "val_delta_m", "pareto_front")
OF_AN_EPOCH = ("of_the_epoch", "cost/batches", "groups/number", "affinity", "task_groups/timeline")
# And of each of these one for each batch.
OF_A_BATCH = ("of_the_batch", "affinity_of_batches/a/b", "gradient_cosine", "gradient_conflict_seconds")


class Steps(pl.loggers.CSVLogger):
    """Keeps the steps under which each metric and each figure is logged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="run")
        self.steps: dict[str, list[int]] = {}

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics(dict(metrics), step)
        for name in metrics:
            self.steps.setdefault(name, []).append(step if step is not None else -1)

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.steps.setdefault(key, []).append(step)


class Module(TaskGroupModule):
    """Logs something of each batch, and of each epoch, which Lightning publishes at its end."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.log("of_the_batch", float(batch_idx))
        self.log("of_the_epoch", float(batch_idx), on_step=False, on_epoch=True)


def _batches() -> DataLoader[Any]:
    inputs, targets = torch.randn(15, 3), torch.randn(15, 2)

    def collate(batch: list[Any]) -> Any:
        columns = torch.stack([target for _, target in batch]).T.unsqueeze(2)
        return torch.stack([features for features, _ in batch]), dict(zip(TASKS, columns, strict=True))

    rows: Any = list(zip(inputs, targets, strict=True))
    return DataLoader(rows, batch_size=3, collate_fn=collate)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def write(temporary: Path) -> None:
        assert temporary.parent == tmp_path  # a rename is atomic within a file system only
        temporary.write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("error")
def test_a_file_that_cannot_be_written_is_told_of_once_for_a_folder_and_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    expected = r"Callbacks should be able to write to '.*gone'\. Found: No such file or directory\. Training goes on"
    with pytest.warns(UserWarning, match=expected):
        write_rows(folder / "table.csv", ["a"], [{"a": 1}])
    write_rows(folder / "other.csv", ["a"], [{"a": 1}])
    folder.mkdir()
    write_rows(folder / "table.csv", ["a"], [{"a": 1}])
    assert [path.name for path in folder.iterdir()] == ["table.csv"]


def test_whether_a_file_was_written_is_returned(tmp_path: Path) -> None:
    assert write_atomically(tmp_path / "file", lambda temporary: temporary.touch())
    with pytest.warns(UserWarning, match="Found: Is a directory"):
        assert not write_atomically(tmp_path, lambda temporary: temporary.touch())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_rows_keep_full_precision(tmp_path: Path) -> None:
    write_rows(tmp_path / "table.csv", ["step", "value"], [{"step": 1, "value": 0.1 + 0.2}])
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["value"]) == 0.1 + 0.2
    assert list(tmp_path.iterdir()) == [tmp_path / "table.csv"]


def test_default_folder_lies_in_the_log_folder(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    assert output_folder(make_trainer(), None, "here") == tmp_path / "here"
    logger = pl.loggers.CSVLogger(tmp_path, name="run")
    assert output_folder(make_trainer(logger=logger), None, "here") == tmp_path / "run" / "version_0" / "here"
    assert output_folder(make_trainer(), tmp_path / "there", "here") == tmp_path / "there"
    assert (tmp_path / "there").is_dir()


def test_a_folder_that_cannot_be_made_is_named(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"The folder '.*file/below' should be writable"):
        output_folder(make_trainer(), tmp_path / "file" / "below", "here")


def test_fast_dev_run_has_no_folder(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    assert output_folder(make_trainer(fast_dev_run=True), tmp_path / "there", "here") is None
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("every", "accumulate", "validated", "updates"),
    [(1.0, 1, [4, 9], [5, 10]), (2, 1, [1, 3, 6, 8], [2, 4, 7, 9]), (1.0, 2, [4, 9], [3, 6])],
)
def test_what_belongs_to_one_moment_is_logged_under_one_step(
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Path,
    every: float,
    accumulate: int,
    validated: list[int],
    updates: list[int],
) -> None:
    logger = Steps(tmp_path)
    front, volume = ParetoFrontCallback(), HypervolumeCallback((9.0, 9.0))
    module = Module(
        network=MultiHeadNetwork(MLP(3, [4]), {name: nn.Linear(4, 1) for name in TASKS}),
        tasks=[Task(name, nn.MSELoss()) for name in TASKS],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        accumulate_batches=accumulate,
    )
    trainer = make_trainer(
        front,
        volume,
        RelativeImprovementCallback({f"val_loss/{name}": Baseline(1.0, False) for name in TASKS}),
        AffinityCallback(),
        AffinityCallback(every_n_batches=1, name="affinity_of_batches", figure_every=0),
        GradientConflictCallback(every_n_batches=1, figure_every=0),
        TaskGroupCallback(),
        CostCallback(),
        ModelCheckpoint(tmp_path, filename="{step}", monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=False),
        max_epochs=2,
        logger=logger,
        log_every_n_steps=1,
        val_check_interval=every,
    )
    trainer.fit(module, _batches(), _batches())
    moments = ((OF_A_VALIDATION, validated), (OF_AN_EPOCH, [4, 9]), (OF_A_BATCH, list(range(10))))
    for names, steps in moments:
        assert {name: logger.steps[name] for name in names} == dict.fromkeys(names, steps)
    # The tables tell that step, and beside it the one in the names of the checkpoints.
    for rows in (front.archive, volume.curve):
        assert [row["logged_step"] for row in rows] == validated
        assert [row["step"] for row in rows] == updates
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"step={step}.ckpt" for step in updates}


@pytest.mark.parametrize("hook", ["validation_step", "on_validation_epoch_end"])
def test_any_module_has_the_steps_of_its_metrics_in_the_tables(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path, hook: str
) -> None:
    names: Any = {"val/left": "min", "val/right": "min"}
    logger, front = Steps(tmp_path), ParetoFrontCallback(names)
    volume = HypervolumeCallback(objectives=names)
    trainer = make_trainer(front, volume, logger=logger, accumulate_grad_batches=2)
    trainer.fit(single(torch.rand(4, 2), hook))
    trainer.validate(trainer.lightning_module, verbose=False)  # under the count that Lightning has at the end
    for key in ("val/left", "hypervolume"):
        assert logger.steps[key] == [1, 3, 5, 6]
    assert logger.steps["pareto_front"] == [1, 3, 5, 6]
    assert [row["logged_step"] for row in front.archive] == [1, 3, 5, 6]
    assert [row["step"] for row in volume.curve] == [2, 4, 6, 6]
