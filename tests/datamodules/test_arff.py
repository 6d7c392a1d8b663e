from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_lightning.datamodules.arff import Table, read_arff

REAL = Path(__file__).parents[3] / "shared" / "data" / "mulan-mtr"
HEAD = "@relation t\n@attribute a numeric\n@attribute b {X, Y}\n@data\n"


def _read(tmp_path: Path, text: str) -> Table:
    path = tmp_path / "table.arff"
    path.write_text(text, newline="")
    return read_arff(path)


@pytest.mark.parametrize("kind", ["numeric", "real", "integer", "NUMERIC", "numeric "])
def test_numeric_columns_are_read(tmp_path: Path, kind: str) -> None:
    table = _read(tmp_path, f"@relation t\n@attribute a {kind}\n@data\n-1.5e3\n 7 \n")
    assert table.attributes == (("a", None),)
    assert table.rows.tolist() == [[-1500.0], [7.0]]


@pytest.mark.parametrize(
    ("written", "name"),
    [("a", "a"), ("'a b'", "a b"), ('"a, {b}"', "a, {b}"), (r"'it\'s'", "it's"), ("a=1", "a=1"), ("'%'", "%")],
)
def test_names_may_be_quoted(tmp_path: Path, written: str, name: str) -> None:
    assert _read(tmp_path, f"@relation 'x y'\n@attribute {written} real\n@data\n1\n").attributes[0].name == name


@pytest.mark.parametrize(
    ("values", "row", "place"),
    [
        ("{A,B}", "B", 1),
        ("{ A , B }", " B ", 1),
        ("{'a b',\"c, d\"}", "'c, d'", 1),
        ("{10,9}", "9", 1),
        ("{A}", "A", 0),
    ],
)
def test_nominal_values_are_their_places(tmp_path: Path, values: str, row: str, place: int) -> None:
    table = _read(tmp_path, f"@relation t\n@attribute n {values}\n@attribute m numeric\n@data\n{row},1\n")
    assert table.rows.tolist() == [[place, 1.0]]


def test_missing_values_are_nan(tmp_path: Path) -> None:
    rows = _read(tmp_path, HEAD + "?, X\n1, ?\n").rows
    assert np.isnan(rows).tolist() == [[True, False], [False, True]]


def test_comments_empty_lines_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    text = "% 'quoted\n\n" + HEAD + "% between\n1,X\n\n2, Y\n"
    expected = _read(tmp_path, HEAD + "1,X\n2,Y\n")
    for variant in (text, text.replace("\n", "\r\n"), "\ufeff" + text, text.upper().replace("@DATA", "@Data")):
        assert np.array_equal(_read(tmp_path, variant).rows, expected.rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "1\n", r"line 5, should hold 2 values, one per attribute\. Found 1"),
        (HEAD + "1,X,2\n", r"line 5, should hold 2 values, one per attribute\. Found 3"),
        (HEAD + "1,Z\n", r"line 5, 'b' should be one of X, Y or \?\. Found 'Z'"),
        (HEAD + "one,X\n", r"line 5, 'a' should be a number or \?\. Found 'one'"),
        (HEAD + "nan,X\n", r"line 5, 'a' should be a number or \?\. Found 'nan'"),
        (HEAD + "inf,X\n", r"line 5, 'a' should be a number or \?\. Found 'inf'"),
        (HEAD + "{0 1, 1 X}\n", r"line 5, should be a list of values"),
        (HEAD + "1,'X\n", r"line 5, should be a list of values"),
        (HEAD + "1,'X' Y\n", r"line 5, should have a comma after \"'X'\"\. Found 'Y'"),
        (HEAD, r"Found 2 attributes and 0 rows\. It may be truncated"),
        ("", r"Found 0 attributes and 0 rows"),
        ("@relation t\n@attribute a string\n@data\nx\n", r"the type of 'a' should be numeric.*Found 'string'"),
        ("@relation t\n@attribute a {A,A}\n@data\nA\n", r"the values of 'a' should differ"),
        ("@relation t\n@attribute a\n@data\n1\n", r"line 2, should be '@attribute name type'"),
        ("@relation t\n@attribute a real\n@attribute a real\n@data\n1,2\n", r"different names\. Found a repeated"),
        ("a,b\n1,2\n", r"line 1, should begin with @relation, @attribute or @data\. Found 'a,b'"),
    ],
)
def test_another_form_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, text)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.arff"
    path.write_bytes(b"\x80\x81")
    with pytest.raises(ValueError, match=r"table\.arff should be a text in UTF-8"):
        read_arff(path)


@pytest.mark.skipif(not REAL.exists(), reason="the Mulan files are not beside the repository")
@pytest.mark.parametrize(
    ("name", "shape", "missing", "nominal"),
    [
        ("andro", (49, 36), 0, 0),
        ("edm", (154, 18), 0, 0),
        ("enb", (768, 10), 0, 0),
        ("jura", (359, 18), 0, 0),
        ("rf1", (9125, 72), 3264, 0),
        ("sf1", (323, 13), 0, 10),
        ("sf2", (1066, 13), 0, 10),
        ("slump", (103, 10), 0, 0),
    ],
)
def test_real_files_are_read(name: str, shape: tuple[int, int], missing: int, nominal: int) -> None:
    table = read_arff(REAL / f"{name}.arff")
    assert table.rows.shape == shape
    assert np.isnan(table.rows).sum() == missing
    assert sum(attribute.values is not None for attribute in table.attributes) == nominal
