from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from mtl_lightning.adaptive_weighting import FAMO, DynamicTaskPrioritization, GradNorm
from mtl_lightning.modules.weighted import WeightedModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.protocols import TaskLossesProtocol
from mtl_lightning.scalarization import SmoothChebyshev, TrackedIdeal
from mtl_lightning.task import Task
from mtl_lightning.weighting import (
    DynamicWeightAverage,
    Equal,
    Fixed,
    GeometricMean,
    IMTLLoss,
    LossWeighting,
    RandomWeights,
    Scalarized,
    ScaleInvariant,
    Uncertainty,
)
from tests.distributed.ranks import ranked_trainer, run_ranks
from tests.modules.common import Interleaved, Position, SaveAfterEachBatch, assert_equal_states, trainer
from tests.modules.processes import Synchronised

NAMES = ("a", "b", "c")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
}
Batch = tuple[Tensor, dict[str, Tensor]]


def _closeness(preds: Tensor, target: Tensor) -> Tensor:
    known = ~target.isnan()
    return torch.where(known, torch.exp(-(preds - target).abs()), 0.0).sum() / known.sum()


FAMILY: dict[str, Callable[[], LossWeighting]] = {
    "Equal": Equal,
    "Fixed": lambda: Fixed({"a": 0.5, "c": 3.0}),
    "ScaleInvariant": ScaleInvariant,
    "GeometricMean": GeometricMean,
    "RandomWeights": RandomWeights,
    "Uncertainty": Uncertainty,
    "IMTLLoss": IMTLLoss,
    "DynamicWeightAverage": DynamicWeightAverage,
    "Scalarized": lambda: Scalarized(SmoothChebyshev(ideal=TrackedIdeal(3)), {"b": 2.0}),
    "FAMO": lambda: FAMO(lr=0.2),
    "DynamicTaskPrioritization": lambda: DynamicTaskPrioritization(
        {"a": _closeness, "c": _closeness}, decay=0.5, floor=0.3
    ),
    "GradNorm": lambda: GradNorm(lr=0.1),
}
family = pytest.mark.parametrize("name", FAMILY)


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


def tasks() -> list[Task]:
    return [Task(name, Masked()) for name in NAMES]


def weighted(**arguments: Any) -> WeightedModule:
    defaults: dict[str, Any] = {"network": network(), "tasks": tasks(), "optimizer": OPTIMIZERS["sgd"]}
    return WeightedModule(**(defaults | arguments))


def heads(module: WeightedModule) -> Any:
    return module.network.heads


def flat(module: WeightedModule) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.network.parameters()])


# ---------------------------------------------------------------------------------------- against a plain training loop


def _losses(net: nn.Module, batch: Batch) -> Tensor:
    outputs = net(batch[0])
    return torch.stack([Masked()(outputs[name], batch[1][name]) for name in NAMES])


def _reference_run(name: str, optimizer: Callable[[Any], torch.optim.Optimizer], epochs: int) -> tuple[Tensor, Any]:
    """One process, whole batches, and the objective differentiated as it is."""
    net, weighting = network(), FAMILY[name]()
    weighting.resolve(NAMES)
    groups: list[dict[str, Any]] = [
        {"params": list(net.parameters())},
        {"params": list(weighting.parameters()), "weight_decay": 0.0},
    ]
    stepper: Any = optimizer(groups if groups[1]["params"] else groups[:1])
    for _ in range(epochs):
        for batch in batches(3):
            losses = _losses(net, batch)
            if name == "DynamicTaskPrioritization":
                outputs = net(batch[0])
                values = [_closeness(outputs[task], batch[1][task]) for task in "ac"]
                indicators = torch.stack([values[0], torch.tensor(torch.nan), values[1]])
                weighting.observe_batch(losses.detach(), indicators)
            if name == "GradNorm":
                layer = net.encoder.layers[1].weight
                rows = [torch.autograd.grad(loss, layer, retain_graph=True)[0] for loss in losses]
            stepper.zero_grad()
            weighting(losses).backward()
            stepper.step()
            if name == "GradNorm":
                weighting.observe_gradients(losses.detach(), torch.stack([row.norm() for row in rows]))
            weighting.observe(losses.detach())
            if name == "FAMO":
                weighting.observe_step(losses.detach(), _losses(net, batch).detach())
        weighting.end_epoch()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]), weighting.state_dict()


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, "momentum") for name in FAMILY), *((name, "adamw") for name in ("Equal", "Uncertainty", "IMTLLoss"))],
)
def test_a_run_equals_a_plain_loop(name: str, optimizer: str) -> None:
    module = weighted(weighting=FAMILY[name](), optimizer=OPTIMIZERS[optimizer])
    trainer(max_epochs=3).fit(module, batches(3))
    parameters, state = _reference_run(name, OPTIMIZERS[optimizer], epochs=3)
    torch.testing.assert_close(flat(module), parameters, rtol=1e-4, atol=1e-5)
    found = module.weighting.state_dict()
    for key, value in state.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, equal_nan=True)
        else:
            assert found[key] == value


class _Counts(Callback):
    def __init__(self) -> None:
        self.forwards = self.backwards = self.steps = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.network.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.forwards += 1

    def on_before_backward(self, *_: Any) -> None:
        self.backwards += 1

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.steps += 1


@family
def test_one_pass_forward_one_backward_and_one_step_per_batch(name: str) -> None:
    counts = _Counts()
    run = trainer([counts])
    run.fit(weighted(weighting=FAMILY[name]()), batches(2))
    assert (counts.forwards, counts.backwards, counts.steps) == (4 if name == "FAMO" else 2, 2, 2)
    assert run.global_step == 2


def test_the_default_is_the_sum_of_the_losses() -> None:
    module, equal = weighted(), weighted(weighting=Fixed([1.0, 1.0, 1.0]))
    for one in (module, equal):
        trainer().fit(one, batches())
    assert torch.equal(flat(module), flat(equal))


def test_a_task_of_weight_zero_trains_nothing() -> None:
    module = weighted(weighting=Fixed({"b": 0.0}))
    before = heads(module)["b"].weight.detach().clone()
    trainer().fit(module, batches())
    assert torch.equal(heads(module)["b"].weight, before)


# ------------------------------------------------------------------------------------------------- optimiser, schedule


@pytest.mark.parametrize("make", [Uncertainty, IMTLLoss])
def test_learned_weights_are_in_the_optimiser_without_weight_decay(make: Callable[[], LossWeighting]) -> None:
    module, run = weighted(weighting=make(), optimizer=OPTIMIZERS["adamw"]), trainer()
    (parameter,) = module.weighting.parameters()
    run.fit(module, batches())
    rest, learned = run.optimizers[0].param_groups
    assert learned["params"] == [parameter]
    assert (rest["weight_decay"], learned["weight_decay"]) == (0.1, 0.0)
    assert len(rest["params"]) == len(list(module.network.parameters()))
    assert (parameter != 0).all()


@pytest.mark.parametrize("make", [Equal, FAMO, GradNorm, RandomWeights, DynamicWeightAverage])
def test_other_weights_are_not_in_the_optimiser(make: Callable[[], LossWeighting]) -> None:
    run = trainer()
    run.fit(weighted(weighting=make()), batches(1))
    (group,) = run.optimizers[0].param_groups
    assert len(group["params"]) == 8


def test_learned_weights_of_a_loss_are_trained() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            return (self.scale * preds - target).square().mean()

    loss = Scaled()
    trainer().fit(weighted(tasks=[Task("a", loss), *tasks()[1:]], weighting=Uncertainty()), batches())
    assert loss.scale != 1.0


def test_the_gradient_is_clipped() -> None:
    module = weighted(optimizer=partial(torch.optim.SGD, lr=1.0), gradient_clip_norm=1e-3)
    before = flat(module)
    trainer(limit_train_batches=1).fit(module, batches())
    assert float((flat(module) - before).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("interval", "expected"), [("epoch", 0.5**2), ("step", 0.5**6)])
def test_schedulers_go_by_epoch_or_by_step(interval: str, expected: float) -> None:
    module = weighted(
        optimizer=partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        lr_scheduler_interval=interval,
        gradient_clip_norm=1e-3,
        accumulate_batches=2,
    )
    run = trainer(max_epochs=2)
    run.fit(module, batches())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


def test_accumulated_gradients_are_the_mean_of_those_of_the_batches() -> None:
    module = weighted(weighting=GeometricMean(), accumulate_batches=3)
    run = trainer()
    run.fit(module, batches(6))
    net: Any = network()
    stepper = torch.optim.SGD(net.parameters(), lr=0.05)
    data = batches(6)
    for group in (data[:3], data[3:]):
        stepper.zero_grad()
        torch.stack([_losses(net, batch).prod() ** (1 / 3) for batch in group]).mean().backward()  # type: ignore[no-untyped-call]
        stepper.step()
    torch.testing.assert_close(flat(module), torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert run.global_step == 2


def test_accumulated_batches_of_a_linear_objective_equal_one_large_batch() -> None:
    small = batches(6)
    large = Batches(
        (torch.cat([x[0], y[0]]), {name: torch.cat([x[1][name], y[1][name]]) for name in NAMES})
        for x, y in zip(small[::2], small[1::2], strict=True)
    )
    parts, whole = weighted(accumulate_batches=2), weighted()
    for module, data in ((parts, small), (whole, large)):
        trainer().fit(module, data)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-5, atol=1e-6)


def test_the_weighting_learns_once_a_step() -> None:
    class Seen(Equal):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[list[float]] = []

        def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
            self.rows.append(losses.tolist())

    seen, net, data = Seen(), network(), batches(4)
    module = weighted(network=net, weighting=seen, accumulate_batches=2, optimizer=partial(torch.optim.SGD, lr=0.0))
    expected = torch.stack([_losses(net, batch).detach() for batch in data]).view(2, 2, 3).mean(dim=1)
    trainer().fit(module, data)
    torch.testing.assert_close(torch.tensor(seen.rows), expected)


def test_frozen_parameters_stay() -> None:
    net = network()
    net.encoder.requires_grad_(False)
    before = [p.clone() for p in net.encoder.parameters()]
    trainer().fit(weighted(network=net), batches())
    assert all(torch.equal(old, new) for old, new in zip(before, net.encoder.parameters(), strict=True))


# -------------------------------------------------------------------------------------------- what weightings ask for


def test_losses_after_the_step_repeat_the_random_numbers_and_take_up_no_statistics() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Seen(FAMO):
        def observe_step(self, before: Tensor, after: Tensor, tasks: Sequence[int] | None = None) -> None:
            seen.append((before, after))

    standing = partial(torch.optim.SGD, lr=0.0)
    module = weighted(network=network(noisy=True), weighting=Seen(), optimizer=standing)
    plain = weighted(network=network(noisy=True), optimizer=standing)
    for one in (module, plain):
        trainer().fit(one, batches())
    assert len(seen) == 6
    assert all(torch.equal(before, after) for before, after in seen)
    for found, expected in zip(module.network.buffers(), plain.network.buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("layer", "index"), [(None, 0), ("encoder.layers.1", slice(0, 2)), ("encoder", slice(0, 2))])
def test_gradient_norms_are_those_of_the_unweighted_losses_in_the_layer(layer: str | None, index: Any) -> None:
    seen: list[Tensor] = []

    class Seen(GradNorm):
        def observe_gradients(self, losses: Tensor, norms: Tensor, tasks: Sequence[int] | None = None) -> None:
            seen.append(norms)

    net, batch = network(), batches(1)[0]
    parameters = list(net.encoder.parameters())[index]
    parameters = parameters if isinstance(parameters, list) else [parameters]
    expected = []
    for loss in _losses(net, batch):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().double())
    trainer().fit(weighted(network=net, weighting=Seen(layer=layer)), batches(1))
    torch.testing.assert_close(seen[0], torch.stack(expected), rtol=1e-5, atol=0)


def test_indicators_see_predictions_and_targets() -> None:
    net, batch = network(), batches(1)[0]
    expected = _closeness(net(batch[0])["a"], batch[1]["a"])
    weighting = DynamicTaskPrioritization({"a": _closeness}, decay=1.0)
    trainer().fit(weighted(network=net, weighting=weighting), batches(1))
    assert float(weighting.average[0]) == pytest.approx(float(expected.detach()))


def test_an_indicator_may_return_a_number() -> None:
    weighting = DynamicTaskPrioritization({"a": lambda preds, target: 0.25}, decay=1.0)
    trainer().fit(weighted(weighting=weighting), batches(1))
    assert float(weighting.average[0]) == 0.25


def test_an_indicator_of_another_shape_is_refused() -> None:
    weighting = DynamicTaskPrioritization({"a": lambda preds, target: preds - target})
    with pytest.raises(ValueError, match=r"indicator of task 'a' should return a number. Found shape \(8, 1\)"):
        trainer().fit(weighted(weighting=weighting), batches(1))


# -------------------------------------------------------------------------------------------------------- missing, sick


def _without(name: str, places: Sequence[int], value: float = torch.nan, count: int = 6) -> Batches:
    found = batches(count)
    for place in places:
        found[place][1][name][:] = value
    return found


@family
def test_a_task_without_labels_takes_no_part(name: str) -> None:
    module = weighted(weighting=FAMILY[name](), optimizer=OPTIMIZERS["adamw"])
    head = [p.clone() for p in heads(module)["b"].parameters()]
    trainer(max_epochs=2).fit(module, _without("b", range(3), count=3))
    assert all(torch.equal(*pair) for pair in zip(head, heads(module)["b"].parameters(), strict=True))
    assert flat(module).isfinite().all()


def test_batches_without_any_label_are_passed_over() -> None:
    data = batches(3)
    for name in NAMES:
        data[1][1][name][:] = torch.nan
    module, run = weighted(), trainer()
    run.fit(module, data)
    assert run.global_step == 2
    assert module.batches_seen == 3


@family
@pytest.mark.filterwarnings("ignore:The loss of task")
def test_a_sick_task_is_left_out_as_if_it_had_no_labels(name: str) -> None:
    found, expected = (weighted(weighting=FAMILY[name]()) for _ in range(2))
    trainer(max_epochs=2).fit(found, _without("b", (0, 2), torch.inf, count=4))
    trainer(max_epochs=2).fit(expected, _without("b", (0, 2), count=4))
    torch.testing.assert_close(flat(found), flat(expected))
    assert found.health.total.tolist() == [0, 4, 0]


def test_a_head_that_has_failed_does_not_reach_the_trunk() -> None:
    net = network()
    with torch.no_grad():
        net.heads["c"].weight[:] = torch.nan
    with pytest.warns(UserWarning, match="loss of task 'c' is not finite"):
        trainer().fit(weighted(network=net), batches())
    assert all(p.isfinite().all() for name, p in net.named_parameters() if "heads.c" not in name)


def test_a_task_that_stays_sick_stops_the_run() -> None:
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(FloatingPointError, match=r"task 'b' should be finite. Found 3 in a row"),
    ):
        trainer().fit(weighted(max_nonfinite=3), _without("b", range(1, 6), torch.inf))


def test_batches_in_which_all_tasks_are_sick_are_passed_over() -> None:
    data = batches(3)
    for name in NAMES:
        data[1][1][name][:] = torch.inf
    run = trainer()
    with pytest.warns(UserWarning, match="not finite"):
        run.fit(weighted(), data)
    assert run.global_step == 2


@pytest.mark.parametrize(
    "name",
    ["ScaleInvariant", "GeometricMean", "Uncertainty", "IMTLLoss", "DynamicWeightAverage", "FAMO", "GradNorm"],
)
def test_a_negative_loss_is_refused_where_it_has_no_meaning(name: str) -> None:
    shifted = [Task("a", lambda preds, target: (preds - target).square().mean() - 1e3), *tasks()[1:]]
    with pytest.raises(ValueError, match=f"task 'a' should not be negative under `{name}`"):
        trainer().fit(weighted(tasks=shifted, weighting=FAMILY[name]()), batches())


@pytest.mark.parametrize("name", ["Equal", "Scalarized"])
def test_a_negative_loss_is_trained_elsewhere_without_a_word(name: str, recwarn: pytest.WarningsRecorder) -> None:
    shifted = [Task("a", lambda preds, target: (preds - target).square().mean() - 1e3), *tasks()[1:]]
    trainer().fit(weighted(tasks=shifted, weighting=FAMILY[name]()), batches())
    assert not [warning for warning in recwarn if "negative" in str(warning.message)]


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, precision) for name in FAMILY for precision in ("bf16-mixed", "bf16-true")), ("GradNorm", "64-true")],
)
def test_precisions_train(name: str, precision: Any) -> None:
    module = weighted(weighting=FAMILY[name](), optimizer=OPTIMIZERS["adamw"])
    trainer(max_epochs=2, precision=precision).fit(module, batches(2))
    assert flat(module).isfinite().all()
    assert all(
        buffer.dtype == torch.float64 for key, buffer in module.weighting.named_buffers() if "minimum" not in key
    )


@pytest.mark.parametrize("name", ["Uncertainty", "FAMO", "GradNorm"])
def test_a_gradient_scaler_changes_nothing(name: str) -> None:
    found, expected = (weighted(weighting=FAMILY[name]()) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = scaler
    trainer(plugins=[plugin]).fit(found, batches())
    trainer(precision="bf16-mixed").fit(expected, batches())
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-2, atol=1e-3)
    for key, value in expected.weighting.state_dict().items():
        torch.testing.assert_close(found.weighting.state_dict()[key], value, rtol=5e-2, atol=2e-2)


def test_famo_learns_nothing_from_a_step_that_the_scaler_skips() -> None:
    weighting = FAMO()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**127))  # it overflows
    trainer(limit_train_batches=1, plugins=[plugin]).fit(weighted(weighting=weighting), batches())
    assert not weighting.adam.steps.any()


# -------------------------------------------------------------------------------------------------------------- logging


def test_training_logs_losses_and_weights() -> None:
    net, batch = network(), batches(1)[0]
    losses = _losses(net, batch).detach()
    run = trainer(log_every_n_steps=1)
    run.fit(weighted(network=net, weighting=ScaleInvariant()), batches(1))
    for task, name in enumerate(NAMES):
        assert float(run.callback_metrics[f"train_loss/{name}"]) == pytest.approx(float(losses[task]), rel=1e-5)
        assert float(run.callback_metrics[f"weight/{name}"]) == pytest.approx(1 / float(losses[task]), rel=1e-5)
    assert float(run.callback_metrics["train_loss"]) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_sick_tasks_are_counted_in_the_log(tmp_path: Path) -> None:
    run = trainer(log_every_n_steps=1, logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match="not finite"):
        run.fit(weighted(), _without("b", [0], torch.inf))
    assert run.callback_metrics["nonfinite/b"] == 1


def test_validation_and_prediction_are_those_of_the_network() -> None:
    module = weighted()
    found = trainer().validate(module, batches(2), verbose=False)[0]
    expected = torch.stack([_losses(module.network, batch) for batch in batches(2)]).mean(dim=0)
    assert [found[f"val_loss/{name}"] for name in NAMES] == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_module_satisfies_the_protocol_of_losses() -> None:
    module: TaskLossesProtocol = weighted()
    assert list(module.batch_losses(batches(1)[0])) == list(NAMES)


# ------------------------------------------------------------------------------------------------------------- resuming


def _run_of_everything(folder: Path, callbacks: Sequence[Callback], name: str, **arguments: Any) -> Any:
    seed_everything(7)
    module = weighted(
        **{
            "network": network(noisy=True),
            "weighting": FAMILY[name](),
            "optimizer": OPTIMIZERS["adamw"],
            "gradient_clip_norm": 1.0,
            "lr_scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
            "lr_scheduler_interval": "step",
            **arguments,
        }
    )
    return module, trainer(callbacks, max_epochs=2, default_root_dir=str(folder))


@pytest.mark.filterwarnings("ignore:The loss of task")
@pytest.mark.parametrize(
    ("name", "accumulate"), [*((name, 2) for name in FAMILY), *((name, 1) for name in ("FAMO", "GradNorm"))]
)
def test_resumed_after_any_batch_equals_uninterrupted_bit_for_bit(name: str, accumulate: int, tmp_path: Path) -> None:
    data = batches(3)
    data[1][1]["b"][:] = torch.inf
    save = SaveAfterEachBatch(tmp_path)
    module, run = _run_of_everything(tmp_path, [save], name, accumulate_batches=accumulate)
    run.fit(module, Position(data), data)
    for path in save.paths[:-1]:
        resumed, again = _run_of_everything(tmp_path, [], name, accumulate_batches=accumulate)
        seed_everything(99)  # a new process has another random state
        again.fit(resumed, Position(data), data, ckpt_path=str(path))
        assert_equal_states(_known(resumed.state_dict()), _known(module.state_dict()))
        assert_equal_states(again.optimizers[0].state_dict(), run.optimizers[0].state_dict())
        assert again.global_step == run.global_step


def _known(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.nan_to_num(-1.0) if isinstance(value, Tensor) else value for key, value in state.items()}


# ---------------------------------------------------------------------------------------------------------------- ranks


class _Write(Callback):
    """Write what each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        state = {key: value for key, value in pl_module.weighting.state_dict().items() if isinstance(value, Tensor)}
        losses = [float(trainer.callback_metrics[f"val_loss/{name}"]) for name in NAMES]
        result = {"parameters": flat(pl_module), "weighting": state, "losses": losses}
        torch.save(result, self.folder / f"rank-{trainer.global_rank}.pt")


def _assert_ranks_equal_one(build: Callable[[], WeightedModule], data: list[Batch], folder: Path) -> None:
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
    torch.testing.assert_close(ranks[0]["parameters"], alone["parameters"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ranks[0]["weighting"], ranks[1]["weighting"], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ranks[0]["weighting"], alone["weighting"], rtol=1e-3, atol=1e-4, equal_nan=True)
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.parametrize("name", ["GeometricMean", "Uncertainty"])
def test_two_ranks_that_accumulate_and_clip_equal_one_process(name: str, tmp_path: Path) -> None:
    build = partial(weighted, accumulate_batches=2, gradient_clip_norm=0.5)
    _assert_ranks_equal_one(lambda: build(weighting=FAMILY[name]()), batches(5), tmp_path)


@pytest.mark.filterwarnings("ignore:The loss of task")
@family
def test_two_ranks_equal_one_process_where_labels_are_missing_or_sick_on_one(name: str, tmp_path: Path) -> None:
    data = batches(5)  # the last one is whole
    for index, (_, targets) in enumerate(data[:4]):
        targets["b"][index % 2 :: 2] = torch.nan  # all of one rank's
        targets["c"][:3] = torch.nan  # an unequal number
    data[3][1]["a"][0] = torch.inf  # one rank's loss is not finite
    for target in data[2][1].values():
        target[1::2] = torch.nan  # one rank has no labels at all
    _assert_ranks_equal_one(lambda: weighted(weighting=FAMILY[name]()), data, tmp_path)


@pytest.mark.parametrize("name", ["GeometricMean", "Uncertainty", "FAMO", "GradNorm"])
def test_two_ranks_equal_one_process_on_uneven_batches(name: str, tmp_path: Path) -> None:
    data = batches()
    for size in (3, 1):  # one more sample on one rank, and none on the other
        data.append((data[0][0][:size], {task: target[:size] for task, target in data[0][1].items()}))
    _assert_ranks_equal_one(lambda: weighted(weighting=FAMILY[name]()), data, tmp_path)


def _validate_constants() -> None:
    run = ranked_trainer(world_size=3, use_distributed_sampler=False)
    module = weighted()
    for name, dtype in (("single", torch.float32), ("coarse", torch.bfloat16)):
        module.network.register_buffer(name, torch.linspace(-3, 3, 1001).to(dtype))
    before = {name: buffer.clone() for name, buffer in module.network.named_buffers()}
    run.validate(module, Interleaved(batches()), verbose=False)
    for name, buffer in module.network.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_buffers_that_are_equal_on_three_ranks_are_left_as_they_are(tmp_path: Path) -> None:
    run_ranks(_validate_constants, world_size=3, folder=tmp_path, limit=60)


@pytest.mark.parametrize("name", ["Uncertainty", "FAMO", "GradNorm"])
def test_ranks_meet_in_layers_that_exchange_statistics(name: str, tmp_path: Path) -> None:
    data = batches()
    for index, (_, targets) in enumerate(data):
        targets["b"][index % 2 :: 2] = torch.nan  # all of one rank's, which waits in the head of the task all the same

    def build() -> WeightedModule:
        torch.manual_seed(0)
        encoder = nn.Sequential(MLP(6, [8]), Synchronised())
        net = MultiHeadNetwork(encoder, {task: nn.Sequential(nn.Linear(8, 1), Synchronised()) for task in NAMES})
        return weighted(network=net, weighting=FAMILY[name](), optimizer=partial(torch.optim.SGD, lr=0.01))

    _assert_ranks_equal_one(build, data, tmp_path)


# ------------------------------------------------------------------------------------------------------------ bad input


class _Whole(nn.Module):
    """Hides how a network is built."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, inputs: Tensor) -> Any:
        return self.inner(inputs)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tasks": tasks()[:1]}, "at least 2 tasks"),
        ({"weighting": Fixed({"e": 1.0})}, "'e'"),
        ({"max_nonfinite": 0}, "max_nonfinite"),
        ({"gradient_clip_norm": 0.0}, "gradient_clip_norm"),
        ({"weighting": GradNorm(layer="encoder.7")}, "`layer` of GradNorm should name a module of the network"),
        (
            {"weighting": GradNorm(layer="encoder.layers.2")},
            "`layer` of GradNorm should name a module with trained parameters",
        ),
        ({"weighting": GradNorm(), "network": _Whole()}, "`layer` of GradNorm should name a module whose parameters"),
    ],
    ids=str,
)
def test_constructor_refuses(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        weighted(**copy.deepcopy(arguments))


@pytest.mark.parametrize("argument", ["network", "weighting"])
def test_constructor_refuses_kinds(argument: str) -> None:
    with pytest.raises(TypeError, match=f"`{argument}`"):
        weighted(**{argument: "equal"})


def test_gradnorm_takes_a_named_layer_of_any_network() -> None:
    module = weighted(network=_Whole(), weighting=GradNorm(layer="inner.encoder"))
    trainer().fit(module, batches())
    assert (module.weighting.get_buffer("weights") != 1.0).any()


@pytest.mark.parametrize(
    ("flags", "match"),
    [({"gradient_clip_val": 1.0}, "gradient_clip_norm"), ({"accumulate_grad_batches": 2}, "accumulate_batches")],
)
def test_trainer_flags_that_do_not_reach_are_refused(flags: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        trainer(**flags).fit(weighted(), batches())


def test_gradients_of_a_checkpoint_are_saved_once_more_before_they_are_taken_up(tmp_path: Path) -> None:
    save = SaveAfterEachBatch(tmp_path)
    trainer([save]).fit(weighted(accumulate_batches=2), Position(batches()))
    state = torch.load(save.paths[0], weights_only=True)["state_dict"]["_extra_state"]
    assert state["gradients"]
    module = weighted(accumulate_batches=2)
    module.load_state_dict(torch.load(save.paths[0], weights_only=True)["state_dict"])
    found = module.get_extra_state()["gradients"]
    assert found.keys() == state["gradients"].keys()
    assert all(torch.equal(found[index], gradient) for index, gradient in state["gradients"].items())
