"""The dense data sets in all their layouts, for tests of what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mtl_lightning.datamodules.cityscapes import CityscapesDataModule, cityscapes_tasks
from mtl_lightning.datamodules.dense import DenseDataModule
from mtl_lightning.datamodules.nyud import NYUDDataModule, nyud_tasks
from mtl_lightning.datamodules.nyuv2 import NYUv2DataModule, nyuv2_tasks
from mtl_lightning.datamodules.pascal_context import PASCALContextDataModule, pascal_context_tasks
from mtl_lightning.datamodules.pascal_preparation import prepare_pascal_context
from mtl_lightning.datamodules.taskonomy import TASKONOMY_TASKS, TaskonomyDataModule, taskonomy_tasks
from mtl_lightning.task import Task
from tests.datamodules import layouts


@dataclass(frozen=True)
class Case:
    """A layout: what writes it, reads it and makes tasks of it, with one image and one label of a training sample."""

    name: str
    write: Callable[[Path], None]
    module: Callable[..., DenseDataModule]
    make_tasks: Callable[[Sequence[str]], list[Task]]
    image: str
    label: str
    label_task: str
    num_train: int = 6
    num_test: int = 4

    def __str__(self) -> str:
        return self.name

    def datamodule(self, root: Path, **options: Any) -> DenseDataModule:
        return self.module(root=root, **({"batch_size": 2} | options))


def _write_pascal(root: Path) -> None:
    published = root.parent / f"{root.name}-published"
    layouts.write_pascal_published(published)
    prepare_pascal_context(published, root)


def _taskonomy_file(domain: str, tree: str) -> str:
    point, view = layouts.taskonomy_views(3)[1]
    return str(layouts.taskonomy_path(Path(), tree, domain, "hanson", point, view))


CASES = (
    Case(
        "NYUv2",
        layouts.write_nyuv2,
        NYUv2DataModule,
        nyuv2_tasks,
        "train/image/3.npy",
        "train/depth/3.npy",
        "depth",
    ),
    Case(
        "Cityscapes arrays",
        layouts.write_cityscapes_arrays,
        CityscapesDataModule,
        cityscapes_tasks,
        "train/image/3.npy",
        "train/depth/3.npy",
        "depth",
    ),
    Case(
        "Cityscapes pictures",
        layouts.write_cityscapes_pictures,
        partial(CityscapesDataModule, num_classes=19, tasks=("segmentation", "depth", "part_segmentation")),
        partial(cityscapes_tasks, num_classes=19),
        "train/image/3.png",
        "train/depth/3.png",
        "depth",
    ),
    *(
        Case(
            f"NYUD {form}",
            partial(layouts.write_nyud, form=form),
            NYUDDataModule,
            nyud_tasks,
            f"images/0003{suffixes[0]}",
            f"depth/0003{suffixes[2]}",
            "depth",
        )
        for form, suffixes in layouts.NYUD_SUFFIXES.items()
    ),
    *(
        Case(
            f"Taskonomy {tree}",
            partial(layouts.write_taskonomy, tree=tree),
            partial(TaskonomyDataModule, tasks=tuple(TASKONOMY_TASKS), image_size=None),
            taskonomy_tasks,
            _taskonomy_file("rgb", tree),
            _taskonomy_file("depth_zbuffer", tree),
            "depth_zbuffer",
            num_test=6,
        )
        for tree in ("omnidata", "original")
    ),
    Case(
        "PASCAL-Context",
        _write_pascal,
        partial(PASCALContextDataModule, image_size=48),
        pascal_context_tasks,
        "images/2008_000003.jpg",
        "normal/2008_000003.png",
        "normal",
    ),
)
