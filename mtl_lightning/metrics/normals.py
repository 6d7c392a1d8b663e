"""Angles between predicted and labelled surface normals, in degrees, pooled over all valid pixels of the set.

The mean is a mean of angles. The median and the shares come from a histogram of all angles, 0.01 degrees wide: its
144 kB are the whole state, and it adds up over batches and processes. nash and FAMO average medians and shares of
batches instead, which then depend on the batch size.

References:
    - Fouhey, Gupta, Hebert: Data-Driven 3D Primitives for Single Image Understanding (2013), ICCV.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl_lightning.losses import full_precision, unit_vectors, valid_normals
from mtl_lightning.metrics.pooled import PooledMetric, check_same_shape, masked_sum

_BINS_PER_DEGREE = 100
_NUM_BINS = 180 * _BINS_PER_DEGREE + 1  # the last for exactly 180 degrees


def angles_between(preds: Tensor, target: Tensor) -> Tensor:
    """Return the angles in degrees, 0 to 180, between vectors of shape ``(B, C, ...)``; shape ``(B, ...)``.

    Exact to about 1e-5 degrees in float32. A vector of length zero is at 90 degrees to every other.

    Example:
        >>> angles_between(torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
        tensor([90.])
    """
    preds, target = unit_vectors(full_precision(preds)), unit_vectors(full_precision(target))
    # Not the arc cosine: around zero, where it matters, that is off by 0.02 degrees in float32.
    return (2 * torch.atan2((preds - target).norm(dim=1), (preds + target).norm(dim=1))).rad2deg()


class _NormalAngles(PooledMetric):
    """The sum and the histogram of all angles, so that a collection computes them once."""

    total: Tensor
    count: Tensor
    histogram: Tensor

    def __init__(self, ignore_value: float | None = None, **kwargs: Any) -> None:
        super().__init__(ignore_value, **kwargs)
        self.add_sum("total")
        self.add_count("count")
        self.add_count("histogram", _NUM_BINS)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions and targets of shape ``(B, C, ...)``."""
        check_same_shape(preds, target)
        valid = valid_normals(target, self.ignore_value)
        angles = angles_between(preds.detach(), target)
        # One bin more takes what is no label and no number.
        counted = valid & ~angles.isnan()
        bins = torch.where(counted, (angles * _BINS_PER_DEGREE).clamp(0, _NUM_BINS - 1), _NUM_BINS).long()
        self.histogram = self.histogram + torch.bincount(bins.flatten(), minlength=_NUM_BINS + 1)[:-1]
        self.total = self.total + masked_sum(angles, valid)
        self.count = self.count + valid.sum()

    def _unless_undefined(self, value: Tensor) -> Tensor:
        """Return ``value`` in float32, or NaN without any pixel or if an angle was NaN."""
        return torch.where((self.count == 0) | self.total.isnan(), torch.nan, value).float()


class NormalMeanAngle(_NormalAngles):
    """The mean angle over all valid pixels, shape ``()``, in degrees; NaN without any.

    Args:
        ignore_value: A target with this value in all channels is a missing label, besides NaN and zero.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> metric = NormalMeanAngle()
        >>> preds = torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
        >>> metric.update(preds, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
        >>> metric.compute()
        tensor(45.)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the mean angle."""
        return self._unless_undefined(self.total / self.count)


class NormalMedianAngle(_NormalAngles):
    """The median angle over all valid pixels, shape ``()``, in degrees; NaN without any.

    Off by 0.005 degrees at most, half the width of a bin, apart from rounding in float32. For an even number of pixels
    it is the mean of the middle two.

    Args:
        ignore_value: A target with this value in all channels is a missing label, besides NaN and zero.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> metric = NormalMedianAngle()
        >>> preds = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
        >>> metric.update(preds, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> round(metric.compute().item(), 1)
        90.0
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the median angle."""
        reached = self.histogram.cumsum(dim=0)
        middle = torch.stack([(reached[-1] - 1) // 2, reached[-1] // 2])
        bins = torch.searchsorted(reached, middle, right=True).clamp(max=_NUM_BINS - 1)
        centres = ((bins + 0.5) / _BINS_PER_DEGREE).clamp(max=180.0)
        return self._unless_undefined(centres.mean())


class NormalWithin(_NormalAngles):
    """The share of valid pixels whose angle is less than ``degrees``, shape ``()``, 0 to 1; NaN without any.

    Args:
        degrees: The bound, a multiple of 0.01 over 0 and up to 180; 11.25, 22.5 and 30 are customary.
        ignore_value: A target with this value in all channels is a missing label, besides NaN and zero.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``degrees`` is out of range or between two bins, ``ignore_value`` is NaN, or predictions and
            target differ in shape.

    Example:
        >>> metric = NormalWithin(degrees=11.25)
        >>> preds = torch.tensor([[0.0, 0.1, 1.0], [0.0, 1.0, 0.0]])
        >>> metric.update(preds, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def __init__(self, degrees: float = 11.25, ignore_value: float | None = None, **kwargs: Any) -> None:
        super().__init__(ignore_value, **kwargs)
        if not 0 < degrees <= 180 or abs(degrees * _BINS_PER_DEGREE - round(degrees * _BINS_PER_DEGREE)) > 1e-6:
            raise ValueError(f"`degrees` should be a multiple of 0.01 over 0 and up to 180. Found {degrees}.")
        self.degrees = degrees

    def compute(self) -> Tensor:
        """Return the share of pixels."""
        within = self.histogram[: round(self.degrees * _BINS_PER_DEGREE)].sum()
        return self._unless_undefined(within / self.count)
