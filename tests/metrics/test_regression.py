from math import nan, sqrt

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error

from mtl_lightning.metrics import MaskedMeanAbsoluteError, MaskedMeanSquaredError


@pytest.mark.parametrize("ignore_value", [None, 0.0, 255.0])
def test_agrees_with_scikit_learn_on_what_is_labelled(ignore_value: float | None) -> None:
    preds, target = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8)
    target[torch.rand_like(target) < 0.3] = nan
    target[torch.rand_like(target) < 0.3] = 0.0
    target[torch.rand_like(target) < 0.3] = 255.0
    keep = ~target.isnan() & (target != (nan if ignore_value is None else ignore_value))
    labels, values = target[keep].double().numpy(), preds[keep].double().numpy()
    absolute, squared = MaskedMeanAbsoluteError(ignore_value), MaskedMeanSquaredError(ignore_value)
    root = MaskedMeanSquaredError(ignore_value, squared=False)
    for metric in (absolute, squared, root):
        metric.update(preds, target)
    assert absolute.compute().item() == pytest.approx(mean_absolute_error(labels, values), rel=1e-6)
    assert squared.compute().item() == pytest.approx(mean_squared_error(labels, values), rel=1e-6)
    assert root.compute().item() == pytest.approx(sqrt(mean_squared_error(labels, values)), rel=1e-6)


def test_many_small_errors_after_a_large_one_are_not_lost() -> None:
    metric = MaskedMeanAbsoluteError()
    metric.update(torch.tensor([1e9]), torch.zeros(1))
    for _ in range(1000):
        metric.update(torch.ones(10), torch.zeros(10))  # in float32, 1e9 + 10 is 1e9
    assert metric.absolute == 1e9 + 10_000
    metric.reset()
    metric.update(torch.tensor([1e9, 1.0, 1.0]), torch.zeros(3))
    assert metric.absolute == 1e9 + 2


def test_integers_are_subtracted_as_numbers() -> None:
    metric = MaskedMeanAbsoluteError(ignore_value=255)
    metric.update(torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([3, 2, 255], dtype=torch.uint8))
    assert metric.compute() == np.mean([2.0, 0.0])


@pytest.mark.parametrize("metric", [MaskedMeanAbsoluteError(), MaskedMeanSquaredError()])
def test_lower_is_better(metric: MaskedMeanAbsoluteError | MaskedMeanSquaredError) -> None:
    assert metric.higher_is_better is False
