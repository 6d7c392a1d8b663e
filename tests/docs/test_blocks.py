"""Every block of code in the documentation is run, in the order of its page and in a folder of its own."""

from __future__ import annotations

import doctest
import logging
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from mtl_lightning.cli import main

pytest.importorskip("sybil", reason="the blocks of the documentation are run by sybil, of the extra `test`")

from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What a run of a page is cut down to: the entries of the configuration that say how long it takes.
SHORT = (
    "--trainer.limit_train_batches=4",
    "--trainer.limit_val_batches=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
)
# How a page names what its reader has.
PLACEHOLDERS = {"FILE": "configs/compare_multi_digits.yaml", "RUN_DIR": "runs/mt2o_multi_digits"}
LANGUAGES = {"python", "bash", "yaml", "text"}


def _command(words: Sequence[str]) -> list[str]:
    """Return the arguments of a command of this package for a short run; those of a cluster are only read."""
    arguments = [PLACEHOLDERS.get(word, word) for word in words[words.index("mtl-lightning") + 1 :]]
    if arguments[0] in ("compare", "single-tasks"):
        return [*arguments, "--list"]
    if arguments[0] != "fit" or "--print_config" in arguments:
        return arguments
    if words[0] != "mtl-lightning" or any(word.startswith("--trainer.strategy") for word in words):
        return [*arguments, "--print_config"]
    return [*arguments, *SHORT, f"--trainer.max_epochs={2 if '--ckpt_path' in arguments else 1}"]


def _status(arguments: Sequence[str]) -> object:
    """Run the command line in this process; return its status, or its message if there is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mtl-lightning", *arguments])
        try:
            main()
        except SystemExit as stop:
            return stop.code
    return 0


def _run_shell(example: Example) -> None:
    """Check the syntax of a block, and run what it has of commands of this package."""
    if bash := shutil.which("bash"):
        subprocess.run([bash, "-n"], input=example.parsed, text=True, check=True)
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for script in (word for word in words if word.endswith(".py")):
            assert (ROOT / script).exists(), f"{line}: there is no {script}"
        if "mtl-lightning" not in words or "&&" in words:
            continue
        assert not _status(_command(words)), line


def _read_yaml(example: Example) -> None:
    assert yaml.safe_load(example.parsed)


def _document(path: Path) -> Document:
    # Examples for GPUs make the same trainers on a machine without.
    text = path.read_text(encoding="utf-8").replace('accelerator="gpu"', 'accelerator="cpu"')
    document = Document(text, str(path))
    for parser in (
        PythonCodeBlockParser(doctest_optionflags=doctest.NORMALIZE_WHITESPACE),
        CodeBlockParser("bash", _run_shell),
        CodeBlockParser("yaml", _read_yaml),
    ):
        for region in parser(document):
            document.add(region)
    return document


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Undo what a page does to the handlers of logs and the filters of warnings."""
    loggers = [logging.getLogger(), logging.getLogger("mtl_lightning")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = list(_document(page).examples())
    if not examples:
        pytest.skip("a page without code")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for example in examples:
        example.evaluate()


def test_the_commands_of_the_readme_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"mtl-lightning (?:fit|compare) --config \S+", text)
    assert commands
    for command in commands:
        action = "--print_config" if " fit " in command else "--list"
        assert not _status([*shlex.split(command)[1:], action]), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_has_a_language_that_is_run(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES, "a block without a language, or with another, would not be checked"
    assert not any(fences[1::2]), "a block is not closed"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:benchmarks|configs|docs|examples|tests)/[\w./-]+\.(?:py|json|yaml|png|md)\b", text):
        assert (ROOT / path).exists(), path
