from __future__ import annotations

import torch

from mtl_lightning.datamodules.summaries import summarize


def test_ranges_missing_values_and_class_shares_are_counted() -> None:
    samples = [
        (torch.full((3, 2), float(index)), {"kind": torch.tensor(kind), "depth": torch.tensor([value, 1.0])})
        for index, (kind, value) in enumerate([(2, 4.0), (2, torch.nan), (5, 0.5), (-1, torch.nan)])
    ]
    text = summarize({"train": samples, "val": None})  # type: ignore[dict-item]
    assert text.splitlines() == [
        "train: 4 samples, 4 of them read",
        "  inputs: (3, 2) float32, 0 to 3",
        "  kind: () int64, 2 to 5, 25.0 % missing, shares of classes 2: 0.667, 5: 0.333",
        "  depth: (2,) float32, 0.5 to 4, 25.0 % missing",
        "val: none",
    ]


def test_where_tasks_take_turns_labels_of_all_are_seen() -> None:
    # As in a set with one data set per task: at even distances, only one task would be seen.
    samples = [
        (torch.zeros(1), {str(task): torch.tensor(0 if index % 20 == task else -1) for task in range(20)})
        for index in range(4000)
    ]
    assert "100.0 % missing" not in summarize({"train": samples}, 200)  # type: ignore[dict-item]


def test_labels_that_are_all_missing_have_no_range() -> None:
    assert "a: () int64, 100.0 % missing" in summarize({"test": [(torch.zeros(1), {"a": torch.tensor(-1)})]})  # type: ignore[dict-item]
