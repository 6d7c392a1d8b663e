from math import nan

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_lightning.metrics import NormalMeanAngle, NormalMedianAngle, NormalWithin
from mtl_lightning.metrics.normals import angles_between


def _reference_angles(preds: Tensor, target: Tensor) -> np.ndarray:
    """Angles of the labelled pixels by the arc cosine, in float64."""
    preds, target = preds.movedim(1, -1).double(), target.movedim(1, -1).double()
    keep = ~target.isnan().any(-1) & (target != 0).any(-1) & (target != 255).any(-1)
    predicted, labelled = preds[keep].numpy(), target[keep].numpy()
    cosines = (predicted * labelled).sum(1) / np.linalg.norm(predicted, axis=1) / np.linalg.norm(labelled, axis=1)
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def _normals(noise: float) -> tuple[Tensor, Tensor]:
    target = torch.randn(6, 3, 20, 20)
    preds = target + noise * torch.randn_like(target)
    missing = torch.rand(6, 1, 20, 20)
    target = target.masked_fill(missing < 0.1, nan).masked_fill(missing > 0.8, 0.0).masked_fill(missing > 0.9, 255.0)
    return preds, target


@pytest.mark.parametrize("noise", [0.01, 0.3, 1.0, 10.0])
def test_agrees_with_numpy_on_what_is_labelled(noise: float) -> None:
    preds, target = _normals(noise)
    mean, median = NormalMeanAngle(ignore_value=255), NormalMedianAngle(ignore_value=255)
    within = [NormalWithin(degrees, ignore_value=255) for degrees in (1.5, 11.25, 22.5, 30)]
    for metric in (mean, median, *within):
        for part in torch.split(torch.arange(6), 4):
            metric.update(preds[part], target[part])
    angles = _reference_angles(preds, target)
    assert mean.compute().item() == pytest.approx(angles.mean(), abs=1e-4)
    assert abs(median.compute().item() - np.median(angles)) <= 0.005 + 1e-4
    for metric in within:
        assert metric.compute().item() == pytest.approx((angles < metric.degrees).mean(), abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 101, 1000])
def test_the_median_is_exact_to_half_a_bin(count: int) -> None:
    angles = 180 * torch.rand(count, dtype=torch.float64)
    preds = torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin(), torch.zeros_like(angles)], dim=1)
    metric = NormalMedianAngle()
    metric.update(preds, torch.tensor([[1.0, 0.0, 0.0]]).double().expand(count, 3))
    assert abs(metric.compute().item() - np.median(angles.numpy())) <= 0.005 + 1e-5


def test_the_median_is_that_of_all_pixels_and_no_mean_of_medians() -> None:
    metric = NormalMedianAngle()
    x, y = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    metric.update(x.expand(3, 3), x.expand(3, 3))
    metric.update(y, x)
    assert metric.compute().item() == pytest.approx(0.005)  # medians of the batches: 0 and 90


@pytest.mark.parametrize("degrees", [1e-3, 0.1, 11.25, 90.0, 179.9, 180.0])
def test_angles_are_accurate_in_float32(degrees: float) -> None:
    turned = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    preds = torch.stack([turned.cos(), turned.sin(), torch.zeros_like(turned)]).float().reshape(1, 3)
    angle = angles_between(preds, torch.tensor([[1.0, 0.0, 0.0]]))
    assert angle.item() == pytest.approx(degrees, abs=2e-5)


@pytest.mark.parametrize("scale", [1e-4, 0.3, 1e4])
def test_lengths_do_not_matter(scale: float) -> None:
    preds, target = torch.randn(50, 3), torch.randn(50, 3)
    torch.testing.assert_close(angles_between(scale * preds, target / scale), angles_between(preds, target))


def test_rotating_both_sides_changes_nothing() -> None:
    preds, target = torch.randn(50, 3), torch.randn(50, 3)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    turned = angles_between(preds @ rotation, target @ rotation)
    torch.testing.assert_close(turned, angles_between(preds, target), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("preds", "angle"), [([0.0, 0.0, 0.0], 90.0), ([0.0, 0.0, -2.0], 180.0), ([0.0, 0.0, 3.0], 0.0)]
)
def test_the_ends_of_the_range(preds: list[float], angle: float) -> None:
    mean, median, within = NormalMeanAngle(), NormalMedianAngle(), NormalWithin(180)
    for metric in (mean, median, within):
        metric.update(torch.tensor([preds]), torch.tensor([[0.0, 0.0, 1.0]]))
    assert mean.compute().item() == pytest.approx(angle)
    assert abs(median.compute().item() - angle) <= 0.0051
    assert within.compute() == float(angle < 180)


def test_the_bound_itself_is_not_within() -> None:
    metric = NormalWithin(90)
    metric.update(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
    assert metric.compute() == 0.0


@pytest.mark.parametrize("degrees", [0.0, -1.0, 180.01, 11.255, nan])
def test_bounds_between_bins_or_out_of_range_are_refused(degrees: float) -> None:
    with pytest.raises(ValueError, match=r"`degrees` should be a multiple of 0\.01"):
        NormalWithin(degrees)


def test_which_direction_is_better() -> None:
    found = (NormalMeanAngle.higher_is_better, NormalMedianAngle.higher_is_better, NormalWithin.higher_is_better)
    assert found == (False, False, True)
