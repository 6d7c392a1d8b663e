from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mtl_lightning.datamodules import MultiDigitsDataModule, ScenesDataModule
from mtl_lightning.datamodules.base import SplitDataModule, check_at_least, check_fraction
from mtl_lightning.datamodules.loading import ResumableDataLoader


class _Numbers(SplitDataModule):
    """0 to 9 for training, 10 to 14 for validation, 15 to 19 for test."""

    def __init__(self, batch_size: int = 4, num_workers: int = 0, seed: int = 0, validate: bool = True) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.validate = validate

    def setup(self, stage: str | None = None) -> None:
        self.datasets["train"] = TensorDataset(torch.arange(10))
        self.datasets["val"] = TensorDataset(torch.arange(10, 15)) if self.validate else None
        self.datasets["test"] = TensorDataset(torch.arange(15, 20))


class _Reader(LightningModule):
    """Records the samples of each kind of step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen["train"].append(batch[0].tolist())
        return self.layer(batch[0][:, None].float()).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen["val"].append(batch[0].tolist())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen["test"].append(batch[0].tolist())

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return batch[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class _CountingReader(_Reader):
    """Checks, on both ranks, how often each sample of a split was read."""

    def _counts(self, split: str, samples: range) -> list[int]:
        counts = torch.zeros(samples.stop, dtype=torch.int64)
        for index in (index for batch in self.seen[split] for index in batch):
            counts[index] += 1
        gathered = self.all_gather(counts)
        assert isinstance(gathered, Tensor)
        return gathered.sum(0)[samples.start :].tolist()

    def on_train_epoch_end(self) -> None:
        assert self._counts("train", range(10)) == [1] * 10

    def on_test_epoch_end(self) -> None:
        assert self._counts("test", range(15, 20)) == [1] * 5


def _trainer(**options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "num_sanity_val_steps": 0, **quiet}
    return Trainer(**(defaults | options))


def test_training_shuffles_and_the_other_splits_are_read_in_order() -> None:
    module, trainer = _Reader(), _trainer()
    trainer.fit(module, datamodule=_Numbers())
    trainer.test(module, datamodule=_Numbers())
    epochs = [list(itertools.chain(*module.seen["train"][start : start + 3])) for start in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert module.seen["val"] == [[10, 11, 12, 13], [14]] * 2
    assert module.seen["test"] == [[15, 16, 17, 18], [19]]


def test_prediction_reads_the_test_split() -> None:
    predictions: Any = _trainer().predict(_Reader(), datamodule=_Numbers())
    assert [batch.tolist() for batch in predictions] == [[15, 16, 17, 18], [19]]


def test_the_seed_decides_the_order() -> None:
    def first_epoch(seed: int) -> list[list[int]]:
        datamodule = _Numbers(seed=seed)
        datamodule.setup()
        loader: Any = datamodule.train_dataloader()
        return [batch[0].tolist() for batch in loader]

    assert first_epoch(1) == first_epoch(1)
    assert first_epoch(1) != first_epoch(2)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_no_loader_draws_from_the_global_generator(split: Any, num_workers: int) -> None:
    datamodule = _Numbers(num_workers=num_workers)
    datamodule.setup()
    before = torch.get_rng_state()
    assert len(list(datamodule.dataloader(split))) > 1
    assert torch.equal(torch.get_rng_state(), before)


def test_named_generators_are_independent_and_repeat() -> None:
    def draw(seed: int, *key: str) -> list[float]:
        return torch.rand(3, generator=_Numbers(seed=seed).generator(*key)).tolist()

    assert draw(0, "pairs", "train") == draw(0, "pairs", "train")
    assert len({tuple(draws) for draws in (draw(0, "train"), draw(0, "val"), draw(1, "train"))}) == 3


def test_a_split_that_is_left_out_is_skipped() -> None:
    module = _Reader()
    _trainer().fit(module, datamodule=_Numbers(validate=False))
    assert len(module.seen["train"]) == 6
    assert module.seen["val"] == []


def test_overfitting_takes_the_same_batches_in_every_epoch() -> None:
    module = _Reader()
    _trainer(overfit_batches=2).fit(module, datamodule=_Numbers())
    assert module.seen["train"] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


def test_two_processes_read_every_sample_once() -> None:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    trainer = _trainer(devices=2, strategy=strategy, max_epochs=1)
    module = _CountingReader()
    trainer.fit(module, datamodule=_Numbers(batch_size=2))
    trainer.test(module, datamodule=_Numbers(batch_size=2))


def test_only_training_has_a_state() -> None:
    datamodule = _Numbers()
    datamodule.setup()
    assert isinstance(datamodule.train_dataloader(), ResumableDataLoader)
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader(), datamodule.predict_dataloader()):
        assert isinstance(loader, DataLoader)
        assert not hasattr(loader, "state_dict")


# Bad input


@pytest.mark.parametrize(("name", "value", "minimum"), [("batch_size", 0, 1), ("num_workers", -1, 0), ("seed", -1, 0)])
def test_an_option_below_its_minimum_is_refused(name: str, value: int, minimum: int) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` should be at least {minimum}\. Found {value}\."):
        _Numbers(**{name: value})  # type: ignore[arg-type]


def test_a_loader_before_setup_is_refused() -> None:
    with pytest.raises(RuntimeError, match="`setup` should be called before the loader of split 'val'"):
        _Numbers().val_dataloader()


def test_a_summary_before_setup_is_refused() -> None:
    with pytest.raises(RuntimeError, match="`setup` should be called before `summary`"):
        MultiDigitsDataModule().summary()


@pytest.mark.parametrize(
    ("datamodule", "expected"),
    [
        (
            MultiDigitsDataModule(num_train=8),
            ["train: 8 samples, 5 of them read", "inputs: (1, 10, 10)", "left: () int64"],
        ),
        (
            ScenesDataModule(tasks=["normal"], size=32, num_train=3, num_val=1, num_test=0, cache_dir=None),
            ["train: 3 samples, 3 of them read", "normal: (3, 32, 32) float32", "test: none"],
        ),
    ],
    ids=["digits", "scenes"],
)
def test_every_data_module_has_a_summary(datamodule: SplitDataModule, expected: list[str]) -> None:
    datamodule.setup("fit")
    text = datamodule.summary(num_samples=5)
    assert [part for part in expected if part not in text] == []


def test_the_minimum_itself_is_accepted() -> None:
    check_at_least("offset", 3, 3)
    with pytest.raises(ValueError, match=r"`offset` should be at least 3\. Found 2"):
        check_at_least("offset", 2, 3)


@pytest.mark.parametrize("value", [-0.1, 1.0, 10, float("nan")])
def test_a_fraction_out_of_range_is_refused(value: float) -> None:
    check_fraction("val_fraction", 0)
    with pytest.raises(ValueError, match=rf"`val_fraction` should be in \[0, 1\)\. Found {value}"):
        check_fraction("val_fraction", value)
