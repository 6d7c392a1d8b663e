"""CelebA: forty binary attributes of faces, one task each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl_lightning.datamodules.base import Split, SplitDataModule
from mtl_lightning.datamodules.colours import Normalize, checked_colours
from mtl_lightning.datamodules.downloads import check_digest
from mtl_lightning.datamodules.files import BrokenFileError, Origin, read_text
from mtl_lightning.datamodules.label_tasks import binary_task
from mtl_lightning.datamodules.loading import EpochIndexSampler, EpochSampler, derive_seed
from mtl_lightning.datamodules.pictures import (
    OnBroken,
    PictureFiles,
    check_on_broken,
    picture_augmentation,
    without_broken,
)
from mtl_lightning.datamodules.resizing import check_image_size
from mtl_lightning.task import Task

#: The attributes in the order of the file, which are the tasks.
CELEBA_ATTRIBUTES = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes",
    "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling",
    "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace",
    "Wearing_Necktie", "Young",
)  # fmt: skip
_ATTRIBUTES, _PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
_MD5 = {_ATTRIBUTES: "75e246fa4810816ffd6ee81facbd244c", _PARTITION: "d32c9cbf5e040fd4025c592c306e6668"}
_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_ORIGIN = Origin(
    "CelebA",
    "https://drive.google.com/drive/folders/0B7EVK8r0v71pWEZsZE9oNnFzTm8?resourcekey=0-5BR16BdXnb8hVj6CNHKzLg",
    f"root/celeba/{_ATTRIBUTES}, {_PARTITION}, img_align_celeba/*.jpg\n"
    f"or root/Anno/{_ATTRIBUTES}, root/Eval/{_PARTITION},\n"
    "   root/Img/img_align_celeba/*.jpg or root/Img/img_align_celeba_png/*.png",
    "non-commercial research, no redistribution",
)


class _Layout(NamedTuple):
    """Where the two lists and the pictures are, below the root."""

    attributes: str
    partition: str
    pictures: str
    suffix: str


_LAYOUTS = (
    _Layout(f"celeba/{_ATTRIBUTES}", f"celeba/{_PARTITION}", "celeba/img_align_celeba", ".jpg"),
    _Layout(_ATTRIBUTES, _PARTITION, "img_align_celeba", ".jpg"),
    _Layout(f"Anno/{_ATTRIBUTES}", f"Eval/{_PARTITION}", "Img/img_align_celeba", ".jpg"),
    _Layout(f"Anno/{_ATTRIBUTES}", f"Eval/{_PARTITION}", "Img/img_align_celeba_png", ".png"),
)


class CelebADataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Faces as ``(image, {attribute: label})``: float32, shape ``(3, H, W)``, and int64, shape ``(1,)``, 0 or 1.

    Index ``epoch * len + i`` is picture ``i`` as it is seen in that epoch: the augmentation depends on the seed and the
    index only.

    Args:
        pictures: The pictures with their labels, shape ``(N, T)``.
        tasks: The ``T`` attributes.
        augment: Whether pictures are mirrored and cropped at random.
        seed: The seed of the augmentation.
    """

    def __init__(self, pictures: PictureFiles, tasks: Sequence[str], *, augment: bool = False, seed: int = 0) -> None:
        self.pictures = pictures
        self.tasks = tuple(tasks)
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        # Without it Python would ask for the items of further epochs, for ever.
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if index < 0:
            raise IndexError(f"The index should be at least 0. Found {index}.")
        epoch, number = divmod(index, len(self))
        image, labels = self.pictures[number]
        if self.augment:
            generator = torch.Generator().manual_seed(derive_seed("celeba", self.seed, epoch, number))
            image = picture_augmentation(image, generator)
        return image, dict(zip(self.tasks, labels[:, None].long().unbind(), strict=True))


class CelebADataModule(SplitDataModule):
    """CelebA with its aligned faces, one binary task per attribute, in the official partition.

    A batch is ``(inputs, {attribute: labels})``: float32, shape ``(B, 3, H, W)``, and int64, shape ``(B, 1)``, 1 where
    the face has the attribute and 0 where not (-1 in the file, which here would be a missing label).

    Layouts, of which the first that is found is taken: that of torchvision, ``root/celeba/`` or ``root`` itself with
    ``list_attr_celeba.txt``, ``list_eval_partition.txt`` and ``img_align_celeba/*.jpg``; that of the original folders,
    ``root/Anno/list_attr_celeba.txt``, ``root/Eval/list_eval_partition.txt`` and ``root/Img/img_align_celeba/*.jpg`` or
    ``root/Img/img_align_celeba_png/*.png``. Get it from
    https://drive.google.com/drive/folders/0B7EVK8r0v71pWEZsZE9oNnFzTm8?resourcekey=0-5BR16BdXnb8hVj6CNHKzLg; nothing is
    downloaded here. Licence, not confirmed:
    non-commercial research, no redistribution. Not confirmed either: 162,770 / 19,867 / 19,962 pictures for training,
    validation and test, of 218 x 178 pixels.

    FAMO trains all tasks at 64 x 64 pixels in ``[0, 1]``, the defaults here, with batches of 256 and reports F1 scores;
    COSMOS takes ``Goatee`` and ``Mustache``, and colours in ``[-1, 1]``.

    Args:
        root: The folder.
        tasks: The attributes to learn, in their order; all by default.
        image_size: The height and width, or one number for both; None leaves that of the files.
        augment: Whether half of the training pictures are mirrored, and all are crops, enlarged 1 to 1.25 times.
        normalize: By which mean and deviation colours are standardised, ``"imagenet"``, or ``"symmetric"``, to
            ``[-1, 1]``. None leaves them in ``[0, 1]``.
        verify: Whether the two lists have to have the MD5 sums of torchvision's.
        on_broken: With ``"skip"``, pictures that are missing or not whole are left out and said once. Every file is
            opened for it in ``setup``, at its beginning and end only.
        batch_size: The number of pictures per batch and rank.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the augmentation and of the order of training.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        - Liu, Luo, Wang, Tang: Deep Learning Face Attributes in the Wild. 2015. arXiv:1411.7766.
        - Liu, Feng, Stone, Liu: FAMO: Fast Adaptive Multitask Optimization. 2023. arXiv:2306.03792.
    """

    SPLIT_NUMBERS: ClassVar[dict[Split, int]] = {"train": 0, "val": 1, "test": 2}

    def __init__(
        self,
        *,
        root: str | Path = "data",
        tasks: Sequence[str] = CELEBA_ATTRIBUTES,
        image_size: int | tuple[int, int] | None = 64,
        augment: bool = False,
        normalize: Normalize | None = None,
        verify: bool = False,
        on_broken: OnBroken = "raise",
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_on_broken(on_broken)
        self.root = Path(root).expanduser()
        self.tasks = _checked_names("tasks", tasks)
        self.image_size = check_image_size(image_size)
        self.augment = augment
        self.colours = checked_colours(normalize)
        self.verify = verify
        self.on_broken: OnBroken = on_broken

    def setup(self, stage: str | None = None) -> None:
        """Read the lists.

        Raises:
            DatasetNotFoundError: If files are missing.
            ValueError: If a list is damaged or does not fit the other.
        """
        layout = self._layout()
        attributes, partition = self.root / layout.attributes, self.root / layout.partition
        if self.verify:
            check_digest(attributes, _MD5[_ATTRIBUTES])
            check_digest(partition, _MD5[_PARTITION])
        names, labels = _read_attributes(attributes)
        numbers = _read_partition(partition, names)
        paths = [(self.root / layout.pictures / name).with_suffix(layout.suffix) for name in names]
        if self.on_broken == "raise":
            there = {path.name for path in (self.root / layout.pictures).iterdir()}
            missing = [path.name for path in paths if path.name not in there]
            if missing:
                raise _ORIGIN.not_found(f"{self.root / layout.pictures} should hold {len(paths)} pictures", missing)
        columns = torch.from_numpy(labels[:, [CELEBA_ATTRIBUTES.index(task) for task in self.tasks]])
        for split in _SPLITS:
            rows = np.flatnonzero(numbers == self.SPLIT_NUMBERS[split])
            files = [paths[row] for row in rows]
            kept = without_broken(files, self.on_broken)
            rows, files = rows[kept.numpy()], [path for path, keep in zip(files, kept.tolist(), strict=True) if keep]
            pictures = PictureFiles(files, columns[rows], self.image_size, self.colours)
            self.datasets[split] = (
                CelebADataset(pictures, self.tasks, augment=self.augment and split == "train", seed=self.seed)
                if files
                else None
            )
        if self.datasets["train"] is None:
            raise ValueError(f"{partition} should put at least one picture in the training split. Found none.")

    def train_sampler(self, dataset: Sized, *, num_replicas: int, rank: int) -> EpochSampler:
        """Return the order of the training pictures; with the epoch in the index, for the augmentation."""
        sampler = EpochIndexSampler if self.augment else EpochSampler
        return sampler(dataset, seed=self.seed, num_replicas=num_replicas, rank=rank)

    def _layout(self) -> _Layout:
        problems = {}
        for layout in _LAYOUTS:
            lists = [name for name in (layout.attributes, layout.partition) if not (self.root / name).is_file()]
            folders = [] if (self.root / layout.pictures).is_dir() else [f"{layout.pictures}/"]
            if not lists and not folders:
                return layout
            problems[layout] = lists + folders
        # What is there tells which layout was meant: the one of which least is missing.
        missing = min(problems.values(), key=len)
        raise _ORIGIN.not_found(f"Found no whole CelebA in {self.root}", missing)


def _read_attributes(path: Path) -> tuple[list[str], npt.NDArray[np.int8]]:
    """Return the names of the files, and their labels, 0 or 1, shape ``(N, 40)``, in the order of the constants."""
    lines = read_text(path).splitlines()
    if len(lines) < 2 or not lines[0].strip().isdigit():
        raise BrokenFileError.of(path, "the number of pictures in its first line", repr("".join(lines[:1])[:40]))
    count, header = int(lines[0]), lines[1].split()
    rows = [line.split() for line in lines[2:] if line.strip()]
    if sorted(header) != sorted(CELEBA_ATTRIBUTES):
        raise BrokenFileError.of(path, "the names of the 40 attributes in its second line", repr(lines[1][:60]))
    if len(rows) != count:
        raise BrokenFileError.of(path, f"{count} pictures, as its first line says", f"{len(rows)}")
    for number, row in enumerate(rows, start=3):
        if len(row) != 1 + len(header) or not set(row[1:]) <= {"-1", "1"}:
            raise BrokenFileError.of(
                path, f"a name and 40 numbers of -1 and 1 in line {number}", repr(lines[number - 1])
            )
    names = [row[0] for row in rows]
    if len(set(names)) < len(names):
        raise BrokenFileError.of(path, "each picture once", f"{len(names) - len(set(names))} repetitions")
    labels = np.array([row[1:] for row in rows]) == "1"
    return names, labels[:, [header.index(name) for name in CELEBA_ATTRIBUTES]].astype(np.int8)


def _read_partition(path: Path, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the number of the split of each of the pictures ``names``, shape ``(N,)``."""
    parts = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        fields = line.split()
        if fields and (len(fields) != 2 or fields[1] not in ("0", "1", "2")):
            raise BrokenFileError.of(path, f"a name and 0, 1 or 2 in line {number}", repr(line))
        if fields:
            parts[fields[0]] = int(fields[1])
    # By name, as nothing promises that both lists have one order.
    without = [name for name in names if name not in parts]
    if without:
        raise BrokenFileError.of(
            path, "every picture of the list of attributes", f"none of {len(without)}, {without[0]} first"
        )
    return np.array([parts[name] for name in names], dtype=np.int64)


def _checked_names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not names or len(set(names)) < len(names) or not set(names) <= set(CELEBA_ATTRIBUTES):
        raise ValueError(
            f"`{argument}` should hold at least one of {', '.join(CELEBA_ATTRIBUTES)}, each once. Found {names!r}."
        )
    return tuple(names)


def celeba_tasks(names: Sequence[str] = CELEBA_ATTRIBUTES) -> list[Task]:
    """Return the tasks of these attributes, in their order: one logit, binary cross entropy, ``f1`` and ``accuracy``.

    Args:
        names: Names in ``CELEBA_ATTRIBUTES``.

    Raises:
        ValueError: If a name is not known.

    Example:
        >>> [(task.name, list(task.metrics)) for task in celeba_tasks(["Goatee"])]
        [('Goatee', ['accuracy', 'f1'])]
    """
    return [binary_task(name) for name in _checked_names("names", names)]
