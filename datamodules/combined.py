"""One data set per task: batches that hold samples of all of them, each labelled for its own task only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl_lightning.datamodules.base import SplitDataModule
from mtl_lightning.datamodules.joint_transforms import missing_like
from mtl_lightning.datamodules.loading import EpochSampler, derive_seed

#: When an epoch ends: with the largest data set, the others beginning anew meanwhile, or with the smallest one.
CombinedMode = Literal["max_size_cycle", "min_size"]
InputTransform = Callable[[Tensor, torch.Generator], Tensor]


class PerTaskDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """The samples of one data set per task as ``(input, {task: label})``, with missing labels for all other tasks.

    A missing label is NaN, or -1 for integers: modules leave it out, if losses and metrics of classes have
    ``ignore_index=-1``. The order is the first sample of each task, then the second of each, and so on, so that batches
    in order are balanced as long as all data sets last.

    Index ``visit * len + i`` is sample ``i`` with the random numbers of that visit, which depend on the seed and the
    index alone.

    Args:
        datasets: From task name to its data set of ``(input, label)``; inputs have the same shape in all. Labels are
            tensors or numbers.
        labels: An example of a label of each task, of which shape and dtype are taken; by default that of the first
            sample, which is read for it.
        transform: A random change of an input, such as an augmentation, with the generator to draw from.
        seed: The seed of these draws.

    Raises:
        ValueError: If there is no data set, or one is empty.

    Example:
        >>> datasets = {"shape": [(torch.zeros(2), 3), (torch.ones(2), 4)], "size": [(torch.ones(2), 0.5)]}
        >>> [labels for _, labels in PerTaskDataset(datasets)]
        [{'shape': tensor(3), 'size': tensor(nan)},
         {'shape': tensor(-1), 'size': tensor(0.5000)},
         {'shape': tensor(4), 'size': tensor(nan)}]
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        *,
        labels: Mapping[str, Tensor] | None = None,
        transform: InputTransform | None = None,
        seed: int = 0,
    ) -> None:
        if not datasets:
            raise ValueError("`datasets` should hold at least one data set. Found none.")
        self.datasets = dict(datasets)
        self.tasks = tuple(self.datasets)
        self.sizes = [len(dataset) for dataset in self.datasets.values()]
        empty = [task for task, size in zip(self.tasks, self.sizes, strict=True) if size == 0]
        if empty:
            raise ValueError(f"Each data set should hold at least one sample. Found none for {', '.join(empty)}.")
        self.transform = transform
        self.seed = seed
        examples = {task: self.datasets[task][0][1] for task in self.tasks} if labels is None else labels
        self._missing = {task: missing_like(_as_label(examples[task])) for task in self.tasks}
        # By number within the task, then by task: the order of the samples.
        numbers = torch.cat([torch.arange(size) for size in self.sizes])
        tasks = torch.cat([torch.full((size,), task) for task, size in enumerate(self.sizes)])
        order = torch.argsort(numbers * len(self.tasks) + tasks)
        self._samples = torch.stack([tasks[order], numbers[order]], dim=1)
        self._indices = [torch.nonzero(self._samples[:, 0] == task).flatten() for task in range(len(self.tasks))]

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        # Without it Python would ask for the items of further visits, for ever.
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if index < 0:
            raise IndexError(f"The index should be at least 0. Found {index}.")
        visit, place = divmod(index, len(self))
        number, sample = self._samples[place].tolist()
        task = self.tasks[number]
        inputs, label = self.datasets[task][sample]
        if self.transform is not None:
            key = derive_seed("per task", self.seed, visit, place)
            inputs = self.transform(inputs, torch.Generator().manual_seed(key))
        return inputs, {**self._missing, task: _as_label(label)}

    def indices(self, task: int) -> Tensor:
        """Return the indices of the samples of the task with this number, ascending."""
        return self._indices[task]


class TaskBalancedSampler(EpochSampler):
    """The order of a ``PerTaskDataset`` in which every task has the same share of each batch.

    It goes round the tasks, each with its own permutation by seed and epoch. Where a data set is at its end before the
    epoch is, it begins again with a new one. Rank ``r`` of ``W`` takes every ``W``-th sample of each task from the
    ``r``-th on: with a batch size ``B`` that the number of tasks divides, each rank has ``B / T`` samples of each task,
    and the ranks hold together the samples of the batch of ``W * B`` on one process. It yields
    ``visit * len(dataset) + index``, so that an augmentation differs from visit to visit.

    Args:
        dataset: The data set.
        mode: ``"max_size_cycle"`` ends the epoch with the largest data set, ``"min_size"`` with the smallest; of larger
            ones other samples come in each epoch.
        seed: The seed of the permutations.
        num_replicas: The number ``W`` of ranks that share the data.
        rank: The rank, in ``[0, W)``.

    Raises:
        ValueError: If the mode is not known, or the rank is not in ``[0, W)``.

    Example:
        >>> dataset = PerTaskDataset({"a": [(0, 0)] * 2, "b": [(0, 0)] * 3})
        >>> sampler = TaskBalancedSampler(dataset)
        >>> len(sampler), [list(dataset[index][1].values()).index(0) for index in sampler]
        (6, [0, 1, 0, 1, 0, 1])
    """

    def __init__(
        self,
        dataset: PerTaskDataset,
        *,
        mode: CombinedMode = "max_size_cycle",
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        check_mode(mode)
        super().__init__(dataset, seed=seed, num_replicas=num_replicas, rank=rank)
        self.indices = [dataset.indices(task) for task in range(len(dataset.tasks))]
        sizes = dataset.sizes
        self.rounds = max(sizes) if mode == "max_size_cycle" else min(sizes)
        self.total = len(dataset)
        # More than can begin in an epoch, also where ranks fill up the last round; the same for any number of ranks.
        self.passes = self.rounds // min(sizes) + 2
        self.size = self.rounds * len(sizes)
        self.num_samples = len(self._rounds()) * len(sizes)

    def _rounds(self) -> range:
        """Return the places of this rank's samples in the order of each task."""
        first, remainder = divmod(self.start, len(self.indices))
        if remainder:
            raise ValueError(
                f"The batch size should be a multiple of the {len(self.indices)} tasks. "
                f"Found {self.start} samples in the batches before."
            )
        left = self.rounds - first
        return range(first + self.rank, first + left + -left % self.num_replicas, self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        orders: dict[tuple[int, int], Tensor] = {}
        for place in self._rounds():
            for task, indices in enumerate(self.indices):
                cycle, number = divmod(place, len(indices))
                if (task, cycle) not in orders:
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, task, cycle))
                    orders[task, cycle] = indices[torch.randperm(len(indices), generator=generator)]
                yield (self.epoch * self.passes + cycle) * self.total + int(orders[task, cycle][number])


class PerTaskDataModule(SplitDataModule):
    """A data module of one data set per task, whose training batches hold as many samples of each.

    A batch is ``(inputs, {task: labels})`` like any other, with all tasks in it: sample ``i`` has a label for its own
    task, and a missing one, NaN or -1, for the others. Modules train on it as they are, in one forward pass over the
    batch. It shuffles, resumes in the middle of an epoch and shares samples among ranks as all data modules here do.
    The other splits are read in order, every sample once.

    Subclass it and assign ``PerTaskDataset`` objects in ``setup``. For loaders that exist already, see
    :func:`combine_batches`.

    Args:
        num_tasks: The number of tasks, which has to divide the batch size.
        mode: When an epoch ends, as in ``TaskBalancedSampler``.
        batch_size: The number of samples per batch and rank, of all tasks together.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the order of training.

    Raises:
        ValueError: If the batch size is no multiple of the number of tasks, or another argument is out of its range.

    Example:
        >>> class ShapesAndSizes(PerTaskDataModule):
        ...     def setup(self, stage=None):
        ...         shapes, sizes = [(torch.ones(2), 3)] * 5, [(torch.zeros(2), torch.tensor([0.5]))] * 9
        ...         self.datasets = {"train": PerTaskDataset({"shape": shapes, "size": sizes}), "val": None}
        >>> datamodule = ShapesAndSizes(num_tasks=2, batch_size=4, num_workers=0, seed=0)
        >>> datamodule.setup()
        >>> inputs, targets = next(iter(datamodule.train_dataloader()))
        >>> targets["shape"], targets["size"].flatten()
        (tensor([ 3, -1,  3, -1]), tensor([   nan, 0.5000,    nan, 0.5000]))
    """

    def __init__(
        self,
        *,
        num_tasks: int,
        mode: CombinedMode = "max_size_cycle",
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_mode(mode)
        if batch_size % num_tasks:
            raise ValueError(
                f"`batch_size` should be a multiple of {num_tasks}, so that each task has as many samples of a batch. "
                f"Found {batch_size}."
            )
        self.mode: CombinedMode = mode

    def train_sampler(self, dataset: Sized, *, num_replicas: int, rank: int) -> EpochSampler:
        """Return the balanced order of the training samples.

        Raises:
            TypeError: If the training split is no ``PerTaskDataset``.
        """
        if not isinstance(dataset, PerTaskDataset):
            raise TypeError(f"The training split should be a `PerTaskDataset`. Found {type(dataset).__name__}.")
        return TaskBalancedSampler(dataset, mode=self.mode, seed=self.seed, num_replicas=num_replicas, rank=rank)


def check_mode(mode: str) -> None:
    """Raise a ``ValueError`` if ``mode`` is not a ``CombinedMode``."""
    if mode not in get_args(CombinedMode):
        raise ValueError(f"`mode` should be 'max_size_cycle' or 'min_size'. Found {mode!r}.")


def combine_batches(batches: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one batch ``(inputs, {task: labels})`` of one batch ``(inputs, labels)`` per task.

    Inputs are put after one another, and each sample is given missing labels, NaN or -1, for the other tasks. With it a
    module trains on a ``CombinedLoader`` of existing loaders, in the modes ``"min_size"`` and ``"max_size_cycle"``,
    where every batch has all tasks::

        class MyModule(TaskGroupModule):
            def unpack_batch(self, batch):
                return combine_batches(batch) if isinstance(batch, dict) else super().unpack_batch(batch)

    Resumption in the middle of an epoch, and an order for several ranks, are then a matter of these loaders.

    Args:
        batches: From task name to ``(inputs, labels)``, each with the batch first; inputs of one shape otherwise.

    Raises:
        ValueError: If there is no batch, one is not a pair of tensors, or the shapes of inputs differ.

    Example:
        >>> inputs, targets = combine_batches({
        ...     "shape": (torch.zeros(1, 2), torch.tensor([3])), "size": (torch.ones(2, 2), torch.tensor([0.5, 1.0]))
        ... })
        >>> inputs.shape, targets
        (torch.Size([3, 2]), {'shape': tensor([ 3, -1, -1]), 'size': tensor([   nan, 0.5000, 1.0000])})
    """
    pairs = {task: _checked_pair(task, batch) for task, batch in batches.items()}
    shapes = {tuple(inputs.shape[1:]) for inputs, _ in pairs.values()}
    if len(shapes) != 1:
        raise ValueError(f"The inputs of all tasks should have one shape. Found {sorted(shapes) or 'no batch'}.")
    counts = [len(inputs) for inputs, _ in pairs.values()]
    targets = {}
    for place, (task, (_, labels)) in enumerate(pairs.items()):
        labels = _as_label(labels)
        before, after = (
            missing_like(labels.new_empty((sum(part), *labels.shape[1:])))
            for part in (counts[:place], counts[place + 1 :])
        )
        targets[task] = torch.cat([before, labels, after])
    return torch.cat([inputs for inputs, _ in pairs.values()]), targets


def _as_label(label: Any) -> Tensor:
    label = torch.as_tensor(label)
    # Unsigned integers and truth values cannot hold -1.
    return label if label.is_floating_point() else label.long()


def _checked_pair(task: str, batch: Any) -> tuple[Tensor, Tensor]:
    if batch is None:
        raise ValueError(
            f"The batch of task {task!r} should be there. Found None. "
            "Make the `CombinedLoader` with the mode 'min_size' or 'max_size_cycle'."
        )
    is_pair = isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not is_pair:
        raise ValueError(f"The batch of task {task!r} should be `(inputs, labels)`, two tensors. Found {type(batch)}.")
    inputs, labels = batch
    if len(inputs) != len(labels):
        raise ValueError(
            f"The batch of task {task!r} should have one label per input. Found {len(inputs)} and {len(labels)}."
        )
    return inputs, labels
