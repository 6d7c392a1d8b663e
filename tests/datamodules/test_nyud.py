from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_lightning.datamodules.dense import DenseDataset
from mtl_lightning.datamodules.files import DatasetNotFoundError
from mtl_lightning.datamodules.nyud import NYUDDataModule, nyud_specs, nyud_tasks
from tests.datamodules.layouts import FIRST_TEST, NYUD_SUFFIXES, hole, scene, write_nyud

each_form = pytest.mark.parametrize("form", NYUD_SUFFIXES)


def _dataset(root: Path, **options: Any) -> DenseDataset:
    datamodule = NYUDDataModule(root=root, normalize=None, **options)
    datamodule.setup("test")
    dataset = datamodule.datasets["test"]
    assert isinstance(dataset, DenseDataset)
    return dataset


@each_form
def test_every_form_is_recognised_and_read(tmp_path: Path, form: str) -> None:
    write_nyud(tmp_path, form, train=1, test=3)
    for index, (image, labels) in enumerate(_dataset(tmp_path)):
        maps = scene(FIRST_TEST + index)
        error = (image - torch.from_numpy(maps["image"].copy()).permute(2, 0, 1)).mean(0).abs()
        # JPEG is off by a few levels, more at sharp edges.
        assert error.max() < 1e-6 if form == "InvPT" else error.median() < 0.02
        assert torch.equal(labels["segmentation"], torch.from_numpy(hole(maps["semseg"], -1)))
        depth = torch.from_numpy(hole(maps["depth_zbuffer"], np.nan)).permute(2, 0, 1)
        torch.testing.assert_close(labels["depth"], depth, equal_nan=True)
        cosine = (labels["normal"] * torch.from_numpy(maps["normal"].copy()).permute(2, 0, 1)).sum(0)
        assert cosine.nanmedian() > 0.999
        edge = torch.from_numpy(maps["edge_occlusion"].copy()).permute(2, 0, 1)
        torch.testing.assert_close(labels["edge"], edge)


@each_form
@pytest.mark.parametrize(("num_classes", "shift", "background"), [(40, 0, -1), (41, 1, 0)])
def test_background_is_missing_or_a_class(
    tmp_path: Path, form: str, num_classes: Literal[40, 41], shift: int, background: int
) -> None:
    write_nyud(tmp_path, form, train=1, test=1)
    label = _dataset(tmp_path, num_classes=num_classes, tasks=["segmentation"])[0][1]["segmentation"]
    assert torch.equal(label, torch.from_numpy(hole(scene(FIRST_TEST)["semseg"] + shift, background)))


def test_keys_are_those_of_the_list(tmp_path: Path) -> None:
    write_nyud(tmp_path, train=3, test=3)
    (tmp_path / "gt_sets" / "val.txt").write_text("0102\n0100\n")
    assert _dataset(tmp_path).keys == ["0102", "0100"]


def test_grey_pixels_have_no_normal(tmp_path: Path) -> None:
    write_nyud(tmp_path, train=1, test=1)
    path = tmp_path / "normals" / f"{FIRST_TEST:04d}.png"
    stored = np.asarray(Image.open(path)).copy()
    stored[:5, :7] = 128
    Image.fromarray(stored).save(path)
    normal = _dataset(tmp_path)[0][1]["normal"]
    assert normal[:, :5, :7].isnan().all()
    assert normal.isnan().sum() == 3 * 35


def test_lists_without_pictures_are_an_error(tmp_path: Path) -> None:
    write_nyud(tmp_path, train=1, test=1)
    for folder in ("images", "segmentation", "depth", "normals", "edge"):
        for path in (tmp_path / folder).iterdir():
            path.unlink()
    with pytest.raises(DatasetNotFoundError, match="Found none of its files in"):
        _dataset(tmp_path)


@each_form
def test_a_lost_folder_does_not_change_the_form(tmp_path: Path, form: str) -> None:
    write_nyud(tmp_path, form, train=1, test=2)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with pytest.raises(DatasetNotFoundError, match=rf"Missing: images/0100{NYUD_SUFFIXES[form][0]}, .*\(2 in all\)"):
        _dataset(tmp_path)


def test_other_numbers_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`num_classes` should be 40 or 41\. Found 13"):
        NYUDDataModule(num_classes=13)  # type: ignore[arg-type]


def test_the_number_of_classes_is_that_of_the_metrics() -> None:
    (task,) = nyud_tasks(["segmentation"], num_classes=41)
    assert nyud_specs(41)["segmentation"].channels == 41
    logits = torch.zeros(1, 41, 2, 2)
    task.metrics.update(logits, torch.full((1, 2, 2), 40))  # type: ignore[union-attr]
