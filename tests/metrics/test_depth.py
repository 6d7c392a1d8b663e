from math import inf, nan

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_lightning.metrics import DepthAbsoluteError, DepthRelativeError, DepthRMSE


def _reference_errors(preds: Tensor, target: Tensor) -> tuple[float, float, float]:
    predicted, labelled = preds.double().numpy().ravel(), target.double().numpy().ravel()
    keep = np.isfinite(labelled) & (labelled != 0)
    predicted, labelled = predicted[keep], labelled[keep]
    errors = np.abs(predicted - labelled)
    return errors.mean(), (errors / labelled).mean(), np.sqrt((errors**2).mean())


def _depth() -> tuple[Tensor, Tensor]:
    target = 0.5 + 8 * torch.rand(5, 1, 7, 9)
    target[torch.rand_like(target) < 0.3] = 0.0
    target[torch.rand_like(target) < 0.1] = nan
    return 8 * torch.rand(5, 1, 7, 9), target


def test_agrees_with_numpy_on_what_is_labelled() -> None:
    preds, target = _depth()
    metrics = [metric(ignore_value=0.0) for metric in (DepthAbsoluteError, DepthRelativeError, DepthRMSE)]
    for metric in metrics:
        for part in torch.split(torch.arange(5), 2):
            metric.update(preds[part], target[part])
    assert [metric.compute().item() for metric in metrics] == pytest.approx(_reference_errors(preds, target), rel=1e-6)


@pytest.mark.parametrize(("metric", "factor"), [(DepthAbsoluteError, 3.0), (DepthRelativeError, 1.0), (DepthRMSE, 3.0)])
def test_another_unit_scales_all_but_the_relative_error(metric: type[DepthRMSE], factor: float) -> None:
    preds, target = _depth()
    metres, others = metric(ignore_value=0.0), metric(ignore_value=0.0)
    metres.update(preds, target)
    others.update(3 * preds, 3 * target)
    torch.testing.assert_close(others.compute(), factor * metres.compute())


def test_a_valid_depth_of_zero_has_no_finite_relative_error() -> None:
    metric = DepthRelativeError()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))
    assert metric.compute() == inf


@pytest.mark.parametrize("metric", [DepthAbsoluteError, DepthRelativeError, DepthRMSE])
def test_lower_is_better(metric: type[DepthRMSE]) -> None:
    assert metric.higher_is_better is False
