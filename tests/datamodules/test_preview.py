from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from mtl_lightning.cli import preview
from mtl_lightning.datamodules import MultiDigitsDataModule, MultiTargetDataModule, ScenesDataModule
from mtl_lightning.datamodules.preview import preview_figure, write_preview
from tests.datamodules.conftest import WriteIdx
from tests.datamodules.tables import write_celeba, write_cifar100, write_office, write_sarcos


def scenes(**arguments: Any) -> ScenesDataModule:
    defaults: dict[str, Any] = {"size": 32, "num_train": 5, "num_val": 2, "num_test": 0, "batch_size": 2}
    return ScenesDataModule(cache_dir=None, **(defaults | arguments))


def pictures(figure: Any) -> list[Any]:
    return [axes.get_images()[0].get_array() for axes in figure.axes]


def test_there_is_a_row_for_each_sample_and_a_column_for_each_task() -> None:
    figure = preview_figure(scenes(tasks=["semseg", "normal", "depth_zbuffer"]), num_samples=3)
    assert [axes.get_title() for axes in figure.axes[:4]] == ["input", "semseg", "normal", "depth_zbuffer"]
    assert len(figure.axes) == 3 * 4


def test_no_more_rows_than_samples() -> None:
    assert len(preview_figure(scenes(tasks=["semseg"]), num_samples=99).axes) == 5 * 2


def test_what_is_shown_is_the_sample() -> None:
    data = scenes(tasks=["semseg", "depth_zbuffer"])
    figure = preview_figure(data, num_samples=1, split="val")
    inputs, targets = next(iter(data.val_dataloader()))
    shown = pictures(figure)
    np.testing.assert_array_equal(shown[1], targets["semseg"][0])
    np.testing.assert_array_equal(shown[2], targets["depth_zbuffer"][0, 0])
    image = inputs[0].movedim(0, -1)
    np.testing.assert_allclose(shown[0][..., :3], (image - image.min()) / (image.max() - image.min()), atol=1e-6)


def test_missing_labels_are_left_open() -> None:
    figure = preview_figure(scenes(tasks=["semseg", "normal"], missing={"semseg": 0.9, "normal": 0.9}), num_samples=5)
    classes = [picture.mask.all() for picture in pictures(figure)[1::3]]
    normals = [not picture[..., 3].any() for picture in pictures(figure)[2::3]]
    assert sum(classes) == sum(normals) == 4


def test_single_labels_are_written() -> None:
    figure = preview_figure(MultiDigitsDataModule(num_train=8), num_samples=2)
    assert all(axes.texts[0].get_text().isdigit() for axes in (*figure.axes[1:3], *figure.axes[4:6]))


def test_labels_take_no_more_room_than_their_text() -> None:
    mixed = preview_figure(MultiDigitsDataModule(num_train=8), num_samples=2)
    image, left, _ = [axes.get_position().width * mixed.get_figwidth() for axes in mixed.axes[:3]]
    assert left < image / 2
    assert not mixed.axes[1].axison
    plain = preview_figure(MultiTargetDataModule(), num_samples=2)
    assert plain.get_figheight() < mixed.get_figheight() / 2


class _Labelled(LightningDataModule):
    """Images with a class for each of some tasks."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.rows = [(torch.rand(3, 8, 8), {name: torch.tensor(index % 2) for name in names}) for index in range(4)]

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        MultiDigitsDataModule(num_train=8),
        MultiTargetDataModule(),
        _Labelled("smiling", "wearing_a_large_necktie", "young"),
        _Labelled(*(f"attribute_number_{index}" for index in range(40))),
    ],
    ids=["digits", "table", "long", "many"],
)
def test_no_text_runs_into_another(data: LightningDataModule) -> None:
    figure = preview_figure(data, num_samples=3)
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in (axes.title, *axes.texts) if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_many_labels_with_long_names_stay_narrow() -> None:
    figure = preview_figure(_Labelled(*(f"attribute_number_{index}" for index in range(40))), num_samples=2)
    assert figure.get_figwidth() < 15  # inches


def test_the_picture_is_written(tmp_path: Path) -> None:
    path = write_preview(tmp_path / "new" / "sheet.png", scenes(tasks=["normal"]), num_samples=2)
    assert matplotlib.image.imread(path).ndim == 3


def _labelled_set(name: str, root: Path, write_idx: WriteIdx) -> list[str]:
    """Write a small set with labels of whole samples and return the options that its data module needs."""
    if name == "CelebADataModule":
        write_celeba(root, np.resize([1, -1], (4, 40)), [0, 0, 1, 2])
    elif name == "CIFAR100DataModule":
        write_cifar100(root)
        return ["--data.init_args.verify=false"]
    elif name == "OfficeDataModule":
        write_office(root, "office-31", 31, 1)
        return ["--data.init_args.image_size=8"]
    elif name == "SarcosDataModule":
        write_sarcos(root, *np.random.default_rng(0).normal(size=(2, 20, 28)))
    elif name == "MultiMNISTDataModule":
        for part in ("train", "t10k"):
            write_idx(root / f"{part}-images-idx3-ubyte", torch.zeros(20, 28, 28, dtype=torch.uint8))
            write_idx(root / f"{part}-labels-idx1-ubyte", torch.arange(20) % 10)
    return []


@pytest.mark.parametrize(
    "name",
    [
        "CelebADataModule",
        "CIFAR100DataModule",
        "OfficeDataModule",
        "SarcosDataModule",
        "MultiMNISTDataModule",
        "MultiTargetDataModule",
    ],
)
def test_the_command_draws_sets_with_labels_of_whole_samples(name: str, tmp_path: Path, write_idx: WriteIdx) -> None:
    options = _labelled_set(name, tmp_path, write_idx)
    if name != "MultiTargetDataModule":
        options.append(f"--data.init_args.root={tmp_path}")
    path = preview([f"--data=mtl_lightning.datamodules.{name}", *options, f"--output={tmp_path / 'a.png'}"])
    assert matplotlib.image.imread(path).ndim == 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"split": "valid"}, "'train', 'val' or 'test'"), ({"num_samples": 0}, "at least 1"), ({"split": "test"}, "none")],
)
def test_arguments_are_checked(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        preview_figure(scenes(), **arguments)


def test_batches_of_another_form_are_refused() -> None:
    class Plain(LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(torch.zeros(4, 2))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="should be `\\(inputs"):
        preview_figure(Plain())
