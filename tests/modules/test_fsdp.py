"""Networks that are sharded over two processes, by FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessRaisedException

from mtl_lightning.adaptive_weighting import FAMO, GradNorm
from mtl_lightning.grouping import Fisher, Fixed, OneByOne, RandomGroups, Threshold
from mtl_lightning.modules import TaskGroupModule, WeightedModule
from mtl_lightning.modules.single_network import SingleNetworkModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.sharding import shard_network
from mtl_lightning.task import Task
from mtl_lightning.weighting import GeometricMean, Uncertainty
from tests.modules.common import Interleaved, Position, SaveAfterEachBatch, assert_equal_states, trainer
from tests.modules.processes import FSDP2_RUNS_ON_CPU, in_processes, sharded

pytestmark = pytest.mark.skipif(not FSDP2_RUNS_ON_CPU, reason="FSDP2 of this torch runs on no CPU")

NAMES = ("a", "b", "c")
Batch = tuple[Tensor, dict[str, Tensor]]
sgd = partial(torch.optim.SGD, lr=0.01)
adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


class Batches(list[Batch]):
    """A list that Lightning takes for one loader."""


def batches(count: int = 4, size: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, len(NAMES), generator=generator)
    found = Batches()
    for _ in range(count):
        inputs = torch.randn(size, 6, generator=generator)
        values = inputs @ weights + 0.1 * torch.randn(size, len(NAMES), generator=generator)
        found.append((inputs, {name: values[:, [index]] for index, name in enumerate(NAMES)}))
    return found


def with_gaps() -> Batches:
    data = batches()
    for index, (_, targets) in enumerate(data):
        targets["b"][index % 2 :: 2] = torch.nan  # all of one rank's
        targets["c"][:3] = torch.nan  # an unequal number
    for target in data[1][1].values():
        target[1::2] = torch.nan  # one rank has no labels at all
    data[2][1]["c"][:] = torch.nan  # nobody has
    return data


class Whole(nn.Module):
    """Hides how a network is built."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network

    def forward(self, inputs: Tensor) -> Any:
        return self.inner(inputs)


class Learned(nn.Module):
    """The mean of squared errors over known labels, with a weight that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        known = ~target.isnan()
        return self.scale * torch.where(known, preds - target, 0.0).square().sum() / known.sum()


def network(split: bool = True) -> Any:
    torch.manual_seed(0)
    net = MultiHeadNetwork(MLP(6, [8, 8]), {name: nn.Linear(8, 1) for name in NAMES})
    return net if split else Whole(net)


def build(kind: type[Any], split: bool = True, **arguments: Any) -> Any:
    tasks = [Task(name, Learned()) for name in NAMES]
    return kind(**({"network": network(split), "tasks": tasks, "optimizer": sgd} | copy.deepcopy(arguments)))


def whole(module: SingleNetworkModule) -> Tensor:
    """Return all parameters, gathered."""
    found: list[Any] = [parameter.detach() for parameter in module.parameters()]
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).flatten() for p in found])


class Write(Callback):
    """Write what each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.orders: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.orders.append(getattr(pl_module, "task_groups", None))

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        decisions = {
            key: value.nan_to_num(-1.0)
            for key, value in pl_module.state_dict().items()
            if key.startswith(("updates.", "weighting.")) and not key.endswith("_extra_state")
        }
        losses = [float(trainer.callback_metrics[f"val_loss/{name}"]) for name in NAMES]
        result = {"parameters": whole(pl_module), "decisions": decisions, "orders": self.orders, "losses": losses}
        torch.save(result, self.folder / f"rank-{trainer.global_rank}.pt")


def _fit(make: Callable[[], Any], data: Batches, folder: Path, **arguments: Any) -> None:
    module = make()
    seed_everything(5)
    run = trainer([Write(folder)], max_epochs=2, use_distributed_sampler=False, **arguments)
    run.fit(module, Interleaved(data), Interleaved(data))


def _fit_sharded(make: Callable[[], Any], data: Batches, folder: Path) -> None:
    _fit(make, data, folder, devices=2, strategy=sharded())


CASES: dict[str, dict[str, Any]] = {
    "affinity": {"kind": TaskGroupModule, "grouping": Threshold(0.0), "warmup_batches": 3, "affinity_decay": 0.1},
    "clipped": {"kind": TaskGroupModule, "grouping": OneByOne(), "gradient_clip_norm": 0.5, "measure_last": True},
    "accumulated": {"kind": TaskGroupModule, "grouping": Fixed([["a", "c"], ["b"]]), "accumulate_batches": 2},
    "whole": {"kind": TaskGroupModule, "grouping": RandomGroups(2), "split": False},
    "zeroed": {
        "kind": TaskGroupModule,
        "grouping": OneByOne(),
        "inactive_heads": "zero_grad",
        "head_lr_scale": 2.0,
        "optimizer": partial(torch.optim.SGD, lr=2e-3, momentum=0.9),
    },
    "learned": {"kind": WeightedModule, "weighting": Uncertainty(), "gradient_clip_norm": 0.5},
    "after": {"kind": WeightedModule, "weighting": FAMO(lr=0.2)},
    "mean": {"kind": WeightedModule, "weighting": GeometricMean(), "accumulate_batches": 2, "split": False},
}


@pytest.mark.parametrize(
    ("name", "data"), [*((name, with_gaps()) for name in CASES), ("affinity", batches()), ("learned", batches())]
)
def test_two_ranks_that_shard_equal_one_process(name: str, data: Batches, tmp_path: Path) -> None:
    make = partial(build, **CASES[name])
    (tmp_path / "alone").mkdir()
    _fit(make, data, tmp_path / "alone")
    in_processes(_fit_sharded, make, data, tmp_path)
    alone = torch.load(tmp_path / "alone" / "rank-0.pt", weights_only=True)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0]["orders"] == ranks[1]["orders"] == alone["orders"]
    torch.testing.assert_close(ranks[0]["parameters"], ranks[1]["parameters"], rtol=0, atol=0)
    torch.testing.assert_close(ranks[0]["decisions"], ranks[1]["decisions"], rtol=0, atol=0)
    torch.testing.assert_close(ranks[0]["parameters"], alone["parameters"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ranks[0]["decisions"], alone["decisions"], rtol=1e-4, atol=1e-5)
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.parametrize("kind", [TaskGroupModule, WeightedModule])
def test_mixed_precision_is_that_of_one_process(kind: type[Any], tmp_path: Path) -> None:
    def fit(folder: Path, **arguments: Any) -> None:
        _fit(partial(build, kind), batches(), folder, precision="bf16-mixed", **arguments)

    (tmp_path / "alone").mkdir()
    fit(tmp_path / "alone")
    in_processes(lambda: fit(tmp_path, devices=2, strategy=sharded()))
    found, expected = (torch.load(path / "rank-0.pt", weights_only=True) for path in (tmp_path, tmp_path / "alone"))
    torch.testing.assert_close(found["parameters"], expected["parameters"], rtol=0, atol=1e-2)


@pytest.mark.parametrize("count", [1, 2])
def test_an_evaluation_before_leaves_the_training_alone(count: int) -> None:
    # It leaves parameters gathered, of which no optimiser should be made.
    def run() -> None:
        modules = []
        for is_evaluated in (True, False):
            modules.append(build(TaskGroupModule, grouping=OneByOne()))
            arguments: dict[str, Any] = {"devices": count, "use_distributed_sampler": False}
            if is_evaluated:
                strategy = sharded(data_parallel_size=count)
                trainer(strategy=strategy, **arguments).validate(modules[-1], Interleaved(batches()), verbose=False)
            seed_everything(5)
            strategy = sharded(data_parallel_size=count)
            trainer(strategy=strategy, **arguments).fit(modules[-1], Interleaved(batches()))
        assert torch.equal(whole(modules[0]), whole(modules[1]))
        assert not torch.equal(whole(modules[0]), whole(build(TaskGroupModule)))

    in_processes(run, count=count)


# ------------------------------------------------------------------------------------------------------------- resuming


def _run_of_everything(kind: type[Any], **arguments: Any) -> Any:
    seed_everything(7)
    net: Any = network()
    net.encoder = nn.Sequential(net.encoder, nn.BatchNorm1d(8), nn.Dropout(0.3))
    own: dict[str, Any] = {"grouping": Threshold(0.0), "warmup_batches": 2, "measure_last": True, "head_lr_scale": 2.0}
    if kind is WeightedModule:
        own = {"weighting": Uncertainty()}
    return build(kind, **({"network": net, "optimizer": adamw, "gradient_clip_norm": 1.0} | own | arguments))


def _resume_sharded(kind: type[Any], accumulate: int, is_distributed: bool, folder: Path) -> None:
    data = Position(list(Interleaved(batches(3))))
    strategy = partial(sharded, save_distributed_checkpoint=is_distributed)
    arguments: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
    save, module = SaveAfterEachBatch(folder), _run_of_everything(kind, accumulate_batches=accumulate)
    run = trainer([save], strategy=strategy(), **arguments)
    run.fit(module, data)
    state = run.strategy.optimizers[0].state_dict()
    # The end of an epoch, and a batch without a step; Lightning loads nothing from before the first step.
    for path in save.paths[2:4]:
        resumed = _run_of_everything(kind, accumulate_batches=accumulate)
        seed_everything(99)  # a new process has another random state
        again = trainer(strategy=strategy(), **arguments)
        again.fit(resumed, Position(data.batches), ckpt_path=str(path))
        # A gradient that is averaged over the ranks, and then once more with another, may be rounded twice.
        close = partial(torch.testing.assert_close, rtol=0, atol=0 if accumulate == 1 else 1e-6)
        close(_gathered(resumed.state_dict()), _gathered(module.state_dict()))
        close(_gathered(again.strategy.optimizers[0].state_dict()["state"]), _gathered(state["state"]))
        for name, part in module.named_modules():
            if accumulate == 1 and type(part).get_extra_state is not nn.Module.get_extra_state:
                own = _gathered(resumed.get_submodule(name).get_extra_state())
                assert_equal_states(own, _gathered(part.get_extra_state()))
        assert again.global_step == run.global_step


def _gathered(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _gathered(value) for key, value in tree.items()}
    if not isinstance(tree, Tensor):
        return tree
    found: Any = tree
    return (found.full_tensor() if hasattr(found, "full_tensor") else found).nan_to_num(-1.0)


@pytest.mark.parametrize(
    ("kind", "accumulate", "is_distributed"),
    [(TaskGroupModule, 1, True), (TaskGroupModule, 2, False), (WeightedModule, 1, False), (WeightedModule, 2, True)],
)
def test_resumed_equals_uninterrupted(kind: type[Any], accumulate: int, is_distributed: bool, tmp_path: Path) -> None:
    in_processes(_resume_sharded, kind, accumulate, is_distributed, tmp_path)


# ------------------------------------------------------------------------------------------------------------ bad input


class _Root(TaskGroupModule):
    def configure_model(self) -> None:
        shard_network(self.network, self.device_mesh["data_parallel"])  # type: ignore[index]
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


class _Unsuitable(TaskGroupModule):
    can_be_sharded = False


@pytest.mark.parametrize(
    ("kind", "arguments", "sizes", "match"),
    [
        (_Root, {}, (2, 1), r"what a training step calls(.|\n)*Found that it shards `network`\. Call `shard_network"),
        (TaskGroupModule, {}, (1, 2), r"tensor_parallel_size=1\)`\. Found 2 tensor-parallel ranks"),
        (TaskGroupModule, {"grouping": Fisher()}, (2, 1), "`Fisher` groups by gradients of single tasks"),
        (WeightedModule, {"weighting": GradNorm()}, (2, 1), "`GradNorm` reads gradients of single tasks"),
        (
            _Unsuitable,
            {},
            (2, 1),
            r"one device or with DDP \(`Trainer\(strategy='ddp'\)`\). Found ModelParallelStrategy",
        ),
    ],
    ids=["root", "tensor", "Fisher", "GradNorm", "unsuitable"],
)
def test_what_cannot_be_right_is_refused(
    kind: type[Any], arguments: dict[str, Any], sizes: tuple[int, int], match: str
) -> None:
    def fit() -> None:
        strategy = sharded(data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])
        run = trainer(devices=2, strategy=strategy, use_distributed_sampler=False)
        run.fit(build(kind, **arguments), Interleaved(batches()))

    with pytest.raises(ProcessRaisedException, match=match):
        in_processes(fit)


def test_a_checkpoint_without_the_state_of_the_run_is_refused(tmp_path: Path) -> None:
    class Silent(TaskGroupModule):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            pass

    def run() -> None:
        arguments: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
        save = SaveAfterEachBatch(tmp_path)
        trainer([save], strategy=sharded(), **arguments).fit(build(Silent), Interleaved(batches(1)))
        again = trainer(strategy=sharded(), **arguments)
        again.fit(build(Silent), Interleaved(batches(1)), ckpt_path=str(save.paths[0]))

    with pytest.raises(ProcessRaisedException, match=r"should hold `extra_states`, which `on_save_checkpoint` adds"):
        in_processes(run)
