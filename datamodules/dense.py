"""What the dense data sets on disk share: samples read by key, resizing, augmentation, missing labels, and splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from mtl_lightning.datamodules.base import Split, SplitDataModule, check_fraction
from mtl_lightning.datamodules.colours import Colours, Normalize, checked_colours, standardised
from mtl_lightning.datamodules.files import BrokenFileError, Origin, file_problem, first_few
from mtl_lightning.datamodules.joint_transforms import IGNORE_INDEX, JointTransform, LabelKind
from mtl_lightning.datamodules.loading import EpochIndexSampler, EpochSampler, derive_seed
from mtl_lightning.datamodules.resizing import check_image_size, fitted_size, pad_centred, resize_image, resize_label
from mtl_lightning.datamodules.scale_choice import ScaleChoice

#: What is done about samples with files that are missing or cut off.
OnBroken = Literal["raise", "skip", "mask"]


@dataclass(frozen=True)
class DenseTask:
    """A dense task.

    Attributes:
        name: Its name, the key in the batch.
        channels: The number of channels of a prediction: of the label, or of classes.
        kind: What its numbers mean, for flips and crops.
    """

    name: str
    channels: int
    kind: LabelKind

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of the label of an image of height and width ``size``."""
        return size if self.kind == "classes" else (self.channels, *size)

    def missing(self, size: tuple[int, int]) -> Tensor:
        """Return the label without any value of an image of height and width ``size``."""
        return torch.full(self.shape(size), IGNORE_INDEX if self.kind == "classes" else torch.nan)


class Files(Protocol):
    """The files of one field, the image or a label, of all samples of a split."""

    def keys(self) -> set[str]:
        """Return the keys of the samples that have this file."""

    def path(self, key: str) -> Path:
        """Return where the file of the sample ``key`` is, or should be."""

    def read(self, path: Path) -> Tensor:
        """Return the image or label in the file."""


@dataclass(frozen=True)
class Folder:
    """The files ``{folder}/{key}{suffix}``.

    Attributes:
        folder: The folder.
        suffix: The end of the names.
        reader: Reads one of them.
    """

    folder: Path
    suffix: str
    reader: Callable[[Path], Tensor]

    def keys(self) -> set[str]:
        """Return the keys of the samples that have this file; none if there is no such folder."""
        if not self.folder.is_dir():
            return set()
        names = (path.name for path in self.folder.iterdir())
        return {name.removesuffix(self.suffix) for name in names if name.endswith(self.suffix) and name[0] != "."}

    def path(self, key: str) -> Path:
        """Return where the file of the sample ``key`` is, or should be."""
        return self.folder / f"{key}{self.suffix}"

    def read(self, path: Path) -> Tensor:
        """Return the image or label in the file."""
        return self.reader(path)


class DenseDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Samples as ``(image, {task: label})``: float32, ``(3, H, W)`` and ``(C, H, W)``, classes int64, ``(H, W)``.

    Index ``epoch * len + i`` is sample ``i`` as it is seen in that epoch: what is random in it depends on the seed and
    the index only.

    Args:
        keys: The keys of the samples, in their order.
        files: The files of ``"image"`` and of each task.
        tasks: The tasks, in their order.
        masked: The pairs of key and task whose label is missing, whatever its file.
        image_size: The height and width of what is returned; None for that of the files.
        padded: Whether pictures keep their ratio: shrunk until they fit into ``image_size`` and centred, with zeros
            (the mean colour, where images are normalised) and missing labels around them. Else they are stretched.
        transform: The augmentation; it has to know the kind of all tasks.
        colours: The mean and deviation by which images are normalised; None keeps ``[0, 1]``.
        seed: The seed of the augmentation.
    """

    def __init__(
        self,
        keys: Sequence[str],
        files: Mapping[str, Files],
        tasks: Sequence[DenseTask],
        *,
        masked: frozenset[tuple[str, str]] = frozenset(),
        image_size: tuple[int, int] | None = None,
        padded: bool = False,
        transform: JointTransform | None = None,
        colours: Colours | None = None,
        seed: int = 0,
    ) -> None:
        self.keys = list(keys)
        self.files = dict(files)
        self.tasks = tuple(tasks)
        self.masked = masked
        self.image_size = image_size
        self.padded = padded
        self.transform = transform
        self.colours = colours
        self.seed = seed

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        # Without it Python would ask for the items of further epochs, for ever.
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if index < 0:
            raise IndexError(f"The index should be at least 0. Found {index}.")
        epoch, index = divmod(index, len(self))
        key = self.keys[index]
        path = self.files["image"].path(key)
        image = self.files["image"].read(path)
        stored = (image.shape[-2], image.shape[-1])
        labels = {task.name: self._label(key, task, path, stored) for task in self.tasks}
        size = self._size(stored)
        image = resize_image(image, size)
        labels = {task.name: resize_label(labels[task.name], task.kind, size) for task in self.tasks}
        if self.transform is not None:
            generator = torch.Generator().manual_seed(derive_seed("augmentation", self.seed, epoch, index))
            image, labels = self.transform(image, labels, generator)
        image = standardised(image, self.colours)
        if self.padded and self.image_size is not None:
            around = self.image_size
            image = pad_centred(image, around, 0.0)
            labels = {
                name: pad_centred(label, around, torch.nan if label.is_floating_point() else IGNORE_INDEX)
                for name, label in labels.items()
            }
        return image, labels

    def _size(self, stored: tuple[int, int]) -> tuple[int, int]:
        if self.image_size is None:
            return stored
        return fitted_size(*stored, self.image_size) if self.padded else self.image_size

    def _label(self, key: str, task: DenseTask, image: Path, size: tuple[int, int]) -> Tensor:
        if (key, task.name) in self.masked:
            return task.missing(size)
        path = self.files[task.name].path(key)
        label = self.files[task.name].read(path)
        if label.shape != task.shape(size):
            raise BrokenFileError.of(
                path, f"a label of shape {task.shape(size)}, for the image {image}", f"shape {tuple(label.shape)}"
            )
        return label


class DenseDataModule(SplitDataModule):
    """Base of the data modules of images with dense labels, each in files of its own.

    Subclasses set the class attributes and find the files in ``open_split``. A batch is ``(images, {task: target})``:
    float32 images, shape ``(B, 3, H, W)``, float32 labels, shape ``(B, C, H, W)``, int64 classes, shape ``(B, H, W)``;
    a missing label is NaN, and -1 among classes. Nothing is written or downloaded.

    Args:
        specs: All tasks of the set in the form that is read.
        root: The folder of the files.
        tasks: The names of the tasks, at least one of ``specs``, in the order of the batch.
        image_size: The height and width, or the side, that pictures are resized to; None for that of the files.
        augment: Whether training pictures are mirrored and enlarged at random.
        normalize: How images, read in ``[0, 1]``, are normalised; None for not at all.
        val_fraction: The fraction of the training samples held out for validation, drawn by ``seed``; 0 for none.
        batch_size: The number of samples per batch and rank.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the held-out samples, the order of training and the augmentation.
        on_broken: What becomes of samples of which a file is missing or cut off. ``"raise"`` stops: in ``setup`` if a
            file is missing, else when it is read. ``"skip"`` leaves the sample out. ``"mask"`` leaves out the label,
            for which the sample counts as not labelled, and the sample if it is the image. For these, ``setup`` looks
            at beginning, end and size of every file; damage in the middle is an error still. What is left out is named
            in one warning, and in ``left_out``.

    Attributes:
        left_out: The files that are left out, by split, with what is wrong with them.

    Raises:
        TypeError: If ``tasks`` is one string.
        ValueError: If a task is not known or repeated, or a number is out of its range.
    """

    ORIGIN: Origin
    #: The enlargements of the augmentation.
    SCALES: tuple[float, ...] = (1.0, 1.2, 1.5)
    #: Whether there is an official validation split; else it is held out from the training split.
    HAS_VAL = False
    #: Whether pictures keep their ratio when they are resized.
    PADDED = False

    def __init__(
        self,
        specs: Mapping[str, DenseTask],
        *,
        root: str | Path,
        tasks: Sequence[str],
        image_size: int | tuple[int, int] | None,
        augment: bool,
        normalize: Normalize | None,
        val_fraction: float,
        batch_size: int,
        num_workers: int,
        seed: int,
        on_broken: OnBroken,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_fraction("val_fraction", val_fraction)
        self.specs = [specs[name] for name in check_names(tasks, specs)]
        self.tasks = tuple(tasks)
        self.root = Path(root).expanduser()
        self.image_size = check_image_size(image_size)
        self.augment = augment
        self.colours = checked_colours(normalize)
        self.val_fraction = val_fraction
        if on_broken not in get_args(OnBroken):
            raise ValueError(f"`on_broken` should be one of {', '.join(get_args(OnBroken))}. Found {on_broken!r}.")
        self.on_broken = on_broken
        self.left_out: dict[Split, dict[str, str]] = {}

    def open_split(self, split: Split) -> tuple[list[str], dict[str, Files]]:
        """Return the keys of all samples that ``split`` should have, and the files of ``"image"`` and of each task.

        Raises:
            DatasetNotFoundError: If there is no such split in ``root``.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Find the files of the splits that ``stage`` needs.

        Raises:
            DatasetNotFoundError: If they are not all there.
            ValueError: If all samples would be held out for validation.
        """
        if self.HAS_VAL:
            if stage in ("fit", None):
                self._assign("train", *self.open_split("train"))
            if stage in ("fit", "validate", None):
                self._assign("val", *self.open_split("val"))
        elif stage in ("fit", "validate", None):
            keys, files = self.open_split("train")
            order = torch.randperm(len(keys), generator=self.generator("val")).tolist()
            held_out = {keys[index] for index in order[: round(self.val_fraction * len(keys))]}
            if len(held_out) == len(keys):
                raise ValueError(
                    f"`val_fraction` should leave samples for training. Found {self.val_fraction} of {len(keys)}."
                )
            self._assign("train", [key for key in keys if key not in held_out], files)
            self._assign("val", [key for key in keys if key in held_out], files)
        if stage in ("test", "predict", None):
            self._assign("test", *self.open_split("test"))

    def train_sampler(self, dataset: Any, *, num_replicas: int, rank: int) -> EpochSampler:
        """Return an order that tells the data set the epoch, by which the augmentation is drawn."""
        return EpochIndexSampler(dataset, seed=self.seed, num_replicas=num_replicas, rank=rank)

    def summary(self, num_samples: int = 16) -> str:
        """Return the name and the place of the set, and what ``SplitDataModule.summary`` tells.

        Args:
            num_samples: How many samples of each split are read.

        Raises:
            RuntimeError: If ``setup`` has not been called.
        """
        return f"{self.ORIGIN.name} in {self.root}\n{super().summary(num_samples)}"

    def _assign(self, split: Split, keys: list[str], files: dict[str, Files]) -> None:
        if not keys:
            self.datasets[split] = None
            return
        keys, masked = self._usable(split, keys, files)
        kinds: dict[str, LabelKind] = {task.name: task.kind for task in self.specs}
        augment = self.augment and split == "train"
        self.datasets[split] = DenseDataset(
            keys,
            files,
            self.specs,
            masked=masked,
            image_size=self.image_size,
            padded=self.PADDED,
            transform=ScaleChoice(kinds, scales=self.SCALES) if augment else None,
            colours=self.colours,
            seed=self.seed,
        )

    def _usable(
        self, split: Split, keys: list[str], files: dict[str, Files]
    ) -> tuple[list[str], frozenset[tuple[str, str]]]:
        """Return the keys that are read, and the pairs of key and task without a label."""
        present = {field: fields.keys() for field, fields in files.items()}
        if self.on_broken == "raise":
            absent = [fields.path(key) for field, fields in files.items() for key in keys if key not in present[field]]
            if absent:
                raise self.ORIGIN.not_found(
                    f"`root` should hold all files of the {split} split. Found {len(keys)} samples, some of them "
                    f"not whole (on_broken='skip' leaves these out, 'mask' only the missing labels)",
                    [path.relative_to(self.root) for path in absent],
                )
            return keys, frozenset()
        problems: dict[tuple[str, str], str] = {}
        for field, fields in files.items():
            for key in keys:
                problem = file_problem(fields.path(key)) if key in present[field] else "it is missing"
                if problem is not None:
                    problems[key, field] = problem
        skipped = {key for key, field in problems if field == "image" or self.on_broken == "skip"}
        kept = [key for key in keys if key not in skipped]
        left_out = {str(files[field].path(key)): problem for (key, field), problem in problems.items()}
        if left_out and left_out != self.left_out.get(split):  # not again at every stage
            masked = sum(key not in skipped for key, _ in problems)
            rank_zero_warn(
                f"In the {split} split, {len(skipped)} of {len(keys)} samples and {masked} labels of others are left "
                f"out because of their files: "
                + first_few([f"{path} ({problem})" for path, problem in left_out.items()])
            )
        self.left_out[split] = left_out
        if not kept:
            raise self.ORIGIN.not_found(f"`root` should hold a {split} split with at least one whole sample")
        return kept, frozenset((key, field) for key, field in problems if key not in skipped)


def check_names(names: Sequence[str], known: Mapping[str, object], argument: str = "tasks") -> tuple[str, ...]:
    """Return the task ``names`` as a tuple, or raise an error unless each is ``known`` and there once.

    Raises:
        TypeError: If ``names`` is one string.
        ValueError: If there is none, or one is not known or repeated.
    """
    if isinstance(names, str):
        raise TypeError(f"`{argument}` should be a sequence of names. Found the string {names!r}.")
    if not names or len(set(names)) < len(names) or any(name not in known for name in names):
        raise ValueError(
            f"`{argument}` should hold at least one of {', '.join(known)}, each once. Found {list(names)}."
        )
    return tuple(names)


def numeric(key: str) -> tuple[int, str]:
    """Return what sorts keys as numbers, as ``sorted(keys, key=numeric)``.

    Example:
        >>> sorted(["10", "9", "1"], key=numeric)
        ['1', '9', '10']
    """
    return (int(key) if key.isdecimal() else -1, key)
