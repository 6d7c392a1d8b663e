from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from matplotlib import pyplot
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from mtl_lightning.callbacks import AffinityCallback, GradientConflictCallback

MEASURES: tuple[Literal["look_ahead", "gradient"], ...] = ("look_ahead", "gradient")


class Toy(pl.LightningModule):
    """Three tasks on one encoder, with all that a careless observer would disturb."""

    def __init__(self, manual: bool = False, noisy: bool = True, batch_size: int = 4, form: str = "dict") -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.noisy, self.batch_size, self.form = noisy, batch_size, form
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(16, 5, generator=generator)
        self.targets = torch.randn(16, 3, generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            layers: list[nn.Module] = [nn.Linear(5, 6), nn.Tanh()]
            if noisy:
                layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3)]
            self.encoder = nn.Sequential(*layers)
            self.heads = nn.ModuleDict({name: nn.Linear(6, 1) for name in ("a", "b", "c")})

    def losses(self, batch: Any) -> dict[str, Tensor]:
        inputs, targets = batch
        if self.noisy:
            inputs = inputs * (1.0 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        features = self.encoder(inputs)
        losses = {
            name: functional.mse_loss(head(features).squeeze(1), target)
            for (name, head), target in zip(self.heads.items(), targets.unbind(dim=1), strict=True)
        }
        if self.form == "stacked":
            return dict(zip(losses, torch.stack(list(losses.values())).unbind(), strict=True))
        return losses

    def batch_losses(self, batch: Any) -> dict[str, Tensor]:
        return self.losses(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = torch.stack(list(self.losses(batch).values())).sum()
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        inputs, targets = (part[self.global_rank :: self.trainer.world_size] for part in (self.inputs, self.targets))
        return DataLoader(TensorDataset(inputs, targets), batch_size=self.batch_size)


class Quadratic(pl.LightningModule):
    """``L_k = |theta - c_k|^2 / 2`` for three centres, with one frozen value and one of each task's own."""

    centres = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.5, -0.25]))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.own = nn.ParameterList([torch.zeros(()), torch.zeros(()), torch.zeros(())])

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        values = 0.5 * (self.theta * self.frozen - self.centres).square().sum(dim=1)
        return {str(index): value + own for index, (value, own) in enumerate(zip(values, self.own, strict=True))}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack(list(self.task_losses(batch).values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.125)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(2, 1)))


class Grouped(Quadratic):
    """Keeps an affinity of its own: the number of batches, at the place (1, 0) of two tasks."""

    task_names = ("left", "right")
    task_groups = (("left",), ("right",))

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("affinity_matrix", torch.zeros(2, 2))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(self.affinity_matrix, Tensor)
        self.affinity_matrix[1, 0] += 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack(list(self.task_losses(batch).values())).sum()


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _reference_look_ahead(module: Toy, batch: Any, learning_rate: float) -> Tensor:
    """Step a copy of the module for each task, and compare the losses."""
    before = module.losses(batch)
    rows = []
    for name in before:
        copy = deepcopy(module)
        copy.zero_grad()
        copy.losses(batch)[name].backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in copy.encoder.parameters():
                assert parameter.grad is not None
                parameter.sub_(learning_rate * parameter.grad)
        rows.append(torch.stack([1 - copy.losses(batch)[other] / before[other] for other in before]))
    return torch.stack(rows).detach().double()


@pytest.mark.parametrize("measure", MEASURES)
def test_affinity_among_quadratics_is_the_closed_form(
    make_trainer: Callable[..., pl.Trainer], measure: Literal["look_ahead", "gradient"]
) -> None:
    module = Quadratic()
    gradients = (module.theta - module.centres).detach().double()
    losses = 0.5 * gradients.square().sum(dim=1)
    products = 0.125 * gradients @ gradients.T
    expected = products / losses
    if measure == "look_ahead":  # |g_k - lr g_i|^2 = |g_k|^2 - 2 lr <g_i, g_k> + lr^2 |g_i|^2
        expected = expected - 0.125**2 * losses.unsqueeze(1) / losses
    callback = AffinityCallback(measure=measure, figure_every=0)
    make_trainer(callback, max_epochs=1).fit(module)
    assert callback.task_names == ("0", "1", "2")
    torch.testing.assert_close(callback.matrix, expected, rtol=1e-5, atol=1e-6)


class Worked(pl.LightningModule):
    """``L_k = (c_k s + a_k - y_k)^2 / 2`` with a shared number, and the sums of these losses over groups."""

    factors = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    goals = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.own = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def batch_losses(self, batch: Any) -> dict[str, Tensor]:
        losses = 0.5 * (self.factors * self.shared + self.own - self.goals).square()
        groups = ("1", "2", "3", "12", "13", "23", "123")
        return {group: torch.stack([losses[int(task) - 1] for task in group]).sum() for group in groups}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.batch_losses(batch)["123"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(1, 1)))


def test_look_ahead_of_groups_by_hand(make_trainer: Callable[..., pl.Trainer]) -> None:
    expected = {
        "1": (0.19, 0.36, -0.21),
        "2": (0.36, 0.64, -0.44),
        "3": (-0.96, -2.24, 0.64),
        "12": (0.51, 0.84, -0.69),
        "13": (-0.69, -1.56, 0.51),
        "23": (-0.44, -0.96, 0.36),
        "123": (-0.21, -0.44, 0.19),
    }
    callback = AffinityCallback(parameters_fn=lambda module: [module.shared], figure_every=0)
    make_trainer(callback, max_epochs=1, precision="64-true").fit(Worked())
    found = dict(zip(callback.task_names, callback.matrix[:, :3].tolist(), strict=True))
    assert found == {group: pytest.approx(values, abs=1e-9) for group, values in expected.items()}


@pytest.mark.parametrize("form", ["dict", "stacked"])
def test_look_ahead_is_that_of_stepped_copies(make_trainer: Callable[..., pl.Trainer], form: str) -> None:
    module = Toy(noisy=False, batch_size=16, form=form)
    expected = _reference_look_ahead(module, (module.inputs, module.targets), learning_rate=0.3)
    callback = AffinityCallback(learning_rate=0.3)
    make_trainer(callback, max_epochs=1).fit(module)
    torch.testing.assert_close(callback.matrix, expected, rtol=1e-4, atol=1e-6)


def test_both_measures_agree_for_small_steps(make_trainer: Callable[..., pl.Trainer]) -> None:
    matrices = []
    for measure in MEASURES:
        callback = AffinityCallback(measure=measure, learning_rate=1e-3)
        make_trainer(callback, max_epochs=1).fit(Toy(noisy=False, batch_size=16))
        matrices.append(callback.matrix)
    assert matrices[0].abs().max() > 1e-4
    torch.testing.assert_close(*matrices, rtol=2e-2, atol=3e-6)


def test_look_ahead_in_16_bits_is_warned_about_and_the_gradient_serves(make_trainer: Callable[..., pl.Trainer]) -> None:
    matrices = []
    for precision in ("32-true", "bf16-mixed"):
        callback = AffinityCallback(measure="gradient", figure_every=0)
        make_trainer(callback, max_epochs=1, precision=precision).fit(Toy(noisy=False, batch_size=16))
        matrices.append(callback.matrix)
    torch.testing.assert_close(*matrices, rtol=0.1, atol=3e-5)
    with pytest.warns(UserWarning, match="should be measured in 32 bits. Found 'bf16-mixed'"):
        make_trainer(AffinityCallback(), max_epochs=1, precision="bf16-mixed").fit(Toy(noisy=False))


def test_heads_that_start_at_zero_still_share_the_encoder(make_trainer: Callable[..., pl.Trainer]) -> None:
    module = Toy(noisy=False, form="stacked")
    for head in module.heads.values():
        nn.init.zeros_(head.weight)  # type: ignore[arg-type]
    callback = AffinityCallback(figure_every=0)
    make_trainer(callback, max_epochs=1).fit(module)
    # The encoder has no gradient yet, and heads would give one on the diagonal if they were taken for shared.
    assert callback.matrix.abs().max() == 0.0


class Final(pl.Callback):
    """The random states when training ends."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("kind", [*MEASURES, "conflict"])
def test_training_is_the_same_to_the_last_bit(make_trainer: Callable[..., pl.Trainer], kind: Any, manual: bool) -> None:
    observer = GradientConflictCallback(every_n_batches=1) if kind == "conflict" else AffinityCallback(1, measure=kind)
    # With accumulation, gradients are there when measurements are taken.
    options: dict[str, Any] = {} if manual else {"accumulate_grad_batches": 3}
    runs = []
    for callbacks in ([], [observer]):
        pl.seed_everything(5, verbose=False)
        module, final = Toy(manual), Final()
        make_trainer(*callbacks, final, max_epochs=2, **options).fit(module)
        runs.append((module.state_dict(), module.trainer.optimizers[0].state_dict(), final.states))
    assert observer.measure_seconds > 0.0
    for kind_of_state in (0, 1):
        torch.testing.assert_close(runs[0][kind_of_state], runs[1][kind_of_state], rtol=0, atol=0)
    assert runs[0][2] == runs[1][2]


def test_forward_passes_of_a_measurement_see_the_same_dropout(make_trainer: Callable[..., pl.Trainer]) -> None:
    # Without a step, the losses before and after are equal if and only if their random numbers are.
    callback = AffinityCallback(learning_rate=1e-30)
    make_trainer(callback, max_epochs=1).fit(Toy())
    assert callback.matrix.abs().max() == 0.0


def test_affinity_that_the_module_keeps_is_read(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = AffinityCallback(figure_every=0)
    make_trainer(callback, max_epochs=3).fit(Grouped())
    rows = [(row["epoch"], row["batch"], row["value"]) for row in callback.history if row["from"] == "right"]
    assert rows[::2] == [(0, 2, 2.0), (1, 4, 4.0), (2, 6, 6.0)]
    assert callback.matrix.tolist() == [[0.0, 0.0], [6.0, 0.0]]
    assert callback.measure_seconds == 0.0


def test_affinity_that_the_module_keeps_is_read_every_n_batches(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = AffinityCallback(every_n_batches=3)
    make_trainer(callback, max_epochs=3).fit(Grouped())
    assert sorted({row["batch"] for row in callback.history}) == [3, 6]


def test_losses_fn_goes_before_the_affinity_of_the_module(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = AffinityCallback(losses_fn=lambda module, batch: dict(list(module.task_losses(batch).items())[:2]))
    make_trainer(callback, max_epochs=1).fit(Grouped())
    assert callback.task_names == ("left", "right", "0", "1")
    assert callback.matrix.isfinite().nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


@pytest.mark.parametrize(("every", "expected"), [(None, [0, 4, 8]), (3, [0, 3, 6, 9]), (5, [0, 5, 10])])
def test_measurements_are_taken_when_they_are_due(
    make_trainer: Callable[..., pl.Trainer], every: int | None, expected: list[int]
) -> None:
    callback = AffinityCallback(every, figure_every=0)
    make_trainer(callback).fit(Toy())
    assert list(dict.fromkeys(row["batch"] for row in callback.history)) == expected


def test_values_are_logged_and_written(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    callback = AffinityCallback(every_n_batches=2, figure_every=2)
    trainer = make_trainer(callback, logger=logger)
    trainer.fit(Toy())
    assert trainer.callback_metrics["affinity/c/a"] == pytest.approx(callback.matrix[2, 0].item())
    assert 0.0 < trainer.callback_metrics["affinity_seconds"] <= callback.measure_seconds
    folder = Path(logger.log_dir, "affinity")
    rows = _read(folder / "affinity.csv")
    assert [float(row["value"]) for row in rows] == [row["value"] for row in callback.history]
    assert (len(rows), rows[5]["from"], rows[5]["to"]) == (6 * 9, "b", "c")
    assert {path.name for path in folder.glob("*.png")} == {"affinity.png", "affinity-epoch=001-step=000008.png"}
    logger.save()
    logged = [row["affinity/b/c"] for row in _read(Path(logger.log_dir, "metrics.csv")) if row.get("affinity/b/c")]
    assert [float(value) for value in logged] == pytest.approx([float(row["value"]) for row in rows[5::9]])


def test_pictures_reach_loggers(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    class Images(pl.loggers.CSVLogger):
        keys: list[str] = []  # noqa: RUF012  # one logger only

        def log_image(self, key: str, images: list[Any], step: int) -> None:
            self.keys.append(key)

    logger = Images(tmp_path)
    make_trainer(AffinityCallback(), logger=logger, max_epochs=2).fit(Toy())
    assert logger.keys == ["affinity", "affinity"]


class Sparse(Quadratic):
    """Batch 0 has labels of the first two tasks, batch 1 of the last two; the one left out is NaN or constant."""

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        losses = super().task_losses(batch)
        if float(batch[0]) == 0.0:
            losses["2"] = losses["2"] * torch.nan
        else:
            losses["0"] = torch.tensor(0.0)
        return losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.task_losses(batch)["1"]

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(2.0).unsqueeze(1)))


def test_tasks_without_labels_take_no_part(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = AffinityCallback(every_n_batches=1)
    make_trainer(callback, max_epochs=1).fit(Sparse())
    pairs = [(row["batch"], row["from"], row["to"]) for row in callback.history]
    assert pairs == [
        *[(0, source, target) for source in "01" for target in "01"],
        *[(1, source, target) for source in "12" for target in "12"],
    ]
    # The latest value of each entry counts.
    assert callback.matrix.isnan().nonzero().tolist() == [[0, 2], [2, 0]]


def test_losses_that_are_not_positive_have_no_affinity_towards_them(make_trainer: Callable[..., pl.Trainer]) -> None:
    def losses_fn(module: Quadratic, batch: Any) -> dict[str, Tensor]:
        losses = module.task_losses(batch)
        return losses | {"1": losses["1"] - 100.0}

    callback = AffinityCallback(losses_fn=losses_fn)
    make_trainer(callback, max_epochs=1).fit(Quadratic())
    assert callback.matrix.isnan().tolist() == [[False, True, False]] * 3


def test_parameters_fn_chooses_the_parameters(make_trainer: Callable[..., pl.Trainer]) -> None:
    module = Quadratic()
    gradients = (module.theta - module.centres).detach().double()
    losses = 0.5 * gradients.square().sum(dim=1)
    callback = AffinityCallback(measure="gradient", learning_rate=1.0, parameters_fn=lambda module: [module.theta])
    make_trainer(callback, max_epochs=1).fit(module)
    torch.testing.assert_close(callback.matrix, gradients @ gradients.T / losses)


def test_module_without_losses_is_refused_before_training(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    module = single(torch.rand(3, 2), "validation_step")
    with pytest.raises(ValueError, match=r"`losses_fn` should map the module and a batch.*Found none, and a Single"):
        make_trainer(AffinityCallback()).fit(module)
    assert module.weight == 0.0


@pytest.mark.parametrize(
    ("losses_fn", "message"),
    [
        (lambda module, batch: torch.zeros(2), "should be a mapping, task name to loss. Found Tensor"),
        (lambda module, batch: {"a": module.theta}, r"'a' should be a tensor of shape \(\). Found shape \(2,\)"),
        (lambda module, batch: {"a": module.theta[0], "b": module.own[0]}, r"\['a', 'b'\] should share trained"),
    ],
)
def test_unusable_losses_are_refused(make_trainer: Callable[..., pl.Trainer], losses_fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(AffinityCallback(losses_fn=losses_fn)).fit(Quadratic())


def test_parameters_that_are_not_trained_are_refused(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = AffinityCallback(parameters_fn=lambda module: [module.frozen])
    with pytest.raises(ValueError, match="should return parameters that are trained"):
        make_trainer(callback).fit(Quadratic())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_batches": 0}, "`every_n_batches` should be at least 1, or None. Found 0"),
        ({"figure_every": -1}, "`figure_every` should be a number of epochs, or 0. Found -1"),
        ({"learning_rate": 0.0}, "`learning_rate` should be positive, or None. Found 0.0"),
        ({"measure": "other"}, "`measure` should be one of .* Found 'other'"),
    ],
)
def test_unusable_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AffinityCallback(**options)


def test_resumed_history_equals_the_uninterrupted_one(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    whole = AffinityCallback(every_n_batches=3, dirpath=tmp_path / "whole", figure_every=0)
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=8)
    make_trainer(whole, checkpoints, max_epochs=3).fit(Toy(noisy=False))
    resumed = AffinityCallback(every_n_batches=3, dirpath=tmp_path / "resumed", figure_every=0)
    make_trainer(resumed, max_epochs=3).fit(Toy(noisy=False), ckpt_path=tmp_path / "epoch=1-step=8.ckpt")
    assert len(whole.history) == 4 * 9
    assert resumed.history == whole.history
    for name in ("affinity.csv", "affinity.png"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("measure", MEASURES)
def test_resumed_history_of_a_network_with_dropout_equals_the_uninterrupted_one(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, measure: Literal["look_ahead", "gradient"]
) -> None:
    class Seeded(Toy):
        """What is random in a batch depends on the batch alone."""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            pl.seed_everything(self.trainer.global_step, verbose=False)

    whole, resumed = (AffinityCallback(4, measure=measure, figure_every=0) for _ in range(2))
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=8)
    make_trainer(whole, checkpoints, max_epochs=3).fit(Seeded())
    torch.rand(1)  # the resumed run finds other random numbers
    make_trainer(resumed, max_epochs=3).fit(Seeded(), ckpt_path=tmp_path / "epoch=1-step=8.ckpt")
    assert len(whole.history) == 3 * 9
    assert resumed.history == whole.history


@pytest.mark.parametrize("step", [3, 4])
def test_resumed_readings_equal_the_uninterrupted_ones(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, step: int
) -> None:
    whole, resumed = AffinityCallback(figure_every=0), AffinityCallback(figure_every=0)
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=step)
    make_trainer(whole, checkpoints).fit(Grouped())
    make_trainer(resumed).fit(Grouped(), ckpt_path=tmp_path / f"epoch=1-step={step}.ckpt")
    # The module counts a batch after the checkpoint has been written.
    for row, expected in zip(resumed.history, whole.history, strict=True):
        lag = row["from"] == "right" and row["to"] == "left" and row["epoch"] != 0
        assert row == expected | {"value": float(expected["value"]) - lag}


def test_fast_dev_run_writes_nothing(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    callback = AffinityCallback(figure_every=0)
    make_trainer(callback, fast_dev_run=True).fit(Toy())
    assert len(callback.history) == 9
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_reported_before_training(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/folder' should be writable"):
        make_trainer(AffinityCallback(dirpath=tmp_path / "file" / "folder")).fit(Toy())


def test_a_stopped_run_leaves_its_values(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        make_trainer(AffinityCallback(dirpath=tmp_path), Stop()).fit(Toy())
    assert {path.name for path in tmp_path.iterdir()} == {"affinity.csv", "affinity.png"}


def test_drawing_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one measurement"):
        AffinityCallback().figure()


def test_pyplot_does_not_know_the_figures(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = AffinityCallback(figure_every=0)
    make_trainer(callback, max_epochs=1).fit(Toy())
    assert callback.figure().axes
    assert pyplot.get_fignums() == []


class Ragged(Toy):
    """On two ranks, the second half of the samples has no labels of task ``c``: NaN."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        losses = super().losses(batch)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            del losses["c"]
        return losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack(list(super().losses(batch).values())).sum()


@pytest.mark.usefixtures("forked")
def test_two_ranks_with_half_batches_measure_what_one_does(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Report(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            report = {
                "affinity": affinity.matrix.tolist(),
                "cosines": conflict.cosines.tolist(),
                "logged": trainer.callback_metrics["affinity/a/b"].item(),
                "seconds": trainer.callback_metrics["affinity_seconds"].item(),
            }
            (tmp_path / f"rank-{trainer.global_rank}.json").write_text(json.dumps(report))

    def observers(name: str) -> tuple[AffinityCallback, GradientConflictCallback]:
        return (
            AffinityCallback(1, dirpath=tmp_path / name, figure_every=0),
            GradientConflictCallback(1, dirpath=tmp_path / name, figure_every=0),
        )

    affinity, conflict = observers("one")
    make_trainer(affinity, conflict).fit(Toy(noisy=False, batch_size=8))
    expected, cosines = affinity.matrix, conflict.cosines

    affinity, conflict = observers("two")
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    options: dict[str, Any] = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
    make_trainer(affinity, conflict, Report(), **options).fit(Toy(noisy=False, batch_size=4))
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert reports[0] == reports[1]
    torch.testing.assert_close(torch.tensor(reports[0]["affinity"]).double(), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(torch.tensor(reports[0]["cosines"]).double(), cosines, rtol=1e-4, atol=1e-5)
    assert len(_read(tmp_path / "two" / "affinity.csv")) == 6 * 9


@pytest.mark.usefixtures("forked")
def test_training_on_two_ranks_is_the_same_to_the_last_bit(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Report(pl.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            torch.save(pl_module.state_dict(), tmp_path / f"{self.name}-{trainer.global_rank}.pt")

    observers = [AffinityCallback(1, figure_every=0), GradientConflictCallback(2, figure_every=0)]
    for name, callbacks in (("plain", []), ("observed", observers)):
        pl.seed_everything(5, verbose=False)
        strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
        options: dict[str, Any] = {"devices": 2, "strategy": strategy, "accumulate_grad_batches": 2}
        make_trainer(*callbacks, Report(name), **options).fit(Toy())
    for rank in range(2):
        plain, observed = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("plain", "observed"))
        torch.testing.assert_close(plain, observed, rtol=0, atol=0)


@pytest.mark.usefixtures("forked")
def test_a_task_that_one_rank_lacks_is_that_of_the_other(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Report(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.is_global_zero:
                (tmp_path / "matrix.json").write_text(json.dumps(callback.matrix.tolist()))

    # Rank zero has the even samples.
    module = Ragged(noisy=False, batch_size=8)
    even = module.inputs[::2], module.targets[::2]
    own = torch.stack(list(module.losses(even).values())).detach()
    gradients = [
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(module.encoder.parameters()))])
        for loss in (module.losses(even)["c"], module.losses((module.inputs, module.targets))["a"])
    ]
    callback = AffinityCallback(measure="gradient", learning_rate=1.0)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    options: dict[str, Any] = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
    make_trainer(callback, Report(), max_epochs=1, **options).fit(module)
    matrix = json.loads((tmp_path / "matrix.json").read_text())
    assert matrix[2][2] == pytest.approx(float(gradients[0].dot(gradients[0]) / own[2]), rel=1e-4)
    assert matrix[0][2] == pytest.approx(float(gradients[1].dot(gradients[0]) / own[2]), rel=1e-4, abs=1e-6)


def test_two_instances_have_their_own_names_files_and_states(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    def callbacks() -> list[AffinityCallback]:
        return [AffinityCallback(1), AffinityCallback(2, measure="gradient", name="first_order")]

    saved = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    trainer = make_trainer(*callbacks(), saved, max_epochs=2)
    trainer.fit(Toy())
    assert {"affinity/a/b", "affinity_seconds", "first_order/a/b", "first_order_seconds"} <= set(trainer.logged_metrics)
    assert (tmp_path / "affinity/affinity.csv").exists()
    assert (tmp_path / "first_order/first_order.csv").exists()
    resumed = callbacks()
    make_trainer(*resumed, max_epochs=2).fit(Toy(), ckpt_path=next(tmp_path.glob("*.ckpt")))
    assert [len(callback.history) for callback in resumed] == [8 * 9, 4 * 9]


def test_a_run_that_measures_nothing_is_reported(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = AffinityCallback(1, losses_fn=lambda module, batch: {"a": module.losses(batch)["a"]})
    with pytest.warns(UserWarning, match="`AffinityCallback` has measured nothing so far"):
        make_trainer(callback, max_epochs=1).fit(Toy())
