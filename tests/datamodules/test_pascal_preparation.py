from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import binary_dilation, label

from mtl_lightning.datamodules.files import BrokenFileError, DatasetNotFoundError
from mtl_lightning.datamodules.pascal_preparation import boundaries, prepare_pascal_context, thinned
from tests.datamodules.layouts import FIRST_TEST, pascal_scene, write_pascal_published

KEYS = {split: [f"2008_{start + index:06d}" for index in range(2)] for split, start in (("train", 0), ("val", 100))}
EIGHT = np.ones((3, 3), bool)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    write_pascal_published(tmp_path / "published", train=2, test=2)
    return tmp_path / "published"


def _read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture)


def _reference_thinned(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The algorithm as its authors write it, pixel by pixel."""
    mask = np.pad(mask, 1).astype(int)
    changed = True
    while changed:
        changed = False
        for step in (0, 1):
            marked = []
            for row in range(1, mask.shape[0] - 1):
                for column in range(1, mask.shape[1] - 1):
                    p2, p3, p4 = mask[row - 1, column], mask[row - 1, column + 1], mask[row, column + 1]
                    p5, p6, p7 = mask[row + 1, column + 1], mask[row + 1, column], mask[row + 1, column - 1]
                    p8, p9 = mask[row, column - 1], mask[row - 1, column - 1]
                    around = [p2, p3, p4, p5, p6, p7, p8, p9]
                    transitions = sum((a, b) == (0, 1) for a, b in zip(around, [*around[1:], around[0]], strict=True))
                    products = (p2 * p4 * p6, p4 * p6 * p8) if step == 0 else (p2 * p4 * p8, p2 * p6 * p8)
                    if mask[row, column] and 2 <= sum(around) <= 6 and transitions == 1 and not any(products):
                        marked.append((row, column))
            for row, column in marked:
                mask[row, column] = 0
                changed = True
    return mask[1:-1, 1:-1].astype(bool)


@pytest.mark.parametrize("seed", range(4))
def test_thinning_is_that_of_the_paper(seed: int) -> None:
    generator = np.random.default_rng(seed)
    mask = binary_dilation(generator.random((18, 23)) < 0.05, iterations=2)
    assert (thinned(mask) == _reference_thinned(mask)).all()


def test_thinning_keeps_every_line_in_one_piece() -> None:
    mask = np.zeros((40, 40), bool)
    mask[3:7, 3:37] = mask[3:37, 20:25] = mask[30:34, 10:30] = True
    thin = thinned(mask)
    assert label(thin, EIGHT)[1] == label(mask, EIGHT)[1] == 1
    assert thin.sum() < mask.sum() / 3


def test_edges_are_on_the_boundaries_of_labels() -> None:
    labels = np.zeros((12, 16), np.uint16)
    labels[:, 8:] = 7
    edges = boundaries(labels)
    # Thinning shortens a line by the pixel at its end.
    assert (edges[1:-1, 7:9].sum(1) == 1).all()
    assert not edges[:, :7].any()
    assert not edges[:, 9:].any()


def test_labels_are_written_as_plain_pictures(published: Path, tmp_path: Path) -> None:
    prepare_pascal_context(published, tmp_path / "out")
    for split, first in (("train", 0), ("val", FIRST_TEST)):
        assert (tmp_path / "out" / f"{split}.txt").read_text().split() == KEYS[split]
        for seed, key in enumerate(KEYS[split], start=first):
            semseg = pascal_scene(seed)["semseg"]
            pictures = {path.parent.name: _read(path) for path in (tmp_path / "out").glob(f"*/{key}.png")}
            assert (pictures["segmentation"] == semseg).all()
            assert (pictures["saliency"] == np.where(semseg == 7, 255, 0)).all()
            assert (pictures["edge"] == np.where(boundaries(semseg), 255, 0)).all()
            assert (pictures["normal"] == _read(published / "normals_distill" / f"{key}.png")).all()
            image = (tmp_path / "out" / "images" / f"{key}.jpg").read_bytes()
            assert image == (published / "JPEGImages" / f"{key}.jpg").read_bytes()


def test_parts_are_grouped_into_six(published: Path, tmp_path: Path) -> None:
    prepare_pascal_context(published, tmp_path / "out")
    seen = set()
    for split, first in (("train", 0), ("val", FIRST_TEST)):
        for seed, key in enumerate(KEYS[split], start=first):
            person = pascal_scene(seed)["semseg"] == 7
            # Head, neck, upper left arm, left hand, upper right leg and right foot, two rows each.
            rows = np.array([1, 2, 3, 4, 5, 6])[np.arange(person.shape[0]) // 2 % 6][:, None]
            expected = np.where(person, rows, 0) if person.any() else np.full(person.shape, 255)
            found = _read(tmp_path / "out" / "human_parts" / f"{key}.png")
            assert (found == expected).all()
            seen |= set(np.unique(found).tolist())
    assert seen >= {0, 1, 2, 3, 4, 5, 6}


def test_normals_are_kept_at_the_given_labels(published: Path, tmp_path: Path) -> None:
    # LabelMap is the class plus one: 2 are walls.
    prepare_pascal_context(published, tmp_path / "out", normal_labels=[2])
    for seed, key in enumerate(KEYS["train"]):
        wall = pascal_scene(seed)["semseg"] == 1
        stored = _read(tmp_path / "out" / "normal" / f"{key}.png")
        assert (stored[~wall] == 0).all()
        assert (stored[wall] == _read(published / "normals_distill" / f"{key}.png")[wall]).all()


def test_distilled_maps_of_another_size_take_the_pixels_of_the_image(published: Path, tmp_path: Path) -> None:
    path = published / "sal_distill" / f"{KEYS['train'][0]}.png"
    saliency = np.zeros((64, 80), np.uint8)
    saliency[:32] = 255
    Image.fromarray(saliency).save(path)
    prepare_pascal_context(published, tmp_path / "out")
    found = _read(tmp_path / "out" / "saliency" / path.name)
    assert found.shape == (32, 40)
    assert (found[:16] == 255).all()
    assert (found[16:] == 0).all()


@pytest.mark.parametrize(
    "name",
    [
        "JPEGImages/{key}.jpg",
        "pascal-context/trainval/{key}.mat",
        "human_parts/{key}.mat",
        "normals_distill/{key}.png",
        "sal_distill/{key}.png",
    ],
)
def test_a_missing_file_is_named_before_anything_is_written(published: Path, tmp_path: Path, name: str) -> None:
    name = name.format(key=KEYS["val"][1])
    (published / name).unlink()
    with pytest.raises(DatasetNotFoundError, match=rf"Missing: {name} \(1 in all\)"):
        prepare_pascal_context(published, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["pascal-context/trainval/{key}.mat", "human_parts/{key}.mat", "sal_distill/{key}.png"]
)
def test_after_a_broken_file_there_is_no_list_and_no_half_file(published: Path, tmp_path: Path, name: str) -> None:
    path = published / name.format(key=KEYS["train"][1])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BrokenFileError, match=str(path)):
        prepare_pascal_context(published, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.txt"))
    assert not list((tmp_path / "out").glob("*/.*"))


def test_parts_of_another_size_are_named(published: Path, tmp_path: Path) -> None:
    path = published / "human_parts" / f"{KEYS['train'][0]}.mat"
    part = np.zeros((1, 1), dtype=[("part_name", object), ("mask", object)])
    part[0, 0] = ("head", np.ones((3, 3)))
    thing = np.zeros((1, 1), dtype=[(name, object) for name in ("class", "class_ind", "mask", "parts")])
    thing[0, 0] = ("person", 15.0, np.ones((3, 3)), part)
    anno = np.zeros((1, 1), dtype=[("imname", object), ("objects", object)])
    anno[0, 0] = ("picture", thing)
    savemat(path, {"anno": anno})
    with pytest.raises(BrokenFileError, match="parts of a picture of 32 x 40 pixels"):
        prepare_pascal_context(published, tmp_path / "out")


def test_a_segmentation_of_another_size_is_named(published: Path, tmp_path: Path) -> None:
    (path,) = (published / "semseg").glob(f"*/{KEYS['train'][0]}.png")
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(path)
    with pytest.raises(BrokenFileError, match=r"a map of 32 x 40 pixels, for its image\. Found shape \(8, 9\)"):
        prepare_pascal_context(published, tmp_path / "out")


def test_it_may_be_repeated(published: Path, tmp_path: Path) -> None:
    prepare_pascal_context(published, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    prepare_pascal_context(published, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before
