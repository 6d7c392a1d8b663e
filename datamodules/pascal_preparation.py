"""PASCAL-Context as it is published, in MATLAB files and distilled pictures, brought once into plain pictures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from mtl_lightning.datamodules.files import BrokenFileError, Origin, read_lines, read_mat, read_pixels

_ORIGIN = Origin(
    name="PASCAL-Context (published)",
    address="https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz",
    tree="root/JPEGImages/{key}.jpg\n"
    "root/pascal-context/trainval/{key}.mat\n"
    "root/semseg/VOC12/{key}.png or root/semseg/pascal-context/{key}.png\n"
    "root/human_parts/{key}.mat\n"
    "root/normals_distill/{key}.png\n"
    "root/sal_distill/{key}.png\n"
    "root/ImageSets/Context/{train,val}.txt",
    licence="terms of PASCAL VOC and Flickr",
)
_NONE = 255
_PERSON = 15
_PARTS = {
    1: ("head", "leye", "reye", "lear", "rear", "lebrow", "rebrow", "nose", "mouth", "hair"),
    2: ("torso", "neck"),
    3: ("luarm", "ruarm"),
    4: ("llarm", "rlarm", "lhand", "rhand"),
    5: ("luleg", "ruleg"),
    6: ("llleg", "rlleg", "lfoot", "rfoot"),
}
_CLASS_OF_PART = {name: number for number, names in _PARTS.items() for name in names}


def prepare_pascal_context(root: str | Path, out: str | Path, *, normal_labels: Collection[int] | None = None) -> None:
    """Write what ``PASCALContextDataModule`` reads to ``out``, from the published files in ``root``.

    Images are copied. Edges are the boundaries of ``LabelMap``, where its Laplacian is not zero, thinned by the
    algorithm of Zhang and Suen; benchmarks thin by another one, which differs in single pixels. Parts are grouped into
    six classes, and a picture without any has no label. Distilled saliency over one half is 1. Distilled maps of
    another size than their image take its nearest pixels.

    The lists of keys are written last: a run that was interrupted leaves no half file and no list, and may be repeated.

    Args:
        root: The unpacked archive.
        out: The folder to write, about as large as the archive.
        normal_labels: The numbers in ``LabelMap`` at whose pixels distilled normals are kept. The benchmarks keep those
            of classes that also occur in NYUv2, in a list whose licence forbids to repeat it here (``nyu_classes`` of
            their repositories). None keeps all.

    Raises:
        DatasetNotFoundError: If a list or file is missing in ``root``.
        BrokenFileError: If a file is cut off, or holds something else.

    References:
        - Zhang, Suen: A Fast Parallel Algorithm for Thinning Digital Patterns. 1984.
        - Maninis, Radosavovic, Kokkinos: Attentive Single-Tasking of Multiple Tasks. 2019. arXiv:1904.08918.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    lists = {name: read_lines(root / "ImageSets" / "Context" / f"{name}.txt", _ORIGIN) for name in ("train", "val")}
    keys = list(dict.fromkeys(lists["train"] + lists["val"]))
    missing = [path.relative_to(root) for key in keys for path in _sources(root, key).values() if not path.is_file()]
    if missing:
        raise _ORIGIN.not_found("`root` should hold all files of the lists", missing)
    for name in ("images", "segmentation", "human_parts", "saliency", "normal", "edge"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for number, key in enumerate(keys):
        _prepare_one(_sources(root, key), out, key, normal_labels)
        if (number + 1) % 500 == 0:
            rank_zero_info(f"Prepared {number + 1} of {len(keys)} pictures in {out}")
    for name, chosen in lists.items():
        text = "\n".join(chosen) + "\n"
        _write(out / f"{name}.txt", lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]


def thinned(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the lines of ``mask``, shape ``(H, W)``, one pixel wide (Zhang and Suen, 1984).

    Example:
        >>> thinned(np.ones((3, 7), bool)).astype(int)
        array([[0, 0, 0, 0, 0, 0, 0],
               [0, 1, 1, 1, 1, 0, 0],
               [0, 0, 0, 0, 0, 0, 0]])
    """
    mask = mask.copy()
    while True:
        before = int(mask.sum())
        for step in (0, 1):
            around = _neighbours(mask)
            count = sum(neighbour.astype(int) for neighbour in around)
            # How often a walk around the pixel enters the mask.
            entries = sum(
                (~here & there).astype(int) for here, there in zip(around, [*around[1:], around[0]], strict=True)
            )
            north, east, south, west = around[::2]
            if step == 0:
                open_side = ~(north & east & south) & ~(east & south & west)
            else:
                open_side = ~(north & east & west) & ~(north & south & west)
            mask &= ~((count >= 2) & (count <= 6) & (entries == 1) & open_side)
        if int(mask.sum()) == before:
            return mask


def boundaries(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where the Laplacian of ``labels``, shape ``(H, W)``, is not zero, thinned."""
    padded = np.pad(labels.astype(np.int64), 1, mode="edge")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * padded[1:-1, 1:-1]
    return thinned(laplacian != 0)


def _neighbours(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Return the eight neighbours of each pixel, clockwise from the north; beyond the border there is none."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    clockwise = ((0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0))
    return [padded[down : down + height, right : right + width] for down, right in clockwise]


def _sources(root: Path, key: str) -> dict[str, Path]:
    voc = root / "semseg" / "VOC12" / f"{key}.png"
    return {
        "image": root / "JPEGImages" / f"{key}.jpg",
        "labels": root / "pascal-context" / "trainval" / f"{key}.mat",
        "segmentation": voc if voc.is_file() else root / "semseg" / "pascal-context" / f"{key}.png",
        "parts": root / "human_parts" / f"{key}.mat",
        "normal": root / "normals_distill" / f"{key}.png",
        "saliency": root / "sal_distill" / f"{key}.png",
    }


def _prepare_one(sources: dict[str, Path], out: Path, key: str, normal_labels: Collection[int] | None) -> None:
    height, width = read_pixels(sources["image"]).shape[:2]
    labels = read_mat(sources["labels"], "LabelMap")
    segmentation = read_pixels(sources["segmentation"])
    for name, found in (("labels", labels), ("segmentation", segmentation)):
        if found.shape != (height, width):
            raise BrokenFileError.of(
                sources[name], f"a map of {height} x {width} pixels, for its image", f"shape {found.shape}"
            )
    normal = _resized(_checked(sources["normal"], read_pixels(sources["normal"]), 3), height, width)
    if normal_labels is not None:
        normal = np.where(np.isin(labels, list(normal_labels))[:, :, None], normal, 0)
    saliency = _resized(_checked(sources["saliency"], read_pixels(sources["saliency"]), 1), height, width)
    _write(out / "images" / f"{key}.jpg", lambda path: shutil.copyfile(sources["image"], path))
    pictures = {
        "segmentation": segmentation,
        "human_parts": _parts(sources["parts"], height, width),
        "saliency": np.where(saliency[:, :, 0] > 127.5, 255, 0),
        "normal": normal,
        "edge": np.where(boundaries(labels), 255, 0),
    }
    for name, values in pictures.items():
        _write_picture(out / name / f"{key}.png", values)


def _parts(path: Path, height: int, width: int) -> NDArray[Any]:
    classes = np.zeros((height, width), np.uint8)
    annotation = read_mat(path, "anno")
    try:
        for thing in annotation[0, 0][1].flatten():
            if int(thing[1].flat[0]) != _PERSON:
                continue
            for part in thing[3].flatten():
                number = _CLASS_OF_PART.get(str(part[0].flat[0]))
                if number is not None:
                    classes[part[1].astype(bool)] = number
    except (IndexError, TypeError, ValueError, AttributeError) as error:
        raise BrokenFileError.of(path, f"parts of a picture of {height} x {width} pixels", str(error)) from error
    return classes if classes.any() else np.full_like(classes, _NONE)


def _checked(path: Path, picture: NDArray[Any], channels: int) -> NDArray[Any]:
    picture = picture[:, :, None] if picture.ndim == 2 else picture
    if picture.shape[2] != channels or picture.dtype.kind == "f":
        raise BrokenFileError.of(path, f"a picture of {channels} channels of 8 bits", f"shape {picture.shape}")
    return picture


def _resized(picture: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip((height, width), picture.shape[:2], strict=True)
    )
    return picture[rows][:, columns]


def _write_picture(path: Path, values: NDArray[Any]) -> None:
    from PIL import Image

    picture = Image.fromarray(values.astype(np.uint8))
    _write(path, lambda temporary: picture.save(temporary, format="PNG"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
