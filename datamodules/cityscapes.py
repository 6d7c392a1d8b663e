"""Cityscapes in the forms of MTAN and Auto-Lambda: segmentation, disparity and parts of street scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mtl_lightning.datamodules.base import Split
from mtl_lightning.datamodules.colours import Normalize
from mtl_lightning.datamodules.dense import (
    DenseDataModule,
    DenseTask,
    Files,
    Folder,
    OnBroken,
    check_names,
)
from mtl_lightning.datamodules.dense_labels import read_classes, read_depth, read_image
from mtl_lightning.datamodules.dense_tasks import dense_task
from mtl_lightning.datamodules.files import BrokenFileError, Origin, read_pixels
from mtl_lightning.datamodules.joint_transforms import IGNORE_INDEX
from mtl_lightning.datamodules.mtan_folders import numbered_samples
from mtl_lightning.metrics import Baseline
from mtl_lightning.task import Task

# The labels of Cityscapes that are evaluated, in the order of the 19 classes; all others are ignored.
_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_MOST_LABEL_ID = 34
_HUMANS, _VEHICLES = (24, 25), (26, 27, 28)


def cityscapes_specs(num_classes: int = 7) -> dict[str, DenseTask]:
    """Return the tasks of Cityscapes with 2, 7 or 19 classes of segmentation.

    Raises:
        ValueError: If the number of classes is another.

    Example:
        >>> cityscapes_specs(19)["segmentation"].channels
        19
    """
    if num_classes not in (2, 7, 19):
        raise ValueError(f"`num_classes` should be 2, 7 or 19. Found {num_classes}.")
    return {
        "segmentation": DenseTask("segmentation", num_classes, "classes"),
        "depth": DenseTask("depth", 1, "disparity"),
        "part_segmentation": DenseTask("part_segmentation", 10, "classes"),
    }


def read_disparity(path: Path) -> Tensor:
    """Return the scaled disparity ``(v - 1) / 1024`` of a 16-bit picture, float32, ``(1, H, W)``; NaN for 0 and 1.

    Raises:
        BrokenFileError: If it is no such picture.
    """
    stored = read_pixels(path)
    if stored.ndim != 2:
        raise BrokenFileError.of(path, "a disparity map of shape (H, W)", f"shape {stored.shape}")
    values = torch.from_numpy(stored.astype(np.float32))[None]
    # At 1 it is infinitely far: a disparity of 0, as MTAN's form has it for "none", and no error can be relative to it.
    return torch.where(values > 1, (values - 1) / 1024, torch.nan)


def read_label_ids(path: Path) -> Tensor:
    """Return the 19 classes of a picture of label ids, int64, shape ``(H, W)``; -1 where none of them is.

    Raises:
        BrokenFileError: If it is no such picture.
    """
    ids = read_classes(path, _MOST_LABEL_ID, ignore=(-1, 255))
    table = torch.full((_MOST_LABEL_ID + 1,), IGNORE_INDEX)
    table[list(_LABEL_IDS)] = torch.arange(len(_LABEL_IDS))
    return table[ids]  # -1 is the last entry, which is -1


def read_parts(path: Path) -> Tensor:
    """Return the 10 classes of parts of a panoptic-parts picture, int64, shape ``(H, W)``.

    A pixel holds an id of up to 7 digits: class, then 3 digits of instance, then 2 of part. Class 0 is everything that
    has no part; torso, head, arms and legs of humans are 1 to 4; windows, wheels, lights, licence plate and chassis of
    vehicles 5 to 9.

    Raises:
        BrokenFileError: If it is no such picture.
    """
    stored = read_pixels(path)
    if stored.ndim != 2 or stored.dtype.kind == "f" or stored.max() > 9_999_999:
        raise BrokenFileError.of(path, "ids of up to 7 digits, shape (H, W)", f"{stored.dtype}, shape {stored.shape}")
    ids = torch.from_numpy(stored.astype(np.int64))
    has_part = ids >= 100_000
    label, part = torch.where(has_part, ids // 100_000, 0), ids % 100
    human = torch.isin(label, torch.tensor(_HUMANS)) & (part >= 1) & (part <= 4)
    vehicle = torch.isin(label, torch.tensor(_VEHICLES)) & (part >= 1) & (part <= 5)
    return torch.where(human, part, 0) + torch.where(vehicle, part + 4, 0)


class CityscapesDataModule(DenseDataModule):
    """Cityscapes as prepared for MTAN (tasks ``segmentation``, ``depth``) or Auto-Lambda (``part_segmentation`` too).

    A batch is ``(images, targets)``: images, shape ``(B, 3, H, W)``; ``segmentation``, int64, ``(B, H, W)``, -1 where
    there is none; ``depth``, ``(B, 1, H, W)``, float32, which is *disparity*, scaled, 0 to about 0.5, not metres, NaN
    where there is none; ``part_segmentation``, 10 classes, int64, ``(B, H, W)``, see ``read_parts``.

    The 500 samples of ``val`` are the test split, as in all publications; ``val_fraction`` of the 2,975 training
    samples is held out for validation. Images stay in ``[0, 1]``. With ``augment``, training pictures are mirrored and
    enlarged by 1, 1.2 or 1.5 (``ScaleChoice``), and disparity is *multiplied* by it: things come nearer. The loaders of
    FAMO and CAGrad divide it, so that numbers with augmentation differ from theirs.

    The form is told by the files, arrays or pictures, and so is the size, 128 x 256 or 256 x 512. Trees::

        root/{train,val}/image/0.npy    (128, 256, 3), floats in [0, 1]                        MTAN
        root/{train,val}/label_7/0.npy  (128, 256), 0 to 6, -1 for none; or label_2, label_19; or label
        root/{train,val}/depth/0.npy    (128, 256, 1), 0 for none

        root/{train,val}/image/0.png    (256, 512, 3)                                          Auto-Lambda
        root/{train,val}/seg/0.png      label ids of Cityscapes
        root/{train,val}/depth/0.png    16 bits, 0 for none
        root/{train,val}/part_seg/0.tif panoptic parts

    How to get it: 128 x 256 https://www.dropbox.com/sh/gaw6vh6qusoyms6/AADwWi0Tp3E3M4B2xzeGlsEna?dl=0, 256 x 512
    https://www.dropbox.com/sh/vj349qgg57nthi9/AACdZmIuK-Qb_gP6w1HrA43ta?dl=0, Auto-Lambda
    https://www.dropbox.com/sh/qk3cr18d55d08gj/AAA5OCTPNFDEDk5fZsmCfmrAa?dl=0. No checksums are published. Licence:
    that of Cityscapes, non-commercial, no redistribution, https://www.cityscapes-dataset.com/license/.

    Limits: the folder names ``label_2`` and ``label_19`` and the order of the 10 classes of parts could not be
    confirmed.

    Args:
        root: The folder that holds ``train`` and ``val``.
        tasks: The names of the tasks, in the order of the batch.
        num_classes: The number of classes of the segmentation, 2, 7 or 19, which names the folder of MTAN's form; where
            it is missing, ``label`` is read. The form of Auto-Lambda has 19.
        image_size: The height and width, or the side, that pictures are resized to; None for that of the files.
        augment: Whether training pictures are mirrored and enlarged at random.
        normalize: How images are normalised: ``"imagenet"`` by that set's mean and standard deviation, ``"symmetric"``
            to ``[-1, 1]``, None to ``[0, 1]``.
        val_fraction: The fraction of the training samples that is held out for validation, in ``[0, 1)``.
        batch_size: The number of samples per batch and rank.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the held-out samples, the order of training and the augmentation.
        on_broken: What becomes of samples with files that are missing or cut off, see ``DenseDataModule``.

    Raises:
        TypeError: If ``tasks`` is one string.
        ValueError: If a task is not known or repeated, or a number is out of its range.

    References:
        - Cordts et al.: The Cityscapes Dataset for Semantic Urban Scene Understanding. 2016. arXiv:1604.01685.
        - Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention. 2019. arXiv:1803.10704.
        - Liu, James, Davison, Johns: Auto-Lambda: Disentangling Dynamic Task Relationships. 2022. arXiv:2202.03091.
        - de Geus et al.: Part-aware Panoptic Segmentation. 2021. arXiv:2106.06351.
    """

    ORIGIN = Origin(
        name="Cityscapes (MTAN or Auto-Lambda form)",
        address="https://www.dropbox.com/sh/gaw6vh6qusoyms6/AADwWi0Tp3E3M4B2xzeGlsEna?dl=0 (128 x 256)",
        tree="root/{train,val}/{image,label_7,depth}/{0..N-1}.npy, N = 2,975 and 500, or\n"
        "root/{train,val}/{image,depth,seg}/{0..N-1}.png with part_seg/{0..N-1}.tif",
        licence="Cityscapes terms, non-commercial, no redistribution, https://www.cityscapes-dataset.com/license/",
    )
    COUNTS: Mapping[str, int] = {"train": 2975, "val": 500}

    def __init__(
        self,
        *,
        root: str | Path = "data/cityscapes",
        tasks: Sequence[str] = ("segmentation", "depth"),
        num_classes: Literal[2, 7, 19] = 7,
        image_size: int | tuple[int, int] | None = None,
        augment: bool = False,
        normalize: Normalize | None = None,
        val_fraction: float = 0.1,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        on_broken: OnBroken = "raise",
    ) -> None:
        super().__init__(
            cityscapes_specs(num_classes),
            root=root,
            tasks=tasks,
            image_size=image_size,
            augment=augment,
            normalize=normalize,
            val_fraction=val_fraction,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            on_broken=on_broken,
        )
        self.num_classes = num_classes

    def open_split(self, split: Split) -> tuple[list[str], dict[str, Files]]:
        """Return the keys and files of ``split``: ``"test"`` is the folder ``val``.

        Raises:
            DatasetNotFoundError: If there is no such folder in ``root``.
            ValueError: If the form that is there has no such task or number of classes.
        """
        name = "train" if split == "train" else "val"
        folder = self.root / name
        pictures = any((folder / "image").glob("[!.]*.png"))
        available = self._pictures(folder) if pictures else self._arrays(folder)
        if "part_segmentation" in self.tasks and not pictures and folder.is_dir():
            raise ValueError(
                f"`tasks` should be among segmentation and depth in the form of MTAN. Found part_segmentation, and "
                f"arrays in {folder}."
            )
        if "segmentation" in self.tasks and pictures and self.num_classes != 19:
            raise ValueError(
                f"`num_classes` should be 19 in the form of Auto-Lambda, which is in {folder}. "
                f"Found {self.num_classes}."
            )
        files = {field: available[field] for field in ("image", *self.tasks) if field in available}
        return numbered_samples(self.root, name, files, self.COUNTS[name], self.ORIGIN), dict(files)

    def _arrays(self, folder: Path) -> dict[str, Folder]:
        label = folder / f"label_{self.num_classes}"
        readers: dict[str, tuple[Path, Callable[[Path], Tensor]]] = {
            "image": (folder / "image", read_image),
            "segmentation": (
                label if label.is_dir() or not (folder / "label").is_dir() else folder / "label",
                partial(read_classes, num_classes=self.num_classes),
            ),
            "depth": (folder / "depth", read_depth),
        }
        return {field: Folder(path, ".npy", reader) for field, (path, reader) in readers.items()}

    @staticmethod
    def _pictures(folder: Path) -> dict[str, Folder]:
        return {
            "image": Folder(folder / "image", ".png", read_image),
            "segmentation": Folder(folder / "seg", ".png", read_label_ids),
            "depth": Folder(folder / "depth", ".png", read_disparity),
            "part_segmentation": Folder(folder / "part_seg", ".tif", read_parts),
        }


def cityscapes_tasks(
    names: Sequence[str] = ("segmentation", "depth"), num_classes: Literal[2, 7, 19] = 7
) -> list[Task]:
    """Return tasks of ``CityscapesDataModule`` in the order of their ``names``, as ``dense_task`` makes them.

    Raises:
        TypeError: If ``names`` is one string.
        ValueError: If a name is not that of a task, or repeated, or the number of classes is not 2, 7 or 19.

    Example:
        >>> [task.name for task in cityscapes_tasks(["depth", "segmentation"])]
        ['depth', 'segmentation']
    """
    specs = cityscapes_specs(num_classes)
    return [dense_task(specs[name]) for name in check_names(names, specs, "names")]


def cityscapes_baselines(split: Literal["val", "test"] = "test") -> dict[str, Baseline]:
    """Return the single-task results that FAMO compares with, for ``RelativeImprovement``.

    They are numbers of one network on the 500 test samples with 7 classes; for another, train your own. Errors were
    averaged over test batches. FAMO averages the four metrics (``per="metric"``) and prints the opposite sign.

    Args:
        split: The split under whose names the modules log.

    References:
        - Liu, Feng, Stone, Liu: FAMO: Fast Adaptive Multitask Optimization. 2023. arXiv:2306.03792.

    Example:
        >>> cityscapes_baselines()["test_relative_error/depth"]
        Baseline(value=27.77, higher_is_better=False)
    """
    values = {
        "miou/segmentation": Baseline(0.7401, higher_is_better=True),
        "accuracy/segmentation": Baseline(0.9316, higher_is_better=True),
        "absolute_error/depth": Baseline(0.0125, higher_is_better=False),
        "relative_error/depth": Baseline(27.77, higher_is_better=False),
    }
    return {f"{split}_{name}": baseline for name, baseline in values.items()}
