"""Writers of small data sets, without dense labels, in the layouts of the real ones."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

OFFICE_DOMAINS = {
    "office-31": ("amazon", "dslr", "webcam"),
    "office-home": ("Art", "Clipart", "Product", "Real_World"),
}


def write_arff(path: Path, header: Mapping[str, str], rows: Sequence[Sequence[object]]) -> Path:
    """Write a table as Mulan has it: ``header`` maps names to types; spaces after commas, as in the solar flares."""
    lines = ["% a small table", "@relation 'small-weka.filters'", ""]
    lines += [f"@attribute '{name}' {kind} " for name, kind in header.items()]
    lines += ["", "@data", *(", ".join(map(str, row)) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_sarcos(root: Path, train: npt.NDArray[Any], test: npt.NDArray[Any], form: str = "mat") -> Path:
    """Write the two tables of 28 columns as MATLAB files, ``.npy`` or ``.csv``."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for stem, table in (("sarcos_inv", train), ("sarcos_inv_test", test)):
        if form == "mat":
            savemat(root / f"{stem}.mat", {stem: table})
        elif form == "npy":
            np.save(root / f"{stem}.npy", table)
        else:
            np.savetxt(root / f"{stem}.csv", table, delimiter=",", fmt="%.17g")
    return root


class _Python2Pickler(pickle._Pickler):
    """Pickles byte strings and texts as the strings of Python 2, in which CIFAR was written."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def _save_string(self, value: bytes | str) -> None:
        content = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch[bytes] = _save_string
    dispatch[str] = _save_string


def python2_pickle(value: object) -> bytes:
    """Return the pickle, protocol 2, of numbers, strings, lists, dicts and arrays, as Python 2 would write it."""
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar100_content(num_per_class: int, seed: int) -> dict[str, Any]:
    """Return what a file of CIFAR-100 holds: fine class ``f`` of coarse ``f % 20``, with ``f`` as the first byte."""
    generator = np.random.default_rng(seed)
    fine = generator.permutation(np.repeat(np.arange(100), num_per_class))
    data = generator.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
    data[:, 0] = fine
    return {
        "filenames": [f"picture_{index}.png" for index in range(len(fine))],
        "batch_label": "a batch",
        "fine_labels": fine.tolist(),
        "coarse_labels": (fine % 20).tolist(),
        "data": data,
    }


def write_cifar100(root: Path, num_train: int = 4, num_test: int = 1) -> Path:
    """Write the files ``cifar-100-python/{train,test}`` with so many pictures of each fine class."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate((("train", num_train), ("test", num_test))):
        (folder / name).write_bytes(python2_pickle(cifar100_content(count, seed)))
    return root


def write_picture(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_celeba(root: Path, attributes: npt.NDArray[Any], partition: Sequence[int], form: str = "torchvision") -> Path:
    """Write pictures of 22 x 18 pixels, grey ``10 * number``, with ``attributes`` of -1 and 1, shape ``(N, 40)``.

    ``form`` is ``"torchvision"``, or the research form with ``"jpg"`` or ``"png"`` pictures.
    """
    from mtl_lightning.datamodules.celeba import CELEBA_ATTRIBUTES

    names = [f"{number:06d}.jpg" for number in range(1, len(attributes) + 1)]
    table = [str(len(names)), " ".join(CELEBA_ATTRIBUTES) + " "]
    table += [
        f"{name}  " + "  ".join(f"{value:2d}" for value in row) for name, row in zip(names, attributes, strict=True)
    ]
    splits = [f"{name} {part}" for name, part in zip(names, partition, strict=True)]
    if form == "torchvision":
        folders = (root / "celeba",) * 3
        suffix, images = ".jpg", root / "celeba/img_align_celeba"
    else:
        folders = (root / "Anno", root / "Eval", root / "Img")
        suffix = f".{form}"
        images = root / "Img" / ("img_align_celeba" if form == "jpg" else "img_align_celeba_png")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    (folders[0] / "list_attr_celeba.txt").write_text("\n".join(table) + "\n")
    (folders[1] / "list_eval_partition.txt").write_text("\n".join(splits) + "\n")
    for number, name in enumerate(names, start=1):
        picture = np.full((22, 18, 3), 10 * number, dtype=np.uint8)
        write_picture(images / Path(name).with_suffix(suffix), picture)
    return root


def write_office(
    root: Path, variant: str, num_classes: int, num_per_class: int, real_world: str = "Real_World"
) -> dict[str, list[str]]:
    """Write pictures of 20 x 24 pixels whose first channel is ``3 * class``; return their paths by domain."""
    paths: dict[str, list[str]] = {}
    for domain in OFFICE_DOMAINS[variant]:
        folder = real_world if domain == "Real_World" else domain
        inner = "images/" if variant == "office-31" else ""
        stem = "frame_{:04d}" if variant == "office-31" else "{:05d}"
        paths[domain] = [
            f"{folder}/{inner}class_{kind:02d}/{stem.format(number)}.jpg"
            for kind in range(num_classes)
            for number in range(1, num_per_class + 1)
        ]
        for path in paths[domain]:
            kind = int(path.split("class_")[1][:2])
            pixels = np.zeros((20, 24, 3), dtype=np.uint8)
            pixels[..., 0] = 3 * kind
            write_picture(root / variant / path, pixels)
    return paths


def write_office_lists(folder: Path, paths: Mapping[str, Sequence[str]]) -> Path:
    """Write lists as LibMTL has them, ``path label`` without a line end in the last; every fifth is val, or test."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain, names in paths.items():
        for part, split in (((0, 1, 2), "train"), ((3,), "val"), ((4,), "test")):
            lines = [
                f"{name} {int(name.split('class_')[1][:2])}" for index, name in enumerate(names) if index % 5 in part
            ]
            (folder / f"{domain}_{split}.txt").write_text("\n".join(lines))
    return folder
