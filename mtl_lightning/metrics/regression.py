"""Errors of real-valued maps with missing labels, such as heat maps of key points or curvature."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtl_lightning.losses import full_precision, valid_elements
from mtl_lightning.metrics.pooled import PooledMetric, check_same_shape, masked_sum


class _MaskedErrors(PooledMetric):
    """Sums of absolute and squared errors over all valid elements, so that a collection computes them once."""

    higher_is_better = False

    absolute: Tensor
    squared: Tensor
    count: Tensor

    def __init__(self, ignore_value: float | None = None, **kwargs: Any) -> None:
        super().__init__(ignore_value, **kwargs)
        self.add_sum("absolute")
        self.add_sum("squared")
        self.add_count("count")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions and targets of any one shape."""
        check_same_shape(preds, target)
        valid = valid_elements(target, self.ignore_value)
        errors = (full_precision(preds) - full_precision(target)).detach()
        self.absolute = self.absolute + masked_sum(errors.abs(), valid)
        self.squared = self.squared + masked_sum(errors.square(), valid)
        self.count = self.count + valid.sum()


class MaskedMeanAbsoluteError(_MaskedErrors):
    """The mean absolute error over all valid elements, shape ``()``, in the unit of the target; NaN without any.

    Args:
        ignore_value: A value of the target that is a missing label, besides NaN.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> import torch
        >>> metric = MaskedMeanAbsoluteError()
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([3.0, torch.nan]))
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
        >>> metric.compute()
        tensor(1.)
    """

    def compute(self) -> Tensor:
        """Return the mean absolute error."""
        return (self.absolute / self.count).float()


class MaskedMeanSquaredError(_MaskedErrors):
    """The mean squared error over all valid elements, shape ``()``, or its root; NaN without any.

    Args:
        ignore_value: A value of the target that is a missing label, besides NaN.
        squared: Whether it is the mean squared error, in the squared unit of the target, or its root, in the unit.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> import torch
        >>> metric = MaskedMeanSquaredError(ignore_value=0.0, squared=False)
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]))
        >>> metric.compute()
        tensor(2.)
    """

    def __init__(self, ignore_value: float | None = None, *, squared: bool = True, **kwargs: Any) -> None:
        super().__init__(ignore_value, **kwargs)
        self.root = not squared

    def compute(self) -> Tensor:
        """Return the mean squared error or its root."""
        mean = self.squared / self.count
        return (mean.sqrt() if self.root else mean).float()
