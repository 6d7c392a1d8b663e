from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mtl_lightning.datamodules.tabular import Scaling, TableDataset, one_hot, split_rows

RNG = np.random.default_rng(0)


def _split(features: Any, rule: Any = "grouped", val: float = 0.2, test: float = 0.3, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows = split_rows(np.asarray(features, dtype=float), {"val": val, "test": test}, rule, generator)
    return {str(split): numbers for split, numbers in rows.items()}


def test_rows_are_those_of_the_table() -> None:
    features, targets = RNG.random((5, 3)), RNG.random((5, 2))
    dataset = TableDataset(features, targets, ["a", "b"])
    inputs, labels = TableDataset.collate(dataset.__getitems__([4, 0]))
    assert torch.equal(inputs, torch.tensor(features[[4, 0]]).float())
    assert torch.equal(labels["b"], torch.tensor(targets[[4, 0], 1:]).float())
    single, label = dataset[4]
    assert torch.equal(single, inputs[0])
    assert torch.equal(label["a"], labels["a"][0])


def test_scaled_columns_have_mean_zero_and_deviation_one_without_missing_values() -> None:
    values = RNG.normal(50, 3, (40, 3))
    values[::4, 1] = np.nan
    scaled = Scaling.of(values).apply(values)
    assert np.allclose(np.nanmean(scaled, axis=0), 0)
    assert np.allclose(np.nanstd(scaled, axis=0), 1)
    assert np.array_equal(np.isnan(scaled), np.isnan(values))


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9 + 0.1])
def test_a_constant_column_becomes_zero(constant: float) -> None:
    values = np.full((7, 1), constant)
    assert np.abs(Scaling.of(values).apply(values)).max() < 1e-6


def test_a_column_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Found none in columns \[1\]"):
        Scaling.of(np.array([[1.0, np.nan], [2.0, np.nan]]))


def test_one_hot_rows_have_a_single_one_at_the_place() -> None:
    rows = one_hot(np.array([2.0, 0.0, np.nan]), 3)
    assert rows[:2].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert np.isnan(rows[2]).all()


@pytest.mark.parametrize("rule", ["grouped", "random", "stored"])
def test_splits_are_disjoint_and_lose_no_row(rule: str) -> None:
    rows = _split(RNG.random((50, 2)), rule)
    assert sorted(np.concatenate(list(rows.values()))) == list(range(50))
    assert [len(rows[split]) for split in ("train", "val", "test")] == [25, 10, 15]


@pytest.mark.parametrize("seed", range(5))
def test_equal_rows_are_in_one_split(seed: int) -> None:
    features = RNG.integers(0, 4, (60, 2)).astype(float)
    features[features == 3] = np.nan  # which is unequal to itself
    sides = [{str(row) for row in features[rows]} for rows in _split(features, seed=seed).values()]
    assert len(set.union(*sides)) == sum(map(len, sides))


def test_a_random_split_would_part_equal_rows() -> None:
    features = RNG.integers(0, 3, (60, 2)).astype(float)
    sides = [{str(row) for row in features[rows]} for rows in _split(features, "random").values()]
    assert len(set.union(*sides)) < sum(map(len, sides))


def test_stored_rows_keep_their_order_in_time() -> None:
    rows = _split(np.zeros((10, 1)), "stored")
    assert [rows[split].tolist() for split in ("train", "val", "test")] == [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]


def test_the_seed_decides() -> None:
    features = RNG.random((50, 2))
    first, same, other = (_split(features, seed=seed)["test"].tolist() for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_a_share_of_zero_leaves_the_split_out() -> None:
    assert set(_split(RNG.random((10, 2)), val=0.0)) == {"train", "test"}


@pytest.mark.parametrize(
    ("features", "split"), [(np.arange(2)[:, None], "val"), (np.zeros((9, 1)), "val"), (np.zeros((0, 1)), "train")]
)
def test_an_empty_split_is_refused(features: Any, split: str) -> None:
    with pytest.raises(ValueError, match=rf"Found none for '{split}' with fractions 0\.2 \(val\), 0\.3 \(test\)"):
        _split(features)
