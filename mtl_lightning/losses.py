"""Losses for dense prediction with missing labels: means over the elements that have one.

NaN in a real-valued target is a missing label, always; ``ignore_value`` names one value more, such as 0 for depth or
255 for padding. Class indices are missing where they equal ``ignore_index``. All losses share these properties:

- They are means over ``valid(target)``, so that means over batches, weighted by ``valid(target).sum()``, are the mean
  over all elements. Class weights and ``BalancedBCELoss(positive_weight=None)`` are the exceptions.
- Without any valid element the value and all gradients are zero.
- What predictions and targets hold at missing elements, NaN and infinity included, changes nothing.
- They compute in float32 at least, also on half precision, and never wait for the device.

References:
    - Eigen, Fergus: Predicting Depth, Surface Normals and Semantic Labels with a Common Multi-Scale Convolutional
      Architecture (2015), arXiv:1411.4734.
    - Xie, Tu: Holistically-Nested Edge Detection (2015), arXiv:1504.06375.
    - Ye, Xu: Inverted Pyramid Multi-task Transformer for Dense Scene Understanding (2022), arXiv:2203.07997.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the field's name for it

from mtl_lightning.population import UserInputError

# Shorter vectors have no direction worth following: the gradient of the direction grows as one over the length.
_SHORTEST = 1e-6


def valid_elements(target: Tensor, ignore_value: float | None = None) -> Tensor:
    """Return where ``target`` is a label, bool, same shape: not NaN and not ``ignore_value``.

    The comparison is in float32 at least, so 255 and -1 may be looked for in any integer type.

    Example:
        >>> valid_elements(torch.tensor([0.0, 1.5, torch.nan]), ignore_value=0.0)
        tensor([False,  True, False])
    """
    target = full_precision(target)
    valid = ~target.isnan()
    return valid if ignore_value is None else valid & (target != ignore_value)


def valid_normals(target: Tensor, ignore_value: float | None = None) -> Tensor:
    """Return where ``target``, shape ``(B, C, ...)``, holds a direction; bool, shape ``(B, ...)``.

    Not where a component is NaN, where all are zero, or where all equal ``ignore_value``.

    Example:
        >>> valid_normals(torch.tensor([[1.0, -1.0], [0.0, 0.0], [255.0, 255.0]]), ignore_value=255)
        tensor([ True, False, False])
    """
    target = full_precision(target)
    valid = ~target.isnan().any(dim=1) & (target != 0).any(dim=1)  # not the sum, in which components cancel
    return valid if ignore_value is None else valid & (target != ignore_value).any(dim=1)


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of ``values`` over ``valid``, both of shape ``(...)``, as shape ``()``; 0 if nothing is valid.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp_min(1)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Return ``vectors``, shape ``(B, C, ...)``, scaled to length one along the channels; zero remains zero.

    Lengths under 1e-6 count as 1e-6, which bounds the gradient.

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return vectors * vectors.square().sum(dim=1, keepdim=True).clamp_min(_SHORTEST**2).rsqrt()


def full_precision(values: Tensor) -> Tensor:
    """Return ``values`` in float32, or unchanged in float64.

    Example:
        >>> full_precision(torch.tensor([1, 0], dtype=torch.uint8))
        tensor([1., 0.])
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


class MaskedCrossEntropyLoss(nn.Module):
    """The mean cross entropy of logits ``(B, C, ...)`` and class indices ``(B, ...)`` of any integer type.

    It differs from ``torch.nn.CrossEntropyLoss`` in that it is zero, not NaN, without labels, that logits at missing
    labels may be anything, and that unsigned and short integers serve as well.

    Args:
        ignore_index: The index of missing labels.
        weight: One weight per class, shape ``(C,)``. The loss is then divided by the sum of the weights of the labels,
            as in ``torch.nn``, and not by ``valid(target).sum()``: means over batches are then approximate.
        label_smoothing: The share of the target distribution that is spread over all classes, from 0 to 1.

    Raises:
        ValueError: If ``label_smoothing`` is out of range, or shapes do not match.
        TypeError: If the target is no integer tensor.
        IndexError: If an index is neither that of a class nor missing, on a CPU. On CUDA that is an assertion of the
            device, after which the process has to end.

    Example:
        >>> loss = MaskedCrossEntropyLoss(ignore_index=255)
        >>> target = torch.tensor([[0, 255]], dtype=torch.uint8)
        >>> loss(torch.zeros(1, 4, 2), target), loss.valid(target).sum()
        (tensor(1.3863), tensor(1))
    """

    weight: Tensor | None

    def __init__(
        self, ignore_index: int = -100, weight: Sequence[float] | Tensor | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` should be from 0 to 1. Found {label_smoothing}.")
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        # A copy: the caller's tensor stays the caller's.
        given = None if weight is None else torch.as_tensor(weight, dtype=torch.float32).detach().clone()
        self.register_buffer("weight", given, persistent=False)

    def valid(self, target: Tensor) -> Tensor:
        """Return where ``target``, shape ``(B, ...)``, is a label; bool, same shape."""
        return target.long() != self.ignore_index  # unsigned integers wrap around at a negative index

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape ``()``."""
        if target.is_floating_point():
            raise TypeError(f"`target` should hold class indices, an integer tensor. Found {target.dtype}.")
        if preds.ndim != target.ndim + 1 or preds.shape[:1] + preds.shape[2:] != target.shape:
            raise UserInputError(
                "`preds` should have shape (B, C, ...) and `target` shape (B, ...). "
                f"Found {tuple(preds.shape)} and {tuple(target.shape)}."
            )
        valid = self.valid(target)
        logits = torch.where(valid.unsqueeze(1), full_precision(preds), 0.0)
        indices = torch.where(valid, target.long(), 0)
        if torch.are_deterministic_algorithms_enabled():
            # For maps torch has no deterministic CUDA kernel. Rows take four times as long on a CPU.
            logits = logits.movedim(1, -1).reshape(-1, preds.shape[1])
            indices, valid = indices.reshape(-1), valid.reshape(-1)
        weight = None if self.weight is None else self.weight.to(logits.dtype)
        # Our own index is handed on so that torch refuses its default, -100, where that means nothing here.
        losses = F.cross_entropy(
            logits,
            indices,
            weight,
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        if weight is None:
            return masked_mean(losses, valid)
        total = torch.where(valid, weight[indices], 0.0).sum()
        return torch.where(valid, losses, 0.0).sum() / torch.where(total > 0, total, 1.0)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"


class _MaskedLoss(nn.Module):
    """What the losses of real-valued targets share: which elements are valid, and inputs that are safe elsewhere."""

    def __init__(self, ignore_value: float | None = None) -> None:
        super().__init__()
        if ignore_value is not None and isnan(ignore_value):
            raise ValueError("`ignore_value` should be a number or None, since NaN is missing anyway. Found NaN.")
        self.ignore_value = ignore_value

    def valid(self, target: Tensor) -> Tensor:
        """Return where ``target`` is a label; bool, same shape."""
        return valid_elements(target, self.ignore_value)

    def extra_repr(self) -> str:
        """Return the settings."""
        return "" if self.ignore_value is None else f"ignore_value={self.ignore_value}"

    def _prepared(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return predictions and target, float32 and zero where not valid, and where they are valid."""
        # A loss that broadcasts (B, 1, H, W) against (B, H, W) trains on nonsense without a word.
        if preds.shape != target.shape:
            raise UserInputError(
                "`preds` and `target` should have the same shape; resize or squeeze one of them. "
                f"Found {tuple(preds.shape)} and {tuple(target.shape)}."
            )
        valid = self.valid(target)
        mask = valid if valid.ndim == target.ndim else valid.unsqueeze(1)
        # Before any computation: where() after it would still multiply infinite derivatives by zero.
        return torch.where(mask, full_precision(preds), 0.0), torch.where(mask, full_precision(target), 0.0), valid


class MaskedL1Loss(_MaskedLoss):
    """The mean absolute error over valid elements, for example of depth.

    Args:
        ignore_value: A value of the target that is a missing label, besides NaN.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> loss = MaskedL1Loss(ignore_value=0.0)
        >>> loss(torch.tensor([1.0, 2.0, 7.0]), torch.tensor([2.0, 4.0, 0.0]))
        tensor(1.5000)
    """

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape ``()``, of predictions and target of any one shape."""
        preds, target, valid = self._prepared(preds, target)
        return masked_mean((preds - target).abs(), valid)


class MaskedMSELoss(_MaskedLoss):
    """The mean squared error over valid elements, for example of curvature.

    Args:
        ignore_value: A value of the target that is a missing label, besides NaN.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> MaskedMSELoss()(torch.tensor([1.0, 2.0]), torch.tensor([3.0, torch.nan]))
        tensor(4.)
    """

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape ``()``, of predictions and target of any one shape."""
        preds, target, valid = self._prepared(preds, target)
        return masked_mean((preds - target).square(), valid)


class _NormalLoss(_MaskedLoss):
    """What the losses of surface normals share: a label is a pixel, and both sides are scaled to length one."""

    def valid(self, target: Tensor) -> Tensor:
        """Return where ``target``, shape ``(B, C, ...)``, holds a direction; bool, shape ``(B, ...)``."""
        return valid_normals(target, self.ignore_value)

    def _directions(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        preds, target, valid = self._prepared(preds, target)
        return unit_vectors(preds), unit_vectors(target), valid


class CosineNormalLoss(_NormalLoss):
    """One minus the mean cosine between predicted and labelled normals, ``(B, C, ...)``, over valid pixels; 0 to 2.

    Both sides are scaled to length one, since resizing shortens normals. A target of length zero is missing. The
    prediction zero has cosine zero.

    Args:
        ignore_value: A target with this value in all channels is a missing label, besides NaN and zero.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> preds = torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
        >>> CosineNormalLoss()(preds, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
        tensor(0.5000)
    """

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape ``()``, of predictions and target of shape ``(B, C, ...)``."""
        preds, target, valid = self._directions(preds, target)
        return masked_mean(1 - (preds * target).sum(dim=1), valid)


class L1NormalLoss(_NormalLoss):
    """The absolute error of unit normals, ``(B, C, ...)``, summed over channels, as mean over valid pixels.

    Both sides are scaled to length one, unlike in InvPT, which scales the prediction alone.

    Args:
        ignore_value: A target with this value in all channels is a missing label, besides NaN and zero.

    Raises:
        ValueError: If ``ignore_value`` is NaN, or predictions and target differ in shape.

    Example:
        >>> preds = torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
        >>> L1NormalLoss()(preds, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
        tensor(1.)
    """

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape ``()``, of predictions and target of shape ``(B, C, ...)``."""
        preds, target, valid = self._directions(preds, target)
        return masked_mean((preds - target).abs().sum(dim=1), valid)


class BalancedBCELoss(_MaskedLoss):
    """The mean of ``p y softplus(-x) + (1 - p) (1 - y) softplus(x)`` of logits ``x`` and labels ``y``, for edges.

    With ``p = 0.95`` it is the edge loss of InvPT, whose "pos_weight 0.95" is this share, not the factor on positives
    alone of ``torch.nn.BCEWithLogitsLoss(pos_weight=...)``. ``p = 0.5`` is half the plain binary cross entropy.

    Args:
        positive_weight: The weight ``p`` of positive labels, between 0 and 1; negatives weigh ``1 - p``. None
            stands for the share of negatives among the labels of the batch (HED), for saliency: means over batches are
            then approximate.
        ignore_value: A value of the target that is a missing label, besides NaN.

    Raises:
        ValueError: If ``positive_weight`` is out of range, ``ignore_value`` is NaN, or predictions and target differ in
            shape.

    Example:
        >>> loss = BalancedBCELoss(positive_weight=0.95, ignore_value=255)
        >>> loss(torch.zeros(3), torch.tensor([1, 0, 255]))  # log(2) / 2
        tensor(0.3466)
    """

    def __init__(self, positive_weight: float | None = 0.95, ignore_value: float | None = None) -> None:
        super().__init__(ignore_value)
        if positive_weight is not None and not 0 < positive_weight < 1:
            raise ValueError(f"`positive_weight` should be between 0 and 1, or None. Found {positive_weight}.")
        self.positive_weight = positive_weight

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape ``()``, of logits and labels from 0 to 1 of any one shape."""
        preds, target, valid = self._prepared(preds, target)
        # 1 - y, as target is zero where it is not valid and the mean leaves those out.
        positive = masked_mean(1 - target, valid) if self.positive_weight is None else self.positive_weight
        losses = positive * target * F.softplus(-preds) + (1 - positive) * (1 - target) * F.softplus(preds)
        return masked_mean(losses, valid)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"positive_weight={self.positive_weight}, ignore_value={self.ignore_value}"
