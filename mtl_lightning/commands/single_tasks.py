"""Each task alone: what several tasks in one network are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mtl_lightning.commands.configuration import Comparison
from mtl_lightning.commands.results import Result, load_result, write_json
from mtl_lightning.comparison import confidence_interval
from mtl_lightning.metrics.relative_improvement import save_baselines
from mtl_lightning.modules.base import LRSchedulerCallable, LRSchedulerInterval, OptimizerCallable
from mtl_lightning.modules.weighted import WeightedModule
from mtl_lightning.networks.multi_head import MultiHeadNetwork
from mtl_lightning.task import Task


class SingleTaskModule(WeightedModule):
    """One network that is trained for one of its tasks, with the network and the tasks of a multi-task module.

    The labels of the other tasks count as missing. So nothing but this task moves a parameter or the state of the
    optimiser, and a batch without its labels takes no step; a one-hot weighting would let momentum and weight decay act
    there, and on the heads of the other tasks. A :class:`~mtl_lightning.networks.MultiHeadNetwork` is made with all
    heads, so that a seed gives the parameters that it gives in a run of all tasks, and then keeps the one of the task:
    the run costs what a network for one task costs. Of any other network, all outputs are computed.

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor. Heads of other tasks are removed from it.
        tasks: The tasks of the network; those that are not trained are there for the contract.
        task: The name of the task to be trained.
        optimizer: See :class:`~mtl_lightning.modules.WeightedModule`, also for the other arguments.

    Raises:
        ValueError: If no task has this name.

    Note:
        Logged are the values of the one task; those of the others are NaN. ``val_loss`` is the loss of the task.

    Example:
        >>> from functools import partial
        >>> from mtl_lightning.networks import MLP
        >>> network = MultiHeadNetwork(MLP(8, [16]), {"price": nn.Linear(16, 1), "risk": nn.Linear(16, 1)})
        >>> module = SingleTaskModule(
        ...     network=network,
        ...     tasks=[Task("price", nn.MSELoss()), Task("risk", nn.L1Loss())],
        ...     task="price",
        ...     optimizer=partial(torch.optim.Adam, lr=1e-3),
        ... )
        >>> list(module(torch.ones(3, 8)))
        ['price']
    """

    def __init__(
        self,
        network: nn.Module,
        tasks: Sequence[Task],
        task: str,
        optimizer: OptimizerCallable,
        max_nonfinite: int = 20,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: LRSchedulerInterval = "epoch",
        lr_scheduler_monitor: str | None = None,
        gradient_clip_norm: float | None = None,
        accumulate_batches: int = 1,
    ) -> None:
        super().__init__(
            network=network,
            tasks=tasks,
            optimizer=optimizer,
            max_nonfinite=max_nonfinite,
            lr_scheduler=lr_scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            lr_scheduler_monitor=lr_scheduler_monitor,
            gradient_clip_norm=gradient_clip_norm,
            accumulate_batches=accumulate_batches,
        )
        if task not in self.task_names:
            raise ValueError(f"`task` should be one of {', '.join(map(repr, self.task_names))}. Found {task!r}.")
        self.task = task
        if isinstance(network, MultiHeadNetwork):
            for name in [name for name in network.heads if name != task]:
                del network.heads[name]

    def count_labels(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the number of labels of each task in the batch, zero for the others, float32, shape ``(T,)``."""
        counts = super().count_labels(targets)
        is_own = [name == self.task for name in self.task_names]
        return counts * torch.tensor(is_own, device=counts.device)


def write_baselines(comparison: Comparison) -> list[Path]:
    """Write the baselines of delta m, means over the seeds, and return the paths of the files.

    ``baselines_test.json`` names the metrics of the comparison ``test_<metric>/<task>``, ``baselines_val.json``
    ``val_<metric>/<task>``; each is a file for :class:`~mtl_lightning.metrics.RelativeImprovement`.
    ``single_tasks.json`` holds the values of each seed, their mean and the half width of its 95 % confidence interval.

    Raises:
        ValueError: If a run has no result, or a baseline is zero or not finite.
    """
    values = {split: baseline_values(comparison, split) for split in ("test", "val")}
    folder = comparison.output / "single_tasks"
    paths, spread = [], {}
    for split, of_split in values.items():
        intervals = {f"{split}_{name}": confidence_interval(seeds) for name, seeds in of_split.items()}
        higher = {f"{split}_{name}": comparison.metrics[name] for name in of_split}
        paths.append(folder / f"baselines_{split}.json")
        save_baselines(paths[-1], {name: interval.mean for name, interval in intervals.items()}, higher)
        for (name, interval), seeds in zip(intervals.items(), of_split.values(), strict=True):
            by_seed = dict(zip(comparison.seeds, seeds, strict=True))
            spread[name] = {"mean": interval.mean, "half_width": interval.half_width, "seeds": by_seed}
    write_json(folder / "single_tasks.json", spread)
    return [*paths, folder / "single_tasks.json"]


def baseline_values(comparison: Comparison, split: str) -> dict[str, list[float]]:
    """Return the values of the metrics of the comparison in ``split``, each from its task alone, one per seed.

    Raises:
        ValueError: If a run has no result, or does not log a metric.
    """
    found: dict[str, list[float]] = {}
    for name in comparison.metrics:
        found[name] = []
        for run in comparison.single_tasks[name.rsplit("/", 1)[1]]:
            result = load_result(run)
            if result is None:
                raise ValueError(f"The baselines need the results of all tasks and seeds. Found none of {run.label}.")
            found[name].append(metric_value(result, split, name))
    return found


def metric_value(result: Result, split: str, name: str, member: int = 0) -> float:
    """Return a metric of one model of a result in ``"val"`` or ``"test"``.

    Raises:
        ValueError: If it is not logged.
    """
    values = result.validation if split == "val" else result.test
    if name not in values:
        raise ValueError(
            f"`metrics` should name values that {result.name!r} logs in its {split} split: {', '.join(values)}. "
            f"Found {name!r}."
        )
    return values[name][member]
