"""What the data modules share: checked options and one method that builds the loader of a split."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, Literal, cast

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from mtl_lightning.datamodules.loading import EpochSampler, ResumableDataLoader, derive_seed
from mtl_lightning.datamodules.summaries import summarize

Split = Literal["train", "val", "test"]


def check_at_least(name: str, value: int, minimum: int) -> None:
    """Raise a ``ValueError`` if ``value``, the argument ``name``, is less than ``minimum``."""
    if value < minimum:
        raise ValueError(f"`{name}` should be at least {minimum}. Found {value}.")


def check_fraction(name: str, value: float) -> None:
    """Raise a ``ValueError`` if ``value``, the argument ``name``, is not in ``[0, 1)``."""
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` should be in [0, 1). Found {value}.")


class SplitDataModule(LightningDataModule):
    """A data module of at most three map-style data sets, which the subclass assigns to ``datasets`` in ``setup``.

    Training batches are shuffled by seed and epoch, and resume in the middle of an epoch. The other splits are read in
    order, every sample once, also over several ranks; ranks can then differ by one batch. Prediction reads the test
    split.

    Args:
        batch_size: The number of samples per batch and rank.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the order of the training samples.
        collate_fn: Makes a batch of what the data sets return.

    Attributes:
        datasets: The data set of each split; ``None`` for a split that is left out.

    Raises:
        ValueError: If ``batch_size`` is less than 1, ``num_workers`` or ``seed`` less than 0.
    """

    def __init__(
        self, *, batch_size: int, num_workers: int, seed: int, collate_fn: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("num_workers", num_workers, 0)
        check_at_least("seed", seed, 0)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.collate_fn = collate_fn
        self.datasets: dict[Split, Dataset[Any] | None] = {}

    def generator(self, *key: str) -> torch.Generator:
        """Return a new generator for the draws called ``key``, seeded by ``seed`` and independent of all other keys."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *key))

    def summary(self, num_samples: int = 32) -> str:
        """Return a text on sizes, shapes, ranges, shares of missing values and of classes, over some samples per split.

        What is read is what a batch holds: resized, normalised and, in training, augmented.

        Args:
            num_samples: How many samples of each split are read.

        Raises:
            RuntimeError: If ``setup`` has not been called.
        """
        if not self.datasets:
            raise RuntimeError("`setup` should be called before `summary`.")
        return summarize(self.datasets, num_samples)

    def dataloader(self, split: Split) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loader of ``split``; no loader, as an empty list, if the split is left out.

        Raises:
            RuntimeError: If ``setup`` has not yet made that split.
        """
        if split not in self.datasets:
            raise RuntimeError(f"`setup` should be called before the loader of split {split!r} is asked for.")
        dataset = self.datasets[split]
        if dataset is None:
            return []
        pin_memory = torch.cuda.is_available()
        # The strategy knows which ranks share the data: with model parallelism not all of them do.
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}
        # Lightning sets this attribute from another class, so that mypy does not see it.
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler: Sampler[int]
        if overfit:
            # The same batches in every epoch; Lightning insists on this sampler for it.
            sampler = SequentialSampler(cast("Sized", dataset))
        elif split == "train":
            return ResumableDataLoader(
                dataset,
                self.train_sampler(cast("Sized", dataset), **ranks),
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                collate_fn=self.collate_fn,
                pin_memory=pin_memory,
            )
        else:
            sampler = EpochSampler(cast("Sized", dataset), shuffle=False, remainder="keep", **ranks)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=pin_memory,
            generator=self.generator("workers", split),
        )

    def train_sampler(self, dataset: Sized, *, num_replicas: int, rank: int) -> EpochSampler:
        """Return the order of the training samples; ``EpochIndexSampler`` for a data set that has to know the epoch."""
        return EpochSampler(dataset, seed=self.seed, num_replicas=num_replicas, rank=rank)

    def train_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loader of the training split."""
        return self.dataloader("train")

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loader of the validation split."""
        return self.dataloader("val")

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loader of the test split."""
        return self.dataloader("test")

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loader of the test split."""
        return self.dataloader("test")
