from __future__ import annotations

import copy
import csv
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection

from mtl_lightning import devices
from mtl_lightning.callbacks import HypervolumeCallback, ParetoFrontCallback
from mtl_lightning.callbacks.objectives import is_population
from mtl_lightning.datamodules import MultiDigitsDataModule
from mtl_lightning.growth import Doubling
from mtl_lightning.modules import MT2OModule
from mtl_lightning.modules import population as modules_population
from mtl_lightning.modules.base import MultiTaskModule
from mtl_lightning.networks import MLP, LeNetEncoder, MultiHeadNetwork
from mtl_lightning.pareto import hypervolume
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.problems import DTLZ2, VLMOP1, Fonseca, Problem
from mtl_lightning.protocols import PopulationProtocol
from mtl_lightning.scalarization import Chebyshev, Linear, SmoothChebyshev, TrackedIdeal
from mtl_lightning.task import Task
from mtl_lightning.transfer import (
    AdvantageTransfer,
    DistanceTransfer,
    NeighborTransfer,
    NoTransfer,
    ProportionalTransfer,
    TransferContext,
    TransferRule,
)
from tests.modules.common import (
    Interleaved,
    Pairs,
    Position,
    Reads,
    SaveAfterEachBatch,
    assert_equal_states,
    flat,
    loader,
    mt2o,
    network,
    rows,
    tasks,
    trainer,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
}
RULES: dict[str, Callable[[], TransferRule]] = {
    "none": NoTransfer,
    "neighbor": partial(NeighborTransfer, strength=0.4, decay=0.9),
    "proportional": partial(ProportionalTransfer, rate=5.0),
    "distance": partial(DistanceTransfer, floor=1e-3),
    "advantage": partial(AdvantageTransfer, smoothing=0.5),
}


# ------------------------------------------------------------------------------------------- M = I, and the formula


def _reference_independent_run(
    net: nn.Module, preference: Tensor, optimizer: Callable[[Any], torch.optim.Optimizer], batches: list[Any]
) -> nn.Module:
    """Train one network alone on its weighted sum."""
    net = copy.deepcopy(net)
    steps = optimizer(net.parameters())
    losses = {task.name: task.loss for task in tasks()}
    for inputs, targets in batches:
        outputs = net(inputs)
        objective = sum(
            weight * losses[name](outputs[name], targets[name]) for weight, name in zip(preference, losses, strict=True)
        )
        steps.zero_grad()
        torch.autograd.backward([cast("Tensor", objective)])
        steps.step()
    return net


@pytest.mark.parametrize("rule", [NoTransfer(), NeighborTransfer(strength=0.0)], ids=["none", "identity"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loop_without_transfer_equals_independent_runs_bit_for_bit(name: str, rule: TransferRule) -> None:
    module = mt2o(optimizer=OPTIMIZERS[name], transfer=rule, backend="loop")
    trainer(max_epochs=2).fit(module, loader())
    for index, preference in enumerate(module.preferences):
        alone = _reference_independent_run(network(), preference, OPTIMIZERS[name], [*loader(), *loader()])
        assert torch.equal(flat(module.subproblem(index)), flat(alone))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vmap_without_transfer_equals_independent_runs(name: str) -> None:
    module = mt2o(optimizer=OPTIMIZERS[name], transfer=NoTransfer(), backend="vmap")
    trainer(max_epochs=2).fit(module, loader())
    for index, preference in enumerate(module.preferences):
        alone = _reference_independent_run(network(), preference, OPTIMIZERS[name], [*loader(), *loader()])
        torch.testing.assert_close(flat(module.subproblem(index)), flat(alone), rtol=1e-6, atol=1e-6)


class _Digits(torch.utils.data.Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Noise images of the size LeNet takes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(24, 1, 36, 36, generator=generator)
        self.labels = torch.randint(10, (24, 2), generator=generator)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], {"a": self.labels[index, 0], "b": self.labels[index, 1]}


def test_lenet_in_the_loop_equals_independent_runs_bit_for_bit() -> None:
    torch.manual_seed(0)
    net = MultiHeadNetwork(LeNetEncoder(), {"a": nn.Linear(50, 10), "b": nn.Linear(50, 10)})
    cross_entropy = [Task("a", nn.CrossEntropyLoss()), Task("b", nn.CrossEntropyLoss())]
    data: DataLoader[Any] = DataLoader(_Digits(), batch_size=8)
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    module = mt2o(network=net, tasks=cross_entropy, optimizer=optimizer, transfer=NoTransfer())
    trainer().fit(module, data)
    for index, preference in enumerate(module.preferences):
        alone = copy.deepcopy(net)
        steps = optimizer(alone.parameters())
        for inputs, targets in data:
            outputs = alone(inputs)
            values = [nn.functional.cross_entropy(outputs[name], targets[name]) for name in ("a", "b")]
            steps.zero_grad()
            (preference[0] * values[0] + preference[1] * values[1]).backward()
            steps.step()
        assert torch.equal(flat(module.subproblem(index)), flat(alone))


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
@pytest.mark.parametrize("name", RULES)
def test_mixed_steps_equal_the_formula(name: str, optimizer: str) -> None:
    module = mt2o(transfer=RULES[name](), optimizer=OPTIMIZERS[optimizer])
    preferences = module.preferences.clone()
    trainer(max_epochs=1, limit_train_batches=4).fit(module, loader())

    # theta_i <- sum_j m_ij theta_j + Delta_i, with one network and one optimiser for each subproblem.
    rule = RULES[name]()
    members = [network() for _ in preferences]
    optimizers = [OPTIMIZERS[optimizer](member.parameters()) for member in members]
    for step, (inputs, targets) in zip(range(4), loader(), strict=False):
        old = torch.stack([flat(member) for member in members])
        losses = torch.zeros(len(members), 2)
        for index, member in enumerate(members):
            outputs = member(inputs)
            values = [task.loss(outputs[task.name], targets[task.name]) for task in tasks()]
            losses[index] = torch.stack(values).detach()
            optimizers[index].zero_grad()
            torch.autograd.backward([preferences[index, 0] * values[0] + preferences[index, 1] * values[1]])
            optimizers[index].step()
        delta = torch.stack([flat(member) for member in members]) - old
        lr = float(optimizers[0].param_groups[0]["lr"])
        matrix = rule(TransferContext.of(preferences, losses, old, step=step, learning_rate=lr))
        for index, member in enumerate(members):
            mixed = torch.zeros_like(old[0])
            for j in range(len(members)):
                mixed += matrix[index, j] * old[j]
            nn.utils.vector_to_parameters(mixed + delta[index], member.parameters())
    for index, member in enumerate(members):
        torch.testing.assert_close(flat(module.subproblem(index)), flat(member), rtol=1e-4, atol=2e-6)


def test_batch_norm_statistics_are_mixed_and_counters_are_not() -> None:
    net = network(dropout=1e-9)  # with batch norm
    modules = [mt2o(network=net, transfer=rule) for rule in (NoTransfer(), NeighborTransfer(strength=0.4))]
    for module in modules:
        with torch.no_grad():
            module.population.theta.add_(torch.arange(4.0).unsqueeze(1) * 0.1)
        trainer(max_steps=1).fit(module, loader())
    plain, mixed = (dict(module.population.network.named_buffers()) for module in modules)
    matrix = NeighborTransfer(strength=0.4)(TransferContext.of(modules[0].preferences))
    mean = "encoder.1.running_mean"
    torch.testing.assert_close(mixed[mean], matrix @ plain[mean])
    counter = "encoder.1.num_batches_tracked"
    assert torch.equal(mixed[counter], plain[counter])


@pytest.mark.parametrize("name", RULES)
def test_permuting_the_subproblems_permutes_the_result(name: str) -> None:
    order = torch.tensor([2, 0, 3, 1])
    preferences = simplex_lattice(num_tasks=2, num_divisions=3)
    straight = mt2o(preferences=preferences, transfer=RULES[name]())
    permuted = mt2o(preferences=preferences[order], transfer=RULES[name]())
    for module in (straight, permuted):
        trainer(max_epochs=1).fit(module, loader())
    torch.testing.assert_close(rows(permuted), rows(straight)[order], rtol=1e-5, atol=1e-6)


def test_vmap_and_loop_agree_over_a_run() -> None:
    results = []
    for backend in ("vmap", "loop"):
        module = mt2o(network=network(dropout=1e-9), transfer=AdvantageTransfer(), backend=backend)
        trainer(max_epochs=2).fit(module, loader())
        results.append(module.state_dict())
    for key in ("population.theta", "population.network.encoder.1.running_mean"):
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- known fronts


def _solve(
    problem: Problem, scalarization: nn.Module, size: int, steps: int, lr: float, **arguments: Any
) -> MT2OModule:
    count = problem.tasks()
    data = [(torch.zeros(1), {task.name: torch.zeros(1) for task in count})] * steps
    module = MT2OModule(
        network=problem,
        tasks=count,
        preferences=arguments.pop("preferences", simplex_lattice(num_tasks=len(count), num_divisions=size - 1)),
        scalarization=scalarization,  # type: ignore[arg-type]
        transfer=arguments.pop("transfer", NeighborTransfer()),
        optimizer=partial(torch.optim.Adam, lr=lr),
        backend="vmap",
        **arguments,
    )
    run = trainer(max_epochs=1, limit_val_batches=1)
    run.fit(module, DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None))  # type: ignore[arg-type]
    return module


def test_chebyshev_finds_the_concave_front_of_fonseca() -> None:
    torch.manual_seed(1)
    module = _solve(Fonseca(20), SmoothChebyshev(mu=0.01), 10, steps=1500, lr=0.005, init="independent")
    assert hypervolume(module.objective_values, torch.ones(2)) >= 0.285


def test_hard_chebyshev_finds_the_concave_front_of_fonseca() -> None:
    torch.manual_seed(1)
    lr_scheduler = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2500)
    module = _solve(
        Fonseca(20),
        Chebyshev(),
        10,
        steps=2500,
        lr=0.005,
        init="independent",
        lr_scheduler=lr_scheduler,
        lr_scheduler_interval="step",
    )
    assert hypervolume(module.objective_values, torch.ones(2)) >= 0.285


def test_the_weighted_sum_finds_only_the_ends_of_fonseca() -> None:
    torch.manual_seed(1)
    module = _solve(Fonseca(20), Linear(), 10, steps=1500, lr=0.005, init="independent")
    values = module.objective_values
    # Every point of the front minimises some weighted sum only where the front is convex; a concave one has two such
    # points.
    assert (values.min(dim=1).values < 0.02).all()
    assert hypervolume(values, torch.ones(2)) < 0.06


def test_every_subproblem_of_vlmop1_reaches_its_optimum_once_the_transfer_has_faded() -> None:
    module = _solve(VLMOP1(3), Linear(), 5, steps=1500, lr=0.02, transfer=NeighborTransfer(decay=0.98))
    optimum = 2 * module.preferences[:, 1:].expand(-1, 3)
    torch.testing.assert_close(rows(module)[:, :3], optimum, rtol=0, atol=1e-3)


def test_constant_mixing_biases_towards_the_neighbors() -> None:
    module = _solve(VLMOP1(3), Linear(), 5, steps=1500, lr=0.02, transfer=NeighborTransfer(strength=0.3, decay=1.0))
    spread = rows(module)[:, 0].max() - rows(module)[:, 0].min()
    assert spread < 1.5  # of 2 between the optima at the ends


def test_three_objectives_cover_the_front_of_dtlz2() -> None:
    torch.manual_seed(0)
    problem = DTLZ2(5)
    preferences = simplex_lattice(num_tasks=3, num_divisions=6)
    module = _solve(
        problem, SmoothChebyshev(mu=0.02), 2, steps=800, lr=0.02, init="independent", preferences=preferences
    )
    points = module.objective_values
    reference = torch.full((3,), 1.1)
    exact = 1.1**3 - math.pi / 6
    # 28 points cannot fill the front: the bound is what the exact Chebyshev points w^-1 / |w^-1| reach, less 3 %.
    inverse = 1 / preferences.clamp(min=1e-6)
    ideal = hypervolume(inverse / inverse.norm(dim=1, keepdim=True), reference)
    assert 0.97 * ideal <= hypervolume(points, reference) <= exact


# ----------------------------------------------------------------------------------------------------- the settings


def test_accumulated_batches_equal_one_large_batch() -> None:
    small = mt2o(accumulate_batches=2, transfer=AdvantageTransfer())
    large = mt2o(transfer=AdvantageTransfer())
    trainer().fit(small, loader(batch_size=10))
    trainer().fit(large, loader(batch_size=20))
    torch.testing.assert_close(rows(small), rows(large), rtol=1e-5, atol=1e-6)


def test_the_last_batch_of_an_epoch_steps() -> None:
    module = mt2o(accumulate_batches=3)
    run = trainer(max_epochs=2)
    run.fit(module, loader())  # 5 batches
    assert run.global_step == 4


def test_clipping_is_per_subproblem() -> None:
    module = mt2o(gradient_clip_norm=0.1, transfer=NoTransfer(), optimizer=partial(torch.optim.SGD, lr=1.0))
    before = rows(module)
    trainer(max_steps=1).fit(module, loader())
    moved = (rows(module) - before).norm(dim=1)
    torch.testing.assert_close(moved, torch.full((4,), 0.1), rtol=1e-4, atol=0)


def test_independent_batches_equal_runs_on_the_slices() -> None:
    module = mt2o(batches="independent", transfer=NoTransfer())
    trainer(max_epochs=1).fit(module, loader(batch_size=20))
    for index, preference in enumerate(module.preferences):
        slices = []
        for inputs, targets in loader(batch_size=20):
            part = slice(5 * index, 5 * index + 5)
            slices.append((inputs[part], {name: target[part] for name, target in targets.items()}))
        alone = _reference_independent_run(network(), preference, OPTIMIZERS["sgd"], slices)
        torch.testing.assert_close(flat(module.subproblem(index)), flat(alone), rtol=1e-6, atol=1e-6)


def test_independent_batches_agree_under_vmap() -> None:
    results = []
    for backend in ("vmap", "loop"):
        module = mt2o(batches="independent", backend=backend)
        trainer(max_epochs=1).fit(module, loader(batch_size=22))
        results.append(rows(module))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_transfer_every_counts_batches() -> None:
    class Recorded(NeighborTransfer):
        steps: list[int]

        def __init__(self) -> None:
            super().__init__()
            self.steps = []

        def received(self, context: TransferContext) -> Tensor:
            self.steps.append(module.batches_seen + 1)
            return super().received(context)

    rule = Recorded()
    module = mt2o(transfer=rule, transfer_every=3)
    trainer(max_epochs=2).fit(module, loader())  # 10 batches
    assert rule.steps == [3, 6, 9]


def test_only_the_named_parameters_are_transferred() -> None:
    plain = mt2o(transfer=NoTransfer(), init="independent", network=network(seed=3))
    torch.manual_seed(5)
    partly = mt2o(
        transfer=NeighborTransfer(strength=0.4),
        transfer_parameters=["encoder.*"],
        init="independent",
        network=network(3),
    )
    plain.population.theta.data.copy_(partly.population.theta.data)
    for module in (plain, partly):
        trainer(max_steps=1).fit(module, loader())
    for index in range(4):
        alone, mixed = plain.subproblem(index).state_dict(), partly.subproblem(index).state_dict()
        assert torch.equal(alone["heads.a.weight"], mixed["heads.a.weight"])
        key = next(key for key in alone if key.startswith("encoder") and key.endswith("weight"))
        assert not torch.allclose(alone[key], mixed[key])


def test_frozen_parameters_stay_and_are_held_once() -> None:
    net = network()
    for parameter in net.encoder.parameters():
        parameter.requires_grad_(False)
    module = mt2o(network=net)
    trainer().fit(module, loader())
    for index in range(4):
        member = module.subproblem(index)
        assert isinstance(member, MultiHeadNetwork)
        for own, given in zip(member.encoder.parameters(), net.encoder.parameters(), strict=True):
            assert torch.equal(own, given)
    total = sum(parameter.numel() for parameter in module.population.parameters() if not parameter.requires_grad)
    assert total == sum(parameter.numel() for parameter in net.encoder.parameters())


@pytest.mark.parametrize(("interval", "expected"), [("epoch", 0.5**2), ("step", 0.5**10)])
def test_schedulers_go_by_epoch_or_by_step(interval: str, expected: float) -> None:
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    module = mt2o(
        optimizer=partial(torch.optim.SGD, lr=1.0),
        gradient_clip_norm=1e-3,
        lr_scheduler=schedule,
        lr_scheduler_interval=interval,
    )
    run = trainer(max_epochs=2)
    run.fit(module, loader())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


def test_plateau_schedulers_read_the_monitored_metric() -> None:
    schedule = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=0, threshold=0.999)
    module = mt2o(lr_scheduler=schedule, lr_scheduler_monitor="val_loss", optimizer=partial(torch.optim.SGD, lr=1e-4))
    run = trainer(max_epochs=3)
    run.fit(module, loader(), loader())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-6)


def test_growth_ends_with_all_preferences_in_order() -> None:
    preferences = simplex_lattice(num_tasks=2, num_divisions=4)
    module = mt2o(preferences=preferences, growth=Doubling(every_n_batches=2))
    assert module.population.size == 1
    assert torch.allclose(module.preferences, torch.tensor([[0.5, 0.5]]))
    trainer(max_epochs=2).fit(module, loader())
    assert module.population.size == 5
    assert torch.equal(module.preferences, preferences)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_children_inherit_parameters_and_the_state_of_the_optimiser(optimizer: str) -> None:
    module = mt2o(
        preferences=torch.tensor([[0.2, 0.8], [0.8, 0.2]]),
        optimizer=OPTIMIZERS[optimizer],
        growth=Doubling(every_n_batches=5),
        transfer=NoTransfer(),
    )
    trainer(max_epochs=2).fit(module, loader())

    for index, preference in enumerate(module.preferences):
        child = network()
        steps = OPTIMIZERS[optimizer](child.parameters())
        for batch, (inputs, targets) in enumerate([*loader(), *loader()]):
            weights = torch.tensor([0.5, 0.5]) if batch < 5 else preference
            outputs = child(inputs)
            values = [task.loss(outputs[task.name], targets[task.name]) for task in tasks()]
            steps.zero_grad()
            (weights[0] * values[0] + weights[1] * values[1]).backward()
            steps.step()
        torch.testing.assert_close(flat(module.subproblem(index)), flat(child), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- missing labels


class _Unlabelled(Pairs):
    """The second task has no label in the first batches."""

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = super().__getitem__(index)
        return inputs, {"a": targets["a"], "b": targets["b"] if index >= 16 else torch.full((1,), torch.nan)}


@pytest.mark.parametrize("backend", ["vmap", "loop"])
@pytest.mark.parametrize("scalarization", [Linear(), Chebyshev()], ids=["linear", "chebyshev"])
def test_a_task_without_labels_takes_no_part(backend: str, scalarization: nn.Module) -> None:
    module = mt2o(backend=backend, scalarization=scalarization, transfer=AdvantageTransfer())
    before = rows(module)
    data: DataLoader[Any] = DataLoader(_Unlabelled(), batch_size=8)
    trainer(limit_train_batches=2).fit(module, data)
    start, after = mt2o(), rows(module)
    start.population.theta.data.copy_(after)
    assert torch.isfinite(after).all()
    assert not torch.equal(after[-1], before[-1])
    head = {key: value for key, value in module.subproblem(1).state_dict().items() if key.startswith("heads.b")}
    assert all(torch.equal(value, network().state_dict()[key]) for key, value in head.items())
    trainer(max_epochs=2).fit(module, data, data)
    assert torch.isfinite(module.objective_values).all()


def test_accumulation_over_a_batch_without_labels() -> None:
    module = mt2o(accumulate_batches=4, transfer=AdvantageTransfer())
    data: DataLoader[Any] = DataLoader(_Unlabelled(), batch_size=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Not finite")
        trainer(max_epochs=2).fit(module, data)
    assert torch.isfinite(rows(module)).all()


# ------------------------------------------------------------------------------------------------ validation, members


def _reference_values(module: MT2OModule, data: Pairs) -> Tensor:
    values = []
    for index in range(module.population.size):
        member = module.subproblem(index).eval()
        outputs = member(data.inputs)
        values.append([nn.functional.mse_loss(outputs["a"], data.a), nn.functional.l1_loss(outputs["b"], data.b)])
    return torch.tensor(values)


def test_objective_values_are_means_over_samples() -> None:
    module = mt2o(network=network(dropout=0.5))
    trainer().fit(module, loader(), loader(size=27, batch_size=8))  # an uneven last batch
    torch.testing.assert_close(module.objective_values, _reference_values(module, Pairs(27)))


def test_metric_values_are_per_subproblem() -> None:
    collection = MetricCollection({"error": MeanSquaredError()})
    named = [Task("a", nn.MSELoss(), collection), Task("b", nn.L1Loss(), MeanAbsoluteError())]
    module = mt2o(tasks=named)
    run = trainer()
    run.fit(module, loader(), loader(size=27))
    expected = _reference_values(module, Pairs(27))
    torch.testing.assert_close(module.metric_values["error/a"], expected[:, 0])
    torch.testing.assert_close(module.metric_values["mean_absolute_error/b"], expected[:, 1])
    torch.testing.assert_close(run.callback_metrics["val_error/a"], expected[:, 0].mean())


def test_metrics_follow_the_growth() -> None:
    named = [Task("a", nn.MSELoss(), MeanSquaredError()), Task("b", nn.L1Loss())]
    module = mt2o(tasks=named, growth=Doubling(every_n_batches=6))
    trainer(max_epochs=4).fit(module, loader(), loader(size=27))
    torch.testing.assert_close(module.metric_values["mean_squared_error/a"], _reference_values(module, Pairs(27))[:, 0])


def test_objective_values_before_a_validation_say_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"after a validation.*Trainer.validate"):
        _ = mt2o().objective_values


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_predict_takes_plain_inputs(batch_size: int) -> None:
    inputs: DataLoader[Any] = DataLoader(Pairs().inputs, batch_size=batch_size)  # type: ignore[arg-type]
    predictions = trainer(limit_predict_batches=1).predict(mt2o(), inputs)
    assert predictions is not None
    assert predictions[0]["a"].shape == (4, batch_size, 1)  # type: ignore[call-overload]


def test_a_validation_without_labels_repeats_no_old_values() -> None:
    module, run = mt2o(), trainer()
    run.validate(module, loader(), verbose=False)
    empty = [
        (inputs, {name: torch.full_like(t, torch.nan) for name, t in targets.items()}) for inputs, targets in loader()
    ]
    run.validate(module, DataLoader(empty, batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert module.objective_values.isnan().all()


def test_means_are_over_labels() -> None:
    module = mt2o()
    values = []
    for batch_size in (8, 16):
        data = DataLoader(_Unlabelled(), batch_size=batch_size)
        trainer().validate(module, data, verbose=False)
        values.append(module.objective_values)
    torch.testing.assert_close(values[0], values[1])


def test_validate_test_and_predict_run_alone() -> None:
    module, run = mt2o(), trainer()
    run.validate(module, loader(), verbose=False)
    validated = module.objective_values.clone()
    results = run.test(module, loader(), verbose=False)[0]
    torch.testing.assert_close(torch.tensor(results["test_loss/a/2"]), validated[2, 0])
    predictions = run.predict(module, loader())
    assert predictions is not None
    assert predictions[0]["a"].shape == (4, 8, 1)  # type: ignore[call-overload]
    run.fit(module, loader(), loader())  # what validation under inference mode left behind does not disturb training
    assert torch.isfinite(module.objective_values).all()


def test_select_returns_the_nearest_preference_as_a_plain_network() -> None:
    module = mt2o()
    trainer().fit(module, loader())
    chosen = module.select((0.3, 0.7))
    assert type(chosen) is MultiHeadNetwork
    assert list(chosen.state_dict()) == list(network().state_dict())
    assert torch.equal(flat(chosen), flat(module.subproblem(1)))  # preference (1/3, 2/3)


def test_the_module_satisfies_the_protocol_of_the_callbacks() -> None:
    protocol: PopulationProtocol = mt2o()  # the type checker holds the types, this test the names
    assert is_population(protocol)


class _OwnMass(NeighborTransfer):
    """Gives what its base does not."""

    def received(self, context: TransferContext) -> Tensor:
        return 0.1 * torch.ones_like(context.pairs, dtype=torch.float32) / len(context.pairs)


class _Counted(NeighborTransfer):
    """Counts how often it is asked."""

    calls = 0

    def forward(self, context: TransferContext) -> Tensor:
        self.calls += 1
        return super().forward(context)


def test_a_transfer_that_is_over_is_not_made() -> None:
    counted = _Counted(strength=0.5, decay=1e-4)
    module = mt2o(transfer=counted)
    trainer(max_epochs=2).fit(module, loader())
    assert counted.calls == 2  # masses 0.5 and 5e-5; 5e-9 is lost in float32


def test_a_subclass_with_a_mass_of_its_own_is_not_over() -> None:
    assert NeighborTransfer(decay=1e-4).is_over(5, torch.float32)
    assert not _OwnMass(decay=1e-4).is_over(5, torch.float32)


# ------------------------------------------------------------------------------------------------ sick subproblems


class _Poison(Callback):
    """Set the parameters of a subproblem to NaN before a batch."""

    def __init__(self, subproblem: int, batch: int) -> None:
        self.subproblem, self.batch = subproblem, batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.batches_seen == self.batch:
            pl_module.population.theta.data[self.subproblem] = torch.nan


class _LeftOut(TransferRule):
    """Another rule, with one subproblem left out from some step on."""

    def __init__(self, rule: TransferRule, subproblem: int, step: int) -> None:
        super().__init__()
        self.rule, self.subproblem, self.step = rule, subproblem, step

    def givers(self, preferences: Tensor) -> Tensor | None:
        return self.rule.givers(preferences)

    def received(self, context: TransferContext) -> Tensor:
        received = self.rule.received(context)
        if context.step >= self.step:
            received = received.clone()
            received[self.subproblem] = received[:, self.subproblem] = 0.0
        return received


@pytest.mark.parametrize("backend", ["vmap", "loop"])
@pytest.mark.parametrize("rule", [name for name in RULES if name != "none"])
def test_a_frozen_subproblem_stays_alone(rule: str, backend: str) -> None:
    sick = mt2o(transfer=RULES[rule](), on_nonfinite="freeze", backend=backend, optimizer=OPTIMIZERS["adam"])
    with pytest.warns(UserWarning, match=r"Not finite.*subproblem 1 with preference \(0\.333, 0\.667\)"):
        trainer(callbacks=[_Poison(1, 3)], max_epochs=2).fit(sick, loader())
    well = mt2o(transfer=_LeftOut(RULES[rule](), 1, 3), backend=backend, optimizer=OPTIMIZERS["adam"])
    trainer(max_epochs=2).fit(well, loader())
    others = [0, 2, 3]
    assert torch.equal(rows(sick)[others], rows(well)[others])


def test_a_subproblem_with_a_nan_gradient_keeps_its_last_finite_parameters_when_frozen() -> None:
    class Root(nn.Module):
        """The square root has an infinite slope at zero, which makes a NaN of the zero that follows."""

        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            return (preds - preds.detach()).square().sum().sqrt()

    module = mt2o(tasks=[Task("a", Root()), Task("b", nn.L1Loss())], on_nonfinite="freeze", transfer=NoTransfer())
    before = rows(module)
    with pytest.raises(FloatingPointError, match="gradients"):  # it hits every subproblem
        trainer().fit(module, loader())
    assert torch.equal(rows(module), before)


def test_reseeding_copies_the_nearest_healthy_neighbor_with_its_moments() -> None:
    class AfterHealing(Callback):
        compared = False

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
            if pl_module.batches_seen == 4:  # poisoned in the 4th batch, healed before the gradients of the 5th
                theta = pl_module.population.theta
                assert torch.equal(theta[3], theta[2])
                state = optimizer.state[theta]
                assert torch.equal(state["exp_avg"][3], state["exp_avg"][2])
                self.compared = True

    module = mt2o(on_nonfinite="reseed", optimizer=OPTIMIZERS["adam"], transfer=AdvantageTransfer())
    check = AfterHealing()
    with pytest.warns(UserWarning, match="Restarted from subproblem 2"):
        trainer(callbacks=[_Poison(3, 3), check], max_epochs=2).fit(module, loader())
    assert check.compared
    assert torch.isfinite(rows(module)).all()
    assert torch.isfinite(
        torch.cat([tensor.flatten() for tensor in module.state_dict().values() if isinstance(tensor, Tensor)])
    ).all()


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_lets_a_sick_subproblem_spread(rule: str) -> None:
    module = mt2o(transfer=RULES[rule](), on_nonfinite="freeze", network=network(dropout=1e-9))
    with pytest.warns(UserWarning, match="trained no further"):
        trainer(callbacks=[_Poison(0, 2)], max_epochs=2).fit(module, loader(), loader())
    assert torch.isfinite(rows(module)[1:]).all()
    assert torch.isfinite(module.objective_values[1:]).all()
    assert torch.isnan(module.objective_values[0]).all()
    for buffer in module.population.network.buffers():
        assert torch.isfinite(buffer[1:].float()).all()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_hooks_before_a_step_find_the_parameters_of_before(optimizer: Any) -> None:
    class Remember(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, _: Any) -> None:
            assert torch.equal(rows(pl_module), start)
            raise MemoryError("enough")

    module = mt2o(optimizer=partial(optimizer, lr=1e-3))
    start = torch.randn_like(rows(module))
    module.population.theta.data.copy_(start)
    with pytest.raises(MemoryError, match="enough"):
        trainer([Remember()]).fit(module, loader())
    assert torch.equal(rows(module), start)
    assert module.get_extra_state()["transfers"] == 0


def test_a_transfer_is_counted_where_the_optimiser_fails_after_it() -> None:
    class Spoil(Callback):
        """Takes the moments of the optimiser apart, so that its next step fails."""

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.optimizers(use_pl_optimizer=False).state[pl_module.population.theta]["exp_avg"] = torch.zeros(3)

    module = mt2o(optimizer=partial(torch.optim.Adam, lr=1e-3))
    with pytest.raises(RuntimeError, match="size"):
        trainer([Spoil()]).fit(module, loader())
    assert module.get_extra_state()["transfers"] == 2
    assert module.batches_seen == 1


def test_a_subclass_that_leaves_the_transfer_out_is_told() -> None:
    class Forgetful(MT2OModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    module = Forgetful(
        network=network(), tasks=tasks(), preferences=[[0.2, 0.8], [0.8, 0.2]], optimizer=torch.optim.Adam
    )
    with pytest.raises(RuntimeError, match=r"Add `super\(\).on_before_optimizer_step\(optimizer\)`"):
        trainer().fit(module, loader())


def test_raise_stops_the_run_and_names_the_preference() -> None:
    module = mt2o(on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"subproblem 2 with preference \(0\.667, 0\.333\).*learning rate"):
        trainer(callbacks=[_Poison(2, 1)]).fit(module, loader())


def test_raise_does_not_overlook_the_last_batch() -> None:
    with pytest.raises(FloatingPointError, match="subproblem 2"):
        trainer(callbacks=[_Poison(2, 4)]).fit(mt2o(on_nonfinite="raise"), loader())  # the last of 5 batches


@pytest.fixture
def busy_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors be such that the host would have to wait for, as those of a device are."""
    for module in (devices, modules_population):
        monkeypatch.setattr(module, "is_read_at_once", lambda tensor: False)
    monkeypatch.setattr(MultiTaskModule, "_counts_ahead", lambda self: True)


@pytest.mark.usefixtures("busy_device")
@pytest.mark.parametrize("rule", RULES)
def test_where_the_host_does_not_wait_nothing_spreads_either(rule: str) -> None:
    module = mt2o(transfer=RULES[rule](), on_nonfinite="freeze", network=network(dropout=1e-9))
    with pytest.warns(UserWarning, match="Not finite after 4 batches.*trained no further"):
        trainer(callbacks=[_Poison(0, 2)], max_epochs=2).fit(module, loader())
    assert torch.isfinite(rows(module)[1:]).all()
    for buffer in module.population.network.buffers():
        assert torch.isfinite(buffer[1:].float()).all()


@pytest.mark.usefixtures("busy_device")
def test_where_the_host_does_not_wait_a_failure_of_one_batch_is_seen_a_batch_later() -> None:
    class Restarted(Callback):
        at: int | None = None

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            theta = pl_module.population.theta
            if self.at is None and pl_module.batches_seen > 2 and torch.isfinite(theta).all():
                self.at = pl_module.batches_seen

    module, check = mt2o(on_nonfinite="reseed", optimizer=OPTIMIZERS["adam"], transfer=NoTransfer()), Restarted()
    with pytest.warns(UserWarning, match=r"Not finite after 4 batches: subproblem 3.*Restarted from subproblem 2"):
        trainer(callbacks=[_Poison(3, 2), check], max_epochs=2).fit(module, loader())
    assert check.at == 5  # poisoned before the third batch, seen before the fifth
    assert torch.isfinite(rows(module)).all()


class _Spoil(Callback):
    """Let the gradient of a subproblem be NaN in one batch."""

    def __init__(self, subproblem: int, batch: int) -> None:
        self.subproblem, self.batch = subproblem, batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.batches_seen == self.batch:
            chunks = pl_module._seeded_chunks

            def spoilt() -> Any:
                yield from chunks()
                pl_module.population.theta.grad[self.subproblem] = torch.nan
                pl_module._seeded_chunks = chunks

            pl_module._seeded_chunks = spoilt


@pytest.mark.usefixtures("busy_device")
@pytest.mark.parametrize("batch", [2, 3, 4])
def test_a_failure_in_one_of_the_last_batches_is_not_overlooked(batch: int) -> None:
    with pytest.raises(FloatingPointError, match="subproblem 2"):
        trainer(callbacks=[_Spoil(2, batch)]).fit(mt2o(on_nonfinite="raise"), loader())  # of 5 batches


@pytest.mark.filterwarnings("ignore:Not finite")
@pytest.mark.usefixtures("busy_device")
def test_resumed_equals_uninterrupted_where_the_host_does_not_wait(tmp_path: Path) -> None:
    def run(callbacks: Sequence[Callback]) -> tuple[MT2OModule, Trainer]:
        seed_everything(3)
        module = mt2o(on_nonfinite="reseed", optimizer=OPTIMIZERS["adam"], transfer=RULES["neighbor"]())
        return module, trainer([_Spoil(1, 2), *callbacks], max_epochs=2, default_root_dir=str(tmp_path))

    save = SaveAfterEachBatch(tmp_path)
    module, first = run([save])
    first.fit(module, Position())
    for path in save.paths[:-1]:
        resumed, again = run([])
        again.fit(resumed, Position(), ckpt_path=str(path))
        assert torch.equal(rows(resumed), rows(module)), path.name


@pytest.mark.usefixtures("busy_device")
def test_a_loss_that_fails_once_is_not_overlooked_where_the_host_does_not_wait() -> None:
    class Once(nn.Module):
        calls = 0

        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            Once.calls += 1
            return functional.l1_loss(preds, target) + (torch.nan if Once.calls == 6 else 0.0)

    tasks = [Task("a", Once()), Task("b", nn.L1Loss())]
    module = mt2o(tasks=tasks, on_nonfinite="reseed", backend="loop", transfer=NoTransfer())  # four calls a batch
    with pytest.warns(UserWarning, match=r"Not finite after 3 batches: subproblem 1"):
        trainer(max_epochs=2).fit(module, loader())


@pytest.mark.usefixtures("busy_device")
def test_the_end_of_an_epoch_waits_for_the_last_batch() -> None:
    with pytest.raises(FloatingPointError, match="subproblem 2"):
        trainer(callbacks=[_Poison(2, 4)]).fit(mt2o(on_nonfinite="raise"), loader())  # the last of 5 batches


def test_whether_the_host_waits_changes_nothing_where_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for known in (True, False):
        for module in (devices, modules_population):
            monkeypatch.setattr(module, "is_read_at_once", lambda tensor, known=known: known)
        seed_everything(0)
        trained = mt2o(growth=Doubling(every_n_batches=2), optimizer=OPTIMIZERS["adam"])
        trainer(max_epochs=2).fit(trained, loader(), loader())
        states.append(rows(trained))
    assert torch.equal(*states)


class _Watched(Callback):
    """Starts to watch with the second batch: what is done once is done by then."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self.exit = ExitStack()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.exit.enter_context(self.reads)
            self.exit.enter_context(self.reads.operators)

    def on_train_end(self, *_: Any) -> None:
        self.exit.close()


@pytest.mark.usefixtures("busy_device")
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"transfer": AdvantageTransfer()},
        {"transfer": DistanceTransfer()},
        {"transfer": NoTransfer(), "gradient_clip_norm": 1.0},
        {"scalarization": SmoothChebyshev()},
        {"batches": "independent"},
        {"backend": "loop"},
    ],
    ids=str,
)
def test_nothing_waits_for_the_device_inside_a_batch(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = mt2o(**{"backend": "vmap", **arguments})
    reads = Reads(
        monkeypatch,
        [
            (MT2OModule, "training_step", "found"),
            (MT2OModule, "_heal", "deferred"),  # what was sent to the host a batch before
            (MT2OModule, "_log_training", "deferred"),
        ],
    )
    trainer(callbacks=[_Watched(reads)], log_every_n_steps=1000).fit(module, loader())
    assert reads.found == []
    assert "nonzero" in reads.deferred


def test_children_of_a_frozen_subproblem_come_from_a_healthy_one() -> None:
    module = mt2o(on_nonfinite="freeze", growth=Doubling(every_n_batches=4))
    with pytest.warns(UserWarning, match="trained no further"):
        trainer(callbacks=[_Poison(0, 5)], max_epochs=2).fit(module, loader())
    assert module.population.size == 4
    assert torch.isfinite(rows(module)).all()


@pytest.mark.parametrize("answer", ["freeze", "reseed"])
def test_a_sick_subproblem_does_not_stop_the_others_under_a_gradient_scaler(answer: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    module = mt2o(on_nonfinite=answer)
    before = rows(module)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    with pytest.warns(UserWarning, match="Not finite"):
        trainer(callbacks=[_Poison(1, 1)], plugins=[precision], max_epochs=2).fit(module, loader())
    assert scaler.get_scale() == 8.0  # no step was skipped
    assert torch.isfinite(rows(module)[[0, 2, 3]]).all()
    assert ((rows(module) - before)[[0, 2, 3]].norm(dim=1) > 0.1).all()


# -------------------------------------------------------------------------------------------------------- precision


def test_transfer_is_exact_under_mixed_precision() -> None:
    module = mt2o(
        transfer=NeighborTransfer(0.37, decay=1.0),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        network=network(dropout=0.1),
    )
    before = rows(module)
    trainer(precision="bf16-mixed", max_epochs=4).fit(module, loader())
    # All rows are equal: whatever the matrix, their mixture is the same row, to rounding in single precision.
    torch.testing.assert_close(rows(module), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_precisions_train(precision: Any, backend: str) -> None:
    module = mt2o(backend=backend, transfer=AdvantageTransfer(), growth=Doubling(every_n_batches=2))
    run = trainer(precision=precision, max_epochs=2)
    run.fit(module, loader(), loader(size=27))
    first = mt2o()
    trainer().validate(first, loader(size=27), verbose=False)
    assert (module.objective_values < first.objective_values).all()


def test_objective_values_are_summed_in_single_precision() -> None:
    module = mt2o()
    long = DataLoader(Pairs(6000), batch_size=8)
    trainer(precision="bf16-true").validate(module, long, verbose=False)
    values = module.objective_values
    module.float()
    torch.testing.assert_close(values, _reference_values(module, Pairs(6000)), rtol=0.02, atol=0.02)


def test_the_logged_training_loss_is_that_of_its_step(tmp_path: Path) -> None:
    class Losses(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            inputs, targets = batch
            losses = pl_module.population.evaluate(pl_module.loss_vector, inputs, targets)
            self.values.append(losses.mean().item())

    losses, logger = Losses(), CSVLogger(tmp_path)
    trainer([losses], max_epochs=3, logger=logger, log_every_n_steps=3).fit(mt2o(), loader())
    with Path(logger.log_dir, "metrics.csv").open() as file:
        logged = {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]}
    assert set(logged) >= {2, 5, 8, 11, 14}
    assert logged == pytest.approx({step: losses.values[step] for step in logged}, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- resuming


def _run_of_everything(
    folder: Path, callbacks: Sequence[Callback] = (), **arguments: Any
) -> tuple[MT2OModule, Trainer]:
    seed_everything(7)
    module = mt2o(
        network=network(dropout=0.3),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
        scalarization=SmoothChebyshev(mu=0.1),
        transfer=arguments.pop("transfer", AdvantageTransfer()),
        growth=Doubling(every_n_batches=3),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
        lr_scheduler_interval="step",
        accumulate_batches=2,
        transfer_every=2,
        gradient_clip_norm=1.0,
    )
    return module, trainer(callbacks, max_epochs=3, default_root_dir=str(folder), **arguments)


@pytest.mark.parametrize("rule", ["neighbor", "distance", "advantage"])
def test_resumed_after_any_batch_equals_uninterrupted_bit_for_bit(rule: str, tmp_path: Path) -> None:
    save = SaveAfterEachBatch(tmp_path)
    module, run = _run_of_everything(tmp_path, [save], transfer=RULES[rule]())
    run.fit(module, Position(), loader())
    expected, optimizer = module.state_dict(), run.optimizers[0].state_dict()["state"][0]
    for path in save.paths[:-1]:
        resumed, again = _run_of_everything(tmp_path, transfer=RULES[rule]())
        seed_everything(99)  # a new process has another random state
        again.fit(resumed, Position(), loader(), ckpt_path=str(path))
        assert_equal_states(resumed.state_dict(), expected)
        assert_equal_states(again.optimizers[0].state_dict()["state"][0], optimizer)
        assert again.global_step == run.global_step


def _observed_run(folder: Path, callbacks: Sequence[Callback], **arguments: Any) -> tuple[MT2OModule, Trainer]:
    """A run whose archive, curve, reference point, ideal point and plateau depend on every validation."""
    seed_everything(3)
    module = mt2o(
        network=MultiHeadNetwork(MLP(100, [8]), {name: nn.Linear(8, 10) for name in ("left", "right")}),
        tasks=[Task(name, nn.CrossEntropyLoss()) for name in ("left", "right")],
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        scalarization=Chebyshev(ideal=TrackedIdeal(2)),
        transfer=AdvantageTransfer(),
        lr_scheduler=partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5),
        lr_scheduler_monitor="val_loss",
        on_nonfinite="reseed",
    )
    return module, trainer(callbacks, max_epochs=3, default_root_dir=str(folder), **arguments)


@pytest.mark.filterwarnings("ignore:Not finite")
@pytest.mark.parametrize("interval", [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}], ids=str)
def test_archive_and_reference_point_are_those_of_the_uninterrupted_run(
    interval: dict[str, Any], tmp_path: Path
) -> None:
    def observers(folder: Path) -> list[Callback]:
        front, curve = ParetoFrontCallback(dirpath=folder, figure_every=0), HypervolumeCallback(dirpath=folder)
        return [front, curve, _Poison(1, 2)]

    def state(module: MT2OModule, run: Trainer) -> dict[str, Any]:
        front, curve = run.callbacks[0], run.callbacks[1]  # type: ignore[attr-defined]
        optimizer = run.optimizers[0]
        return {
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict()["state"][0] | {"lr": optimizer.param_groups[0]["lr"]},
            "archive": {str(index): row for index, row in enumerate(front.archive)},
            "curve": {str(index): row for index, row in enumerate(curve.curve)},
            "reference_point": curve.reference_point,
        }

    def data() -> MultiDigitsDataModule:
        return MultiDigitsDataModule(num_train=160, num_val=96, num_test=32, batch_size=32)

    save = SaveAfterEachBatch(tmp_path)
    module, run = _observed_run(tmp_path, [*observers(tmp_path / "whole"), save], **interval)
    run.fit(module, datamodule=data())
    expected = state(module, run)
    assert len(save.paths) == 15
    for index, path in enumerate(save.paths):
        folder = tmp_path / f"resumed-{index}"
        resumed, again = _observed_run(tmp_path, observers(folder), **interval)
        seed_everything(99)
        again.fit(resumed, datamodule=data(), ckpt_path=str(path))
        assert_equal_states(state(resumed, again), expected)


def test_a_checkpoint_of_another_population_is_refused(tmp_path: Path) -> None:
    module, run = mt2o(), trainer()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "four.ckpt")
    other = mt2o(preferences=simplex_lattice(num_tasks=2, num_divisions=6))
    with pytest.raises(ValueError, match=r"preferences .*found \[\[0\.0, 1\.0\]"):
        trainer(max_epochs=2).fit(other, loader(), ckpt_path=str(tmp_path / "four.ckpt"))


def test_load_from_checkpoint_gives_the_models_and_their_values(tmp_path: Path) -> None:
    module, run = mt2o(), trainer()
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = MT2OModule.load_from_checkpoint(
        tmp_path / "run.ckpt",
        network=network(1),
        tasks=tasks(),
        preferences=module.preferences,
        optimizer=OPTIMIZERS["sgd"],
        weights_only=True,
    )
    assert torch.equal(flat(loaded.subproblem(2)), flat(module.subproblem(2)))
    assert torch.equal(loaded.objective_values, module.objective_values)


# ------------------------------------------------------------------------------------------------------------- ranks


class _WriteRows(Callback):
    """Write what each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        values = pl_module.objective_values
        torch.save({"theta": rows(pl_module), "values": values}, self.folder / f"rank-{trainer.global_rank}.pt")


@pytest.mark.parametrize("scalarization", [Linear(), SmoothChebyshev(mu=0.1)], ids=["linear", "chebyshev"])
@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_with_half_batches_equal_one_process(rule: str, scalarization: Any, tmp_path: Path) -> None:
    def build() -> MT2OModule:
        return mt2o(
            transfer=RULES[rule](),
            scalarization=scalarization,
            growth=Doubling(every_n_batches=2),
            gradient_clip_norm=0.5,
        )

    _assert_ranks_equal_one(build, list(loader(batch_size=8)), tmp_path)


def test_two_ranks_equal_one_process_where_labels_are_missing_on_one(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            known = ~target.isnan()
            return torch.where(known, preds - target, 0.0).square().sum() / known.sum()

    def build() -> MT2OModule:
        return mt2o(tasks=[Task("a", nn.MSELoss()), Task("b", Masked())], scalarization=Chebyshev(), backend="auto")

    batches = list(loader(batch_size=8))
    for index, (_, targets) in enumerate(batches):
        targets["b"][index % 2 :: 2] = torch.nan  # all of one rank's
        targets["b"][:3] = torch.nan  # and an unequal number of the other's
    for name in ("a", "b"):
        batches[2][1][name][:] = torch.nan  # nobody has a label
    _assert_ranks_equal_one(build, batches, tmp_path)


def _assert_ranks_equal_one(build: Callable[[], MT2OModule], batches: list[Any], folder: Path) -> None:
    alone = build()
    trainer(max_epochs=2).fit(alone, Interleaved(batches), Interleaved(batches))
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    run = trainer([_WriteRows(folder)], max_epochs=2, devices=2, strategy=strategy, use_distributed_sampler=False)
    run.fit(build(), Interleaved(batches), Interleaved(batches))
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0]["theta"], ranks[1]["theta"])
    torch.testing.assert_close(ranks[0]["theta"], rows(alone), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ranks[0]["values"], alone.objective_values, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"preferences": torch.tensor([[0.5, 0.6]])}, "sum to one"),
        ({"preferences": torch.tensor([[-0.5, 1.5]])}, "negative"),
        ({"preferences": torch.tensor([[0.2, 0.3, 0.5]])}, r"one column per task.*\(1, 3\)"),
        ({"preferences": torch.empty(0, 2)}, "at least one"),
        ({"tasks": tasks()[:1]}, "at least 2 tasks"),
        ({"tasks": [Task("a", nn.L1Loss()), Task("a", nn.L1Loss())]}, "unique"),
        ({"transfer_every": 0}, "transfer_every"),
        ({"accumulate_batches": 0}, "accumulate_batches"),
        ({"gradient_clip_norm": 0.0}, "gradient_clip_norm"),
        ({"transfer_parameters": ["trunk.*"]}, "trunk"),
        ({"batches": "own"}, "batches"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite"),
        ({"growth": Doubling(5), "init": "independent"}, "inherit"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        mt2o(**arguments)


def test_an_optimiser_that_couples_rows_is_refused_before_training() -> None:
    module = mt2o(optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match=r"optimiser of a population.*LBFGS"):
        trainer().fit(module, loader())


@pytest.mark.parametrize(
    ("flags", "match"),
    [({"gradient_clip_val": 1.0}, "gradient_clip_norm"), ({"accumulate_grad_batches": 2}, "accumulate_batches")],
)
def test_trainer_flags_that_do_not_reach_are_refused(flags: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        trainer(**flags).fit(mt2o(), loader())


class _Bad(nn.Module):
    """A network whose output lacks a task."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"a": self.layer(inputs)}


@pytest.mark.parametrize("backend", ["auto", "vmap", "loop"])
def test_a_task_missing_from_the_output_is_named(backend: str) -> None:
    with pytest.raises(ValueError, match=r"network's output should hold every task. Missing: 'b'; found: 'a'"):
        trainer().fit(mt2o(network=_Bad(), backend=backend), loader())


def test_a_task_missing_from_the_targets_is_named() -> None:
    named = [*tasks(), Task("c", nn.L1Loss())]
    module = mt2o(tasks=named, preferences=simplex_lattice(num_tasks=3, num_divisions=2))
    with pytest.raises(ValueError, match=r"targets should hold every task. Missing: 'c'"):
        trainer().fit(module, loader())


@pytest.mark.parametrize("backend", ["auto", "vmap", "loop"])
def test_a_loss_that_is_no_scalar_is_refused(backend: str) -> None:
    named = [Task("a", nn.MSELoss(reduction="none")), Task("b", nn.L1Loss())]
    with pytest.raises(ValueError, match=r"loss of task 'a' should be a scalar. Found shape \(8, 1\)"):
        trainer().fit(mt2o(tasks=named, backend=backend), loader())


def test_a_batch_smaller_than_the_population_is_refused_when_independent() -> None:
    with pytest.raises(ValueError, match=r"at least one sample per subproblem \(4\). Found 3"):
        trainer().fit(mt2o(batches="independent"), loader(batch_size=3))


def test_a_batch_of_another_form_asks_for_unpack_batch() -> None:
    data: DataLoader[Any] = DataLoader([torch.zeros(6)] * 4, batch_size=2)  # type: ignore[arg-type]
    module = mt2o()
    with pytest.raises(ValueError, match=r"Found Tensor.*Override `unpack_batch`"):
        trainer().fit(module, data)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"network": "mlp"}, "network"),
        ({"scalarization": "Linear"}, "scalarization"),
        ({"transfer": NoTransfer}, "transfer"),
        ({"growth": 3}, "growth"),
        ({"transfer_parameters": "encoder.*"}, "list of patterns"),
        ({"accumulate_batches": 1.5}, "accumulate_batches"),
        ({"transfer_every": 2.0}, "transfer_every"),
        ({"chunk_size": 2.5}, "chunk_size"),
    ],
)
def test_constructor_refuses_kinds(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        mt2o(**arguments)


def test_an_ideal_point_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="3"):
        mt2o(scalarization=Chebyshev(ideal=(0.0, 0.0, 5.0)))


def test_targets_that_are_no_tensors_are_named() -> None:
    data: DataLoader[Any] = DataLoader([(torch.zeros(6), {"a": torch.zeros(1), "b": "x"})] * 4, batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target of task 'b' should be a tensor.*list"):
        trainer().fit(mt2o(), data)


def test_layers_that_were_replaced_are_refused() -> None:
    module = mt2o(network=network(dropout=0.1))
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    module.population.network = convert(module.population.network)
    with pytest.raises(RuntimeError, match="sync_batchnorm"):
        trainer().fit(module, loader())


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.lstm(inputs.unsqueeze(1))[0][:, -1]
        return {"a": self.head(hidden), "b": self.head(hidden)}


def test_a_network_that_vmap_cannot_run_falls_to_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    module = mt2o(network=_Recurrent(), backend="auto")
    trainer(max_epochs=2).fit(module, loader())
    assert module.population.active_backend == "loop"
    assert sum("the loop is used" in record.message for record in caplog.records) == 1


def test_a_network_that_vmap_cannot_run_is_refused_under_vmap() -> None:
    with pytest.raises(RuntimeError, match="backend='loop'"):
        trainer().fit(mt2o(network=_Recurrent(), backend="vmap"), loader())
