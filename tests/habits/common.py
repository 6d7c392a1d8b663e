"""Every module on the same small data, with what the tests of the habits need of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError

from mtl_lightning.aggregation import UPGrad
from mtl_lightning.exact_pareto import EPO
from mtl_lightning.modules import (
    GradientModule,
    GradientPopulationModule,
    MT2OModule,
    MultiTaskModule,
    ParetoSetModule,
    TaskGroupModule,
    WeightedModule,
)
from mtl_lightning.networks import ParetoManifold
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task
from tests.modules.common import Item, Pairs, network

Make = Callable[..., MultiTaskModule]

#: How many batches an epoch of ``train_loader`` has.
NUM_BATCHES = 5


def train_loader() -> DataLoader[Item]:
    return DataLoader(Pairs(8 * NUM_BATCHES), batch_size=8, shuffle=True)


def val_loader() -> DataLoader[Item]:
    return DataLoader(Pairs(24, seed=1), batch_size=8)


def _tasks() -> list[Task]:
    return [Task("a", nn.MSELoss(), MeanAbsoluteError()), Task("b", nn.L1Loss(), MeanAbsoluteError())]


def _module(kind: type[MultiTaskModule], defaults: dict[str, Any], **arguments: Any) -> MultiTaskModule:
    common: dict[str, Any] = {
        "network": network(),
        "tasks": _tasks(),
        "optimizer": partial(torch.optim.SGD, lr=0.05),
    }
    return kind(**(common | defaults | arguments))


_PREFERENCES = simplex_lattice(num_tasks=2, num_divisions=2)

#: From the name of a module to what makes one, ready to be trained; arguments replace the defaults.
MODULES: dict[str, Make] = {
    "MT2OModule": partial(_module, MT2OModule, {"preferences": _PREFERENCES, "backend": "loop"}),
    "GradientPopulationModule": lambda **arguments: _module(
        GradientPopulationModule,
        {"preferences": _PREFERENCES, "backend": "loop", "weighting": EPO()},
        **arguments,
    ),
    "ParetoSetModule": lambda **arguments: _module(
        ParetoSetModule,
        {"preferences": _PREFERENCES, "network": ParetoManifold(network(), num_tasks=2)},
        **arguments,
    ),
    # Two groups in every update, each with a step of its own.
    "TaskGroupModule": partial(_module, TaskGroupModule, {"warmup_batches": 1000}),
    "WeightedModule": partial(_module, WeightedModule, {}),
    "GradientModule": lambda **arguments: _module(GradientModule, {"aggregator": UPGrad()}, **arguments),
}

#: Those that have one model per preference, whose validation is a front.
FRONTS = ("MT2OModule", "GradientPopulationModule", "ParetoSetModule")

#: Those that train a network per preference, as one matrix.
POPULATIONS = ("MT2OModule", "GradientPopulationModule")

every_module = pytest.mark.parametrize("name", MODULES)


def objectives(name: str) -> dict[str, Any]:
    """Return the ``objectives`` that a callback needs for this module."""
    return {} if name in FRONTS else {"objectives": {"val_loss/a": "min", "val_loss/b": "min"}}
