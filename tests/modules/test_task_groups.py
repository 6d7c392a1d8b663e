from __future__ import annotations

import copy
import csv
import itertools
import pickle
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanSquaredError

from mtl_lightning import split_network
from mtl_lightning.group_updates import GroupUpdates
from mtl_lightning.grouping import (
    AffinityPropagation,
    AllTogether,
    Fisher,
    Fixed,
    GroupingRule,
    OneByOne,
    RandomGroups,
    Threshold,
)
from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.modules.base import MultiTaskModule
from mtl_lightning.modules.health import TaskHealth
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.protocols import TaskGroupProtocol, TaskLossesProtocol
from mtl_lightning.task import Task
from tests.modules.common import Interleaved, Position, Reads, SaveAfterEachBatch, assert_equal_states, trainer
from tests.modules.processes import Synchronised

NAMES = ("a", "b", "c", "d")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
}
Batch = tuple[Tensor, dict[str, Tensor]]


class Batches(list[Batch]):
    """A list that Lightning takes for one loader, where it takes a plain one for a collection of them."""


def batches(count: int = 6, size: int = 8, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(6, len(NAMES), generator=generator)
    found = Batches()
    for _ in range(count):
        inputs = torch.randn(size, 6, generator=generator)
        values = inputs @ weights + 0.1 * torch.randn(size, len(NAMES), generator=generator)
        found.append((inputs, {name: values[:, [index]] for index, name in enumerate(NAMES)}))
    return found


class StochasticDepth(nn.Module):
    """Drops whole samples of a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return features + self.layer(features)
        kept = torch.rand(len(features), 1, device=features.device) < 0.7
        return features + kept * self.layer(features)


def network(noisy: bool = False, split: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    encoder: nn.Module = MLP(6, [8])
    head: Callable[[], nn.Module] = partial(nn.Linear, 8, 1)
    if noisy:
        encoder = nn.Sequential(encoder, nn.BatchNorm1d(8), nn.Dropout(0.3), StochasticDepth(8))

        def head() -> nn.Module:
            return nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    joined = MultiHeadNetwork(encoder, {name: head() for name in NAMES})
    return joined if split else Whole(joined)


class Whole(nn.Module):
    """Hides how a network is built."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network

    def forward(self, inputs: Tensor) -> Any:
        return self.inner(inputs)


def tasks() -> list[Task]:
    return [Task(name, nn.MSELoss() if index % 2 else nn.L1Loss()) for index, name in enumerate(NAMES)]


def task_groups(**arguments: Any) -> TaskGroupModule:
    defaults: dict[str, Any] = {
        "network": network(),
        "tasks": tasks(),
        "optimizer": OPTIMIZERS["sgd"],
        "grouping": Fixed([["a", "c"], ["b"], ["d"]]),
    }
    return TaskGroupModule(**(defaults | arguments))


def heads(module: TaskGroupModule) -> Any:
    return module.network.heads


def flat(module: TaskGroupModule) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.network.parameters()])


class Orders(Callback):
    """Keeps the groups of every batch, in the order of their steps."""

    def __init__(self) -> None:
        self.groups: list[list[list[str]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.groups.append(pl_module.task_groups)


# ----------------------------------------------------------------------------------------------- numbers worked by hand


class _Scalar(nn.Module):
    """``L_k = (c_k s + a_k - y_k)^2 / 2``, with one shared number and one per task."""

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.s.expand(len(inputs))

    class Head(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor
            self.a = nn.Parameter(torch.zeros(()))

        def forward(self, features: Tensor) -> Tensor:
            return self.factor * features + self.a

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.encoder = self.Trunk()
        self.heads = nn.ModuleDict({name: self.Head({"1": 1.0, "2": 2.0, "3": -2.0}[name]) for name in names})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.encoder(inputs)
        return {name: head(features) for name, head in self.heads.items()}


def _half_square(preds: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (preds - target).square().mean()


def _by_hand(groups: Sequence[Sequence[str]], **arguments: Any) -> TaskGroupModule:
    groups = [list(group) for group in groups]
    names = [name for group in groups for name in group]  # unshuffled, groups go by their first task
    module = TaskGroupModule(
        **{
            "network": _Scalar(names),
            "tasks": [Task(name, _half_square) for name in names],
            "optimizer": partial(torch.optim.SGD, lr=0.1),
            "grouping": Fixed(groups),
            "shuffle": False,
            "single_group": "once",
            "measure_last": True,
            **arguments,
        }
    )
    target = {"1": 1.0, "2": 1.0, "3": 2.0}
    batch = (torch.zeros(1), {name: torch.full((1,), target[name], dtype=torch.float64) for name in names})
    trainer(precision="64-true").fit(module, Batches([batch]))
    return module


def _sum_of_losses(module: TaskGroupModule) -> float:
    values = {name: float(parameter) for name, parameter in module.network.named_parameters()}
    rest = [
        {"1": 1.0, "2": 2.0, "3": -2.0}[task] * values["encoder.s"] + values[f"heads.{task}.a"] - (1.0 + (task == "3"))
        for task in "123"
    ]
    return sum(0.5 * value**2 for value in rest)


@pytest.mark.parametrize(
    ("groups", "shared", "heads", "total"),
    [
        (["1", "2", "3"], -0.244, (0.1, 0.08, 0.252), 2.4394),
        (["12", "3"], -0.22, (0.1, 0.1, 0.26), 2.37),
        (["3", "12"], 0.1, (0.14, 0.18, 0.2), 2.481),
        (["13", "2"], 0.02, (0.1, 0.16, 0.2), 2.40),
        (["123"], -0.1, (0.1, 0.1, 0.2), 2.385),
    ],
)
def test_a_batch_by_hand(groups: list[str], shared: float, heads: tuple[float, ...], total: float) -> None:
    module = _by_hand(groups)
    found = {name: float(parameter) for name, parameter in module.network.named_parameters()}
    expected = {"encoder.s": shared} | {f"heads.{task}.a": value for task, value in zip("123", heads, strict=True)}
    assert found == pytest.approx(expected, abs=1e-9)
    assert _sum_of_losses(module) == pytest.approx(total, abs=1e-9)


def test_the_mean_over_the_orders_of_single_tasks() -> None:
    totals = [_sum_of_losses(_by_hand(list(order))) for order in itertools.permutations("123")]
    found = sum(totals) / 6, min(totals), max(totals)
    assert found == pytest.approx((2.390167, 2.309064, 2.444136), abs=5e-7)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["1", "2", "3"], [[0.36, 0.36, -0.21], [0.36, 0.75, -0.312066116], [-2.19515625, -11.3904, 0.75]]),
        (["12", "3"], [[0.32, 0.455, -0.345], [0.32, 0.455, -0.345], [-2.484444444, -18.951111111, 0.75]]),
        (["3", "12"], [[0.75, -0.96, -2.24], [-1.5, 0.352653061, 0.440679012], [-1.5, 0.352653061, 0.440679012]]),
        (["13", "2"], [[0.0, -0.32, -0.78], [-0.32, 0.32, -0.78], [0.462222222, -1.351111111, 0.75]]),
    ],
)
def test_affinities_of_a_batch_by_hand(groups: list[str], expected: list[list[float]]) -> None:
    # Rows and columns in the order of the steps.
    module = _by_hand(groups, affinity_decay=1.0)
    torch.testing.assert_close(module.affinity_matrix, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("groups", "arguments", "expected"),
    [
        (["1", "2", "3"], {}, [[0.0, 0.0, 0.0], [0.36, 0.36, -0.21], [0.36, 0.75, 0.0]]),
        (["12", "3"], {}, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.64, 0.91, 0.0]]),
        (["3", "12"], {}, [[0.0, 0.0, 0.0], [0.375, 0.0, -1.12], [0.375, -0.48, 0.0]]),
        (["2", "13"], {}, [[0.0, 0.0, 0.0], [0.375, 0.18, -0.18], [0.375, -0.18, 0.0]]),
        (["123"], {"single_group": "repeat"}, [[0.0, -0.07, 0.12], [0.0, 0.0, -0.12], [0.0, -0.12, 0.12]]),
    ],
)
def test_published_attribution_of_a_batch_by_hand(
    groups: list[str], arguments: dict[str, Any], expected: list[list[float]]
) -> None:
    module = _by_hand(
        groups,
        affinity_decay=1.0,
        attribution="published",
        bias_correction=False,
        measure_last=False,
        **arguments,
    )
    found = module.affinity_matrix
    if groups == ["123"]:
        # The first increment is zero but for rounding, whose sign decides the case of its row and column.
        found[0], found[:, 0] = torch.tensor(expected[0], dtype=torch.float64), 0.0
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("first", "expected"),
    [("1", (0.36, 0.36, -0.21)), ("2", (0.19, 0.51, -0.21)), ("3", (-0.21, -0.44, 0.2775))],
)
def test_the_first_step_of_adam_by_hand(first: str, expected: tuple[float, ...]) -> None:
    order = [first, *(task for task in "123" if task != first)]
    adam = partial(torch.optim.Adam, lr=0.1)
    row = _by_hand(order, optimizer=adam, affinity_decay=1.0).affinity_matrix[0]
    assert {task: float(row[order.index(task)]) for task in "123"} == pytest.approx(
        dict(zip("123", expected, strict=True)), abs=1e-6
    )


@pytest.mark.parametrize(("rate", "tolerance"), [(1e-2, 0.03), (1e-3, 2e-3)])
def test_sequential_minus_joint_is_of_second_order(rate: float, tolerance: float) -> None:
    sgd = partial(torch.optim.SGD, lr=rate)
    orders = [_sum_of_losses(_by_hand(list(order), optimizer=sgd)) for order in itertools.permutations("123")]
    gap = sum(orders) / 6 - _sum_of_losses(_by_hand(["123"], optimizer=sgd))
    assert gap / (-9 * rate**2) == pytest.approx(1.0, abs=tolerance)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("123", (-16, 0, -2, 6)),
        ("132", (8, 0, 6, 2)),
        ("213", (-14, -2, 0, 6)),
        ("231", (-6, 2, 0, 4)),
        ("312", (16, 4, 6, 0)),
        ("321", (18, 2, 8, 0)),
    ],
)
def test_the_order_displaces_parameters_in_second_order(order: str, expected: tuple[float, ...]) -> None:
    rate = 1e-5
    sgd = partial(torch.optim.SGD, lr=rate)
    names = ["encoder.s", "heads.1.a", "heads.2.a", "heads.3.a"]
    sequence, joint = (dict(_by_hand(groups, optimizer=sgd).network.named_parameters()) for groups in (order, ["123"]))
    found = [float((sequence[name] - joint[name]).detach()) / rate**2 for name in names]
    assert found == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize(("group", "expected"), [("12", (0.36, 0.51, -0.21)), ("13", (0.0, -0.44, 0.2775))])
def test_the_first_step_of_adam_for_a_group_by_hand(group: str, expected: tuple[float, ...]) -> None:
    (alone,) = set("123") - set(group)
    module = _by_hand([group, alone], optimizer=partial(torch.optim.Adam, lr=0.1), affinity_decay=1.0)
    order = [*group, alone]
    # The increment towards the task outside is the change of its loss, halved; it is not touched by signs inside.
    outside = float(module.affinity_matrix[0, 2]) * 2
    assert outside == pytest.approx(expected["123".index(alone)], abs=1e-6)
    inside = {task: 2 * float(module.affinity_matrix[place, place]) for place, task in enumerate(order[:2])}
    assert inside == pytest.approx({task: max(expected["123".index(task)], 0.0) for task in group}, abs=1e-6)


# ---------------------------------------------------------------------------------------- against a plain training loop


def _reference_run(
    net: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer], orders: Sequence[Sequence[Sequence[str]]]
) -> Tensor:
    losses = {task.name: task.loss for task in tasks()}
    stepper = optimizer(list(net.parameters()))
    for (inputs, targets), groups in zip(batches(), orders, strict=True):
        for group in groups:
            stepper.zero_grad()
            outputs = net(inputs)
            total: Any = torch.stack([losses[name](outputs[name], targets[name]) for name in group]).sum()
            total.backward()
            stepper.step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_equals_a_plain_loop_over_the_groups(name: str, split: bool) -> None:
    module, orders = task_groups(network=network(split=split), optimizer=OPTIMIZERS[name]), Orders()
    trainer([orders]).fit(module, batches())
    expected = _reference_run(network(split=split), OPTIMIZERS[name], orders.groups)
    torch.testing.assert_close(flat(module), expected, rtol=1e-6, atol=1e-7)
    assert len({str(groups) for groups in orders.groups}) > 1  # they are shuffled


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_group_once_is_the_joint_step(name: str) -> None:
    module = task_groups(grouping=AllTogether(), single_group="once", optimizer=OPTIMIZERS[name])
    trainer().fit(module, batches())
    expected = _reference_run(network(), OPTIMIZERS[name], [[NAMES]] * 6)
    torch.testing.assert_close(flat(module), expected, rtol=1e-6, atol=1e-7)


def test_a_single_group_repeats_on_the_batch() -> None:
    module = task_groups(grouping=AllTogether())
    trainer().fit(module, batches())
    expected = _reference_run(network(), OPTIMIZERS["sgd"], [[NAMES, NAMES]] * 6)
    torch.testing.assert_close(flat(module), expected, rtol=1e-6, atol=1e-7)
    assert module.affinity_matrix.any()
    assert module.task_groups == [list(NAMES)]


def test_weights_are_in_the_objective_and_not_in_the_affinity() -> None:
    halved = task_groups(loss_weights=dict.fromkeys(NAMES, 0.5), optimizer=partial(torch.optim.SGD, lr=0.1))
    plain = task_groups(optimizer=partial(torch.optim.SGD, lr=0.05))
    for module in (halved, plain):
        seed_everything(0)
        trainer().fit(module, batches())
    torch.testing.assert_close(flat(halved), flat(plain))
    torch.testing.assert_close(halved.affinity_matrix, plain.affinity_matrix, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- other heads


class _Watched(TaskGroupModule):
    """Compares the heads outside the group, and what the optimiser holds for them, before and after each step."""

    compared = 0

    def _step(self, group: Sequence[int], is_last: bool) -> None:
        others = [name for index, name in enumerate(NAMES) if index not in group]
        before = self._snapshot(others)
        super()._step(group, is_last)
        assert_equal_states(self._snapshot(others), before)
        self.compared += len(before)

    def _snapshot(self, names: Sequence[str]) -> dict[str, Any]:
        optimizer: Any = self.optimizers()
        head: Any = self.network.heads
        parameters = {f"{name}.{key}": p for name in names for key, p in head[name].named_parameters()}
        return {
            key: {"value": p.detach().clone(), **copy.deepcopy(dict(optimizer.state[p]))}
            for key, p in parameters.items()
        }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_heads_outside_the_group_stay_bit_identical(name: str) -> None:
    module = _Watched(network(noisy=True), tasks(), OPTIMIZERS[name], Fixed([["a", "c"], ["b"], ["d"]]))
    trainer(max_epochs=2).fit(module, batches())
    assert module.compared > 100


def test_zeroed_gradients_let_momentum_move_the_other_heads() -> None:
    # Adam with a constant gradient: per batch a head moves sqrt(M) times as far as when it is left alone.
    def moved(inactive: Any) -> float:
        names = [f"t{index}" for index in range(4)]
        net: Any = MultiHeadNetwork(nn.Linear(1, 1), {name: nn.Linear(1, 1, bias=False) for name in names})
        nn.init.zeros_(net.encoder.weight)
        nn.init.ones_(net.encoder.bias)
        net.encoder.requires_grad_(False)
        linear = [Task(name, lambda preds, target: preds.mean() + 1e3) for name in names]
        module = TaskGroupModule(
            net, linear, partial(torch.optim.Adam, lr=1e-3), OneByOne(), inactive_heads=inactive, track_every=0
        )
        before = [head.weight.detach().clone() for head in net.heads.values()]
        batch = (torch.zeros(1, 1), {name: torch.zeros(1) for name in names})
        trainer().fit(module, Batches([batch] * 400))
        steps = [(head.weight.detach() - old).abs() for head, old in zip(net.heads.values(), before, strict=True)]
        return float(torch.stack(steps).mean()) / 400 / 1e-3

    assert moved("skip") == pytest.approx(1.0, abs=1e-3)
    assert moved("zero_grad") == pytest.approx(2.0, abs=0.05)


# ----------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("split", [True, False])
def test_without_learning_every_affinity_is_exactly_zero(split: bool) -> None:
    module = task_groups(
        network=network(noisy=True, split=split), optimizer=partial(torch.optim.SGD, lr=0.0), measure_last=True
    )
    trainer().fit(module, batches())
    assert not module.affinity_matrix.any()
    assert (module.updates.affinity.counts > 0).all()


def test_unpaired_passes_take_noise_for_affinity() -> None:
    module = task_groups(network=network(noisy=True), optimizer=partial(torch.optim.SGD, lr=0.0), paired=False)
    trainer().fit(module, batches())
    assert module.affinity_matrix.abs().max() > 1e-3


def test_batch_statistics_are_taken_up_once_a_batch() -> None:
    grouped, joint = (
        task_groups(network=network(noisy=True), optimizer=partial(torch.optim.SGD, lr=0.0), measure_last=True, **extra)
        for extra in ({"grouping": OneByOne()}, {"grouping": AllTogether(), "single_group": "once"})
    )
    for module in (grouped, joint):
        seed_everything(0)
        trainer().fit(module, batches())
    for (name, found), expected in zip(grouped.network.named_buffers(), joint.network.buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_runs_repeat() -> None:
    first, second = (task_groups(network=network(noisy=True)) for _ in range(2))
    for module in (first, second):
        seed_everything(3)
        trainer().fit(module, batches())
    assert torch.equal(flat(first), flat(second))


# ----------------------------------------------------------------------------------------------------------------- cost


class _Counts(Callback):
    def __init__(self) -> None:
        self.trunk = self.head = self.backwards = self.steps = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.network.encoder.register_forward_hook(lambda *_: self._add("trunk"))
        for head in pl_module.network.heads.values():
            head.register_forward_hook(lambda *_: self._add("head"))

    def _add(self, name: str) -> None:
        setattr(self, name, getattr(self, name) + 1)

    def on_before_backward(self, *_: Any) -> None:
        self.backwards += 1

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize(
    ("arguments", "trunk", "head", "steps"),
    [
        ({}, 3, 12, 3),
        ({"measure_last": True}, 4, 16, 3),
        ({"grouping": AllTogether(), "single_group": "once"}, 1, 4, 1),
        ({"grouping": AllTogether()}, 2, 8, 2),
        ({"grouping": OneByOne()}, 4, 16, 4),
        ({"track_every": 0}, 3, 4, 3),
        ({"track_every": 2, "measure_last": True}, 3.5, 10, 3),
        ({"accumulate_batches": 2, "measure_last": True}, 4, 16, 1.5),
    ],
    ids=str,
)
def test_passes_and_steps_per_batch(arguments: dict[str, Any], trunk: float, head: float, steps: float) -> None:
    counts = _Counts()
    run = trainer([counts])
    run.fit(task_groups(**arguments), batches(6))
    assert (counts.trunk, counts.head, counts.steps) == (6 * trunk, 6 * head, 6 * steps)
    assert counts.backwards == counts.steps * arguments.get("accumulate_batches", 1)


def test_heads_outside_the_group_have_no_graph() -> None:
    graphs: list[tuple[str, bool]] = []
    module = task_groups()
    for name, head in heads(module).items():
        head.register_forward_hook(lambda _, __, output, name=name: graphs.append((name, output.requires_grad)))
    trainer(limit_train_batches=1).fit(module, batches())
    assert sorted(graphs) == sorted((name, with_graph) for name in NAMES for with_graph in (True, False, False))


# What the rule and the report on sick tasks read was sent to the host before; in batches that log Lightning reads.
_WATCHED = [
    (TaskGroupModule, "training_step", "found"),
    (GroupUpdates, "begin", "deferred"),
    (TaskHealth, "finish_batch", "deferred"),
    (TaskGroupModule, "_log_training", "deferred"),
]
_READING: list[dict[str, Any]] = [
    {},
    {"measure_last": True, "warmup_batches": 0, "grouping": Threshold(0.0)},
    {"grouping": OneByOne(), "paired": False, "gradient_clip_norm": 1.0},
    {"track_every": 0},
    {"accumulate_batches": 2, "inactive_heads": "zero_grad"},
]


@pytest.mark.parametrize("arguments", _READING, ids=str)
def test_nothing_waits_for_the_device_inside_a_batch(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_network, "is_read_at_once", lambda tensor: False)  # as of the tensors of a device
    monkeypatch.setattr(MultiTaskModule, "_counts_ahead", lambda self: True)
    module = task_groups(**arguments)
    trainer().fit(module, batches(2))  # what is done once is done now
    reads = Reads(monkeypatch, _WATCHED)
    with reads, reads.operators:
        trainer(log_every_n_steps=1000).fit(module, batches(4))
    assert reads.found == []
    assert "tolist" in reads.deferred  # that of the health at least: else nothing was watched


def test_on_the_cpu_a_pass_reads_the_losses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = task_groups(measure_last=True)
    trainer().fit(module, batches(2))
    reads = Reads(monkeypatch, _WATCHED)
    with reads, reads.operators:
        trainer(log_every_n_steps=1000).fit(module, batches(4))
    assert [read for read in reads.found if read != "as_tensor"] == ["tolist"] * 4 * (1 + 3)  # labels are counted first


@pytest.mark.filterwarnings("ignore:The loss of task")
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_what_the_cpu_knows_of_losses_changes_nothing(kind: str, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches()
    data[1][1]["b"][:] = 1e6
    states = []
    for known in (True, False):
        monkeypatch.setattr(split_network, "is_read_at_once", lambda tensor, known=known: known)
        module = task_groups(
            tasks=[Task(name, _Sick(kind) if name == "b" else nn.MSELoss()) for name in NAMES],
            grouping=Fixed([["a", "b"], ["c", "d"]]),
            network=network(split=split),
            optimizer=OPTIMIZERS["adam"],
        )
        seed_everything(0)
        trainer().fit(module, data)
        states.append((flat(module), module.affinity_matrix, module.health.total))
    assert all(torch.equal(known, asked) for known, asked in zip(*states, strict=True))


class _BeforeBackward(Callback):
    """What is known, and what is kept, when the backward passes of the first batch begin."""

    def __init__(self) -> None:
        self.measured: list[bool] = []
        self.kept: list[int] = []
        self._outputs: list[weakref.ref[Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for head in pl_module.network.heads.values():
            head.register_forward_hook(lambda _, __, output: self._outputs.append(weakref.ref(output)))

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        self.measured.append(bool(pl_module.updates.affinity.counts.any()))
        self.kept.append(sum(output() is not None for output in self._outputs))
        self._outputs.clear()


def test_a_step_is_measured_before_the_backward_pass_of_the_next() -> None:
    watch = _BeforeBackward()
    trainer([watch], limit_train_batches=1).fit(task_groups(), batches())
    assert watch.measured == [False, True, True]


def test_predictions_that_are_only_measured_are_not_kept_through_the_backward_pass() -> None:
    watch = _BeforeBackward()
    trainer([watch], limit_train_batches=1).fit(task_groups(shuffle=False), batches())
    assert all(kept <= trained for kept, trained in zip(watch.kept, (2, 1, 1), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_is_counted_in_updates(accumulate: int) -> None:
    module = task_groups(grouping=OneByOne(), accumulate_batches=accumulate)
    run = trainer(max_epochs=-1, max_steps=4)
    run.fit(module, batches(10))
    assert run.global_step == 4
    assert module.batches_seen == 4 * accumulate


# ----------------------------------------------------------------------------------------------------- groups over time


def test_tasks_are_alone_until_the_warm_up_is_over() -> None:
    orders = Orders()
    trainer([orders]).fit(task_groups(grouping=Threshold(-1e9), warmup_batches=4), batches(6))
    assert [len(groups) for groups in orders.groups] == [4, 4, 4, 4, 1, 1]


@pytest.mark.parametrize("rule", [AllTogether(), Fixed([["a", "b", "c", "d"]]), RandomGroups(1)], ids=str)
def test_rules_that_do_not_read_the_affinity_need_no_warm_up(rule: GroupingRule) -> None:
    orders = Orders()
    trainer([orders]).fit(task_groups(grouping=rule), batches(2))
    assert [len(groups) for groups in orders.groups] == [1, 1]


def test_the_rule_is_asked_every_so_many_updates() -> None:
    class Asked(OneByOne):
        calls = 0

        def groups(self, affinity: Tensor) -> list[list[int]]:
            self.calls += 1
            return super().groups(affinity)

    rule = Asked()
    trainer().fit(task_groups(grouping=rule, regroup_every=4), batches(10))
    assert rule.calls == 3


def test_the_affinity_is_measured_every_so_many_updates() -> None:
    module = task_groups(grouping=OneByOne(), track_every=3, measure_last=True)
    trainer().fit(module, batches(7))
    assert (module.updates.affinity.counts.sum(dim=1) <= 4 * 3).all()
    assert module.updates.affinity.counts.max() == 3


def test_affinity_propagation_regroups_in_a_run() -> None:
    orders = Orders()
    module = task_groups(grouping=AffinityPropagation(), warmup_batches=3, affinity_decay=0.2)
    trainer([orders], max_epochs=3).fit(module, batches(6))
    assert {len(groups) for groups in orders.groups[3:]} - {4}


def test_fisher_groups_by_the_gradients_of_the_shared_parameters() -> None:
    rule = Fisher(refresh_every=2)
    orders, module = Orders(), task_groups(network=network(noisy=True), grouping=rule)
    reference = task_groups(network=network(noisy=True), grouping=OneByOne())
    trainer([orders]).fit(module, batches(1))
    batch = batches(1)[0]
    torch.manual_seed(0)
    losses = reference.train().batch_losses(batch)
    assert losses.keys() == set(NAMES)
    assert sorted(itertools.chain(*orders.groups[0])) == list(NAMES)
    for (name, found), expected in zip(
        module.network.named_buffers(), _statistics_after(reference, batch), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=name)  # its passes leave no trace


def _statistics_after(module: TaskGroupModule, batch: Batch) -> list[Tensor]:
    module = copy.deepcopy(task_groups(network=network(noisy=True), grouping=OneByOne()))
    trainer().fit(module, Batches([batch]))
    return [buffer.clone() for buffer in module.network.buffers()]


# ------------------------------------------------------------------------------------ optimiser, schedule, accumulation


def test_accumulated_batches_equal_one_large_batch() -> None:
    small = batches(6)
    for _, targets in small[::2]:
        targets["b"][:5] = torch.nan  # unequal numbers of labels

    class Masked(nn.Module):
        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            known = ~target.isnan()
            return torch.where(known, preds - target, 0.0).square().sum() / known.sum()

    masked = [Task(name, Masked()) for name in NAMES]
    large = Batches(
        (
            torch.cat([small[i][0], small[i + 1][0]]),
            {name: torch.cat([small[i][1][name], small[i + 1][1][name]]) for name in NAMES},
        )
        for i in (0, 2, 4)
    )
    parts, whole = task_groups(tasks=masked, accumulate_batches=2), task_groups(tasks=masked)
    for module, data in ((parts, small), (whole, large)):
        seed_everything(1)
        trainer().fit(module, data)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.affinity_matrix, whole.affinity_matrix, rtol=1e-4, atol=1e-6)


def test_the_last_batch_of_an_epoch_updates() -> None:
    module, run = task_groups(accumulate_batches=4), trainer()
    run.fit(module, batches(6))
    assert run.global_step == 2


@pytest.mark.parametrize(("interval", "expected"), [("epoch", 0.5**2), ("step", 0.5**12)])
def test_schedulers_go_by_epoch_or_by_update(interval: str, expected: float) -> None:
    module = task_groups(
        optimizer=partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        lr_scheduler_interval=interval,
        gradient_clip_norm=1e-3,
    )
    run = trainer(max_epochs=2)
    run.fit(module, batches(6))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


def test_the_gradient_of_each_group_is_clipped() -> None:
    module = task_groups(optimizer=partial(torch.optim.SGD, lr=1.0), gradient_clip_norm=1e-3, track_every=0)
    before = flat(module)
    trainer(limit_train_batches=1).fit(module, batches())
    assert 1e-3 < (flat(module) - before).norm() <= 3 * 1.0001e-3


def test_heads_have_a_rate_of_their_own() -> None:
    plain, scaled = (task_groups(head_lr_scale=scale, grouping=AllTogether(), single_group="once") for scale in (1, 4))
    start = flat(plain)
    for module in (plain, scaled):
        seed_everything(0)
        trainer(limit_train_batches=1).fit(module, batches())
    size = sum(p.numel() for p in heads(plain).parameters())
    one, four = flat(plain) - start, flat(scaled) - start
    torch.testing.assert_close(four[:-size], one[:-size])
    torch.testing.assert_close(four[-size:], 4 * one[-size:], rtol=1e-4, atol=1e-7)


def test_frozen_parameters_stay() -> None:
    net = network()
    net.encoder.requires_grad_(False)
    before = [p.clone() for p in net.encoder.parameters()]
    trainer().fit(task_groups(network=net), batches())
    after = list(net.encoder.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


# -------------------------------------------------------------------------------------------------------- missing, sick


def _unlabelled(name: str, places: Sequence[int]) -> Batches:
    found = batches()
    for place in places:
        found[place][1][name][:] = torch.nan
    return found


def test_a_task_without_labels_takes_no_part() -> None:
    module = _Watched(network(), tasks(), OPTIMIZERS["adam"], OneByOne())
    head = [p.clone() for p in heads(module)["b"].parameters()]
    trainer().fit(module, _unlabelled("b", range(6)))
    assert all(torch.equal(*pair) for pair in zip(head, heads(module)["b"].parameters(), strict=True))
    counts = module.updates.affinity.counts
    assert not counts[1].any()
    assert not counts[:, 1].any()
    assert counts.any()
    assert flat(module).isfinite().all()


def test_batches_without_any_label_are_passed_over() -> None:
    data = batches(3)
    for name in NAMES:
        data[1][1][name][:] = torch.nan
    module, run = task_groups(), trainer()
    run.fit(module, data)
    assert run.global_step == 2
    assert module.batches_seen == 3


class _Sick(nn.Module):
    """Not finite where the target holds 1e6."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        sick = (target == 1e6).any()
        loss = (preds - torch.where(target == 1e6, 0.0, target)).square().mean()
        if self.kind == "value":
            return torch.where(sick, torch.nan, loss)
        return loss + torch.where(sick, preds * 0.0, 1.0).log().sum() * 1e-9  # log of zero, and 0 / 0 in its gradient


@pytest.mark.filterwarnings("ignore:The loss of task")
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_a_sick_task_is_left_out_and_the_others_go_on(kind: str, split: bool) -> None:
    data = batches()
    for place in (1, 3):
        data[place][1]["b"][:] = 1e6
    healthy = _unlabelled("b", (1, 3))
    found, expected = (
        task_groups(
            tasks=[Task(name, _Sick(kind) if name == "b" else nn.MSELoss()) for name in NAMES],
            grouping=Fixed([["a", "b"], ["c", "d"]]),
            network=network(split=split),
        )
        for _ in range(2)
    )
    for module, these in ((found, data), (expected, healthy)):
        seed_everything(0)
        trainer().fit(module, these)
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-6, atol=1e-7)
    assert found.health.total.tolist() == [0, 2, 0, 0]
    assert torch.equal(found.updates.affinity.counts[0, 2], expected.updates.affinity.counts[0, 2])


def test_a_sick_task_is_reported_once() -> None:
    data = batches()
    for place in (1, 2, 4):
        data[place][1]["b"][:] = torch.inf
    with pytest.warns(UserWarning, match="loss of task 'b' is not finite") as record:
        trainer().fit(task_groups(), data)
    assert len([warning for warning in record if "not finite" in str(warning.message)]) == 1


def test_a_head_that_has_failed_does_not_reach_the_trunk() -> None:
    net = network()
    with torch.no_grad():
        net.heads["c"].weight[:] = torch.nan
    module = task_groups(network=net)
    with pytest.warns(UserWarning, match="loss of task 'c' is not finite"):
        trainer().fit(module, batches())
    assert all(p.isfinite().all() for name, p in net.named_parameters() if "heads.c" not in name)


def test_a_task_that_stays_sick_stops_the_run() -> None:
    data = batches(8)
    for _, targets in data[2:]:
        targets["b"][:] = torch.inf
    module = task_groups(max_nonfinite=3)
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(FloatingPointError, match=r"task 'b' should be finite. Found 3 in a row"),
    ):
        trainer().fit(module, data)
    assert module.batches_seen < 7


def test_a_loss_that_is_not_positive_is_kept_out_of_the_affinity_and_reported_once() -> None:
    shifted = [Task(name, _Negative() if name == "d" else nn.MSELoss()) for name in NAMES]
    module = task_groups(tasks=shifted, grouping=OneByOne())
    with pytest.warns(UserWarning, match="task 'd' is zero or negative") as record:
        trainer(max_epochs=3).fit(module, batches())
    assert len([warning for warning in record if "negative" in str(warning.message)]) == 1
    assert not module.updates.affinity.counts[:, 3].any()
    assert module.updates.affinity.counts[0, 1] > 0


class _Negative(nn.Module):
    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        return (preds - target).square().mean() - 1e3


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_train(precision: Any) -> None:
    module = task_groups(optimizer=OPTIMIZERS["adam"])
    trainer(max_epochs=2, precision=precision).fit(module, batches())
    assert flat(module).isfinite().all()
    assert module.affinity_matrix.dtype == torch.float64
    assert module.affinity_matrix.isfinite().all()


def test_mixed_precision_sees_the_weights_of_the_last_step() -> None:
    # Autocast keeps weights that it has cast; a pass after a step has to cast them again.
    module, orders = task_groups(grouping=OneByOne(), optimizer=partial(torch.optim.SGD, lr=0.5)), Orders()
    trainer([orders], limit_train_batches=1, precision="bf16-mixed").fit(module, batches())
    losses = {task.name: task.loss for task in tasks()}
    expected = network()
    inputs, targets = batches()[0]
    stepper = torch.optim.SGD(expected.parameters(), lr=0.5)
    for (name,) in orders.groups[0]:
        stepper.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss: Any = losses[name](expected(inputs)[name], targets[name])
        loss.backward()
        stepper.step()
    torch.testing.assert_close(flat(module), torch.cat([p.flatten() for p in expected.parameters()]), rtol=0, atol=2e-2)


class _Shared(nn.Module):
    """Heads that share a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(6, 8)
        common = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({name: nn.Sequential(common, nn.ReLU(), nn.Linear(8, 1)) for name in NAMES})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.encoder(inputs)
        return {name: head(features) for name, head in self.heads.items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_layer_that_heads_share_is_trained_by_every_group(precision: Any) -> None:
    # Under autocast a head outside the group, which has no graph, casts the common weights first.
    module = task_groups(network=_Shared(), grouping=OneByOne(), optimizer=partial(torch.optim.SGD, lr=1e-2))
    gradients: list[bool] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            gradients.append(pl_module.network.heads["a"][0].weight.grad is not None)

    trainer([Look()], precision=precision).fit(module, batches(2))
    assert gradients == [True] * 8


@pytest.mark.parametrize("skipped", [0, 1, 2, 3])
def test_a_step_that_the_scaler_skips_anywhere_is_no_measurement(skipped: int) -> None:
    class Overflow(Callback):
        steps = 0

        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            if self.steps == skipped:
                pl_module.network.encoder.layers[1].weight.grad[0, 0] = torch.inf
            self.steps += 1

    module = task_groups(grouping=OneByOne(), shuffle=False, measure_last=True)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    run = trainer([Overflow()], limit_train_batches=1, plugins=[plugin])
    run.fit(module, batches())
    measured = module.updates.affinity.counts.any(dim=1).tolist()
    assert measured == [task != skipped for task in range(4)]
    assert run.global_step == 1
    assert flat(module).isfinite().all()


def test_a_step_that_the_scaler_skips_is_no_measurement() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # the first step overflows
    module = task_groups(grouping=OneByOne())
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer(limit_train_batches=1, plugins=[plugin]).fit(module, batches())
    skipped = module.updates.affinity.counts.sum()
    assert skipped < 3 * 4


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_validation_logs_means_over_labels(tmp_path: Path) -> None:
    data = batches(3)
    data.append((data[0][0][:3], {name: target[:3] for name, target in data[0][1].items()}))
    metric = [Task(name, nn.MSELoss(), MeanSquaredError()) for name in NAMES]
    module = task_groups(tasks=metric)
    found = trainer().validate(module, data, verbose=False)[0]
    preds = [module.network.eval()(inputs) for inputs, _ in data]
    for name in NAMES:
        errors = torch.cat([(p[name] - t[name]).square() for p, (_, t) in zip(preds, data, strict=True)])
        assert found[f"val_loss/{name}"] == pytest.approx(float(errors.mean()), rel=1e-5)
        assert found[f"val_mean_squared_error/{name}"] == pytest.approx(float(errors.mean()), rel=1e-5)
    assert found["val_loss"] == pytest.approx(sum(found[f"val_loss/{name}"] for name in NAMES) / 4)


def test_test_and_predict_run_alone() -> None:
    module = task_groups()
    assert "test_loss/a" in trainer().test(module, batches(2), verbose=False)[0]
    predictions: Any = trainer().predict(module, batches(2))
    assert predictions[0]["a"].shape == (8, 1)


def test_training_logs_the_losses_before_the_first_step(tmp_path: Path) -> None:
    net, data = network(), batches()
    expected = {task.name: float(task.loss(net(data[0][0])[task.name], data[0][1][task.name])) for task in tasks()}
    run = trainer(limit_train_batches=1, log_every_n_steps=1)
    run.fit(task_groups(network=net), data)
    for name in NAMES:
        assert float(run.callback_metrics[f"train_loss/{name}"]) == pytest.approx(expected[name], rel=1e-5)
    assert run.callback_metrics["num_groups"] == 3


def test_sick_tasks_are_counted_in_the_log(tmp_path: Path) -> None:
    data = batches(4)
    data[0][1]["b"][:] = torch.inf
    run = trainer(log_every_n_steps=1, logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match="not finite"):
        run.fit(task_groups(), data)
    assert run.callback_metrics["nonfinite/b"] == 1


def test_the_module_satisfies_the_protocols_of_the_callbacks() -> None:
    module = task_groups()
    groups: TaskGroupProtocol = module
    losses: TaskLossesProtocol = module
    assert groups.task_names == NAMES
    assert list(losses.batch_losses(batches(1)[0])) == list(NAMES)


# ------------------------------------------------------------------------------------------------------------- resuming


def _run_of_everything(
    folder: Path, callbacks: Sequence[Callback] = (), **arguments: Any
) -> tuple[TaskGroupModule, Trainer]:
    seed_everything(7)
    module = task_groups(
        **{
            "network": network(noisy=True),
            "optimizer": OPTIMIZERS["adamw"],
            "grouping": AffinityPropagation(),
            "affinity_decay": 0.1,
            "warmup_batches": 3,
            "regroup_every": 2,
            "measure_last": True,
            "head_lr_scale": 2.0,
            "gradient_clip_norm": 1.0,
            "lr_scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
            "lr_scheduler_interval": "step",
            **arguments,
        }
    )
    return module, trainer(callbacks, max_epochs=3, default_root_dir=str(folder))


@pytest.mark.filterwarnings("ignore:The loss of task")
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate_batches": 2},
        {"grouping": RandomGroups(2), "paired": False, "track_every": 2},
        {"grouping": Fisher(refresh_every=3)},
        {"inactive_heads": "zero_grad", "attribution": "published"},
    ],
    ids=str,
)
def test_resumed_after_any_batch_equals_uninterrupted_bit_for_bit(arguments: dict[str, Any], tmp_path: Path) -> None:
    data = batches(5)
    data[1][1]["b"][:] = torch.inf
    save = SaveAfterEachBatch(tmp_path)
    module, run = _run_of_everything(tmp_path, [save], **copy.deepcopy(arguments))
    run.fit(module, Position(data), data)
    assert module.affinity_matrix.any()
    for path in save.paths[:-1]:
        resumed, again = _run_of_everything(tmp_path, **copy.deepcopy(arguments))
        seed_everything(99)  # a new process has another random state
        again.fit(resumed, Position(data), data, ckpt_path=str(path))
        assert_equal_states(resumed.state_dict(), module.state_dict())
        assert_equal_states(again.optimizers[0].state_dict(), run.optimizers[0].state_dict())
        assert again.global_step == run.global_step


# ---------------------------------------------------------------------------------------------------------------- ranks


class _Write(Callback):
    """Write what each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.orders: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.orders.append(pl_module.task_groups)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        result = {
            "parameters": flat(pl_module),
            "affinity": pl_module.affinity_matrix,
            "orders": self.orders,
            "losses": [float(trainer.callback_metrics[f"val_loss/{name}"]) for name in NAMES],
        }
        torch.save(result, self.folder / f"rank-{trainer.global_rank}.pt")


def _assert_ranks_equal_one(
    build: Callable[[], TaskGroupModule], data: list[Batch], folder: Path, devices: int = 2, **arguments: Any
) -> None:
    (folder / "alone").mkdir()
    module = build()
    seed_everything(5)
    trainer([_Write(folder / "alone")], max_epochs=2).fit(module, Interleaved(data), Interleaved(data))
    strategy: Any = partial(DDPStrategy, start_method="fork", process_group_backend="gloo")
    strategy = strategy(timeout=timedelta(seconds=60), **arguments)
    module = build()
    seed_everything(5)
    run = trainer([_Write(folder)], max_epochs=2, devices=devices, strategy=strategy, use_distributed_sampler=False)
    run.fit(module, Interleaved(data), Interleaved(data))
    alone = torch.load(folder / "alone" / "rank-0.pt", weights_only=True)
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(devices)]
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    assert torch.equal(ranks[0]["affinity"], ranks[1]["affinity"])
    assert ranks[0]["orders"] == ranks[1]["orders"] == alone["orders"]
    torch.testing.assert_close(ranks[0]["parameters"], alone["parameters"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ranks[0]["affinity"], alone["affinity"], rtol=1e-4, atol=1e-5)
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"grouping": Threshold(0.0), "warmup_batches": 3, "affinity_decay": 0.1, "measure_last": True},
        {"accumulate_batches": 2, "gradient_clip_norm": 0.5},
        {"network": network(split=False), "grouping": RandomGroups(2)},
        {"grouping": Fisher(refresh_every=2), "inactive_heads": "zero_grad"},
    ],
    ids=str,
)
def test_two_ranks_with_half_batches_equal_one_process(arguments: dict[str, Any], tmp_path: Path) -> None:
    _assert_ranks_equal_one(lambda: task_groups(**copy.deepcopy(arguments)), batches(), tmp_path)


class _Masked(nn.Module):
    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        known = ~target.isnan()
        return torch.where(known, preds - target, 0.0).square().sum() / known.sum()


@pytest.mark.filterwarnings("ignore:The loss of task")
@pytest.mark.parametrize("split", [True, False])
def test_two_ranks_equal_one_process_where_labels_are_missing_or_sick_on_one(split: bool, tmp_path: Path) -> None:
    data = batches()
    for index, (_, targets) in enumerate(data):
        targets["b"][index % 2 :: 2] = torch.nan  # all of one rank's
        targets["c"][:3] = torch.nan  # an unequal number
    data[3][1]["a"][0] = torch.inf  # one rank's loss is not finite

    def build() -> TaskGroupModule:
        return task_groups(tasks=[Task(name, _Masked()) for name in NAMES], network=network(split=split))

    _assert_ranks_equal_one(build, data, tmp_path)


@pytest.mark.parametrize("split", [True, False])
def test_two_ranks_equal_one_process_on_uneven_batches(split: bool, tmp_path: Path) -> None:
    data = batches()
    for target in data[1][1].values():
        target[1::2] = torch.nan  # one rank has no labels at all
    for size in (3, 1):  # one more sample on one rank, and none on the other
        data.append((data[0][0][:size], {name: target[:size] for name, target in data[0][1].items()}))

    def build() -> TaskGroupModule:
        tasks = [Task(name, _Masked()) for name in NAMES]
        return task_groups(tasks=tasks, network=network(split=split), measure_last=True)

    _assert_ranks_equal_one(build, data, tmp_path)


@pytest.mark.parametrize("grouping", [OneByOne(), Fisher()], ids=["OneByOne", "Fisher"])
@pytest.mark.parametrize("split", [True, False])
def test_ranks_meet_in_layers_that_exchange_statistics(grouping: GroupingRule, split: bool, tmp_path: Path) -> None:
    data = batches()
    for index, (_, targets) in enumerate(data):
        targets["b"][index % 2 :: 2] = torch.nan  # all of one rank's, which waits in the head of the task all the same

    def build() -> TaskGroupModule:
        torch.manual_seed(0)
        encoder = nn.Sequential(MLP(6, [8]), Synchronised())
        net = MultiHeadNetwork(encoder, {name: nn.Sequential(nn.Linear(8, 1), Synchronised()) for name in NAMES})
        tasks = [Task(name, _Masked()) for name in NAMES]
        sgd = partial(torch.optim.SGD, lr=0.01)
        return task_groups(
            network=net if split else Whole(net), tasks=tasks, grouping=copy.deepcopy(grouping), optimizer=sgd
        )

    _assert_ranks_equal_one(build, data, tmp_path)


class _Dropped(nn.Module):
    """An encoder with a layer that a rank uses or not, by the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.layer, self.sometimes, self.never = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.layer(inputs)
        self.calls += 1
        is_used = not torch.distributed.is_initialized() or torch.distributed.get_rank() == self.calls % 2
        return self.sometimes(features) if is_used else features


@pytest.mark.parametrize("split", [True, False])
def test_ranks_that_reach_different_parameters_stay_equal(split: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: Any = MultiHeadNetwork(_Dropped(), {name: nn.Linear(8, 1) for name in NAMES})
    never = net.encoder.never.weight.detach().clone()
    module = task_groups(network=net if split else Whole(net), optimizer=OPTIMIZERS["adamw"])
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    run = trainer([_Write(tmp_path)], devices=2, strategy=strategy, use_distributed_sampler=False)
    run.fit(module, Interleaved(batches()), Interleaved(batches()))
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    assert torch.equal(net.encoder.never.weight, never)  # without a gradient on any rank, not even decayed


@pytest.mark.parametrize("devices", [2, 3])
def test_ranks_equal_one_process_where_losses_differ_in_kind(devices: int, tmp_path: Path) -> None:
    # Double precision, weights that are learnt and missing labels, all of which differ from rank to rank.
    data = batches(6, size=9)
    for _, targets in data:
        targets["b"] = targets["b"].double()
        targets["b"][1:] = torch.nan
        targets["c"][::devices] = torch.nan

    class Masked(_Masked):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            return super().forward(preds, target) * self.scale

    def build() -> TaskGroupModule:
        torch.manual_seed(0)
        return task_groups(tasks=[Task(name, Masked()) for name in NAMES], optimizer=partial(torch.optim.SGD, lr=5e-3))

    _assert_ranks_equal_one(build, data, tmp_path, devices=devices)


def test_a_static_graph_is_refused() -> None:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", static_graph=True)
    run = trainer(devices=2, strategy=strategy, use_distributed_sampler=False)
    with pytest.raises(ProcessRaisedException, match=r"needs `DDPStrategy\(static_graph=False\)`"):
        run.fit(task_groups(), Interleaved(batches()))


def test_unused_parameters_may_be_looked_for(tmp_path: Path) -> None:
    _assert_ranks_equal_one(task_groups, batches(), tmp_path, find_unused_parameters=True)


# ------------------------------------------------------------------------------------------- networks of many kinds


class _Neck(nn.Module):
    """Has an encoder and heads, with a layer in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.neck = nn.Linear(6, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleDict({name: nn.Linear(8, 1) for name in NAMES})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.neck(self.encoder(inputs))
        return {name: head(features) for name, head in self.heads.items()}


@pytest.mark.filterwarnings("ignore:`_Neck` has an `encoder`")
def test_a_layer_between_encoder_and_heads_is_trained() -> None:
    module, orders = task_groups(network=_Neck()), Orders()
    trainer([orders]).fit(module, batches())
    expected = _reference_run(_Neck(), OPTIMIZERS["sgd"], orders.groups)
    torch.testing.assert_close(flat(module), expected, rtol=1e-6, atol=1e-7)


class _Checkpointed(nn.Module):
    """Evaluates its layers again in the backward pass."""

    def __init__(self, is_on: bool) -> None:
        super().__init__()
        self.is_on = is_on
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 8))

    def forward(self, inputs: Tensor) -> Any:
        return checkpoint(self.layers, inputs, use_reentrant=False) if self.is_on else self.layers(inputs)


def test_activation_checkpointing_changes_nothing() -> None:
    modules = []
    for is_on in (False, True):
        torch.manual_seed(0)
        net = MultiHeadNetwork(_Checkpointed(is_on), {name: nn.Linear(8, 1) for name in NAMES})
        seed_everything(0)
        modules.append(task_groups(network=net))
        trainer().fit(modules[-1], batches())
    assert torch.equal(flat(modules[0]), flat(modules[1]))
    assert torch.equal(modules[0].affinity_matrix, modules[1].affinity_matrix)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_encoder_changes_nothing(backend: str) -> None:
    plain, compiled = task_groups(network=network(noisy=True)), task_groups(network=network(noisy=True))
    compiled.network.encoder.compile(backend=backend)  # type: ignore[union-attr]
    for module in (plain, compiled):
        seed_everything(0)
        trainer().fit(module, batches(3))
    torch.testing.assert_close(flat(compiled), flat(plain))


class _Several(nn.Module):
    """Takes and returns several tensors."""

    def __init__(self, is_head: bool) -> None:
        super().__init__()
        self.is_head = is_head
        self.layer = nn.Linear(8, 1) if is_head else nn.Linear(6, 8)

    def forward(self, inputs: Any) -> Any:
        output = self.layer(inputs["coarse"][0]) if self.is_head else self.layer(inputs)
        return {"coarse": [output, None], "fine": 2 * output}


class _OfSeveral(nn.Module):
    def forward(self, preds: dict[str, Any], target: Tensor) -> Tensor:
        return (preds["coarse"][0] - target).square().mean()


@pytest.mark.parametrize("split", [True, False])
def test_features_and_predictions_may_be_several_tensors(split: bool) -> None:
    torch.manual_seed(0)
    net: Any = MultiHeadNetwork(_Several(is_head=False), {name: _Several(is_head=True) for name in NAMES})
    module = task_groups(
        network=net if split else Whole(net), tasks=[Task(name, _OfSeveral()) for name in NAMES], measure_last=True
    )
    run = trainer(max_epochs=20)
    run.fit(module, batches(), batches())
    assert run.callback_metrics["val_loss"] < 0.5
    assert module.affinity_matrix.any()


class _Consistent(TaskGroupModule):
    """The loss of the first task reads the prediction of the second, and an output that is of no task."""

    def task_losses(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        losses = super().task_losses(outputs, targets)
        if "a" in losses:
            losses["a"] = losses["a"] + (outputs["a"] - outputs["b"]).abs().mean() + outputs.get("penalty", 0.0)
        return losses


class _WithPenalty(Whole):
    def forward(self, inputs: Tensor) -> Any:
        return self.inner(inputs) | {"penalty": inputs.square().mean()}


@pytest.mark.parametrize("track_every", [0, 1])
@pytest.mark.parametrize("net", [network(), _WithPenalty(network())], ids=["split", "whole"])
def test_a_loss_may_read_other_predictions(net: nn.Module, track_every: int) -> None:
    data = batches()
    data[2][1]["b"][:] = torch.nan  # the prediction is there, without labels
    module = _Consistent(copy.deepcopy(net), tasks(), OPTIMIZERS["sgd"], OneByOne(), track_every=track_every)
    trainer().fit(module, data)
    assert flat(module).isfinite().all()
    assert module.health.total.tolist() == [0, 0, 0, 0]


def test_heads_evaluated_for_other_losses_take_up_statistics_once() -> None:
    net = network(noisy=True)
    module = _Consistent(net, tasks(), OPTIMIZERS["sgd"], OneByOne(), measure_last=True)
    trainer().fit(module, _unlabelled("b", range(6)))
    assert net.heads["b"][2].num_batches_tracked == 6


def test_a_group_with_nothing_to_train_is_measured() -> None:
    net = network()
    net.encoder.requires_grad_(False)
    net.heads["b"].requires_grad_(False)
    before = flat(module := task_groups(network=net, grouping=OneByOne(), measure_last=True))
    trainer().fit(module, batches())
    assert not torch.equal(flat(module), before)
    assert not module.affinity_matrix[1].any()
    assert module.updates.affinity.counts[1].all()


def test_fisher_of_a_frozen_trunk_leaves_every_task_alone() -> None:
    net = network()
    net.encoder.requires_grad_(False)
    module = task_groups(network=net, grouping=Fisher())
    trainer().fit(module, batches())
    assert sorted(module.task_groups) == [[name] for name in NAMES]


def test_fisher_is_measured_in_the_first_batch_that_has_all_labels() -> None:
    rule = Fisher(refresh_every=100)
    trainer().fit(task_groups(grouping=rule), _unlabelled("b", [0, 1]))
    assert rule.similarity is not None


class _Weighted(nn.Module):
    """A loss with a weight that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        return (-self.weight).exp() * (preds - target).square().mean() + self.weight + 5.0


@pytest.mark.filterwarnings("ignore:The loss of task")
def test_learnable_weights_of_a_loss_survive_a_sick_batch() -> None:
    weighted = [Task(name, _Weighted()) for name in NAMES]
    data = batches()
    data[1][1]["b"][:] = torch.inf
    module = task_groups(tasks=weighted)
    trainer().fit(module, data)
    weights = torch.stack([task.loss.weight.detach() for task in weighted])  # type: ignore[attr-defined]
    assert weights.isfinite().all()
    assert (weights != 0.0).all()
    assert module.health.total.tolist() == [0, 1, 0, 0]


def test_the_passes_of_one_update_are_not_kept_at_once() -> None:
    alive: list[Any] = []
    most = 0

    class Head(nn.Linear):
        def forward(self, features: Tensor) -> Tensor:
            nonlocal most
            output = super().forward(features).clone()
            alive.append(weakref.ref(output))
            most = max(most, sum(reference() is not None for reference in alive))
            return output

    net = MultiHeadNetwork(MLP(6, [8]), {name: Head(8, 1) for name in NAMES})
    module = task_groups(network=net, grouping=OneByOne(), accumulate_batches=3, measure_last=True)
    trainer().fit(module, batches())
    assert most == len(NAMES)


# ----------------------------------------------------------------------------------------------- batches of many kinds


class _Stacked(TaskGroupModule):
    """Its targets become a dict on the device only."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        inputs, stacked = batch
        return inputs, {name: stacked[:, [index]] for index, name in enumerate(NAMES)}


class _StackedData(LightningDataModule):
    """The same, by the data module; labels of a task are taken away on the device."""

    def train_dataloader(self) -> Any:
        return Batches((inputs, torch.cat(list(targets.values()), 1)) for inputs, targets in batches())  # type: ignore[misc]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        inputs, stacked = batch
        targets = {name: stacked[:, [index]] for index, name in enumerate(NAMES)}
        return inputs, targets | {"b": torch.full_like(targets["b"], torch.nan)}


def test_labels_may_be_made_after_the_transfer() -> None:
    module, plain = _Stacked(network(), tasks(), OPTIMIZERS["sgd"], OneByOne()), task_groups(grouping=OneByOne())
    stacked: Any = Batches((inputs, torch.cat(list(targets.values()), 1)) for inputs, targets in batches())  # type: ignore[misc]
    for each, data in ((module, stacked), (plain, batches())):
        seed_everything(0)
        trainer().fit(each, data)
    assert torch.equal(flat(module), flat(plain))


def test_labels_are_counted_after_a_data_module_has_changed_them() -> None:
    module = task_groups(grouping=OneByOne())
    trainer().fit(module, datamodule=_StackedData())
    assert module.health.total.tolist() == [0, 0, 0, 0]
    assert not module.updates.affinity.counts[1].any()


def test_batches_are_unpacked_once() -> None:
    class Augmented(TaskGroupModule):
        calls = 0

        def unpack_batch(self, batch: Any) -> tuple[Any, dict[str, Tensor]]:
            self.calls += 1
            return batch["inputs"], {name: batch[name] for name in NAMES}

    module = Augmented(network(), tasks(), OPTIMIZERS["sgd"], OneByOne())
    data: Any = Batches({"inputs": inputs, **targets} for inputs, targets in batches())  # type: ignore[misc]
    trainer().fit(module, data)
    assert module.calls == 6


def test_labels_that_the_first_sample_lacks_are_found() -> None:
    data = batches(2)
    for _, targets in data:
        targets["b"][0] = torch.nan
        targets["d"][:] = torch.nan
    module = task_groups(tasks=[Task(name, _Masked()) for name in NAMES], grouping=OneByOne())
    before = {name: head.weight.clone() for name, head in heads(module).items()}
    trainer().fit(module, data)
    moved = {name for name, head in heads(module).items() if not torch.equal(head.weight, before[name])}
    assert moved == {"a", "b", "c"}


def test_labels_may_be_counted_by_a_python_number() -> None:
    class Counted(Task):
        def num_labels(self, target: Tensor) -> Any:
            return len(target)

    module, plain = task_groups(tasks=[Counted(task.name, task.loss) for task in tasks()]), task_groups()
    for each in (module, plain):
        seed_everything(0)
        trainer().fit(each, batches(), batches())
    assert torch.equal(flat(module), flat(plain))


@pytest.mark.filterwarnings("ignore:The loss of task")
def test_a_loss_that_fails_in_a_part_of_an_update_is_kept_out_of_the_affinity() -> None:
    # Sick in the first of two batches from the second pass on: the rest of the loss is no measure of the step.
    class Late(nn.Module):
        calls = 0

        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return (preds - target).square().mean() * (torch.nan if self.calls == 3 else 1.0)

    module = task_groups(
        tasks=[Task(name, Late() if name == "a" else nn.MSELoss()) for name in NAMES],
        accumulate_batches=2,
        grouping=OneByOne(),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        measure_last=True,
    )
    trainer(limit_train_batches=2).fit(module, batches())
    assert not module.affinity_matrix.any()


# ----------------------------------------------------------------------------------------------- flags of the trainer


@pytest.mark.parametrize(
    "flags",
    [
        {"barebones": True},
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"val_check_interval": 0.5},
        {"log_every_n_steps": 0},
        {"max_time": {"minutes": 5}},
    ],
    ids=str,
)
def test_flags_of_the_trainer(flags: dict[str, Any]) -> None:
    quiet: dict[str, Any] = {} if "barebones" in flags else {"logger": False, "enable_checkpointing": False}
    module = task_groups(accumulate_batches=2)
    before = flat(module)
    Trainer(max_epochs=1, accelerator="cpu", **quiet, **flags).fit(module, batches(), batches(2))
    assert not torch.equal(flat(module), before)


@pytest.mark.parametrize(("accumulate", "already"), [(1, 0), (3, 0), (1, 3)])
def test_losses_reach_the_logger_at_every_so_manieth_batch(accumulate: int, already: int, tmp_path: Path) -> None:
    def losses(every: int) -> tuple[list[int], list[float]]:
        seed_everything(0)
        module = task_groups(accumulate_batches=accumulate, grouping=OneByOne())
        if already:
            trainer().fit(module, batches(already))
        logger = CSVLogger(tmp_path)
        trainer(log_every_n_steps=every, logger=logger).fit(module, batches(20))
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train_loss"]]
        return [int(row["step"]) for row in rows], [float(row["train_loss"]) for row in rows]

    steps, found = losses(every=5)
    every_step, expected = losses(every=1)
    assert steps == [4, 9, 14, 19]
    assert found == [expected[every_step.index(step)] for step in steps]


def test_rates_of_heads_that_a_scheduler_undoes_are_told_of() -> None:
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20)
    arguments: Any = {"head_lr_scale": 4.0, "optimizer": OPTIMIZERS["adam"], "lr_scheduler_interval": "step"}
    with pytest.warns(UserWarning, match="`OneCycleLR` gives heads the learning rate of the trunk"):
        trainer().fit(task_groups(lr_scheduler=cycle, **arguments), batches(2))
    run = trainer()
    run.fit(task_groups(lr_scheduler=partial(cycle, max_lr=[0.1, 0.4]), **arguments), batches(2))
    shared, heads = run.optimizers[0].param_groups
    assert heads["lr"] == pytest.approx(4 * shared["lr"])


def test_an_unfrozen_trunk_keeps_apart_who_had_a_gradient() -> None:
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.network.encoder.requires_grad_(trainer.current_epoch > 0)

    net = network()
    module = task_groups(network=net, inactive_heads="zero_grad", grouping=OneByOne())
    states: list[set[int]] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            states.append(set(pl_module.get_extra_state()["had_gradient"]))

    net.encoder.requires_grad_(False)
    trainer([Unfreeze(), Look()], max_epochs=2).fit(module, batches())
    assert states[0] == set(range(2, 10))
    assert states[1] == set(range(10))


def test_copies_and_pickles_train_on() -> None:
    module = task_groups(grouping=AffinityPropagation(), optimizer=OPTIMIZERS["adam"])
    trainer().fit(module, batches())
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for each in (module, *copies):
        trainer().fit(each, batches())
    assert all(torch.equal(flat(each), flat(module)) for each in copies)


class _OfNumbers(TaskGroupModule):
    def __init__(self, rate: float = 0.1) -> None:
        super().__init__(network(), tasks(), partial(torch.optim.SGD, lr=rate))
        self.save_hyperparameters()


def test_a_subclass_is_loaded_from_its_checkpoint(tmp_path: Path) -> None:
    module, run = _OfNumbers(rate=0.2), trainer()
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = _OfNumbers.load_from_checkpoint(tmp_path / "run.ckpt")
    assert_equal_states(loaded.state_dict(), module.state_dict())
    assert loaded.hparams["rate"] == 0.2


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("optimizer", torch.optim.Adam([nn.Parameter(torch.zeros(1))])),
        ("lr_scheduler", torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 1)),
    ],
    ids=["optimizer", "lr_scheduler"],
)
def test_objects_in_place_of_what_makes_them_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"`{argument}` should make .* such as `functools.partial\("):
        task_groups(**{argument: value})


def test_optimisers_that_evaluate_the_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="Found LBFGS"):
        trainer().fit(task_groups(optimizer=torch.optim.LBFGS), batches())


def test_a_loss_that_is_no_tensor_is_named() -> None:
    wrong: Any = lambda preds, target: 1.0  # noqa: E731
    with pytest.raises(ValueError, match="loss of task 'a' should be a tensor"):
        trainer().fit(task_groups(tasks=[Task(name, wrong) for name in NAMES]), batches())


# ------------------------------------------------------------------------------------------------------------- official


def test_official_makes_every_choice_of_the_published_code() -> None:
    module = TaskGroupModule.official(network(), tasks(), head_lr_scale=4.0)
    affinity, updates = module.updates.affinity, module.updates
    assert (affinity.attribution, affinity.decay, affinity.bias_correction) == ("published", 1e-3, False)
    assert isinstance(updates.grouping, AffinityPropagation)
    assert (updates.grouping.damping, updates.grouping.include_diagonal) == (0.5, True)
    assert (updates.warmup_batches, updates.regroup_every, updates.shuffle) == (101, 1, True)
    assert (updates.single_group, module.measure_last, module.paired) == ("repeat", False, False)
    assert (module.inactive_heads, module.track_every) == ("zero_grad", 1)
    run = trainer(limit_train_batches=2)
    run.fit(module, batches())
    shared, heads = run.optimizers[0].param_groups
    assert isinstance(run.optimizers[0], torch.optim.Adam)
    poly = (1 - 2 / 40_000) ** 0.9
    assert (shared["lr"], heads["lr"]) == pytest.approx((2e-5 * poly, 8e-5 * poly))
    assert shared["weight_decay"] == 1e-6
    assert module.task_groups != [list(NAMES)]


def _reference_official(orders: Sequence[Sequence[Sequence[str]]]) -> tuple[Tensor, Tensor]:
    """The published loop, on heads' gradients that are zeroed and not removed.

    https://github.com/wooseong97/sel-update-mtl/blob/53a8ba2/utils/train_utils.py#L117-L250
    """
    net, losses = network(), {task.name: task.loss for task in tasks()}
    heads = list(net.heads.parameters())
    stepper = torch.optim.Adam(
        [{"params": net.encoder.parameters()}, {"params": heads, "lr": 8e-5}],
        lr=2e-5,
        weight_decay=1e-6,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda batch: (1 - batch / 40_000) ** 0.9)
    affinity = torch.zeros(4, 4, dtype=torch.float64)
    for (inputs, targets), groups in zip(batches(), orders, strict=True):
        previous: Tensor | None = None
        for group in groups if len(groups) > 1 else [*groups, *groups]:
            members = [NAMES.index(name) for name in group]
            outputs = net(inputs)
            values = torch.stack([losses[name](outputs[name], targets[name]) for name in NAMES])
            stepper.zero_grad(set_to_none=False)
            total: Any = sum(losses[name](outputs[name], targets[name]) for name in group)
            total.backward()
            stepper.step()
            now = values.detach().double()
            if previous is not None:
                gain = (1 - now / previous) / len(members)
                for s in members:
                    for k in range(4):
                        if k == s and gain[k] < 0:
                            continue
                        step = gain[k]
                        if k in members and k != s and gain[k] * gain[s] < 0:
                            step = -torch.maximum(gain[k], gain[s])
                        affinity[s, k] = (1 - 1e-3) * affinity[s, k] + 1e-3 * step
            previous = now
        schedule.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()]), affinity


def test_official_equals_the_published_loop() -> None:
    orders, module = Orders(), TaskGroupModule.official(network(), tasks(), head_lr_scale=4.0)
    trainer([orders]).fit(module, batches())
    parameters, affinity = _reference_official(orders.groups)
    torch.testing.assert_close(flat(module), parameters, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(module.affinity_matrix, affinity, rtol=1e-4, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tasks": tasks()[:1]}, "at least 2 tasks"),
        ({"tasks": tasks()[:3], "grouping": OneByOne()}, "heads of the network should be"),
        (
            {"tasks": [*tasks(), Task("e", nn.MSELoss())], "grouping": OneByOne()},
            "heads of the network should be",
        ),
        ({"grouping": Fixed([["a", "b"], ["c"]])}, "'d' missing"),
        ({"grouping": Fixed([["a", "b"], ["c", "e"], ["d"]])}, "'e' unknown"),
        ({"grouping": RandomGroups(5)}, "at most the number of tasks"),
        ({"affinity_decay": 0.0}, r"\(0, 1\]"),
        ({"affinity_decay": 1.5}, r"\(0, 1\]"),
        ({"attribution": "official"}, "attribution"),
        ({"warmup_batches": -1}, "warmup_batches"),
        ({"regroup_every": 0}, "regroup_every"),
        ({"track_every": -1}, "track_every"),
        ({"track_every": 0, "grouping": None}, "at least 1 for Exemplars, which reads the affinity"),
        ({"single_group": "twice"}, "single_group"),
        ({"inactive_heads": "keep"}, "inactive_heads"),
        ({"head_lr_scale": 0.0}, "head_lr_scale"),
        ({"head_lr_scale": 2.0, "network": network(split=False)}, "needs a network that applies"),
        ({"max_nonfinite": 0}, "max_nonfinite"),
        ({"loss_weights": {"e": 1.0}}, "'e'"),
        ({"loss_weights": {"a": -1.0}}, "positive"),
        ({"gradient_clip_norm": 0.0}, "gradient_clip_norm"),
    ],
    ids=str,
)
def test_constructor_refuses(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        task_groups(**arguments)


@pytest.mark.parametrize("argument", ["network", "grouping"])
def test_constructor_refuses_kinds(argument: str) -> None:
    with pytest.raises(TypeError, match=f"`{argument}`"):
        task_groups(**{argument: "affinity"})


def test_a_head_without_parameters_of_its_own_is_refused() -> None:
    net = network()
    net.heads["d"] = net.heads["a"]
    with pytest.raises(ValueError, match=r"head of task 'a' should have parameters of its own"):
        task_groups(network=net)


def test_a_head_without_parameters_is_allowed() -> None:
    net = MultiHeadNetwork(nn.Linear(6, 1), {name: nn.Identity() for name in NAMES})
    trainer().fit(task_groups(network=net), batches(2))


def test_a_rule_that_returns_no_partition_is_named() -> None:
    class Wrong(GroupingRule):
        def groups(self, affinity: Tensor) -> list[list[int]]:
            return [[0, 1], [1, 2]]

    with pytest.raises(ValueError, match="Wrong should return groups"):
        trainer().fit(task_groups(grouping=Wrong(), warmup_batches=0), batches())


def test_a_task_missing_from_the_targets_is_named() -> None:
    data = batches(1)
    del data[0][1]["c"]
    with pytest.raises(ValueError, match=r"The targets should hold every task. Missing: 'c'"):
        trainer().fit(task_groups(), data)


def test_a_task_missing_from_the_output_of_a_whole_network_is_named() -> None:
    class Lacking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {name: self.layer(inputs) for name in "abc"}

    with pytest.raises(ValueError, match=r"output should hold every task. Missing: 'd'"):
        trainer().fit(task_groups(network=Lacking()), batches(1))


@pytest.mark.parametrize(
    ("flags", "match"),
    [({"gradient_clip_val": 1.0}, "gradient_clip_norm"), ({"accumulate_grad_batches": 2}, "accumulate_batches")],
)
def test_trainer_flags_that_do_not_reach_are_refused(flags: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        trainer(**flags).fit(task_groups(), batches())
