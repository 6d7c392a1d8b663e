"""What the metrics of dense prediction share: sums and counts that are pooled over the whole set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class PooledMetric(Metric):
    """Base of metrics whose states are sums and counts over all elements of all batches and processes.

    Subclasses add such states with :meth:`add_sum` and :meth:`add_count`. Sums are in float64 and counts in int64,
    whatever the precision of the model: no conversion, ``set_dtype`` included, changes them, since half precision loses
    counts from 2,048 on. Values are float32.

    Args:
        ignore_value: A value of the target that is a missing label, besides NaN.
        settings: Everything else that decides how a subclass updates its states.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``ignore_value`` is NaN.
    """

    is_differentiable = False
    full_state_update = False

    settings: Tensor

    def __init__(self, ignore_value: float | None, *settings: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if ignore_value is not None and isnan(ignore_value):
            raise ValueError("`ignore_value` should be a number or None, since NaN is missing anyway. Found NaN.")
        self.ignore_value = ignore_value
        # A collection lets metrics share one state if the names and values of theirs agree after the first batch, which
        # they may by chance. With the settings among the states, metrics that update differently never agree. They
        # come first, since torchmetrics 1.6 compares the first state only, and are constant under the maximum.
        ignored = (0.0, 0.0) if ignore_value is None else (1.0, ignore_value)
        values = torch.tensor([*ignored, *settings], dtype=torch.float64)
        self.add_state("settings", values, dist_reduce_fx="max")

    def add_sum(self, name: str) -> None:
        """Add a state of shape ``()``, float64, that sums over batches and processes."""
        self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add_count(self, name: str, *shape: int) -> None:
        """Add a state of the given shape, int64, that sums over batches and processes."""
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move the states to the device that ``fn`` moves to, and convert none of them.

        Torchmetrics holds ``.half()`` off its states, but not ``.to(torch.half)``, by which Lightning converts a model.
        """
        device = fn(torch.zeros(1, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)


def masked_sum(values: Tensor, valid: Tensor) -> Tensor:
    """Return the sum of ``values`` over ``valid``, both of shape ``(...)``; float64, shape ``()``.

    Example:
        >>> masked_sum(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
        tensor(1., dtype=torch.float64)
    """
    return torch.where(valid, values, 0.0).sum(dtype=torch.float64)


def check_same_shape(preds: Tensor, target: Tensor) -> None:
    """Raise a ValueError if predictions and target differ in shape: broadcasting would count nonsense."""
    if preds.shape != target.shape:
        raise ValueError(
            "`preds` and `target` should have the same shape; resize or squeeze one of them. "
            f"Found {tuple(preds.shape)} and {tuple(target.shape)}."
        )
