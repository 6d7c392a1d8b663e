"""What a task is: a name, a loss and, optionally, metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the core needs the type only; torchmetrics is not imported with it
    from torchmetrics import Metric, MetricCollection


class Task:
    """One task of a multi-task network.

    Args:
        name: The key of this task in the network's output and in the batch's targets.
        loss: Maps the task's prediction and target to a scalar that is minimised.
        metrics: A torchmetrics ``Metric`` or ``MetricCollection``, updated with the prediction and the target. Modules
            clone it for each split and each model.

    Raises:
        ValueError: If the name is empty or holds ``/``, ``.`` or white space, which names of metrics cannot carry.
        TypeError: If the loss is not callable.

    Example:
        >>> import torch
        >>> task = Task("left", torch.nn.CrossEntropyLoss())
        >>> task
        Task('left', CrossEntropyLoss())
        >>> task.num_labels(torch.tensor([3, -100])), task.num_labels(torch.tensor([-100, -100]))
        (tensor(1), tensor(0))
        >>> from mtl_lightning.losses import CosineNormalLoss
        >>> Task("normal", CosineNormalLoss()).num_labels(torch.ones(1, 3, 4, 4))  # pixels, not elements
        tensor(16)
    """

    def __init__(
        self,
        name: str,
        # A module is callable; it is named for configuration files, which read a bare Callable as a factory of tensors.
        loss: Callable[[Tensor, Tensor], Tensor] | torch.nn.Module,
        metrics: Metric | MetricCollection | None = None,
    ) -> None:
        if not isinstance(name, str) or not name or "/" in name or "." in name or any(char.isspace() for char in name):
            raise ValueError(
                f"A task's `name` should be a non-empty string without white space, '/' or '.'. Found {name!r}."
            )
        if not callable(loss):
            raise TypeError(f"The `loss` of task {name!r} should be callable. Found {type(loss).__name__}.")
        self.name = name
        self.loss = loss
        self.metrics = metrics

    def num_labels(self, target: Tensor) -> Tensor:
        """Return how many elements of ``target`` are labels, as an integer tensor of shape ``()``.

        If the loss has a method ``valid``, as those of ``mtl_lightning.losses``, it says which elements are labels: it
        returns a bool tensor, and the loss should be the mean over what is true in it. Otherwise an element is missing
        if it is NaN, or if it is an integer and equals the attribute ``ignore_index`` of the loss. Without any label a
        task takes no part in the batch. Override it for another convention, such as that of a loss function, which
        has no attributes.
        """
        valid = getattr(self.loss, "valid", None)
        if callable(valid):
            return valid(target).sum()
        if target.is_floating_point():
            return (~target.isnan()).sum()
        ignore_index = getattr(self.loss, "ignore_index", None)
        if ignore_index is None:
            return torch.tensor(target.numel(), device=target.device)
        return (target.long() != ignore_index).sum()  # unsigned integers wrap around at a negative index

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {self.loss})"


def check_tasks(tasks: Sequence[Task], minimum: int = 2) -> tuple[Task, ...]:
    """Return ``tasks`` as a tuple, or raise an error if they cannot be trained together.

    Args:
        tasks: The tasks.
        minimum: The least number of tasks.

    Raises:
        TypeError: If one of them is not a ``Task``.
        ValueError: If there are fewer than ``minimum``, or two share a name.
    """
    for task in tasks:
        if not isinstance(task, Task):
            raise TypeError(f"`tasks` should hold `Task` objects. Found {type(task).__name__}.")
    if len(tasks) < minimum:
        raise ValueError(f"`tasks` should hold at least {minimum} tasks. Found {len(tasks)}.")
    repeated = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if repeated:
        raise ValueError(f"Task names should be unique. Found {', '.join(map(repr, repeated))} more than once.")
    return tuple(tasks)
