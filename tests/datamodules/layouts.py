"""Writers of small procedural scenes in the exact layouts of the dense data sets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from mtl_lightning.datamodules.scene_rendering import render

Array = NDArray[Any]

#: Not square, so that rows and columns cannot be taken for each other.
HEIGHT, WIDTH = 32, 40
#: Where labels are missing: two corners, one of them at the upper border.
HOLE = (slice(0, 4), slice(0, 6))
FIRST_TEST = 100
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22)


@cache
def scene(seed: int) -> dict[str, Array]:
    """The maps of one scene, channels last, but for classes, (H, W)."""
    maps = render(seed, WIDTH)
    return {
        name: values[:HEIGHT] if values.ndim == 2 else values[:, :HEIGHT].transpose(1, 2, 0)
        for name, values in maps.items()
    }


def hole(values: Array, missing: float) -> Array:
    """A copy with the value of missing labels in the hole."""
    values = values.copy()
    values[HOLE] = missing
    return values


def save(path: Path, values: Array) -> None:
    """One file, its kind by its ending; pictures of 8 or 16 bits by their dtype, in MATLAB the folder is the key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".mat":
        savemat(path, {path.parent.name: values}, do_compression=True)
    elif path.suffix == ".jpg":
        Image.fromarray(values).save(path, quality=95)
    else:
        Image.fromarray(values).save(path)


def bytes_of(values: Array) -> Array:
    """Values in [0, 1] as 8 bits."""
    return np.rint(values * 255).astype(np.uint8)


def splits(train: int, test: int) -> dict[str, list[int]]:
    """The seeds of the scenes of each split."""
    return {"train": list(range(train)), "val": list(range(FIRST_TEST, FIRST_TEST + test))}


def write_nyuv2(root: Path, train: int = 6, test: int = 4, label_dtype: type[Any] = np.int64) -> None:
    for split, seeds in splits(train, test).items():
        for number, seed in enumerate(seeds):
            maps = scene(seed)
            fields = {
                "image": maps["image"].astype(np.float64),
                "label": hole(maps["semseg"], -1).astype(label_dtype),
                "depth": hole(maps["depth_zbuffer"], 0.0),
                "normal": hole(maps["normal"], 0.0),
            }
            for field, values in fields.items():
                save(root / split / field / f"{number}.npy", values)


def disparity(seed: int) -> Array:
    return (0.4 / scene(seed)["depth_zbuffer"]).astype(np.float32)


def write_cityscapes_arrays(root: Path, train: int = 6, test: int = 4, label: str = "label_7") -> None:
    for split, seeds in splits(train, test).items():
        for number, seed in enumerate(seeds):
            save(root / split / "image" / f"{number}.npy", scene(seed)["image"])
            save(root / split / label / f"{number}.npy", hole(scene(seed)["semseg"] % 7, -1).astype(np.float32))
            save(root / split / "depth" / f"{number}.npy", hole(disparity(seed), 0))


def part_ids(semseg: Array) -> Array:
    """Boxes are persons with parts 0 to 4, columns cars with parts 0 to 5, rugs have an instance, others a class."""
    rows = np.arange(HEIGHT)[:, None]
    ids = np.where(semseg == 6, 20_003, 7)
    ids = np.where(semseg == 7, 24 * 100_000 + 300 + rows % 5, ids)
    return np.where(semseg == 9, 26 * 100_000 + 100 + rows % 6, ids).astype(np.int32)


def write_cityscapes_pictures(root: Path, train: int = 6, test: int = 4) -> None:
    for split, seeds in splits(train, test).items():
        for number, seed in enumerate(seeds):
            semseg = scene(seed)["semseg"]
            save(root / split / "image" / f"{number}.png", bytes_of(scene(seed)["image"]))
            save(root / split / "seg" / f"{number}.png", hole(np.array(LABEL_IDS)[semseg], 0).astype(np.uint8))
            stored = np.rint(disparity(seed)[:, :, 0] * 1024 + 1)
            save(root / split / "depth" / f"{number}.png", hole(stored, 0).astype(np.uint16))
            save(root / split / "part_seg" / f"{number}.tif", part_ids(semseg))


NYUD_SUFFIXES: Mapping[str, tuple[str, str, str, str, str]] = {
    "ASTMT": (".jpg", ".mat", ".mat", ".jpg", ".png"),
    "MTI": (".jpg", ".png", ".npy", ".npy", ".npy"),
    "InvPT": (".png", ".png", ".npy", ".png", ".png"),
}


def write_nyud(root: Path, form: str = "InvPT", train: int = 6, test: int = 4) -> None:
    image, segmentation, depth, normals, edge = NYUD_SUFFIXES[form]
    for split, seeds in splits(train, test).items():
        keys = [f"{seed:04d}" for seed in seeds]
        (root / "gt_sets").mkdir(parents=True, exist_ok=True)
        (root / "gt_sets" / f"{split}.txt").write_text("\n".join(keys) + "\n")
        for key, seed in zip(keys, seeds, strict=True):
            maps = scene(seed)
            save(root / "images" / f"{key}{image}", bytes_of(maps["image"]))
            save(root / "segmentation" / f"{key}{segmentation}", hole(maps["semseg"] + 1, 0).astype(np.uint8))
            save(root / "depth" / f"{key}{depth}", hole(maps["depth_zbuffer"][:, :, 0], 0))
            normal = maps["normal"]
            save(root / "normals" / f"{key}{normals}", normal if normals == ".npy" else bytes_of((normal + 1) / 2))
            edges = maps["edge_occlusion"][:, :, 0]
            save(root / "edge" / f"{key}{edge}", edges if edge == ".npy" else bytes_of(edges))


BUILDINGS = {"train": ("hanson", "merom"), "val": ("corozal",), "test": ("uvalda", "ihlen")}


def taskonomy_maps(seed: int) -> dict[str, Array]:
    """The stored maps of a scene by domain, with the types and ranges of Taskonomy."""
    maps = scene(seed)

    def words(values: Array) -> Array:
        return np.rint(values).clip(0, 65535).astype(np.uint16)[:, :, 0]

    return {
        "rgb": bytes_of(maps["image"]),
        "depth_euclidean": hole(words(maps["depth_euclidean"] * 512), 65535),
        "depth_zbuffer": hole(words(maps["depth_zbuffer"] * 512), 65535),
        "edge_occlusion": words(maps["edge_occlusion"] * 0.02 * 2**16),
        "edge_texture": words(maps["edge_texture"] * 0.16 * 2**16),
        "keypoints2d": words(maps["keypoints2d"] * 0.01 * 2**16),
        "keypoints3d": words(maps["keypoints3d"] * 65535),
        "normal": hole(np.rint(maps["normal"] * 127 + 127).astype(np.uint8), 127),
        "principal_curvature": np.concatenate(
            [
                np.rint(127 + maps["principal_curvature"] * 5).clip(0, 255).astype(np.uint8),
                np.full((HEIGHT, WIDTH, 1), 127, np.uint8),
            ],
            axis=2,
        ),
        "reshading": np.repeat(bytes_of(maps["reshading"]), 3, axis=2),
        "segment_unsup2d": (maps["instance"] * 9).astype(np.uint8),
        "segment_unsup25d": (maps["semseg"] * 20).astype(np.uint8),
        "segment_semantic": hole(maps["semseg"] + 1, 0).astype(np.uint8),
    }


def taskonomy_path(root: Path, tree: str, domain: str, building: str, point: int, view: int) -> Path:
    name = f"point_{point}_view_{view}_domain_{domain}.png"
    if tree == "omnidata":
        return root / domain / "taskonomy" / building / name
    stored = "segmentsemantic" if domain == "segment_semantic" else domain
    return root / building / domain / name.replace(domain, stored)


def taskonomy_views(count: int) -> list[tuple[int, int]]:
    """Numbers of points and views, whose order as text is another one than as numbers."""
    return [(9 + index, index % 3) for index in range(count)]


def write_taskonomy(root: Path, tree: str = "omnidata", count: int = 3) -> None:
    rows = ["id,train,val,test"]
    seed = 0
    for split, buildings in BUILDINGS.items():
        for building in buildings:
            rows.append(",".join([building, *(str(int(split == each)) for each in BUILDINGS)]))
            for point, view in taskonomy_views(count):
                for domain, values in taskonomy_maps(seed).items():
                    save(taskonomy_path(root, tree, domain, building, point, view), values)
                seed += 1
    rows.append("nowhere,1,0,0")
    folder = root / "splits_taskonomy"
    folder.mkdir(parents=True, exist_ok=True)
    # The published lists end their lines with a bare carriage return.
    (folder / "train_val_test_tiny.csv").write_bytes("\r".join(rows).encode())


PERSON_PARTS = ("head", "neck", "luarm", "lhand", "ruleg", "rfoot")


def annotation(semseg: Array) -> Array:
    """The structure of PASCAL-Part: boxes are persons, whose rows belong to parts in turn; the floor is a car."""

    def cells(names: list[str], rows: list[tuple[Any, ...]]) -> Array:
        values = np.zeros((1, len(rows)), dtype=[(name, object) for name in names])
        for index, row in enumerate(rows):
            values[0, index] = row
        return values

    rows = np.arange(semseg.shape[0])[:, None] // 2 % 6
    person = semseg == 7
    parts = [(name, (person & (rows == number)).astype(np.uint8)) for number, name in enumerate(PERSON_PARTS)]
    no_parts = np.zeros((0, 0))
    objects = [("car", 7.0, (semseg == 0).astype(np.uint8), no_parts)]
    if person.any():
        objects.append(("person", 15.0, person.astype(np.uint8), cells(["part_name", "mask"], parts)))
    return cells(["imname", "objects"], [("picture", cells(["class", "class_ind", "mask", "parts"], objects))])


def pascal_scene(seed: int) -> dict[str, Array]:
    """Every other picture is upright."""
    return scene(seed) if seed % 2 == 0 else {name: values.swapaxes(0, 1) for name, values in scene(seed).items()}


def write_pascal_published(root: Path, train: int = 6, test: int = 4) -> None:
    for split, seeds in splits(train, test).items():
        keys = [f"2008_{seed:06d}" for seed in seeds]
        for key, seed in zip(keys, seeds, strict=True):
            maps = pascal_scene(seed)
            semseg = maps["semseg"]
            save(root / "JPEGImages" / f"{key}.jpg", bytes_of(maps["image"]))
            save(root / "semseg" / ("VOC12" if seed % 3 else "pascal-context") / f"{key}.png", semseg.astype(np.uint8))
            save(root / "normals_distill" / f"{key}.png", bytes_of((maps["normal"] + 1) / 2))
            save(root / "sal_distill" / f"{key}.png", np.where(semseg == 7, 200, 100).astype(np.uint8))
            for folder, variable, values in (
                ("pascal-context/trainval", "LabelMap", (semseg + 1).astype(np.uint16)),
                ("human_parts", "anno", annotation(semseg)),
            ):
                (root / folder).mkdir(parents=True, exist_ok=True)
                savemat(root / folder / f"{key}.mat", {variable: values})
        lists = root / "ImageSets" / "Context"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(keys) + "\n")
