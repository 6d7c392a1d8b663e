"""The ARFF file format of tables, as Weka and Mulan write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# One value: quoted, with backslash escapes, or bare.
_VALUE = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,'"{}%][^,'"{}%]*"""
_ITEM = re.compile(rf"\s*({_VALUE})\s*")
_ATTRIBUTE = re.compile(
    r"""@attribute\s+('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s'"{},%]+)\s+(\S.*)""", re.IGNORECASE | re.DOTALL
)
_NUMERIC = ("numeric", "real", "integer")


class Attribute(NamedTuple):
    """A column: its ``name`` and, if it is nominal, its ``values``; None if it is numeric."""

    name: str
    values: tuple[str, ...] | None


class Table(NamedTuple):
    """The ``attributes`` of a table and its ``rows``, float64, shape ``(N, len(attributes))``.

    A nominal value is its place among the attribute's values. Missing values are NaN.
    """

    attributes: tuple[Attribute, ...]
    rows: npt.NDArray[np.float64]


def read_arff(path: str | Path) -> Table:
    """Return the table in an ARFF file.

    It reads attributes of type ``numeric``, ``real`` and ``integer`` and nominal ones, ``{A, B}``; ``?`` is a missing
    value. Names and values may be quoted. Keywords may be in any case, and lines that begin with ``%`` are comments.

    Args:
        path: The file, in UTF-8.

    Raises:
        ValueError: If a line is not of this form, such as a sparse row or an attribute of type ``string``, ``date`` or
            ``relational``, if a row does not have one value per attribute, or if the file has no rows.

    References:
        - Witten, Frank, Hall, Pal: Data Mining: Practical Machine Learning Tools and Techniques. 2016. Section 2.4.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} should be a text in UTF-8. Found: {error}.") from error
    attributes: list[Attribute] = []
    rows: list[list[float]] = []
    in_data = False
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        where = f"{path}, line {number}"
        if not line or line.startswith("%"):
            continue
        if in_data:
            rows.append(_row(line, attributes, where))
        elif line.lower() == "@data":
            in_data = True
        elif line.lower().startswith("@attribute"):
            attributes.append(_attribute(line, where))
        elif not line.lower().startswith("@relation"):
            raise ValueError(f"{where}, should begin with @relation, @attribute or @data. Found {line[:60]!r}.")
    names = [attribute.name for attribute in attributes]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path} should have attributes of different names. Found {', '.join(repeated)} repeated.")
    if not attributes or not rows:
        raise ValueError(
            f"{path} should hold attributes and, after @data, rows. Found {len(attributes)} attributes and "
            f"{len(rows)} rows. It may be truncated; fetch it again."
        )
    return Table(tuple(attributes), np.array(rows, dtype=np.float64))


def _attribute(line: str, where: str) -> Attribute:
    match = _ATTRIBUTE.fullmatch(line)
    if match is None:
        raise ValueError(f"{where}, should be '@attribute name type'. Found {line[:60]!r}.")
    name, kind = _unquoted(match[1]), match[2].strip()
    if kind.lower() in _NUMERIC:
        return Attribute(name, None)
    if not (kind.startswith("{") and kind.endswith("}")):
        raise ValueError(
            f"{where}, the type of {name!r} should be {', '.join(_NUMERIC)} or nominal, {{A, B}}. Found {kind[:60]!r}."
        )
    values = tuple(_unquoted(item) for item in _items(kind[1:-1], where))
    if len(set(values)) < len(values):
        raise ValueError(f"{where}, the values of {name!r} should differ. Found {kind[:60]}.")
    return Attribute(name, values)


def _row(line: str, attributes: Sequence[Attribute], where: str) -> list[float]:
    # Most files have no quotes, and splitting is many times faster than matching.
    quoted = any(mark in line for mark in "'\"{}%")
    items = _items(line, where) if quoted else [item.strip() for item in line.split(",")]
    if len(items) != len(attributes):
        raise ValueError(f"{where}, should hold {len(attributes)} values, one per attribute. Found {len(items)}.")
    return [_number(item, attribute, where) for item, attribute in zip(items, attributes, strict=True)]


def _number(item: str, attribute: Attribute, where: str) -> float:
    if item == "?":
        return float("nan")
    if attribute.values is not None:
        value = _unquoted(item)
        if value not in attribute.values:
            raise ValueError(
                f"{where}, {attribute.name!r} should be one of {', '.join(attribute.values)} or ?. Found {value!r}."
            )
        return float(attribute.values.index(value))
    try:
        number = float(item)
    except ValueError:
        number = float("nan")
    if not isfinite(number):  # Python also reads "nan" and "inf", which are no numbers of the format
        raise ValueError(f"{where}, {attribute.name!r} should be a number or ?. Found {item!r}.")
    return number


def _items(text: str, where: str) -> list[str]:
    """Return the values of a list that are separated by commas; they keep their quotes."""
    items, position = [], 0
    while True:
        match = _ITEM.match(text, position)
        if match is None:
            raise ValueError(f"{where}, should be a list of values, separated by commas. Found {text[:60]!r}.")
        items.append(match[1].strip())
        position = match.end()
        if position == len(text):
            return items
        if text[position] != ",":
            raise ValueError(f"{where}, should have a comma after {match[1]!r}. Found {text[position:][:60]!r}.")
        position += 1


def _unquoted(item: str) -> str:
    return re.sub(r"\\(.)", r"\1", item[1:-1]) if item[:1] in ("'", '"') else item
