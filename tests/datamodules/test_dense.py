from __future__ import annotations

import pickle
import re
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mtl_lightning.datamodules.base import Split
from mtl_lightning.datamodules.colours import COLOURS
from mtl_lightning.datamodules.dense import DenseDataModule, DenseDataset, DenseTask, Folder, check_names, numeric
from mtl_lightning.datamodules.dense_labels import read_depth, read_image
from mtl_lightning.datamodules.files import BrokenFileError, DatasetNotFoundError
from mtl_lightning.datamodules.joint_transforms import IGNORE_INDEX
from mtl_lightning.datamodules.preview import preview_figure
from mtl_lightning.modules.mt2o import MT2OModule
from mtl_lightning.modules.task_groups import TaskGroupModule
from mtl_lightning.networks.dense_head import DenseHead
from mtl_lightning.networks.encoder_decoder import EncoderDecoder
from mtl_lightning.networks.multi_head import MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from tests.datamodules.dense_cases import CASES, Case
from tests.datamodules.layouts import HEIGHT, WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:.*samples where", "ignore:.*buildings of the", "ignore:In the .* split")
SPLITS: tuple[Split, ...] = ("train", "val", "test")
HELD_OUT = [case for case in CASES if "Taskonomy" not in case.name]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All layouts; tests that change files copy them."""
    folder = tmp_path_factory.mktemp("layouts")
    for case in CASES:
        case.write(folder / case.name)
    return {case.name: folder / case.name for case in CASES}


@pytest.fixture
def root(written: dict[str, Path], case: Case) -> Path:
    return written[case.name]


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    """A copy of the layout that may be damaged."""
    shutil.copytree(root, tmp_path / "copy")
    return tmp_path / "copy"


def _loader(datamodule: DenseDataModule, split: Split = "train") -> DataLoader[Any]:
    loader = datamodule.dataloader(split)
    assert isinstance(loader, DataLoader)
    return loader


def _dataset(datamodule: DenseDataModule, split: Split = "train") -> DenseDataset:
    dataset = datamodule.datasets[split]
    assert isinstance(dataset, DenseDataset)
    return dataset


def _ready(case: Case, root: Path, **options: Any) -> DenseDataModule:
    datamodule = case.datamodule(root, **options)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def _epoch(loader: DataLoader[Any], epoch: int = 0) -> list[Tensor]:
    sampler: Any = loader.sampler
    sampler.set_epoch(epoch)
    return [tensor for images, targets in loader for tensor in (images, *targets.values())]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    # As bytes, because NaN is not equal to itself.
    return [tensor.numpy().tobytes() for tensor in one] == [tensor.numpy().tobytes() for tensor in other]


@each_case
@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_is_images_and_one_label_per_task(case: Case, root: Path, split: Split) -> None:
    datamodule = _ready(case, root, val_fraction=0.4) if case.num_test == 4 else _ready(case, root)
    images, targets = next(iter(_loader(datamodule, split)))
    size = (48, 48) if case.name == "PASCAL-Context" else (HEIGHT, WIDTH)
    assert images.shape == (2, 3, *size)
    assert images.dtype == torch.float32
    assert tuple(targets) == datamodule.tasks
    for task in datamodule.specs:
        assert targets[task.name].shape == ((2, *size) if task.kind == "classes" else (2, task.channels, *size))
        assert targets[task.name].dtype == (torch.int64 if task.kind == "classes" else torch.float32)


@each_case
def test_labels_are_in_their_range_or_missing(case: Case, root: Path) -> None:
    datamodule = _ready(case, root)
    for image, labels in _dataset(datamodule):
        assert image.isfinite().all()
        for task in datamodule.specs:
            label = labels[task.name]
            if task.kind == "classes":
                assert ((label >= IGNORE_INDEX) & (label < task.channels)).all()
            elif task.kind == "normal":
                valid = ~label.isnan().any(0)
                torch.testing.assert_close(label[:, valid].norm(dim=0), torch.ones(int(valid.sum())))
            else:
                assert not label.isinf().any()


@each_case
def test_every_sample_is_in_one_split(case: Case, root: Path) -> None:
    datamodule = _ready(case, root) if "Taskonomy" in case.name else _ready(case, root, val_fraction=0.34)
    datasets = {split: _dataset(datamodule, split) for split in SPLITS}
    if not datamodule.HAS_VAL:
        assert [len(datasets[split]) for split in SPLITS] == [4, 2, 4]
        train, val = set(datasets["train"].keys), set(datasets["val"].keys)
        assert not train & val
        assert len(train | val) == case.num_train
    images = [image.numpy().tobytes() for split in SPLITS for image, _ in datasets[split]]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("case", HELD_OUT, ids=str)
def test_without_a_fraction_all_training_samples_are_trained_on(case: Case, root: Path) -> None:
    datamodule = _ready(case, root, val_fraction=0.0)
    assert len(_dataset(datamodule)) == case.num_train
    assert datamodule.val_dataloader() == []


def test_validation_samples_are_drawn_by_the_seed(written: dict[str, Path]) -> None:
    drawn = [
        frozenset(_dataset(_ready(CASES[0], written["NYUv2"], val_fraction=0.5, seed=seed), "val").keys)
        for seed in (1, 1, *range(2, 12))
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 3


@each_case
@pytest.mark.parametrize("augment", [False, True])
def test_workers_change_nothing(case: Case, root: Path, augment: bool) -> None:
    alone, helped = (_loader(_ready(case, root, augment=augment, num_workers=workers)) for workers in (0, 2))
    assert _equal(_epoch(alone, 1), _epoch(helped, 1))


@each_case
def test_a_worker_that_is_spawned_gets_the_same_data_set(case: Case, root: Path) -> None:
    dataset = _dataset(_ready(case, root, augment=True))
    image, labels = pickle.loads(pickle.dumps(dataset))[7]
    same, rest = dataset[7]
    assert _equal([image, *labels.values()], [same, *rest.values()])


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
def test_augmentation_is_resumed_in_the_middle_of_an_epoch(case: Case, root: Path) -> None:
    loader, resumed = (_loader(_ready(case, root, augment=True, val_fraction=0.0)) for _ in range(2))
    whole = _epoch(loader, 3)
    next(iter(loader))
    state: Any = loader
    other: Any = resumed
    other.load_state_dict(state.state_dict())
    rest = _epoch(resumed, 3)
    assert 0 < len(rest) < len(whole)
    assert _equal(rest, whole[-len(rest) :])


@each_case
def test_augmentation_changes_with_the_epoch_and_repeats(case: Case, root: Path) -> None:
    dataset = _dataset(_ready(case, root, augment=True))
    size = len(dataset)
    epochs = [[dataset[epoch * size + index][0] for index in range(size)] for epoch in (0, 1, 2, 3)]
    assert not all(_equal(epochs[0], epoch) for epoch in epochs[1:])
    assert _equal(epochs[1], [dataset[size + index][0] for index in range(size)])


@each_case
def test_a_loader_shows_other_pictures_in_other_epochs(case: Case, root: Path) -> None:
    loader = _loader(_ready(case, root, augment=True))
    step = 1 + len(case.datamodule(root).tasks)
    seen = [
        {image.numpy().tobytes() for images in _epoch(loader, epoch)[::step] for image in images} for epoch in range(6)
    ]
    assert len(set.union(*seen)) > len(seen[0])


@each_case
@pytest.mark.parametrize("split", ["val", "test"])
def test_only_training_pictures_are_augmented(case: Case, root: Path, split: Split) -> None:
    options: dict[str, Any] = {} if "Taskonomy" in case.name else {"val_fraction": 0.4}
    plain, augmented = (_loader(_ready(case, root, augment=augment, **options), split) for augment in (False, True))
    assert _equal(_epoch(plain, 1), _epoch(augmented, 1))


@pytest.mark.parametrize("case", [case for case in CASES if "Cityscapes" not in case.name], ids=str)
def test_a_mirrored_normal_points_to_the_other_side(case: Case, root: Path) -> None:
    plain, augmented = (_dataset(_ready(case, root, tasks=["normal"], augment=augment)) for augment in (False, True))
    assert augmented.transform is not None
    augmented.transform.flip = 1.0
    augmented.transform.scales = (1.0,)  # type: ignore[attr-defined]
    for (image, labels), (mirrored, after) in zip(plain, augmented, strict=True):
        torch.testing.assert_close(mirrored, image.flip(-1))
        expected = labels["normal"].flip(-1) * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
        torch.testing.assert_close(after["normal"], expected, equal_nan=True)


@each_case
@pytest.mark.parametrize("size", [24, (16, 36)])
def test_pictures_are_resized(case: Case, root: Path, size: int | tuple[int, int]) -> None:
    images, targets = next(iter(_loader(_ready(case, root, image_size=size))))
    expected = (24, 24) if size == 24 else size
    assert images.shape[-2:] == expected
    assert all(target.shape[-2:] == expected for target in targets.values())


@each_case
def test_tasks_come_in_the_order_given(case: Case, root: Path) -> None:
    tasks = case.datamodule(root).tasks[1::-1]
    assert tuple(_dataset(_ready(case, root, tasks=tasks))[0][1]) == tasks


@pytest.mark.parametrize(
    ("normalize", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("symmetric", (0.5,) * 3, (0.5,) * 3),
        (None, (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_images_are_normalised(
    written: dict[str, Path], normalize: Any, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    image = _dataset(_ready(CASES[0], written["NYUv2"], normalize=normalize), "test")[2][0]
    stored = torch.from_numpy(np.load(written["NYUv2"] / "val" / "image" / "2.npy")).permute(2, 0, 1).float()
    torch.testing.assert_close(image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None], stored)


@each_case
@pytest.mark.parametrize(
    ("stage", "expected"),
    [("fit", {"train", "val"}), ("test", {"test"}), ("predict", {"test"}), (None, set(SPLITS))],
)
def test_setup_finds_what_the_stage_needs(case: Case, root: Path, stage: str | None, expected: set[str]) -> None:
    datamodule = case.datamodule(root)
    datamodule.setup(stage)
    assert set(datamodule.datasets) == expected


@each_case
def test_prepare_data_assigns_nothing(case: Case, root: Path) -> None:
    datamodule = case.datamodule(root)
    before = dict(vars(datamodule))
    datamodule.prepare_data()
    assert vars(datamodule) == before


@each_case
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_missing_root_says_how_to_get_the_set(case: Case, tmp_path: Path, stage: str) -> None:
    datamodule = case.datamodule(tmp_path / "nowhere")
    with pytest.raises(DatasetNotFoundError) as caught:
        datamodule.setup(stage)
    text = str(caught.value)
    for part in ("nowhere", datamodule.ORIGIN.address, datamodule.ORIGIN.licence, "should lie as"):
        assert part in text


@each_case
def test_a_missing_file_is_named(case: Case, copied: Path) -> None:
    (copied / case.label).unlink()
    with pytest.raises(DatasetNotFoundError, match=re.escape(f"Missing: {case.label} (1 in all)")):
        case.datamodule(copied).setup("fit")


@each_case
def test_of_a_half_extracted_archive_the_missing_files_are_counted(case: Case, copied: Path) -> None:
    folder = (copied / case.label).parent
    count = len(list(folder.iterdir()))
    shutil.rmtree(folder)
    with pytest.raises(DatasetNotFoundError, match=r"Missing: .*\(\d+ in all\)") as caught:
        case.datamodule(copied).setup()
    found = re.search(r"\((\d+) in all\)", str(caught.value))
    assert found is not None
    assert 0 < int(found[1]) <= count


@each_case
def test_a_file_that_is_not_asked_for_may_be_missing(case: Case, copied: Path) -> None:
    (copied / case.label).unlink()
    others = [task for task in case.datamodule(copied).tasks if task != case.label_task]
    assert len(_epoch(_loader(_ready(case, copied, tasks=others)))) > 0


@each_case
def test_a_truncated_file_is_named_when_it_is_read(case: Case, copied: Path) -> None:
    path = copied / case.label
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BrokenFileError, match=re.escape(str(path))):
        list(_dataset(_ready(case, copied, **({} if "Taskonomy" in case.name else {"val_fraction": 0.0}))))


@each_case
@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("field", ["image", "label"])
def test_broken_samples_are_skipped_and_named(case: Case, copied: Path, damage: str, field: str) -> None:
    path = copied / (case.image if field == "image" else case.label)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    options: dict[str, Any] = {} if "Taskonomy" in case.name else {"val_fraction": 0.0}
    datamodule = case.datamodule(copied, on_broken="skip", **options)
    with pytest.warns(UserWarning, match=f"1 of {case.num_train} samples.*{re.escape(path.name)}"):
        datamodule.setup("fit")
    assert len(list(_dataset(datamodule))) == case.num_train - 1
    assert list(datamodule.left_out["train"]) == [str(path)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "In the train split")
        datamodule.setup("fit")  # it is said once


@each_case
def test_skipping_leaves_the_other_samples_as_they_are(case: Case, root: Path, copied: Path) -> None:
    (copied / case.label).unlink()
    options: dict[str, Any] = {} if "Taskonomy" in case.name else {"val_fraction": 0.34}
    whole, skipped = _ready(case, root, **options), _ready(case, copied, on_broken="skip", **options)
    for split in ("train", "val"):
        samples = dict(zip(_dataset(whole, split).keys, _dataset(whole, split), strict=True))
        for key, (image, labels) in zip(_dataset(skipped, split).keys, _dataset(skipped, split), strict=True):
            assert _equal([image, *labels.values()], [samples[key][0], *samples[key][1].values()])


@each_case
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_masking_drops_only_the_label(case: Case, root: Path, copied: Path, damage: str) -> None:
    path = copied / case.label
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    options: dict[str, Any] = {} if "Taskonomy" in case.name else {"val_fraction": 0.0}
    whole, masked = _ready(case, root, **options), _ready(case, copied, on_broken="mask", **options)
    lost = 0
    for (image, labels), (same, rest) in zip(_dataset(whole), _dataset(masked), strict=True):
        assert torch.equal(image, same)
        different = [name for name in labels if not _equal([labels[name]], [rest[name]])]
        lost += len(different)
        assert all(name == case.label_task and rest[name].isnan().all() for name in different)
    assert lost == 1


@each_case
def test_a_sample_without_its_image_is_skipped_by_masking(case: Case, copied: Path) -> None:
    (copied / case.image).unlink()
    options: dict[str, Any] = {} if "Taskonomy" in case.name else {"val_fraction": 0.0}
    assert len(list(_dataset(_ready(case, copied, on_broken="mask", **options)))) == case.num_train - 1


def test_whole_sets_are_read_without_a_warning(written: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl_lightning.datamodules.nyuv2.NYUv2DataModule.COUNTS", {"train": 6, "val": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        datamodule = _ready(CASES[0], written["NYUv2"], on_broken="skip")
    assert datamodule.left_out == {"train": {}, "val": {}, "test": {}}


@each_case
def test_an_image_and_a_label_of_different_size_are_named(case: Case, copied: Path) -> None:
    path = copied / case.label
    if path.suffix == ".mat":
        from scipy.io import savemat

        savemat(path, {"depth": np.ones((8, 9), np.float32)})
    elif path.suffix == ".npy":
        np.save(path, np.ones((8, 9, 1), np.float32))
    else:
        from PIL import Image

        with Image.open(path) as picture:
            picture.resize((9, 8)).save(path)
    options: dict[str, Any] = {} if "Taskonomy" in case.name else {"val_fraction": 0.0}
    with pytest.raises(BrokenFileError, match=rf"{re.escape(str(path))} should hold a label of shape .* for the image"):
        list(_dataset(_ready(case, copied, **options)))


@each_case
@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (["albedo"], ValueError, r"`tasks` should hold at least one of .* each once\. Found \['albedo'\]"),
        ([], ValueError, r"`tasks` should hold at least one of .* Found \[\]"),
        ("normal", TypeError, "`tasks` should be a sequence of names. Found the string 'normal'"),
    ],
)
def test_unknown_tasks_are_refused(case: Case, tasks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        case.datamodule(Path(), tasks=tasks)
    with pytest.raises(error, match=message.replace("tasks", "names")):
        case.make_tasks(tasks)


@each_case
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"`image_size` should be at least 1 pixel high and wide, or None\. Found 0"),
        ({"image_size": (8, 0)}, r"`image_size` should be at least 1 pixel high and wide, or None\. Found \(8, 0\)"),
        ({"normalize": "mean"}, "`normalize` should be one of imagenet, symmetric, or None. Found 'mean'"),
        ({"on_broken": "ignore"}, "`on_broken` should be one of raise, skip, mask. Found 'ignore'"),
        ({"batch_size": 0}, "`batch_size` should be at least 1. Found 0"),
        ({"seed": -1}, "`seed` should be at least 0. Found -1"),
    ],
)
def test_arguments_out_of_range_are_refused(case: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.datamodule(Path(), **options)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_fractions_out_of_range_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"`val_fraction` should be in \[0, 1\)"):
        CASES[0].datamodule(Path(), val_fraction=fraction)


def test_some_samples_have_to_be_left_for_training(written: dict[str, Path]) -> None:
    datamodule = CASES[0].datamodule(written["NYUv2"], val_fraction=0.99)
    with pytest.raises(ValueError, match=r"`val_fraction` should leave samples for training\. Found 0\.99 of 6"):
        datamodule.setup("fit")


@pytest.mark.parametrize(
    ("name", "other", "reader"), [("NYUv2", "NYUD InvPT", "NYUDDataModule"), ("NYUD MTI", "NYUv2", "NYUv2DataModule")]
)
def test_the_form_of_the_other_nyu_is_recognised(written: dict[str, Path], name: str, other: str, reader: str) -> None:
    case = next(case for case in CASES if case.name == name)
    with pytest.raises(DatasetNotFoundError, match=f"which `{reader}` reads"):
        case.datamodule(written[other]).setup("fit")


@each_case
def test_a_sheet_of_samples_with_all_labels_is_drawn(case: Case, root: Path) -> None:
    datamodule = case.datamodule(root, augment=True)
    figure = preview_figure(datamodule, num_samples=2)
    assert [axes.get_title() for axes in figure.axes[: 1 + len(datamodule.tasks)]] == ["input", *datamodule.tasks]


@each_case
def test_a_summary_tells_sizes_ranges_and_shares(case: Case, root: Path) -> None:
    datamodule = case.datamodule(root)
    with pytest.raises(RuntimeError, match="`setup` should be called before `summary`"):
        datamodule.summary()
    datamodule.setup()
    text = datamodule.summary(num_samples=2)
    assert f"test: {case.num_test} samples" in text
    for part in (str(root), datamodule.ORIGIN.name, "float32", "% missing", *datamodule.tasks):
        assert part in text


def test_a_data_set_ends_and_refuses_negative_indices(written: dict[str, Path]) -> None:
    dataset = _dataset(_ready(CASES[0], written["NYUv2"]), "test")
    assert len(list(dataset)) == 4
    with pytest.raises(IndexError, match=r"The index should be at least 0\. Found -1\."):
        dataset[-1]


def test_hidden_files_are_no_samples(tmp_path: Path) -> None:
    for name in ("1.npy", "._1.npy", ".2.npy", "2.png"):
        (tmp_path / name).touch()
    assert Folder(tmp_path, ".npy", read_image).keys() == {"1"}


def test_padded_pictures_keep_their_ratio_and_have_no_labels_around(tmp_path: Path) -> None:
    np.save(tmp_path / "image-a.npy", np.ones((20, 40, 3)))
    np.save(tmp_path / "depth-a.npy", np.full((20, 40), 2.0))
    files = {
        "image": Folder(tmp_path, ".npy", read_image),
        "depth": Folder(tmp_path, ".npy", read_depth),
    }
    files = {name: Folder(tmp_path / name, ".npy", fields.reader) for name, fields in files.items()}
    for name in files:
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / f"{name}-a.npy", tmp_path / name / "a.npy")
    dataset = DenseDataset(
        ["a"], files, [DenseTask("depth", 1, "depth")], image_size=(20, 20), padded=True, colours=COLOURS["imagenet"]
    )
    image, labels = dataset[0]
    inside = torch.zeros(20, 20, dtype=torch.bool)
    inside[5:15] = True
    assert torch.equal((image != 0).all(0), inside)
    assert torch.equal(~labels["depth"][0].isnan(), inside)
    assert (labels["depth"][0][inside] == 2).all()


def test_keys_are_sorted_as_numbers() -> None:
    assert sorted(["10", "2", "b", "a"], key=numeric) == ["a", "b", "2", "10"]


def test_repeated_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"each once\. Found \['a', 'a'\]"):
        check_names(["a", "a"], {"a": 1})


def test_a_configuration_file_may_name_it(tmp_path: Path) -> None:
    arguments = [
        "--data=mtl_lightning.datamodules.nyuv2.NYUv2DataModule",
        "--data.tasks=[normal, depth]",
        "--data.image_size=[24, 32]",
        "--data.on_broken=mask",
        f"--data.root={tmp_path}",
    ]
    cli = LightningCLI(BoringModel, run=False, args=arguments, save_config_callback=None)
    assert isinstance(cli.datamodule, DenseDataModule)
    assert (cli.datamodule.tasks, cli.datamodule.image_size) == (("normal", "depth"), (24, 32))


def _network(datamodule: DenseDataModule) -> nn.Module:
    heads: dict[str, nn.Module] = {task.name: DenseHead(4, task.channels) for task in datamodule.specs}
    return MultiHeadNetwork(EncoderDecoder((4, 8)), heads)


@pytest.mark.parametrize("method", ["mt2o", "task_groups"])
@pytest.mark.parametrize("case", [CASES[index] for index in (0, 2, 5, 6, 8)], ids=str)
def test_a_trainer_learns_from_it(case: Case, root: Path, method: str) -> None:
    options: dict[str, Any] = {} if "Taskonomy" in case.name else {"val_fraction": 0.34}
    datamodule = case.datamodule(root, augment=True, **options)
    network, tasks = _network(datamodule), case.make_tasks(datamodule.tasks)
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    module: MT2OModule | TaskGroupModule
    if method == "mt2o":
        preferences = simplex_lattice(num_tasks=len(tasks), num_divisions=1)[:2]
        module = MT2OModule(network, tasks, preferences, optimizer)
    else:
        module = TaskGroupModule(network, tasks, optimizer, warmup_batches=1)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=datamodule)
    assert trainer.global_step > 0
    after = list(module.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    losses = {name: value for name, value in trainer.callback_metrics.items() if "val_loss" in name}
    assert losses
    assert all(value.isfinite().all() for value in losses.values())
