from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lightning.datamodules.dense import DenseDataset
from mtl_lightning.datamodules.pascal_context import PASCALContextDataModule, pascal_context_tasks
from mtl_lightning.datamodules.pascal_preparation import boundaries, prepare_pascal_context
from mtl_lightning.losses import BalancedBCELoss
from tests.datamodules.layouts import FIRST_TEST, pascal_scene, write_pascal_published


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pascal")
    write_pascal_published(folder / "published", train=3, test=4)
    prepare_pascal_context(folder / "published", folder / "prepared", normal_labels=[1, 2])
    return folder / "prepared"


def _dataset(root: Path, split: Any = "test", **options: Any) -> DenseDataset:
    datamodule = PASCALContextDataModule(root=root, **options)
    datamodule.setup()
    dataset = datamodule.datasets[split]
    assert isinstance(dataset, DenseDataset)
    return dataset


def test_labels_are_those_of_the_scenes(root: Path) -> None:
    for index, (_, labels) in enumerate(_dataset(root, image_size=None)):
        maps = pascal_scene(FIRST_TEST + index)
        semseg = torch.from_numpy(maps["semseg"].copy())
        assert torch.equal(labels["segmentation"], semseg)
        assert torch.equal(labels["saliency"][0] == 1, semseg == 7)
        assert torch.equal(labels["edge"][0] == 1, torch.from_numpy(boundaries(maps["semseg"])))
        kept = semseg <= 1
        normal = labels["normal"].permute(1, 2, 0)
        assert normal[~kept].isnan().all()
        torch.testing.assert_close(normal[kept], torch.from_numpy(maps["normal"].copy())[kept], atol=0.01, rtol=0)


def test_pictures_without_a_part_have_no_label_of_parts(root: Path) -> None:
    people = []
    for index, (_, labels) in enumerate(_dataset(root, image_size=None)):
        person = torch.from_numpy(pascal_scene(FIRST_TEST + index)["semseg"] == 7)
        people.append(bool(person.any()))
        if people[-1]:
            assert torch.equal(labels["human_parts"] > 0, person)
        else:
            assert (labels["human_parts"] == -1).all()
    assert set(people) == {True, False}


def test_upright_and_wide_pictures_lie_in_the_middle(root: Path) -> None:
    for index, (image, labels) in enumerate(_dataset(root, image_size=48)):
        height, width = pascal_scene(FIRST_TEST + index)["semseg"].shape
        inside = torch.zeros(48, 48, dtype=torch.bool)
        top, left = (48 - height) // 2, (48 - width) // 2
        inside[top : top + height, left : left + width] = True
        assert torch.equal(labels["segmentation"] >= 0, inside)
        assert labels["edge"][0].isnan().equal(~inside)
        assert (image[:, ~inside] == 0).all()


def test_larger_pictures_are_shrunk_without_distortion(root: Path) -> None:
    for index, (_, labels) in enumerate(_dataset(root, image_size=20)):
        height, width = pascal_scene(FIRST_TEST + index)["semseg"].shape
        seen = (labels["segmentation"] >= 0).nonzero()
        found = (seen.amax(0) - seen.amin(0) + 1).tolist()
        assert found == ([16, 20] if width > height else [20, 16])


def test_saliency_weighs_both_classes_alike() -> None:
    (task,) = pascal_context_tasks(["saliency"])
    assert isinstance(task.loss, BalancedBCELoss)
    assert task.loss.positive_weight is None


def test_classes_are_in_the_range_of_their_tasks(root: Path) -> None:
    labels = [label for _, label in _dataset(root)]
    assert max(int(label["segmentation"].max()) for label in labels) <= 20
    assert np.unique([label["human_parts"].max() for label in labels]).max() == 6
