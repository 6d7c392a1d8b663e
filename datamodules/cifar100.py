"""CIFAR-100 as twenty tasks, one per coarse class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl_lightning.datamodules.base import check_fraction
from mtl_lightning.datamodules.colours import COLOURS, Colours, checked_colours
from mtl_lightning.datamodules.combined import CombinedMode, PerTaskDataModule, PerTaskDataset
from mtl_lightning.datamodules.downloads import check_digest, download_file, extract_archive
from mtl_lightning.datamodules.files import BrokenFileError, DatasetNotFoundError
from mtl_lightning.datamodules.label_tasks import class_task
from mtl_lightning.datamodules.numpy_pickle import read_numpy_pickle
from mtl_lightning.datamodules.pictures import picture_augmentation, prepare_picture
from mtl_lightning.datamodules.resizing import check_image_size
from mtl_lightning.task import Task

#: The coarse classes in the order of their numbers, which are the tasks.
CIFAR100_TASKS = (
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_electrical_devices",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_1",
    "vehicles_2",
)
NUM_CLASSES = 5  # fine classes of each
_FINE_CLASSES, _SIZE = 100, 32
_FOLDER, _ARCHIVE = "cifar-100-python", "cifar-100-python.tar.gz"
_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
_LICENCE = "none stated; cite Krizhevsky 2009"
_ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
_MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
_COLOURS = {"cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), **COLOURS}


class CIFAR100DataModule(PerTaskDataModule):
    """CIFAR-100 as twenty tasks: each of the coarse classes with its five fine classes, numbered 0 to 4 in their order.

    A task has its own pictures, 2,500 for training and 500 for the test. A training batch holds as many of each task:
    it is ``(inputs, {task: labels})``, float32, shape ``(B, 3, 32, 32)``, and int64, shape ``(B,)``, -1 for all tasks
    but that of the picture. The set has no validation split; ``val_fraction`` of the training pictures of each task is
    held out for it.

    Layout: ``root/cifar-100-python/{train,test}``, the "python version", or the two files in ``root`` itself. They are
    pickles, and read without running anything that is not a NumPy array. No licence is stated.

    Args:
        root: The folder.
        download: Whether ``prepare_data`` fetches the archive, 169 MB, if the files are not there.
        tasks: The coarse classes to learn, in their order; all by default.
        image_size: The height and width, or one number for both; None leaves 32.
        augment: Whether half of the training pictures are mirrored, and all are crops, enlarged 1 to 1.25 times.
        normalize: By which mean and deviation colours are standardised: ``"cifar100"``, the customary ones of the
            training pictures, ``(0.5071, 0.4865, 0.4409)`` and ``(0.2673, 0.2564, 0.2762)``; ``"imagenet"``; or
            ``"symmetric"``, to ``[-1, 1]``. None leaves them in ``[0, 1]``.
        val_fraction: The share of training pictures for validation. With 0 there is no such split.
        verify: Whether the files have to have the published MD5 sums.
        mode: When an epoch ends, as in ``TaskBalancedSampler``.
        batch_size: The number of pictures per batch and rank, a multiple of the number of tasks; by default 16
            per task.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the validation pictures, the augmentation and the order of training.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        - Krizhevsky: Learning Multiple Layers of Features from Tiny Images. 2009.
        - Liu, James, Davison, Johns: Auto-Lambda: Disentangling Dynamic Task Relationships. 2022. arXiv:2202.03091.
    """

    def __init__(
        self,
        *,
        root: str | Path = "data",
        download: bool = False,
        tasks: Sequence[str] = CIFAR100_TASKS,
        image_size: int | tuple[int, int] | None = None,
        augment: bool = False,
        normalize: Literal["cifar100", "imagenet", "symmetric"] | None = "cifar100",
        val_fraction: float = 0.1,
        verify: bool = True,
        mode: CombinedMode = "max_size_cycle",
        batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.tasks = _checked_names("tasks", tasks)
        super().__init__(
            num_tasks=len(self.tasks),
            mode=mode,
            batch_size=16 * len(self.tasks) if batch_size is None else batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        check_fraction("val_fraction", val_fraction)
        self.root = Path(root).expanduser()
        self.download = download
        self.image_size = check_image_size(image_size)
        self.augment = augment
        self.colours = checked_colours(normalize, _COLOURS)
        self.val_fraction = val_fraction
        self.verify = verify

    def prepare_data(self) -> None:
        """Fetch and unpack the archive, if ``download`` is set and the files are not there.

        Raises:
            ValueError: If it is damaged.
        """
        if self.download and self._folder() is None:
            archive = download_file(_URL, self.root / _ARCHIVE, digest=_ARCHIVE_MD5, licence=_LICENCE)
            extract_archive(archive, self.root)

    def setup(self, stage: str | None = None) -> None:
        """Read the files and hold out the validation pictures.

        Raises:
            DatasetNotFoundError: If files are missing.
            ValueError: If a file is damaged or does not hold what it should.
        """
        if stage in ("fit", "validate", None):
            pictures, labels = self._read("train")
            train, val = {}, {}
            for task in self.tasks:
                rows = torch.nonzero(labels[:, 0] == CIFAR100_TASKS.index(task)).flatten()
                order = rows[torch.randperm(len(rows), generator=self.generator("val", task))]
                held = round(self.val_fraction * len(rows))
                train[task] = self._part(pictures, labels, order[held:].sort().values)
                val[task] = self._part(pictures, labels, order[:held].sort().values)
            self.datasets["train"] = self._combined(train, is_train=True)
            self.datasets["val"] = self._combined(val) if self.val_fraction else None
        if stage in ("test", "predict", None):
            pictures, labels = self._read("test")
            self.datasets["test"] = self._combined(
                {
                    task: self._part(
                        pictures, labels, torch.nonzero(labels[:, 0] == CIFAR100_TASKS.index(task)).flatten()
                    )
                    for task in self.tasks
                }
            )

    def summary(self, num_samples: int = 200) -> str:
        """Return what ``SplitDataModule.summary`` tells, over enough samples for some of each task.

        Args:
            num_samples: How many samples of each split are read.

        Raises:
            RuntimeError: If ``setup`` has not been called.
        """
        return super().summary(num_samples)

    def _part(self, pictures: Tensor, labels: Tensor, rows: Tensor) -> _Pictures:
        return _Pictures(pictures, labels[:, 1], rows, self.image_size, self.colours)

    def _combined(self, parts: dict[str, _Pictures], is_train: bool = False) -> PerTaskDataset:
        return PerTaskDataset(
            parts,
            labels=dict.fromkeys(parts, torch.tensor(0)),
            transform=picture_augmentation if is_train and self.augment else None,
            seed=self.seed,
        )

    def _folder(self) -> Path | None:
        folders = (self.root / _FOLDER, self.root)
        return next((folder for folder in folders if all((folder / name).is_file() for name in _MD5)), None)

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the pictures, uint8, shape ``(N, 3, 32, 32)``, and their coarse and fine numbers, shape ``(N, 2)``."""
        folder = self._folder()
        if folder is None:
            places = [self.root / _FOLDER, self.root]
            missing = [file for file in _MD5 if not (places[0] / file).is_file()]
            raise DatasetNotFoundError(
                f"`root` should hold {' and '.join(_MD5)} in {places[0]} or in {places[1]}. "
                f"Missing in the first: {', '.join(missing)}. Pass `download=True` and have `prepare_data` run, or "
                f"fetch {_URL} and unpack it in {self.root}. Licence: {_LICENCE}."
            )
        path = folder / name
        if self.verify:
            check_digest(path, _MD5[name])
        content = read_numpy_pickle(path)
        keys = ("data", "coarse_labels", "fine_labels")
        if not isinstance(content, dict) or not set(keys) <= set(content):
            found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise BrokenFileError.of(path, f"the python version of CIFAR-100, with {', '.join(keys)}", found)
        data, coarse, fine = (np.asarray(content[key]) for key in keys)
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * _SIZE**2:
            raise BrokenFileError.of(path, "uint8 pictures of 3072 numbers", f"{data.dtype} of shape {data.shape}")
        for key, labels, number in (
            ("coarse_labels", coarse, len(CIFAR100_TASKS)),
            ("fine_labels", fine, _FINE_CLASSES),
        ):
            if (
                labels.shape != (len(data),)
                or labels.dtype.kind not in "iu"
                or (len(data) and not _inside(labels, number))
            ):
                found = f"shape {labels.shape}, dtype {labels.dtype}"
                if labels.dtype.kind in "iu" and labels.size:
                    found += f", {labels.min()} to {labels.max()}"
                raise BrokenFileError.of(path, f"{len(data)} {key} in [0, {number})", found)
        pictures = torch.from_numpy(np.ascontiguousarray(data)).view(-1, 3, _SIZE, _SIZE)
        return pictures, torch.from_numpy(np.stack([coarse, _renumbered(path, coarse, fine)], axis=1)).long()


class _Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Some rows of an array of pictures."""

    def __init__(
        self, pictures: Tensor, labels: Tensor, rows: Tensor, size: tuple[int, int] | None, colours: Colours | None
    ) -> None:
        self.pictures, self.labels, self.rows, self.size, self.colours = pictures, labels, rows, size, colours

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        return prepare_picture(self.pictures[row], self.size, self.colours), self.labels[row]


def _inside(labels: Any, number: int) -> bool:
    return bool(labels.min() >= 0 and labels.max() < number)


def _renumbered(path: Path, coarse: Any, fine: Any) -> Any:
    """Return the place of each fine class among the five of its coarse class."""
    pairs = np.unique(np.stack([coarse, fine], axis=1), axis=0)
    counts = np.bincount(pairs[:, 0], minlength=len(CIFAR100_TASKS))
    if len(pairs) != _FINE_CLASSES or (counts != NUM_CLASSES).any():
        raise BrokenFileError.of(
            path, "five fine classes in each of 20 coarse classes", f"{counts.tolist()} fine classes in them"
        )
    places = np.empty(_FINE_CLASSES, dtype=np.int64)
    places[pairs[:, 1]] = np.arange(_FINE_CLASSES) % NUM_CLASSES  # pairs are sorted by coarse, then by fine class
    return places[fine]


def _checked_names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not names or len(set(names)) < len(names) or not set(names) <= set(CIFAR100_TASKS):
        raise ValueError(
            f"`{argument}` should hold at least one of {', '.join(CIFAR100_TASKS)}, each once. Found {names!r}."
        )
    return tuple(names)


def cifar100_tasks(names: Sequence[str] = CIFAR100_TASKS) -> list[Task]:
    """Return the tasks of these coarse classes, in their order: 5 logits, cross entropy, metric ``accuracy``.

    Args:
        names: Names in ``CIFAR100_TASKS``.

    Raises:
        ValueError: If a name is not known.

    Example:
        >>> [task.name for task in cifar100_tasks(["fish", "trees"])]
        ['fish', 'trees']
    """
    return [class_task(name, NUM_CLASSES) for name in _checked_names("names", names)]
