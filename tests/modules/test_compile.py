"""Networks that are compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from mtl_lightning.adaptive_weighting import FAMO
from mtl_lightning.grouping import OneByOne, Threshold
from mtl_lightning.modules import TaskGroupModule, WeightedModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.task import Task
from tests.modules.common import loader, trainer

NAMES = ("a", "b")


class Counted:
    """A backend that differentiates as others do, runs as it is, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.compile: Any = aot_autograd(fw_compiler=self._counted, bw_compiler=self._counted)

    def _counted(self, graph: Any, inputs: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            return graph(*arguments)

        return call

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return self.compile(graph, inputs)


class Head(nn.Linear):
    """A layer that torch 2.6 compiles, as it does not with its own."""

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.linear(features, self.weight, self.bias)


def network(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    encoder = nn.Sequential(MLP(6, [8]), nn.BatchNorm1d(8), nn.Dropout(dropout))
    return MultiHeadNetwork(encoder, {name: Head(8, 1) for name in NAMES})


def fit(kind: type[Any], net: nn.Module, prepare: Callable[[Any], None] = lambda module: None, **arguments: Any) -> Any:
    torch.compiler.reset()
    tasks = [Task("a", nn.MSELoss()), Task("b", nn.L1Loss())]
    module = kind(**({"network": net, "tasks": tasks, "optimizer": partial(torch.optim.SGD, lr=0.05)} | arguments))
    prepare(module)
    seed_everything(0)
    trainer(max_epochs=2).fit(module, loader(), loader())
    return module


def flat(module: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.network.parameters()])


GROUPS: dict[str, Any] = {"grouping": Threshold(0.0), "warmup_batches": 3, "affinity_decay": 0.1, "measure_last": True}
LEARNED: dict[str, Any] = {"weighting": FAMO(lr=0.2)}


def _encoder(backend: Counted, module: Any) -> None:
    module.network.encoder.compile(backend=backend)


def _heads(backend: Counted, module: Any) -> None:
    for head in module.network.heads.values():
        head.compile(backend=backend)


def _in_place(backend: Counted, module: Any) -> None:
    module.network.compile(backend=backend)


def _wrapped(backend: Counted, module: Any) -> None:
    module.network = torch.compile(module.network, backend=backend)


@pytest.mark.filterwarnings("ignore:A network of an `encoder` and `heads` should be compiled in parts")
@pytest.mark.parametrize(
    ("kind", "arguments", "prepare"),
    [
        (TaskGroupModule, GROUPS, _encoder),
        (TaskGroupModule, GROUPS, _heads),
        (TaskGroupModule, GROUPS, _wrapped),
        (WeightedModule, LEARNED, _encoder),
        (WeightedModule, LEARNED, _in_place),
        (WeightedModule, LEARNED, _wrapped),
    ],
)
def test_a_compiled_network_trains_as_an_eager_one(kind: type[Any], arguments: dict[str, Any], prepare: Any) -> None:
    backend = Counted()
    eager = fit(kind, network(), **arguments)
    compiled = fit(kind, network(), partial(prepare, backend), **arguments)
    assert backend.calls >= 2 * 2 * 5  # forward and backward in each batch
    torch.testing.assert_close(flat(compiled), flat(eager), rtol=1e-5, atol=1e-6)
    if kind is TaskGroupModule:
        assert compiled.task_groups == eager.task_groups
        torch.testing.assert_close(compiled.affinity_matrix, eager.affinity_matrix, rtol=1e-4, atol=1e-5)


def test_names_in_checkpoints_stay_those_of_the_eager_network() -> None:
    compiled = fit(TaskGroupModule, network(), partial(_encoder, Counted()))
    assert list(compiled.state_dict()) == list(fit(TaskGroupModule, network()).state_dict())


@pytest.mark.parametrize(
    ("prepare", "match"),
    [
        (_wrapped, r"Found `torch.compile\(network\)`, of which every pass costs all heads"),
        (_in_place, r"Found `network.compile\(\)`, which training does not reach"),
    ],
)
def test_networks_that_are_compiled_to_no_avail_are_told_of(prepare: Any, match: str) -> None:
    with pytest.warns(UserWarning, match=match):
        fit(TaskGroupModule, network(), partial(prepare, Counted()))


def test_a_compiled_encoder_is_nothing_to_tell_of() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compiled in parts")
        fit(TaskGroupModule, network(), partial(_encoder, Counted()))


def test_generated_code_pairs_its_random_numbers() -> None:
    # Without learning nothing changes between two passes but what is drawn in them.
    torch.compiler.reset()
    net = MultiHeadNetwork(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3)), {name: nn.Linear(8, 1) for name in NAMES})
    net.encoder.compile(backend="inductor")
    module = TaskGroupModule(
        network=net,
        tasks=[Task("a", nn.MSELoss()), Task("b", nn.L1Loss())],
        optimizer=partial(torch.optim.SGD, lr=0.0),
        grouping=OneByOne(),
        measure_last=True,
    )
    trainer(limit_train_batches=2).fit(module, loader())
    assert module.updates.affinity.counts.all()
    torch.testing.assert_close(module.affinity_matrix, torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=1e-6)
