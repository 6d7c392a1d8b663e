"""A printable account of the data sets of a data module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl_lightning.datamodules.joint_transforms import IGNORE_INDEX

if TYPE_CHECKING:
    from mtl_lightning.datamodules.base import Split

_MOST_CLASSES = 12


def summarize(datasets: Mapping[Split, Dataset[Any] | None], num_samples: int = 32) -> str:
    """Return a text: the sizes of the splits, and of ``num_samples`` of each what inputs and labels look like.

    The samples are drawn from the split, always the same ones. Of each tensor it says shape, dtype, range and share of
    missing values, and of integers, which are class labels, the share of each class.

    Args:
        datasets: Data sets of ``(input, {task: label})``, by split; None for a split that is left out.
        num_samples: The greatest number of samples to read from each split.

    Example:
        >>> samples = [(torch.zeros(2), {"kind": torch.tensor(1)}), (torch.ones(2), {"kind": torch.tensor(-1)})]
        >>> print(summarize({"train": samples, "val": None}))
        train: 2 samples, 2 of them read
          inputs: (2,) float32, 0 to 1
          kind: () int64, 1 to 1, 50.0 % missing, shares of classes 1: 1.000
        val: none
    """
    lines = []
    for split, dataset in datasets.items():
        if dataset is None:
            lines.append(f"{split}: none")
            continue
        total = len(dataset)  # type: ignore[arg-type]
        count = min(num_samples, total)
        # Not at even distances: where the tasks take turns, these would all be of the same one.
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values
        samples = [dataset[index] for index in drawn.tolist()]
        lines.append(f"{split}: {total:,} samples, {count} of them read")
        lines.append("  inputs: " + _describe([inputs for inputs, _ in samples], is_label=False))
        lines += [
            f"  {task}: " + _describe([targets[task] for _, targets in samples], is_label=True)
            for task in samples[0][1]
        ]
    return "\n".join(lines)


def _describe(tensors: list[Tensor], is_label: bool) -> str:
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    values = torch.cat([tensor.flatten() for tensor in tensors])
    floating = values.is_floating_point()
    valid = values[~values.isnan()] if floating else values[values != IGNORE_INDEX] if is_label else values
    text = " or ".join(map(str, shapes)) + f" {str(values.dtype).removeprefix('torch.')}"
    if len(valid):
        text += f", {valid.min().item():.4g} to {valid.max().item():.4g}"
    if len(valid) < len(values):
        text += f", {100 * (1 - len(valid) / len(values)):.1f} % missing"
    if is_label and not floating and len(valid):
        classes, counts = torch.unique(valid, return_counts=True)
        shares = [f"{kind}: {count / len(valid):.3f}" for kind, count in zip(classes.tolist(), counts, strict=True)]
        text += ", shares of classes " + ", ".join(shares[:_MOST_CLASSES]) + ", ..." * (len(shares) > _MOST_CLASSES)
    return text
