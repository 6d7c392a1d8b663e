"""Classification tasks whose labels may be missing: losses and metrics that leave -1 out."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, MulticlassAccuracy

from mtl_lightning.datamodules.joint_transforms import IGNORE_INDEX
from mtl_lightning.losses import BalancedBCELoss, MaskedCrossEntropyLoss
from mtl_lightning.task import Task


class BinaryLoss(BalancedBCELoss):
    """The mean binary cross entropy of logits and labels 0 and 1 of one shape, over labels other than -1.

    Example:
        >>> import torch
        >>> BinaryLoss()(torch.zeros(3, 1), torch.tensor([[1], [0], [-1]]))  # log(2)
        tensor(0.6931)
    """

    def __init__(self) -> None:
        super().__init__(positive_weight=0.5, ignore_value=IGNORE_INDEX)

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape ``()``."""
        return 2 * super().forward(preds, target)


class LogitAccuracy(BinaryAccuracy):
    """The share of labels, 0 and 1, that the sign of the logits tells, over labels other than -1.

    torchmetrics takes a batch of logits for probabilities if all of them happen to lie in ``[0, 1]``.

    Example:
        >>> import torch
        >>> LogitAccuracy()(torch.tensor([0.2, 0.4, -1.0]), torch.tensor([1, 1, -1]))
        tensor(1.)
    """

    def __init__(self) -> None:
        super().__init__(ignore_index=IGNORE_INDEX)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits and labels of one shape."""
        super().update((preds > 0).long(), target)


class LogitF1(BinaryF1Score):
    """The F1 score of predicting 1 where a logit is positive, over labels other than -1.

    Example:
        >>> import torch
        >>> LogitF1()(torch.tensor([0.2, 0.4, -1.0]), torch.tensor([1, 0, 1]))
        tensor(0.5000)
    """

    def __init__(self) -> None:
        super().__init__(ignore_index=IGNORE_INDEX)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits and labels of one shape."""
        super().update((preds > 0).long(), target)


def class_task(name: str, num_classes: int) -> Task:
    """Return a task of logits, shape ``(B, num_classes)``, and labels, shape ``(B,)``: cross entropy, ``accuracy``."""
    accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORE_INDEX)
    return Task(name, MaskedCrossEntropyLoss(ignore_index=IGNORE_INDEX), MetricCollection({"accuracy": accuracy}))


def binary_task(name: str) -> Task:
    """Return a task of logits and labels 0 and 1, shapes ``(B, 1)``: binary cross entropy, ``f1`` and ``accuracy``."""
    return Task(name, BinaryLoss(), MetricCollection({"f1": LogitF1(), "accuracy": LogitAccuracy()}))
