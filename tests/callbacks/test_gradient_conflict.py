from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mtl_lightning.callbacks import AffinityCallback, GradientConflictCallback

ANGLES = {"east": 0.0, "north": math.pi / 2, "west": math.pi, "northeast": math.pi / 4}


class Compass(pl.LightningModule):
    """Each task pulls a shared point in its own direction, with its own strength; and has a parameter of its own."""

    task_names = tuple(ANGLES)

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(2))
        self.own = nn.ParameterList([torch.zeros(()) for _ in ANGLES])

    def batch_losses(self, batch: list[Tensor]) -> dict[str, Tensor]:
        losses = {}
        for index, (name, angle) in enumerate(ANGLES.items()):
            pull = (index + 1) * torch.tensor([math.cos(angle), math.sin(angle)])
            losses[name] = 5.0 - (self.point * pull).sum() * batch[0].mean() + self.own[index].square()
        return losses

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.stack(list(self.batch_losses(batch).values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(4, 1)))


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _first(names: tuple[str, ...]) -> Callable[[Compass, Any], dict[str, Tensor]]:
    def losses_fn(module: Compass, batch: Any) -> dict[str, Tensor]:
        return {name: loss for name, loss in module.batch_losses(batch).items() if name in names}

    return losses_fn


def test_cosines_are_those_of_the_directions(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = GradientConflictCallback(figure_every=0)
    make_trainer(callback, max_epochs=1).fit(Compass())
    angles = torch.tensor(list(ANGLES.values()), dtype=torch.float64)
    expected = torch.cos(angles.unsqueeze(0) - angles.unsqueeze(1))
    torch.testing.assert_close(callback.cosines, expected, rtol=1e-5, atol=1e-6)


def test_norms_and_shares_are_logged(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = GradientConflictCallback(figure_every=0)
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(Compass())
    logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
    norms = [logged[f"gradient_norm/{name}"] for name in ANGLES]
    assert norms == pytest.approx([1.0, 2.0, 3.0, 4.0])
    # East and west, and west and northeast.
    half = math.sqrt(0.5)
    assert logged["gradient_cosine/west/northeast"] == pytest.approx(-half)
    assert logged["gradient_cosine"] == pytest.approx((-1.0 + half + half - half) / 6)
    assert logged["gradient_conflict_seconds"] > 0.0
    assert "gradient_cosine/northeast/west" not in logged


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("east", "west"), 1.0), (("east", "northeast"), 0.0), (("east", "west", "northeast"), 2 / 3)],
)
def test_conflict_is_the_share_of_negative_cosines(
    make_trainer: Callable[..., pl.Trainer], names: tuple[str, ...], expected: float
) -> None:
    trainer = make_trainer(GradientConflictCallback(losses_fn=_first(names)), max_epochs=1)
    trainer.fit(Compass())
    assert trainer.callback_metrics["gradient_conflict"] == pytest.approx(expected)


def test_a_zero_gradient_has_no_cosine(make_trainer: Callable[..., pl.Trainer]) -> None:
    def losses_fn(module: Compass, batch: Any) -> dict[str, Tensor]:
        losses = module.batch_losses(batch)
        return {"east": losses["east"], "still": 0.0 * losses["west"] + 1.0, "north": losses["northeast"]}

    callback = GradientConflictCallback(losses_fn=losses_fn)
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(Compass())
    assert callback.task_names == (*ANGLES, "still")
    assert callback.cosines.isfinite().nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert trainer.callback_metrics["gradient_conflict"] == 0.0
    assert trainer.callback_metrics["gradient_norm/still"] == 0.0


def test_a_batch_with_labels_of_one_task_is_passed_over(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = GradientConflictCallback(1, losses_fn=_first(("north",)))
    make_trainer(callback, max_epochs=1).fit(Compass())
    assert callback.history == []


def test_tables_hold_what_was_measured(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    callback = GradientConflictCallback(every_n_batches=3, figure_every=2, dirpath=tmp_path)
    make_trainer(callback, max_epochs=2).fit(Compass())
    rows = _read(tmp_path / "gradient_conflict.csv")
    assert [{key: float(value) for key, value in row.items()} for row in rows] == callback.history
    assert [(row["epoch"], row["batch"]) for row in callback.history] == [(0, 0), (0, 3), (1, 6)]
    assert list(rows[0])[2:] == ["conflict", "mean_cosine", *(f"norm/{name}" for name in ANGLES)]
    pairs = _read(tmp_path / "gradient_cosine.csv")
    assert len(pairs) == 3 * 6
    assert (pairs[1]["first"], pairs[1]["second"]) == ("east", "west")
    assert float(pairs[1]["cosine"]) == pytest.approx(-1.0)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"gradient_conflict.png", "gradient_conflict-epoch=001-step=000008.png"}


def test_resumed_history_equals_the_uninterrupted_one(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    whole = GradientConflictCallback(every_n_batches=3, dirpath=tmp_path / "whole", figure_every=0)
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=5)
    make_trainer(whole, checkpoints, max_epochs=3).fit(Compass())
    resumed = GradientConflictCallback(every_n_batches=3, dirpath=tmp_path / "resumed", figure_every=0)
    make_trainer(resumed, max_epochs=3).fit(Compass(), ckpt_path=tmp_path / "epoch=1-step=5.ckpt")
    assert len(whole.history) == 4
    for name in ("gradient_cosine.csv", "gradient_conflict.csv", "gradient_conflict.png"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_both_observers_share_a_module(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    make_trainer(AffinityCallback(), GradientConflictCallback(), max_epochs=1).fit(Compass())
    assert {path.name for path in tmp_path.iterdir()} == {"affinity", "gradient_conflict"}


def test_fast_dev_run_writes_nothing(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    callback = GradientConflictCallback(figure_every=0)
    make_trainer(callback, fast_dev_run=True).fit(Compass())
    assert len(callback.history) == 1
    assert list(tmp_path.iterdir()) == []


def test_module_without_losses_is_refused_before_training(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    with pytest.raises(ValueError, match=r"`losses_fn` should map the module and a batch"):
        make_trainer(GradientConflictCallback()).fit(single(torch.rand(3, 2), "validation_step"))


def test_drawing_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one measurement"):
        GradientConflictCallback().figure()


def test_two_instances_have_their_own_names_and_files(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    options: dict[str, Any] = {"parameters_fn": lambda module: [module.point]}
    trainer = make_trainer(GradientConflictCallback(), GradientConflictCallback(name="point", **options), max_epochs=1)
    trainer.fit(Compass())
    names = {f"point_{ending}" for ending in ("cosine", "conflict", "conflict_seconds", "norm/east")}
    assert names <= set(trainer.logged_metrics)
    files = {path.name for path in (tmp_path / "point_conflict").glob("*.csv")}
    assert files == {"point_conflict.csv", "point_cosine.csv"}


def test_logged_cosines_are_within_their_range(make_trainer: Callable[..., pl.Trainer]) -> None:
    def losses_fn(module: Compass, batch: Any) -> dict[str, Tensor]:
        line = (module.point * torch.tensor([0.1, 0.7])).sum()
        return {str(index): line * factor for index, factor in enumerate(factors)}

    factors = [1.0, -3.1, 7.3, 0.9, -1.7, 11.3, 0.123]
    trainer = make_trainer(GradientConflictCallback(losses_fn=losses_fn), max_epochs=1)
    trainer.fit(Compass())
    cosines = [value for key, value in trainer.logged_metrics.items() if key.startswith("gradient_cosine/")]
    assert len(cosines) == 21
    assert max(map(abs, map(float, cosines))) <= 1.0
