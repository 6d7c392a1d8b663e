"""Errors of standardised targets: relative to the mean, or in the targets' own unit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtl_lightning.metrics import MaskedMeanAbsoluteError, MaskedMeanSquaredError


class RelativeRootMeanSquaredError(MaskedMeanSquaredError):
    """The root of the squared error over that of the mean, ``sqrt(sum (p - y)^2 / sum (m - y)^2)``, shape ``()``.

    Targets are standardised by the training part, so that its mean ``m`` is 0. A model that always predicts the mean
    has 1. It is the RRMSE of multi-target regression if a task has a single number. NaN without any label.

    Args:
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Example:
        >>> import torch
        >>> metric = RelativeRootMeanSquaredError()
        >>> metric.update(torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [torch.nan]]))
        >>> metric.compute()
        tensor(0.5000)

    References:
        - Spyromitros-Xioufis, Tsoumakas, Groves, Vlahavas: Multi-target regression via input space expansion: treating
          targets as inputs. Machine Learning 104, 2016. arXiv:1211.6581.
    """

    baseline: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("baseline")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions and standardised targets of any one shape."""
        super().update(preds, target)
        self.baseline = self.baseline + target.double().square().nansum()

    def compute(self) -> Tensor:
        """Return the relative error."""
        return (self.squared / self.baseline).sqrt().float()


class ScaledMeanAbsoluteError(MaskedMeanAbsoluteError):
    """The mean absolute error times ``scale``, shape ``()``: in the targets' own unit if that is their deviation.

    Args:
        scale: The standard deviation that the targets were divided by.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``scale`` is not positive.

    Example:
        >>> import torch
        >>> metric = ScaledMeanAbsoluteError(10.0)
        >>> metric.update(torch.tensor([[1.0]]), torch.tensor([[1.5]]))
        >>> metric.compute()
        tensor(5.)
    """

    def __init__(self, scale: float, **kwargs: Any) -> None:
        if not scale > 0:
            raise ValueError(f"`scale` should be positive. Found {scale}.")
        super().__init__(**kwargs)
        self.scale = scale

    def compute(self) -> Tensor:
        """Return the mean absolute error in the unit of the scale."""
        return super().compute() * self.scale
