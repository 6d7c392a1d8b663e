"""Tables of numbers as data sets: splits of rows, and standardisation by the training part alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl_lightning.datamodules.base import Split

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
SplitRule = Literal["grouped", "random", "stored"]


class TableDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Rows as ``(features, {target: value})``, float32, of shapes ``(F,)`` and ``(1,)``.

    Loaders read a whole batch in a few tensor operations, and therefore need ``collate_fn=TableDataset.collate``.

    Args:
        features: The features, shape ``(N, F)``.
        targets: The targets, shape ``(N, T)``; NaN is a missing label.
        names: The ``T`` names of the targets.
    """

    def __init__(self, features: Floats, targets: Floats, names: Sequence[str]) -> None:
        self.features = torch.from_numpy(features).float()
        self.targets = {name: torch.from_numpy(targets[:, [column]]).float() for column, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.features[index], {name: target[index] for name, target in self.targets.items()}

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the batch ``(inputs, targets)`` of the rows at ``indices``: shapes ``(B, F)`` and ``(B, 1)``."""
        rows = torch.tensor(indices)
        return self.features[rows], {name: target[rows] for name, target in self.targets.items()}

    @staticmethod
    def collate(batch: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the batch as ``__getitems__`` made it."""
        return batch


class Scaling(NamedTuple):
    """The mean and the standard deviation of each column, shape ``(C,)``. It maps numbers to ``(x - mean) / std``."""

    mean: Floats
    std: Floats

    @classmethod
    def of(cls, values: Floats) -> Scaling:
        """Return that of ``values``, shape ``(N, C)``, without its NaN. The deviation of a constant column is 1.

        Raises:
            ValueError: If a column has no value.

        Example:
            >>> Scaling.of(np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, 5.0]])).apply(np.array([[3.0, 6.0]])).tolist()
            [[1.0, 1.0]]
        """
        empty = np.isnan(values).all(axis=0)
        if empty.any():
            raise ValueError(
                f"Each column should have a value in the training part. Found none in columns {np.flatnonzero(empty)}."
            )
        mean, std = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        # Rounding gives a constant column a deviation of about 1e-16 times its value, which would make noise of it.
        constant = np.nanmax(values, axis=0) == np.nanmin(values, axis=0)
        return cls(mean, np.where(constant, 1.0, std))

    def apply(self, values: Floats) -> Floats:
        """Return ``values``, shape ``(N, C)``, scaled."""
        return (values - self.mean) / self.std


def one_hot(column: Floats, num_values: int) -> Floats:
    """Return places in ``[0, num_values)``, shape ``(N,)``, as rows of 0 and one 1; a row of NaN where it is NaN.

    Example:
        >>> one_hot(np.array([1.0, np.nan]), 2).tolist()
        [[0.0, 1.0], [nan, nan]]
    """
    rows = np.eye(num_values)[np.nan_to_num(column).astype(np.int64)]
    rows[np.isnan(column)] = np.nan
    return rows


def split_rows(
    features: Floats, fractions: Mapping[Split, float], rule: SplitRule, generator: torch.Generator
) -> dict[Split, Indices]:
    """Return the row numbers of the splits ``"train"``, ``"val"`` and ``"test"``, ascending.

    Args:
        features: The rows that may be equal, shape ``(N, F)``.
        fractions: The shares of ``"val"`` and ``"test"``, of which the nearest number of rows is taken.
        rule: ``"random"`` draws rows. ``"grouped"`` draws groups of rows with equal features, so that none is in two
            splits: a group goes to the test split if it fits there, else to validation if it fits there, else to
            training. ``"stored"`` takes the last rows for the test, those before for validation, as time series need.
        generator: The source of all draws.

    Raises:
        ValueError: If a split would be empty whose share is not 0.
    """
    total = len(features)
    if rule == "stored":
        order = np.arange(total)[::-1]
        groups = [order[row : row + 1] for row in range(total)]
    else:
        keys = np.arange(total) if rule == "random" else _group_numbers(features)
        members = np.split(np.argsort(keys, kind="stable"), np.cumsum(np.bincount(keys))[:-1])
        groups = [members[group] for group in torch.randperm(len(members), generator=generator).tolist()]
    taken: dict[Split, list[Indices]] = {"train": [], "val": [], "test": []}
    left: dict[Split, int] = {"test": round(fractions["test"] * total), "val": round(fractions["val"] * total)}
    for group in groups:
        fitting: list[Split] = [split for split, room in left.items() if len(group) <= room]
        if fitting:
            left[fitting[0]] -= len(group)
        taken[fitting[0] if fitting else "train"].append(group)
    for split, rows in taken.items():
        if not rows and (split == "train" or fractions[split] > 0):
            raise ValueError(
                f"Each split should have a row. Found none for {split!r} with fractions "
                + ", ".join(f"{fraction} ({name})" for name, fraction in fractions.items())
                + f" of {total} rows."
            )
    return {split: np.sort(np.concatenate(rows)) for split, rows in taken.items() if rows}


def _group_numbers(features: Floats) -> Indices:
    """Return the number of each row's group of equal rows, shape ``(N,)``. NaN equals NaN."""
    # Infinity is not among the values, and compares as equal to itself.
    _, inverse = np.unique(np.where(np.isnan(features), np.inf, features), axis=0, return_inverse=True)
    return inverse.reshape(-1)  # of shape (N, 1) in NumPy 2.0
