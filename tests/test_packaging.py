"""The packages that are installed, and the links that stand for them in a checkout."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTER = ("callbacks", "datamodules")


def _packages(folder: Path, name: str) -> set[str]:
    found = {name} if (folder / "__init__.py").exists() else set()
    for inner in folder.iterdir():
        if inner.is_dir() and not inner.is_symlink():
            found |= _packages(inner, f"{name}.{inner.name}")
    return found


def test_setup_cfg_names_every_package() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = config["options"]["packages"].split()
    found = _packages(ROOT / "mtl_lightning", "mtl_lightning")
    for name in OUTER:
        found |= _packages(ROOT / name, f"mtl_lightning.{name}")
    assert sorted(named) == sorted(found)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source distribution carries no links")
@pytest.mark.parametrize("name", OUTER)
def test_the_link_resolves(name: str) -> None:
    link = ROOT / "mtl_lightning" / name
    remedy = "clone with `git clone -c core.symlinks=true`"
    assert link.is_dir(), f"mtl_lightning/{name} should be a link to ../{name}: {remedy}"
    assert link.resolve() == ROOT / name
