"""The tables of the documentation are those of the committed numbers."""

from pathlib import Path

import pytest

from docs.generate_tables import filled, pages

PAGES = [path for path in pages() if "<!-- table: " in path.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text, "run `python docs/generate_tables.py`"


def test_some_pages_have_tables() -> None:
    assert PAGES
