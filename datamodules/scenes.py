"""Rendered rooms with up to twelve dense tasks, whose relation to each other can be set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl_lightning.datamodules.base import Split, SplitDataModule, check_at_least
from mtl_lightning.datamodules.joint_transforms import JointTransform, LabelKind, missing_like
from mtl_lightning.datamodules.loading import EpochIndexSampler, EpochSampler, derive_seed
from mtl_lightning.datamodules.scene_cache import SceneFile, SceneSet, read_map
from mtl_lightning.datamodules.scene_geometry import SEMSEG_CLASSES
from mtl_lightning.datamodules.scene_rendering import MAX_SIZE, MIN_SIZE


@dataclass(frozen=True)
class SceneTask:
    """A task of the scenes.

    Attributes:
        name: Its name, the key in the batch.
        channels: The number of channels of a prediction: of the label, or of classes. None for ``instance``, whose
            numbers differ from picture to picture and name nothing: it is a label for losses that ask only whether two
            pixels have the same, such as those of pixel embeddings with any number of channels (De Brabandere, Neven,
            Van Gool: Semantic Instance Segmentation with a Discriminative Loss Function. 2017. arXiv:1708.02551).
        kind: What its numbers mean.
    """

    name: str
    channels: int | None
    kind: LabelKind

    @property
    def is_classes(self) -> bool:
        """Whether labels are integers, shape ``(B, H, W)``, and not floats, shape ``(B, channels, H, W)``."""
        return self.kind == "classes"

    @property
    def has_classes(self) -> bool:
        """Whether each number names a class, in integers or, in a mask of edges, as 0 or 1 in floats."""
        return self.kind in ("classes", "mask")


#: All tasks, by name.
SCENE_TASKS: Mapping[str, SceneTask] = {
    task.name: task
    for task in (
        SceneTask("semseg", len(SEMSEG_CLASSES), "classes"),
        SceneTask("instance", None, "classes"),
        SceneTask("depth_zbuffer", 1, "depth"),
        SceneTask("depth_euclidean", 1, "depth"),
        SceneTask("normal", 3, "normal"),
        SceneTask("reshading", 1, "values"),
        SceneTask("edge_occlusion", 1, "mask"),
        SceneTask("edge_texture", 1, "values"),
        SceneTask("keypoints2d", 1, "values"),
        SceneTask("keypoints3d", 1, "values"),
        SceneTask("principal_curvature", 2, "curvature"),
        SceneTask("albedo", 3, "values"),
    )
}


class ScenesDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Scenes as ``(image, {task: label})``: float32, shapes ``(3, H, W)`` and ``(C, H, W)``, classes int64, ``(H, W)``.

    Index ``epoch * len + i`` is scene ``i`` as it is seen in that epoch: all that is random in an item depends on the
    seed and the index only, and repeats with any number of workers and after a resumption.

    Args:
        scenes: The source of the records.
        tasks: The names of the labels, in their order.
        label_noise: The noise of each task, as ``ScenesDataModule`` has it.
        missing: The share of scenes that lack the label of each task.
        transform: The augmentation; it has to know the kind of all tasks.
        seed: The seed of noise, missing labels and augmentation.
    """

    def __init__(
        self,
        scenes: SceneSet | SceneFile,
        tasks: Sequence[str],
        *,
        label_noise: Mapping[str, float] | None = None,
        missing: Mapping[str, float] | None = None,
        transform: JointTransform | None = None,
        seed: int = 0,
    ) -> None:
        self.scenes = scenes
        self.tasks = tuple(tasks)
        self.label_noise = dict(label_noise or {})
        self.transform = transform
        self.seed = seed
        self._missing = {task: self._draw_missing(task, share) for task, share in (missing or {}).items()}

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        # Without it Python would ask for the items of further epochs, for ever.
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if index < 0:
            raise IndexError(f"The index should be at least 0. Found {index}.")
        epoch, index = divmod(index, len(self))
        record = self.scenes[index]
        image = read_map(record, "image")
        if self.transform is None:
            return image, {task: self._label(record, task, index, mirrored=False) for task in self.tasks}
        draw = self.transform.draw(self._generator("augmentation", epoch, index), *image.shape[-2:])
        labels = {task: self._label(record, task, index, mirrored=draw.flip) for task in self.tasks}
        return self.transform.apply(image, labels, draw)

    def _generator(self, *key: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed("scenes", self.seed, *key))

    def _draw_missing(self, task: str, share: float) -> frozenset[int]:
        order = torch.randperm(len(self), generator=self._generator("missing", task))
        return frozenset(order[: min(round(share * len(self)), len(self) - 1)].tolist())

    def _label(self, record: Any, task: str, index: int, *, mirrored: bool) -> Tensor:
        # The light of reshading is on the right of the camera: only a label lit from the left is true once flipped.
        label = read_map(record, "reshading_left" if mirrored and task == "reshading" else task)
        if index in self._missing.get(task, ()):
            return missing_like(label)
        if self.label_noise.get(task):
            label = _add_noise(label, SCENE_TASKS[task], self.label_noise[task], self._generator("noise", task, index))
        return label


def _add_noise(label: Tensor, task: SceneTask, noise: float, generator: torch.Generator) -> Tensor:
    if task.has_classes:
        # A mask is a map of two classes: Gaussian noise would make losses of probabilities unbounded.
        number = 2 if task.kind == "mask" else task.channels or int(label.max()) + 1
        wrong = torch.rand(label.shape, generator=generator) < noise
        return torch.where(wrong, torch.randint(number, label.shape, generator=generator).to(label.dtype), label)
    label = label + noise * label.std(unbiased=False) * torch.randn(label.shape, generator=generator)
    return torch.nn.functional.normalize(label, dim=0) if task.kind == "normal" else label


class ScenesDataModule(SplitDataModule):
    """Pictures of random rooms and labels of up to twelve dense tasks, rendered, with nothing to download.

    ``render`` in ``scene_rendering`` says what the scenes and the labels are, ``SCENE_TASKS`` how many channels each
    task has. A batch is ``(images, {task: label})``: float32 images in ``[0, 1]``, shape ``(B, 3, size, size)``,
    float32 labels, shape ``(B, C, size, size)``, and int64 classes, shape ``(B, size, size)``. Where a label is
    missing, floats are NaN and classes -1: a loss of classes needs ``ignore_index=-1``, others have to leave NaN out.

    The tasks are related as the scene relates them. Depth, normals, reshading, curvature and occlusion edges are
    geometry; texture edges, 2-D keypoints and albedo are appearance, which ``texture`` makes independent of geometry,
    and ``shading`` ties to it. Noise on the labels of one task makes a conflict that sharing cannot resolve.

    The first ``prepare_data`` renders the scenes, on one CPU core about 130 a second or more at size 64, and writes all
    labels of a split into one file, of about 37 bytes a pixel: 152 kB a scene at size 64. Runs with the same scenes
    share it, whatever their tasks, noise and augmentation. In it, colours are rounded to 1/255, components of normals
    to 1/32767, other maps in ``[0, 1]`` to 1/65535, curvature to float16; the rest is exact. Files are only replaced,
    never deleted.

    With ``augment``, half of the training pictures are mirrored and all are crops, enlarged 1 to 1.25 times, drawn anew
    in every epoch by seed, epoch and scene. ``JointTransform`` says which rules keep the labels true; reshading of a
    mirrored picture is that by a light which is again 0.6 m to the right. Instances keep their numbers.
    With ``Trainer(overfit_batches=...)`` all epochs see the same crops.

    Args:
        tasks: The names of the tasks, at least one of ``SCENE_TASKS``.
        size: The height and width of the pictures in pixels, in ``[32, 224]``.
        num_train: The number of training scenes.
        num_val: The number of validation scenes. With 0 there is no such split.
        num_test: The number of test scenes. With 0 there is no such split.
        texture: The share of materials that are patterned, in ``[0, 1]``.
        shading: The strength of light and shadow, in ``[0, 1]``.
        label_noise: The noise of the training labels, by task: for float labels the standard deviation of Gaussian
            noise on each number, as a multiple of the standard deviation of that label over the picture (noisy normals
            are brought back to unit length, others leave their range); for classes and occlusion edges, the share of
            pixels, in ``[0, 1]``, whose class is drawn at random. It is the same in every epoch.
        missing: The share of training scenes, in ``[0, 1)``, that lack the label, by task; drawn independently. At
            least one scene keeps it.
        augment: Whether training pictures are mirrored and cropped at random.
        cache_dir: The folder of the files; ``"auto"`` is ``mtl_lightning/scenes`` in the user's cache folder,
            ``$XDG_CACHE_HOME`` or ``~/.cache``. With None nothing is written and every picture is rendered, again in
            every epoch, when it is asked for; it is the same picture.
        batch_size: The number of pictures per batch and rank.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the scenes of all splits, of noise, missing labels, augmentation and the order of training.

    Raises:
        TypeError: If ``tasks`` is one string.
        ValueError: If a task is not known, repeated or not among ``tasks``, or a number is out of its range.

    Example:
        >>> datamodule = ScenesDataModule(tasks=["semseg", "normal"], size=32, batch_size=8, cache_dir=None)
        >>> datamodule.setup("fit")
        >>> inputs, targets = next(iter(datamodule.train_dataloader()))
        >>> inputs.shape, targets["semseg"].shape, targets["normal"].shape
        (torch.Size([8, 3, 32, 32]), torch.Size([8, 32, 32]), torch.Size([8, 3, 32, 32]))
    """

    FLIP = 0.5
    MAX_SCALE = 1.25

    def __init__(
        self,
        *,
        tasks: Sequence[str] = (
            "semseg",
            "depth_zbuffer",
            "normal",
            "reshading",
            "edge_occlusion",
            "edge_texture",
            "keypoints2d",
        ),
        size: int = 64,
        num_train: int = 2_000,
        num_val: int = 400,
        num_test: int = 400,
        texture: float = 0.75,
        shading: float = 1.0,
        label_noise: Mapping[str, float] | None = None,
        missing: Mapping[str, float] | None = None,
        augment: bool = False,
        cache_dir: str | Path | None = "auto",
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_at_least("num_train", num_train, 1)
        check_at_least("num_val", num_val, 0)
        check_at_least("num_test", num_test, 0)
        self.tasks = _check_tasks(tasks)
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"`size` should be in [{MIN_SIZE}, {MAX_SIZE}] pixels. Found {size}.")
        for name, value in (("texture", texture), ("shading", shading)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` should be in [0, 1]. Found {value}.")
        self.size = size
        self.counts: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        self.texture = float(texture)
        self.shading = float(shading)
        self.label_noise = self._check_rates("label_noise", label_noise)
        self.missing = self._check_rates("missing", missing)
        self.augment = augment
        self.cache_dir = cache_dir

    def prepare_data(self) -> None:
        """Render the scenes of all splits into their files, unless they are there."""
        for split in self.counts:
            scenes = self._scenes(split)
            if isinstance(scenes, SceneFile):
                scenes.ensure()

    def setup(self, stage: str | None = None) -> None:
        """Open the files.

        Raises:
            FileNotFoundError: If there is no such file, or it is not whole.
        """
        for split in self.counts:
            self.datasets[split] = self._dataset(split)

    def train_sampler(self, dataset: Sized, *, num_replicas: int, rank: int) -> EpochSampler:
        """Return the order of the training scenes, with the epoch if they are augmented."""
        if not self.augment:
            return super().train_sampler(dataset, num_replicas=num_replicas, rank=rank)
        return EpochIndexSampler(dataset, seed=self.seed, num_replicas=num_replicas, rank=rank)

    def _dataset(self, split: Split) -> ScenesDataset | None:
        scenes = self._scenes(split)
        if scenes is None:
            return None
        if isinstance(scenes, SceneFile):
            scenes.check()
        if split != "train":
            return ScenesDataset(scenes, self.tasks)
        kinds = {task: SCENE_TASKS[task].kind for task in self.tasks}
        return ScenesDataset(
            scenes,
            self.tasks,
            label_noise=self.label_noise,
            missing=self.missing,
            transform=JointTransform(kinds, flip=self.FLIP, max_scale=self.MAX_SCALE) if self.augment else None,
            seed=self.seed,
        )

    def _scenes(self, split: Split) -> SceneSet | SceneFile | None:
        if self.counts[split] == 0:
            return None
        scenes = SceneSet(split, self.counts[split], self.size, self.seed, self.texture, self.shading)
        if self.cache_dir is None:
            return scenes
        return SceneFile(_auto_cache_dir() if self.cache_dir == "auto" else Path(self.cache_dir).expanduser(), scenes)

    def _check_rates(self, name: str, rates: Mapping[str, float] | None) -> dict[str, float]:
        for task, rate in (rates or {}).items():
            if task not in self.tasks:
                raise ValueError(f"`{name}` should name tasks among {', '.join(self.tasks)}. Found {task!r}.")
            if name == "missing":
                interval, inside = "[0, 1)", 0 <= rate < 1
            elif SCENE_TASKS[task].has_classes:
                interval, inside = "[0, 1]", 0 <= rate <= 1
            else:
                interval, inside = "[0, inf)", 0 <= rate < float("inf")
            if not inside:
                raise ValueError(f"`{name}` of {task!r} should be in {interval}. Found {rate}.")
        return dict(rates or {})


def _check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tasks, str):
        raise TypeError(f"`tasks` should be a sequence of names. Found the string {tasks!r}.")
    unknown = [task for task in tasks if task not in SCENE_TASKS]
    if unknown or not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(
            f"`tasks` should hold at least one of {', '.join(SCENE_TASKS)}, each once. Found {list(tasks)}."
        )
    return tuple(tasks)


def _auto_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtl_lightning" / "scenes"
