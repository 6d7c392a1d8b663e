"""What docstrings have of reStructuredText, as Markdown: for the page of the data sets and for those of the API."""

from __future__ import annotations

import re
from collections.abc import Callable

_ROLE = re.compile(r":(class|func|meth|mod|attr|data|exc):`([^`]+)`")


def as_markdown(text: str, link: Callable[[str, str], str] | None = None) -> str:
    """Return a docstring with its simple tables, literal blocks and roles in Markdown; the rest stays as it is.

    Args:
        text: The docstring, without the indentation of its place.
        link: From the target and the text of a role to what takes its place; code by default.

    Example:
        >>> as_markdown("See :class:`~torch.nn.Module`, with a tree::")
        'See `Module`, with a tree:'
    """
    text = "\n\n".join(_block(block) for block in text.split("\n\n"))

    def replaced(match: re.Match[str]) -> str:
        target = match.group(2)
        shown = target.removeprefix("~").rpartition(".")[2] if target.startswith("~") else target
        return f"`{shown}`" if link is None else link(target.removeprefix("~"), shown)

    return _ROLE.sub(replaced, text)


def _block(block: str) -> str:
    """Return a paragraph: tables as Markdown, trees as they are, indented."""
    lines = block.splitlines()
    if not lines or all(line.startswith("    ") for line in lines):
        return block
    if lines[0].startswith("==="):
        return "\n".join(_table(lines))
    return re.sub(r"(^|\n) *::$", r"\1", re.sub(r"(?<=\S)::$", ":", block)).replace("``", "`")


def _table(lines: list[str]) -> list[str]:
    """Return a simple table of reStructuredText as Markdown."""
    starts = [match.start() for match in re.finditer(r"=+", lines[0])]
    cuts = [slice(start, end) for start, end in zip(starts, [*starts[1:], None], strict=True)]
    rows = [[line[cut].strip().replace("``", "`") for cut in cuts] for line in lines if not line.startswith("===")]
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [body[0], "|---" * len(cuts) + "|", *body[1:]]
