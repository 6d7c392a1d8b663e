from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from mtl_lightning.datamodules import cifar100
from mtl_lightning.datamodules.cifar100 import CIFAR100_TASKS, CIFAR100DataModule, cifar100_tasks
from mtl_lightning.datamodules.combined import PerTaskDataset
from mtl_lightning.datamodules.files import BrokenFileError, DatasetNotFoundError
from tests.datamodules.tables import cifar100_content, python2_pickle, write_cifar100

TWO = ["fish", "trees"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar100(tmp_path_factory.mktemp("cifar"))


def _datamodule(root: Path, stage: str | None = None, **options: Any) -> CIFAR100DataModule:
    datamodule = CIFAR100DataModule(root=root, **({"verify": False, "normalize": None} | options))
    datamodule.setup(stage)
    return datamodule


def _dataset(datamodule: CIFAR100DataModule, split: Any) -> PerTaskDataset:
    dataset = datamodule.datasets[split]
    assert isinstance(dataset, PerTaskDataset)
    return dataset


def _fine(image: torch.Tensor) -> int:
    """The fine class, which is the first byte of a picture."""
    return round(image[0, 0, 0].item() * 255)


def test_pictures_have_the_label_of_their_coarse_class_only(root: Path) -> None:
    for image, labels in _dataset(_datamodule(root), "train"):
        fine = _fine(image)
        own = CIFAR100_TASKS[fine % 20]
        assert labels[own] == fine // 20
        assert {int(label) for task, label in labels.items() if task != own} == {-1}


def test_pixels_are_rows_of_each_colour(root: Path) -> None:
    data = cifar100_content(1, 1)["data"]
    expected = {tuple(row.reshape(3, 32, 32)[1, 2].tolist()) for row in data}
    found = {tuple((image[1, 2] * 255).round().int().tolist()) for image, _ in _dataset(_datamodule(root), "test")}
    assert found == expected


def test_each_task_has_its_share_of_every_split(root: Path) -> None:
    datamodule = _datamodule(root, val_fraction=0.2)
    for split, count in (("train", 16), ("val", 4), ("test", 5)):
        found = Counter(_fine(image) % 20 for image, _ in _dataset(datamodule, split))
        assert found == dict.fromkeys(range(20), count)


def test_no_picture_is_in_two_splits(root: Path) -> None:
    datamodule = _datamodule(root, val_fraction=0.2)
    parts = [{image.numpy().tobytes() for image, _ in _dataset(datamodule, split)} for split in ("train", "val")]
    assert len(parts[0] | parts[1]) == 400


def test_the_validation_pictures_do_not_depend_on_the_tasks(root: Path) -> None:
    one = _dataset(_datamodule(root, tasks=["trees"], val_fraction=0.2), "val")
    two = [
        image
        for image, labels in _dataset(_datamodule(root, tasks=TWO, val_fraction=0.2), "val")
        if labels["trees"] >= 0
    ]
    assert torch.equal(torch.stack([image for image, _ in one]), torch.stack(two))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_hold_as_many_pictures_of_each_task(root: Path, num_workers: int) -> None:
    datamodule = _datamodule(root, tasks=TWO, batch_size=6, num_workers=num_workers)
    batches = list(datamodule.train_dataloader())
    assert len(batches) == 6
    for inputs, targets in batches:
        assert (inputs.dtype, inputs.shape[1:]) == (torch.float32, (3, 32, 32))
        assert list(targets) == TWO
        assert all(int((target >= 0).sum()) == len(inputs) // 2 for target in targets.values())


@pytest.mark.parametrize("augment", [False, True])
def test_workers_change_nothing(root: Path, augment: bool) -> None:
    def batches(num_workers: int) -> list[torch.Tensor]:
        datamodule = _datamodule(root, tasks=TWO, batch_size=8, num_workers=num_workers, augment=augment)
        return [inputs for inputs, _ in datamodule.train_dataloader()]

    assert all(torch.equal(one, two) for one, two in zip(batches(0), batches(2), strict=True))


def test_augmentation_changes_training_pictures_from_epoch_to_epoch(root: Path) -> None:
    datamodule, plain = _datamodule(root, tasks=TWO, augment=True), _datamodule(root, tasks=TWO)
    train = _dataset(datamodule, "train")
    assert not torch.equal(train[0][0], train[len(train)][0])
    assert torch.equal(_dataset(datamodule, "val")[0][0], _dataset(plain, "val")[0][0])


def test_colours_are_standardised_by_name(root: Path) -> None:
    plain, scaled = (_dataset(_datamodule(root, normalize=name), "test")[0][0] for name in (None, "cifar100"))
    mean, std = (torch.tensor(values)[:, None, None] for values in cifar100._COLOURS["cifar100"])
    assert torch.allclose(scaled, (plain - mean) / std)


def test_pictures_can_be_enlarged(root: Path) -> None:
    assert _dataset(_datamodule(root, image_size=(40, 48)), "test")[0][0].shape == (3, 40, 48)


def test_files_in_the_root_itself_are_found(root: Path) -> None:
    assert len(_dataset(_datamodule(root / "cifar-100-python", "test"), "test")) == 100


def test_tasks_are_ready_in_the_order_asked_for() -> None:
    tasks = cifar100_tasks(["trees", "fish"])
    assert [task.name for task in tasks] == ["trees", "fish"]
    assert tasks[0].num_labels(torch.tensor([0, -1, 4])) == 2


def test_the_summary_names_the_splits(root: Path) -> None:
    text = _datamodule(root, tasks=TWO).summary()
    assert "train: 36 samples" in text
    assert "fish: () int64, 0 to 4, 50.0 % missing" in text


def test_arguments_can_be_given_on_the_command_line() -> None:
    arguments = ["--data.tasks=[fish,trees]", "--data.normalize=null", "--data.mode=min_size", "--data.image_size=64"]
    datamodule = LightningCLI(BoringModel, CIFAR100DataModule, args=arguments, run=False).datamodule
    assert (datamodule.tasks, datamodule.colours, datamodule.batch_size) == (("fish", "trees"), None, 32)


# Downloads


@pytest.fixture
def archive(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of the small set, of which the module has the address and the sum."""
    path = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(cifar100, "_URL", path.as_uri())
    monkeypatch.setattr(cifar100, "_ARCHIVE_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_the_archive_is_fetched_and_unpacked(tmp_path: Path, archive: Path) -> None:
    datamodule = CIFAR100DataModule(root=tmp_path / "new", download=True, verify=False)
    datamodule.prepare_data()
    datamodule.setup()
    assert len(_dataset(datamodule, "test")) == 100


@pytest.mark.usefixtures("archive")
def test_nothing_is_fetched_unasked(tmp_path: Path) -> None:
    datamodule = CIFAR100DataModule(root=tmp_path / "new", verify=False)
    datamodule.prepare_data()
    with pytest.raises(DatasetNotFoundError) as error:
        datamodule.setup()
    for part in ("cifar-100-python", "Missing in the first: train, test", "`download=True`", "Licence: none stated"):
        assert part in str(error.value)


def test_another_archive_is_refused(tmp_path: Path, archive: Path) -> None:
    archive.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"should have the md5 sum .* deleted them"):
        CIFAR100DataModule(root=tmp_path / "new", download=True).prepare_data()
    assert list((tmp_path / "new").iterdir()) == []


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["cats"]}, r"`tasks` should hold at least one of aquatic_mammals, .* Found \['cats'\]"),
        ({"tasks": []}, r"each once\. Found \[\]"),
        ({"tasks": ["fish", "fish"]}, "each once"),
        ({"batch_size": 30}, r"should be a multiple of 20, .* Found 30"),
        ({"val_fraction": 1.0}, r"`val_fraction` should be in \[0, 1\)"),
        ({"normalize": "mnist"}, r"one of cifar100, imagenet, symmetric, or None\. Found 'mnist'"),
    ],
)
def test_an_argument_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIFAR100DataModule(**options)


def test_a_missing_test_file_is_named(tmp_path: Path) -> None:
    (write_cifar100(tmp_path) / "cifar-100-python/test").unlink()
    with pytest.raises(DatasetNotFoundError, match="Missing in the first: test"):
        _datamodule(tmp_path)


def test_files_of_another_sum_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"train should have the md5 sum 16019d7e3df5f24257cddd939b257f8d"):
        _datamodule(root, verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": np.zeros((100, 10), dtype=np.uint8)},
            r"uint8 pictures of 3072 numbers\. Found uint8 of shape \(100, 10\)",
        ),
        ({"data": np.zeros((100, 3072))}, r"uint8 pictures of 3072 numbers\. Found float64"),
        ({"fine_labels": [0] * 99}, r"100 fine_labels in \[0, 100\)\. Found shape \(99,\)"),
        (
            {"coarse_labels": [20] * 100},
            r"100 coarse_labels in \[0, 20\)\. Found shape \(100,\), dtype int64, 20 to 20",
        ),
        ({"fine_labels": [-1] * 100}, r"in \[0, 100\)\. Found .*-1 to -1"),
        ({"coarse_labels": [0] * 100}, "five fine classes in each of 20 coarse classes"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_cifar100(tmp_path) / "cifar-100-python/test"
    path.write_bytes(python2_pickle(cifar100_content(1, 0) | change))
    with pytest.raises(BrokenFileError, match=message):
        _datamodule(tmp_path, "test")


def test_the_files_of_cifar_10_are_refused(tmp_path: Path) -> None:
    path = write_cifar100(tmp_path) / "cifar-100-python/test"
    path.write_bytes(python2_pickle({"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0, 1]}))
    with pytest.raises(BrokenFileError, match=r"data, coarse_labels, fine_labels\. Found data, labels"):
        _datamodule(tmp_path, "test")
