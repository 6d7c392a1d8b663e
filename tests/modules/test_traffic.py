"""What ranks exchange in a step: the table of `docs/distributed.md`."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mtl_lightning.adaptive_weighting import FAMO, DynamicTaskPrioritization, GradNorm
from mtl_lightning.grouping import Fisher, Fixed, OneByOne
from mtl_lightning.modules import TaskGroupModule, WeightedModule
from mtl_lightning.networks import MultiHeadNetwork
from mtl_lightning.task import Task
from mtl_lightning.weighting import Uncertainty
from tests.modules.common import Interleaved, trainer
from tests.modules.processes import FSDP2_RUNS_ON_CPU, in_processes, sharded

NAMES = ("a", "b", "c")
T = len(NAMES)
TRUNK, HEAD = 6 * 8 + 8, 8 + 1
FLAG = 2  # a weight and a bias: each with a number that says whether the rank has a gradient of it
Call = tuple[str, int]


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            own = [leaf for leaf in pytree.tree_leaves(args[0]) if isinstance(leaf, Tensor)]
            self.calls.append((function.overloadpacket.__name__, sum(tensor.numel() for tensor in own)))
        return function(*args, **(kwargs or {}))


class _Record(Callback):
    """Write what is exchanged in each batch: the names of the exchanges and the numbers in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches: list[list[Call]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._mode = _Recording()
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.batches.append(self._mode.calls)
        if trainer.is_global_zero:
            torch.save(self.batches, self.folder / "batches.pt")


def _fit(kind: type[Any], arguments: dict[str, Any], folder: Path, strategy: Any) -> None:
    torch.manual_seed(0)
    net = MultiHeadNetwork(nn.Linear(6, 8), {name: nn.Linear(8, 1) for name in NAMES})
    data = [(torch.randn(8, 6), {name: torch.randn(8, 1) for name in NAMES}) for _ in range(4)]
    tasks = [Task(name, nn.MSELoss()) for name in NAMES]
    module = kind(net, tasks, partial(torch.optim.SGD, lr=0.01), **arguments)
    run = trainer([_Record(folder)], devices=2, strategy=strategy, use_distributed_sampler=False)
    run.fit(module, Interleaved(data))


def _closeness(preds: Tensor, target: Tensor) -> Tensor:
    return torch.exp(-(preds - target).abs()).mean()


def _sums(*sizes: int) -> list[Call]:
    return [("allreduce_", size) for size in sizes]


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        # Labels; then losses and gradients of each group.
        (
            TaskGroupModule,
            {"grouping": Fixed([["a", "b"], ["c"]]), "shuffle": False, "measure_last": True},
            _sums(T, T, TRUNK + FLAG + 2 * (HEAD + FLAG), T, TRUNK + FLAG + HEAD + FLAG, T),
        ),
        (
            TaskGroupModule,
            {"grouping": Fisher(refresh_every=1), "single_group": "once", "warmup_batches": 0},
            None,
        ),
        # Labels, losses, gradients.
        (WeightedModule, {}, _sums(T, T, TRUNK + FLAG + T * (HEAD + FLAG))),
        (WeightedModule, {"weighting": Uncertainty()}, _sums(T, T, TRUNK + FLAG + T * (HEAD + FLAG) + T + 1)),
        (
            WeightedModule,
            {"weighting": DynamicTaskPrioritization({"a": _closeness})},
            _sums(T, T, T, TRUNK + FLAG + T * (HEAD + FLAG)),
        ),
        (WeightedModule, {"weighting": FAMO()}, _sums(T, T, TRUNK + FLAG + T * (HEAD + FLAG), T)),
        (WeightedModule, {"weighting": GradNorm()}, _sums(T, T, T * 6 * 8, TRUNK + FLAG + T * (HEAD + FLAG))),
    ],
    ids=["groups", "Fisher", "Equal", "Uncertainty", "DynamicTaskPrioritization", "FAMO", "GradNorm"],
)
def test_what_is_exchanged_with_ddp(
    kind: type[Any], arguments: dict[str, Any], expected: list[Call] | None, tmp_path: Path
) -> None:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    _fit(kind, arguments, tmp_path, strategy)
    _, *batches = torch.load(tmp_path / "batches.pt", weights_only=True)
    for calls in batches:
        if expected is None:  # the trunk's gradients for each task, before anything else is known
            assert calls[: T + 1] == _sums(T, *[TRUNK] * T)
        else:
            assert calls == expected


def test_accumulated_batches_share_labels_and_gradients(tmp_path: Path) -> None:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    _fit(TaskGroupModule, {"grouping": OneByOne(), "accumulate_batches": 2}, tmp_path, strategy)
    batches = torch.load(tmp_path / "batches.pt", weights_only=True)
    assert batches[2] == []
    group = _sums(T, T, TRUNK + FLAG + HEAD + FLAG)  # the losses of each batch
    assert batches[3] == _sums(T) + group * T


@pytest.mark.skipif(not FSDP2_RUNS_ON_CPU, reason="FSDP2 of this torch runs on no CPU")
def test_what_is_exchanged_when_sharded(tmp_path: Path) -> None:
    arguments = {"grouping": Fixed([["a", "b"], ["c"]]), "shuffle": False}
    in_processes(lambda: _fit(TaskGroupModule, arguments, tmp_path, sharded()))
    _, *batches = torch.load(tmp_path / "batches.pt", weights_only=True)
    # Each unit is gathered once for the pass of a group; a head of one row lies on one rank, padded on the other.
    gathered = [("_allgather_base_", TRUNK)] + [("_allgather_base_", 2 * HEAD)] * T
    head, trunk = ("_reduce_scatter_base_", HEAD), ("_reduce_scatter_base_", TRUNK // 2)
    group = [*gathered, ("allreduce_", T)]
    assert batches == [[("allreduce_", T), *group, head, head, trunk, *group, head, trunk]] * len(batches)
