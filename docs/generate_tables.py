"""Fill the tables of the documentation from the committed numbers of the benchmarks.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; it is what ``benchmarks/NAME.py`` prints for
``benchmarks/results/NAME.json``.

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
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with its tables made anew."""
    return _TABLE.sub(lambda match: f"{match[1]}{_table(match[2])}\n{match[3]}", text)


def _table(name: str) -> str:
    content = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    benchmarks = str(ROOT / "benchmarks")
    if benchmarks not in sys.path:
        sys.path.insert(0, benchmarks)
    result: str = importlib.import_module(name).table(content["runs"])
    return f"\n{result}\n"


def main() -> None:
    """Rewrite the pages whose tables have changed."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            part = path.with_suffix(".part")
            part.write_text(new, encoding="utf-8")
            os.replace(part, path)
            sys.stdout.write(f"{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
