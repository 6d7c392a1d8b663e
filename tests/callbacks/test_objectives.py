from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError

from mtl_lightning.aggregation import UPGrad
from mtl_lightning.callbacks.objectives import ObjectiveReader, ObjectivesCallback, Points, is_population
from mtl_lightning.modules import GradientModule, MT2OModule, TaskGroupModule, WeightedModule
from mtl_lightning.modules.base import MultiTaskModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task

HOOKS = ("validation_step", "on_validation_epoch_end")
NAMES: dict[str, Any] = {"val/left": "min", "val/right": "min"}


class Recorder(ObjectivesCallback):
    """Keeps what it observes."""

    def __init__(self, objectives: Any = None) -> None:
        super().__init__(objectives)
        self.seen: list[Points] = []
        self.could_log: list[bool] = []

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, points: Points, can_log: bool) -> None:
        self.seen.append(points)
        self.could_log.append(can_log)


@pytest.fixture
def script() -> Tensor:
    return torch.rand(3, 4, 2)


def test_population_gives_one_point_per_model(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], script: Tensor
) -> None:
    recorder, module = Recorder(), population(script)
    make_trainer(recorder).fit(module)
    assert dict(recorder.objectives) == {"left": "min", "right": "min"}
    torch.testing.assert_close(torch.stack([points.values for points in recorder.seen]), script.double())
    assert all(points.subproblems == (0, 1, 2, 3) for points in recorder.seen)
    for points in recorder.seen:
        torch.testing.assert_close(points.preferences, module.preferences.double())
    assert recorder.could_log == [True] * 3


def test_population_objectives_can_be_metrics_and_losses(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], script: Tensor
) -> None:
    recorder = Recorder({"accuracy/right": "max", "left": "min"})
    make_trainer(recorder).fit(population(script))
    expected = torch.stack([1.0 - script[..., 1], script[..., 0]], dim=-1)
    torch.testing.assert_close(torch.stack([points.values for points in recorder.seen]), expected.double())
    assert recorder.reader.signs.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("objectives", "alike"),
    [
        ({"val_loss/right": "min", "val_loss/left": "min"}, ("right", "left")),
        ({"val_loss/left": "min", "val_accuracy/right": "max"}, ("left", "accuracy/right")),
    ],
)
def test_the_names_under_which_means_are_logged_stand_for_the_values_of_each_model(
    population: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    script: Tensor,
    objectives: dict[str, Any],
    alike: tuple[str, str],
) -> None:
    logged = Recorder(objectives)
    short = Recorder(dict(zip(alike, objectives.values(), strict=True)))
    make_trainer(logged, short).fit(population(script))
    assert dict(logged.objectives) == objectives
    assert len(logged.seen[0].values) == 4
    for found, expected in zip(logged.seen, short.seen, strict=True):
        assert torch.equal(found.values, expected.values)


NETWORKS: dict[str, Callable[..., MultiTaskModule]] = {
    "weighted": WeightedModule,
    "gradient": partial(GradientModule, aggregator=UPGrad()),
    "groups": TaskGroupModule,
}
TASKS = ("left", "right")


def _batches() -> DataLoader[Any]:
    inputs, targets = torch.randn(12, 3), torch.randn(12, 2)
    rows: Any = list(zip(inputs, targets, strict=True))

    def collate(batch: list[Any]) -> Any:
        columns = torch.stack([target for _, target in batch]).T.unsqueeze(2)
        return torch.stack([features for features, _ in batch]), dict(zip(TASKS, columns, strict=True))

    return DataLoader(rows, batch_size=4, collate_fn=collate)


def _make(kind: Callable[..., Any], **arguments: Any) -> Any:
    return kind(
        network=MultiHeadNetwork(MLP(3, [4]), {name: nn.Linear(4, 1) for name in TASKS}),
        tasks=[Task(name, nn.MSELoss(), MeanAbsoluteError()) for name in TASKS],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        **arguments,
    )


@pytest.mark.parametrize("kind", NETWORKS)
def test_one_network_of_this_library_has_its_validation_losses_as_objectives(
    make_trainer: Callable[..., pl.Trainer], kind: str
) -> None:
    class Logged(pl.Callback):
        def __init__(self) -> None:
            self.losses: list[list[float]] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.losses.append([float(trainer.callback_metrics[f"val_loss/{name}"]) for name in TASKS])

    recorder, logged = Recorder(), Logged()
    make_trainer(recorder, logged).fit(_make(NETWORKS[kind]), _batches(), _batches())
    assert dict(recorder.objectives) == {"val_loss/left": "min", "val_loss/right": "min"}
    assert [points.values.tolist() for points in recorder.seen] == [[row] for row in logged.losses]


def test_the_same_objectives_are_read_of_one_network_and_of_each_model_of_a_population(
    make_trainer: Callable[..., pl.Trainer],
) -> None:
    objectives: Any = {"val_loss/left": "min", "val_mean_absolute_error/right": "min"}
    preferences = simplex_lattice(num_tasks=2, num_divisions=2)
    for module, number in ((_make(WeightedModule), 1), (_make(MT2OModule, preferences=preferences, backend="loop"), 3)):
        recorder = Recorder(objectives)
        make_trainer(recorder).fit(module, _batches(), _batches())
        assert [tuple(points.values.shape) for points in recorder.seen] == [(number, 2)] * 3


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_unknown_population_objective_lists_what_there_is(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], script: Tensor, sanity_steps: int
) -> None:
    trainer = make_trainer(Recorder({"accuracy/middle": "max", "left": "min"}), num_sanity_val_steps=sanity_steps)
    with pytest.raises(ValueError, match=r"Found 'accuracy/middle'; available: 'left', 'right', 'accuracy/left'"):
        trainer.fit(population(script))


def test_unknown_name_is_reported_by_the_sanity_check(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    trainer = make_trainer(Recorder({"val/left": "min", "val/middle": "min"}))
    with (
        pytest.warns(UserWarning, match=r"Found 'val/middle'; available: 'val/left', 'val/right'.*becomes an error"),
        pytest.raises(ValueError, match="Found 'val/middle'"),
    ):
        trainer.fit(single(torch.rand(3, 2), "validation_step"))


@pytest.mark.parametrize("hook", HOOKS)
def test_other_modules_give_each_validation_its_own_metrics(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], hook: str
) -> None:
    script = torch.rand(6, 2)
    recorder = Recorder(NAMES)
    make_trainer(recorder, val_check_interval=2).fit(single(script, hook))
    torch.testing.assert_close(torch.cat([points.values for points in recorder.seen]), script.double())
    assert recorder.could_log == [hook == "validation_step"] * 6
    assert all(points.preferences is None for points in recorder.seen)


def test_equal_values_logged_again_are_new(single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]) -> None:
    recorder = Recorder(NAMES)
    make_trainer(recorder).fit(single(torch.full((3, 2), 0.5), "on_validation_epoch_end"))
    assert len(recorder.seen) == 3


@pytest.mark.parametrize("hook", HOOKS)
def test_values_of_an_earlier_validation_are_not_taken_again(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], hook: str
) -> None:
    script = torch.rand(4, 2)
    script[1:3] = float("inf")  # the second and the third validation log nothing
    recorder = Recorder(NAMES)
    with pytest.warns(UserWarning, match="did not log 'val/left', 'val/right'") as record:
        make_trainer(recorder, max_epochs=4).fit(single(script, hook))
    torch.testing.assert_close(torch.cat([points.values for points in recorder.seen]), script[[0, 3]].double())
    assert sum("did not log" in str(warning.message) for warning in record) == 1


@pytest.mark.parametrize("hook", HOOKS)
def test_metric_that_is_never_logged_is_an_error(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], hook: str
) -> None:
    trainer = make_trainer(Recorder({"val/left": "min", "middle": "max"}), num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"Found 'middle'; available: 'val/left', 'val/right'"):
        trainer.fit(single(torch.rand(3, 2), hook))


def test_other_modules_need_objectives_before_training(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    module = single(torch.rand(3, 2), "validation_step")
    with pytest.raises(
        ValueError,
        match=r"`objectives` should name logged validation metrics.*'val_loss/left'.*Found none, and a Single",
    ):
        make_trainer(Recorder()).fit(module)
    assert module.count == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_points_are_left_out_with_one_warning(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], script: Tensor, bad: float
) -> None:
    script[:2, 1, 0] = bad
    recorder, module = Recorder(), population(script)
    with pytest.warns(UserWarning, match=r"left out, at first those of subproblems \[1\]") as record:
        make_trainer(recorder).fit(module)
    assert [points.subproblems for points in recorder.seen] == [(0, 2, 3), (0, 2, 3), (0, 1, 2, 3)]
    torch.testing.assert_close(recorder.seen[0].values, script[0, [0, 2, 3]].double())
    assert recorder.seen[0].preferences is not None
    torch.testing.assert_close(recorder.seen[0].preferences, module.preferences[[0, 2, 3]].double())
    assert sum("left out" in str(warning.message) for warning in record) == 1


def test_the_sanity_check_is_not_observed(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], script: Tensor
) -> None:
    recorder = Recorder()
    make_trainer(recorder, max_epochs=1, num_sanity_val_steps=2).fit(population(script))
    assert len(recorder.seen) == 1


def test_trainer_validate_is_observed(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], script: Tensor
) -> None:
    recorder = Recorder()
    make_trainer(recorder).validate(population(script), verbose=False)
    torch.testing.assert_close(recorder.seen[0].values, script[0].double())


def test_observing_leaves_random_numbers_and_parameters_alone(
    population: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], script: Tensor
) -> None:
    states = []
    for callbacks in ([], [Recorder()]):
        torch.manual_seed(1)
        module = population(script)
        make_trainer(*callbacks).fit(module)
        states.append((torch.get_rng_state(), module.weight.detach()))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_population_is_recognised_without_reading_it(
    population: Callable[..., Any], single: Callable[..., Any]
) -> None:
    # Without a trainer `objective_values` raises, and `preferences` is a buffer: `isinstance` fails on one of them.
    assert is_population(population(torch.rand(1, 2, 2)))
    assert not is_population(single(torch.rand(1, 2), "validation_step"))


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"a": "min"}, "2 to 31 objectives. Found 1"),
        ({str(index): "min" for index in range(32)}, "2 to 31 objectives. Found 32"),
        ({"a": "min", "b": "down"}, "objective 'b' should be 'min' or 'max'. Found 'down'"),
    ],
)
def test_unusable_objectives_are_refused(objectives: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveReader(objectives)


def test_the_given_mapping_is_not_changed(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    objectives = dict(NAMES)
    recorder = Recorder(objectives)
    objectives["val/left"] = "max"
    assert recorder.objectives["val/left"] == "min"
