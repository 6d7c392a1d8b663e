"""What the modules that train a population share: strategies that are refused, and steps in mixed precision."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from mtl_lightning.mgda import MGDA
from mtl_lightning.modules import GradientPopulationModule, MT2OModule
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.transfer import AdvantageTransfer, TransferContext
from tests.distributed.ranks import ranked_trainer, run_ranks
from tests.modules.common import (
    Interleaved,
    Position,
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

SGD = partial(torch.optim.SGD, lr=0.05)


def _mgda(**arguments: Any) -> GradientPopulationModule:
    arguments.pop("transfer", None)
    defaults: dict[str, Any] = {"network": network(), "tasks": tasks(), "optimizer": SGD, "backend": "loop"}
    preferences = simplex_lattice(num_tasks=2, num_divisions=3)
    return GradientPopulationModule(preferences=preferences, weighting=MGDA(), init="common", **(defaults | arguments))


both = pytest.mark.parametrize("build", [mt2o, _mgda])


def batches() -> Position:
    return Position(list(loader()))


# ---------------------------------------------------------------------------------------------------- preferences


@both
@pytest.mark.parametrize("factor", [1e-300, 0.3, 1.0, 10.0, 1e307])
def test_multiples_of_a_preference_select_the_same_subproblem(build: Any, factor: float) -> None:
    module = build()
    with torch.no_grad():
        module.population.theta.add_(torch.arange(4.0).unsqueeze(1))  # each subproblem is known by its parameters
    for index, row in enumerate(module.preferences.tolist()):
        selected = module.select([factor * weight for weight in row])
        assert torch.equal(flat(selected), flat(module.subproblem(index)))


def test_integers_and_tensors_are_preferences_too() -> None:
    module = mt2o(preferences=simplex_lattice(num_tasks=2, num_divisions=10))
    with torch.no_grad():
        module.population.theta.add_(torch.arange(11.0).unsqueeze(1))
    for wanted, index in (((3, 7), 3), (torch.tensor([1, 1]), 5), ((0.5, 0.51), 5), (torch.tensor([4.0, 1.0]), 8)):
        assert torch.equal(flat(module.select(wanted)), flat(module.subproblem(index)))


@pytest.mark.parametrize(
    ("preference", "found"),
    [
        ((0.0, 0.0), r"weights of at least 0, not all of them 0. Found \[0.0, 0.0\]"),
        ((-0.1, 1.1), r"at least 0, .* Found \[-0.1, 1.1\]"),
        ((torch.nan, 1.0), r"finite .* Found \[nan, 1.0\]"),
        ((torch.inf, 1.0), r"finite .* Found \[inf, 1.0\]"),
        ((0.2, 0.3, 0.5), r"shape \(2,\), one weight per task. Found shape \(3,\)"),
        (0.5, r"shape \(2,\), .* Found shape \(\)"),
        ([[0.5, 0.5]], r"shape \(2,\), .* Found shape \(1, 2\)"),
    ],
    ids=str,
)
def test_what_is_no_direction_is_refused_by_the_name_of_the_argument(preference: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"^`preference` should .*{found}"):
        mt2o().select(preference)


# ----------------------------------------------------------------------------------------------------------- strategies


@both
def test_a_strategy_that_splits_rows_is_refused_before_it_is_set_up(build: Any) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    with pytest.raises(MisconfigurationException, match=r"PopulationParallelStrategy\(\)\)`\. Found ModelParallel"):
        trainer(strategy=strategy).fit(build(), batches())


# ------------------------------------------------------------------------------------------------------------ precision


def half(**arguments: Any) -> Any:
    """Return Lightning's plugin for float16 with a scaler, which it does not make on the CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **arguments))


def scaled(**arguments: Any) -> Any:
    """Return a plugin that scales gradients, where bfloat16 would not need it."""
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", **({"init_scale": 2.0**8} | arguments))
    return plugin


class Spoil(Callback):
    """Make the gradient of one subproblem overflow in some steps, just before they are taken."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.batches_seen in self.steps:
            pl_module.spoiled = True


class _Spoiled(MT2OModule):
    spoiled = False

    def reduce_gradients(self) -> None:
        super().reduce_gradients()
        if self.spoiled:
            assert self.population.theta.grad is not None
            self.population.theta.grad[2, 0] = torch.inf
            self.spoiled = False


def _spoiled(**arguments: Any) -> _Spoiled:
    defaults: dict[str, Any] = {"network": network(), "tasks": tasks(), "optimizer": SGD, "backend": "loop"}
    return _Spoiled(preferences=simplex_lattice(num_tasks=2, num_divisions=3), **(defaults | arguments))


@both
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"gradient_clip_norm": 0.1}, {"accumulate_batches": 2}], ids=str)
def test_scales_that_are_powers_of_two_change_nothing(build: Any, fused: bool, arguments: dict[str, Any]) -> None:
    plain, other = build(**arguments), build(optimizer=partial(SGD, fused=fused), **arguments)
    trainer(precision="bf16-mixed", max_epochs=2).fit(plain, batches())
    trainer(plugins=[scaled(growth_interval=2)], max_epochs=2).fit(other, batches())
    torch.testing.assert_close(rows(other), rows(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_overflow_are_skipped_counted_and_logged(fused: bool) -> None:
    module, plugin = _spoiled(optimizer=partial(torch.optim.Adam, lr=1e-2, fused=fused)), half(init_scale=16.0)
    run = trainer([Spoil([1, 3])], plugins=[plugin], log_every_n_steps=1)
    run.fit(module, batches())
    assert run.callback_metrics["skipped_steps"] == 2
    assert plugin.scaler.get_scale() == 4.0
    state = next(iter(run.optimizers[0].state.values()))
    assert state["step"] == 3  # of five
    assert rows(module).isfinite().all()
    assert run.global_step == 5


def test_runs_without_a_skip_log_none() -> None:
    run = trainer(plugins=[half(init_scale=16.0)], log_every_n_steps=1)
    run.fit(mt2o(), batches())
    assert "skipped_steps" not in run.callback_metrics


def test_a_run_with_a_scaler_is_resumed_exactly(tmp_path: Path) -> None:
    def make() -> _Spoiled:
        return _spoiled(network=network(dropout=0.3), optimizer=partial(torch.optim.AdamW, lr=1e-2))

    save, plugins = SaveAfterEachBatch(tmp_path), [half(init_scale=2.0**6, growth_interval=3) for _ in range(4)]
    module = make()
    torch.manual_seed(1)
    trainer([Spoil([1]), save], max_epochs=2, plugins=[plugins[0]]).fit(module, batches())
    for path, plugin in zip(save.paths[1:-1:3], plugins[1:], strict=True):
        resumed = make()
        trainer(max_epochs=2, plugins=[plugin]).fit(resumed, batches(), ckpt_path=str(path))
        assert_equal_states(resumed.state_dict(), module.state_dict(), ignored=("record",))
        assert plugin.scaler.state_dict() == plugins[0].scaler.state_dict()
        assert resumed.get_extra_state()["skipped_steps"] == 1


class _Seen(AdvantageTransfer):
    """Keeps what it decides from."""

    def received(self, context: TransferContext) -> Tensor:
        self.seen = context
        return super().received(context)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_decisions_are_made_in_single_precision(precision: Any) -> None:
    rule = _Seen()
    module = mt2o(transfer=rule)
    trainer(precision=precision).fit(module, batches(), batches())
    assert rule.seen.losses.dtype == rule.seen.preferences.dtype == torch.float32
    assert rule.seen.objectives.dtype == module.objective_values.dtype == torch.float32
    assert rows(module).isfinite().all()


class _Wide(nn.Module):
    """Has more weights of one than float16 can count."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = network()
        self.scale = nn.Parameter(torch.ones(70_000))

    def forward(self, inputs: Tensor) -> Any:
        return self.rest(inputs * self.scale.mean())


def test_a_row_whose_sum_overflows_in_half_precision_is_healthy() -> None:
    module = mt2o(network=_Wide(), on_nonfinite="raise", optimizer=partial(torch.optim.SGD, lr=1e-3))
    trainer(precision="16-true").fit(module, batches())
    assert rows(module).isfinite().all()


def test_means_over_ranks_do_not_overflow() -> None:
    """The mean of two large numbers of float16 is one of them."""

    class Same(MT2OModule):
        def on_train_start(self) -> None:
            super().on_train_start()
            large = torch.full((3,), 60_000.0, dtype=torch.float16)
            assert torch.equal(self.reduced(large.clone(), "mean"), large)
            assert torch.equal(self.reduced(torch.ones(2), "sum"), torch.full((2,), 2.0))

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    module = Same(network(), tasks(), simplex_lattice(num_tasks=2, num_divisions=3), SGD, backend="loop")
    run = trainer(devices=2, strategy=strategy, use_distributed_sampler=False)
    run.fit(module, Interleaved(list(loader())))


class _PickInValidation(Callback):
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.picked = pl_module.subproblem(1)


@both
def test_a_model_picked_in_a_validation_can_be_trained(build: Any) -> None:
    module, callback = build(), _PickInValidation()
    trainer([callback]).validate(module, batches(), verbose=False)
    inputs, targets = next(iter(batches()))
    (callback.picked(inputs)["a"] - targets["a"]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in callback.picked.encoder.parameters())
    trainer().fit(module, batches())


def _validate_constants() -> None:
    net = network()
    for name, dtype in (("single", torch.float32), ("coarse", torch.bfloat16)):
        net.register_buffer(name, torch.linspace(-3, 3, 1001).to(dtype))
    module = mt2o(network=net)
    before = {name: buffer.clone() for name, buffer in module.population.network.named_buffers()}
    ranked_trainer(world_size=3, use_distributed_sampler=False).validate(module, batches(), verbose=False)
    for name, buffer in module.population.network.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_buffers_that_are_equal_on_three_ranks_are_left_as_they_are(tmp_path: Path) -> None:
    run_ranks(_validate_constants, world_size=3, folder=tmp_path, limit=60)
