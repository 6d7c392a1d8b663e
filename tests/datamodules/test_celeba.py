from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader

from mtl_lightning.datamodules.celeba import CELEBA_ATTRIBUTES, CelebADataModule, CelebADataset, celeba_tasks
from mtl_lightning.datamodules.files import BrokenFileError, DatasetNotFoundError
from mtl_lightning.datamodules.loading import EpochIndexSampler
from mtl_lightning.datamodules.pictures import PictureFiles
from mtl_lightning.grouping import AllTogether
from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.networks import MultiHeadNetwork
from tests.datamodules.tables import write_celeba, write_picture

ATTRIBUTES = np.where(np.random.default_rng(0).random((12, 40)) < 0.4, 1, -1)
PARTITION = [0, 2, 0, 1, 0, 0, 1, 0, 2, 0, 0, 0]
MEMBERS = {
    split: [row for row, part in enumerate(PARTITION) if part == number]
    for number, split in enumerate(("train", "val", "test"))
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_celeba(tmp_path, ATTRIBUTES, PARTITION)


def _datamodule(root: Path, **options: Any) -> CelebADataModule:
    datamodule = CelebADataModule(root=root, **({"image_size": None} | options))
    datamodule.setup()
    return datamodule


def _dataset(datamodule: CelebADataModule, split: Any) -> CelebADataset:
    dataset = datamodule.datasets[split]
    assert isinstance(dataset, CelebADataset)
    return dataset


def _loader(datamodule: CelebADataModule) -> DataLoader[Any]:
    loader = datamodule.train_dataloader()
    assert isinstance(loader, DataLoader)
    return loader


def _number(image: torch.Tensor) -> int:
    """The row of a picture, which is grey ``10 * (row + 1)``."""
    return round(image.mean().item() * 255 / 10) - 1


def _rows(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("form", ["torchvision", "jpg", "png"])
def test_the_layouts_hold_the_same(tmp_path: Path, form: str) -> None:
    datamodule = _datamodule(write_celeba(tmp_path, ATTRIBUTES, PARTITION, form))
    for split, rows in MEMBERS.items():
        samples = list(_dataset(datamodule, split))
        assert [_number(image) for image, _ in samples] == rows
        for (_, labels), row in zip(samples, rows, strict=True):
            assert {name: int(label) for name, label in labels.items()} == {
                name: int(value == 1) for name, value in zip(CELEBA_ATTRIBUTES, ATTRIBUTES[row], strict=True)
            }


def test_the_folder_itself_may_be_the_root(root: Path) -> None:
    assert len(_dataset(_datamodule(root / "celeba"), "train")) == len(MEMBERS["train"])


def test_lists_in_another_order_change_nothing(root: Path) -> None:
    path = root / "celeba/list_eval_partition.txt"
    path.write_text("\n".join(reversed(_rows(path))))
    datamodule = _datamodule(root)
    assert {split: [_number(image) for image, _ in _dataset(datamodule, split)] for split in MEMBERS} == MEMBERS


def test_columns_are_found_by_name(root: Path) -> None:
    path = root / "celeba/list_attr_celeba.txt"
    before = _datamodule(root, tasks=["Young", "Bald"])
    lines = [line.split() for line in _rows(path)]
    turned = [" ".join(reversed(lines[1])), *(" ".join([row[0], *reversed(row[1:])]) for row in lines[2:])]
    path.write_text("\n".join([lines[0][0], *turned]))
    for split in MEMBERS:
        for (_, one), (_, two) in zip(
            _dataset(before, split), _dataset(_datamodule(root, tasks=["Young", "Bald"]), split), strict=True
        ):
            assert one == two


def test_batches_have_the_documented_form(root: Path) -> None:
    datamodule = _datamodule(root, tasks=["Smiling", "Bald"], image_size=(16, 12), batch_size=4)
    inputs, targets = next(iter(datamodule.train_dataloader()))
    assert (inputs.dtype, inputs.shape) == (torch.float32, (4, 3, 16, 12))
    assert {name: (target.dtype, target.shape) for name, target in targets.items()} == {
        "Smiling": (torch.int64, (4, 1)),
        "Bald": (torch.int64, (4, 1)),
    }


def test_colours_stay_in_the_unit_interval_unless_asked(root: Path) -> None:
    plain, symmetric = (_dataset(_datamodule(root, normalize=name), "train")[0][0] for name in (None, "symmetric"))
    assert 0 <= plain.min() <= plain.max() <= 1
    assert torch.allclose(symmetric, 2 * plain - 1, atol=1e-6)


@pytest.mark.parametrize("augment", [False, True])
def test_workers_change_nothing(root: Path, augment: bool) -> None:
    def batches(num_workers: int) -> list[torch.Tensor]:
        loader = _datamodule(root, augment=augment, batch_size=3, num_workers=num_workers).train_dataloader()
        return [inputs for inputs, _ in loader]

    assert all(torch.equal(one, two) for one, two in zip(batches(0), batches(2), strict=True))


def test_augmentation_draws_anew_in_every_epoch(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (22, 18, 3), dtype=np.uint8)
    write_picture(tmp_path / "a.png", pixels)
    pictures = PictureFiles([tmp_path / "a.png"] * 2, torch.zeros(2, 1), None, None)
    dataset, other = (CelebADataset(pictures, ["Bald"], augment=True, seed=seed) for seed in (0, 1))
    draws = [dataset[0][0], dataset[1][0], dataset[2][0], other[0][0]]
    assert all(not torch.equal(one, two) for one, two in itertools.combinations(draws, 2))
    assert torch.equal(dataset[2][0], draws[2])


def test_training_pictures_know_the_epoch_if_augmented(root: Path) -> None:
    assert isinstance(_loader(_datamodule(root, augment=True)).sampler, EpochIndexSampler)
    assert not isinstance(_loader(_datamodule(root)).sampler, EpochIndexSampler)


def test_broken_pictures_are_skipped_and_said(root: Path) -> None:
    (root / "celeba/img_align_celeba/000001.jpg").write_bytes(b"")
    (root / "celeba/img_align_celeba/000004.jpg").unlink()
    with pytest.warns(UserWarning, match=r"1 of \d pictures cannot be read"):
        datamodule = _datamodule(root, on_broken="skip")
    assert [_number(image) for image, _ in _dataset(datamodule, "train")] == MEMBERS["train"][1:]
    assert [_number(image) for image, _ in _dataset(datamodule, "val")] == MEMBERS["val"][1:]


def test_a_module_trains_on_it(root: Path) -> None:
    names = ["Smiling", "Bald", "Young"]
    heads: dict[str, nn.Module] = {name: nn.Linear(8, 1) for name in names}
    network = MultiHeadNetwork(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 8)), heads)
    module = TaskGroupModule(network, celeba_tasks(names), partial(torch.optim.Adam, lr=1e-3), grouping=AllTogether())
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(accelerator="cpu", max_epochs=1, **quiet)
    trainer.fit(module, _datamodule(root, tasks=names, image_size=8, batch_size=4))
    assert trainer.callback_metrics["val_loss"].isfinite()
    assert 0 <= trainer.callback_metrics["val_f1/Smiling"] <= 1


def test_the_summary_names_class_shares(root: Path) -> None:
    assert "Bald: (1,) int64" in _datamodule(root).summary()


def test_arguments_can_be_given_on_the_command_line() -> None:
    arguments = ["--data.tasks=[Bald,Young]", "--data.image_size=[10, 12]", "--data.normalize=symmetric"]
    datamodule = LightningCLI(BoringModel, CelebADataModule, args=arguments, run=False).datamodule
    assert (datamodule.tasks, datamodule.image_size) == (("Bald", "Young"), (10, 12))


# Bad input


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("celeba/list_eval_partition.txt", r"Missing: celeba/list_eval_partition\.txt \(1 in all\)"),
        ("celeba/img_align_celeba/000003.jpg", r"should hold 12 pictures. Missing: 000003\.jpg \(1 in all\)"),
    ],
)
def test_a_missing_file_is_named(root: Path, missing: str, message: str) -> None:
    (root / missing).unlink()
    with pytest.raises(DatasetNotFoundError, match=message) as error:
        _datamodule(root)
    for part in ("https://drive.google.com", "Anno/list_attr_celeba.txt", "Licence: non-commercial"):
        assert part in str(error.value)


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=f"Found no whole CelebA in {tmp_path}"):
        _datamodule(tmp_path)


def test_lists_of_another_sum_are_refused_on_request(root: Path) -> None:
    with pytest.raises(ValueError, match=r"list_attr_celeba\.txt should have the md5 sum 75e246fa"):
        _datamodule(root, verify=True)


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (0, "13", r"13 pictures, as its first line says\. Found 12"),
        (0, "names", r"the number of pictures in its first line\. Found 'names'"),
        (1, "Bald Young", r"the names of the 40 attributes in its second line\. Found 'Bald Young'"),
        (4, "000003.jpg " + "1 " * 39, r"40 numbers of -1 and 1 in line 5"),
        (4, "000003.jpg " + "0 " * 40, r"40 numbers of -1 and 1 in line 5"),
        (4, "000002.jpg " + "1 " * 40, r"each picture once\. Found 1 repetitions"),
        (4, "000099.jpg " + "1 " * 40, r"every picture of the list of attributes\. Found none of 1, 000099\.jpg first"),
    ],
)
def test_a_damaged_list_is_refused(root: Path, line: int, text: str, message: str) -> None:
    path = root / "celeba/list_attr_celeba.txt"
    lines = _rows(path)
    lines[line] = text
    path.write_text("\n".join(lines))
    with pytest.raises(BrokenFileError, match=message):
        _datamodule(root)


def test_another_partition_is_refused(root: Path) -> None:
    path = root / "celeba/list_eval_partition.txt"
    path.write_text(path.read_text().replace("000002.jpg 2", "000002.jpg 3"))
    with pytest.raises(BrokenFileError, match=r"a name and 0, 1 or 2 in line 2\. Found '000002\.jpg 3'"):
        _datamodule(root)


def test_a_truncated_picture_is_named(root: Path) -> None:
    path = root / "celeba/img_align_celeba/000001.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BrokenFileError, match=r"000001\.jpg should hold a whole picture"):
        _dataset(_datamodule(root), "train")[0]


@pytest.mark.parametrize("tasks", [["Nice"], [], ["Bald", "Bald"], "Bald"])
def test_tasks_that_are_no_attributes_are_refused(tasks: Any) -> None:
    with pytest.raises(ValueError, match=r"should hold at least one of 5_o_Clock_Shadow, .* each once\. Found"):
        CelebADataModule(tasks=tasks)
