from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from mtl_lightning.datamodules.combined import PerTaskDataset
from mtl_lightning.datamodules.files import BrokenFileError, DatasetNotFoundError
from mtl_lightning.datamodules.office import OFFICE, OfficeDataModule, office_tasks
from mtl_lightning.modules import MT2OModule, TaskGroupModule
from mtl_lightning.networks import MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from tests.datamodules.tables import OFFICE_DOMAINS, write_office, write_office_lists

REAL = Path(__file__).parents[3] / "shared" / "data" / "splits" / "libmtl-office"
CLASSES = {"office-31": 31, "office-home": 65}
DOMAINS = OFFICE_DOMAINS["office-31"]


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with Office-31, five pictures a class and domain."""
    root = tmp_path_factory.mktemp("office")
    write_office_lists(root / "lists", write_office(root, "office-31", 31, 5))
    return root


def _datamodule(root: Path, **options: Any) -> OfficeDataModule:
    datamodule = OfficeDataModule(root=root, **({"image_size": 8, "normalize": None} | options))
    datamodule.setup()
    return datamodule


def _dataset(datamodule: OfficeDataModule, split: Any) -> PerTaskDataset:
    dataset = datamodule.datasets[split]
    assert isinstance(dataset, PerTaskDataset)
    return dataset


def _kind(image: Tensor) -> int:
    """The class of a picture, whose first channel is three times its number."""
    return round(image[0].mean().item() * 255 / 3)


def _paths(dataset: PerTaskDataset, domain: str) -> list[str]:
    return list(dataset.datasets[domain].paths)


@pytest.mark.parametrize("lists", [False, True])
def test_pictures_have_the_class_of_their_folder(office: Path, lists: bool) -> None:
    datamodule = _datamodule(office, splits=office / "lists" if lists else None)
    for image, labels in _dataset(datamodule, "test"):
        assert sorted(map(int, labels.values()))[:2] == [-1, -1]
        assert _kind(image) == max(map(int, labels.values()))
    assert datamodule.class_names[30] == "class_30"


def test_drawn_splits_have_the_shares_and_share_no_picture(office: Path) -> None:
    datamodule = _datamodule(office)
    for domain in DOMAINS:
        parts = [set(_paths(_dataset(datamodule, split), domain)) for split in ("train", "val", "test")]
        assert [len(part) for part in parts] == [93, 31, 31]
        assert len(set.union(*parts)) == 155


def test_the_seed_decides_the_splits(office: Path) -> None:
    first, same, other = (_paths(_dataset(_datamodule(office, seed=seed), "test"), "dslr") for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_lists_decide_the_splits(office: Path) -> None:
    datamodule = _datamodule(office, splits=office / "lists")
    for split, numbers in (("train", {1, 2, 3}), ("val", {4}), ("test", {5})):
        found = {int(path[-8:-4]) for path in _paths(_dataset(datamodule, split), "amazon")}
        assert found == numbers


@pytest.mark.parametrize("real_world", ["Real_World", "Real World"])
def test_the_folder_of_real_pictures_has_either_name(tmp_path: Path, real_world: str) -> None:
    paths = write_office(tmp_path, "office-home", 65, 1, real_world)
    lists = write_office_lists(tmp_path / "lists", paths)
    for splits in (None, lists):
        datamodule = _datamodule(tmp_path, variant="office-home", splits=splits)
        assert list(datamodule.tasks) == ["Art", "Clipart", "Product", "Real_World"]
        assert len(_dataset(datamodule, "train")) == 4 * 39


def test_lists_of_one_name_serve_a_folder_of_the_other(tmp_path: Path) -> None:
    paths = write_office(tmp_path, "office-home", 65, 1, "Real World")
    paths["Real_World"] = [path.replace("Real World", "Real_World") for path in paths["Real_World"]]
    lists = write_office_lists(tmp_path / "lists", paths)
    datamodule = _datamodule(tmp_path, variant="office-home", splits=lists, tasks=["Real_World"])
    assert _dataset(datamodule, "test")[0][0].shape == (3, 8, 8)


@pytest.mark.skipif(not REAL.exists(), reason="the lists of LibMTL are not beside the repository")
@pytest.mark.parametrize(
    ("variant", "domain", "counts"),
    [
        ("office-31", "amazon", (1680, 552, 585)),
        ("office-31", "dslr", (287, 89, 122)),
        ("office-31", "webcam", (466, 149, 180)),
        ("office-home", "Art", (1435, 465, 527)),
        ("office-home", "Clipart", (2596, 846, 923)),
        ("office-home", "Product", (2635, 860, 944)),
        ("office-home", "Real_World", (2586, 846, 925)),
    ],
)
def test_real_lists_are_read(variant: Any, domain: str, counts: tuple[int, ...]) -> None:
    datamodule = OfficeDataModule(variant=variant, tasks=[domain])
    samples, names = datamodule._listed({domain: Path("x")}, REAL / variant)
    assert tuple(map(len, samples[domain].values())) == counts
    assert all(names)
    assert len(set(names)) == CLASSES[variant]


def test_a_batch_holds_as_many_pictures_of_each_domain(office: Path) -> None:
    inputs, targets = next(iter(_datamodule(office, batch_size=12).train_dataloader()))
    assert (inputs.dtype, inputs.shape) == (torch.float32, (12, 3, 8, 8))
    assert Counter({domain: int((target >= 0).sum()) for domain, target in targets.items()}) == dict.fromkeys(
        DOMAINS, 4
    )


def test_the_batch_has_64_pictures_a_domain_by_default() -> None:
    assert OfficeDataModule().batch_size == 192
    assert OfficeDataModule(variant="office-home", tasks=["Art"]).batch_size == 64


def test_workers_change_nothing(office: Path) -> None:
    def batches(num_workers: int) -> list[Tensor]:
        datamodule = _datamodule(office, augment=True, batch_size=90, num_workers=num_workers)
        return [inputs for inputs, _ in datamodule.train_dataloader()]

    assert all(torch.equal(one, two) for one, two in zip(batches(0), batches(2), strict=True))


@pytest.mark.parametrize("kind", [MT2OModule, TaskGroupModule])
def test_a_module_trains_on_all_domains(office: Path, kind: type[Any]) -> None:
    torch.manual_seed(0)
    heads: dict[str, nn.Module] = {domain: nn.Linear(16, 31) for domain in DOMAINS}
    network = MultiHeadNetwork(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16), nn.ReLU()), heads)
    options: dict[str, Any] = {"preferences": simplex_lattice(3, 1), "backend": "loop"} if kind is MT2OModule else {}
    module = kind(
        network=network, tasks=office_tasks("office-31"), optimizer=partial(torch.optim.Adam, lr=1e-2), **options
    )
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(accelerator="cpu", max_epochs=3, **quiet)
    trainer.fit(module, _datamodule(office, batch_size=30))
    losses = [trainer.callback_metrics[f"val_loss/{domain}"] for domain in DOMAINS]
    assert all(loss < 3.7 for loss in losses)  # log(31) is 3.43
    assert {f"val_accuracy/{domain}" for domain in DOMAINS} <= set(trainer.callback_metrics)


def test_the_summary_names_the_domains(office: Path) -> None:
    assert "webcam: () int64" in _datamodule(office).summary()


def test_arguments_can_be_given_on_the_command_line() -> None:
    arguments = ["--data.variant=office-home", "--data.tasks=[Art]", "--data.splits=lists", "--data.normalize=null"]
    datamodule = LightningCLI(BoringModel, OfficeDataModule, args=arguments, run=False).datamodule
    assert (datamodule.tasks, datamodule.splits, datamodule.num_classes) == (("Art",), Path("lists"), 65)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "office-10"}, r"`variant` should be one of office-31, office-home\. Found 'office-10'"),
        ({"tasks": ["Art"]}, r"`tasks` should hold at least one of amazon, dslr, webcam, each once\. Found \['Art'\]"),
        ({"batch_size": 64}, r"multiple of 3, .* Found 64"),
        ({"on_broken": "mask"}, r"`on_broken` should be 'raise' or 'skip'\. Found 'mask'"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, r"should leave pictures for training"),
    ],
)
def test_an_argument_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OfficeDataModule(**options)


@pytest.mark.parametrize("variant", list(OFFICE))
def test_a_missing_root_is_named(tmp_path: Path, variant: Any) -> None:
    with pytest.raises(DatasetNotFoundError) as error:
        _datamodule(tmp_path, variant=variant)
    assert OFFICE[variant].origin.address in str(error.value)
    assert f"({len(OFFICE_DOMAINS[variant])} in all)" in str(error.value)


def test_classes_that_differ_between_domains_are_named(tmp_path: Path) -> None:
    write_office(tmp_path, "office-31", 31, 1)
    (tmp_path / "office-31/dslr/images/class_07").rename(tmp_path / "office-31/dslr/images/other")
    with pytest.raises(DatasetNotFoundError, match=r"dslr/images should hold 31 folders .* Missing: class_07, other"):
        _datamodule(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("amazon/images/class_00/frame_0001.jpg 31", r"a label in \[0, 31\) in line 1\. Found '31'"),
        ("amazon/images/class_00/frame_0001.jpg", r"a path in amazon/ and a label in line 1"),
        ("dslr/images/class_00/frame_0001.jpg 0", r"a path in amazon/ and a label in line 1"),
        ("amazon/../dslr/images/class_00/frame_0001.jpg 0", r"a path in amazon/ and a label in line 1"),
        (
            "amazon/images/class_00/frame_0001.jpg 5",
            r"pictures of 'class_00' under number 5|of 'class_05' under number 5",
        ),
    ],
)
def test_a_damaged_list_is_refused(office: Path, tmp_path: Path, line: str, message: str) -> None:
    for path in (office / "lists").iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    path = tmp_path / "amazon_val.txt"
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(BrokenFileError, match=message):
        _datamodule(office, splits=tmp_path)


def test_missing_lists_are_named(office: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Missing: amazon_train\.txt, amazon_val\.txt"):
        _datamodule(office, splits=tmp_path)


def test_pictures_of_the_lists_that_are_missing_are_named_or_skipped(tmp_path: Path) -> None:
    lists = write_office_lists(tmp_path / "lists", write_office(tmp_path, "office-31", 31, 1))
    (tmp_path / "office-31/amazon/images/class_00/frame_0001.jpg").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"Missing: .*amazon/images/class_00/frame_0001\.jpg \(1 in all\)"):
        _datamodule(tmp_path, splits=lists)
    with pytest.warns(UserWarning, match=r"1 of 19 pictures cannot be read .*frame_0001\.jpg \(it is missing\)"):
        datamodule = _datamodule(tmp_path, splits=lists, on_broken="skip")
    assert len(_dataset(datamodule, "train")) == 3 * 19 - 1
