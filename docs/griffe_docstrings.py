"""Docstrings for the pages of the API: their reStructuredText as Markdown, their roles as links."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object

from docs.rest import as_markdown


class MarkdownDocstrings(Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of ``obj``, if it has one."""
        if obj.docstring is None:
            return

        def link(target: str, shown: str) -> str:
            code = f"<code>{shown}</code>"
            path = target if target.startswith("mtl_lightning.") else _resolved(obj, target)
            # Optional, since a page shows what is public; that every target exists is tested in tests/docs.
            return f'<autoref optional identifier="{path}">{code}</autoref>' if path else code

        # The parser of docstrings knows one example by the name of many; `Example` would be a paragraph to it.
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = as_markdown(text, link)


def _resolved(obj: Object, name: str) -> str | None:
    """Return the full path of a name as ``obj`` sees it, or None for one of another package."""
    for scope in (obj, obj.parent):
        if scope is not None and name in scope.members:
            return f"{scope.path}.{name}"
    try:
        path = obj.resolve(name)
    except NameResolutionError:
        return None
    return path if path.startswith("mtl_lightning.") else None
