"""What callbacks and strategies read of a module, so that neither side imports the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mtl_lightning.population import Population
from mtl_lightning.population_shards import Shards


class PopulationProtocol(Protocol):
    """A LightningModule that trains ``P`` models, one per preference vector, on ``T`` tasks.

    ``objective_values`` and ``metric_values`` are those of the latest validation. They are reduced over ranks when they
    are first read after it, so every rank has to read them. Rows of a subproblem that has failed are not finite.
    """

    @property
    def task_names(self) -> tuple[str, ...]:
        """The ``T`` task names, in the order of the columns."""

    @property
    def preferences(self) -> Tensor:
        """The preference vectors of the models now in training, shape ``(P, T)``."""

    @property
    def objective_values(self) -> Tensor:
        """The mean validation loss of each model on each task, shape ``(P, T)``."""

    @property
    def metric_values(self) -> Mapping[str, Tensor]:
        """The validation metrics: from ``<metric>/<task>`` to one value per model, shape ``(P,)``."""


class SpreadPopulationProtocol(Protocol):
    """A LightningModule whose population can be spread over processes."""

    population: Population
    shards: Shards

    @property
    def final_preferences(self) -> Tensor:
        """The preference vectors of all subproblems that there will be, shape ``(P, T)``."""

    def spread(self, shards: Shards, data_group: Any, data_rank: int, data_size: int, device: torch.device) -> None:
        """Keep the subproblems of this process only."""

    def gather(self) -> None:
        """Bring the subproblems of all processes together again."""

    def whole_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the ``state_dict`` of the whole population, given that of this process."""

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Any]:
        """Return the parameters, buffers and other state of this process."""


class TaskGroupProtocol(Protocol):
    """A LightningModule that updates ``T`` tasks in groups, one after another in each batch."""

    @property
    def task_names(self) -> tuple[str, ...]:
        """The ``T`` task names, in the order of the rows of the affinity."""

    @property
    def affinity_matrix(self) -> Tensor:
        """The affinity from row to column, shape ``(T, T)``, equal on all ranks."""

    @property
    def task_groups(self) -> list[list[str]]:
        """The groups of the batch in training, or of the last one, in the order of their updates."""


class TaskLossesProtocol(Protocol):
    """A LightningModule that can be asked for the losses of its tasks, one by one."""

    def batch_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the loss of each task with labels in ``batch``, shape ``()``, with its graph."""
