"""Downloads whose content is checked, and archives that are unpacked whole or not at all."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.request import urlopen

from lightning.pytorch.utilities import rank_zero_info

_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte


def file_digest(path: str | Path, algorithm: str = "md5") -> str:
    """Return the checksum of a file in hexadecimal digits.

    Args:
        path: The file.
        algorithm: The name of a function in ``hashlib``.
    """
    # Published sums are mostly MD5, which finds damage, not malice; hashlib may refuse it for the latter.
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_digest(path: str | Path, expected: str, algorithm: str = "md5") -> None:
    """Raise a ``ValueError`` unless the file at ``path`` has the checksum ``expected``."""
    found = file_digest(path, algorithm)
    if found != expected:
        raise ValueError(
            f"{path} should have the {algorithm} sum {expected}. Found {found}. It is damaged or another version; "
            "delete it and fetch it again."
        )


def download_file(url: str, path: str | Path, *, digest: str, licence: str, algorithm: str = "md5") -> Path:
    """Fetch ``url`` into the file ``path``, and return it. A file that is there is checked and kept.

    The address and the licence are printed first. The file appears under its name once it is whole and its checksum is
    right; otherwise what was fetched is deleted.

    Args:
        url: The address.
        path: The file to write; its folder is made.
        digest: The checksum, in hexadecimal digits.
        licence: The terms of the data, to be printed.
        algorithm: The kind of checksum, the name of a function in ``hashlib``.

    Raises:
        ValueError: If the checksum is wrong, of what was fetched or of the file that is there.
        OSError: If the address cannot be read.
        PermissionError: If the folder cannot be written to.
    """
    path = Path(path)
    if path.exists():
        check_digest(path, digest, algorithm)
        return path
    rank_zero_info(f"Downloading {url} to {path}. Licence: {licence}")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(nearest, os.W_OK):
        raise PermissionError(
            f"{path.parent} should be a folder that can be written to. Found {nearest} read-only. Pass another `root`, "
            f"or put what {url} holds there by hand."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        with urlopen(url, timeout=_TIMEOUT) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
        found = file_digest(part, algorithm)
        if found != digest:
            raise ValueError(
                f"{url} should have the {algorithm} sum {digest}. Found {found}, of {part.stat().st_size} bytes, and "
                "deleted them. Try again, or fetch it by hand."
            )
        os.replace(part, path)
    return path


def extract_archive(archive: str | Path, folder: str | Path) -> list[Path]:
    """Unpack a .zip or .tar file, also compressed, into ``folder``; return its top-level entries there.

    All is written to a temporary folder first and then moved, one rename per top-level entry. Only plain files and
    folders are unpacked; modes, owners and times are not.

    Args:
        archive: The file.
        folder: Where its entries come; it is made.

    Raises:
        ValueError: If the archive is damaged or of another kind, or holds a link, a device, or a path that leads out of
            the folder.
        FileExistsError: If an entry is already in ``folder``.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{archive.name}-", dir=folder) as temporary:
        with _damage_named(archive):
            for parts, source in _members(archive):
                target = Path(temporary).joinpath(*parts)
                if source is None:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, _CHUNK)
        entries = sorted(Path(temporary).iterdir())
        there = [entry.name for entry in entries if (folder / entry.name).exists()]
        if there:
            raise FileExistsError(
                f"{folder} should not yet hold {', '.join(there)}, which {archive.name} is unpacked to. Move it away."
            )
        for entry in entries:
            os.replace(entry, folder / entry.name)
    return [folder / entry.name for entry in entries]


def _members(archive: Path) -> Iterator[tuple[tuple[str, ...], IO[bytes] | None]]:
    """Yield the path of each member, checked, and its content; None for a folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # zero if it was written on Windows
                is_plain = kind in (0, stat.S_IFREG, stat.S_IFDIR)
                parts = _checked_parts(archive, info.filename, is_plain)
                yield parts, None if info.is_dir() else zipped.open(info)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = _checked_parts(archive, member.name, member.isreg() or member.isdir())
            yield parts, None if member.isdir() else tar.extractfile(member)
        # Reading to the end checks the sum of what was compressed, too.
        tar.fileobj.seek(tar.offset)
        rest = tar.fileobj.read(tarfile.BLOCKSIZE)
        while tar.fileobj.read(_CHUNK):
            pass
        # `tarfile` takes any block that it does not understand for the end, and a missing one as well.
        if rest != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends without its end mark")


def _checked_parts(archive: Path, name: str, is_plain: bool) -> tuple[str, ...]:
    # A backslash or a colon may lead elsewhere on Windows, and is in no archive of ours.
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not is_plain:
        raise ValueError(
            f"{archive} should hold only plain files and folders that stay inside it. Found {name!r}. "
            "Nothing was unpacked; fetch it from its original address."
        )
    return path.parts


@contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; decompressors raise it without
            raise
        raise ValueError(
            f"{archive} should be a whole .zip or .tar archive. Found: {error}. Delete it and fetch it again."
        ) from error
