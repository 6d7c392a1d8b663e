from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mtl_lightning.datamodules.base import Split
from mtl_lightning.datamodules.joint_transforms import IGNORE_INDEX, Draw, flip_label
from mtl_lightning.datamodules.scenes import SCENE_TASKS, ScenesDataModule, ScenesDataset

ALL = tuple(SCENE_TASKS)
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SMALL: dict[str, Any] = {"size": 32, "num_train": 12, "num_val": 5, "num_test": 4, "batch_size": 4, "cache_dir": None}


def _datamodule(**options: Any) -> ScenesDataModule:
    datamodule = ScenesDataModule(**(SMALL | options))
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def _dataset(datamodule: ScenesDataModule, split: Split = "train") -> ScenesDataset:
    dataset = datamodule.datasets[split]
    assert isinstance(dataset, ScenesDataset)
    return dataset


def _loader(datamodule: ScenesDataModule, split: Split = "train") -> DataLoader[Any]:
    loader = datamodule.dataloader(split)
    assert isinstance(loader, DataLoader)
    return loader


def _epoch(loader: DataLoader[Any], epoch: int) -> list[Tensor]:
    sampler: Any = loader.sampler
    sampler.set_epoch(epoch)
    return [tensor for images, targets in loader for tensor in (images, *targets.values())]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    # As bytes, because NaN is not equal to itself.
    return [tensor.numpy().tobytes() for tensor in one] == [tensor.numpy().tobytes() for tensor in other]


def test_the_defaults_are_those_of_the_documentation() -> None:
    datamodule = ScenesDataModule()
    assert datamodule.tasks == (
        "semseg",
        "depth_zbuffer",
        "normal",
        "reshading",
        "edge_occlusion",
        "edge_texture",
        "keypoints2d",
    )
    assert datamodule.counts == {"train": 2000, "val": 400, "test": 400}
    assert (datamodule.size, datamodule.texture, datamodule.shading) == (64, 0.75, 1.0)


@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_is_images_and_one_label_per_task(split: Split) -> None:
    images, targets = next(iter(_loader(_datamodule(tasks=ALL, augment=True), split)))
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert tuple(targets) == ALL
    for name, task in SCENE_TASKS.items():
        expected = (4, 32, 32) if task.is_classes else (4, task.channels, 32, 32)
        assert targets[name].shape == expected
        assert targets[name].dtype == (torch.int64 if task.is_classes else torch.float32)


@pytest.mark.parametrize("tasks", [("albedo",), ("normal", "semseg"), ("semseg", "normal")])
def test_tasks_come_in_the_order_given(tasks: tuple[str, ...]) -> None:
    assert tuple(_dataset(_datamodule(tasks=tasks))[0][1]) == tasks


def test_every_scene_is_read_once(tmp_path: Path) -> None:
    datamodule = _datamodule(tasks=["depth_zbuffer"])
    for split, count in zip(SPLITS, (12, 5, 4), strict=True):
        depths = [depth for _, targets in _loader(datamodule, split) for depth in targets["depth_zbuffer"]]
        assert len(depths) == len({depth.numpy().tobytes() for depth in depths}) == count


def test_a_data_set_ends() -> None:
    assert len(list(_dataset(_datamodule()))) == 12


def test_negative_indices_are_refused() -> None:
    with pytest.raises(IndexError, match=r"The index should be at least 0\. Found -1\."):
        _dataset(_datamodule())[-1]


def test_splits_without_scenes_are_left_out() -> None:
    datamodule = _datamodule(num_val=0, num_test=0)
    assert [datamodule.datasets[split] is None for split in SPLITS] == [False, True, True]
    assert datamodule.val_dataloader() == datamodule.test_dataloader() == []


@pytest.mark.parametrize("augment", [False, True])
def test_the_file_holds_what_is_rendered_on_the_fly(tmp_path: Path, augment: bool) -> None:
    options: dict[str, Any] = {"tasks": ALL, "augment": augment}
    rendered, cached = _datamodule(**options), _datamodule(cache_dir=tmp_path, **options)
    for split in SPLITS:
        assert _equal(_epoch(_loader(rendered, split), 1), _epoch(_loader(cached, split), 1))


@pytest.mark.parametrize(
    "options",
    [{"tasks": ["albedo"]}, {"label_noise": {"normal": 1.0}}, {"missing": {"normal": 0.5}}, {"augment": True}],
)
def test_runs_with_the_same_scenes_share_the_files(tmp_path: Path, options: dict[str, Any]) -> None:
    _datamodule(cache_dir=tmp_path)
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.iterdir())
    _datamodule(cache_dir=tmp_path, **options)
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.iterdir()) == before


def test_without_a_cache_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _datamodule(cache_dir=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("variable", "below"), [("XDG_CACHE_HOME", "."), ("HOME", ".cache")])
def test_the_automatic_folder_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    _datamodule(cache_dir="auto")
    assert len(list((tmp_path / below / "mtl_lightning" / "scenes").iterdir())) == 3


def test_files_have_to_be_written_before_they_are_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`prepare_data` should be called before `setup`"):
        ScenesDataModule(**(SMALL | {"cache_dir": tmp_path})).setup()


def test_prepare_data_assigns_nothing(tmp_path: Path) -> None:
    datamodule = ScenesDataModule(**(SMALL | {"cache_dir": tmp_path}))
    before = dict(vars(datamodule))
    datamodule.prepare_data()
    assert vars(datamodule) == before


@pytest.mark.parametrize("cached", [False, True])
def test_workers_change_nothing(tmp_path: Path, cached: bool) -> None:
    options: dict[str, Any] = {
        "tasks": ALL,
        "augment": True,
        "label_noise": {"semseg": 0.2, "depth_zbuffer": 0.1},
        "missing": {"normal": 0.5},
        "cache_dir": tmp_path if cached else None,
    }
    alone, helped = (_loader(_datamodule(num_workers=workers, **options)) for workers in (0, 2))
    for epoch in (0, 1):
        assert _equal(_epoch(alone, epoch), _epoch(helped, epoch))


def test_a_worker_that_is_spawned_reads_the_file(tmp_path: Path) -> None:
    dataset = _dataset(_datamodule(cache_dir=tmp_path, augment=True))
    loader = DataLoader(dataset, batch_size=6, num_workers=1, multiprocessing_context="spawn")
    spawned = [tensor for images, targets in loader for tensor in (images, *targets.values())]
    here = [tensor for images, targets in DataLoader(dataset, batch_size=6) for tensor in (images, *targets.values())]
    assert _equal(spawned, here)


def test_augmentation_changes_with_the_epoch_and_repeats() -> None:
    loader = _loader(_datamodule(augment=True))
    first, second, again = (_epoch(loader, epoch) for epoch in (0, 1, 0))
    assert _equal(first, again)
    dataset = _dataset(_datamodule(augment=True))
    assert all(not torch.equal(dataset[index][0], dataset[12 + index][0]) for index in range(12))
    assert not _equal(first, second)


def test_augmentation_is_resumed_in_the_middle_of_an_epoch() -> None:
    loader, resumed = (_loader(_datamodule(tasks=ALL, augment=True)) for _ in range(2))
    whole = _epoch(loader, 3)
    iterator = iter(loader)
    next(iterator)
    resumed.load_state_dict(loader.state_dict())  # type: ignore[attr-defined]
    rest = _epoch(resumed, 3)
    assert len(rest) == 2 * (1 + len(ALL))
    assert _equal(rest, whole[1 + len(ALL) :])


@pytest.mark.parametrize("split", ["val", "test"])
def test_only_training_pictures_are_augmented(split: Split) -> None:
    plain, augmented = (_loader(_datamodule(augment=augment), split) for augment in (False, True))
    assert _equal(_epoch(plain, 1), _epoch(augmented, 1))


def test_without_augmentation_all_epochs_show_the_same_pictures() -> None:
    loader = _loader(_datamodule())
    first, second = ({image.numpy().tobytes() for image in torch.cat(_epoch(loader, epoch)[::8])} for epoch in (0, 1))
    assert first == second


def test_reshading_of_a_mirrored_picture_is_lit_from_the_right() -> None:
    datamodule = _datamodule(tasks=["reshading", "normal", "depth_zbuffer", "depth_euclidean"], augment=True)
    dataset = _dataset(datamodule)
    assert dataset.transform is not None
    dataset.transform.max_scale = 1.0
    mirrored = 0
    plain = _dataset(_datamodule(tasks=["normal"]))
    for index in range(12):
        labels = dataset[index][1]
        mirrored += torch.equal(labels["normal"], flip_label(plain[index][1]["normal"], "normal"))
        # The corner's ray gives the field of view, and with it the points.
        ratio = float(labels["depth_euclidean"][0, 0, 0] / labels["depth_zbuffer"][0, 0, 0])
        grid = ((ratio**2 - 1) / 2) ** 0.5 * 32 / 31 * ((torch.arange(32) + 0.5) / 16 - 1)
        depth = labels["depth_zbuffer"][0]
        points = torch.stack([depth * grid, -depth * grid[:, None], -depth])
        beam = torch.tensor([0.6, 0.6, 0.0])[:, None, None] - points
        expected = ((labels["normal"] * beam).sum(0) / beam.norm(dim=0)).clamp(min=0)
        torch.testing.assert_close(labels["reshading"][0], expected, rtol=0, atol=1e-3)
    assert 0 < mirrored < 12


def test_the_share_of_missing_labels_is_exact() -> None:
    dataset = _dataset(_datamodule(tasks=ALL, missing={"semseg": 0.25, "normal": 0.5, "albedo": 0.0}))
    labels = [dataset[index][1] for index in range(12)]
    assert sum(bool((label["semseg"] == IGNORE_INDEX).all()) for label in labels) == 3
    assert sum(bool(label["normal"].isnan().all()) for label in labels) == 6
    assert not any((label["semseg"] == IGNORE_INDEX).any() for label in labels if label["semseg"].max() >= 0)
    rest = [label[task] for label in labels for task in ALL if task not in ("semseg", "normal")]
    assert not any(label.isnan().any() or (label < -100).any() for label in rest)


def test_one_label_is_always_left() -> None:
    dataset = _dataset(_datamodule(tasks=["normal"], num_train=4, missing={"normal": 0.99}))
    assert sum(not dataset[index][1]["normal"].isnan().any() for index in range(4)) == 1


def test_labels_are_missing_independently() -> None:
    dataset = _dataset(_datamodule(num_train=60, missing={"semseg": 0.5, "normal": 0.5}))
    pairs = {
        (bool((label["semseg"] < 0).all()), bool(label["normal"].isnan().all()))
        for _, label in (dataset[index] for index in range(60))
    }
    assert len(pairs) == 4


@pytest.mark.parametrize("task", ["depth_zbuffer", "edge_texture", "albedo"])
def test_noise_of_a_float_label_is_a_multiple_of_its_deviation(task: str) -> None:
    clean, noisy = (_dataset(_datamodule(tasks=[task], label_noise=noise)) for noise in (None, {task: 0.5}))
    for index in range(12):
        label = clean[index][1][task]
        ratio = (noisy[index][1][task] - label).std() / label.std()
        assert ratio.item() == pytest.approx(0.5, rel=0.15)


def test_every_scene_and_task_has_its_own_noise() -> None:
    tasks = ["edge_texture", "reshading"]
    clean, noisy = (_dataset(_datamodule(tasks=tasks, label_noise=n)) for n in (None, dict.fromkeys(tasks, 1.0)))
    noise = [(noisy[index][1][task] - clean[index][1][task]).flatten() for index in (0, 1) for task in tasks]
    # Independent samples of 1,024 pixels are correlated by 0.03.
    assert (torch.corrcoef(torch.stack(noise)) - torch.eye(4)).abs().max() < 0.15


def test_noisy_normals_have_unit_length() -> None:
    normal = _dataset(_datamodule(tasks=["normal"], label_noise={"normal": 0.5}))[0][1]["normal"]
    torch.testing.assert_close(normal.norm(dim=0), torch.ones(32, 32))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_noise_of_classes_is_a_share_of_random_pixels(share: float) -> None:
    clean, noisy = (_dataset(_datamodule(label_noise=noise)) for noise in (None, {"semseg": share}))
    changed = torch.stack([clean[index][1]["semseg"] != noisy[index][1]["semseg"] for index in range(12)])
    # One of ten random classes is the true one.
    assert changed.float().mean().item() == pytest.approx(0.9 * share, abs=0.03)


def test_noise_of_edges_leaves_them_edges() -> None:
    options = {"tasks": ["edge_occlusion"]}
    clean, noisy = (_dataset(_datamodule(**options, label_noise=n)) for n in (None, {"edge_occlusion": 0.5}))
    edges = torch.stack([noisy[index][1]["edge_occlusion"] for index in range(12)])
    assert set(edges.flatten().tolist()) == {0.0, 1.0}
    changed = edges != torch.stack([clean[index][1]["edge_occlusion"] for index in range(12)])
    assert changed.float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_noise_stays_the_same_in_every_epoch_and_off_the_image() -> None:
    clean, noisy = (_loader(_datamodule(tasks=["albedo"], label_noise=noise)) for noise in (None, {"albedo": 0.5}))
    assert _equal(_epoch(noisy, 0), _epoch(noisy, 0))
    assert _equal(_epoch(clean, 0)[::2], _epoch(noisy, 0)[::2])
    first, second = ({label.numpy().tobytes() for label in torch.cat(_epoch(noisy, epoch)[1::2])} for epoch in (0, 1))
    assert first == second


@pytest.mark.parametrize("split", ["val", "test"])
def test_only_training_labels_are_noisy_or_missing(split: Split) -> None:
    options = {"missing": {"normal": 0.9}, "label_noise": {"semseg": 0.9}}
    clean, poor = (_loader(_datamodule(**each), split) for each in ({}, options))
    assert _equal(_epoch(clean, 0), _epoch(poor, 0))


def test_noise_moves_with_its_label() -> None:
    dataset = _dataset(_datamodule(tasks=["albedo"], label_noise={"albedo": 0.5}, augment=True))
    plain = _dataset(_datamodule(tasks=["albedo"], label_noise={"albedo": 0.5}))
    assert dataset.transform is not None
    dataset.transform.flip, dataset.transform.max_scale = 1.0, 1.0
    image, label = plain[3]
    moved = dataset.transform.apply(image, label, Draw(flip=True, crop=None))
    assert torch.equal(dataset[3][1]["albedo"], moved[1]["albedo"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "`tasks` should hold at least one of semseg"),
        ({"tasks": ["depth"]}, r"each once. Found \['depth'\]."),
        ({"tasks": ["normal", "normal"]}, r"each once. Found \['normal', 'normal'\]."),
        ({"size": 16}, r"`size` should be in \[32, 224\] pixels. Found 16."),
        ({"size": 256}, r"`size` should be in \[32, 224\] pixels. Found 256."),
        ({"num_train": 0}, "`num_train` should be at least 1. Found 0."),
        ({"num_val": -1}, "`num_val` should be at least 0. Found -1."),
        ({"num_test": -1}, "`num_test` should be at least 0. Found -1."),
        ({"texture": 1.5}, r"`texture` should be in \[0, 1\]. Found 1.5."),
        ({"shading": -1.0}, r"`shading` should be in \[0, 1\]. Found -1.0."),
        ({"label_noise": {"albedo": 0.1}}, "`label_noise` should name tasks among .* Found 'albedo'."),
        ({"label_noise": {"semseg": 1.1}}, r"`label_noise` of 'semseg' should be in \[0, 1\]. Found 1.1."),
        (
            {"tasks": ["edge_occlusion"], "label_noise": {"edge_occlusion": 2.0}},
            r"`label_noise` of 'edge_occlusion' should be in \[0, 1\]. Found 2.0.",
        ),
        ({"label_noise": {"normal": -0.1}}, r"`label_noise` of 'normal' should be in \[0, inf\). Found -0.1."),
        ({"missing": {"albedo": 0.1}}, "`missing` should name tasks among .* Found 'albedo'."),
        ({"missing": {"normal": 1.0}}, r"`missing` of 'normal' should be in \[0, 1\). Found 1.0."),
        ({"batch_size": 0}, "`batch_size` should be at least 1. Found 0."),
        ({"seed": -1}, "`seed` should be at least 0. Found -1."),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScenesDataModule(**options)


def test_one_string_is_not_a_sequence_of_tasks() -> None:
    with pytest.raises(TypeError, match=r"`tasks` should be a sequence of names\. Found the string"):
        ScenesDataModule(tasks="semseg")


class _Dense(LightningModule):
    """Three convolutions and the losses of two tasks, whose labels may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 11, 1)
        )
        self.seen: list[Tensor] = []
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        images, targets = batch
        self.seen.append(images)
        outputs = self.network(images)
        valid = ~targets["depth_zbuffer"].isnan()
        depth = (outputs[:, 10:] - targets["depth_zbuffer"])[valid].abs().sum() / valid.sum().clamp(min=1)
        semseg = nn.functional.cross_entropy(outputs[:, :10], targets["semseg"], ignore_index=IGNORE_INDEX)
        loss = depth + semseg.nan_to_num()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, dict[str, Tensor]]) -> None:
        assert not any(target.isnan().any() for target in batch[1].values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def _fit(folder: Path, max_epochs: int, overfit_batches: int = 0, **options: Any) -> _Dense:
    module = _Dense()
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        overfit_batches=overfit_batches,
    )
    options = SMALL | {"tasks": ["semseg", "depth_zbuffer"], "cache_dir": folder, "augment": True} | options
    trainer.fit(module, datamodule=ScenesDataModule(**options))
    return module


def test_a_trainer_learns_from_the_scenes(tmp_path: Path) -> None:
    missing = {"semseg": 0.25, "depth_zbuffer": 0.25}
    losses = torch.tensor(_fit(tmp_path, 4, num_train=48, missing=missing).losses)
    assert len(losses) == 48
    assert losses.isfinite().all()
    assert losses[-12:].mean() < 0.8 * losses[:6].mean()


def test_a_trainer_draws_the_augmentation_anew_in_each_epoch(tmp_path: Path) -> None:
    seen = _fit(tmp_path, 2).seen
    images = {image.numpy().tobytes() for batch in seen for image in batch}
    assert len(images) == 24


def test_overfitting_sees_the_same_pictures_in_every_epoch(tmp_path: Path) -> None:
    seen = _fit(tmp_path, 3, overfit_batches=2).seen
    assert len(seen) == 6
    assert all(torch.equal(batch, seen[step % 2]) for step, batch in enumerate(seen))


def test_a_configuration_file_may_name_it(tmp_path: Path) -> None:
    arguments = [
        "--data=mtl_lightning.datamodules.scenes.ScenesDataModule",
        "--data.tasks=[normal, semseg]",
        "--data.missing={normal: 0.5}",
        f"--data.cache_dir={tmp_path}",
    ]
    cli = LightningCLI(BoringModel, run=False, args=arguments, save_config_callback=None)
    assert isinstance(cli.datamodule, ScenesDataModule)
    assert (cli.datamodule.tasks, cli.datamodule.missing) == (("normal", "semseg"), {"normal": 0.5})


def test_scenes_are_drawn_by_the_seed() -> None:
    one, same, other = (next(iter(_loader(_datamodule(seed=seed), "val")))[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
