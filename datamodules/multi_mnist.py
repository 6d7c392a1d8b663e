"""MultiMNIST, Multi-Fashion and Multi-Fashion+MNIST, composed on the fly from the original files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from mtl_lightning.datamodules.base import SplitDataModule, check_at_least, check_fraction
from mtl_lightning.datamodules.idx import read_idx
from mtl_lightning.datamodules.overlap import Glyphs, OverlappingPairs

Source = Literal["mnist", "fashion"]
Part = Literal["train", "t10k"]


class MultiMNISTDataModule(SplitDataModule):
    """Images of two overlapping glyphs of 28 x 28 pixels, with the tasks ``left`` and ``right``, ten classes each.

    A batch is ``(inputs, {"left": labels, "right": labels})``: float32 images in ``[0, 1]``, shape ``(B, 1, 36, 36)``,
    and int64 labels, shape ``(B,)``. The left glyph lies at the top left corner and the right one at the bottom right
    corner, each moved away from it by 0 to 4 rows and 0 to 4 columns, drawn uniformly and fixed for each image. Where
    they overlap, the brighter pixel is seen.

    The classes are the digits 0 to 9, and for Fashion-MNIST T-shirt/top, trouser, pullover, dress, coat, sandal, shirt,
    sneaker, bag and ankle boot. ``val_fraction`` of the 60,000 training glyphs is held out for validation, and the
    10,000 test glyphs make the test split. Pairs are drawn within each split, so that no glyph is in two of them.

    Sizes and layout follow the files of Pareto MTL (120,000 and 20,000 images of 36 x 36 pixels), whose making was not
    published. The pairs, their positions and the maximum are our choice, so numbers compare with published ones in
    kind only.

    MNIST: Y. LeCun and C. Cortes hold the copyright, CC BY-SA 3.0. Fashion-MNIST: Zalando SE, MIT licence.

    The files are looked for in ``root/MNIST/raw`` or ``root/FashionMNIST/raw``, where torchvision puts them, in
    ``root/mnist`` or ``root/fashion-mnist``, and in ``root`` itself, each with and without ``.gz``. Those in ``root``
    itself are taken for the set that the variant asks for; ``"fashion+mnist"`` needs both sets and does not look there.

    Args:
        variant: ``"mnist"`` and ``"fashion"`` take both glyphs from one set, ``"fashion+mnist"`` the left one from
            MNIST and the right one from Fashion-MNIST; which is which in the files of Pareto MTL is not documented.
        root: The folder of the files.
        download: Whether ``prepare_data`` has torchvision fetch missing files into ``root``.
        num_train: The number of training pairs.
        num_val: The number of validation pairs.
        num_test: The number of test pairs.
        val_fraction: The fraction of the training glyphs that is held out for validation. With 0 there is no validation
            split.
        batch_size: The number of pairs per batch and rank. 256 is that of Pareto MTL.
        num_workers: The number of processes that read ahead, for each loader.
        seed: The seed of the validation glyphs, the pairs, their positions and the order of the training pairs.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        - LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition. 1998.
        - Xiao, Rasul, Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms.
          2017. arXiv:1708.07747.
        - Lin, Zhen, Li, Zhang, Kwong: Pareto Multi-Task Learning. 2019. arXiv:1912.12854.
    """

    GLYPH_SIZE = 28
    IMAGE_SIZE = 36
    MAX_SHIFT = 4
    NUM_CLASSES = 10
    SOURCES: ClassVar[dict[str, tuple[Source, Source]]] = {
        "mnist": ("mnist", "mnist"),
        "fashion": ("fashion", "fashion"),
        "fashion+mnist": ("mnist", "fashion"),
    }
    FOLDERS: ClassVar[dict[Source, tuple[str, str]]] = {
        "mnist": ("MNIST/raw", "mnist"),
        "fashion": ("FashionMNIST/raw", "fashion-mnist"),
    }
    URLS: ClassVar[dict[Source, str]] = {
        "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "fashion": "https://github.com/zalandoresearch/fashion-mnist/tree/master/data/fashion",
    }

    def __init__(
        self,
        variant: Literal["mnist", "fashion", "fashion+mnist"] = "mnist",
        root: str | Path = "data",
        download: bool = False,
        num_train: int = 120_000,
        num_val: int = 20_000,
        num_test: int = 20_000,
        val_fraction: float = 0.1,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, collate_fn=OverlappingPairs.collate)
        if variant not in self.SOURCES:
            raise ValueError(f"`variant` should be one of {', '.join(map(repr, self.SOURCES))}. Found {variant!r}.")
        check_at_least("num_train", num_train, 1)
        check_at_least("num_val", num_val, 1)
        check_at_least("num_test", num_test, 1)
        check_fraction("val_fraction", val_fraction)
        self.variant = variant
        self.root = Path(root).expanduser()
        self.download = download
        self.num_train = num_train
        self.num_val = num_val
        self.num_test = num_test
        self.val_fraction = val_fraction

    def prepare_data(self) -> None:
        """Fetch missing files with torchvision, if ``download`` is set."""
        parts: tuple[Part, Part] = ("train", "t10k")
        for source in sorted(set(self.SOURCES[self.variant])):
            if not self.download or all(self._find(source, part) for part in parts):
                continue
            from torchvision.datasets import MNIST, FashionMNIST

            {"mnist": MNIST, "fashion": FashionMNIST}[source](self.root, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Read the files, hold out the validation glyphs and draw the pairs.

        Raises:
            FileNotFoundError: If files are missing.
            ValueError: If a file is damaged or does not hold what it should.
        """
        left, right = self.SOURCES[self.variant]
        if stage in ("fit", "validate", None):
            glyphs = {source: self._read(source, "train") for source in {left, right}}
            split = {
                source: glyphs[source].hold_out(self.val_fraction, self.generator(source, "val")) for source in glyphs
            }
            (left_train, left_val), (right_train, right_val) = split[left], split[right]
            self.datasets["train"] = self._pairs(left_train, right_train, self.num_train, "train")
            self.datasets["val"] = (
                None if left_val is None or right_val is None else self._pairs(left_val, right_val, self.num_val, "val")
            )
        if stage in ("test", "predict", None):
            glyphs = {source: self._read(source, "t10k") for source in {left, right}}
            self.datasets["test"] = self._pairs(glyphs[left], glyphs[right], self.num_test, "test")

    def _pairs(self, left: Glyphs, right: Glyphs, num_pairs: int, split: str) -> OverlappingPairs:
        corner = self.IMAGE_SIZE - self.GLYPH_SIZE
        return OverlappingPairs(
            left,
            right,
            num_pairs,
            image_size=self.IMAGE_SIZE,
            left_offsets=(0, self.MAX_SHIFT),
            right_offsets=(corner - self.MAX_SHIFT, corner),
            generator=self.generator("pairs", split),
        )

    def _folders(self, source: Source) -> list[Path]:
        folders = [self.root / folder for folder in self.FOLDERS[source]]
        return folders if self.variant == "fashion+mnist" else [*folders, self.root]

    def _find(self, source: Source, part: Part) -> tuple[Path, Path] | None:
        """Return the files of the images and of the labels from the first folder that has both."""
        for folder in self._folders(source):
            images, labels = (_existing(folder, name) for name in _names(part))
            if images is not None and labels is not None:
                return images, labels
        return None

    def _read(self, source: Source, part: Part) -> Glyphs:
        found = self._find(source, part)
        if found is None:
            raise FileNotFoundError(
                f"`root` should hold {' and '.join(_names(part))}, as they are or with .gz, in one of "
                f"{', '.join(map(str, self._folders(source)))}. Found neither pair of them. "
                f"Pass `download=True` and have `prepare_data` run, or fetch them from {self.URLS[source]}."
            )
        images_path, labels_path = found
        images = read_idx(images_path, 3)
        labels = read_idx(labels_path, 1).long()
        if images.shape[1:] != (self.GLYPH_SIZE, self.GLYPH_SIZE):
            raise ValueError(
                f"{images_path} should hold images of {self.GLYPH_SIZE} x {self.GLYPH_SIZE} pixels. "
                f"Found {images.shape[1]} x {images.shape[2]}. Fetch it again from {self.URLS[source]}."
            )
        if len(labels) != len(images):
            raise ValueError(
                f"{labels_path} should hold {len(images)} labels, one for each image of {images_path.name}. "
                f"Found {len(labels)}. Fetch both again from {self.URLS[source]}."
            )
        if len(labels) == 0 or labels.max() >= self.NUM_CLASSES:
            raise ValueError(
                f"{labels_path} should hold labels from 0 to {self.NUM_CLASSES - 1}. "
                f"Found {'none' if len(labels) == 0 else int(labels.max())}. Fetch it again from {self.URLS[source]}."
            )
        return Glyphs(images, labels)


def _names(part: Part) -> tuple[str, str]:
    return f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"


def _existing(folder: Path, name: str) -> Path | None:
    """Return the file ``name`` in ``folder``, or the compressed one, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
