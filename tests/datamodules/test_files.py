from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mtl_lightning.datamodules.files import (
    BrokenFileError,
    DatasetNotFoundError,
    Origin,
    file_problem,
    first_few,
    read_array,
    read_colours,
    read_lines,
    read_mat,
    read_numpy,
    read_pixels,
)

ORIGIN = Origin("Toy", "https://example.org/toy.zip", "root/a.txt\nroot/b/*.png", "CC0")
ENDINGS = (".npy", ".png", ".jpg", ".mat")


def _write(path: Path, values: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".mat":
        savemat(path, {"other": values + 1, "map": values}, do_compression=True)
    else:
        Image.fromarray(values).save(path)
    return path


def _noise(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (20, 30), dtype=np.uint8)


def _cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def test_the_error_of_a_missing_set_says_how_to_get_it() -> None:
    error = ORIGIN.not_found("Found half of it", [Path(f"b/{index}.png") for index in range(12)])
    assert isinstance(error, DatasetNotFoundError)
    assert isinstance(error, FileNotFoundError)
    text = str(error)
    for part in ("Found half of it. Missing: b/0.png,", "b/4.png, ... (12 in all)", ORIGIN.address, "b/*.png", "CC0"):
        assert part in text


def test_first_few_names_are_followed_by_dots_if_there_are_more() -> None:
    assert first_few(["a", "b"]) == "a, b"
    assert first_few("abcdef") == "a, b, c, d, e, ..."


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_are_read_with_any_ends_of_lines(tmp_path: Path, end: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(end.join(["one", " two ", "", "one", "three"]).encode())
    assert read_lines(path, ORIGIN) == ["one", "two", "three"]


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_a_list_that_is_missing_or_empty_is_an_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DatasetNotFoundError, match=r"`root` should hold the list .*list\.txt"):
        read_lines(path, ORIGIN)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.uint8, np.bool_])
def test_arrays_of_numbers_are_read(tmp_path: Path, dtype: type[Any]) -> None:
    values = (_noise() > 100).astype(dtype)
    read = read_numpy(_write(tmp_path / "a.npy", values))
    assert read.dtype == dtype
    assert (read == values).all()


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.npy", np.array([{"a": 1}, None], dtype=object))
    with pytest.raises(BrokenFileError, match=r"a\.npy should hold a NumPy array of numbers\. Found pickled Python"):
        read_numpy(path)


class _Trap:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_without_being_run(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(pickle.dumps(_Trap(tmp_path / "run")))
    with pytest.raises(BrokenFileError, match="Found a pickle, which is never read"):
        read_numpy(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("values", [np.array(["a"]), np.zeros(2, [("a", np.int32)])])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path: Path, values: Any) -> None:
    with pytest.raises(BrokenFileError, match=r"should hold a NumPy array of numbers\. Found dtype"):
        read_numpy(_write(tmp_path / "a.npy", values))


def test_sixteen_bits_do_not_wrap_around(tmp_path: Path) -> None:
    values = np.array([[0, 1, 32768, 65535]], np.uint16)
    pixels = read_pixels(_write(tmp_path / "a.png", values))
    assert (pixels + 1).tolist() == [[1, 2, 32769, 65536]]


@pytest.mark.parametrize(
    ("mode", "shape"), [("L", (20, 30)), ("RGB", (20, 30, 3)), ("RGBA", (20, 30, 4)), ("1", (20, 30))]
)
def test_pictures_of_bytes_are_read_as_they_are(tmp_path: Path, mode: str, shape: tuple[int, ...]) -> None:
    picture = Image.fromarray(_noise()).convert(mode)
    picture.save(tmp_path / "a.png")
    pixels = read_pixels(tmp_path / "a.png")
    assert pixels.shape == shape
    assert pixels.dtype == np.int32
    assert (pixels == np.asarray(picture)).all()


def test_of_a_palette_the_indices_are_read(tmp_path: Path) -> None:
    picture = Image.fromarray(_noise() % 21).convert("P")
    picture.putpalette([(7 * index) % 256 for index in range(768)])
    picture.save(tmp_path / "a.png")
    assert (read_pixels(tmp_path / "a.png") == np.asarray(picture)).all()
    assert read_pixels(tmp_path / "a.png").max() == 20


def test_ids_of_32_bits_are_read_from_tiff(tmp_path: Path) -> None:
    values = np.array([[2_400_301, -1]], np.int32)
    assert (read_pixels(_write(tmp_path / "a.tif", values)) == values).all()


def test_a_variable_is_read_from_matlab(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.mat", _noise())
    assert (read_array(path, "map") == _noise()).all()
    with pytest.raises(BrokenFileError, match=r"a\.mat should hold a variable 'depth'\. Found none of that name"):
        read_mat(path, "depth")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.97])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, ending: str, share: float) -> None:
    path = _cut(_write(tmp_path / f"picture{ending}", _noise()), share)
    with pytest.raises(BrokenFileError, match=rf"picture\{ending} should hold"):
        read_array(path, "map" if ending == ".mat" else None)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_missing_file_keeps_its_error(tmp_path: Path, ending: str) -> None:
    with pytest.raises(FileNotFoundError, match="picture"):
        read_array(tmp_path / f"picture{ending}", "map" if ending == ".mat" else None)


@pytest.mark.parametrize("ending", [*ENDINGS, ".tif"])
def test_nothing_is_wrong_with_a_whole_file(tmp_path: Path, ending: str) -> None:
    assert file_problem(_write(tmp_path / f"a{ending}", _noise())) is None


def test_nothing_is_wrong_with_a_matlab_file_that_is_not_compressed(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"map": _noise(), "name": "x"})
    assert file_problem(tmp_path / "a.mat") is None


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.97])
def test_a_file_that_is_cut_off_is_found_without_decoding(tmp_path: Path, ending: str, share: float) -> None:
    assert file_problem(_cut(_write(tmp_path / f"a{ending}", _noise()), share)) is not None


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_missing_file_is_found(tmp_path: Path, ending: str) -> None:
    assert file_problem(tmp_path / f"a{ending}") == "it is missing"


def test_pickled_objects_are_found_without_reading_them(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object))
    assert file_problem(path) == "it holds pickled Python objects"


def test_a_damaged_header_of_an_array_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.npy", _noise())
    path.write_bytes(path.read_bytes().replace(b"}", b"(", 1))
    with pytest.raises(BrokenFileError, match=r"a\.npy should hold a NumPy array"):
        read_numpy(path)
    assert file_problem(path) is not None


@pytest.mark.parametrize("ending", [".JPG", ".JPEG", ".PNG"])
def test_a_file_that_is_cut_off_is_found_under_a_name_in_capitals(tmp_path: Path, ending: str) -> None:
    assert file_problem(_cut(_write(tmp_path / f"a{ending}", _noise()), 0.5)) is not None


def test_a_whole_picture_is_judged_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.png", _noise()).rename(tmp_path / "a.jpg")
    assert file_problem(path) is None
    assert file_problem(_cut(path, 0.9)) is not None


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_pictures_of_any_mode_are_read_in_colours(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(np.stack([_noise(0), _noise(1), _noise(2)], axis=2)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path)
    assert (read_colours(path) == np.asarray(picture.convert("RGB"))).all()


def test_colours_of_sixteen_bits_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.png", _noise().astype(np.uint16) * 257)
    with pytest.raises(BrokenFileError, match=r"a\.png should hold a picture of 8 bits"):
        read_colours(path)


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("one\ntwo\n", encoding="utf-8-sig")
    assert read_lines(tmp_path / "list.txt", ORIGIN) == ["one", "two"]


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BrokenFileError, match=r"list\.txt should hold a text in UTF-8"):
        read_lines(tmp_path / "list.txt", ORIGIN)
