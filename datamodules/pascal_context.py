"""PASCAL-Context: segmentation, human parts, saliency, normals and edges of photographs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

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
from mtl_lightning.datamodules.dense_labels import read_classes, read_image, read_mask, read_normals
from mtl_lightning.datamodules.dense_tasks import dense_task
from mtl_lightning.datamodules.files import Origin, read_lines
from mtl_lightning.losses import BalancedBCELoss
from mtl_lightning.task import Task

PASCAL_CONTEXT_TASKS: Mapping[str, DenseTask] = {
    task.name: task
    for task in (
        DenseTask("segmentation", 21, "classes"),
        DenseTask("human_parts", 7, "classes"),
        DenseTask("saliency", 1, "mask"),
        DenseTask("normal", 3, "normal"),
        DenseTask("edge", 1, "mask"),
    )
}

_READERS: Mapping[str, Callable[[Path], Tensor]] = {
    "image": read_image,
    "segmentation": partial(read_classes, num_classes=21),
    "human_parts": partial(read_classes, num_classes=7),
    "saliency": read_mask,
    "normal": read_normals,
    "edge": read_mask,
}


class PASCALContextDataModule(DenseDataModule):
    """PASCAL-Context as written by ``prepare_pascal_context``, with up to five tasks.

    A batch is ``(images, targets)``, float32 but for classes, int64; floats are NaN and classes -1 where there is no
    label: images, shape ``(B, 3, H, W)``; ``segmentation``, 21 classes with background as 0, ``(B, H, W)``;
    ``human_parts``, 7 classes, 0 for background, then head, torso, upper and lower arms, upper and lower legs, and no
    label at all in pictures without a part; ``saliency`` and ``edge``, 0 or 1, ``(B, 1, H, W)``; ``normal``, unit
    vectors, ``(B, 3, H, W)``. Saliency and normals are predictions of other networks ("distilled").

    Pictures differ in size. They are shrunk, where larger, until they fit into ``image_size``, and lie in its middle;
    around them there are zeros, the mean colour, and no label. The list ``val`` is the test split; ``val_fraction`` of
    ``train`` (4,998 pictures) is held out for validation. Images are normalised by mean and standard deviation of
    ImageNet. With ``augment``, training pictures are mirrored and enlarged by 1, 1.2 or 1.5 (``ScaleChoice``).

    How to get it: ``PASCAL_MT.tgz``, https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz, or
    ``PASCALContext.tar.gz``, linked from https://github.com/prismformore/Multi-Task-Transformer; then run
    ``prepare_pascal_context`` once. No checksums are published. Licence: terms of PASCAL VOC and Flickr. Tree::

        root/{train,val}.txt                                             one key a line
        root/images/{key}.jpg
        root/{segmentation,human_parts,saliency,normal,edge}/{key}.png

    Args:
        root: The folder that ``prepare_pascal_context`` wrote.
        tasks: The names of the tasks, in the order of the batch.
        image_size: The height and width, or the side, of what is returned; None for that of each picture, which makes
            batches of one picture only.
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
        - Mottaghi et al.: The Role of Context for Object Detection and Semantic Segmentation in the Wild. 2014.
        - Chen et al.: Detect What You Can: Detecting and Representing Objects using Holistic Models and Body Parts.
          2014. arXiv:1406.2031.
        - Maninis, Radosavovic, Kokkinos: Attentive Single-Tasking of Multiple Tasks. 2019. arXiv:1904.08918.
    """

    ORIGIN = Origin(
        name="PASCAL-Context (prepared)",
        address="https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz; then call "
        "`prepare_pascal_context(unpacked, root)`",
        tree="root/{train,val}.txt\nroot/images/{key}.jpg\n"
        "root/{segmentation,human_parts,saliency,normal,edge}/{key}.png",
        licence="terms of PASCAL VOC and Flickr",
    )
    PADDED = True

    def __init__(
        self,
        *,
        root: str | Path = "data/pascal_context",
        tasks: Sequence[str] = ("segmentation", "human_parts", "saliency", "normal", "edge"),
        image_size: int | tuple[int, int] | None = 512,
        augment: bool = False,
        normalize: Normalize | None = "imagenet",
        val_fraction: float = 0.1,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        on_broken: OnBroken = "raise",
    ) -> None:
        super().__init__(
            PASCAL_CONTEXT_TASKS,
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
        """Return the keys and files of ``split``: ``"test"`` is the list ``val``.

        Raises:
            DatasetNotFoundError: If there is no such list in ``root``.
        """
        keys = read_lines(self.root / f"{'train' if split == 'train' else 'val'}.txt", self.ORIGIN)
        files: dict[str, Files] = {"image": Folder(self.root / "images", ".jpg", _READERS["image"])}
        files |= {name: Folder(self.root / name, ".png", _READERS[name]) for name in self.tasks}
        return keys, files


def pascal_context_tasks(
    names: Sequence[str] = ("segmentation", "human_parts", "saliency", "normal", "edge"),
) -> list[Task]:
    """Return tasks of ``PASCALContextDataModule`` in the order of their ``names``, as ``dense_task`` makes them.

    Saliency has the binary cross entropy of logits in which both classes of a batch count alike. Its ``f1`` is the best
    F1 score of one threshold for all pixels; published are maximal F scores with beta^2 = 0.3. InvPT weighs losses by
    1, 2, 5, 10 and 50, STGU all by 1.

    Raises:
        TypeError: If ``names`` is one string.
        ValueError: If a name is not that of a task, or repeated.

    Example:
        >>> pascal_context_tasks(["saliency", "edge"])
        [Task('saliency', BalancedBCELoss(positive_weight=None, ignore_value=None)),
         Task('edge', BalancedBCELoss(positive_weight=0.95, ignore_value=None))]
    """
    balanced = {"saliency": BalancedBCELoss(positive_weight=None)}
    return [
        dense_task(PASCAL_CONTEXT_TASKS[name], balanced.get(name))
        for name in check_names(names, PASCAL_CONTEXT_TASKS, "names")
    ]
