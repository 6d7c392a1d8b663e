"""NYUD-v2 in the three forms in which it is published for multi-task learning, all under the same names of folders."""

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
from mtl_lightning.datamodules.dense_labels import read_classes, read_depth, read_image, read_mask, read_normals
from mtl_lightning.datamodules.dense_tasks import dense_task
from mtl_lightning.datamodules.files import Origin, read_lines
from mtl_lightning.task import Task

_NAMES = ("segmentation", "depth", "normal", "edge")
_FOLDERS = {"image": "images", "segmentation": "segmentation", "depth": "depth", "normal": "normals", "edge": "edge"}
# The ends of the names in each form, by which it is recognised.
_SUFFIXES: Mapping[str, Mapping[str, str]] = {
    "ASTMT": {"image": ".jpg", "segmentation": ".mat", "depth": ".mat", "normal": ".jpg", "edge": ".png"},
    "MTI": {"image": ".jpg", "segmentation": ".png", "depth": ".npy", "normal": ".npy", "edge": ".npy"},
    "InvPT": {"image": ".png", "segmentation": ".png", "depth": ".npy", "normal": ".png", "edge": ".png"},
}


def nyud_specs(num_classes: Literal[40, 41] = 40) -> dict[str, DenseTask]:
    """Return the tasks of NYUD-v2 with 40 classes, or with the background as one more.

    Raises:
        ValueError: If the number of classes is another.

    Example:
        >>> nyud_specs(41)["segmentation"]
        DenseTask(name='segmentation', channels=41, kind='classes')
    """
    if num_classes not in (40, 41):
        raise ValueError(f"`num_classes` should be 40 or 41. Found {num_classes}.")
    return {
        "segmentation": DenseTask("segmentation", num_classes, "classes"),
        "depth": DenseTask("depth", 1, "depth"),
        "normal": DenseTask("normal", 3, "normal"),
        "edge": DenseTask("edge", 1, "mask"),
    }


class NYUDDataModule(DenseDataModule):
    """NYUD-v2, 425 x 560 pixels, with the tasks ``segmentation``, ``depth``, ``normal`` and ``edge``.

    A batch is ``(images, targets)``: images, shape ``(B, 3, H, W)``; ``segmentation``, int64, ``(B, H, W)``, -1 where
    there is none; ``depth`` in metres, ``(B, 1, H, W)``; ``normal``, unit vectors, ``(B, 3, H, W)``; ``edge``, 0 to 1,
    ``(B, 1, H, W)``; floats are float32, NaN where there is none.

    The 654 samples of ``gt_sets/val.txt`` are the test split; ``val_fraction`` of the 795 of ``gt_sets/train.txt`` is
    held out for validation. Images are normalised by mean and standard deviation of ImageNet, as is usual here. With
    ``augment``, training pictures are mirrored and enlarged by 1, 1.2 or 1.5, depth divided by it (``ScaleChoice``),
    as on NYUv2; InvPT draws from 0.5 to 2 and distorts colours as well.

    Which form it is, is told by the ends of the file names. In all of them ``root`` holds ``gt_sets/{train,val}.txt``
    with one key a line, and ``{images,segmentation,depth,normals,edge}/{key}`` with these ends::

                       ASTMT   MTI, ATRC   InvPT, STGU
        images         .jpg    .jpg        .png
        segmentation   .mat    .png        .png         0 for background, classes 1 to 40
        depth          .mat    .npy        .npy         metres, 0 for none
        normals        .jpg    .npy        .png         pictures: 2 v / 255 - 1
        edge           .png    .npy        .png         pictures: v / 255

    How to get it: ASTMT https://data.vision.ee.ethz.ch/kmaninis/share/MTL/NYUD_MT.tgz; MTI Google Drive, id
    14EAEMXmd3zs2hIMY63UhHPSFPDAkiTzw; InvPT ``NYUDv2.tar.gz``, linked from
    https://github.com/prismformore/Multi-Task-Transformer. No checksums are published. No licence of the data is
    stated.

    Args:
        root: The folder that holds ``gt_sets`` and ``images``.
        tasks: The names of the tasks, in the order of the batch.
        num_classes: 40, with -1 for background, as MTI, ATRC, InvPT and STGU have it, or 41, with background as class
            0, as ASTMT does.
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
        - Silberman, Hoiem, Kohli, Fergus: Indoor Segmentation and Support Inference from RGBD Images. 2012.
        - Maninis, Radosavovic, Kokkinos: Attentive Single-Tasking of Multiple Tasks. 2019. arXiv:1904.08918.
        - Vandenhende, Georgoulis, Van Gool: MTI-Net: Multi-Scale Task Interaction Networks. 2020. arXiv:2001.06902.
        - Ye, Xu: Inverted Pyramid Multi-task Transformer for Dense Scene Understanding. 2022. arXiv:2203.07997.
    """

    ORIGIN = Origin(
        name="NYUD-v2",
        address="https://data.vision.ee.ethz.ch/kmaninis/share/MTL/NYUD_MT.tgz or "
        "https://github.com/prismformore/Multi-Task-Transformer (NYUDv2.tar.gz)",
        tree="root/gt_sets/{train,val}.txt\nroot/{images,segmentation,depth,normals,edge}/{key}.{jpg,png,npy,mat}",
        licence="none stated",
    )

    def __init__(
        self,
        *,
        root: str | Path = "data/NYUDv2",
        tasks: Sequence[str] = _NAMES,
        num_classes: Literal[40, 41] = 40,
        image_size: int | tuple[int, int] | None = None,
        augment: bool = False,
        normalize: Normalize | None = "imagenet",
        val_fraction: float = 0.1,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        on_broken: OnBroken = "raise",
    ) -> None:
        super().__init__(
            nyud_specs(num_classes),
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
        """Return the keys and files of ``split``: ``"test"`` is the list ``val``.

        Raises:
            DatasetNotFoundError: If there is no such list in ``root``, or none of the three forms is recognised.
        """
        if (self.root / "train" / "image").is_dir():
            raise self.ORIGIN.not_found(
                f"`root` should hold gt_sets/. Found NYUv2 in the form of MTAN in {self.root}, with train/image/, "
                "which `NYUv2DataModule` reads"
            )
        keys = read_lines(self.root / "gt_sets" / f"{'train' if split == 'train' else 'val'}.txt", self.ORIGIN)
        form = self._form()
        background = 0 if self.num_classes == 41 else 1
        ignore = (-1, 255) if self.num_classes == 41 else (-1, 0, 255)
        readers: dict[str, Callable[[Path], Tensor]] = {
            "image": read_image,
            "segmentation": partial(
                read_classes,
                num_classes=self.num_classes,
                first=background,
                ignore=ignore,
                key="segmentation" if form == "ASTMT" else None,
            ),
            "depth": partial(read_depth, key="depth" if form == "ASTMT" else None),
            "normal": read_normals,
            "edge": read_mask,
        }
        return keys, {
            field: Folder(self.root / _FOLDERS[field], _SUFFIXES[form][field], readers[field])
            for field in ("image", *self.tasks)
        }

    def _form(self) -> str:
        """Return the form of which there are files of all fields, or else of most."""

        def present(form: str) -> int:
            fields = _SUFFIXES[form].items()
            return sum(any((self.root / _FOLDERS[field]).glob(f"[!.]*{suffix}")) for field, suffix in fields)

        best = max(_SUFFIXES, key=present)
        if not present(best):
            raise self.ORIGIN.not_found(f"`root` should hold NYUD-v2. Found none of its files in {self.root}")
        return best


def nyud_tasks(names: Sequence[str] = _NAMES, num_classes: Literal[40, 41] = 40) -> list[Task]:
    """Return tasks of ``NYUDDataModule`` in the order of their ``names``, as ``dense_task`` makes them.

    The loss of normals is 1 - cosine, where InvPT and STGU take L1 of unit vectors (``L1NormalLoss``), which also weigh
    losses: STGU all by 1, InvPT by 1, 1, 10 and 50. The F1 score of edges allows no tolerance; published odsF do.

    Raises:
        TypeError: If ``names`` is one string.
        ValueError: If a name is not that of a task, or repeated.

    Example:
        >>> [(task.name, list(task.metrics)) for task in nyud_tasks(["segmentation", "edge"])]
        [('segmentation', ['accuracy', 'miou']), ('edge', ['f1'])]
    """
    specs = nyud_specs(num_classes)
    return [dense_task(specs[name]) for name in check_names(names, specs, "names")]
