"""Sample order and loading that repeat, on any number of ranks, and that go on where a stopped run left off."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sized
from typing import Any, Literal, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

T_co = TypeVar("T_co", covariant=True)


def derive_seed(*key: int | str) -> int:
    """Return a seed in ``[0, 2**63)`` that depends on every part of ``key``.

    Sums such as ``seed + epoch`` give seed 0 in its second epoch the order of seed 1 in its first. A digest does not.
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


class EpochSampler(DistributedSampler[int]):
    """The indices of one rank, in an order that depends on the seed and the epoch only.

    Rank ``r`` of ``W`` takes every ``W``-th index from the ``r``-th on. Batches of ``B`` on each rank hold together the
    samples of the batch of ``W * B`` on one process. It is a ``DistributedSampler`` because Lightning would replace
    any other by its own, which shuffles in another order.

    Args:
        dataset: The map-style data set, of known length.
        shuffle: Whether each epoch is a new permutation, or the order of the data set.
        seed: The seed of the permutations.
        num_replicas: The number ``W`` of ranks that share the data.
        rank: The rank, in ``[0, W)``.
        remainder: What becomes of samples that ``W`` ranks cannot share evenly. ``"repeat"``: the first ones of the
            epoch fill the gap, so that all ranks make the same number of steps. ``"drop"``: they are left out.
            ``"keep"``: nothing is repeated or left out, and some ranks get one sample more, as exact evaluation needs.

    Attributes:
        epoch: The epoch, as ``set_epoch`` last put it.
        start: How many samples of the epoch, over all ranks, the next pass leaves out.

    Raises:
        ValueError: If the data set is empty, or the rank is not in ``[0, W)``.

    Example:
        >>> [list(EpochSampler(range(5), shuffle=False, num_replicas=2, rank=rank)) for rank in (0, 1)]
        [[0, 2, 4], [1, 3, 0]]
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        remainder: Literal["repeat", "drop", "keep"] = "repeat",
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("`dataset` should hold at least one sample. Found none.")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"`rank` should be in [0, {num_replicas}), the number of ranks. Found {rank}.")
        super().__init__(cast("Dataset[Any]", dataset), num_replicas, rank, shuffle, seed)
        self.size = len(dataset)
        self.remainder = remainder
        self.start = 0
        self.num_samples = len(self._positions())

    def _positions(self) -> range:
        """Return the places of this rank's samples in the order of the epoch; beyond its end, it begins again."""
        left = self.size - self.start
        if self.remainder == "repeat":
            left += -left % self.num_replicas
        elif self.remainder == "drop":
            left -= left % self.num_replicas
        return range(self.start + self.rank, self.start + left, self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return (position % self.size for position in self._positions())
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        return (order[position % self.size] for position in self._positions())


class EpochIndexSampler(EpochSampler):
    """Yields ``epoch * size + index``, so that a data set knows the epoch, also in a worker.

    What such a data set draws at random can depend on the seed, the epoch and the index only.

    Example:
        >>> sampler = EpochIndexSampler(range(3), shuffle=False)
        >>> sampler.set_epoch(2)
        >>> list(sampler)
        [6, 7, 8]
    """

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.size
        return (start + index for index in super().__iter__())


class ResumableDataLoader(DataLoader[T_co]):
    """A loader that, stopped after any batch and resumed, goes on with the next one.

    Lightning stores its state in every checkpoint. ``Trainer.fit(ckpt_path=...)`` then sees the batches that were left
    of the epoch and after them the same epochs as the run that was never stopped, with any number of workers; what was
    already seen is not read again. Nothing is drawn from torch's global generator.

    The order is that of the epoch in which the first batch is asked for, not of the call to ``iter``: Lightning calls
    ``iter`` before ``set_epoch`` when it resumes, and workers would read ahead in the wrong order.

    Limits:
        - The global batch size, ``batch_size`` times the number of ranks, has to stay the same within an epoch. The
          number of ranks may change if it does.
        - A batch counts as seen once it was handed out. A checkpoint written in the middle of a step, as by
          ``OnExceptionCheckpoint``, counts the batch of that step.
        - Random draws inside the data set are not resumed in the middle of an epoch, because the workers start anew.
          Draw from a generator seeded by the index.
        - With ``Trainer(max_steps=...)``, Lightning counts the batches of a resumed epoch wrongly if the checkpoint was
          written at an epoch's end or after ``fit`` had returned (its issue 19617). Checkpoints of
          ``ModelCheckpoint(every_n_train_steps=...)`` resume right.
        - ``Trainer(overfit_batches=...)`` refuses it; give such a run a plain ``DataLoader``.

    Args:
        dataset: The map-style data set.
        sampler: The order.
        batch_size: The number of samples per batch and rank.
        drop_last: Whether an incomplete last batch is left out.
        num_workers: The number of processes that read ahead.
        collate_fn: Makes a batch of what the data set returns.
        pin_memory: Whether batches are put in pinned memory.

    Raises:
        TypeError: If ``sampler`` is not an ``EpochSampler``.

    Example:
        >>> loader = ResumableDataLoader(range(6), EpochSampler(range(6), shuffle=False), batch_size=2)
        >>> next(iter(loader))
        tensor([0, 1])
        >>> resumed = ResumableDataLoader(range(6), EpochSampler(range(6), shuffle=False), batch_size=2)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> list(resumed)
        [tensor([2, 3]), tensor([4, 5])]
    """

    sampler: EpochSampler

    def __init__(
        self,
        dataset: Dataset[T_co],
        sampler: EpochSampler,
        batch_size: int = 1,
        *,
        drop_last: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        if not isinstance(sampler, EpochSampler):
            raise TypeError(f"`sampler` should be an `EpochSampler`. Found {type(sampler).__name__}.")
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            drop_last=drop_last,
            generator=torch.Generator(),
        )
        self._global_batch_size = batch_size * sampler.num_replicas
        self._epoch = sampler.epoch
        self._batches = 0
        self._resuming = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator, so that it starts at the first batch
        if not (self._resuming and self._epoch == self.sampler.epoch):
            self._epoch, self._batches = self.sampler.epoch, 0
        self._resuming = False
        self.sampler.start = self._batches * self._global_batch_size
        # The iterator draws the base seed of the workers from it.
        self.generator = torch.Generator().manual_seed(derive_seed("workers", self.sampler.seed, self._epoch))
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of its batches that were handed out, and what has to be the same on resuming."""
        return {"epoch": self._epoch, "batches": self._batches, **self._order()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on, at the next pass over the same epoch, after the batches that ``state_dict`` counts.

        Raises:
            ValueError: If the state is not of such a loader, or it stopped inside an epoch of other data, another seed
                or another global batch size.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(
                f"The state of a `ResumableDataLoader` should hold {', '.join(self.state_dict())}. "
                f"Found {', '.join(map(str, state_dict)) or 'nothing'}."
            )
        inside = 0 < state_dict["batches"] * state_dict["global_batch_size"] < state_dict["size"]
        changed = {name: value for name, value in self._order().items() if state_dict[name] != value}
        if inside and changed:
            raise ValueError(
                "An epoch should be resumed in the order in which it was begun: "
                + ", ".join(f"`{name}` {state_dict[name]}" for name in changed)
                + ". Found "
                + ", ".join(f"`{name}` {value}" for name, value in changed.items())
                + ". Restore these, or resume from a checkpoint of an epoch's end."
            )
        self._epoch, self._batches, self._resuming = state_dict["epoch"], state_dict["batches"], True

    def _order(self) -> dict[str, int]:
        return {
            "size": self.sampler.size,
            "seed": self.sampler.seed,
            "shuffle": int(self.sampler.shuffle),
            "global_batch_size": self._global_batch_size,
        }
