"""Errors of depth, pooled over all valid pixels of the set.

Give ``ignore_value=0.0`` where zero stands for no measurement, as in NYUv2 and Cityscapes. Published numbers differ in
how they pool: nash and FAMO average the errors of batches, which then depend on the batch size, and others those of
images.

References:
    - Eigen, Puhrsch, Fergus: Depth Map Prediction from a Single Image using a Multi-Scale Deep Network (2014),
      arXiv:1406.2283.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtl_lightning.losses import full_precision, valid_elements
from mtl_lightning.metrics.pooled import PooledMetric, check_same_shape, masked_sum


class _DepthErrors(PooledMetric):
    """Sums of absolute, squared and relative errors over all valid pixels, so that a collection computes them once."""

    higher_is_better = False

    absolute: Tensor
    squared: Tensor
    relative: Tensor
    count: Tensor

    def __init__(self, ignore_value: float | None = None, **kwargs: Any) -> None:
        super().__init__(ignore_value, **kwargs)
        self.add_sum("absolute")
        self.add_sum("squared")
        self.add_sum("relative")
        self.add_count("count")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions and targets of any one shape."""
        check_same_shape(preds, target)
        valid = valid_elements(target, self.ignore_value)
        target = full_precision(target)
        errors = (full_precision(preds) - target).detach().abs()
        self.absolute = self.absolute + masked_sum(errors, valid)
        self.squared = self.squared + masked_sum(errors.square(), valid)
        self.relative = self.relative + masked_sum(errors / target.abs(), valid)
        self.count = self.count + valid.sum()


class DepthAbsoluteError(_DepthErrors):
    """The mean absolute error over all valid pixels, shape ``()``, in the unit of the target; NaN without any.

    Args:
        ignore_value: A value of the target that is a missing label, besides NaN.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> import torch
        >>> metric = DepthAbsoluteError(ignore_value=0.0)
        >>> metric.update(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2.0, 5.0, 0.0]))
        >>> metric.compute()
        tensor(1.5000)
    """

    def compute(self) -> Tensor:
        """Return the mean absolute error."""
        return (self.absolute / self.count).float()


class DepthRelativeError(_DepthErrors):
    """The mean of ``|preds - target| / |target|`` over all valid pixels, shape ``()``, as a fraction; NaN without any.

    A valid target of zero makes it infinite, or NaN.

    Args:
        ignore_value: A value of the target that is a missing label, besides NaN.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> import torch
        >>> metric = DepthRelativeError(ignore_value=0.0)
        >>> metric.update(torch.tensor([1.0, 5.0, 5.0]), torch.tensor([2.0, 4.0, 0.0]))
        >>> metric.compute()
        tensor(0.3750)
    """

    def compute(self) -> Tensor:
        """Return the mean relative error."""
        return (self.relative / self.count).float()


class DepthRMSE(_DepthErrors):
    """The root mean squared error over all valid pixels, shape ``()``, in the unit of the target; NaN without any.

    Args:
        ignore_value: A value of the target that is a missing label, besides NaN.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> import torch
        >>> metric = DepthRMSE(ignore_value=0.0)
        >>> metric.update(torch.tensor([1.0, 12.0, 5.0]), torch.tensor([2.0, 5.0, 0.0]))
        >>> metric.compute()
        tensor(5.)
    """

    def compute(self) -> Tensor:
        """Return the root of the mean squared error."""
        return (self.squared / self.count).sqrt().float()
