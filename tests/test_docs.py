from __future__ import annotations

from docs.generate_datasets import PATH, page


def test_the_page_of_the_data_sets_is_that_of_their_docstrings() -> None:
    assert PATH.read_text(encoding="utf-8") == page(), "run `python docs/generate_datasets.py`"
