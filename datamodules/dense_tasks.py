"""Losses and metrics of dense tasks, by what their numbers mean, ready for a module."""

from __future__ import annotations

from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from mtl_lightning.datamodules.dense import DenseTask
from mtl_lightning.datamodules.joint_transforms import IGNORE_INDEX
from mtl_lightning.losses import BalancedBCELoss, CosineNormalLoss, MaskedCrossEntropyLoss, MaskedL1Loss
from mtl_lightning.metrics import (
    DepthAbsoluteError,
    DepthRelativeError,
    DepthRMSE,
    MaskedMeanAbsoluteError,
    NormalMeanAngle,
    NormalMedianAngle,
    NormalWithin,
    OptimalEdgeF1,
)
from mtl_lightning.task import Task


def dense_task(spec: DenseTask, loss: nn.Module | None = None) -> Task:
    """Return the task of ``spec`` with the loss and the metrics of its kind.

    ======================= ================================ ========================================================
    kind                    loss                             metrics
    ======================= ================================ ========================================================
    ``classes``             cross entropy                    ``miou`` (mean over classes), ``accuracy`` of pixels
    ``depth, disparity``    L1                               ``absolute_error``, ``relative_error``, ``rmse``
    ``normal``              1 - cosine                       ``mean_angle``, ``median_angle`` in degrees,
                                                             ``within_11`` (11.25 degrees), ``within_22`` (22.5),
                                                             ``within_30``, shares of pixels
    ``mask``                balanced BCE of logits, 0.95     ``f1`` at the best of 99 thresholds, without tolerance
    all others              L1                               ``absolute_error``
    ======================= ================================ ========================================================

    Args:
        spec: The task.
        loss: Another loss than that of its kind. Missing labels are NaN, and -1 among classes.

    Example:
        >>> task = dense_task(DenseTask("depth", 1, "depth"))
        >>> task, list(task.metrics)
        (Task('depth', MaskedL1Loss()), ['absolute_error', 'relative_error', 'rmse'])
    """
    return Task(spec.name, _loss(spec) if loss is None else loss, MetricCollection(_metrics(spec)))


def _loss(spec: DenseTask) -> nn.Module:
    if spec.kind == "classes":
        return MaskedCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    if spec.kind == "normal":
        return CosineNormalLoss()
    return BalancedBCELoss() if spec.kind == "mask" else MaskedL1Loss()


def _metrics(spec: DenseTask) -> dict[str, Metric | MetricCollection]:
    if spec.kind == "classes":
        return {
            "miou": MulticlassJaccardIndex(spec.channels, ignore_index=IGNORE_INDEX),
            "accuracy": MulticlassAccuracy(spec.channels, average="micro", ignore_index=IGNORE_INDEX),
        }
    if spec.kind in ("depth", "disparity"):
        return {
            "absolute_error": DepthAbsoluteError(),
            "relative_error": DepthRelativeError(),
            "rmse": DepthRMSE(),
        }
    if spec.kind == "normal":
        return {
            "mean_angle": NormalMeanAngle(),
            "median_angle": NormalMedianAngle(),
            "within_11": NormalWithin(degrees=11.25),
            "within_22": NormalWithin(degrees=22.5),
            "within_30": NormalWithin(degrees=30),
        }
    if spec.kind == "mask":
        return {"f1": OptimalEdgeF1(logits=True)}
    return {"absolute_error": MaskedMeanAbsoluteError()}
