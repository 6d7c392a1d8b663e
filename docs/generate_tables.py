"""Fill the tables of the README and the documentation from the committed numbers of the benchmarks.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; it is what ``benchmarks/NAME.py`` prints for
``benchmarks/results/NAME.json``, its function ``table``. For ``<!-- table: NAME.FUNCTION -->`` it is another one.

    python docs/generate_tables.py
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_TABLE = re.compile(r"(<!-- table: (\w+)(?:\.(\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """Return the files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """Return a page with its tables made anew."""
    return _TABLE.sub(lambda match: f"{match[1]}{_table(match[2], match[3] or 'table')}\n{match[4]}", text)


def _table(name: str, function: str) -> str:
    content = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    benchmarks = str(ROOT / "benchmarks")
    if benchmarks not in sys.path:
        sys.path.insert(0, benchmarks)
    result: str = getattr(importlib.import_module(name), function)(content["runs"])
    return f"\n{result}\n"


def main() -> None:
    """Rewrite the pages whose tables have changed."""
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            part = path.with_suffix(".part")
            part.write_text(new, encoding="utf-8")
            os.replace(part, path)
            sys.stdout.write(f"{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
