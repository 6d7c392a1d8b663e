"""Small data, networks and runs for the tests of the modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from mtl_lightning.modules import MT2OModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task

Item = tuple[Tensor, dict[str, Tensor]]


class Pairs(Dataset[Item]):
    """Two noisy linear targets of 6 features."""

    def __init__(self, size: int = 40, num_features: int = 6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(size, num_features, generator=generator)
        weights = torch.randn(2, num_features, 1, generator=generator)
        noise = 0.1 * torch.randn(2, size, 1, generator=generator)
        self.a, self.b = self.inputs @ weights + noise

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Item:
        return self.inputs[index], {"a": self.a[index], "b": self.b[index]}


def loader(size: int = 40, batch_size: int = 8, **arguments: Any) -> DataLoader[Item]:
    return DataLoader(Pairs(size), batch_size=batch_size, **arguments)


def network(seed: int = 0, hidden: int = 8, dropout: float = 0.0) -> MultiHeadNetwork:
    torch.manual_seed(seed)
    encoder: nn.Module = MLP(6, [hidden])
    if dropout:
        encoder = nn.Sequential(encoder, nn.BatchNorm1d(hidden), nn.Dropout(dropout))
    return MultiHeadNetwork(encoder, {"a": nn.Linear(hidden, 1), "b": nn.Linear(hidden, 1)})


def tasks() -> list[Task]:
    return [Task("a", nn.MSELoss()), Task("b", nn.L1Loss())]


def mt2o(**arguments: Any) -> MT2OModule:
    defaults: dict[str, Any] = {
        "network": network(),
        "tasks": tasks(),
        "preferences": simplex_lattice(num_tasks=2, num_divisions=3),
        "optimizer": partial(torch.optim.SGD, lr=0.05),
        "backend": "loop",
    }
    return MT2OModule(**(defaults | arguments))


def trainer(callbacks: Sequence[Callback] = (), **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | arguments))


def rows(module: MT2OModule) -> Tensor:
    return module.population.theta.detach().clone()


def flat(member: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in member.parameters()])


class SaveAfterEachBatch(Callback):
    """Write a checkpoint after every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.paths.append(self.folder / f"batch-{len(self.paths)}.ckpt")
        trainer.save_checkpoint(self.paths[-1])


class Position:
    """A loader in a fixed order that knows where it is."""

    def __init__(self, batches: list[Any] | None = None) -> None:
        self.batches = list(loader()) if batches is None else batches
        self.start = self.seen = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        for index in range(start, len(self.batches)):
            self.seen = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen % len(self.batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["seen"]


class Interleaved:
    """Every batch split into two halves, one for each rank; all of it without a process group."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        distributed = torch.distributed
        rank, size = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        for inputs, targets in self.batches:
            yield inputs[rank::size], {name: target[rank::size] for name, target in targets.items()}


def assert_equal_states(found: Mapping[str, Any], expected: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key in ignored:
            continue
        if isinstance(value, Tensor):
            assert torch.equal(found[key], value), key
        elif isinstance(value, Mapping):
            assert_equal_states(found[key], value, ignored)
        else:
            assert found[key] == value, key


class Reads(TorchFunctionMode):
    """Notes what reads a tensor on the host, or copies numbers of Python into one, inside some methods.

    Args:
        monkeypatch: That of the test.
        watched: The methods, as owner and name, and the list that takes the notes: ``"found"`` or ``"deferred"``.
    """

    READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__")
    COPIES = (torch.tensor, torch.as_tensor, torch.from_numpy)
    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, watched: Sequence[tuple[Any, str, str]]) -> None:
        super().__init__()
        self.found: list[str] = []
        self.deferred: list[str] = []
        self._place: list[list[str]] = []
        reads = self

        class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                reads.note(function.overloadpacket.__name__, reads.OPERATORS)
                return function(*args, **(kwargs or {}))

        self.operators = Operators()  # type: ignore[no-untyped-call]
        for owner, name, into in watched:
            monkeypatch.setattr(owner, name, self._inside(getattr(owner, name), getattr(self, into)))

    def _inside(self, method: Any, into: list[str]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._place.append(into)
            try:
                return method(*args, **kwargs)
            finally:
                self._place.pop()

        return call

    def note(self, name: str, among: Sequence[str]) -> None:
        if self._place and name in among:
            self._place[-1].append(name)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        self.note(name, self.READS)
        if function in self.COPIES:
            self.note(name, (name,))
        return function(*args, **(kwargs or {}))
