"""Taskonomy: up to twelve dense tasks of buildings, split by building."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import conv1d, pad
from torchmetrics import Metric, MetricCollection

from mtl_lightning.datamodules.base import Split
from mtl_lightning.datamodules.colours import Normalize
from mtl_lightning.datamodules.dense import (
    DenseDataModule,
    DenseTask,
    Files,
    OnBroken,
    check_names,
)
from mtl_lightning.datamodules.dense_labels import read_classes, read_image
from mtl_lightning.datamodules.dense_tasks import dense_task
from mtl_lightning.datamodules.files import BrokenFileError, Origin, first_few, read_pixels, read_text
from mtl_lightning.losses import MaskedL1Loss, MaskedMSELoss
from mtl_lightning.metrics import MaskedMeanAbsoluteError, MaskedMeanSquaredError
from mtl_lightning.task import Task

Subset = Literal["tiny", "medium", "full", "fullplus"]

#: All tasks, by name: eleven regressions and the classes of objects.
TASKONOMY_TASKS: Mapping[str, DenseTask] = {
    task.name: task
    for task in (
        DenseTask("depth_euclidean", 1, "depth"),
        DenseTask("depth_zbuffer", 1, "depth"),
        DenseTask("edge_occlusion", 1, "values"),
        DenseTask("edge_texture", 1, "values"),
        DenseTask("keypoints2d", 1, "values"),
        DenseTask("keypoints3d", 1, "values"),
        DenseTask("normal", 3, "normal"),
        DenseTask("principal_curvature", 2, "values"),
        DenseTask("reshading", 3, "values"),
        # Colours of segments: a mixture of two would be a third segment.
        DenseTask("segment_unsup2d", 1, "mask"),
        DenseTask("segment_unsup25d", 1, "mask"),
        DenseTask("segment_semantic", 17, "classes"),
    )
}
_ELEVEN = tuple(TASKONOMY_TASKS)[:-1]

_NO_DEPTH = 65535
_LOG_RANGE = log(2**16)
_PER_METRE = 512
_CURVATURE_MEAN = (123.572, 120.1)
_CURVATURE_STD = (31.922, 21.658)
_EDGE_SIGMA = 4.0
# The name of the domain in the names of files, where it differs from that of the folder.
_DOMAINS_IN_NAMES: Mapping[str, tuple[str, ...]] = {"segment_semantic": ("segment_semantic", "segmentsemantic")}
_NAME = re.compile(r"point_(\d+)_view_(\d+)_domain_(\w+)\.png")


def depth_in_metres(target: Tensor) -> Tensor:
    """Return the depth in metres of targets or predictions of ``depth_euclidean`` and ``depth_zbuffer``; any shape.

    Example:
        >>> depth_in_metres(torch.tensor([log(1 + 512) / log(2**16)])).round(decimals=3)
        tensor([1.])
    """
    return torch.expm1(target.double() * _LOG_RANGE).to(target.dtype) / _PER_METRE


def read_depth_target(path: Path) -> Tensor:
    """Return ``log(1 + v) / log(2^16)`` of the 16-bit depth ``v`` at ``path``, float32, ``(1, H, W)``; NaN for 65535.

    Raises:
        BrokenFileError: If it is no such picture.
    """
    stored = _pixels(path, 1)
    return torch.where(stored == _NO_DEPTH, torch.nan, torch.log1p(stored) / _LOG_RANGE)


def read_scaled(path: Path, channels: int, full: float, *, clip: bool = False, sigma: float = 0.0) -> Tensor:
    """Return ``2 v / full - 1`` of the values ``v`` at ``path``, float32, shape ``(channels, H, W)``.

    Args:
        path: The picture.
        channels: The number of channels that are read; a picture may hold more.
        full: The value that becomes 1.
        clip: Whether larger values become 1, too.
        sigma: The standard deviation in pixels of a Gaussian that blurs the values; 0 for none.

    Raises:
        BrokenFileError: If it is no such picture.
    """
    values = _pixels(path, channels)
    if clip:
        values = values.clamp(max=full)
    return (blurred(values, sigma) if sigma else values) * (2 / full) - 1


def read_curvature(path: Path) -> Tensor:
    """Return the two standardised curvatures at ``path``, float32, shape ``(2, H, W)``; none is 127 in the file.

    Raises:
        BrokenFileError: If it is no such picture.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (_CURVATURE_MEAN, _CURVATURE_STD))
    return (_pixels(path, 2) - mean) / std


def read_normal_target(path: Path) -> Tensor:
    """Return the unit normals ``v / 127.5 - 1`` at ``path``, float32, shape ``(3, H, W)``; NaN where there is none.

    Raises:
        BrokenFileError: If it is no such picture.
    """
    normal = _pixels(path, 3) / 127.5 - 1
    length = normal.square().sum(0).sqrt()  # many times faster than the norm along the first dimension
    # Grey, 127 or 128 in all channels, stands for no surface: such a vector is 0.01 long, and others 1.
    valid = length > 0.5
    return torch.where(valid, normal / torch.where(valid, length, 1), torch.nan)


def blurred(values: Tensor, sigma: float) -> Tensor:
    """Return ``values``, shape ``(C, H, W)``, under a Gaussian of ``sigma`` pixels, mirrored at the border.

    Example:
        >>> blurred(torch.full((1, 8, 8), 3.0), 1.0).unique().round(decimals=4)
        tensor([3.])
    """
    # Not beyond the picture, which cannot be mirrored further.
    radius = min(round(4 * sigma), *(side - 1 for side in values.shape[-2:]))
    kernel = torch.exp(-((torch.arange(-radius, radius + 1) / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum())[None, None]
    for _ in range(2):  # along the rows, then along the columns
        rows = pad(values, (radius, radius), mode="reflect").reshape(-1, 1, values.shape[-1] + 2 * radius)
        values = conv1d(rows, kernel).reshape(values.shape).transpose(-1, -2)
    return values.contiguous()


def _pixels(path: Path, channels: int) -> Tensor:
    stored = read_pixels(path)
    if stored.ndim == 2:
        stored = stored[:, :, None]
    if stored.ndim != 3 or stored.shape[2] < channels:
        raise BrokenFileError.of(path, f"a picture of {channels} channels", f"shape {stored.shape}")
    # In float32 first: in uint16, 65535 + 1 is 0, whose logarithm is minus infinity.
    values = np.ascontiguousarray(stored[:, :, :channels].transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(values)


_READERS: Mapping[str, Callable[[Path], Tensor]] = {
    "image": read_image,
    "depth_euclidean": read_depth_target,
    "depth_zbuffer": read_depth_target,
    "edge_occlusion": partial(read_scaled, channels=1, full=0.00625 * 2**16, sigma=_EDGE_SIGMA),
    "edge_texture": partial(read_scaled, channels=1, full=0.08 * 2**16, clip=True),
    "keypoints2d": partial(read_scaled, channels=1, full=0.005 * 2**16, clip=True),
    "keypoints3d": partial(read_scaled, channels=1, full=2**16),
    "normal": read_normal_target,
    "principal_curvature": read_curvature,
    "reshading": partial(read_scaled, channels=3, full=255),
    "segment_unsup2d": partial(read_scaled, channels=1, full=255),
    "segment_unsup25d": partial(read_scaled, channels=1, full=255),
    "segment_semantic": partial(read_classes, num_classes=17, first=1, ignore=(0, 255)),
}


@dataclass(frozen=True)
class Domain:
    """The files of one domain in either tree; a key is ``{building}/{point}/{view}``.

    Attributes:
        folders: The folder of the domain of each building.
        name: The domain as the names of its files have it.
        reader: Reads one of them.
    """

    folders: Mapping[str, Path]
    name: str
    reader: Callable[[Path], Tensor]

    def keys(self) -> set[str]:
        """Return the keys of the samples that have this file."""
        return {
            f"{building}/{match[1]}/{match[2]}"
            for building, folder in self.folders.items()
            for match in _matches(folder)
            if match[3] == self.name
        }

    def path(self, key: str) -> Path:
        """Return where the file of the sample ``key`` is, or should be."""
        building, point, view = key.split("/")
        return self.folders[building] / f"point_{point}_view_{view}_domain_{self.name}.png"

    def read(self, path: Path) -> Tensor:
        """Return the image or label in the file."""
        return self.reader(path)


def _matches(folder: Path) -> Iterator[re.Match[str]]:
    if folder.is_dir():
        yield from filter(None, (_NAME.fullmatch(name) for name in os.listdir(folder)))


def _key_order(key: str) -> tuple[str, int, int]:
    building, point, view = key.split("/")
    return building, int(point), int(view)


class TaskonomyDataModule(DenseDataModule):
    """Taskonomy, 512 x 512 pixels as stored, with any of the tasks of ``TASKONOMY_TASKS``.

    A batch is ``(images, {task: target})``: images in ``[-1, 1]``, shape ``(B, 3, H, W)``, and float32 targets, shape
    ``(B, C, H, W)``, as in the official code of selective task group updates, NaN where there is none; int64 classes,
    -1 where there is none:

    ======================================= =========================================================================
    task                                    target, of the stored value ``v``
    ======================================= =========================================================================
    ``depth_euclidean``, ``depth_zbuffer``  ``log(1 + v) / log(2^16)``; v in 1/512 m, 65535 for none
    ``edge_occlusion``                      ``2 v / (0.00625 2^16) - 1``, under a Gaussian of 4 pixels as stored
    ``edge_texture``                        ``2 v / (0.08 2^16) - 1``, at most 1
    ``keypoints2d``                         ``2 v / (0.005 2^16) - 1``, at most 1
    ``keypoints3d``                         ``2 v / 2^16 - 1``
    ``normal``                              unit vectors, ``2 v / 255 - 1`` brought to length one; grey for none
    ``principal_curvature``                 ``(v - (123.572, 120.1)) / (31.922, 21.658)``, two channels
    ``reshading``                           ``2 v / 255 - 1``
    ``segment_unsup2d, segment_unsup25d``   ``2 v / 255 - 1``, one channel
    ``segment_semantic``                    17 classes, ``v - 1``, the first is background; 0 (uncertain) for none
    ======================================= =========================================================================

    Samples are matched by building, point and view, never by position in a list. If a task lacks a file, ``on_broken``
    decides: ``"raise"`` stops and names it, ``"skip"`` drops the sample, ``"mask"`` drops only that label.
    Depth is masked before anything is resized and takes the nearest pixel, so that "none" is not mixed into neighbours.

    Splits are lists of buildings, ``train_val_test_{subset}.csv`` in ``root``, ``root/splits_taskonomy`` or at
    ``split_file``; buildings of the list of which there is nothing in ``root`` are left out with a warning. All files
    of the official test buildings are the test split; the code of selective task group updates tests on their first
    tenth and trains on validation buildings, too. With ``augment``, training pictures are mirrored; normals change the
    sign of their x, unlike there.

    How to get it: ``omnitools.download all --components taskonomy --subset tiny --dest ... --agree`` (Omnidata), or
    http://taskonomy.stanford.edu; the lists from https://github.com/StanfordVL/taskonomy (data/assets). Licence: end
    user agreement, non-commercial research, no redistribution. Either tree::

        root/{domain}/taskonomy/{building}/point_{p}_view_{v}_domain_{domain}.png    Omnidata
        root/{building}/{domain}/point_{p}_view_{v}_domain_{domain}.png              original
        root/splits_taskonomy/train_val_test_{tiny,medium,full,fullplus}.csv         id,train,val,test

    Limits: that 65535 is "none", at which resolution the official code blurs, and the numbers of ``segment_semantic``
    could not be confirmed.

    Args:
        root: The folder of the domains or of the buildings.
        tasks: The names of the tasks, in the order of the batch.
        subset: Which list of buildings.
        split_file: The list itself, if it lies elsewhere.
        image_size: The height and width, or the side, that pictures are resized to; None for that of the files.
        augment: Whether training pictures are mirrored at random.
        normalize: How images are normalised: ``"imagenet"`` by that set's mean and standard deviation, ``"symmetric"``
            to ``[-1, 1]``, None to ``[0, 1]``.
        batch_size: The number of samples per batch and rank.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the order of training and the augmentation.
        on_broken: What becomes of samples with files that are missing or cut off, see ``DenseDataModule``.

    Raises:
        TypeError: If ``tasks`` is one string.
        ValueError: If a task or subset is not known, a task is repeated, or a number is out of its range.

    References:
        - Zamir, Sax, Shen, Guibas, Malik, Savarese: Taskonomy: Disentangling Task Transfer Learning. 2018.
          arXiv:1804.08328.
        - Eftekhar, Sax, Bachmann, Malik, Zamir: Omnidata. 2021. arXiv:2110.04994.
        - Jeong, Yoon: Selective Task Group Updates for Multi-Task Optimization. 2025. arXiv:2502.11986.
    """

    ORIGIN = Origin(
        name="Taskonomy",
        address="https://github.com/EPFL-VILAB/omnidata (omnitools.download all --components taskonomy --subset tiny) "
        "and the lists of buildings from https://github.com/StanfordVL/taskonomy, data/assets",
        tree="root/{domain}/taskonomy/{building}/point_{p}_view_{v}_domain_{domain}.png, or\n"
        "root/{building}/{domain}/point_{p}_view_{v}_domain_{domain}.png, with\n"
        "root/splits_taskonomy/train_val_test_{tiny,medium,full,fullplus}.csv",
        licence="Taskonomy end user agreement: non-commercial research, no redistribution",
    )
    SCALES = (1.0,)
    HAS_VAL = True

    def __init__(
        self,
        *,
        root: str | Path = "data/taskonomy",
        tasks: Sequence[str] = _ELEVEN,
        subset: Subset = "tiny",
        split_file: str | Path | None = None,
        image_size: int | tuple[int, int] | None = 256,
        augment: bool = False,
        normalize: Normalize | None = "symmetric",
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        on_broken: OnBroken = "raise",
    ) -> None:
        super().__init__(
            TASKONOMY_TASKS,
            root=root,
            tasks=tasks,
            image_size=image_size,
            augment=augment,
            normalize=normalize,
            val_fraction=0.0,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            on_broken=on_broken,
        )
        if subset not in get_args(Subset):
            raise ValueError(f"`subset` should be one of {', '.join(get_args(Subset))}. Found {subset!r}.")
        self.subset = subset
        self.split_file = None if split_file is None else Path(split_file).expanduser()

    def open_split(self, split: Split) -> tuple[list[str], dict[str, Files]]:
        """Return the keys and files of the buildings of ``split``.

        Raises:
            DatasetNotFoundError: If the list, or all of its buildings, are not there.
            ValueError: If the list is of another form.
        """
        buildings = read_buildings(self._list(), self.ORIGIN)[split]
        files: dict[str, Files] = {
            field: self._domain("rgb" if field == "image" else field, buildings, _READERS[field])
            for field in ("image", *self.tasks)
        }
        keys = set().union(*(fields.keys() for fields in files.values()))
        absent = sorted(set(buildings) - {key.split("/")[0] for key in keys})
        if not keys:
            raise self.ORIGIN.not_found(
                f"`root` should hold the {len(buildings)} buildings of the {split} split. Found none in {self.root}",
                absent,
            )
        self._report(split, absent)
        return sorted(keys, key=_key_order), files

    def _report(self, split: Split, absent: list[str]) -> None:
        if absent:
            rank_zero_warn(
                f"{len(absent)} buildings of the {split} split are left out, as there is nothing of them in "
                f"{self.root}: {first_few(absent)}"
            )

    def _list(self) -> Path:
        name = f"train_val_test_{self.subset}.csv"
        places = [self.split_file] if self.split_file else [self.root / "splits_taskonomy" / name, self.root / name]
        for place in places:
            if place.is_file():
                return place
        raise self.ORIGIN.not_found(f"The list of buildings should be {' or '.join(map(str, places))}. Found none")

    def _domain(self, domain: str, buildings: Sequence[str], reader: Callable[[Path], Tensor]) -> Domain:
        omnidata = (self.root / domain / "taskonomy").is_dir()
        folders = {
            building: self.root / domain / "taskonomy" / building if omnidata else self.root / building / domain
            for building in buildings
        }
        names = _DOMAINS_IN_NAMES.get(domain, (domain,))
        if len(names) > 1:
            seen = {match[3] for folder in folders.values() for match in _matches(folder)}
            names = tuple(name for name in names if name in seen) or names
        return Domain(folders, names[0], reader)


def read_buildings(path: Path, origin: Origin) -> dict[Split, list[str]]:
    """Return the buildings of each split in the list at ``path``, a CSV file of ``id,train,val,test`` with 0 and 1.

    Raises:
        ValueError: If the list is of another form.
    """
    # As text with any ends of lines: those of the published lists are a bare CR.
    rows = list(csv.DictReader(read_text(path).splitlines(), restval=""))
    splits: tuple[Split, ...] = ("train", "val", "test")
    if not rows or not {"id", *splits} <= rows[0].keys():
        raise BrokenFileError.of(path, "the columns id, train, val and test", ", ".join(rows[0] if rows else ["none"]))
    return {split: [row["id"].strip() for row in rows if row[split].strip() == "1"] for split in splits}


def taskonomy_tasks(names: Sequence[str] = _ELEVEN) -> list[Task]:
    """Return tasks of ``TaskonomyDataModule`` in the order of their ``names``.

    Losses are those of selective task group updates: 1 - cosine for normals, over the three channels of each pixel
    (the official code sums along the width); squared errors for curvature; L1 for the others; and cross entropy for
    classes. Metrics of classes and normals are those of ``dense_task``, the others ``absolute_error``, ``rmse`` and, of
    curvature, ``mse``, of the targets as they are: depth is logarithmic, see ``depth_in_metres``.

    Raises:
        TypeError: If ``names`` is one string.
        ValueError: If a name is not that of a task, or repeated.

    Example:
        >>> taskonomy_tasks(["normal", "principal_curvature", "edge_texture"])
        [Task('normal', CosineNormalLoss()), Task('principal_curvature', MaskedMSELoss()),
         Task('edge_texture', MaskedL1Loss())]
    """
    return [_task(TASKONOMY_TASKS[name]) for name in check_names(names, TASKONOMY_TASKS, "names")]


def _task(spec: DenseTask) -> Task:
    if spec.kind in ("classes", "normal"):
        return dense_task(spec)
    loss = MaskedMSELoss() if spec.name == "principal_curvature" else MaskedL1Loss()
    metrics: dict[str, Metric | MetricCollection] = {
        "absolute_error": MaskedMeanAbsoluteError(),
        "rmse": MaskedMeanSquaredError(squared=False),
    }
    if spec.name == "principal_curvature":
        metrics["mse"] = MaskedMeanSquaredError()
    return Task(spec.name, loss, MetricCollection(metrics))
