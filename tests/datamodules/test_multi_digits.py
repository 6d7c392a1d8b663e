from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from sklearn.datasets import load_digits

from mtl_lightning.datamodules import MultiDigitsDataModule
from mtl_lightning.datamodules.base import Split
from mtl_lightning.datamodules.overlap import OverlappingPairs

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def _datamodule(**options: Any) -> MultiDigitsDataModule:
    datamodule = MultiDigitsDataModule(**({"num_train": 500, "num_val": 200, "num_test": 200} | options))
    datamodule.setup()
    return datamodule


def _pairs(datamodule: MultiDigitsDataModule, split: Split) -> OverlappingPairs:
    pairs = datamodule.datasets[split]
    assert isinstance(pairs, OverlappingPairs)
    return pairs


def _images(datamodule: MultiDigitsDataModule, split: Split) -> torch.Tensor:
    pairs = _pairs(datamodule, split)
    return pairs.__getitems__(list(range(len(pairs))))[0]


def test_the_splits_share_no_digit_and_lose_none() -> None:
    datamodule = _datamodule()
    digits = [_pairs(datamodule, split).left for split in SPLITS]
    assert [len(part.labels) for part in digits] == [1078, 269, 450]
    # The digits of scikit-learn are distinct, so that their pixels name them.
    found = sorted(
        [*image.flatten().tolist(), int(label)] for part in digits for image, label in zip(*part, strict=True)
    )
    data = load_digits()
    assert found == sorted([*image, int(label)] for image, label in zip(data.data.tolist(), data.target, strict=True))
    assert len({tuple(row) for row in found}) == 1797


def test_both_sides_are_drawn_from_the_split() -> None:
    datamodule = _datamodule()
    assert all(_pairs(datamodule, split).left is _pairs(datamodule, split).right for split in SPLITS)


def test_a_digit_is_labelled_by_what_it_shows() -> None:
    data = load_digits()
    label = {tuple(image): int(target) for image, target in zip(data.data.tolist(), data.target, strict=True)}
    inputs, targets = _pairs(_datamodule(offset=8), "val").__getitems__(list(range(200)))
    pixels = (inputs.squeeze(1) * 16).round()
    for corner, task in ((pixels[:, :8, :8], "left"), (pixels[:, 8:, 8:], "right")):
        assert [label[tuple(image.flatten().tolist())] for image in corner] == targets[task].tolist()


@pytest.mark.parametrize("offset", [0, 2, 6, 10])
def test_the_image_grows_with_the_offset(offset: int) -> None:
    images = _images(_datamodule(offset=offset), "train")
    assert images.shape == (500, 1, 8 + offset, 8 + offset)
    assert [images.min().item(), images.max().item()] == [0, 1]


def test_the_defaults_are_those_of_the_documentation() -> None:
    datamodule = MultiDigitsDataModule()
    datamodule.setup()
    assert [len(_pairs(datamodule, split)) for split in SPLITS] == [12_000, 3_000, 3_000]
    assert _pairs(datamodule, "train")[0][0].shape == (1, 10, 10)


@pytest.mark.parametrize("split", SPLITS)
def test_the_seed_decides(split: Split) -> None:
    first, same, other = (_images(_datamodule(seed=seed), split) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_test_digits_do_not_depend_on_the_seed() -> None:
    first, other = (_pairs(_datamodule(seed=seed), "test") for seed in (1, 2))
    assert torch.equal(first.left.images, other.left.images)


def test_validation_and_test_do_not_depend_on_the_number_of_training_pairs() -> None:
    first, other = _datamodule(num_train=10), _datamodule(num_train=100)
    for split in ("val", "test"):
        assert torch.equal(_images(first, split), _images(other, split))


def test_the_splits_are_drawn_differently() -> None:
    datamodule = _datamodule(val_fraction=450 / 1347)  # as many digits as for the test, so that equal draws would show
    val, test = _pairs(datamodule, "val"), _pairs(datamodule, "test")
    assert len(val.left.labels) == len(test.left.labels)
    assert not torch.equal(val.indices, test.indices)


def test_without_a_fraction_there_is_no_validation() -> None:
    datamodule = _datamodule(val_fraction=0.0)
    assert datamodule.val_dataloader() == []
    assert len(_pairs(datamodule, "train").left.labels) == 1347


def test_arguments_can_be_given_on_the_command_line() -> None:
    arguments = ["--data.offset=3", "--data.val_fraction=0.5", "--data.num_train=7", "--data.seed=4"]
    datamodule = LightningCLI(BoringModel, MultiDigitsDataModule, args=arguments, run=False).datamodule
    assert (datamodule.offset, datamodule.val_fraction, datamodule.num_train, datamodule.seed) == (3, 0.5, 7, 4)


# Bad input


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("offset", -1, r"should be at least 0\. Found -1"),
        ("num_train", 0, r"should be at least 1\. Found 0"),
        ("num_val", 0, r"should be at least 1\. Found 0"),
        ("num_test", -5, r"should be at least 1\. Found -5"),
        ("val_fraction", 1.0, r"should be in \[0, 1\)\. Found 1\.0"),
        ("batch_size", 0, r"should be at least 1\. Found 0"),
        ("num_workers", -1, r"should be at least 0\. Found -1"),
        ("seed", -1, r"should be at least 0\. Found -1"),
    ],
)
def test_an_argument_out_of_range_is_refused(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        MultiDigitsDataModule(**{name: value})  # type: ignore[arg-type]


def test_a_fraction_that_leaves_no_digit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one glyph in each part\. Found 0\.0001 of 1347"):
        _datamodule(val_fraction=1e-4)
