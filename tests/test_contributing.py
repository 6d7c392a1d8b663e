"""The contributing guide: its example is carried out, and what it names is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def _block(place: str) -> str:
    """Return the lines of Python below the comment that begins with ``place``."""
    found = re.search(rf"<!-- {re.escape(place)}[^>]*-->\n```python\n(.*?)```\n", GUIDE, flags=re.DOTALL)
    assert found is not None
    return found.group(1)


def _additions() -> list[tuple[str, str, str]]:
    """Return base class, names to override and file of each kind of addition."""
    rows = re.findall(r"^\| [^|]+ \| `([\w.]+)` \| ([^|]+) \| `([\w./<>]+)` \|", GUIDE, flags=re.MULTILINE)
    assert len(rows) == 10
    return rows


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the transfer rule has been added as the guide says."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.cfg", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / "mtl_lightning").mkdir()
    for path in (ROOT / "mtl_lightning").glob("*.py"):
        shutil.copy(path, folder / "mtl_lightning")
    (folder / "tests").mkdir()
    for name in ("conftest.py", "test_transfer.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    source, test = folder / "mtl_lightning/transfer.py", folder / "tests/test_transfer.py"
    before, marker, after = source.read_text().partition("def check_matrix")
    source.write_text(f"{before}{_block('mtl_lightning/transfer.py')}\n\n{marker}{after}")
    test.write_text(f"{test.read_text()}\n\n{_block('tests/test_transfer.py')}")
    return folder


def _python(folder: Path, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_transfer_rule_passes_the_tests_of_all_rules(checkout: Path) -> None:
    tests, examples = "tests/test_transfer.py", "mtl_lightning/transfer.py"
    output = _python(checkout, "pytest", "-p", "no:cacheprovider", "-v", tests, examples, "-k", "Consensus")
    passed = re.findall(r"::(\S+) PASSED", output)
    assert "test_rows_sum_to_one[ConsensusTransfer]" in passed
    assert "test_state_round_trip[ConsensusTransfer]" in passed
    assert "test_consensus_keeps_the_mean_and_shrinks_the_spread" in passed
    assert "mtl_lightning.transfer.ConsensusTransfer" in passed


@pytest.mark.parametrize("command", [("format", "--check"), ("check",)], ids=" ".join)
def test_the_transfer_rule_is_clean(checkout: Path, command: tuple[str, ...]) -> None:
    _python(checkout, "ruff", *command, "--no-cache", "mtl_lightning/transfer.py", "tests/test_transfer.py")


@pytest.mark.parametrize(("base", "overridden", "file"), _additions(), ids=lambda value: value)
def test_the_bases_of_additions_have_what_is_overridden(base: str, overridden: str, file: str) -> None:
    module, _, name = base.rpartition(".")
    parent = getattr(import_module(module), name)
    for method in re.findall(r"`(\w+)`", overridden):
        assert callable(getattr(parent, method))
    path = ROOT / file
    assert path.parent.is_dir() if "<name>" in file else path.is_file()


def test_the_files_that_it_names_are_there() -> None:
    folders = r"mtl_lightning|tests|docs|configs|callbacks|datamodules|\.ci"
    paths = set(re.findall(rf"(?<![\w./])(?:{folders})/[\w./]+", GUIDE))
    paths -= {"mtl_lightning/x.py", "tests/test_x.py", "callbacks/y.py", "tests/callbacks/test_y.py"}
    assert {".ci/run", ".ci/lowest", "tests/test_imports.py", "configs/mt2o_multi_digits.yaml"} <= paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
