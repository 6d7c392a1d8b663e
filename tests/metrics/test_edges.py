from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from mtl_lightning.metrics import EdgeF1, OptimalEdgeF1


def _edges() -> tuple[Tensor, Tensor]:
    """Logits and labels, 30 % of them missing."""
    target = (torch.rand(6, 1, 9, 11) < 0.2).float()
    preds = torch.randn(6, 1, 9, 11) + 2 * target - 1.5
    target[torch.rand_like(target) < 0.15] = torch.nan
    target[torch.rand_like(target) < 0.15] = 255.0
    return preds, target


def _reference_f1(preds: Tensor, target: Tensor, threshold: float) -> float:
    keep = ~target.isnan() & (target != 255)
    return float(f1_score(target[keep].numpy() >= 0.5, preds[keep].sigmoid().numpy() >= threshold))


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("logits", [True, False])
def test_agrees_with_scikit_learn_on_what_is_labelled(threshold: float, logits: bool) -> None:
    preds, target = _edges()
    metric = EdgeF1(threshold, logits=logits, ignore_value=255)
    for part in torch.split(torch.arange(6), 4):
        metric.update(preds[part] if logits else preds[part].sigmoid(), target[part])
    assert metric.compute().item() == pytest.approx(_reference_f1(preds, target, threshold), rel=1e-6)


@pytest.mark.parametrize("num_thresholds", [1, 9, 99])
def test_the_optimum_is_the_best_of_the_single_thresholds(num_thresholds: int) -> None:
    preds, target = _edges()
    metric = OptimalEdgeF1(num_thresholds, logits=True, ignore_value=255)
    for part in torch.split(torch.arange(6), 4):
        metric.update(preds[part], target[part])
    thresholds = np.arange(1, num_thresholds + 1) / (num_thresholds + 1)
    best = max(_reference_f1(preds, target, threshold) for threshold in thresholds)
    assert metric.compute().item() == pytest.approx(best, rel=1e-6)


def test_one_threshold_serves_the_whole_set() -> None:
    metric = OptimalEdgeF1(logits=False)
    metric.update(torch.tensor([0.9, 0.8]), torch.tensor([1, 0]))  # alone, 0.9 is best
    metric.update(torch.tensor([0.3, 0.1]), torch.tensor([1, 0]))  # alone, 0.3 is best
    assert metric.compute().item() == pytest.approx(0.8)  # 2 of 2 edges found, 1 false


def test_a_probability_at_the_threshold_is_an_edge() -> None:
    metric = EdgeF1(0.25, logits=False)
    metric.update(torch.tensor([0.25, 0.2499]), torch.tensor([1, 0]))
    assert metric.compute() == 1.0


@pytest.mark.parametrize("make", [EdgeF1, OptimalEdgeF1])
@pytest.mark.parametrize(
    ("preds", "target", "expected"),
    [([-99.0, -99.0], [0, 0], torch.nan), ([9.0, -99.0], [0, 0], 0.0), ([-99.0, -99.0], [1, 0], 0.0)],
    ids=["no_edge", "none_labelled", "none_predicted"],
)
def test_without_edges(
    make: Callable[..., EdgeF1 | OptimalEdgeF1], preds: list[float], target: list[int], expected: float
) -> None:
    metric = make(logits=True)
    metric.update(torch.tensor(preds), torch.tensor(target))
    torch.testing.assert_close(metric.compute(), torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_labels_may_have_any_dtype(dtype: torch.dtype) -> None:
    metric = EdgeF1(logits=True)
    metric.update(torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1, 0, 0]).to(dtype))
    assert metric.compute().item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("threshold", [0.0, 1.0, torch.nan])
def test_thresholds_out_of_range_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="`threshold` should be between 0 and 1"):
        EdgeF1(threshold, logits=True)


def test_no_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_thresholds` should be at least 1"):
        OptimalEdgeF1(0, logits=True)


def test_larger_is_better() -> None:
    assert EdgeF1.higher_is_better is OptimalEdgeF1.higher_is_better is True
