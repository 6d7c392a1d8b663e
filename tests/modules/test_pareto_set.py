from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError

from mtl_lightning import cli
from mtl_lightning.callbacks import HypervolumeCallback, ParetoFrontCallback
from mtl_lightning.callbacks.objectives import is_population
from mtl_lightning.conditioned import ConditionedNetwork
from mtl_lightning.cosmos import COSMOS
from mtl_lightning.exact_pareto import EPO, nonuniformity
from mtl_lightning.gradient_normalization import GradientNormalization
from mtl_lightning.gradient_weighting import GradientWeighting
from mtl_lightning.modules import ParetoSetModule
from mtl_lightning.networks import (
    MLP,
    MultiHeadNetwork,
    ParetoHypernetwork,
    ParetoManifold,
    PreferenceConcatenation,
)
from mtl_lightning.ordering import OrderingPenalty
from mtl_lightning.pareto import hypervolume
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.problems import VLMOP1, Fonseca, Problem
from mtl_lightning.protocols import PopulationProtocol
from mtl_lightning.scalarization import Chebyshev, Linear, SmoothChebyshev, TrackedIdeal
from mtl_lightning.task import Task
from tests.modules.common import Interleaved, Position, SaveAfterEachBatch, assert_equal_states, trainer

NAMES = ("a", "b", "c")
Batch = tuple[Tensor, dict[str, Tensor]]
SGD = partial(torch.optim.SGD, lr=0.02)
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


class Batches(list[Batch]):
    """A list that Lightning takes for one loader, where it takes a plain one for a collection of them."""


def batches(count: int = 4, size: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, len(NAMES), generator=generator)
    found = Batches()
    for _ in range(count):
        inputs = torch.randn(size, 6, generator=generator)
        values = inputs @ weights + 0.1 * torch.randn(size, len(NAMES), generator=generator)
        found.append((inputs, {name: values[:, [index]] for index, name in enumerate(NAMES)}))
    return found


def base(in_features: int = 6, noisy: bool = False) -> MultiHeadNetwork:
    encoder: nn.Module = MLP(in_features, [8])
    if noisy:
        encoder = nn.Sequential(encoder, nn.BatchNorm1d(8), nn.Dropout(0.3))
    return MultiHeadNetwork(encoder, {name: nn.Linear(8, 1) for name in NAMES})


def cosmos(noisy: bool = False) -> dict[str, Any]:
    return {"network": PreferenceConcatenation(base(6 + 3, noisy)), "objective": COSMOS(0.5), "concentration": 1.2}


def phn_linear(noisy: bool = False) -> dict[str, Any]:
    return {"network": ParetoHypernetwork(base(noisy=noisy), 3, hidden=12), "concentration": 0.2}


def phn_epo(noisy: bool = False) -> dict[str, Any]:
    return phn_linear(noisy) | {"objective": EPO()}


def pamal(noisy: bool = False) -> dict[str, Any]:
    network = ParetoManifold(base(noisy=noisy), 3)
    return {"network": network, "preferences_per_batch": 3, "penalty": OrderingPenalty(0.5)}


def pamal_balanced(noisy: bool = False) -> dict[str, Any]:
    return pamal(noisy) | {"objective": GradientNormalization()}


METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "COSMOS": cosmos,
    "PHN-LS": phn_linear,
    "PHN-EPO": phn_epo,
    "PaMaL": pamal,
    "PaMaL-balanced": pamal_balanced,
}
methods = pytest.mark.parametrize("name", METHODS)


class Masked(nn.Module):
    """The mean of squared errors over known labels."""

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        known = ~target.isnan()
        return torch.where(known, preds - target, 0.0).square().sum() / known.sum()


def tasks() -> list[Task]:
    return [Task(name, Masked(), MeanAbsoluteError() if name == "b" else None) for name in NAMES]


class Recorded(ParetoSetModule):
    """Remembers the preferences that it has drawn, or draws those that it is given."""

    def __init__(self, given: Tensor | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.given = given
        self.drawn: list[Tensor] = []

    def draw_preferences(self) -> Tensor:
        self.drawn.append(super().draw_preferences() if self.given is None else self.given)
        return self.drawn[-1]


def pareto_set(name: str = "PHN-LS", noisy: bool = False, given: Tensor | None = None, **arguments: Any) -> Recorded:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "tasks": tasks(),
        "preferences": simplex_lattice(num_tasks=3, num_divisions=2),
        "optimizer": SGD,
    }
    return Recorded(given, **(defaults | METHODS[name](noisy) | arguments))


def fit(module: ParetoSetModule, data: Any, **arguments: Any) -> Trainer:
    run = trainer(**arguments)
    torch.manual_seed(5)  # what a run draws depends on it
    run.fit(module, data)
    return run


def flat(module: ParetoSetModule) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.network.parameters()])


def _losses(predictions: Mapping[str, Tensor], batch: Batch) -> Tensor:
    return torch.stack([Masked()(predictions[name], batch[1][name]) for name in NAMES])


# --------------------------------------------------------------------------------------------------- known fronts


class _Solver(nn.Module):
    """Maps its inputs to a point, and predicts the objectives there."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem.requires_grad_(False)
        self.point = MLP(1 + 2, (32, 32), problem.x.numel())

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        values = self.problem.objectives(self.point(inputs))
        return {name: values[:, index] for index, name in enumerate(self.problem.task_names)}


def _solve(problem: Problem, network: ConditionedNetwork, steps: int, lr: float, **arguments: Any) -> ParetoSetModule:
    data = [(torch.zeros(1, 1), {name: torch.zeros(1) for name in problem.task_names})] * steps
    module = ParetoSetModule(
        network=network,
        tasks=problem.tasks(),
        preferences=simplex_lattice(num_tasks=2, num_divisions=12)[1:-1],
        optimizer=partial(torch.optim.Adam, lr=lr),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        lr_scheduler_interval="step",
        **arguments,
    )
    run = trainer(limit_val_batches=1)
    run.fit(module, DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None))  # type: ignore[arg-type]
    return module


def test_a_manifold_finds_the_front_of_vlmop1_exactly() -> None:
    # The optimum of the weighted sum is x = 2 w_2: linear in the preference, so that a manifold can hold it.
    problem = VLMOP1(3)
    module = _solve(problem, ParetoManifold(problem, 2), steps=300, lr=0.1, preferences_per_batch=2)
    assert isinstance(module.network, ParetoManifold)
    ends = module.network.ends[0].detach()
    torch.testing.assert_close(ends, torch.tensor([[0.0] * 3, [2.0] * 3]), rtol=0, atol=1e-3)
    expected = problem.linear_front(module.preferences)
    torch.testing.assert_close(module.objective_values, expected, rtol=0, atol=1e-3)


def test_a_hypernetwork_finds_the_front_of_vlmop1() -> None:
    problem = VLMOP1(3)
    module = _solve(problem, ParetoHypernetwork(problem, 2, hidden=32), steps=400, lr=1e-2)
    expected = problem.linear_front(module.preferences)
    torch.testing.assert_close(module.objective_values, expected, rtol=0, atol=0.2)  # of 4


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_cosmos_finds_the_optimum_of_its_objective_for_every_preference(penalty: float) -> None:
    problem, objective = VLMOP1(1), COSMOS(penalty)
    module = _solve(problem, PreferenceConcatenation(_Solver(problem)), steps=500, lr=1e-2, objective=objective)
    grid = problem.objectives(torch.linspace(-1, 3, 4001)[:, None])
    least = torch.stack([objective(grid, preference).min() for preference in module.preferences])
    found = objective(module.objective_values, module.preferences)
    torch.testing.assert_close(found, least, rtol=0, atol=0.04)


def test_a_hypernetwork_with_epo_follows_the_rays_on_a_concave_front() -> None:
    problem = Fonseca(4)
    module = _solve(problem, ParetoHypernetwork(problem, 2, hidden=32), steps=500, lr=1e-2, objective=EPO())
    expected = problem.chebyshev_front(module.preferences)  # there w_1 f_1 = w_2 f_2
    torch.testing.assert_close(module.objective_values, expected, rtol=0, atol=0.05)
    assert (nonuniformity(module.objective_values, module.preferences) < 5e-3).all()


def test_the_weighted_sum_leaves_out_the_middle_of_a_concave_front() -> None:
    problem = Fonseca(4)
    linear = _solve(problem, ParetoHypernetwork(problem, 2, hidden=32), steps=300, lr=1e-2)
    smooth = _solve(
        problem, ParetoHypernetwork(problem, 2, hidden=32), steps=300, lr=1e-2, objective=SmoothChebyshev(0.01)
    )
    volumes = [hypervolume(module.objective_values, problem.reference_point) for module in (linear, smooth)]
    assert volumes[0] < 0.26 < 0.28 < volumes[1] <= problem.hypervolume


# ------------------------------------------------------------------------------------------ against a plain loop


def _reference_run(module: ParetoSetModule, drawn: Sequence[Tensor], data: Sequence[Batch]) -> Tensor:
    """One process, whole batches, one optimiser, and the objectives differentiated as they are."""
    network: Any = copy.deepcopy(module.network)
    parameters = list(network.parameters())
    stepper = torch.optim.SGD(parameters, lr=0.02)
    for preferences, batch in zip(drawn, data, strict=True):
        losses = torch.stack([_losses(network(batch[0], preference), batch) for preference in preferences])
        if isinstance(module.objective, Linear | COSMOS):
            objectives = [module.objective(*pair) for pair in zip(losses, preferences, strict=True)]
        else:
            objectives = []
            for row, preference in zip(losses, preferences, strict=True):
                full = torch.zeros(len(row), sum(p.numel() for p in parameters))
                for index, loss in enumerate(row):
                    own = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                    full[index] = torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g).flatten()
                            for g, p in zip(own, parameters, strict=True)
                        ]
                    )
                assert isinstance(module.objective, GradientWeighting)
                weights = module.objective.weights(full @ full.T, row.detach(), preference)
                objectives.append((weights * row).sum())
        total = torch.stack(objectives).mean()
        if module.penalty is not None:
            total = total + module.penalty(losses, preferences)
        stepper.zero_grad()
        torch.autograd.backward([total])
        stepper.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@methods
def test_a_run_equals_a_plain_loop(name: str) -> None:
    module = pareto_set(name)
    start = copy.deepcopy(module)
    run = trainer(max_epochs=2)
    run.fit(module, batches())
    expected = _reference_run(start, module.drawn, [*batches(), *batches()])
    torch.testing.assert_close(flat(module), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(flat(module), flat(start), atol=1e-3)
    assert run.global_step == 8


def test_preferences_are_drawn_anew_for_every_batch_and_from_the_seed_of_the_run() -> None:
    found = []
    for seed in (1, 1, 2):
        module = pareto_set("PaMaL")
        seed_everything(seed)
        trainer().fit(module, batches())
        found.append(torch.stack(module.drawn))
    assert torch.equal(found[0], found[1])
    assert not (found[0] == found[2]).any()
    assert len({tuple(row) for row in found[0].flatten(0, 1).tolist()}) == 12
    assert found[0].shape == (4, 3, 3)


def test_preferences_are_of_the_dirichlet_distribution() -> None:
    module = pareto_set(concentration=0.2, preferences_per_batch=4000)
    module._seed = 3
    drawn = module.draw_preferences()
    torch.testing.assert_close(drawn.sum(dim=1), torch.ones(4000))
    torch.testing.assert_close(drawn.mean(dim=0), torch.full((3,), 1 / 3), rtol=0, atol=0.02)
    variance = (1 / 3) * (2 / 3) / (3 * 0.2 + 1)  # of a symmetric Dirichlet distribution
    torch.testing.assert_close(drawn.var(dim=0), torch.full((3,), variance), rtol=0.06, atol=0)


def test_the_penalty_acts_on_several_preferences_and_is_refused_with_one() -> None:
    together = [pareto_set("PaMaL", penalty=penalty) for penalty in (None, OrderingPenalty(9.0))]
    for module in together:
        fit(module, batches())
    assert not torch.allclose(flat(together[0]), flat(together[1]))
    with pytest.raises(ValueError, match=r"`preferences_per_batch` should be at least 2\. Found 1"):
        pareto_set("PaMaL", preferences_per_batch=1, penalty=OrderingPenalty(9.0))


def test_a_penalty_that_is_not_a_number_is_refused() -> None:
    class PerPreference(nn.Module):
        def forward(self, losses: Tensor, preferences: Tensor) -> Tensor:
            return (losses * preferences).sum(dim=1)

    with pytest.raises(ValueError, match=r"`penalty` should return a number, shape \(\). Found shape \(3,\)"):
        trainer().fit(pareto_set("PaMaL", penalty=PerPreference()), batches())


def test_the_objective_observes_the_losses_of_every_step() -> None:
    objective = Chebyshev(ideal=TrackedIdeal(3))
    trainer().fit(pareto_set(objective=objective), batches())
    assert isinstance(objective.ideal, TrackedIdeal)
    assert (objective.ideal() > 0).all()


# ---------------------------------------------------------------------------------------- what users and callbacks read


@methods
def test_validation_is_that_of_the_models_at_the_preferences(name: str) -> None:
    module = pareto_set(name)
    found = trainer().validate(module, batches(3), verbose=False)[0]
    expected = []
    for index in range(6):
        member = module.subproblem(index).eval()
        expected.append(torch.stack([_losses(member(batch[0]), batch) for batch in batches(3)]).mean(dim=0))
    torch.testing.assert_close(module.objective_values, torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)
    means = torch.stack(expected).mean(dim=0)
    assert [found[f"val_loss/{name}"] for name in NAMES] == pytest.approx(means.tolist(), rel=1e-5)
    assert list(module.metric_values) == ["mean_absolute_error/b"]
    inputs, targets = (torch.cat([batch[0] for batch in batches(3)]), [batch[1]["b"] for batch in batches(3)])
    error = (module.subproblem(2)(inputs)["b"] - torch.cat(targets)).abs().mean()
    assert float(module.metric_values["mean_absolute_error/b"][2]) == pytest.approx(float(error.detach()), rel=1e-5)


@methods
def test_predictions_are_those_of_the_selected_models(name: str) -> None:
    module, inputs = pareto_set(name).eval(), torch.randn(5, 6)
    outputs = module(inputs)
    assert {task: tuple(output.shape) for task, output in outputs.items()} == dict.fromkeys(NAMES, (6, 5, 1))
    for index in range(6):
        member = module.subproblem(index)
        torch.testing.assert_close(member(inputs)["c"], outputs["c"][index])
    wanted = (0.17, 0.21, 0.62)  # none of the validated ones
    expected = module.network(inputs, torch.tensor(wanted))
    torch.testing.assert_close(module.select(wanted)(inputs)["a"], expected["a"])


@pytest.mark.parametrize("name", ["PHN-LS", "PaMaL"])
def test_a_selected_model_is_a_plain_network(name: str) -> None:
    module = pareto_set(name)
    trainer().fit(module, batches())
    member = module.select((0.2, 0.3, 0.5))
    assert type(member) is MultiHeadNetwork
    fresh = base()
    fresh.load_state_dict(member.state_dict())
    before = flat(module)
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.zero_()
    assert torch.equal(flat(module), before)


@methods
def test_a_model_selected_in_a_validation_can_be_trained(name: str) -> None:
    module = pareto_set(name)
    with torch.inference_mode():
        member = module.select((0.2, 0.3, 0.5))
    member(torch.randn(4, 6))["a"].sum().backward()
    assert any(parameter.grad is not None for parameter in member.parameters())


def test_multiples_of_a_preference_are_the_same() -> None:
    module, inputs = pareto_set(), torch.randn(4, 6)
    expected = module.select((0.2, 0.3, 0.5))(inputs)
    for name, outputs in module.select((4, 6, 10))(inputs).items():
        torch.testing.assert_close(outputs, expected[name])


@pytest.mark.parametrize("preference", [(0.2, 0.3), (0.0, 0.0, 0.0), (-0.2, 0.6, 0.6)])
def test_what_is_no_preference_is_refused(preference: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="`preference`"):
        pareto_set().select(preference)


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises(IndexError, match=r"`index` should lie in \[0, 6\). Found 6"):
        pareto_set().subproblem(6)


def test_there_are_no_values_before_a_validation() -> None:
    with pytest.raises(RuntimeError, match="known after a validation"):
        _ = pareto_set().objective_values


@methods
def test_the_callbacks_of_a_population_attach(name: str, tmp_path: Path) -> None:
    module: PopulationProtocol = pareto_set(name)
    assert is_population(module)
    volume = HypervolumeCallback(reference_point=(30.0, 30.0, 30.0), dirpath=tmp_path / "volume")
    front = ParetoFrontCallback(dirpath=tmp_path / "front")
    run = trainer([volume, front], max_epochs=2)
    run.fit(module, batches(), batches(2))  # type: ignore[arg-type]
    expected = hypervolume(module.objective_values, (30.0, 30.0, 30.0))
    assert float(run.callback_metrics["hypervolume"]) == pytest.approx(expected)
    assert expected > 0
    rows = (tmp_path / "front" / "archive.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 6


def test_a_test_logs_every_preference() -> None:
    module = pareto_set()
    found = trainer().test(module, batches(2), verbose=False)[0]
    for index in range(6):
        for task, name in enumerate(NAMES):
            assert found[f"test_loss/{name}/{index}"] == pytest.approx(float(module.objective_values[index, task]))
        assert f"test_mean_absolute_error/b/{index}" in found
    assert found["test_loss"] == pytest.approx(float(module.objective_values.mean()), rel=1e-5)


def test_prediction_takes_inputs_with_or_without_targets() -> None:
    module, run = pareto_set(), trainer()
    with_targets: Any = run.predict(module, batches(1))
    without: Any = run.predict(module, DataLoader(batches(1)[0][0], batch_size=8))  # type: ignore[arg-type]
    assert torch.equal(with_targets[0]["a"], without[0]["a"])
    assert with_targets[0]["a"].shape == (6, 8, 1)


class _Counting(ParetoHypernetwork):
    """Counts how often it generates parameters."""

    calls = 0

    def condition(self, preference: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return super().condition(preference)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_parameters_are_generated_once_for_each_preference_however_many_batches(command: str) -> None:
    network = _Counting(base(), 3)
    module = pareto_set(network=network)
    getattr(trainer(), command)(module, batches(5))
    assert network.calls == 6


def test_predictions_after_a_prediction_follow_the_parameters() -> None:
    module = pareto_set().eval()
    trainer().predict(module, batches(1))
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.zero_()
    assert not module(batches(1)[0][0])["a"].any()


def test_the_losses_of_a_batch_are_those_at_the_centre() -> None:
    module, batch = pareto_set(), batches(1)[0]
    expected = _losses(module.select((1 / 3, 1 / 3, 1 / 3))(batch[0]), batch)
    found = module.batch_losses(batch)
    torch.testing.assert_close(torch.stack(list(found.values())), expected)
    torch.autograd.backward(list(found.values()))
    assert any(parameter.grad is not None for parameter in module.network.parameters())


def test_training_logs_means_over_preferences() -> None:
    module, data = pareto_set("PaMaL"), batches(1)
    network = copy.deepcopy(module.network)
    run = trainer(log_every_n_steps=1)
    run.fit(module, data)
    losses = torch.stack([_losses(network(data[0][0], drawn), data[0]) for drawn in module.drawn[0]]).mean(dim=0)
    for name, loss in zip(NAMES, losses.tolist(), strict=True):
        assert float(run.callback_metrics[f"train_loss/{name}"]) == pytest.approx(loss, rel=1e-5)
    assert float(run.callback_metrics["train_loss"]) == pytest.approx(float(losses.mean().detach()), rel=1e-5)


# ------------------------------------------------------------------------------------------------ optimiser, schedule


def test_the_gradient_is_clipped() -> None:
    module = pareto_set(optimizer=partial(torch.optim.SGD, lr=1.0), gradient_clip_norm=1e-3)
    before = flat(module)
    trainer(limit_train_batches=1).fit(module, batches())
    assert float((flat(module) - before).norm()) == pytest.approx(1e-3, rel=1e-3)


@methods
def test_accumulated_gradients_are_the_mean_of_those_of_the_batches(name: str) -> None:
    given = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [0.3, 0.3, 0.4]])
    results = []
    for accumulate, data in ((3, batches(3)), (1, batches(3))):
        steps = []
        for batch in [data] if accumulate == 3 else [Batches([one]) for one in data]:
            module = pareto_set(name, given=given, accumulate_batches=accumulate)
            before = flat(module)
            trainer().fit(module, batch)
            steps.append(flat(module) - before)
        results.append(torch.stack(steps).mean(dim=0))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("interval", "expected"), [("epoch", 0.5**2), ("step", 0.5**4)])
def test_schedulers_go_by_epoch_or_by_step(interval: str, expected: float) -> None:
    module = pareto_set(
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        lr_scheduler_interval=interval,
        accumulate_batches=2,
    )
    run = trainer(max_epochs=2)
    run.fit(module, batches())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * expected)
    assert run.global_step == 4


def test_learned_parameters_of_a_loss_are_trained() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            return (self.scale * preds - target).square().mean()

    loss = Scaled()
    trainer().fit(pareto_set("PHN-EPO", tasks=[Task("a", loss), *tasks()[1:]]), batches())
    assert loss.scale != 1.0


# ------------------------------------------------------------------------------------------------------ missing, sick


@methods
def test_a_task_without_labels_takes_no_part(name: str) -> None:
    data = batches(3)
    for _, targets in data:
        targets["b"][:] = torch.nan
    module = pareto_set(name)
    head, trunk = ([p.detach().clone() for p in _making(module, part)] for part in ("heads.b", "encoder"))
    trainer(max_epochs=2).fit(module, data)
    assert head
    assert all(torch.equal(*pair) for pair in zip(head, _making(module, "heads.b"), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(trunk, _making(module, "encoder"), strict=True))
    assert flat(module).isfinite().all()


def _making(module: ParetoSetModule, part: str) -> list[nn.Parameter]:
    """Return the parameters that make those of a part of the network."""
    network = module.network
    if isinstance(network, ParetoHypernetwork):
        pairs = zip(network.names, network.generators, strict=True)
        return [p for name, generator in pairs if part in name for p in generator.parameters()]
    if isinstance(network, ParetoManifold):
        return [ends for name, ends in zip(network.names, network.ends, strict=True) if part in name]
    return [p for name, p in network.named_parameters() if part in name]


@methods
def test_a_batch_with_labels_of_one_task_trains_it(name: str) -> None:
    data = batches(1)
    for other in ("b", "c"):
        data[0][1][other][:] = torch.nan
    module = pareto_set(name, given=torch.tensor([[0.4, 0.3, 0.3]]))  # a drawn one may leave it next to nothing
    head = [p.detach().clone() for p in _making(module, "heads.a")]
    trainer().fit(module, data)
    assert not any(torch.equal(*pair) for pair in zip(head, _making(module, "heads.a"), strict=True))
    assert flat(module).isfinite().all()


@methods
@pytest.mark.filterwarnings("ignore:The loss of task")
def test_a_sick_task_is_left_out_as_if_it_had_no_labels(name: str) -> None:
    found, expected = (pareto_set(name) for _ in range(2))
    for module, value in ((found, torch.inf), (expected, torch.nan)):
        data = batches(3)
        for place in (0, 2):
            data[place][1]["b"][:] = value
        fit(module, data, max_epochs=2)
    torch.testing.assert_close(flat(found), flat(expected))
    assert found.health.total.tolist() == [0, 4, 0]


def test_a_task_that_stays_sick_stops_the_run() -> None:
    data = batches(5)
    for _, targets in data:
        targets["b"][:] = torch.inf
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(FloatingPointError, match=r"task 'b' should be finite. Found 3 in a row"),
    ):
        trainer().fit(pareto_set(max_nonfinite=3), data)


def test_batches_without_any_label_are_passed_over() -> None:
    data = batches(3)
    for name in NAMES:
        data[1][1][name][:] = torch.nan
    module, run = pareto_set(), trainer()
    run.fit(module, data)
    assert (run.global_step, module.batches_seen) == (2, 3)
    assert module.batch_losses(data[1]) == {}


def test_a_validation_without_labels_of_a_task_has_no_value_for_it() -> None:
    data = batches(2)
    for _, targets in data:
        targets["b"][:] = torch.nan
    module = pareto_set(tasks=[Task(name, Masked()) for name in NAMES])
    trainer().validate(module, data, verbose=False)
    assert module.objective_values[:, 1].isnan().all()
    assert module.objective_values[:, [0, 2]].isfinite().all()


# --------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@methods
def test_precisions_train(name: str, precision: Any) -> None:
    module = pareto_set(name, noisy=True, optimizer=ADAMW)
    trainer(max_epochs=2, precision=precision).fit(module, batches(2), batches(1))
    assert flat(module).isfinite().all()
    assert module.objective_values.isfinite().all()


def test_half_precision_does_not_round_the_drawn_preferences() -> None:
    found, expected = pareto_set("PaMaL"), pareto_set("PaMaL")
    fit(found, batches(2), precision="bf16-true")
    fit(expected, batches(2))
    assert torch.equal(torch.stack(found.drawn), torch.stack(expected.drawn))


class _Prediction(nn.Module):
    """The prediction itself."""

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        return preds - target


class _Plane(ConditionedNetwork):
    """Predictions whose gradients are the rows of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(2))

    def predict(self, inputs: Tensor, condition: Tensor) -> dict[str, Tensor]:
        return dict(zip(NAMES, inputs @ self.point, strict=True))


class _Seen(GradientWeighting):
    """Keeps what it is asked about."""

    def weights(self, gramian: Tensor, losses: Tensor, preferences: Tensor, step: int = 0) -> Tensor:
        self.gramian = gramian
        return preferences


def test_a_rule_sees_products_of_gradients_in_double_precision() -> None:
    rows = torch.tensor([[4097.0, 1.0], [4097.0, -1.0], [1.0, 4097.0]])  # of which squares do not fit float32
    data = Batches([(rows, {name: torch.zeros(()) for name in NAMES})])
    rule = _Seen()
    plain = [Task(name, _Prediction()) for name in NAMES]
    fit(pareto_set(network=_Plane(), objective=rule, tasks=plain), data)
    assert torch.equal(rule.gramian[0], rows.double() @ rows.double().T)


@pytest.mark.parametrize("name", ["PHN-EPO", "PaMaL-balanced"])
def test_a_gradient_scaler_changes_nothing(name: str) -> None:
    found, expected = (pareto_set(name) for _ in range(2))
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fit(found, batches(), plugins=[plugin])
    fit(expected, batches(), precision="bf16-mixed")
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-2, atol=1e-3)


def test_a_step_that_overflows_is_skipped() -> None:
    module = pareto_set("PHN-EPO")
    before = flat(module)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**127))
    trainer(limit_train_batches=1, plugins=[plugin]).fit(module, batches())
    assert torch.equal(flat(module), before)


# ---------------------------------------------------------------------------------------------------------- resuming


def _run_of_everything(name: str, folder: Path, callbacks: Sequence[Callback], **arguments: Any) -> Any:
    seed_everything(7)
    module = pareto_set(
        name,
        noisy=True,
        optimizer=ADAMW,
        gradient_clip_norm=1.0,
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
        lr_scheduler_interval="step",
        **arguments,
    )
    return module, trainer(callbacks, max_epochs=2, default_root_dir=str(folder))


@pytest.mark.filterwarnings("ignore:The loss of task")
@methods
def test_resumed_after_any_batch_equals_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    data = batches(3)
    data[1][1]["b"][:] = torch.inf
    save = SaveAfterEachBatch(tmp_path)
    module, run = _run_of_everything(name, tmp_path, [save], accumulate_batches=2)
    run.fit(module, Position(data), data)
    for path in save.paths[:-1]:
        resumed, again = _run_of_everything(name, tmp_path, [], accumulate_batches=2)
        seed_everything(99)  # a new process has another random state
        again.fit(resumed, Position(data), data, ckpt_path=str(path))
        assert_equal_states(_known(resumed.state_dict()), _known(module.state_dict()))
        assert_equal_states(again.optimizers[0].state_dict(), run.optimizers[0].state_dict())
        assert again.global_step == run.global_step


def test_a_checkpoint_can_be_loaded_for_other_preferences() -> None:
    source, same, other = pareto_set(), pareto_set(), pareto_set(preferences=simplex_lattice(3, 4))
    trainer().validate(source, batches(2), verbose=False)
    trainer().validate(other, batches(1), verbose=False)
    for module in (same, other):
        module.load_state_dict(source.state_dict())
    assert torch.equal(same.objective_values, source.objective_values)
    assert list(same.metric_values) == ["mean_absolute_error/b"]
    assert not other.metric_values  # they would be those of other models
    with pytest.raises(RuntimeError, match="known after a validation"):
        _ = other.objective_values
    trainer().validate(other, batches(2), verbose=False)
    assert other.objective_values.shape == (15, 3)


def _known(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.nan_to_num(-1.0)
    return {key: _known(value) for key, value in state.items()} if isinstance(state, Mapping) else state


# -------------------------------------------------------------------------------------------------------------- ranks


class _Write(Callback):
    """Write what each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        result = {"parameters": flat(pl_module), "values": pl_module.objective_values}
        torch.save(result, self.folder / f"rank-{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:The loss of task")
@methods
def test_two_ranks_equal_one_process_where_labels_are_missing_or_sick_on_one(name: str, tmp_path: Path) -> None:
    data = batches(5)  # the last one is whole
    for index, (_, targets) in enumerate(data[:4]):
        targets["b"][index % 2 :: 2] = torch.nan  # all of one rank's
        targets["c"][:3] = torch.nan  # an unequal number
    data[3][1]["a"][0] = torch.inf  # one rank's loss is not finite
    for target in data[2][1].values():
        target[1::2] = torch.nan  # one rank has no labels at all
    plain = [Task(name, Masked()) for name in NAMES]
    module = pareto_set(name, tasks=plain, accumulate_batches=2, gradient_clip_norm=0.5)
    twin = copy.deepcopy(module)
    (tmp_path / "alone").mkdir()
    seed_everything(5)
    trainer([_Write(tmp_path / "alone")], max_epochs=2).fit(module, Interleaved(data), Interleaved(data[4:]))
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    seed_everything(5)
    run = trainer([_Write(tmp_path)], max_epochs=2, devices=2, strategy=strategy, use_distributed_sampler=False)
    run.fit(twin, Interleaved(data), Interleaved(data[4:]))
    alone = torch.load(tmp_path / "alone" / "rank-0.pt", weights_only=True)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    for key, expected in alone.items():
        assert torch.equal(ranks[0][key], ranks[1][key])
        torch.testing.assert_close(ranks[0][key], expected, rtol=1e-4, atol=1e-5)


def test_sharding_is_refused() -> None:
    class Sharded(Recorded):
        shards_network = True

    module = Sharded(tasks=tasks(), preferences=[[1.0, 0.0, 0.0]], optimizer=SGD, **phn_linear())
    with pytest.raises(MisconfigurationException, match="one device or with DDP"):
        trainer().fit(module, batches())


# --------------------------------------------------------------------------------------------------------- command line


CONFIG = Path(__file__).parents[2] / "configs" / "pareto_set_multi_digits.yaml"


def _written(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": kind, "init_args": arguments}


def _digits(in_features: int) -> dict[str, Any]:
    head = _written("torch.nn.Linear", in_features=8, out_features=10)
    encoder = _written("mtl_lightning.networks.MLP", in_features=in_features, hidden_features=[8])
    return _written("mtl_lightning.networks.MultiHeadNetwork", encoder=encoder, heads={"left": head, "right": head})


UPSAMPLING = _written("mtl_lightning.networks.PreferenceUpsampling", num_tasks=2, image_size=[10, 10])
MANIFOLD = _written("mtl_lightning.networks.ParetoManifold", network=_digits(100), num_tasks=2)
WRITTEN: dict[str, dict[str, Any]] = {
    "COSMOS": {
        "network": _written(
            "mtl_lightning.networks.PreferenceConcatenation", network=_digits(300), embedding=UPSAMPLING
        ),
        "objective": _written("mtl_lightning.cosmos.COSMOS", penalty=8.0),
        "concentration": 1.2,
    },
    "PHN-LS": {},  # as it is shipped
    "PHN-EPO": {"objective": _written("mtl_lightning.exact_pareto.EPO", floor=0.02)},
    "PaMaL": {
        "network": MANIFOLD,
        "preferences_per_batch": 2,
        "penalty": _written("mtl_lightning.ordering.OrderingPenalty", strength=0.5),
    },
    "PaMaL-balanced": {
        "network": MANIFOLD,
        "objective": "mtl_lightning.gradient_normalization.GradientNormalization",
    },
}
KINDS = {
    "COSMOS": (PreferenceConcatenation, COSMOS),
    "PHN-LS": (ParetoHypernetwork, Linear),
    "PHN-EPO": (ParetoHypernetwork, EPO),
    "PaMaL": (ParetoManifold, Linear),
    "PaMaL-balanced": (ParetoManifold, GradientNormalization),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_command_line_trains_what_a_configuration_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["model"]["init_args"] |= WRITTEN[name]
    config["data"]["init_args"] |= {"num_train": 256, "num_val": 128}
    config["trainer"] |= {"fast_dev_run": True, "accelerator": "cpu", "enable_progress_bar": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    module = cli.run(["fit", "--config=config.yaml"]).model
    assert isinstance(module, ParetoSetModule)
    network, objective = KINDS[name]
    assert type(module.network) is network
    assert type(module.objective) is objective
    assert isinstance(module.penalty, OrderingPenalty) == (name == "PaMaL")
    assert module.objective_values.shape == (25, 2)
    assert module.objective_values.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tasks": tasks()[:1]}, "at least 2 tasks"),
        ({"preferences": [[0.5, 0.5]]}, r"shape \(P, 3\)"),
        ({"preferences": [[0.5, 0.5, 0.5]]}, "sum to one"),
        ({"objective": Chebyshev(ideal=(0.0, 0.0))}, "one column per entry of `ideal`"),
        ({"concentration": 0.0}, "`concentration` should be positive"),
        ({"preferences_per_batch": 0}, "`preferences_per_batch` should be at least 1"),
        ({"max_nonfinite": 0}, "`max_nonfinite` should be at least 1"),
    ],
    ids=str,
)
def test_constructor_refuses(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pareto_set(**arguments)


@pytest.mark.parametrize(
    ("argument", "value"), [("network", base()), ("objective", "linear"), ("penalty", 2.0), ("optimizer", None)]
)
def test_constructor_refuses_kinds(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"`{argument}` should"):
        pareto_set(**{argument: value})


def test_gradients_of_a_checkpoint_are_saved_once_more_before_they_are_taken_up(tmp_path: Path) -> None:
    save = SaveAfterEachBatch(tmp_path)
    trainer([save]).fit(pareto_set(accumulate_batches=2), batches())
    state = torch.load(save.paths[0], weights_only=True)["state_dict"]
    assert state["_extra_state"]["gradients"]
    module = pareto_set(accumulate_batches=2)
    module.load_state_dict(state)
    found = module.get_extra_state()["gradients"]
    assert found.keys() == state["_extra_state"]["gradients"].keys()
    assert all(torch.equal(found[index], gradient) for index, gradient in state["_extra_state"]["gradients"].items())
