from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from mtl_lightning.datamodules import MultiMNISTDataModule
from mtl_lightning.datamodules.base import Split
from mtl_lightning.datamodules.overlap import OverlappingPairs

WriteIdx = Callable[[Path, Tensor], Path]

SPLITS: tuple[Split, ...] = ("train", "val", "test")
NUM_GLYPHS = {"train": 40, "t10k": 10}
NUM_PAIRS = {"num_train": 300, "num_val": 200, "num_test": 200}
REAL = Path(__file__).parents[3] / "shared" / "data"
needs_real_files = pytest.mark.skipif(not REAL.exists(), reason="the MNIST files are not beside the repository")


def _glyphs(part: str, first: int) -> Tensor:
    """Images that differ in the value of all their pixels: ``first`` onwards for training, 40 further on for test."""
    start = first + (0 if part == "train" else 40)
    return torch.arange(start, start + NUM_GLYPHS[part], dtype=torch.uint8)[:, None, None].expand(-1, 28, 28)


@pytest.fixture
def write_set(write_idx: WriteIdx) -> Callable[..., None]:
    """Return a function that writes the four files of a small set to a folder."""

    def write(folder: Path, first: int = 1, suffix: str = ".gz") -> None:
        for part in NUM_GLYPHS:
            images = _glyphs(part, first)
            write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
            write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", images[:, 0, 0] % 10)

    return write


@pytest.fixture
def root(tmp_path: Path, write_set: Callable[..., None]) -> Path:
    """A folder with both sets. Pixels are 1 to 50 in MNIST and 101 to 150 in Fashion-MNIST, labels their last digit."""
    write_set(tmp_path / "mnist")
    write_set(tmp_path / "fashion-mnist", 101)
    return tmp_path


def _datamodule(root: Path, stage: str | None = None, **options: Any) -> MultiMNISTDataModule:
    datamodule = MultiMNISTDataModule(root=root, **(NUM_PAIRS | options))
    datamodule.setup(stage)
    return datamodule


def _pairs(datamodule: MultiMNISTDataModule, split: Split) -> OverlappingPairs:
    pairs = datamodule.datasets[split]
    assert isinstance(pairs, OverlappingPairs)
    return pairs


def _images(datamodule: MultiMNISTDataModule, split: Split) -> Tensor:
    pairs = _pairs(datamodule, split)
    return pairs.__getitems__(list(range(len(pairs))))[0]


def _values(pairs: OverlappingPairs, side: str) -> set[int]:
    return set(getattr(pairs, side).images[:, 0, 0].tolist())


# Splits


def test_the_splits_share_no_glyph_and_lose_none(root: Path) -> None:
    datamodule = _datamodule(root, val_fraction=0.25)
    parts = [_values(_pairs(datamodule, split), "left") for split in SPLITS]
    assert [len(part) for part in parts] == [30, 10, 10]
    assert set.union(*parts) == set(range(1, 51))
    assert parts[2] == set(range(41, 51))


@pytest.mark.parametrize(
    ("variant", "left", "right"), [("mnist", 1, 1), ("fashion", 101, 101), ("fashion+mnist", 1, 101)]
)
def test_the_variant_decides_which_glyph_comes_from_which_set(root: Path, variant: str, left: int, right: int) -> None:
    datamodule = _datamodule(root, variant=variant)
    for side, first in (("left", left), ("right", right)):
        parts = [_values(_pairs(datamodule, split), side) for split in SPLITS]
        assert set.union(*parts) == set(range(first, first + 50))


def test_labels_are_those_of_the_glyphs(root: Path) -> None:
    pairs = _pairs(_datamodule(root, variant="fashion+mnist"), "train")
    inputs, targets = pairs.__getitems__(list(range(300)))
    pixels = (inputs.squeeze(1) * 255).round().long()
    # Pixel (5, 5) lies in every left glyph and in some right ones, which are brighter; (30, 30) in every right one.
    left, right = pixels[:, 5, 5], pixels[:, 30, 30]
    assert torch.equal(right % 10, targets["right"])
    seen = left < 100
    assert seen.any()
    assert torch.equal(left[seen] % 10, targets["left"][seen])


def test_glyphs_lie_at_their_corners_and_move_by_up_to_four_pixels(root: Path) -> None:
    pairs = _pairs(_datamodule(root), "train")
    images = _images(_datamodule(root), "train")
    assert images.shape == (300, 1, 36, 36)
    assert set(pairs.offsets[:, 0].flatten().tolist()) == {0, 1, 2, 3, 4}
    assert set(pairs.offsets[:, 1].flatten().tolist()) == {4, 5, 6, 7, 8}


def test_no_validation_without_a_fraction(root: Path) -> None:
    datamodule = _datamodule(root, val_fraction=0.0)
    assert datamodule.val_dataloader() == []
    assert _values(_pairs(datamodule, "train"), "left") == set(range(1, 41))


def test_a_stage_reads_only_its_files(root: Path) -> None:
    for path in root.glob("mnist/t10k*"):
        path.unlink()
    assert set(_datamodule(root, "fit").datasets) == {"train", "val"}
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte"):
        _datamodule(root, "test")


# Draws


@pytest.mark.parametrize("split", SPLITS)
def test_the_seed_decides(root: Path, split: Split) -> None:
    first, same, other = (_images(_datamodule(root, seed=seed), split) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_validation_and_test_do_not_depend_on_the_number_of_training_pairs(root: Path) -> None:
    first, other = _datamodule(root, num_train=10), _datamodule(root, num_train=100)
    for split in ("val", "test"):
        assert torch.equal(_images(first, split), _images(other, split))


def test_the_splits_are_drawn_differently(root: Path) -> None:
    datamodule = _datamodule(root)
    train, val, test = (_pairs(datamodule, split).offsets[:200] for split in SPLITS)
    assert not torch.equal(val, test)
    assert not torch.equal(train, val)


def test_batches_have_the_documented_form(root: Path) -> None:
    inputs, targets = next(iter(_datamodule(root, batch_size=32).train_dataloader()))
    assert (inputs.dtype, inputs.shape) == (torch.float32, (32, 1, 36, 36))
    assert {name: (target.dtype, target.shape) for name, target in targets.items()} == {
        "left": (torch.int64, (32,)),
        "right": (torch.int64, (32,)),
    }


def test_arguments_can_be_given_on_the_command_line(root: Path) -> None:
    arguments = [f"--data.root={root}", "--data.variant=fashion+mnist", "--data.download=true"]
    datamodule = LightningCLI(BoringModel, MultiMNISTDataModule, args=arguments, run=False).datamodule
    assert (datamodule.root, datamodule.variant, datamodule.download) == (root, "fashion+mnist", True)


# Files


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("variant", "folder"),
    [
        ("mnist", "MNIST/raw"),
        ("mnist", "mnist"),
        ("mnist", "."),
        ("fashion", "FashionMNIST/raw"),
        ("fashion", "fashion-mnist"),
        ("fashion", "."),
    ],
)
def test_files_are_found_in_each_layout(
    tmp_path: Path, write_set: Callable[..., None], variant: str, folder: str, suffix: str
) -> None:
    write_set(tmp_path / folder, 21, suffix)
    datamodule = _datamodule(tmp_path, variant=variant)
    assert _values(_pairs(datamodule, "test"), "left") == set(range(61, 71))


def test_a_folder_with_a_name_comes_before_the_root_itself(root: Path, write_set: Callable[..., None]) -> None:
    write_set(root, 21)
    assert _values(_pairs(_datamodule(root), "test"), "left") == set(range(41, 51))


def test_files_in_the_root_itself_do_not_stand_for_two_sets(tmp_path: Path, write_set: Callable[..., None]) -> None:
    write_set(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"train-images-idx3-ubyte.*/(Fashion)?MNIST/raw, [^,]*mnist\. Found neither"
    ):
        _datamodule(tmp_path, variant="fashion+mnist")


def test_files_that_are_there_are_not_fetched(root: Path) -> None:
    before = sorted(root.rglob("*"))
    MultiMNISTDataModule(root=root, download=True).prepare_data()
    assert sorted(root.rglob("*")) == before


@needs_real_files
def test_real_files_are_read() -> None:
    datamodule = MultiMNISTDataModule(root=REAL, val_fraction=0.0)
    datamodule.setup("fit")
    pairs = _pairs(datamodule, "train")
    assert len(pairs) == 120_000
    assert pairs.left.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert pairs.left.images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    inputs, _ = next(iter(datamodule.train_dataloader()))
    assert inputs.shape == (256, 1, 36, 36)


@pytest.fixture
def mirror() -> Iterator[str]:
    """The address of a local server of the real MNIST files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(REAL / "mnist"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@needs_real_files
def test_missing_files_are_fetched(tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [mirror])
    datamodule = MultiMNISTDataModule(root=tmp_path, download=True)
    datamodule.prepare_data()
    datamodule.setup("test")
    assert len(_pairs(datamodule, "test").left.labels) == 10_000


# Bad input


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("variant", "kmnist", r"should be one of 'mnist', 'fashion', 'fashion\+mnist'\. Found 'kmnist'"),
        ("num_train", 0, r"should be at least 1\. Found 0"),
        ("num_val", 0, r"should be at least 1\. Found 0"),
        ("num_test", -5, r"should be at least 1\. Found -5"),
        ("val_fraction", 1.0, r"should be in \[0, 1\)\. Found 1\.0"),
        ("batch_size", 0, r"should be at least 1\. Found 0"),
        ("num_workers", -1, r"should be at least 0\. Found -1"),
        ("seed", -1, r"should be at least 0\. Found -1"),
    ],
)
def test_an_argument_out_of_range_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        MultiMNISTDataModule(**{name: value})


def test_missing_files_are_named_with_the_places_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        _datamodule(tmp_path)
    for part in (
        "train-images-idx3-ubyte and train-labels-idx1-ubyte",
        str(tmp_path / "MNIST/raw"),
        str(tmp_path / "mnist"),
        "`download=True`",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ):
        assert part in str(error.value)


def test_a_folder_with_images_alone_is_not_enough(root: Path) -> None:
    (root / "mnist/train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        _datamodule(root)


def test_a_damaged_file_is_refused(root: Path) -> None:
    path = root / "mnist/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz should hold a whole gzip file"):
        _datamodule(root)


def test_labels_in_place_of_images_are_refused(root: Path) -> None:
    images, labels = (root / f"mnist/train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    images.write_bytes(labels.read_bytes())
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz should hold an idx file of 3-dimensional bytes"):
        _datamodule(root)


def test_images_of_another_size_are_refused(root: Path, write_idx: WriteIdx) -> None:
    write_idx(root / "mnist/train-images-idx3-ubyte.gz", torch.zeros(40, 32, 30, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images of 28 x 28 pixels\. Found 32 x 30\. Fetch it again"):
        _datamodule(root)


@pytest.mark.parametrize("count", [39, 41])
def test_another_number_of_labels_is_refused(root: Path, write_idx: WriteIdx, count: int) -> None:
    write_idx(root / "mnist/train-labels-idx1-ubyte.gz", torch.zeros(count, dtype=torch.uint8))
    with pytest.raises(ValueError, match=rf"should hold 40 labels, one for each image of .*\. Found {count}\. Fetch"):
        _datamodule(root)


def test_a_label_beyond_the_classes_is_refused(root: Path, write_idx: WriteIdx) -> None:
    write_idx(root / "mnist/train-labels-idx1-ubyte.gz", torch.arange(40, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"should hold labels from 0 to 9\. Found 39"):
        _datamodule(root)


def test_files_without_glyphs_are_refused(root: Path, write_idx: WriteIdx) -> None:
    write_idx(root / "mnist/train-images-idx3-ubyte.gz", torch.zeros(0, 28, 28, dtype=torch.uint8))
    write_idx(root / "mnist/train-labels-idx1-ubyte.gz", torch.zeros(0, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"should hold labels from 0 to 9\. Found none"):
        _datamodule(root)
