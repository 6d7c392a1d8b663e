from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mtl_lightning import aggregation
from mtl_lightning.callbacks import HypervolumeCallback, ParetoFrontCallback
from mtl_lightning.callbacks.objectives import is_population
from mtl_lightning.exact_pareto import EPO
from mtl_lightning.gradient_weighting import GradientWeighting
from mtl_lightning.mgda import MGDA
from mtl_lightning.min_norm import min_norm_weights
from mtl_lightning.modules import GradientPopulationModule, MT2OModule, WeightedModule
from mtl_lightning.pareto_mtl import ParetoMTL
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.problems import VLMOP1, Fonseca, Problem
from mtl_lightning.protocols import PopulationProtocol
from mtl_lightning.scalarization import Linear, Scalarization, SmoothChebyshev
from mtl_lightning.strategies import PopulationParallelStrategy
from mtl_lightning.task import Task
from mtl_lightning.transfer import NoTransfer
from mtl_lightning.weighting import Scalarized
from tests.modules.common import (
    Interleaved,
    Pairs,
    Position,
    SaveAfterEachBatch,
    assert_equal_states,
    flat,
    loader,
    mt2o,
    network,
    tasks,
    trainer,
)

RULES: dict[str, Callable[[], GradientWeighting]] = {
    "mgda": MGDA,
    "pareto_mtl": partial(ParetoMTL, initial_steps=3),
    "epo": EPO,
}
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def _module(**arguments: Any) -> GradientPopulationModule:
    defaults: dict[str, Any] = {
        "network": network(),
        "tasks": tasks(),
        "preferences": simplex_lattice(num_tasks=2, num_divisions=3),
        "optimizer": partial(torch.optim.SGD, lr=0.05),
        "weighting": EPO(),
        "backend": "loop",
    }
    torch.manual_seed(5)  # of the starts
    return GradientPopulationModule(**(defaults | arguments))


def _rows(module: GradientPopulationModule) -> Tensor:
    return module.population.theta.detach().clone()


class _Poison(Callback):
    """Set the parameters of a subproblem to NaN before a batch."""

    def __init__(self, subproblem: int, batch: int) -> None:
        self.subproblem, self.batch = subproblem, batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.batches_seen == self.batch:
            pl_module.population.theta.data[self.subproblem] = torch.nan


# ------------------------------------------------------------------------------------------------------- the formula


def _reference_run(
    members: Sequence[nn.Module], rule: GradientWeighting, preferences: Tensor, batches: Sequence[Any]
) -> list[nn.Module]:
    """Train one network and one optimiser for each subproblem."""
    members = [copy.deepcopy(member) for member in members]
    optimizers = [MOMENTUM(member.parameters()) for member in members]
    for step, (inputs, targets) in enumerate(batches):
        jacobians, losses = [], []
        for member in members:
            outputs = member(inputs)
            values = [task.loss(outputs[task.name], targets[task.name]) for task in tasks()]
            parameters = list(member.parameters())
            gradients = [
                torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in values
            ]
            jacobians.append(torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in gradients]))
            losses.append(torch.stack(values).detach())
        jacobian = torch.stack(jacobians)
        weights = rule.weights(jacobian.double() @ jacobian.double().mT, torch.stack(losses), preferences, step)
        for member, optimizer, weight, gradient in zip(members, optimizers, weights, jacobian, strict=True):
            combined = (weight.float().unsqueeze(1) * gradient).sum(dim=0)
            for parameter, piece in zip(
                member.parameters(), combined.split([p.numel() for p in member.parameters()]), strict=True
            ):
                parameter.grad = piece.view_as(parameter)
            optimizer.step()
    return list(members)


@pytest.mark.parametrize(("backend", "chunk_size"), [("loop", None), ("vmap", None), ("vmap", 3)])
@pytest.mark.parametrize("name", RULES)
def test_steps_equal_those_of_separate_networks(name: str, backend: str, chunk_size: int | None) -> None:
    module = _module(weighting=RULES[name](), optimizer=MOMENTUM, backend=backend, chunk_size=chunk_size)
    starts = [module.subproblem(index) for index in range(4)]
    trainer(max_epochs=2).fit(module, loader())
    expected = _reference_run(starts, RULES[name](), module.preferences, [*loader(), *loader()])
    for index, member in enumerate(expected):
        torch.testing.assert_close(flat(module.subproblem(index)), flat(member), rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay() -> None:
    net = network()
    for parameter in net.encoder.parameters():
        parameter.requires_grad_(False)
    module = _module(network=net)
    trainer().fit(module, loader())
    for index in range(4):
        member = module.subproblem(index)
        kept = dict(member.named_parameters())
        assert all(torch.equal(kept[f"encoder.{name}"], value) for name, value in net.encoder.named_parameters())


class _Equal(GradientWeighting):
    """The same weights for all tasks and subproblems, whatever the gradients are."""

    def weights(self, gramian: Tensor, losses: Tensor, preferences: Tensor, step: int = 0) -> Tensor:
        return preferences


def test_a_rule_that_gives_the_preferences_is_the_weighted_sum() -> None:
    module = _module(weighting=_Equal(), init="common")
    scalarised = mt2o(scalarization=Linear(), transfer=NoTransfer())
    for each in (module, scalarised):
        trainer(max_epochs=2).fit(each, loader())
    torch.testing.assert_close(_rows(module), scalarised.population.theta.detach(), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- known fronts


def _solve(problem: Problem, rule: GradientWeighting, preferences: Tensor, lr: float, steps: int) -> Any:
    item = (torch.zeros(1, 1), {name: torch.zeros(1, 1) for name in problem.task_names})
    module = _module(
        network=problem,
        tasks=problem.tasks(),
        preferences=preferences,
        optimizer=partial(torch.optim.SGD, lr=lr),
        weighting=rule,
        backend="vmap",
    )
    trainer().fit(module, Position([item] * steps), Position([item]))
    return module


def test_exact_search_finds_the_points_of_a_concave_front() -> None:
    problem, preferences = Fonseca(20), simplex_lattice(2, 6)[1:-1]
    module = _solve(problem, EPO(tolerance=1e-5), preferences, lr=0.1, steps=200)
    torch.testing.assert_close(module.objective_values, problem.chebyshev_front(preferences), rtol=0, atol=6e-3)


def test_pareto_mtl_finds_all_sectors_of_a_concave_front() -> None:
    problem, preferences = Fonseca(20), simplex_lattice(2, 6)
    module = _solve(problem, ParetoMTL(initial_steps=20), preferences, lr=0.5, steps=120)
    unit = preferences / preferences.norm(dim=1, keepdim=True)
    assert torch.equal((module.objective_values @ unit.T).argmax(dim=1), torch.arange(7))
    assert torch.cdist(module.objective_values, problem.front(2000)).amin(dim=1).max() < 0.03


def test_mgda_ends_on_the_front_wherever_it_starts() -> None:
    module = _solve(VLMOP1(3), MGDA(), simplex_lattice(2, 5), lr=0.05, steps=200)
    ends = _rows(module)[:, :3].double()
    jacobian = torch.stack([2 * ends / 3, 2 * (ends - 2) / 3], dim=1)
    gramian = jacobian @ jacobian.mT
    weights = min_norm_weights(gramian)
    assert torch.einsum("pt,pts,ps->p", weights, gramian, weights).max() < 1e-4
    assert torch.cdist(ends, ends).fill_diagonal_(1).min() > 1e-3


# ------------------------------------------------------------------------------------------------------ the settings


@pytest.mark.parametrize("name", RULES)
def test_accumulated_batches_equal_one_large_batch(name: str) -> None:
    small = _module(weighting=RULES[name](), accumulate_batches=2)
    large = _module(weighting=RULES[name]())
    trainer().fit(small, loader(batch_size=10))
    trainer().fit(large, loader(batch_size=20))
    torch.testing.assert_close(_rows(small), _rows(large), rtol=1e-4, atol=1e-5)


def test_clipping_is_per_subproblem_and_after_the_weights() -> None:
    module = _module(gradient_clip_norm=0.1, optimizer=partial(torch.optim.SGD, lr=1.0))
    before = _rows(module)
    trainer(max_steps=1).fit(module, loader())
    torch.testing.assert_close((_rows(module) - before).norm(dim=1), torch.full((4,), 0.1), rtol=1e-4, atol=0)


class _Unlabelled(Pairs):
    """The second task has no label in the first batches."""

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = super().__getitem__(index)
        return inputs, {"a": targets["a"], "b": targets["b"] if index >= 16 else torch.full((1,), torch.nan)}


@pytest.mark.parametrize("backend", ["vmap", "loop"])
@pytest.mark.parametrize("name", RULES)
def test_a_task_without_labels_takes_no_part(name: str, backend: str) -> None:
    module = _module(weighting=RULES[name](), backend=backend)
    starts = [module.subproblem(index).state_dict() for index in range(4)]
    data: DataLoader[Any] = DataLoader(_Unlabelled(), batch_size=8)
    trainer(limit_train_batches=2).fit(module, data)
    for index, start in enumerate(starts):
        end = module.subproblem(index).state_dict()
        assert all(torch.equal(end[key], start[key]) for key in start if key.startswith("heads.b"))
        assert not torch.equal(end["heads.a.weight"], start["heads.a.weight"])
    trainer(max_epochs=2).fit(module, data, data)
    assert torch.isfinite(module.objective_values).all()


def test_accumulation_over_a_batch_without_labels() -> None:
    module = _module(accumulate_batches=4)
    trainer(max_epochs=2).fit(module, DataLoader(_Unlabelled(), batch_size=8))
    assert torch.isfinite(_rows(module)).all()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("name", RULES)
def test_precisions_train(name: str, precision: Any) -> None:
    module = _module(weighting=RULES[name](), backend="vmap")
    first = _module()
    trainer(precision=precision, max_epochs=2).fit(module, loader(), loader(size=27))
    trainer().validate(first, loader(size=27), verbose=False)
    assert (module.objective_values.sum(dim=1) < first.objective_values.sum(dim=1)).all()


def _scaled(scale: float) -> tuple[GradientPopulationModule, torch.amp.GradScaler]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    module = _module(gradient_clip_norm=1.0)
    trainer(max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(module, loader())
    return module, scaler


def test_a_gradient_scaler_changes_nothing_but_rounding() -> None:
    torch.testing.assert_close(_rows(_scaled(2.0)[0]), _rows(_scaled(512.0)[0]), rtol=1e-2, atol=1e-3)


def test_an_overflow_of_scaled_gradients_skips_the_step() -> None:
    module, scaler = _scaled(2.0**120)
    assert torch.equal(_rows(module), _rows(_module()))
    assert scaler.get_scale() == 2.0**115  # lowered in each of 5 steps


# ------------------------------------------------------------------------------------------------ sick subproblems


@pytest.mark.parametrize("backend", ["vmap", "loop"])
@pytest.mark.parametrize("name", RULES)
def test_a_sick_subproblem_does_not_touch_the_others(name: str, backend: str) -> None:
    sick, well = (_module(weighting=RULES[name](), on_nonfinite="freeze", backend=backend) for _ in range(2))
    with pytest.warns(UserWarning, match=r"Not finite.*subproblem 1 with preference \(0\.333, 0\.667\)"):
        trainer(callbacks=[_Poison(1, 3)], max_epochs=2).fit(sick, loader())
    trainer(max_epochs=2).fit(well, loader())
    others = [0, 2, 3]
    torch.testing.assert_close(_rows(sick)[others], _rows(well)[others], rtol=1e-6, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_found_although_its_task_has_no_weight() -> None:
    class Root(nn.Module):
        """The square root has an infinite slope at zero, which makes a NaN of the zero that follows."""

        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            return (preds - preds.detach()).square().sum().sqrt() + target.abs().mean()

    module = _module(tasks=[Task("a", Root()), Task("b", nn.L1Loss())], on_nonfinite="freeze")
    before = _rows(module)
    with pytest.raises(FloatingPointError, match="gradients"):  # it hits every subproblem
        trainer().fit(module, loader())
    assert torch.equal(_rows(module), before)


def test_a_sick_subproblem_is_restarted_from_its_neighbor() -> None:
    module = _module(optimizer=ADAMW)
    with pytest.warns(UserWarning, match="Restarted from subproblem 2"):
        trainer(callbacks=[_Poison(3, 3)], max_epochs=2).fit(module, loader(), loader())
    assert torch.isfinite(module.objective_values).all()


def test_negative_losses_stop_exact_search_with_a_hint() -> None:
    class Negative(nn.Module):
        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            return preds.square().mean() - 1e3

    with pytest.raises(ValueError, match="losses that are not negative"):
        trainer().fit(_module(tasks=[Task("a", Negative()), Task("b", nn.L1Loss())]), loader())


# ---------------------------------------------------------------------------------------------------------- resuming


def _run_of_everything(folder: Path, rule: str, callbacks: Sequence[Callback] = ()) -> tuple[Any, Trainer]:
    seed_everything(7)
    module = _module(
        network=network(dropout=0.3),
        weighting=RULES[rule](),
        optimizer=ADAMW,
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
        lr_scheduler_interval="step",
        accumulate_batches=2,
        gradient_clip_norm=1.0,
    )
    return module, trainer(callbacks, max_epochs=2, default_root_dir=str(folder))


@pytest.mark.parametrize("rule", RULES)
def test_resumed_after_any_batch_equals_uninterrupted_bit_for_bit(rule: str, tmp_path: Path) -> None:
    save = SaveAfterEachBatch(tmp_path)
    module, run = _run_of_everything(tmp_path, rule, [save])
    run.fit(module, Position(), loader())
    expected, optimizer = module.state_dict(), run.optimizers[0].state_dict()["state"][0]
    for path in save.paths[:-1]:
        resumed, again = _run_of_everything(tmp_path, rule)
        seed_everything(99)  # a new process has another random state
        again.fit(resumed, Position(), loader(), ckpt_path=str(path))
        assert_equal_states(resumed.state_dict(), expected)
        assert_equal_states(again.optimizers[0].state_dict()["state"][0], optimizer)
        assert again.global_step == run.global_step


def test_gradients_of_a_checkpoint_are_saved_once_more_before_they_are_taken_up(tmp_path: Path) -> None:
    save = SaveAfterEachBatch(tmp_path)
    trainer([save]).fit(_module(accumulate_batches=2), Position())
    state = torch.load(save.paths[0], weights_only=True)["state_dict"]
    assert state["_extra_state"]["gradient"].shape[:2] == (4, 2)
    module = _module(accumulate_batches=2)
    module.load_state_dict(state)
    assert torch.equal(module.state_dict()["_extra_state"]["gradient"], state["_extra_state"]["gradient"])


def test_the_state_of_a_rule_is_in_checkpoints(tmp_path: Path) -> None:
    class Counting(EPO):
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def weights(self, gramian: Tensor, losses: Tensor, preferences: Tensor, step: int = 0) -> Tensor:
            assert self.steps == step
            self.steps += 1
            return super().weights(gramian, losses, preferences, step)

    module, run = _module(weighting=Counting()), trainer()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = _module(weighting=Counting())
    trainer(max_epochs=2).fit(again, loader(), ckpt_path=str(tmp_path / "run.ckpt"))
    assert again.state_dict()["weighting.steps"] == 10


# ------------------------------------------------------------------------------------------------------------- ranks


class _WriteRows(Callback):
    """Write what each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        values = pl_module.objective_values
        torch.save({"theta": _rows(pl_module), "values": values}, self.folder / f"rank-{trainer.global_rank}.pt")


def _in_two_ranks(
    module: Any, strategy: DDPStrategy, data: Any, folder: Path, callbacks: Sequence[Callback] = ()
) -> list[dict[str, Tensor]]:
    arguments: dict[str, Any] = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
    run = trainer([_WriteRows(folder), *callbacks], max_epochs=2, **arguments)
    run.fit(module, data, data)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


_FORK: dict[str, Any] = {
    "start_method": "fork",
    "process_group_backend": "gloo",
    "timeout": timedelta(seconds=60),
}


def _assert_ranks_equal_one(build: Callable[[], GradientPopulationModule], batches: list[Any], folder: Path) -> None:
    alone = build()
    trainer(max_epochs=2).fit(alone, Interleaved(batches), Interleaved(batches))
    ranks = _in_two_ranks(build(), DDPStrategy(**_FORK), Interleaved(batches), folder)
    assert torch.equal(ranks[0]["theta"], ranks[1]["theta"])
    torch.testing.assert_close(ranks[0]["theta"], _rows(alone), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ranks[0]["values"], alone.objective_values, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_with_half_batches_equal_one_process(rule: str, tmp_path: Path) -> None:
    build = partial(_module, weighting=RULES[rule](), gradient_clip_norm=0.5, accumulate_batches=2)
    _assert_ranks_equal_one(build, list(loader(batch_size=8)), tmp_path)


class _Masked(nn.Module):
    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        known = ~target.isnan()
        return torch.where(known, preds - target, 0.0).square().sum() / known.sum()


@pytest.mark.parametrize("rule", ["epo", "pareto_mtl"])
def test_two_ranks_equal_one_process_where_labels_are_missing_on_one(rule: str, tmp_path: Path) -> None:
    def build() -> GradientPopulationModule:
        return _module(tasks=[Task("a", _Masked()), Task("b", _Masked())], weighting=RULES[rule](), backend="vmap")

    batches = list(loader(batch_size=8))
    for index, (_, targets) in enumerate(batches):
        targets["b"][index % 2 :: 2] = torch.nan  # all of one rank's
        targets["b"][:3] = torch.nan  # and an unequal number of the other's
    batches[1][1]["a"][::2] = torch.nan  # one rank has no label at all
    for name in ("a", "b"):
        batches[2][1][name][:] = torch.nan  # nobody has a label
    _assert_ranks_equal_one(build, batches, tmp_path)


@pytest.mark.parametrize("rule", RULES)
def test_a_population_spread_over_two_ranks_equals_one_process(rule: str, tmp_path: Path) -> None:
    build = partial(_module, weighting=RULES[rule](), accumulate_batches=2, preferences=simplex_lattice(2, 2))
    alone = build()
    trainer(max_epochs=2).fit(alone, Position(), Position())
    ranks = _in_two_ranks(build(), PopulationParallelStrategy(**_FORK), Position(), tmp_path)
    for rank in ranks:
        torch.testing.assert_close(rank["values"], alone.objective_values, rtol=1e-6, atol=1e-6)


def test_gradients_accumulated_by_a_spread_population_are_taken_up_by_one_process(tmp_path: Path) -> None:
    build = partial(_module, weighting=ParetoMTL(0), accumulate_batches=2)
    module, save = build(), SaveAfterEachBatch(tmp_path)
    ranks = _in_two_ranks(module, PopulationParallelStrategy(**_FORK), Position(), tmp_path, [save])
    resumed = build()
    trainer(max_epochs=2).fit(resumed, Position(), Position(), ckpt_path=str(tmp_path / "batch-2.ckpt"))
    torch.testing.assert_close(resumed.objective_values, ranks[0]["values"], rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------- independent runs


@pytest.mark.parametrize("scalarization", [Linear(), SmoothChebyshev(mu=0.1)], ids=["linear", "chebyshev"])
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW], ids=["momentum", "adamw"])
@pytest.mark.parametrize("init", ["common", "independent"])
def test_a_population_without_transfer_is_so_many_scalarised_runs(
    init: Any, optimizer: Any, scalarization: Scalarization
) -> None:
    torch.manual_seed(5)
    module: MT2OModule = mt2o(transfer=NoTransfer(), scalarization=scalarization, optimizer=optimizer, init=init)
    starts = [module.subproblem(index) for index in range(4)]
    trainer(max_epochs=2).fit(module, loader())
    for index, preference in enumerate(module.preferences.tolist()):
        weighting = Scalarized(scalarization, preference)
        alone = WeightedModule(network=starts[index], tasks=tasks(), optimizer=optimizer, weighting=weighting)
        trainer(max_epochs=2).fit(alone, loader())
        torch.testing.assert_close(flat(module.subproblem(index)), flat(alone.network), rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------- contract, bad input


def test_callbacks_take_25_preferences(tmp_path: Path) -> None:
    module = _module(preferences=simplex_lattice(2, 24), weighting=ParetoMTL(), backend="vmap")
    front, curve = ParetoFrontCallback(dirpath=tmp_path), HypervolumeCallback((9.0, 9.0), dirpath=tmp_path)
    run = trainer([front, curve], max_epochs=2)
    run.fit(module, loader(), loader(size=27))
    assert module.objective_values.shape == (25, 2)
    assert 0 < run.callback_metrics["hypervolume"] < 81
    assert torch.equal(flat(module.select((0.3, 0.7))), flat(module.subproblem(7)))


def test_the_module_satisfies_the_protocol_of_the_callbacks() -> None:
    protocol: PopulationProtocol = _module()
    assert is_population(protocol)


@pytest.mark.parametrize(
    ("weighting", "found"),
    [
        (None, "an object of builtins.NoneType"),
        ("EPO", "an object of builtins.str"),
        (EPO, "the class mtl_lightning.exact_pareto.EPO"),
        (aggregation.MGDA(), "an object of mtl_lightning.aggregation.MGDA"),
    ],
    ids=["none", "string", "class", "aggregator"],
)
def test_what_is_no_rule_is_refused(weighting: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"`weighting` should be an object of GradientWeighting.*Found {found}"):
        _module(weighting=weighting)
