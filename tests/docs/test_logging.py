"""Loggers are named after their modules, and the page on logging lists them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _loggers() -> dict[str, str]:
    """Return the argument of each ``logging.getLogger`` of the sources, by module."""
    found = {}
    for path in sorted((ROOT / "mtl_lightning").rglob("*.py")):
        for name in re.findall(r"logging\.getLogger\((.*?)\)", path.read_text(encoding="utf-8")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = name
    for folder in ("callbacks", "datamodules"):  # links, which are not followed above
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in re.findall(r"logging\.getLogger\((.*?)\)", path.read_text(encoding="utf-8")):
                found[f"mtl_lightning.{folder}.{path.stem}"] = name
    return found


def test_loggers_have_the_names_of_their_modules() -> None:
    assert _loggers()
    assert set(_loggers().values()) == {"__name__"}


def test_the_page_lists_them_all() -> None:
    page = (ROOT / "docs" / "logging.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(mtl_lightning\.[\w.]+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(_loggers())
