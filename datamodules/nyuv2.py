"""NYUv2 in the form of MTAN: segmentation, depth and surface normals of indoor scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

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
from mtl_lightning.datamodules.dense_labels import read_classes, read_depth, read_image, read_normals
from mtl_lightning.datamodules.dense_tasks import dense_task
from mtl_lightning.datamodules.files import Origin
from mtl_lightning.datamodules.mtan_folders import numbered_samples
from mtl_lightning.metrics import Baseline
from mtl_lightning.task import Task

NYUV2_TASKS: Mapping[str, DenseTask] = {
    task.name: task
    for task in (
        DenseTask("segmentation", 13, "classes"),
        DenseTask("depth", 1, "depth"),
        DenseTask("normal", 3, "normal"),
    )
}

_FIELDS: Mapping[str, tuple[str, Callable[[Path], Tensor]]] = {
    "image": ("image", read_image),
    "segmentation": ("label", partial(read_classes, num_classes=13)),
    "depth": ("depth", read_depth),
    "normal": ("normal", read_normals),
}


class NYUv2DataModule(DenseDataModule):
    """NYUv2 as prepared for MTAN, 288 x 384 pixels, with the tasks ``segmentation``, ``depth`` and ``normal``.

    A batch is ``(images, targets)``: images, shape ``(B, 3, 288, 384)``; ``segmentation``, 13 classes, int64, shape
    ``(B, 288, 384)``, -1 where there is none; ``depth`` in metres, ``(B, 1, 288, 384)``; ``normal``, unit vectors,
    ``(B, 3, 288, 384)``; both float32, NaN where there is none (0 in the files). The order of the names of the classes
    is disputed, so they are not given here.

    The 654 samples of ``val`` are the test split, as in all publications, which therefore choose nothing by it.
    ``val_fraction`` of the 795 training samples is held out for validation; with 0, all are trained on, as in MTAN.

    With ``augment``, as MTAN's later code, nash and FAMO have it: enlargement by 1, 1.2 or 1.5 of a random crop, depth
    divided by it, and a flip in half of the cases, see ``ScaleChoice``. Their images stay in ``[0, 1]``, hence no
    ``normalize`` by default.

    How to get it: https://www.dropbox.com/sh/86nssgwm6hm3vkb/AACrnUQ4GxpdrBbLjb6n-mWNa?dl=0, linked from
    https://github.com/lorenmt/mtan. No checksum is published, and no licence is stated. Tree::

        root/{train,val}/image/0.npy   (288, 384, 3), floats in [0, 1]
        root/{train,val}/label/0.npy   (288, 384), 0 to 12, -1 for none
        root/{train,val}/depth/0.npy   (288, 384, 1), metres, 0 for none
        root/{train,val}/normal/0.npy  (288, 384, 3), unit vectors, 0 for none

    Args:
        root: The folder that holds ``train`` and ``val``.
        tasks: The names of the tasks, in the order of the batch.
        image_size: The height and width, or the side, that pictures are resized to; None for 288 x 384.
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
        - Silberman, Hoiem, Kohli, Fergus: Indoor Segmentation and Support Inference from RGBD Images. 2012.
        - Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention. 2019. arXiv:1803.10704.
    """

    ORIGIN = Origin(
        name="NYUv2 (MTAN form)",
        address="https://www.dropbox.com/sh/86nssgwm6hm3vkb/AACrnUQ4GxpdrBbLjb6n-mWNa?dl=0",
        tree="root/{train,val}/{image,label,depth,normal}/{0..N-1}.npy, N = 795 and 654",
        licence="none stated",
    )
    COUNTS: Mapping[str, int] = {"train": 795, "val": 654}

    def __init__(
        self,
        *,
        root: str | Path = "data/nyuv2",
        tasks: Sequence[str] = ("segmentation", "depth", "normal"),
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
            NYUV2_TASKS,
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

    def open_split(self, split: Split) -> tuple[list[str], dict[str, Files]]:
        """Return the keys and files of ``split``: ``"test"`` is the folder ``val``.

        Raises:
            DatasetNotFoundError: If there is no such folder in ``root``.
        """
        if (self.root / "gt_sets").is_dir():
            raise self.ORIGIN.not_found(
                f"`root` should hold the form of MTAN. Found that of NYUD-v2 in {self.root}, with gt_sets/, which "
                "`NYUDDataModule` reads"
            )
        folder = "train" if split == "train" else "val"
        files = {
            field: Folder(self.root / folder / _FIELDS[field][0], ".npy", _FIELDS[field][1])
            for field in ("image", *self.tasks)
        }
        return numbered_samples(self.root, folder, files, self.COUNTS[folder], self.ORIGIN), dict(files)


def nyuv2_tasks(names: Sequence[str] = ("segmentation", "depth", "normal")) -> list[Task]:
    """Return tasks of ``NYUv2DataModule`` in the order of their ``names``, as ``dense_task`` makes them.

    They are those of MTAN: cross entropy, L1, and 1 - cosine; metrics are pooled over the whole split, where nash and
    FAMO average those of batches.

    Raises:
        TypeError: If ``names`` is one string.
        ValueError: If a name is not that of a task, or repeated.

    Example:
        >>> nyuv2_tasks(["depth", "normal"])
        [Task('depth', MaskedL1Loss()), Task('normal', CosineNormalLoss())]
    """
    return [dense_task(NYUV2_TASKS[name]) for name in check_names(names, NYUV2_TASKS, "names")]


def nyuv2_baselines(split: Literal["val", "test"] = "test") -> dict[str, Baseline]:
    """Return the single-task results that nash and FAMO compare with, for ``RelativeImprovement``.

    They are numbers of one network, SegNet as in MTAN, on the 654 test samples; for another network, train your own.
    Errors and shares were averaged over test batches. Nash and FAMO average all nine metrics (``per="metric"``) and
    print the opposite sign.

    Args:
        split: The split under whose names the modules log.

    References:
        - Liu, Liu, Jin, Stone, Liu: Conflict-Averse Gradient Descent for Multi-task Learning. 2021. arXiv:2110.14048.
        - Navon et al.: Multi-Task Learning as a Bargaining Game. 2022. arXiv:2202.01017.

    Example:
        >>> from mtl_lightning.metrics import RelativeImprovement
        >>> improvement = RelativeImprovement(nyuv2_baselines(), per="metric")
        >>> improvement({name: baseline.value for name, baseline in nyuv2_baselines().items()})
        0.0
    """
    values = {
        "miou/segmentation": Baseline(0.3830, higher_is_better=True),
        "accuracy/segmentation": Baseline(0.6376, higher_is_better=True),
        "absolute_error/depth": Baseline(0.6754, higher_is_better=False),
        "relative_error/depth": Baseline(0.2780, higher_is_better=False),
        "mean_angle/normal": Baseline(25.01, higher_is_better=False),
        "median_angle/normal": Baseline(19.21, higher_is_better=False),
        "within_11/normal": Baseline(0.3014, higher_is_better=True),
        "within_22/normal": Baseline(0.5720, higher_is_better=True),
        "within_30/normal": Baseline(0.6915, higher_is_better=True),
    }
    return {f"{split}_{name}": baseline for name, baseline in values.items()}
