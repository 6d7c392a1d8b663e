from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from mtl_lightning.datamodules.dense import DenseTask
from mtl_lightning.datamodules.dense_tasks import dense_task
from mtl_lightning.datamodules.joint_transforms import IGNORE_INDEX
from mtl_lightning.losses import CosineNormalLoss, MaskedCrossEntropyLoss

SPECS = [
    DenseTask("segmentation", 4, "classes"),
    DenseTask("depth", 1, "depth"),
    DenseTask("disparity", 1, "disparity"),
    DenseTask("normal", 3, "normal"),
    DenseTask("edge", 1, "mask"),
    DenseTask("heat", 2, "values"),
]
HIGHER = {"miou", "accuracy", "within_11", "within_22", "within_30", "f1"}
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def _labels(spec: DenseTask) -> tuple[Tensor, Tensor]:
    """A perfect prediction and its target, half of which is missing."""
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "classes":
        target = torch.randint(spec.channels, (2, 4, 6), generator=generator)
        preds = 20 * nn.functional.one_hot(target, spec.channels).movedim(-1, 1).float()
    elif spec.kind == "mask":
        target = torch.randint(2, (2, 1, 4, 6), generator=generator).float()
        preds = 40 * target - 20
    else:
        target = 1 + torch.rand(2, spec.channels, 4, 6, generator=generator)
        preds = target.clone()
    missing = spec.missing((4, 3)).expand(2, *spec.missing((4, 3)).shape)
    return preds, torch.cat([missing, target[..., 3:]], dim=-1)


@each_spec
def test_a_perfect_prediction_has_no_loss(spec: DenseTask) -> None:
    preds, target = _labels(spec)
    assert dense_task(spec).loss(preds, target).item() == pytest.approx(0, abs=1e-6)


@each_spec
def test_what_stands_at_missing_labels_changes_nothing(spec: DenseTask) -> None:
    preds, target = _labels(spec)
    preds = preds.clone()
    preds[..., :3] = torch.inf
    assert dense_task(spec).loss(preds, target).item() == pytest.approx(0, abs=1e-6)


@each_spec
def test_missing_labels_are_not_counted(spec: DenseTask) -> None:
    labels = int(dense_task(spec).num_labels(_labels(spec)[1]))
    assert labels == 2 * 4 * 3 * (2 if spec.name == "heat" else 1)


@each_spec
def test_a_perfect_prediction_has_the_best_of_all_metrics(spec: DenseTask) -> None:
    metrics = dense_task(spec).metrics
    assert isinstance(metrics, MetricCollection)
    metrics.update(*_labels(spec))
    for name, value in metrics.compute().items():
        # The median comes from bins of 0.01 degrees.
        assert value.item() == pytest.approx(float(name in HIGHER), abs=0.006), name


@each_spec
def test_metrics_know_their_direction(spec: DenseTask) -> None:
    metrics = dense_task(spec).metrics
    assert isinstance(metrics, MetricCollection)
    assert {name: metric.higher_is_better for name, metric in metrics.items()} == {
        name: name in HIGHER for name in metrics
    }


@each_spec
def test_a_label_without_value_has_the_shape_of_a_label(spec: DenseTask) -> None:
    missing = spec.missing((4, 6))
    if spec.kind == "classes":
        assert missing.dtype == torch.int64
        assert (missing == IGNORE_INDEX).all()
    assert missing.shape == _labels(spec)[1].shape[1:]


def test_the_loss_of_normals_is_over_the_channels_of_a_pixel() -> None:
    # A cosine along the width would not be zero for the first, nor two for the second.
    normal = nn.functional.normalize(torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    loss = dense_task(SPECS[3]).loss
    assert isinstance(loss, CosineNormalLoss)
    assert loss(normal, normal).item() == pytest.approx(0, abs=1e-6)
    assert loss(-normal, normal).item() == pytest.approx(2, abs=1e-6)


def test_another_loss_may_be_given() -> None:
    loss = MaskedCrossEntropyLoss(ignore_index=IGNORE_INDEX, label_smoothing=0.1)
    assert dense_task(SPECS[0], loss).loss is loss


def test_a_class_that_is_in_neither_prediction_nor_label_does_not_count() -> None:
    metrics = dense_task(SPECS[0]).metrics
    assert isinstance(metrics, MetricCollection)
    target = torch.zeros(1, 2, 2, dtype=torch.int64)
    metrics.update(nn.functional.one_hot(target, 4).movedim(-1, 1).float(), target)
    assert metrics.compute()["miou"].item() == 1
