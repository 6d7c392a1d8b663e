from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from mtl_lightning.datamodules.label_tasks import BinaryLoss, LogitAccuracy, LogitF1, binary_task, class_task

LOGITS = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
LABELS = (torch.arange(40)[:, None] % 3 == 0).long()
HOLES = torch.where(torch.arange(40)[:, None] % 5 == 0, -1, LABELS)
KEPT = HOLES >= 0


def test_the_loss_is_the_binary_cross_entropy() -> None:
    assert torch.allclose(BinaryLoss()(LOGITS, LABELS), binary_cross_entropy_with_logits(LOGITS, LABELS.float()))


def test_missing_labels_do_not_count_in_the_loss() -> None:
    expected = binary_cross_entropy_with_logits(LOGITS[KEPT], LABELS[KEPT].float())
    assert torch.allclose(BinaryLoss()(LOGITS, HOLES), expected)
    assert binary_task("a").num_labels(HOLES) == KEPT.sum()


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_metrics_go_by_the_sign_of_the_logits(scale: float, shift: float) -> None:
    # All small logits in [0, 1] would pass for probabilities below 1/2.
    logits = (LOGITS.abs() if shift else LOGITS) * scale + shift
    accuracy, f1 = LogitAccuracy(), LogitF1()
    for part in (slice(0, 15), slice(15, 40)):
        accuracy.update(logits[part], HOLES[part])
        f1.update(logits[part], HOLES[part])
    positive, truth = logits[KEPT] > 0, LABELS[KEPT] == 1
    assert accuracy.compute().item() == pytest.approx((positive == truth).float().mean().item())
    hits = (positive & truth).sum().item()
    assert f1.compute().item() == pytest.approx(2 * hits / (positive.sum() + truth.sum()).item())


def test_metrics_of_a_task_agree_with_those_alone() -> None:
    metrics = binary_task("a").metrics
    assert metrics is not None
    for part in (slice(0, 15), slice(15, 40)):
        metrics.update(LOGITS[part], HOLES[part])
    alone = LogitF1()
    alone.update(LOGITS, HOLES)
    assert torch.equal(metrics.compute()["f1"], alone.compute())


def test_missing_classes_do_not_count() -> None:
    task = class_task("a", 3)
    assert task.metrics is not None
    logits, labels = torch.eye(3), torch.tensor([0, -1, 1])
    assert task.num_labels(labels) == 2
    assert task.metrics(logits, labels)["accuracy"] == 0.5
    assert torch.allclose(task.loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1))
