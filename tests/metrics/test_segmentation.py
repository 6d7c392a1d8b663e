"""What is relied on in torchmetrics for segmentation: pooling, ignored pixels and absent classes."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

NUM_CLASSES = 6


def _maps(ignore_index: int, absent: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits ``(B, C, H, W)`` that never choose a class of ``absent``, and labels without them."""
    present = torch.tensor([index for index in range(NUM_CLASSES) if index not in absent])
    target = present[torch.randint(0, len(present), (7, 5, 4))]
    preds = torch.randn(7, NUM_CLASSES, 5, 4) + 2 * torch.nn.functional.one_hot(target, NUM_CLASSES).movedim(-1, 1)
    preds[:, list(absent)] = -99.0
    target[torch.rand(7, 5, 4) < torch.linspace(0, 1, 7).reshape(7, 1, 1)] = ignore_index
    return preds, target


def _reference_scores(preds: Tensor, target: Tensor, ignore_index: int) -> tuple[float, float]:
    """Mean IoU over the classes that occur, and the accuracy, from sets of pixels."""
    keep = (target != ignore_index).numpy()
    chosen, labelled = preds.argmax(1).numpy()[keep], target.numpy()[keep]
    ious = []
    for index in range(NUM_CLASSES):
        union = ((chosen == index) | (labelled == index)).sum()
        if union:
            ious.append(((chosen == index) & (labelled == index)).sum() / union)
    return float(np.mean(ious)), float((chosen == labelled).mean())


def _metrics(ignore_index: int) -> tuple[Metric, Metric]:
    return (
        MulticlassJaccardIndex(NUM_CLASSES, ignore_index=ignore_index, average="macro"),
        MulticlassAccuracy(NUM_CLASSES, ignore_index=ignore_index, average="micro"),
    )


@pytest.mark.parametrize("ignore_index", [-1, 255, -100])
@pytest.mark.parametrize("absent", [(), (2,), (0, 5)])
def test_pooled_over_batches_without_ignored_pixels_and_absent_classes(
    ignore_index: int, absent: tuple[int, ...]
) -> None:
    preds, target = _maps(ignore_index, absent)
    metrics = _metrics(ignore_index)
    for metric in metrics:
        for part in torch.split(torch.arange(7), 3):
            metric.update(preds[part], target[part])
    found = [metric.compute().item() for metric in metrics]
    assert found == pytest.approx(_reference_scores(preds, target, ignore_index), rel=1e-5)


def test_labels_may_be_bytes() -> None:
    preds, target = _maps(255, (2,))
    for metric, expected in zip(_metrics(255), _reference_scores(preds, target, 255), strict=True):
        metric.update(preds, target.to(torch.uint8))
        assert metric.compute().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ignore_index", [-1, 255])
def test_a_batch_of_ignored_pixels_changes_nothing(ignore_index: int) -> None:
    preds, target = _maps(ignore_index, ())
    for metric in _metrics(ignore_index):
        metric.update(preds, target)
        before = metric.compute()
        metric.update(preds, torch.full_like(target, ignore_index))
        assert metric.compute() == before


@pytest.mark.parametrize("ignore_index", [-1, 255])
def test_half_precision_loses_no_count(ignore_index: int) -> None:
    preds, target = torch.randn(1, NUM_CLASSES, 200, 200), torch.randint(0, NUM_CLASSES, (1, 200, 200))
    for metric, expected in zip(_metrics(ignore_index), _reference_scores(preds, target, ignore_index), strict=True):
        metric.to(torch.half).update(preds, target)
        assert metric.compute().item() == pytest.approx(expected, rel=1e-5)
