"""Mixed and half precision: what is scaled, what is skipped, and what is decided in which precision."""

from __future__ import annotations

from collections.abc import Sequence
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

from mtl_lightning.adaptive_weighting import FAMO
from mtl_lightning.fisher import root_fisher_gramian
from mtl_lightning.grouping import Fisher, OneByOne, Threshold
from mtl_lightning.modules import TaskGroupModule, WeightedModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.task import Task
from mtl_lightning.weighting import Uncertainty
from tests.modules.common import Interleaved, Position, SaveAfterEachBatch, assert_equal_states, trainer

NAMES = ("a", "b", "c")
Batch = tuple[Tensor, dict[str, Tensor]]
KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "groups": (TaskGroupModule, {"grouping": Threshold(0.0), "warmup_batches": 2, "measure_last": True}),
    "single": (TaskGroupModule, {"grouping": OneByOne(), "shuffle": False, "inactive_heads": "zero_grad"}),
    "learned": (WeightedModule, {"weighting": Uncertainty()}),
    "after": (WeightedModule, {"weighting": FAMO(lr=0.2)}),
}
kinds = pytest.mark.parametrize("name", KINDS)


class Batches(list[Batch]):
    """A list that Lightning takes for one loader."""


def batches(count: int = 6, size: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, len(NAMES), generator=generator)
    found = Batches()
    for _ in range(count):
        inputs = torch.randn(size, 6, generator=generator)
        values = inputs @ weights + 0.1 * torch.randn(size, len(NAMES), generator=generator)
        found.append((inputs, {name: values[:, [index]] for index, name in enumerate(NAMES)}))
    return found


def network(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    encoder = nn.Sequential(MLP(6, [8]), nn.Dropout(dropout))
    return MultiHeadNetwork(encoder, {name: nn.Linear(8, 1) for name in NAMES})


def build(name: str, **arguments: Any) -> Any:
    kind, own = KINDS[name]
    defaults: dict[str, Any] = {
        "network": network(),
        "tasks": [Task(task, nn.MSELoss()) for task in NAMES],
        "optimizer": partial(torch.optim.SGD, lr=0.05),
    }
    fresh: dict[str, Any] = {"weighting": type(own["weighting"])()} if "weighting" in own else {}
    return kind(**(defaults | own | fresh | arguments))


def flat(module: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def half(**arguments: Any) -> Any:
    """Return Lightning's plugin for float16 with a scaler, which it does not make on the CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **arguments))


def scaled(**arguments: Any) -> Any:
    """Return a plugin that scales gradients, where bfloat16 would not need it."""
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", **({"init_scale": 2.0**8} | arguments))
    return plugin


class Spoil(Callback):
    """Put a value into the gradients of some steps, counted from zero, on the last rank."""

    def __init__(self, steps: Sequence[int], value: float = torch.inf, everywhere: bool = False) -> None:
        self.steps, self.value, self.everywhere = steps, value, everywhere
        self.seen = 0

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if self.seen in self.steps and trainer.global_rank == trainer.world_size - 1:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(self.value) if self.everywhere else parameter.grad[:1].fill_(self.value)
        self.seen += 1


# --------------------------------------------------------------------------------------------------------------- scaler


@kinds
@pytest.mark.parametrize("arguments", [{}, {"gradient_clip_norm": 0.1}, {"accumulate_batches": 2}], ids=str)
def test_scales_that_are_powers_of_two_change_nothing(name: str, arguments: dict[str, Any]) -> None:
    plain, other = build(name, **arguments), build(name, **arguments)
    precisions: list[dict[str, Any]] = [{"precision": "bf16-mixed"}, {"plugins": [scaled(growth_interval=2)]}]
    for module, precision in zip((plain, other), precisions, strict=True):
        seed_everything(0)
        trainer(**precision).fit(module, batches())
    torch.testing.assert_close(flat(other), flat(plain), rtol=1e-6, atol=1e-7)
    if isinstance(plain, TaskGroupModule):
        assert other.task_groups == plain.task_groups
        torch.testing.assert_close(other.affinity_matrix, plain.affinity_matrix, rtol=1e-4, atol=1e-6)


@kinds
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_clipped_as_without_a_scale(name: str, fused: bool) -> None:
    # Fused optimisers undo the scaling themselves, after the gradient is clipped.
    modules = [build(name, optimizer=partial(torch.optim.SGD, lr=0.1, fused=fused), gradient_clip_norm=1e-2)]
    modules.append(build(name, optimizer=partial(torch.optim.SGD, lr=0.1), gradient_clip_norm=1e-2))
    precisions: list[dict[str, Any]] = [{"plugins": [scaled()]}, {"precision": "bf16-mixed"}]
    for module, precision in zip(modules, precisions, strict=True):
        seed_everything(0)
        trainer(**precision).fit(module, batches())
    torch.testing.assert_close(flat(modules[0]), flat(modules[1]), rtol=1e-5, atol=1e-6)


@kinds
def test_the_scale_grows_with_batches(name: str) -> None:
    plugin = half(init_scale=2.0**4, growth_interval=2)
    module, run = build(name), trainer(plugins=[plugin])
    run.fit(module, batches(5))
    assert plugin.scaler.get_scale() == 2.0**6
    assert run.global_step == 5


@pytest.mark.parametrize("spoiled", [[0], [4], [3, 5], [3, 4, 5]])
def test_an_overflow_skips_the_step_of_its_group_alone(spoiled: list[int]) -> None:
    # The same as a gradient of zero there, by SGD; each of six batches has three steps.
    plugin = scaled()
    module, expected = build("single", inactive_heads="skip"), build("single", inactive_heads="skip")
    trainer([Spoil(spoiled)], plugins=[plugin]).fit(module, batches())
    trainer([Spoil(spoiled, value=0.0, everywhere=True)], precision="bf16-mixed").fit(expected, batches())
    torch.testing.assert_close(flat(module), flat(expected), rtol=1e-6, atol=1e-7)
    assert plugin.scaler.get_scale() == 2.0**7  # they are of one batch


@kinds
def test_skipped_steps_are_logged(name: str) -> None:
    run = trainer([Spoil([1, 2])], plugins=[half(init_scale=16.0)], log_every_n_steps=1)
    run.fit(build(name), batches())
    assert run.callback_metrics["skipped_steps"] == 2


def test_runs_without_a_skip_log_none() -> None:
    run = trainer(plugins=[half(init_scale=16.0)], log_every_n_steps=1)
    run.fit(build("single"), batches())
    assert "skipped_steps" not in run.callback_metrics


@kinds
def test_a_group_with_nothing_to_train_steps_under_a_scaler(name: str) -> None:
    modules = []
    precisions: list[dict[str, Any]] = [{"precision": "bf16-mixed"}, {"plugins": [scaled()]}]
    for precision in precisions:
        net = network()
        net.encoder.requires_grad_(False)
        net.heads["c"].requires_grad_(False)
        modules.append(build(name, network=net))
        run = trainer(**precision)
        run.fit(modules[-1], batches())
        assert run.global_step == 6
    torch.testing.assert_close(flat(modules[1]), flat(modules[0]), rtol=1e-6, atol=1e-7)


@kinds
def test_a_run_with_a_scaler_is_resumed_exactly(name: str, tmp_path: Path) -> None:
    def made(callbacks: Sequence[Callback] = ()) -> Any:
        optimizer = partial(torch.optim.AdamW, lr=1e-2)
        seed_everything(1)
        module = build(name, network=network(dropout=0.3), optimizer=optimizer)
        return module, trainer(callbacks, max_epochs=2, plugins=[half(init_scale=2.0**6, growth_interval=3)])

    data, save = batches(4), SaveAfterEachBatch(tmp_path)
    module, run = made([Spoil([1]), save])
    run.fit(module, Position(data))
    for path in save.paths[1:-1:2]:
        resumed, again = made()
        again.fit(resumed, Position(data), ckpt_path=str(path))
        assert_equal_states(resumed.state_dict(), module.state_dict())
        plugins: Any = [again.precision_plugin, run.precision_plugin]
        assert plugins[0].scaler.state_dict() == plugins[1].scaler.state_dict()


class _Write(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        plugin: Any = trainer.precision_plugin
        state = pl_module.get_extra_state()["skipped_steps"], plugin.scaler.state_dict(), flat(pl_module)
        torch.save(state, self.folder / f"rank-{trainer.global_rank}.pt")


@kinds
def test_ranks_skip_together_where_one_overflows(name: str, tmp_path: Path) -> None:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    arguments: dict[str, Any] = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
    run = trainer([Spoil([1, 4]), _Write(tmp_path)], plugins=[half(init_scale=16.0)], **arguments)
    run.fit(build(name), Interleaved(batches()))
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0][:2] == ranks[1][:2]
    assert ranks[0][0] == 2
    assert torch.equal(ranks[0][2], ranks[1][2])
    assert ranks[0][2].isfinite().all()


# ------------------------------------------------------------------------------------------------------------ decisions


def _gradients(data: Batch) -> list[list[Tensor]]:
    net = network()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(data[0])
        losses = [nn.MSELoss()(outputs[name], data[1][name]) for name in NAMES]
    shared = list(net.encoder.parameters())
    return [list(torch.autograd.grad(loss, shared, retain_graph=True)) for loss in losses]


def test_the_fisher_information_is_multiplied_in_single_precision() -> None:
    rule, data = Fisher(refresh_every=100), batches(1)
    trainer(precision="bf16-mixed").fit(build("groups", grouping=rule), data)
    expected = Fisher()
    expected.resolve(NAMES)
    expected.update(root_fisher_gramian(_gradients(data[0])))
    assert rule.similarity is not None
    torch.testing.assert_close(rule.similarity, expected.similarity, rtol=1e-5, atol=1e-6)


class _Tiny(nn.Module):
    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        return 1e-6 * (preds - target).square().mean()


def test_the_fisher_information_of_small_losses_does_not_vanish_in_half_precision() -> None:
    found = []
    precisions: list[dict[str, Any]] = [{"plugins": [half(init_scale=2.0**16)]}, {}]
    for precision in precisions:
        rule = Fisher(refresh_every=100)
        module = build("groups", grouping=rule, tasks=[Task(name, _Tiny()) for name in NAMES])
        trainer(**precision).fit(module, batches(1))
        found.append(rule.similarity)
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=1e-2)


class _Counting(WeightedModule):
    """Checks the number of labels over the ranks; 301 is no number of bfloat16."""

    def total_labels(self, counts: Sequence[float]) -> list[float]:
        totals = super().total_labels(counts)
        assert totals == [602.0] * len(NAMES), totals
        return totals


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_labels_are_counted_exactly(precision: Any) -> None:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    tasks = [Task(name, nn.MSELoss()) for name in NAMES]
    module = _Counting(network(), tasks, partial(torch.optim.SGD, lr=1e-3))
    run = trainer(devices=2, strategy=strategy, use_distributed_sampler=False, precision=precision)
    run.fit(module, Interleaved(batches(1, size=602)))


@kinds
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_what_is_decided_from_is_kept_in_double_precision(name: str, precision: Any) -> None:
    module = build(name)
    trainer(precision=precision).fit(module, batches())
    kept = [*module.updates.affinity.buffers()] if name in ("groups", "single") else [*module.weighting.buffers()]
    assert all(buffer.dtype in (torch.float64, torch.int64) for buffer in kept)
    assert flat(module).isfinite().all()
    assert next(module.network.parameters()).dtype == {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(
        precision, torch.float32
    )
