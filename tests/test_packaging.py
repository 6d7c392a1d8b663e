"""The packages that are installed, what they need, and the links that stand for them in a checkout."""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

import mtl_lightning

ROOT = Path(__file__).parents[1]
OUTER = ("callbacks", "datamodules")
# What is imported under another name than it is installed under.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def _config() -> ConfigParser:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _requirements(text: str) -> dict[str, str]:
    """Return from the name of each distribution to what is asked of its version."""
    found = {}
    for line in _lines(text):
        match = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?\s*(.*)", line)
        assert match is not None, line
        found[match.group(1)] = match.group(2).replace(" ", "")
    return found


def _required() -> dict[str, str]:
    return _requirements(_config()["options"]["install_requires"])


def _extras() -> dict[str, dict[str, str]]:
    return {name: _requirements(text) for name, text in _config()["options.extras_require"].items()}


def _optional() -> set[str]:
    """Return what an extra adds to the package; the others are for those who work on it."""
    return {name for extra, names in _extras().items() if extra not in ("test", "docs") for name in names}


def _sources() -> Iterator[Path]:
    for path in (ROOT / "mtl_lightning").rglob("*.py"):
        if not path.is_relative_to(ROOT / "mtl_lightning" / "callbacks"):
            yield path
    for name in OUTER:
        yield from (ROOT / name).rglob("*.py")


# ------------------------------------------------------------------------------------------------------- packages


def _packages(folder: Path, name: str) -> set[str]:
    found = {name} if (folder / "__init__.py").exists() else set()
    for inner in folder.iterdir():
        if inner.is_dir() and not inner.is_symlink():
            found |= _packages(inner, f"{name}.{inner.name}")
    return found


def _all_packages() -> set[str]:
    found = _packages(ROOT / "mtl_lightning", "mtl_lightning")
    for name in OUTER:
        found |= _packages(ROOT / name, f"mtl_lightning.{name}")
    return found


def test_setup_cfg_names_every_package() -> None:
    assert sorted(_config()["options"]["packages"].split()) == sorted(_all_packages())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source distribution carries no links")
@pytest.mark.parametrize("name", OUTER)
def test_the_link_resolves(name: str) -> None:
    link = ROOT / "mtl_lightning" / name
    remedy = "clone with `git clone -c core.symlinks=true`"
    assert link.is_dir(), f"mtl_lightning/{name} should be a link to ../{name}: {remedy}"
    assert link.resolve() == ROOT / name


# --------------------------------------------------------------------------------------------------- dependencies


def _imported(path: Path, everywhere: bool) -> set[str]:
    """Return the distributions that a file imports, in functions too or only when it is itself imported."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    names: set[str] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
        typing_only = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if everywhere or not (typing_only or isinstance(node, ast.FunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))
    names -= {*sys.stdlib_module_names, "mtl_lightning"}
    return {DISTRIBUTIONS.get(name, name) for name in names}


def test_what_is_imported_is_required_and_the_other_way_round() -> None:
    imported = set().union(*(_imported(path, everywhere=True) for path in _sources()))
    # What lightning's command line is made of, which it imports itself.
    assert imported | {"jsonargparse"} == {*_required(), *_optional()}


def test_what_is_optional_is_imported_where_it_is_used() -> None:
    optional = _optional()
    assert optional
    for path in _sources():
        assert not _imported(path, everywhere=False) & optional, path


def test_the_extra_for_tests_holds_all_others() -> None:
    extras = _extras()
    for name in extras:
        assert extras[name].items() <= extras["test"].items(), name


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    wanted = _required() | {name: text for name, text in _extras()["test"].items() if name in _optional()}
    bounds = {name: found.group(1) for name, text in wanted.items() if (found := re.search(r">=([\w.]+)", text))}
    text = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")
    lowest = _requirements(text)
    assert set(lowest) == set(bounds)
    for name, bound in bounds.items():
        pinned = lowest[name].removeprefix("==")
        assert lowest[name].startswith("==")
        # Where a bound is a series, the first release of it that there is.
        assert (pinned + ".").startswith(bound + "."), f"{name}: {pinned} is not the lowest of {bound}"


# --------------------------------------------------------------------------------- licence, citation, changelog


def test_the_licence_is_the_apache_licence_in_full() -> None:
    text = (ROOT / "LICENSE").read_bytes()
    # That of https://www.apache.org/licenses/LICENSE-2.0.txt.
    expected = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256(text).hexdigest() == expected
    assert _config()["metadata"]["license_expression"] == "Apache-2.0"


def test_the_python_versions_begin_with_the_lower_bound() -> None:
    prefix = "Programming Language :: Python :: 3."
    classifiers = _lines(_config()["metadata"]["classifiers"])
    minors = [int(line.removeprefix(prefix)) for line in classifiers if line.startswith(prefix)]
    assert minors == list(range(10, 10 + len(minors)))
    assert _config()["options"]["python_requires"] == ">=3.10"


def test_the_citation_names_this_release_and_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    # The keys that version 1.2.0 of the format requires.
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"] == "mtl_lightning"
    assert citation["authors"]
    assert citation["version"] == mtl_lightning.__version__
    assert citation["license"] == _config()["metadata"]["license_expression"]
    papers = {reference["url"]: reference for reference in citation["references"]}
    assert set(papers) == {"https://arxiv.org/abs/2403.16162", "https://arxiv.org/abs/2502.11986"}
    for paper in papers.values():
        assert paper["type"] in {"article", "conference-paper"}
        assert paper["title"]
        assert all({"family-names", "given-names"} <= set(author) for author in paper["authors"])


def test_the_changelog_begins_with_this_release() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[([\w.]+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", text, flags=re.MULTILINE)
    assert releases[0] == mtl_lightning.__version__
    assert len(releases) == text.count("\n## ")


# ------------------------------------------------------------------------------------------- wheel and sdist


def _has_setuptools() -> bool:
    try:
        return int(version("setuptools").partition(".")[0]) >= 77
    except PackageNotFoundError:
        return False


needs_setuptools = pytest.mark.skipif(not _has_setuptools(), reason="setuptools 77 builds the wheel")


def _build(what: str, folder: Path, target: Path) -> Path:
    """Return what a hook of PEP 517 makes of ``folder``; it needs no network."""
    target.mkdir()
    code = f"from setuptools.build_meta import build_{what} as build; print(build({str(target)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "deprecated" not in result.stderr.lower(), result.stderr
    return target / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source distribution, the wheel that is built from it, and that from the checkout."""
    folder = tmp_path_factory.mktemp("build")
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results", "images")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignored)
    sdist = _build("sdist", checkout, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = _build("wheel", unpacked, folder / "wheel")
    shutil.rmtree(checkout / "mtl_lightning.egg-info")
    return sdist, wheel, _build("wheel", checkout, folder / "wheel_of_checkout")


def _members(path: Path) -> dict[str, str]:
    """Return from path to digest, of all files in a wheel but its own list of them."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("RECORD")]
        assert len(names) == len(set(names))
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


@needs_setuptools
def test_the_wheel_of_the_source_distribution_is_that_of_the_checkout(built: tuple[Path, Path, Path]) -> None:
    _, wheel, of_checkout = built
    assert _members(wheel) == _members(of_checkout)


@needs_setuptools
def test_the_wheel_holds_the_sources_and_nothing_else(built: tuple[Path, Path, Path]) -> None:
    _, wheel, _ = built
    info = f"mtl_lightning-{mtl_lightning.__version__}.dist-info"
    found = {name for name in _members(wheel) if not name.startswith(info)}
    expected = {path.relative_to(ROOT).as_posix() for path in _sources()}
    expected = {name if name.startswith("mtl_lightning/") else f"mtl_lightning/{name}" for name in expected}
    tables = {f"mtl_lightning/datamodules/tables/{path.name}" for path in (ROOT / "datamodules/tables").iterdir()}
    pages = {f"mtl_lightning/report/page.{suffix}" for suffix in ("css", "html", "js")}
    assert len(tables) >= 4
    assert found == expected | tables | pages | {"mtl_lightning/py.typed"}


@needs_setuptools
def test_the_metadata_of_the_wheel(built: tuple[Path, Path, Path]) -> None:
    _, wheel, _ = built
    info = f"mtl_lightning-{mtl_lightning.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "mtl-lightning = mtl_lightning.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    head, _, description = metadata.partition("\n\n")
    assert {"License-Expression: Apache-2.0", "Requires-Python: >=3.10"} <= set(head.splitlines())
    assert description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


@needs_setuptools
def test_the_source_distribution_has_what_a_packager_reads(built: tuple[Path, Path, Path]) -> None:
    sdist, _, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith("tests")]


@needs_setuptools
def test_the_wheel_works_in_an_environment_of_its_own(built: tuple[Path, Path, Path], tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built[1])], check=True)
    # Its dependencies are those of the tests. What makes this checkout importable there has no effect: such lines are
    # read in folders of packages, not in paths that they add.
    folder = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    (folder / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    modules = sorted(
        _all_packages() | {f"mtl_lightning.{path.stem}" for path in (ROOT / "mtl_lightning").glob("[a-z]*.py")}
    )
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({sorted(_optional())}))  # as if they were not installed
for name in {modules}:
    assert importlib.import_module(name).__file__.startswith({str(environment)!r}), name
from mtl_lightning.datamodules import MultiTargetDataModule
data = MultiTargetDataModule(name="enb")
data.setup("fit")
print(len(data.train_dataloader().dataset))
"""
    result = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 100
    script = subprocess.run(
        [environment / "bin" / "mtl-lightning", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert script.returncode == 0, script.stderr
    assert "compare" in script.stdout
