"""What MkDocs does beyond its configuration: pages of the API, which are made of the sources, and their navigation."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mtl_lightning"
# Written by benchmarks, or not in every checkout: in the navigation where they are.
OPTIONAL = ("results.md", "baselines.md", "habits.md", "distributed.md", "faults.md")

# For the docstring extension, which is imported by name.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def api_pages() -> dict[str, str]:
    """Return the pages of the API, from path to Markdown: one for each package, and one for each file of the core."""
    pages = {}
    for path in sorted(PACKAGE.glob("*/__init__.py")):
        name = f"mtl_lightning.{path.parent.name}"
        members = exported(path)
        if not members:  # a package that nobody imports from, such as that of the commands
            continue
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        parts = [f"# {name}", text.replace("``", "`"), *(f"::: {name}.{member}" for member in members)]
        pages[f"api/{path.parent.name}.md"] = "\n\n".join(parts) + "\n"
    for path in sorted(PACKAGE.glob("[a-z]*.py")):
        name = f"mtl_lightning.{path.stem}"
        # The docstring of the module is the introduction; its own heading would repeat the title.
        options = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false"
        pages[f"api/{path.stem}.md"] = f"# {name}\n\n::: {name}\n{options}\n"
    return pages


def exported(path: Path) -> list[str]:
    """Return the names that an ``__init__.py`` imports for its users, sorted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return sorted(
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (node.module or "").startswith("mtl_lightning.")
    )


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the API to the navigation, and take out the pages that are not written."""
    packages = [{page[4:-3]: page} for page in api_pages() if (PACKAGE / page[4:-3]).is_dir()]
    core = [{page[4:-3]: page} for page in api_pages() if not (PACKAGE / page[4:-3]).is_dir()]
    assert config.nav is not None
    config.nav = [*_written(config.nav, Path(config.docs_dir)), {"API": [*packages, {"core": core}]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the API."""
    for path, text in api_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def _written(nav: list[Any], folder: Path) -> list[Any]:
    """Return the navigation without the optional pages that are not there."""
    kept: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            entry = {k: _written(v, folder) if isinstance(v, list) else v for k, v in entry.items()}
        if isinstance(entry, str) and entry in OPTIONAL and not (folder / entry).exists():
            continue
        kept.append(entry)
    return kept
