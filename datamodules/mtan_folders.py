"""The folders of arrays in which the authors of MTAN published NYUv2 and Cityscapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from mtl_lightning.datamodules.dense import Folder, numeric
from mtl_lightning.datamodules.files import Origin


def numbered_samples(root: Path, folder: str, files: Mapping[str, Folder], expected: int, origin: Origin) -> list[str]:
    """Return the keys ``"0"`` to ``"N - 1"`` of the numbered files of one split.

    The numbers of all fields are taken together, and gaps between them belong to the samples: the files in them are
    then missing. Numbers at the end that no field has are only noticed by their count, of which a warning tells.

    Args:
        root: The folder of the data set.
        folder: The folder of the split within it.
        files: The files of each field.
        expected: The number of samples of the published split.
        origin: What errors say about the set.

    Raises:
        DatasetNotFoundError: If there is no file.
    """
    numbers = [int(key) for fields in files.values() for key in fields.keys() if key.isdecimal()]  # noqa: SIM118
    if not numbers:
        found = "no such folder" if not root.is_dir() else f"no numbered files in {folder}/"
        raise origin.not_found(f"`root` should be the folder of {origin.name}. Found {found}: {root}")
    count = max(numbers) + 1
    if count != expected:
        rank_zero_warn(
            f"{root / folder} holds {count} samples where {origin.name} has {expected}: if this is no part on purpose, "
            "the archive is not unpacked as a whole."
        )
    return sorted(map(str, range(count)), key=numeric)
