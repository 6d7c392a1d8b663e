"""The files of a run, read strictly: what is not as it should be is named in one line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def header(path: Path) -> list[str]:
    """Return the names of the columns of a CSV file; none of an empty one or of one that cannot be read as text."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error):
        return []


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV file.

    Args:
        path: The file.
        columns: Those that it should have; there may be more.

    Raises:
        ValueError: If one is missing, or a row is shorter or longer than the header.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} should be a table in UTF-8. Found: {error}.") from error
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(f"{str(path)!r} should have the columns {list(columns)}. Found {names}.")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(
                f"{str(path)!r} should have {len(names)} entries in each row. Found another in row {number}."
            )
    return rows


def number(path: Path, row: Mapping[str, str], column: str) -> float:
    """Return an entry of a row as a number, NaN if it is empty.

    Raises:
        ValueError: If it is none.
    """
    text = row[column]
    try:
        return float(text) if text else math.nan
    except ValueError:
        raise ValueError(f"{str(path)!r} should hold numbers in column {column!r}. Found {text!r}.") from None


def integer(path: Path, row: Mapping[str, str], column: str) -> int:
    """Return an entry of a row as an integer.

    Raises:
        ValueError: If it is none.
    """
    value = number(path, row, column)
    if not value.is_integer():
        raise ValueError(f"{str(path)!r} should hold integers in column {column!r}. Found {row[column]!r}.")
    return int(value)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, None if there is no such file.

    Raises:
        ValueError: If it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} should be a JSON file. Found: {error}.") from error
