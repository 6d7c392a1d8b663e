"""Rendered scenes in one file per split, which many processes map into memory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mtl_lightning.datamodules.loading import derive_seed
from mtl_lightning.datamodules.scene_rendering import render

_log = logging.getLogger(__name__)

#: To be raised whenever the same arguments give other bytes: a change of the renderer or of the layout of files.
FORMAT_VERSION = 1

_HEADER_BYTES = 4096
_CHANNELS = {
    "image": 3,
    "depth_zbuffer": 1,
    "depth_euclidean": 1,
    "normal": 3,
    "reshading": 1,
    "reshading_left": 1,
    "edge_occlusion": 1,
    "edge_texture": 1,
    "keypoints2d": 1,
    "keypoints3d": 1,
    "principal_curvature": 2,
    "albedo": 3,
}
# How floats are stored: the type, and the number that 1 becomes if they are rounded to multiples of a fraction. Float16
# takes as many bytes, but would be off by 0.02 degrees in a normal. Depth is not here: it is float32, because float16
# would be off by 2 mm, and normals that are computed from it by degrees.
_STORED: dict[str, tuple[type[np.generic], int | None]] = {
    "image": (np.uint8, 255),  # exact: the renderer rounds to it
    "edge_occlusion": (np.uint8, 1),  # exact
    "albedo": (np.uint8, 255),
    "normal": (np.int16, 32767),
    "reshading": (np.uint16, 65535),
    "reshading_left": (np.uint16, 65535),
    "edge_texture": (np.uint16, 65535),
    "keypoints2d": (np.uint16, 65535),
    "keypoints3d": (np.uint16, 65535),
    "principal_curvature": (np.float16, None),
}
_CLASSES = ("semseg", "instance")


def read_map(record: np.void, name: str) -> Tensor:
    """Return the map ``name`` of a ``record``: float32, shape ``(C, size, size)``, or int64, shape ``(size, size)``."""
    stored = record[name]
    if name in _CLASSES:
        return torch.from_numpy(stored.astype(np.int64))
    divisor = _STORED.get(name, (np.float32, None))[1]
    values = stored.astype(np.float32)
    return torch.from_numpy(values if divisor is None else values / np.float32(divisor))


@dataclass(frozen=True)
class SceneSet:
    """The scenes of one split, rendered when they are asked for.

    An item is a record of all maps of a scene, which ``read_map`` reads. It holds about 37 bytes a pixel. Colours are
    rounded to multiples of 1/255, components of normals to 1/32767, other maps in ``[0, 1]`` to 1/65535, curvature to
    float16; depth, classes and occlusion edges are exact.

    Attributes:
        split: The split; scenes of different splits or seeds have nothing in common.
        count: The number of scenes.
        size: The height and width of the pictures.
        seed: The seed of the scenes.
        texture: As in ``render``.
        shading: As in ``render``.
    """

    split: str
    count: int
    size: int
    seed: int
    texture: float
    shading: float

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The type of a record."""
        side = (self.size, self.size)
        classes = [(name, np.uint8, side) for name in _CLASSES]
        floats = [
            (name, _STORED.get(name, (np.float32, None))[0], (channels, *side)) for name, channels in _CHANNELS.items()
        ]
        return np.dtype([*classes, *floats])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.void:
        scene = render(
            derive_seed("scene", self.seed, self.split, index), self.size, texture=self.texture, shading=self.shading
        )
        records = np.zeros(1, self.dtype)
        for name, values in scene.items():
            factor = _STORED.get(name, (np.float32, None))[1]
            records[name] = values if factor is None else np.rint(values.astype(np.float64) * factor)
        return records[0]


class SceneFile:
    """The scenes of a ``SceneSet`` in a file, which is opened when the first is read, in each process anew.

    The name of the file depends on all that decides its content. It begins with a header of 4,096 bytes, JSON and
    padding, with the arguments of the set, the layout of a record and the digest of the records, which follow. It is
    written under another name and then renamed, so that it is there as a whole or not at all, whoever else writes it.

    Args:
        folder: The folder of the file.
        scenes: What the file holds.

    Attributes:
        path: The path of the file.
    """

    def __init__(self, folder: Path, scenes: SceneSet) -> None:
        self.scenes = scenes
        self._expected = {
            "format": f"mtl_lightning scenes {FORMAT_VERSION}",
            **asdict(scenes),
            "record": repr(scenes.dtype.descr),
        }
        digest = hashlib.blake2b(json.dumps(self._expected, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.path = folder / f"scenes-{scenes.split}-{digest}.bin"
        self._records: np.memmap[Any, np.dtype[np.void]] | None = None

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> np.void:
        if self._records is None:
            self._records = np.memmap(self.path, self.scenes.dtype, "r", _HEADER_BYTES, (len(self.scenes),))
        return self._records[index]

    def __getstate__(self) -> dict[str, Any]:
        # A memory map is pickled as the whole array; a worker maps the file itself.
        return {**self.__dict__, "_records": None}

    def problem(self, *, read_all: bool) -> str | None:
        """Return what is wrong with the file, or None. Without ``read_all`` the records' digest is not recomputed.

        Raises:
            FileNotFoundError: If there is no file.
        """
        with self.path.open("rb") as file:
            try:
                header = json.loads(file.read(_HEADER_BYTES))
            except ValueError:
                return "its header is not readable"
            if not isinstance(header, dict) or {**self._expected, "digest": header.get("digest")} != header:
                return "its header names other content"
            size = _HEADER_BYTES + len(self) * self.scenes.dtype.itemsize
            if (found := os.fstat(file.fileno()).st_size) != size:
                return f"it should have {size} bytes and has {found}"
            if read_all:
                digest = hashlib.blake2b(digest_size=16)
                while block := file.read(1 << 22):
                    digest.update(block)
                if digest.hexdigest() != header["digest"]:
                    return "its digest is not that of its records"
        return None

    def check(self) -> None:
        """Raise a ``FileNotFoundError`` if there is no file of the right size and header."""
        problem = self.problem(read_all=False) if self.path.exists() else "there is no such file"
        if problem is not None:
            raise FileNotFoundError(
                f"`prepare_data` should be called before `setup`, to write {self.path}. Found a problem: {problem}."
            )

    def ensure(self) -> None:
        """Render the scenes into the file, unless it is there and every byte is right.

        Raises:
            OSError: If the file cannot be read or written.
        """
        try:
            self._ensure()
        except OSError as error:
            mebibytes = (_HEADER_BYTES + len(self) * self.scenes.dtype.itemsize) / 2**20
            raise OSError(
                f"The folder of the scenes, {str(self.path.parent)!r}, should be writable and have {mebibytes:.0f} MiB "
                f"free; choose another `cache_dir`, or None. Found: {error}."
            ) from error

    def _ensure(self) -> None:
        try:
            problem = self.problem(read_all=True)
            if problem is None:
                return
            _log.warning("The scenes in %s are rendered again: %s.", self.path, problem)
        except FileNotFoundError:
            pass
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.stem}-{uuid.uuid4().hex}.part")
        try:
            with temporary.open("xb") as file:
                self._write(file)
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._records = None

    def _write(self, file: BinaryIO) -> None:
        count, step = len(self), max(1, len(self) // 10)
        _log.info("Rendering %d %s scenes into %s", count, self.scenes.split, self.path)
        digest = hashlib.blake2b(digest_size=16)
        file.write(b" " * _HEADER_BYTES)
        for index in range(count):
            record = self.scenes[index].tobytes()
            digest.update(record)
            file.write(record)
            if (index + 1) % step == 0:
                _log.info("Rendered %d of %d %s scenes", index + 1, count, self.scenes.split)
        header = json.dumps({**self._expected, "digest": digest.hexdigest()}).encode()
        assert len(header) <= _HEADER_BYTES
        file.seek(0)
        file.write(header)
