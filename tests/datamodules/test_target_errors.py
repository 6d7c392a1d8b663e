from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from mtl_lightning.datamodules.target_errors import RelativeRootMeanSquaredError, ScaledMeanAbsoluteError

MEAN, STD = 40.0, 8.0


def _reference_rrmse(preds: Tensor, target: Tensor, training_mean: float) -> float:
    numerator = sum((p - t) ** 2 for p, t in zip(preds.tolist(), target.tolist(), strict=True))
    return (numerator / sum((training_mean - t) ** 2 for t in target.tolist())) ** 0.5


@pytest.fixture
def sample() -> tuple[Tensor, Tensor]:
    """Predictions and targets in the unit of the target."""
    generator = torch.Generator().manual_seed(0)
    target = MEAN + STD * torch.randn(30, generator=generator, dtype=torch.float64)
    return target + torch.randn(30, generator=generator, dtype=torch.float64), target


def _scaled(values: Tensor) -> Tensor:
    return ((values - MEAN) / STD)[:, None]


def test_the_relative_error_is_that_of_the_unit_of_the_target(sample: tuple[Tensor, Tensor]) -> None:
    preds, target = sample
    metric = RelativeRootMeanSquaredError()
    for part in (slice(0, 7), slice(7, 30)):
        metric.update(_scaled(preds)[part], _scaled(target)[part])
    assert metric.compute().item() == pytest.approx(_reference_rrmse(preds, target, MEAN), rel=1e-6)


def test_the_training_mean_has_a_relative_error_of_one(sample: tuple[Tensor, Tensor]) -> None:
    metric = RelativeRootMeanSquaredError()
    metric.update(torch.zeros(30, 1), _scaled(sample[1]))
    assert metric.compute().item() == pytest.approx(1)


def test_the_absolute_error_is_in_the_unit_of_the_target(sample: tuple[Tensor, Tensor]) -> None:
    preds, target = sample
    metric = ScaledMeanAbsoluteError(STD)
    metric.update(_scaled(preds), _scaled(target))
    assert metric.compute().item() == pytest.approx((preds - target).abs().mean().item(), rel=1e-6)


def test_missing_labels_count_nowhere(sample: tuple[Tensor, Tensor]) -> None:
    preds, target = map(_scaled, sample)
    for make in (RelativeRootMeanSquaredError, lambda: ScaledMeanAbsoluteError(STD)):
        with_missing, without = make(), make()
        holes = target.clone()
        holes[::3] = torch.nan
        with_missing.update(preds, holes)
        kept = ~holes[:, 0].isnan()
        without.update(preds[kept], target[kept])
        assert torch.equal(with_missing.compute(), without.compute())


def test_a_collection_computes_each_as_alone(sample: tuple[Tensor, Tensor]) -> None:
    preds, target = map(_scaled, sample)
    metrics = {
        "a": RelativeRootMeanSquaredError(),
        "b": ScaledMeanAbsoluteError(2.0),
        "c": ScaledMeanAbsoluteError(3.0),
    }
    alone = {}
    for name, metric in metrics.items():
        single = metric.clone()
        single(preds[:9], target[:9])
        single.update(preds[9:], target[9:])
        alone[name] = single.compute()
    collection = MetricCollection(dict(metrics))
    collection(preds[:9], target[:9])
    collection.update(preds[9:], target[9:])
    assert collection.compute() == alone


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"`scale` should be positive\. Found"):
        ScaledMeanAbsoluteError(scale)
