"""Reading files of data sets: arrays and pictures, no pickles, no wrap-around, and errors that name files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SHOWN = 5
_NPY = b"\x93NUMPY"
_NPY_ERRORS = (ValueError, EOFError, TokenError)  # the last of a damaged header, which is Python text
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_JPEG, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_TAIL_BYTES = 1024  # tolerates what some writers append to a picture
_MAT_HEADER_BYTES = 128


class DatasetNotFoundError(FileNotFoundError):
    """A data set that is not, or not as a whole, where it was looked for."""


class BrokenFileError(ValueError):
    """A file that cannot be read, or holds something else than its name promises."""

    @classmethod
    def of(cls, path: Path, expected: str, found: str) -> BrokenFileError:
        """Return the error of the file at ``path``."""
        return cls(
            f"{path} should hold {expected}. Found {found}. Fetch it again; where a data module has `on_broken`, "
            "'skip' leaves out files that are cut off."
        )


@dataclass(frozen=True)
class Origin:
    """Where a data set comes from and what it looks like, for errors.

    Attributes:
        name: Its name.
        address: Where to get it.
        tree: The folders and files that are expected, several lines.
        licence: Its terms.
    """

    name: str
    address: str
    tree: str
    licence: str

    def not_found(self, problem: str, missing: Collection[object] = ()) -> DatasetNotFoundError:
        """Return the error that says how to get the set.

        Args:
            problem: What was found, as a sentence without its full stop.
            missing: The files that are missing; the first few are named.

        Example:
            >>> origin = Origin("Toy", "https://example.org/toy.zip", "root/images/*.png", "CC0")
            >>> print(origin.not_found("Found no folder", ["images/1.png", "images/2.png"]))
            Found no folder. Missing: images/1.png, images/2.png (2 in all).
            Toy should lie as
                root/images/*.png
            Get it from https://example.org/toy.zip and unpack it; nothing is downloaded here. Licence: CC0.
        """
        files = f". Missing: {first_few(missing)} ({len(missing)} in all)" if missing else ""
        tree = self.tree.strip("\n").replace("\n", "\n    ")
        return DatasetNotFoundError(
            f"{problem}{files}.\n{self.name} should lie as\n    {tree}\n"
            f"Get it from {self.address} and unpack it; nothing is downloaded here. Licence: {self.licence}."
        )


def first_few(names: Collection[object]) -> str:
    """Return the first names, separated by commas, and dots if there are more.

    Example:
        >>> first_few(range(9))
        '0, 1, 2, 3, 4, ...'
    """
    shown = [str(name) for _, name in zip(range(_SHOWN), names, strict=False)]
    return ", ".join(shown + ["..."] * (len(names) > _SHOWN))


def read_lines(path: Path, origin: Origin) -> list[str]:
    """Return the lines of the list at ``path`` that are not empty, without white space around them, each once.

    Raises:
        DatasetNotFoundError: If there is no such list, or nothing in it.
        BrokenFileError: If it is no text in UTF-8.
    """
    lines = read_text(path).splitlines() if path.is_file() else []
    keys = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not keys:
        raise origin.not_found(f"`root` should hold the list {path}. Found {'none' if not lines else 'it empty'}")
    return keys


def read_text(path: Path) -> str:
    """Return the text at ``path``, in UTF-8 on any machine; the ends of lines, CR, LF or both, become LF.

    Raises:
        FileNotFoundError: If there is no such file.
        BrokenFileError: If it is no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # editors may put a mark before the first line
    except UnicodeDecodeError as error:
        raise BrokenFileError.of(path, "a text in UTF-8", str(error)) from error


def read_numpy(path: Path) -> NDArray[Any]:
    """Return the array of numbers in the ``.npy`` file at ``path``. Pickles are refused, as they may run any program.

    Raises:
        FileNotFoundError: If there is no such file.
        BrokenFileError: If the file is cut off, or holds something else.
    """
    with path.open("rb") as file:
        magic = file.read(len(_NPY))
    if magic != _NPY:
        found = "a pickle, which is never read" if magic[:1] == b"\x80" else f"bytes that begin with {magic!r}"
        raise BrokenFileError.of(path, "a NumPy array", found)
    try:
        array = np.load(path, allow_pickle=False)
    except _NPY_ERRORS as error:
        found = "pickled Python objects, which are never read" if "allow_pickle" in str(error) else str(error)
        raise BrokenFileError.of(path, "a NumPy array of numbers", found) from error
    if array.dtype.kind not in "biuf":
        raise BrokenFileError.of(path, "a NumPy array of numbers", f"dtype {array.dtype}")
    return array


def read_pixels(path: Path) -> NDArray[np.int32] | NDArray[np.float32]:
    """Return the picture at ``path``, shape ``(H, W)`` or ``(H, W, C)``, int32, or float32 if it holds floats.

    Of a palette, indices are returned. All values of 16 bits fit, with room for arithmetic: in uint16, as Pillow reads
    them, 65535 + 1 is 0.

    Raises:
        FileNotFoundError: If there is no such file.
        BrokenFileError: If the file is cut off, or no picture.
    """
    pixels = _decoded(path, in_colours=False)
    return pixels.astype(np.float32) if pixels.dtype.kind == "f" else pixels.astype(np.int32)


def read_colours(path: Path) -> NDArray[np.uint8]:
    """Return the picture at ``path`` in colours, uint8, shape ``(H, W, 3)``, also of a palette, in CMYK or in grey.

    Raises:
        FileNotFoundError: If there is no such file.
        BrokenFileError: If the file is cut off, no picture, or has more than 8 bits.
    """
    return _decoded(path, in_colours=True)


def _decoded(path: Path, *, in_colours: bool) -> NDArray[Any]:
    with path.open("rb"):  # a missing or locked file keeps its own error
        pass
    from PIL import Image

    try:
        with Image.open(path) as image:
            if in_colours and image.mode[0] in "IF":  # whole numbers of 16 or 32 bits, or floats
                raise BrokenFileError.of(path, "a picture of 8 bits", f"mode {image.mode}")
            return np.array(image.convert("RGB") if in_colours else image)
    except BrokenFileError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BrokenFileError.of(path, "a whole picture", str(error)) from error


def read_mat(path: Path, key: str) -> NDArray[Any]:
    """Return the variable ``key`` of the MATLAB file at ``path``.

    Raises:
        FileNotFoundError: If there is no such file.
        BrokenFileError: If the file is cut off, of another kind, or has no such variable.
    """
    from scipy.io import loadmat

    with path.open("rb"):
        pass
    try:
        content = loadmat(path, variable_names=[key])
    except Exception as error:  # scipy raises errors of many kinds at damaged files
        raise BrokenFileError.of(path, "a MATLAB file (up to version 7)", str(error)) from error
    if key not in content:
        raise BrokenFileError.of(path, f"a variable {key!r}", "none of that name")
    return np.asarray(content[key])


def read_array(path: Path, key: str | None = None) -> NDArray[Any]:
    """Return the array in the file at ``path``, by its ending: ``.npy``, ``.mat`` (the variable ``key``), or a picture.

    Raises:
        FileNotFoundError: If there is no such file.
        BrokenFileError: If the file is cut off, or of another kind.
    """
    if path.suffix == ".npy":
        return read_numpy(path)
    return read_pixels(path) if key is None else read_mat(path, key)


def file_problem(path: Path) -> str | None:
    """Return what is wrong with the file at ``path`` as far as its beginning, end and size tell, or None.

    Files that are missing, empty, cut off or, with ``.npy``, pickled are found without decoding the others; damage in
    the middle is not. It knows ``.npy``, ``.png``, ``.jpg`` and ``.mat``; of others, only that they are not empty.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            return "it is empty"
        with path.open("rb") as file:
            check = {".npy": _npy_problem, ".mat": _mat_problem}.get(path.suffix.lower())
            if check is not None:
                return check(file, size)
            head = file.read(len(_PNG))
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return "it is missing"
    except (OSError, *_NPY_ERRORS) as error:
        return str(error)
    # By its beginning, as decoders go: some sets have PNG files under the name of the other, and the reverse.
    if head == _PNG or head[:2] == _JPEG:
        return None if (_PNG_END if head == _PNG else _JPEG_END) in tail else "it is cut off"
    return "it is no PNG or JPEG file" if path.suffix.lower() in (".png", ".jpg", ".jpeg") else None


def _npy_problem(file: Any, size: int) -> str | None:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        return "it holds pickled Python objects"
    expected = file.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return None if size == expected else f"it should have {expected} bytes and has {size}"


def _mat_problem(file: Any, size: int) -> str | None:
    position = _MAT_HEADER_BYTES
    file.seek(position - 2)
    # The mark of the byte order reads "IM" in a file of little-endian numbers, as all current machines write them.
    order = "<" if file.read(2) == b"IM" else ">"
    while position + 8 <= size:
        file.seek(position + 4)
        position += 8 + int(np.frombuffer(file.read(4), f"{order}u4")[0])
    return None if position == size else f"it should have {position} bytes and has {size}"
