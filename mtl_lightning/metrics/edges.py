"""F1 scores of edge maps, pooled over all pixels of the set.

A pixel counts as found only where it is labelled. The customary odsF and the like of edge detection first match
predicted to labelled edges within a tolerance (0.0075 to 0.011 of the image's diagonal) after thinning: do not compare
them with these.

References:
    - Martin, Fowlkes, Malik: Learning to Detect Natural Image Boundaries Using Local Brightness, Color, and Texture
      Cues (2004), IEEE TPAMI 26(5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_lightning.losses import full_precision, valid_elements
from mtl_lightning.metrics.pooled import PooledMetric, check_same_shape


class _EdgeCounts(PooledMetric):
    """How many pixels of each label have a probability between which two thresholds."""

    higher_is_better = True

    histogram: Tensor  # (2, number of thresholds + 1), by label and by how many thresholds the probability reaches
    undefined: Tensor

    def __init__(self, thresholds: Sequence[float], logits: bool, ignore_value: float | None, **kwargs: Any) -> None:
        super().__init__(ignore_value, float(logits), *thresholds, **kwargs)
        self.thresholds = tuple(thresholds)
        self.logits = logits
        self.add_count("histogram", 2, len(thresholds) + 1)
        self.add_count("undefined")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions and targets of any one shape; a target of at least 0.5 is an edge."""
        check_same_shape(preds, target)
        valid = valid_elements(target, self.ignore_value)
        probabilities = full_precision(preds.detach())
        if self.logits:
            probabilities = probabilities.sigmoid()
        reached = torch.bucketize(probabilities, probabilities.new_tensor(self.thresholds), right=True)
        size = len(self.thresholds) + 1
        bins = torch.where(valid, reached + size * (full_precision(target) >= 0.5), 2 * size)
        counts = torch.bincount(bins.flatten(), minlength=2 * size + 1)[:-1]
        self.histogram = self.histogram + counts.reshape(2, size)
        self.undefined = self.undefined + (valid & probabilities.isnan()).sum()

    def _scores(self) -> Tensor:
        """Return the F1 score at each threshold, float32; NaN without any edge, or if a probability was NaN."""
        found = self.histogram.flip(1).cumsum(dim=1).flip(1)[:, 1:]  # at least this threshold
        edges = self.histogram[1].sum()
        scores = 2 * found[1] / (found.sum(dim=0) + edges)
        return torch.where(self.undefined > 0, torch.nan, scores).float()


class EdgeF1(_EdgeCounts):
    """The F1 score at one threshold over all valid pixels, shape ``()``, 0 to 1.

    NaN without any edge, labelled or predicted.

    Args:
        threshold: The least probability of an edge, between 0 and 1.
        logits: Whether predictions are logits, or else probabilities.
        ignore_value: A value of the target that is a missing label, besides NaN.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``threshold`` is out of range, ``ignore_value`` is NaN, or predictions and target differ in
            shape.

    Example:
        >>> metric = EdgeF1(logits=True, ignore_value=255)
        >>> metric.update(torch.tensor([2.0, 1.0, -1.0, 1.0]), torch.tensor([1, 0, 0, 255]))
        >>> metric.compute()
        tensor(0.6667)
    """

    def __init__(
        self, threshold: float = 0.5, *, logits: bool, ignore_value: float | None = None, **kwargs: Any
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"`threshold` should be between 0 and 1. Found {threshold}.")
        super().__init__((threshold,), logits, ignore_value, **kwargs)

    def compute(self) -> Tensor:
        """Return the F1 score."""
        return self._scores()[0]


class OptimalEdgeF1(_EdgeCounts):
    """The F1 score at the best of many thresholds, one for the whole set; shape ``()``, 0 to 1.

    It is to odsF what :class:`EdgeF1` is to the F1 score with a tolerance. NaN without any edge, labelled or predicted.

    Args:
        num_thresholds: The number ``n`` of thresholds ``1 / (n + 1), ..., n / (n + 1)``; 99 by custom.
        logits: Whether predictions are logits, or else probabilities.
        ignore_value: A value of the target that is a missing label, besides NaN.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If ``num_thresholds`` is not positive, ``ignore_value`` is NaN, or predictions and target differ in
            shape.

    Example:
        >>> metric = OptimalEdgeF1(logits=False)
        >>> metric.update(torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([1, 1, 0, 0]))
        >>> metric.compute()
        tensor(1.)
    """

    def __init__(
        self, num_thresholds: int = 99, *, logits: bool, ignore_value: float | None = None, **kwargs: Any
    ) -> None:
        if num_thresholds < 1:
            raise ValueError(f"`num_thresholds` should be at least 1. Found {num_thresholds}.")
        thresholds = [index / (num_thresholds + 1) for index in range(1, num_thresholds + 1)]
        super().__init__(thresholds, logits, ignore_value, **kwargs)

    def compute(self) -> Tensor:
        """Return the best F1 score."""
        scores = self._scores()
        # A threshold that nothing reaches has a score of 0 as soon as an edge is labelled, and none otherwise.
        best = scores.nan_to_num(-1.0).max()
        return torch.where(best < 0, torch.nan, best)
