"""The site is built without a warning, asks nothing of another host, and all its links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="the site is built by mkdocs, of the extra `docs`",
)


class _Page(HTMLParser):
    """The links of a page, what it loads by itself, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors.update(found[name] for name in ("id", "name") if name in found)
        if "href" in found:
            (self.loaded if tag == "link" else self.links).append(found["href"])
        if "src" in found:
            self.loaded.append(found["src"])


_page = cache(_Page)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@needs_mkdocs
def test_every_link_leads_somewhere(site: Path) -> None:
    dead = []
    for path in sorted(site.rglob("*.html")):
        page = _page(path)
        if path.name == "404.html":  # shown at any address, so that its links are absolute
            continue
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target.suffix == ".html" and anchor not in _page(target).anchors):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead


@needs_mkdocs
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not [link for link in _page(path).loaded if urlsplit(link).netloc], path
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//", path.read_text(encoding="utf-8")), path


@needs_mkdocs
def test_the_reference_has_every_public_name(site: Path) -> None:
    for path in sorted((ROOT / "mtl_lightning").glob("*/__init__.py")):
        text = path.read_text(encoding="utf-8")
        names = re.findall(r"^from mtl_lightning\.\S+ import (\w+)", text, re.MULTILINE)
        if not names:
            continue
        anchors = _page(site / "api" / f"{path.parent.name}.html").anchors
        missing = [name for name in names if f"mtl_lightning.{path.parent.name}.{name}" not in anchors]
        assert not missing, path
    for path in sorted((ROOT / "mtl_lightning").glob("[a-z]*.py")):
        anchors = _page(site / "api" / f"{path.stem}.html").anchors
        names = re.findall(r"^(?:class|def) ([A-Za-z]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not [name for name in names if f"mtl_lightning.{path.stem}.{name}" not in anchors], path


@needs_mkdocs
def test_docstrings_are_not_shown_as_restructured_text(site: Path) -> None:
    for path in sorted((site / "api").glob("*.html")):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r":(?:class|func|meth|mod|attr):", text), path
        assert "====" not in text, path


def test_references_in_docstrings_name_what_exists() -> None:
    for folder in ("mtl_lightning", "callbacks", "datamodules"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for name in re.findall(r":(?:class|func|meth|mod|attr|data|exc):`~?(mtl_lightning\.[\w.]+)`", text):
                assert pkgutil.resolve_name(name) is not None, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_addresses_are_well_formed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((https?:[^)\s]*)\)|<(https?:[^>\s]*)>", text):
        parts = urlsplit("".join(link))
        assert parts.scheme == "https", link
        assert re.fullmatch(r"[\w.-]+\.[a-z]+", parts.netloc), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_sources_lead_to_files(page: Path) -> None:
    """Pages are read in the repository, too, where those of the API are not."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        path = urlsplit(link).path
        if urlsplit(link).scheme or not path or "api/" in path:
            continue
        assert (page.parent / path).exists(), link
