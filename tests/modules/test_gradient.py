from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torchjd import aggregation as jd

from mtl_lightning import mgda as population
from mtl_lightning.aggregation import IMTLG, MGDA, AlignedMTL, GradientAggregator, PCGrad, UPGrad
from mtl_lightning.cagrad import CAGrad
from mtl_lightning.cli import run as run_command
from mtl_lightning.modules.gradient import GradientModule
from mtl_lightning.modules.weighted import WeightedModule
from mtl_lightning.nash import NashMTL
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.protocols import TaskLossesProtocol
from mtl_lightning.task import Task
from mtl_lightning.torchjd import TorchJD
from tests.modules.common import Interleaved, Position, SaveAfterEachBatch, assert_equal_states, trainer

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("a", "b", "c")
SGD = partial(torch.optim.SGD, lr=0.05)
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
Batch = tuple[Tensor, dict[str, Tensor]]


class Total(GradientAggregator):
    """The sum of the gradients, as weights."""

    def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
        return torch.ones(len(columns), dtype=torch.float64)


FAMILY: dict[str, Callable[[], GradientAggregator]] = {
    "MGDA": MGDA,
    "UPGrad": UPGrad,
    "PCGrad": PCGrad,
    "IMTLG": IMTLG,
    "AlignedMTL": AlignedMTL,
    "CAGrad": CAGrad,
    "NashMTL": NashMTL,
    "GradVac of TorchJD": lambda: TorchJD(jd.GradVac()),
    "GradDrop of TorchJD": lambda: TorchJD(jd.GradDrop()),
}
family = pytest.mark.parametrize("name", FAMILY)
both = pytest.mark.parametrize("gradients", ["parameters", "features"])


class Batches(list[Batch]):
    """A list that Lightning takes for one loader, where it takes a plain one for a collection of them."""


def batches(count: int = 4, size: int = 8, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(6, len(NAMES), generator=generator)
    found = Batches()
    for _ in range(count):
        inputs = torch.randn(size, 6, generator=generator)
        values = inputs @ weights + 0.1 * torch.randn(size, len(NAMES), generator=generator)
        found.append((inputs, {name: values[:, [index]] for index, name in enumerate(NAMES)}))
    return found


def network(noisy: bool = False) -> Any:
    torch.manual_seed(0)
    encoder: nn.Module = MLP(6, [8])
    if noisy:
        encoder = nn.Sequential(encoder, nn.BatchNorm1d(8), nn.Dropout(0.3))
    return MultiHeadNetwork(encoder, {name: nn.Linear(8, 1) for name in NAMES})


class Masked(nn.Module):
    """The mean of squared errors over known labels."""

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        known = ~target.isnan()
        return torch.where(known, preds - target, 0.0).square().sum() / known.sum()


class Whole(nn.Module):
    """Hides how a network is built."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = network() if inner is None else inner

    def forward(self, inputs: Tensor) -> Any:
        return self.inner(inputs)


def tasks() -> list[Task]:
    return [Task(name, Masked()) for name in NAMES]


def gradient(**arguments: Any) -> GradientModule:
    defaults: dict[str, Any] = {"network": network(), "tasks": tasks(), "optimizer": SGD, "aggregator": UPGrad()}
    return GradientModule(**(defaults | arguments))


def flat(module: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.network.parameters()])


def heads(module: GradientModule) -> Any:
    return module.network.heads


# ---------------------------------------------------------------------------------------- against a plain training loop


def _losses(net: nn.Module, batch: Batch) -> list[Tensor]:
    outputs = net(batch[0])
    return [Masked()(outputs[name], batch[1][name]) for name in NAMES]


def _row(loss: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, tensors, retain_graph=True)])


def _reference_run(
    aggregator: GradientAggregator, data: Sequence[Sequence[Batch]], optimizer: Any, gradients: str
) -> Tensor:
    """One process; a step for each group of batches."""
    net = network()
    aggregator.resolve(NAMES)
    stepper = optimizer(list(net.parameters()))
    trunk = list(net.encoder.parameters())
    for group in data:
        stepper.zero_grad()
        jacobian = torch.zeros(len(NAMES), sum(p.numel() for p in trunk))
        for batch in group:
            if gradients == "parameters":
                losses = _losses(net, batch)
                jacobian += torch.stack([_row(loss, trunk) for loss in losses]) / len(group)
            else:
                features = net.encoder(batch[0])
                losses = [Masked()(net.heads[name](features), batch[1][name]) for name in NAMES]
                direction = aggregator(torch.stack([_row(loss, [features]) for loss in losses]))
                product = (direction.view_as(features).detach() * features).sum()
                jacobian[0] += _row(product, trunk) / len(group)
            for name, loss in zip(NAMES, losses, strict=True):
                for parameter in net.heads[name].parameters():
                    (part,) = torch.autograd.grad(loss, parameter, retain_graph=True)
                    parameter.grad = part / len(group) + (0 if parameter.grad is None else parameter.grad)
        found = aggregator(jacobian) if gradients == "parameters" else jacobian[0]
        for parameter, piece in zip(trunk, found.split([p.numel() for p in trunk]), strict=True):
            parameter.grad = piece.view_as(parameter)
        stepper.step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


@both
@family
def test_a_run_equals_a_plain_loop(name: str, gradients: Any) -> None:
    if gradients == "features" and FAMILY[name]().needs_jacobian:
        with pytest.raises(ValueError, match="needs an aggregator of the Gramian"):
            gradient(aggregator=FAMILY[name](), gradients=gradients)
        return
    module = gradient(aggregator=FAMILY[name](), gradients=gradients)
    trainer(max_epochs=2).fit(module, batches())
    expected = _reference_run(FAMILY[name](), [[batch] for batch in batches()] * 2, SGD, gradients)
    torch.testing.assert_close(flat(module), expected, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("name", ["UPGrad", "PCGrad"])
def test_accumulated_gradients_are_averaged(name: str, gradients: Any) -> None:
    # In parameters before the one aggregation of a step; in features, which differ from batch to batch, after.
    module = gradient(aggregator=FAMILY[name](), gradients=gradients, accumulate_batches=2)
    run = trainer()
    run.fit(module, batches(4))
    data = batches(4)
    expected = _reference_run(FAMILY[name](), [data[:2], data[2:]], SGD, gradients)
    torch.testing.assert_close(flat(module), expected, rtol=1e-4, atol=1e-5)
    assert run.global_step == 2


@pytest.mark.parametrize(("gradients", "whole"), [("parameters", False), ("parameters", True), ("features", False)])
def test_the_sum_of_the_gradients_is_the_gradient_of_the_sum(gradients: Any, whole: bool) -> None:
    arguments: dict[str, Any] = {
        "optimizer": ADAMW,
        "gradient_clip_norm": 0.5,
        "accumulate_batches": 2,
        "lr_scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        "lr_scheduler_interval": "step",
    }
    build = Whole if whole else partial(network, noisy=True)
    found = gradient(network=build(), aggregator=Total(), gradients=gradients, **arguments)
    expected = WeightedModule(network=build(), tasks=tasks(), **arguments)
    for module in (found, expected):
        seed_everything(3)
        trainer(max_epochs=2).fit(module, batches(5))
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-4, atol=1e-5)


def test_accumulated_batches_equal_one_large_batch() -> None:
    small = batches(6)
    large = Batches(
        (torch.cat([x[0], y[0]]), {name: torch.cat([x[1][name], y[1][name]]) for name in NAMES})
        for x, y in zip(small[::2], small[1::2], strict=True)
    )
    parts, whole = gradient(accumulate_batches=2), gradient()
    for module, data in ((parts, small), (whole, large)):
        trainer().fit(module, data)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-5, atol=1e-6)


def test_features_of_a_linear_encoder_of_one_sample_have_the_weights_of_the_parameters() -> None:
    # The Jacobian of the encoder is a multiple of an isometry then, which keeps all angles.
    torch.manual_seed(0)
    net = MultiHeadNetwork(nn.Linear(6, 8), {name: nn.Linear(8, 1) for name in NAMES})
    found = gradient(network=net, aggregator=MGDA(), gradients="features")
    expected = gradient(network=copy.deepcopy(net), aggregator=MGDA())
    for module in (found, expected):
        trainer().fit(module, batches(4, size=1))
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-5, atol=1e-6)


def test_features_may_be_any_tree_of_tensors() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])

        def forward(self, inputs: Tensor) -> dict[str, Any]:
            return {"pair": [layer(inputs) for layer in self.layers], "inputs": inputs, "size": len(inputs)}

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def forward(self, features: dict[str, Any]) -> Tensor:
            return self.layer(torch.cat(features["pair"], dim=1)) + features["inputs"][:, :1] + features["size"]

    torch.manual_seed(0)
    net = MultiHeadNetwork(Encoder(), {name: Head() for name in NAMES})
    found = gradient(network=net, aggregator=Total(), gradients="features")
    expected = WeightedModule(network=copy.deepcopy(net), tasks=tasks(), optimizer=SGD)
    for module in (found, expected):
        trainer().fit(module, batches())
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-5, atol=1e-6)


class _Counts(Callback):
    def __init__(self) -> None:
        self.forwards = self.backwards = self.steps = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.network.encoder.register_forward_hook(self._on_forward)

    def _on_forward(self, module: nn.Module, inputs: Any, outputs: Tensor) -> None:
        self.forwards += 1
        if outputs.grad_fn is not None:
            outputs.grad_fn.register_hook(self._on_backward)

    def _on_backward(self, *_: Any) -> None:
        self.backwards += 1

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize(("gradients", "expected"), [("parameters", 6), ("features", 2)])
def test_passes_through_the_encoder(gradients: Any, expected: int) -> None:
    counts = _Counts()
    trainer([counts]).fit(gradient(gradients=gradients), batches(2))
    assert (counts.forwards, counts.backwards, counts.steps) == (2, expected, 2)


# --------------------------------------------------------------------------------------------------- what is aggregated


@family
def test_what_is_shared_is_found_in_any_network(name: str) -> None:
    found, expected = gradient(network=Whole(), aggregator=FAMILY[name]()), gradient(aggregator=FAMILY[name]())
    for module in (found, expected):
        trainer(max_epochs=2).fit(module, batches())
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-5, atol=1e-6)


def test_the_head_of_a_task_follows_its_own_loss() -> None:
    class Nothing(Total):
        def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
            return torch.zeros(len(columns), dtype=torch.float64)

    net = network()
    before = copy.deepcopy(net)
    trainer().fit(gradient(network=net, aggregator=Nothing()), batches(1))
    for loss, name in zip(_losses(before, batches(1)[0]), NAMES, strict=True):
        found, old = net.heads[name].weight, before.heads[name].weight
        (slope,) = torch.autograd.grad(loss, old, retain_graph=True)
        torch.testing.assert_close(found, old - 0.05 * slope)
    assert all(torch.equal(*pair) for pair in zip(net.encoder.parameters(), before.encoder.parameters(), strict=True))


@both
def test_learned_parameters_of_a_loss_follow_it(gradients: Any) -> None:
    class Scaled(Masked):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            return super().forward(self.scale * preds, target)

    loss = Scaled()
    trainer().fit(gradient(tasks=[Task("a", loss), *tasks()[1:]], gradients=gradients), batches())
    assert loss.scale != 1.0


@both
def test_a_frozen_trunk_leaves_nothing_to_aggregate(gradients: Any) -> None:
    class Refusing(Total):
        def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
            raise AssertionError("there is nothing to aggregate")

    net = network()
    net.encoder.requires_grad_(False)
    before = copy.deepcopy(net)
    trainer().fit(gradient(network=net, aggregator=Refusing(), gradients=gradients), batches())
    assert all(torch.equal(*pair) for pair in zip(net.encoder.parameters(), before.encoder.parameters(), strict=True))
    assert all(not torch.equal(net.heads[name].weight, before.heads[name].weight) for name in NAMES)


def test_a_trunk_may_be_thawed_in_the_course_of_a_run() -> None:
    class Thaw(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.network.encoder.requires_grad_(trainer.current_epoch > 0)

    net = network()
    before = copy.deepcopy(net.encoder)
    trainer([Thaw()], max_epochs=2).fit(gradient(network=net), batches())
    pairs = list(zip(net.encoder.parameters(), before.parameters(), strict=True))
    assert all(not torch.equal(*pair) for pair in pairs)


def test_what_no_loss_depends_on_is_not_stepped() -> None:
    net = network()
    net.encoder.spare = nn.Linear(3, 3)
    before = net.encoder.spare.weight.detach().clone()
    trainer().fit(gradient(network=net, optimizer=ADAMW), batches())  # weight decay would move it
    assert torch.equal(net.encoder.spare.weight, before)


def test_a_task_that_does_not_reach_the_trunk_does_not_hold_it_back() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def forward(self, features: Tensor) -> Tensor:
            return self.layer(features.detach())

    net = network()
    net.heads["c"] = Apart()
    before = copy.deepcopy(net.encoder)
    run = trainer(log_every_n_steps=1)
    run.fit(gradient(network=net, aggregator=MGDA()), batches())  # a gradient of zero would be the shortest vector
    assert not torch.equal(next(net.encoder.parameters()), next(before.parameters()))
    assert "weight/c" not in run.callback_metrics


@pytest.mark.parametrize("split", [True, False])
def test_a_compiled_network_is_one_like_any_other(split: bool) -> None:
    # It makes gradients of zero for the heads of other tasks, which are not aggregated for that.
    data = batches()
    for index, name in ((1, "b"), (2, "c")):
        data[index][1][name][:] = torch.nan
    build = network if split else Whole
    arguments: dict[str, Any] = {"aggregator": CAGrad(), "optimizer": ADAMW, "accumulate_batches": 1}
    found = gradient(network=torch.compile(build(), backend="aot_eager"), **arguments)
    expected = gradient(network=build(), **arguments)
    for module in (found, expected):
        trainer(max_epochs=2).fit(module, data)
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-4, atol=1e-5)


@both
def test_a_network_that_is_replaced_is_the_one_that_is_trained(gradients: Any) -> None:
    found, expected = gradient(gradients=gradients), gradient(gradients=gradients)
    found.network = copy.deepcopy(found.network)
    for module in (found, expected):
        trainer().fit(module, batches())
    assert torch.equal(flat(found), flat(expected))


def test_features_of_a_network_that_is_compiled_as_a_whole_are_refused() -> None:
    module: Any = gradient(gradients="features")
    module.network = torch.compile(module.network, backend="aot_eager")
    with pytest.raises(ValueError, match=r"compile its parts: `network\.encoder\.compile\(\)`"):
        trainer().fit(module, batches())


@both
@pytest.mark.parametrize("place", ["encoder", "head"])
def test_sparse_gradients_are_made_dense(place: str, gradients: Any) -> None:
    class Table(nn.Module):
        def __init__(self, size: int, sparse: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(4, size, sparse=sparse)
            self.layer = nn.LazyLinear(size)

        def forward(self, values: Tensor) -> Tensor:
            return self.layer(values) + self.table((values[:, 0] > 0).long())

    modules = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = network()
        if place == "encoder":
            net.encoder = Table(8, sparse)
        else:
            net.heads["b"] = Table(1, sparse)
        net(torch.zeros(1, 6))
        modules.append(gradient(network=net, gradients=gradients))
        trainer().fit(modules[-1], batches())
    torch.testing.assert_close(flat(modules[0]), flat(modules[1]))


# -------------------------------------------------------------------------------------------------------- missing, sick


def _without(name: str, places: Sequence[int], value: float = torch.nan, count: int = 4) -> Batches:
    found = batches(count)
    for place in places:
        found[place][1][name][:] = value
    return found


@both
@pytest.mark.parametrize("name", ["CAGrad", "PCGrad", "GradVac of TorchJD"])
def test_a_task_without_labels_takes_no_part(name: str, gradients: Any) -> None:
    module = gradient(aggregator=FAMILY[name](), optimizer=ADAMW, gradients=gradients)
    head = [p.clone() for p in heads(module)["b"].parameters()]
    trainer(max_epochs=2).fit(module, _without("b", range(3), count=3))
    assert all(torch.equal(*pair) for pair in zip(head, heads(module)["b"].parameters(), strict=True))
    assert flat(module).isfinite().all()


@both
def test_batches_without_any_label_are_passed_over(gradients: Any) -> None:
    data = batches(3)
    for name in NAMES:
        data[1][1][name][:] = torch.nan
    module, run = gradient(gradients=gradients), trainer()
    run.fit(module, data)
    assert run.global_step == 2
    assert module.batches_seen == 3


@pytest.mark.parametrize(
    ("name", "gradients"), [*((name, "parameters") for name in FAMILY), ("PCGrad", "features"), ("MGDA", "features")]
)
@pytest.mark.filterwarnings("ignore:The loss of task")
def test_a_sick_task_is_left_out_as_if_it_had_no_labels(name: str, gradients: Any) -> None:
    found, expected = (gradient(aggregator=FAMILY[name](), gradients=gradients) for _ in range(2))
    trainer(max_epochs=2).fit(found, _without("b", (0, 2), torch.inf))
    trainer(max_epochs=2).fit(expected, _without("b", (0, 2)))
    torch.testing.assert_close(flat(found), flat(expected))
    assert found.health.total.tolist() == [0, 4, 0]


class _Spike(torch.autograd.Function):
    """Finite, with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return slopes[0] * torch.nan


class _Spiking(Masked):
    """Has a gradient that is not finite where a label is above a hundred."""

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        if (target > 100).any():
            preds: Tensor = _Spike.apply(preds)  # type: ignore[no-redef]
        return super().forward(preds, target)


@both
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_that_is_not_finite_is_left_out_as_if_there_were_no_labels(accumulate: int, gradients: Any) -> None:
    spiking = [tasks()[0], Task("b", _Spiking()), tasks()[2]]
    found = gradient(tasks=spiking, gradients=gradients, accumulate_batches=accumulate)
    expected = gradient(gradients=gradients, accumulate_batches=accumulate)
    with pytest.warns(UserWarning, match="The loss or gradient of task 'b' is not finite"):
        trainer().fit(found, _without("b", (0, 2), 1e3))
    trainer().fit(expected, _without("b", (0, 2)))
    torch.testing.assert_close(flat(found), flat(expected))
    assert found.health.total.tolist() == [0, 2, 0]


def test_a_head_that_has_failed_does_not_reach_the_trunk() -> None:
    net = network()
    with torch.no_grad():
        net.heads["c"].weight[:] = torch.nan
    with pytest.warns(UserWarning, match="loss or gradient of task 'c' is not finite"):
        trainer().fit(gradient(network=net), batches())
    assert all(p.isfinite().all() for name, p in net.named_parameters() if "heads.c" not in name)


def test_a_task_that_stays_sick_stops_the_run() -> None:
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(FloatingPointError, match=r"task 'b' should be finite. Found 3 in a row"),
    ):
        trainer().fit(gradient(max_nonfinite=3), _without("b", range(1, 6), torch.inf, count=6))


def test_weights_that_are_not_finite_stop_the_run() -> None:
    class Broken(Total):
        def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
            return torch.full((len(columns),), torch.nan, dtype=torch.float64)

    with pytest.raises(FloatingPointError, match="`Broken` should make finite numbers"):
        trainer().fit(gradient(aggregator=Broken()), batches())


# ------------------------------------------------------------------------------------------------------------ precision


@both
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_train(precision: Any, gradients: Any) -> None:
    module = gradient(optimizer=ADAMW, gradients=gradients)
    before = flat(module)
    trainer(precision=precision).fit(module, batches())
    assert flat(module).isfinite().all()
    assert not torch.equal(flat(module).to(before), before)


@both
def test_gradients_are_weighted_in_single_precision(gradients: Any) -> None:
    class Tenth(Total):
        def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
            return torch.tensor([0.1, 0.3, -0.7], dtype=torch.float64)

    net, batch = network(), batches(1)[0]
    before = copy.deepcopy(net)
    weights = torch.tensor([0.1, 0.3, -0.7])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trunk = list(before.encoder.parameters())
        features = before.encoder(batch[0])
        losses = [Masked()(before.heads[name](features), batch[1][name]) for name in NAMES]
        if gradients == "parameters":
            rows = torch.stack([_row(loss, trunk) for loss in losses])
        else:
            rows = torch.stack([_row(loss, [features]) for loss in losses]).float()
    found = (weights[:, None] * rows).sum(dim=0)
    if gradients == "features":
        slopes = torch.autograd.grad(features, trunk, found.view_as(features).to(features))
        found = torch.cat([slope.flatten() for slope in slopes])
    optimizer = partial(torch.optim.SGD, lr=1.0)
    arguments: dict[str, Any] = {"network": net, "aggregator": Tenth(), "gradients": gradients, "optimizer": optimizer}
    trainer(precision="bf16-mixed").fit(gradient(**arguments), Batches([batch]))
    steps = [(old - new).detach().flatten() for old, new in zip(trunk, net.encoder.parameters(), strict=True)]
    torch.testing.assert_close(torch.cat(steps), found, rtol=1e-4, atol=1e-6)


@both
def test_a_gradient_scaler_changes_nothing(gradients: Any) -> None:
    arguments: dict[str, Any] = {"gradients": gradients, "gradient_clip_norm": 0.5, "accumulate_batches": 2}
    found, expected = (gradient(aggregator=NashMTL(), **arguments) for _ in range(2))
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer(plugins=[plugin], max_epochs=2).fit(found, batches())
    trainer(precision="bf16-mixed", max_epochs=2).fit(expected, batches())
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-2, atol=1e-3)


@both
def test_an_aggregator_does_not_see_a_step_that_the_scaler_skips(gradients: Any) -> None:
    class Seen(Total):
        calls = 0

        def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
            self.calls += 1
            return super().solve(gramian, columns)

    aggregator = Seen()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-110)  # it overflows once
    module = gradient(aggregator=aggregator, gradients=gradients)
    before = flat(module)
    trainer(limit_train_batches=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(module, batches())
    assert torch.equal(flat(module), before)
    assert aggregator.calls == 0
    assert scaler.get_scale() == 2.0**17
    assert not module.health.total.any()
    again = gradient(aggregator=aggregator, gradients=gradients)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(again, batches())
    assert aggregator.calls == 3
    assert not torch.equal(flat(again), before)


# -------------------------------------------------------------------------------------------------------------- logging


@both
def test_training_logs_losses_and_weights(gradients: Any) -> None:
    net, batch = network(), batches(1)[0]
    losses = [float(loss.detach()) for loss in _losses(net, batch)]
    features = list(net.encoder.parameters())
    values = _losses(net, batch)
    if gradients == "features":
        encoded = net.encoder(batch[0])
        features, values = [encoded], [Masked()(net.heads[name](encoded), batch[1][name]) for name in NAMES]
    rows = torch.stack([_row(value, features) for value in values]).double()
    aggregator = MGDA()
    aggregator.resolve(NAMES)
    weights = aggregator.weights(rows @ rows.T)
    run = trainer(log_every_n_steps=1)
    run.fit(gradient(network=net, aggregator=MGDA(), gradients=gradients), batches(1))
    for task, name in enumerate(NAMES):
        assert float(run.callback_metrics[f"train_loss/{name}"]) == pytest.approx(losses[task], rel=1e-5)
        assert float(run.callback_metrics[f"weight/{name}"]) == pytest.approx(float(weights[task]), rel=1e-4)
    assert float(run.callback_metrics["train_loss"]) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert {value.dtype for value in run.callback_metrics.values()} == {torch.float32}


def test_sick_tasks_are_counted_in_the_log(tmp_path: Path) -> None:
    run = trainer(log_every_n_steps=1, logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match="not finite"):
        run.fit(gradient(), _without("b", [0], torch.inf))
    assert run.callback_metrics["nonfinite/b"] == 1


def test_the_module_satisfies_the_protocol_of_losses() -> None:
    module: TaskLossesProtocol = gradient()
    assert list(module.batch_losses(batches(1)[0])) == list(NAMES)


# ------------------------------------------------------------------------------------------------------------- resuming


def _run_of_everything(folder: Path, callbacks: Sequence[Callback], **arguments: Any) -> Any:
    seed_everything(7)
    module = gradient(
        **{
            "network": network(noisy=True),
            "optimizer": ADAMW,
            "gradient_clip_norm": 1.0,
            "lr_scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
            "lr_scheduler_interval": "step",
            **arguments,
        }
    )
    return module, trainer(callbacks, max_epochs=2, default_root_dir=str(folder))


@pytest.mark.filterwarnings("ignore:The loss of task")
@pytest.mark.parametrize(
    ("name", "gradients", "accumulate", "whole"),
    [
        ("PCGrad", "parameters", 2, False),
        ("PCGrad", "features", 2, False),
        ("CAGrad", "parameters", 2, True),
        ("GradVac of TorchJD", "parameters", 1, False),
        ("GradDrop of TorchJD", "parameters", 2, False),
    ],
)
def test_resumed_after_any_batch_equals_uninterrupted_bit_for_bit(
    name: str, gradients: str, accumulate: int, whole: bool, tmp_path: Path
) -> None:
    data = batches(3)
    data[1][1]["b"][:] = torch.inf
    for task in "bc" if whole else "":  # what is shared by several is known from batches before
        data[2][1][task][:] = torch.nan
    save = SaveAfterEachBatch(tmp_path)

    def build(callbacks: Sequence[Callback]) -> Any:
        net = network(noisy=True)
        arguments = {"gradients": gradients, "accumulate_batches": accumulate, "aggregator": FAMILY[name]()}
        return _run_of_everything(tmp_path, callbacks, network=Whole(net) if whole else net, **arguments)

    module, run = build([save])
    run.fit(module, Position(data), data)
    for path in save.paths[:-1]:
        resumed, again = build([])
        seed_everything(99)  # a new process has another random state
        again.fit(resumed, Position(data), data, ckpt_path=str(path))
        _assert_equal(resumed.state_dict(), module.state_dict())
        assert_equal_states(again.optimizers[0].state_dict(), run.optimizers[0].state_dict())
        assert again.global_step == run.global_step


@both
def test_gradients_of_a_checkpoint_are_saved_once_more_before_they_are_taken_up(gradients: Any, tmp_path: Path) -> None:
    save = SaveAfterEachBatch(tmp_path)
    trainer([save]).fit(gradient(accumulate_batches=2, gradients=gradients), batches(3))
    state = torch.load(save.paths[0], weights_only=True)["state_dict"]
    assert state["_extra_state"]["gradients"]
    module = gradient(accumulate_batches=2, gradients=gradients)
    module.load_state_dict(state)
    _assert_equal(module.state_dict(), state)


@both
def test_a_run_that_broke_off_leaves_nothing_to_the_next(gradients: Any) -> None:
    class Break(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("here")

    module, fresh = (gradient(accumulate_batches=3, gradients=gradients) for _ in range(2))
    with pytest.raises(RuntimeError, match="here"):
        trainer([Break()]).fit(module, batches())
    for each in (module, fresh):
        trainer().fit(each, batches(3, seed=1))
    assert torch.equal(flat(module), flat(fresh))


def _assert_equal(found: Any, expected: Any) -> None:
    """Compare states that hold lists."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_equal(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))
    else:
        assert found == expected


# ---------------------------------------------------------------------------------------------------------------- ranks


class _Write(Callback):
    """Write what each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        losses = [float(trainer.callback_metrics[f"val_loss/{name}"]) for name in NAMES]
        result = {"parameters": flat(pl_module), "losses": losses, "sick": pl_module.health.total}
        torch.save(result, self.folder / f"rank-{trainer.global_rank}.pt")


def _assert_ranks_equal_one(build: Callable[[], GradientModule], data: list[Batch], folder: Path) -> None:
    (folder / "alone").mkdir()
    seed_everything(5)
    trainer([_Write(folder / "alone")], max_epochs=2).fit(build(), Interleaved(data), Interleaved(data))
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    seed_everything(5)
    run = trainer([_Write(folder)], max_epochs=2, devices=2, strategy=strategy, use_distributed_sampler=False)
    run.fit(build(), Interleaved(data), Interleaved(data))
    alone = torch.load(folder / "alone" / "rank-0.pt", weights_only=True)
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    assert ranks[0]["sick"].tolist() == ranks[1]["sick"].tolist() == alone["sick"].tolist()
    torch.testing.assert_close(ranks[0]["parameters"], alone["parameters"], rtol=1e-5, atol=1e-5)
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)


@both
def test_two_ranks_that_accumulate_and_clip_equal_one_process(gradients: Any, tmp_path: Path) -> None:
    build = partial(gradient, accumulate_batches=2, gradient_clip_norm=0.5, gradients=gradients)
    _assert_ranks_equal_one(lambda: build(aggregator=PCGrad()), batches(5), tmp_path)


@pytest.mark.filterwarnings("ignore:The loss of task")
@pytest.mark.parametrize(
    ("name", "gradients", "whole"),
    [
        ("PCGrad", "parameters", False),
        ("CAGrad", "parameters", True),
        ("NashMTL", "features", False),
        ("GradDrop of TorchJD", "parameters", False),
        ("GradVac of TorchJD", "features", False),
    ],
)
def test_two_ranks_equal_one_process_where_labels_are_missing_or_sick_on_one(
    name: str, gradients: Any, whole: bool, tmp_path: Path
) -> None:
    data = batches(6)  # the first and the last one are whole
    for index, (_, targets) in enumerate(data[1:5]):
        targets["b"][index % 2 :: 2] = torch.nan  # all of one rank's
        targets["c"][:3] = torch.nan  # an unequal number
    data[4][1]["a"][0] = torch.inf  # one rank's loss is not finite
    data[5][1]["b"][1] = 1e3  # one rank's gradient is not finite
    for target in data[3][1].values():
        target[1::2] = torch.nan  # one rank has no labels at all

    def build() -> GradientModule:
        net = Whole() if whole else network()
        spiking = [tasks()[0], Task("b", _Spiking()), tasks()[2]]
        return gradient(network=net, tasks=spiking, aggregator=FAMILY[name](), gradients=gradients)

    _assert_ranks_equal_one(build, data, tmp_path)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tasks": tasks()[:1]}, "at least 2 tasks"),
        ({"aggregator": UPGrad({"e": 1.0})}, "'e'"),
        ({"max_nonfinite": 0}, "max_nonfinite"),
        ({"gradients": "layers"}, "`gradients` should be 'parameters' or 'features'"),
        ({"gradients": "features", "network": Whole()}, "applies its `heads` to what its `encoder` returns"),
    ],
    ids=["tasks", "preference", "max_nonfinite", "gradients", "network"],
)
def test_constructor_refuses(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        gradient(**copy.deepcopy(arguments))


@pytest.mark.parametrize("argument", ["network", "aggregator"])
def test_constructor_refuses_kinds(argument: str) -> None:
    with pytest.raises(TypeError, match=f"`{argument}`"):
        gradient(**{argument: "equal"})


@pytest.mark.parametrize(
    ("aggregator", "match"),
    [
        (population.MGDA(), r"mtl_lightning\.aggregation.*Found an object of mtl_lightning\.mgda\.MGDA"),
        (MGDA, r"Found the class mtl_lightning\.aggregation\.MGDA"),
        (jd.MGDA(), r"those of TorchJD go into `mtl_lightning\.torchjd\.TorchJD\(\.\.\.\)`"),
    ],
    ids=["rule of populations", "class", "TorchJD"],
)
def test_what_is_near_to_an_aggregator_is_refused_with_a_hint(aggregator: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        gradient(aggregator=aggregator)


@pytest.mark.parametrize(
    ("flags", "match"),
    [({"gradient_clip_val": 1.0}, "gradient_clip_norm"), ({"accumulate_grad_batches": 2}, "accumulate_batches")],
)
def test_trainer_flags_that_do_not_reach_are_refused(flags: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        trainer(**flags).fit(gradient(), batches())


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("own", [True, False], ids=["own", "TorchJD"])
def test_a_configuration_names_an_aggregator(own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = yaml.safe_load((CONFIGS / "gradient_multi_digits.yaml").read_text())
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "accelerator": "cpu"}
    config["trainer"]["enable_progress_bar"] = False
    config["data"]["init_args"] |= {"num_train": 256, "num_val": 128, "num_test": 128}
    if not own:
        inner = {"class_path": "torchjd.aggregation.FairGrad", "init_args": {"alpha": 2.0}}
        rule = {"class_path": "mtl_lightning.torchjd.TorchJD", "init_args": {"aggregator": inner, "seed": 3}}
        config["model"]["init_args"]["aggregator"] = rule
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(config))
    cli = run_command(["fit", "--config=run.yaml"])
    aggregator = cli.model.aggregator
    assert isinstance(aggregator, UPGrad if own else TorchJD)
    if not own:
        assert isinstance(aggregator.aggregator, jd.FairGrad)
        assert (aggregator.seed, aggregator.get_extra_state()["draws"]) == (3, 2)
    assert cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["weight/left"] > 0
