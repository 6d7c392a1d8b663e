"""The messages that the page of the errors quotes are those of the sources."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"
BLOCKS = re.findall(r"```text\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
QUOTED = [" ".join(block.split()) for block in BLOCKS]


def _text(node: ast.expr) -> str:
    """Return a string with NUL in the place of what is only known at run time."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "\0"
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "\0"


@cache
def _messages() -> tuple[str, ...]:
    """Return the strings of the sources."""
    folders = (ROOT / "mtl_lightning", ROOT / "callbacks", ROOT / "datamodules")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for folder in folders for path in folder.rglob("*.py")]
    strings = (ast.JoinedStr, ast.Constant, ast.BinOp)
    found = {_text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, strings)}
    return tuple(sorted(text for text in found if text.strip("\0")))


def _matches(quoted: str, message: str) -> bool:
    """Return whether ``message`` is what is quoted, with anything in the place of dots."""
    parts = [re.escape(part.strip()) for part in quoted.split("...")]
    return re.fullmatch(".*".join(parts), " ".join(message.replace("\0", "").split())) is not None


def test_there_are_messages() -> None:
    assert len(QUOTED) > 30
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda quoted: quoted[:60])
def test_a_quoted_message_is_in_the_sources(quoted: str) -> None:
    assert any(_matches(quoted, message) for message in _messages())


def test_a_message_that_nobody_raises_would_be_noticed() -> None:
    assert not any(_matches("A batch should be a dict. Found ...", message) for message in _messages())
