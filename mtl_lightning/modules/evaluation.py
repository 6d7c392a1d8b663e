"""Losses and metrics of a population over one pass of an evaluation set."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from mtl_lightning.task import Task


class PopulationEvaluation(nn.Module):
    """Mean loss and metrics of each of ``P`` subproblems on each of ``T`` tasks.

    Means are over labels, so that batches of unequal size and unequal ranks count as they should; sums are in float32
    whatever the precision of the model. A batch without labels of a task does not count for that task.

    Args:
        tasks: The tasks; their metrics are cloned for each subproblem.
        size: The number of subproblems ``P``.

    Attributes:
        group: The processes that evaluate the same subproblems, over which metrics are synchronised; ``None`` for all.
    """

    def __init__(self, tasks: Sequence[Task], size: int) -> None:
        super().__init__()
        self.task_names = [task.name for task in tasks]
        self.group: Any = None
        self._size = size
        # No buffers: half precision would convert them with the model, and they are made anew for each pass.
        self.sums = torch.zeros(size, len(tasks))
        self.counts = torch.zeros(len(tasks))
        self.metrics = nn.ModuleDict(
            {
                f"{name}/{task.name}": nn.ModuleList(metric.clone() for _ in range(size))
                for task in tasks
                for name, metric in named_metrics(task).items()
            }
        )

    def reset(self, size: int, device: torch.device) -> None:
        """Forget everything; ``size`` is the number of subproblems from now on."""
        self.sums = torch.zeros(size, len(self.task_names), device=device, dtype=torch.float32)
        self.counts = torch.zeros(len(self.task_names), device=device, dtype=torch.float32)
        self._size = size
        for key, metrics in self._named():
            # A validation has set the first to evaluation, and will not know the others when it sets all back.
            clones = [metrics[0].clone().train() for _ in range(len(metrics), size)]
            self.metrics[key] = nn.ModuleList([*metrics[: max(size, 1)], *clones])  # one to clone always remains
        for _, metrics in self._named():
            for metric in metrics:
                metric.reset()

    def update(
        self,
        outputs: Mapping[str, Tensor],
        losses: Tensor,
        targets: Mapping[str, Tensor],
        labels: Mapping[int, float],
    ) -> None:
        """Take in one batch.

        Args:
            outputs: Predictions, task name to tensor of shape ``(P, B, ...)``.
            losses: Mean losses of the tasks with labels, shape ``(P, T')``.
            targets: Targets, task name to tensor of shape ``(B, ...)``.
            labels: The number of labels of each of the ``T'`` tasks that have any, by the index of the task.
        """
        for column, (task, count) in enumerate(labels.items()):
            self.sums[:, task] += count * losses[:, column].float()
            self.counts[task] += count
        present = {self.task_names[task] for task in labels}
        for key, metrics in self._named():
            name = key.rsplit("/", 1)[1]
            if name in present:
                for index, metric in enumerate(metrics[: self._size]):
                    metric.update(outputs[name][index], targets[name])

    def compute(self, reduce: Callable[[Tensor], Tensor], is_alone: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean losses, shape ``(P, T)``, and the metrics, name to values of shape ``(P,)``; float32.

        Args:
            reduce: Sums a tensor over the ranks; every rank has to take part. Metrics reduce themselves.
            is_alone: Whether no other process evaluates the same subproblems, even if there are some.
        """
        counts = reduce(self.counts.clone())
        losses = reduce(self.sums.clone()) / counts
        failed = ~losses[:, counts > 0].isfinite().all(dim=1)
        values = {}
        for key, metrics in self._named():
            results = [self._computed(metric, is_alone) for metric in metrics[: self._size]]
            if not all(isinstance(result, Tensor) and result.ndim == 0 for result in results):
                raise ValueError(f"The metric {key!r} should compute a scalar. Found {results[0]!r}.")
            values[key] = torch.stack(results).float() if results else losses.new_zeros(0)
        # A class decided by comparing NaN is no result, although a metric may count it.
        return losses, {key: value.masked_fill(failed, torch.nan) for key, value in values.items()}

    def _computed(self, metric: Metric, is_alone: bool) -> Any:
        parts = [
            part for part in metric.modules() if isinstance(part, Metric)
        ]  # those inside a wrapper reduce themselves
        kept = [part.distributed_available_fn for part in parts]
        for part in parts:
            part.process_group = self.group
            part.distributed_available_fn = _never if is_alone else part.distributed_available_fn
        try:
            return metric.compute()
        finally:
            # A metric that holds a group can be neither copied nor pickled.
            for part, available in zip(parts, kept, strict=True):
                part.process_group, part.distributed_available_fn = None, available

    def _named(self) -> list[tuple[str, list[Metric]]]:
        return [(key, list(cast("nn.ModuleList", metrics))) for key, metrics in self.metrics.items()]  # type: ignore[arg-type]


def _never() -> bool:
    return False


def named_metrics(task: Task) -> dict[str, Metric]:
    """Return the metrics of a task by name: the keys of a collection, or the class of a single metric in snake case.

    Example:
        >>> import torch
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> list(named_metrics(Task("left", torch.nn.CrossEntropyLoss(), MulticlassAccuracy(10))))
        ['accuracy']
    """
    if task.metrics is None:
        return {}
    if isinstance(task.metrics, MetricCollection):
        return {str(name): metric for name, metric in task.metrics.items()}
    plain = re.sub(r"^(Multiclass|Multilabel|Binary)", "", type(task.metrics).__name__)
    return {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", plain).lower(): task.metrics}
