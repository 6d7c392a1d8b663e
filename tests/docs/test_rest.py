from __future__ import annotations

from docs.rest import as_markdown


def test_a_simple_table_becomes_one_of_markdown() -> None:
    table = "====== ====\nname   unit\n====== ====\n``x``  m\n====== ===="
    assert as_markdown(table) == "| name | unit |\n|---|---|\n| `x` | m |"


def test_a_literal_block_keeps_its_text_and_loses_its_mark() -> None:
    assert as_markdown("A tree::\n\n    a/``b``\n") == "A tree:\n\n    a/``b``\n"
    assert as_markdown("In each batch\n\n::\n\n    for x\n") == "In each batch\n\n\n\n    for x\n"


def test_roles_become_code_or_what_is_asked_for() -> None:
    text = ":meth:`solve` of :class:`~package.module.Solver`"
    assert as_markdown(text) == "`solve` of `Solver`"
    shown = as_markdown(text, lambda target, name: f"[{name}]({target})")
    assert shown == "[solve](solve) of [Solver](package.module.Solver)"


def test_prose_stays_as_it_is() -> None:
    text = "Return `x`, for ``a < b``.\n\n    indented, ``as it is``"
    assert as_markdown(text) == "Return `x`, for `a < b`.\n\n    indented, ``as it is``"
