"""Office-31 and Office-Home: the same objects in several domains, one task per domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from mtl_lightning.datamodules.base import Split, check_fraction
from mtl_lightning.datamodules.colours import Normalize, checked_colours
from mtl_lightning.datamodules.combined import CombinedMode, PerTaskDataModule, PerTaskDataset
from mtl_lightning.datamodules.files import BrokenFileError, Origin, read_text
from mtl_lightning.datamodules.label_tasks import class_task
from mtl_lightning.datamodules.pictures import (
    OnBroken,
    PictureFiles,
    check_on_broken,
    picture_augmentation,
    without_broken,
)
from mtl_lightning.datamodules.resizing import check_image_size
from mtl_lightning.task import Task

Variant = Literal["office-31", "office-home"]
_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_SUFFIXES = (".jpg", ".jpeg", ".png")


class _Office(NamedTuple):
    """A set: its domains, each with the names that its folder may have, its classes, and where it comes from.

    Folders of classes are in the folder of the domain, or in ``inner`` of that.
    """

    domains: Mapping[str, tuple[str, ...]]
    num_classes: int
    inner: str
    origin: Origin


OFFICE: Mapping[str, _Office] = {
    "office-31": _Office(
        {"amazon": ("amazon",), "dslr": ("dslr",), "webcam": ("webcam",)},
        31,
        "images",
        Origin(
            "Office-31",
            "https://www.cc.gatech.edu/~judy/domainadapt/#datasets_code",
            "root/office-31/{amazon,dslr,webcam}/images/<class>/frame_0001.jpg, 31 classes",
            "research use",
        ),
    ),
    "office-home": _Office(
        {"Art": ("Art",), "Clipart": ("Clipart",), "Product": ("Product",), "Real_World": ("Real_World", "Real World")},
        65,
        "",
        Origin(
            "Office-Home",
            "https://www.hemanthdv.org/officeHomeDataset.html",
            "root/office-home/{Art,Clipart,Product,Real_World}/<Class>/00001.jpg, 65 classes",
            "research use",
        ),
    ),
}


class OfficeDataModule(PerTaskDataModule):
    """Office-31 or Office-Home, with one task per domain: the same classes, in pictures of its own.

    A training batch holds as many pictures of each domain: it is ``(inputs, {domain: labels})``, float32, shape
    ``(B, 3, H, W)``, and int64, shape ``(B,)``, -1 for all domains but that of the picture.

    Layouts: ``root/office-31/{amazon,dslr,webcam}/images/<class>/*.jpg`` with 31 classes, from
    https://www.cc.gatech.edu/~judy/domainadapt/#datasets_code, and
    ``root/office-home/{Art,Clipart,Product,Real_World}/<Class>/*.jpg`` with 65 classes, from
    https://www.hemanthdv.org/officeHomeDataset.html, whose archive is said to write ``Real World``; both are read. The
    folders of the domains may also be in ``root`` itself. Licence, not confirmed: research use.

    There is no official split. ``splits`` takes lists like those of LibMTL, ``<domain>_{train,val,test}.txt`` with
    lines ``path label``, paths relative to the folder of the domains: 60 / 20 / 20 percent. Without it, splits of these
    shares are drawn by seed in each domain, and classes are numbered in the order of their names.

    LibMTL trains a ResNet-18 on pictures of 224 x 224 pixels, normalised as for ImageNet, 64 of each domain in a batch:
    the defaults here, except that it leaves out incomplete batches.

    Args:
        variant: ``"office-31"`` or ``"office-home"``.
        root: The folder.
        splits: The folder of the lists.
        tasks: The domains to learn, in their order; all by default.
        image_size: The height and width, or one number for both; None leaves that of the files, which differ.
        augment: Whether half of the training pictures are mirrored, and all are crops, enlarged 1 to 1.25 times.
        normalize: By which mean and deviation colours are standardised, ``"imagenet"``, or ``"symmetric"``, to
            ``[-1, 1]``. None leaves them in ``[0, 1]``.
        val_fraction: The share of pictures of each domain for validation, without lists. With 0 there is no such split.
        test_fraction: The share for the test, without lists. With 0 there is no such split.
        on_broken: With ``"skip"``, pictures that are missing or not whole are left out and said once. Every file is
            opened for it in ``setup``, at its beginning and end only.
        mode: When an epoch ends, as in ``TaskBalancedSampler``.
        batch_size: The number of pictures per batch and rank, a multiple of the number of domains; by default 64 per
            domain.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the splits, the augmentation and the order of training.

    Attributes:
        class_names: The names of the classes by their numbers; empty before ``setup``.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        - Saenko, Kulis, Fritz, Darrell: Adapting Visual Category Models to New Domains. 2010.
        - Venkateswara, Eusebio, Chakraborty, Panchanathan: Deep Hashing Network for Unsupervised Domain Adaptation.
          2017. arXiv:1706.07522.
        - Lin, Zhang: LibMTL: A Python Library for Multi-Task Learning. 2022. arXiv:2203.14338.
    """

    def __init__(
        self,
        *,
        variant: Variant = "office-31",
        root: str | Path = "data",
        splits: str | Path | None = None,
        tasks: Sequence[str] | None = None,
        image_size: int | tuple[int, int] | None = 224,
        augment: bool = False,
        normalize: Normalize | None = "imagenet",
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        on_broken: OnBroken = "raise",
        mode: CombinedMode = "max_size_cycle",
        batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.tasks = _checked_names("tasks", variant, tasks)
        super().__init__(
            num_tasks=len(self.tasks),
            mode=mode,
            batch_size=64 * len(self.tasks) if batch_size is None else batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        check_fraction("val_fraction", val_fraction)
        check_fraction("test_fraction", test_fraction)
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                "`val_fraction` and `test_fraction` should leave pictures for training. "
                f"Found {val_fraction} and {test_fraction}."
            )
        check_on_broken(on_broken)
        self.variant: Variant = variant
        self.root = Path(root).expanduser()
        self.splits = None if splits is None else Path(splits).expanduser()
        self.image_size = check_image_size(image_size)
        self.augment = augment
        self.colours = checked_colours(normalize)
        self.fractions: dict[Split, float] = {"val": val_fraction, "test": test_fraction}
        self.on_broken: OnBroken = on_broken
        self.class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes of each task."""
        return OFFICE[self.variant].num_classes

    def setup(self, stage: str | None = None) -> None:
        """Read the lists, or the folders and draw the splits.

        Raises:
            DatasetNotFoundError: If folders or pictures are missing.
            ValueError: If a list is damaged, or there is another number of classes.
        """
        folders = self._domain_folders()
        if self.splits is None:
            samples, self.class_names = self._drawn(folders)
        else:
            samples, self.class_names = self._listed(folders, self.splits)
        missing = [
            path for parts in samples.values() for part in parts.values() for path, _ in part if not path.is_file()
        ]
        if missing and self.on_broken == "raise":
            raise OFFICE[self.variant].origin.not_found(
                f"The lists in {self.splits} name pictures that are not there", missing
            )
        for split in _SPLITS:
            parts = {domain: self._pictures(samples[domain][split]) for domain in self.tasks}
            if not any(map(len, parts.values())) and split != "train":
                self.datasets[split] = None
                continue
            self.datasets[split] = PerTaskDataset(
                parts,
                labels=dict.fromkeys(parts, torch.tensor(0)),
                transform=picture_augmentation if self.augment and split == "train" else None,
                seed=self.seed,
            )

    def _pictures(self, samples: Sequence[tuple[Path, int]]) -> PictureFiles:
        kept = without_broken([path for path, _ in samples], self.on_broken).tolist()
        samples = [sample for sample, keep in zip(samples, kept, strict=True) if keep]
        labels = torch.tensor([label for _, label in samples], dtype=torch.long)
        return PictureFiles([path for path, _ in samples], labels, self.image_size, self.colours)

    def _domain_folders(self) -> dict[str, Path]:
        office = OFFICE[self.variant]
        found: dict[str, Path] = {}
        for base in (self.root / self.variant, self.root):
            for domain in self.tasks:
                names = [base / name for name in office.domains[domain] if (base / name).is_dir()]
                if names and domain not in found:
                    found[domain] = names[0]
        missing = [f"{domain}/" for domain in self.tasks if domain not in found]
        if missing:
            raise office.origin.not_found(f"Found no whole {office.origin.name} in {self.root}", missing)
        return found

    def _drawn(
        self, folders: Mapping[str, Path]
    ) -> tuple[dict[str, dict[Split, list[tuple[Path, int]]]], tuple[str, ...]]:
        """Return the samples of each domain and split, and the names of the classes."""
        office = OFFICE[self.variant]
        inner = {domain: folder / office.inner for domain, folder in folders.items()}
        classes = {
            domain: sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
            for domain, folder in inner.items()
        }
        names = classes[self.tasks[0]]
        for domain, found in classes.items():
            if len(found) != office.num_classes or found != names:
                others = sorted(set(found) ^ set(names))
                raise office.origin.not_found(
                    f"{inner[domain]} should hold {office.num_classes} folders of classes, the same in each domain; "
                    f"found {len(found)}",
                    others,
                )
        samples: dict[str, dict[Split, list[tuple[Path, int]]]] = {}
        for domain, folder in inner.items():
            files = [
                (path, label)
                for label, name in enumerate(names)
                for path in sorted((folder / name).iterdir())
                if path.suffix.lower() in _SUFFIXES
            ]
            order = torch.randperm(len(files), generator=self.generator("split", domain)).tolist()
            test = round(self.fractions["test"] * len(files))
            val = test + round(self.fractions["val"] * len(files))
            parts: dict[Split, list[int]] = {"test": order[:test], "val": order[test:val], "train": order[val:]}
            samples[domain] = {split: [files[row] for row in sorted(rows)] for split, rows in parts.items()}
        return samples, tuple(names)

    def _listed(
        self, folders: Mapping[str, Path], lists: Path
    ) -> tuple[dict[str, dict[Split, list[tuple[Path, int]]]], tuple[str, ...]]:
        """Return the samples of each domain and split, and the names of the classes."""
        missing = [
            f"{domain}_{split}.txt"
            for domain in self.tasks
            for split in _SPLITS
            if not (lists / f"{domain}_{split}.txt").is_file()
        ]
        if missing:
            raise FileNotFoundError(
                f"`splits`, {lists}, should hold a list of each split. Missing: {', '.join(missing)}."
            )
        names: dict[int, str] = {}
        samples: dict[str, dict[Split, list[tuple[Path, int]]]] = {}
        for domain in self.tasks:
            samples[domain] = {}
            for split in _SPLITS:
                path = lists / f"{domain}_{split}.txt"
                entries = self._entries(path, domain)
                for entry, label in entries:
                    name = Path(entry).parent.name
                    if names.setdefault(label, name) != name:
                        raise BrokenFileError.of(
                            path, f"pictures of {names[label]!r} under number {label}", repr(entry)
                        )
                samples[domain][split] = [(folders[domain] / entry, label) for entry, label in entries]
        return samples, tuple(names.get(label, "") for label in range(self.num_classes))

    def _entries(self, path: Path, domain: str) -> list[tuple[str, int]]:
        """Return the paths, below the folder of the domain, and labels of a list."""
        entries = []
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            # The last space: names of folders may have some. And the last line may lack its end.
            name, _, label = line.rstrip().rpartition(" ")
            if not line.strip():
                continue
            folder, _, rest = name.partition("/")
            if (
                folder not in OFFICE[self.variant].domains[domain]
                or not rest
                or Path(rest).is_absolute()
                or ".." in Path(rest).parts
            ):
                raise BrokenFileError.of(path, f"a path in {domain}/ and a label in line {number}", repr(line))
            if not label.isdecimal() or int(label) >= self.num_classes:
                raise BrokenFileError.of(path, f"a label in [0, {self.num_classes}) in line {number}", repr(label))
            entries.append((rest, int(label)))
        return entries


def _checked_names(argument: str, variant: str, names: Sequence[str] | None) -> tuple[str, ...]:
    if variant not in OFFICE:
        raise ValueError(f"`variant` should be one of {', '.join(OFFICE)}. Found {variant!r}.")
    domains = OFFICE[variant].domains
    if names is None:
        return tuple(domains)
    if isinstance(names, str) or not names or len(set(names)) < len(names) or not set(names) <= set(domains):
        raise ValueError(f"`{argument}` should hold at least one of {', '.join(domains)}, each once. Found {names!r}.")
    return tuple(names)


def office_tasks(variant: Variant = "office-31", names: Sequence[str] | None = None) -> list[Task]:
    """Return the tasks of these domains, in their order: 31 or 65 logits, cross entropy, metric ``accuracy``.

    Args:
        variant: ``"office-31"`` or ``"office-home"``.
        names: Names of domains; all by default.

    Raises:
        ValueError: If a name is not known.

    Example:
        >>> [task.name for task in office_tasks("office-home")]
        ['Art', 'Clipart', 'Product', 'Real_World']
    """
    return [class_task(name, OFFICE[variant].num_classes) for name in _checked_names("names", variant, names)]
