"""The tasks of the scenes with their losses and metrics, ready for a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from mtl_lightning.datamodules.joint_transforms import IGNORE_INDEX
from mtl_lightning.datamodules.scenes import SCENE_TASKS
from mtl_lightning.losses import BalancedBCELoss, CosineNormalLoss, MaskedCrossEntropyLoss, MaskedL1Loss
from mtl_lightning.metrics import (
    DepthAbsoluteError,
    DepthRelativeError,
    EdgeF1,
    MaskedMeanAbsoluteError,
    NormalMeanAngle,
    NormalWithin,
)
from mtl_lightning.task import Task


def scene_tasks(names: Sequence[str]) -> list[Task]:
    """Return tasks of ``ScenesDataModule`` in the order of their ``names``.

    ============================ ============================ =====================================================
    task                         loss                         metrics
    ============================ ============================ =====================================================
    ``semseg``                   cross entropy                ``miou`` (mean over classes), ``accuracy`` of pixels
    ``depth_...``                L1                           ``absolute_error`` in metres, ``relative_error``
    ``normal``                   1 - cosine                   ``mean_angle`` in degrees, ``within_30`` (a share)
    ``edge_occlusion``           balanced BCE of logits       ``f1`` at probability 1/2
    all others                   L1                           ``absolute_error``
    ============================ ============================ =====================================================

    Args:
        names: Names in ``SCENE_TASKS``, which also tells the channels of each prediction; not ``instance``, whose
            numbers name nothing.

    Raises:
        ValueError: If a name is not that of a task.

    Example:
        >>> [(task.name, list(task.metrics)) for task in scene_tasks(["semseg", "normal"])]
        [('semseg', ['accuracy', 'miou']), ('normal', ['mean_angle', 'within_30'])]
    """
    known = [name for name in SCENE_TASKS if name != "instance"]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"`names` should be among {', '.join(known)}. Found {', '.join(map(repr, unknown))}.")
    return [Task(name, _loss(name), MetricCollection(_metrics(name))) for name in names]


def _loss(name: str) -> nn.Module:
    if name == "semseg":
        return MaskedCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    if name == "normal":
        return CosineNormalLoss()
    return BalancedBCELoss() if name == "edge_occlusion" else MaskedL1Loss()


def _metrics(name: str) -> dict[str, Metric | MetricCollection]:
    if name == "semseg":
        classes = SCENE_TASKS[name].channels
        assert classes is not None
        return {
            "miou": MulticlassJaccardIndex(classes, ignore_index=IGNORE_INDEX),
            "accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=IGNORE_INDEX),
        }
    if name == "normal":
        return {"mean_angle": NormalMeanAngle(), "within_30": NormalWithin(degrees=30)}
    if name == "edge_occlusion":
        return {"f1": EdgeF1(logits=True)}
    if SCENE_TASKS[name].kind == "depth":
        return {"absolute_error": DepthAbsoluteError(), "relative_error": DepthRelativeError()}
    return {"absolute_error": MaskedMeanAbsoluteError()}
