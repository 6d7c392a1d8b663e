"""The direction of imports, and what is not loaded before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = "mtl_lightning"

# Layer: the own layers it may import, and the third parties.
_CORE = {"torch", "numpy", "scipy", "moocore", "sklearn", "torchjd"}
_LIGHTNING = {"lightning", "torchmetrics", "torch", "numpy"}
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "core": ({"core"}, _CORE),
    "metrics": ({"core", "metrics"}, {"torch", "torchmetrics"}),
    "networks": ({"core", "networks"}, {"torch", "timm"}),
    "modules": ({"core", "metrics", "modules"}, _LIGHTNING),
    "strategies": ({"core", "strategies"}, {"lightning", "torch"}),
    "callbacks": ({"core", "metrics", "callbacks"}, _LIGHTNING | {"matplotlib"}),
    "report": ({"core", "report"}, {"torch", "numpy", "yaml"}),
    "datamodules": (
        {"core", "metrics", "datamodules"},
        _LIGHTNING | {"torchvision", "sklearn", "matplotlib", "PIL", "scipy"},
    ),
    "commands": ({"core", "metrics", "networks", "modules", "callbacks", "commands", "report"}, _LIGHTNING | {"yaml"}),
    "cli": (
        {"core", "metrics", "networks", "modules", "strategies", "callbacks", "datamodules", "commands"},
        _LIGHTNING | {"jsonargparse", "yaml"},
    ),
}
PACKAGES = sorted(set(ALLOWED) - {"core", "cli"})


def _sources() -> list[tuple[str, Path]]:
    files = [("cli" if path.stem == "cli" else "core", path) for path in (ROOT / OWN).glob("*.py")]
    for name in PACKAGES:
        folder = ROOT / name if name in ("callbacks", "datamodules") else ROOT / OWN / name
        files += [(name, path) for path in folder.rglob("*.py")]
    return files


def _type_checking_only(tree: ast.Module) -> set[ast.AST]:
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return {inner for block in blocks for inner in ast.walk(block)}


def _imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    skipped = _type_checking_only(tree)
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(("layer", "path"), _sources(), ids=lambda value: getattr(value, "stem", value))
def test_imports_follow_the_layers(layer: str, path: Path) -> None:
    own, third_parties = ALLOWED[layer]
    for name in _imported(path):
        top, _, rest = name.partition(".")
        if top == OWN:
            part = rest.partition(".")[0]
            found = part if part in ALLOWED else "core"
            assert found in own, f"{layer} should not import {name}"
        else:
            assert top in third_parties or top in sys.stdlib_module_names, f"{layer} should not import {name}"


def test_every_layer_is_seen() -> None:
    assert {layer for layer, _ in _sources()} == set(ALLOWED)


def test_the_core_loads_neither_lightning_nor_torchvision() -> None:
    modules = [OWN, *(f"{OWN}.{path.stem}" for path in (ROOT / OWN).glob("[a-z]*.py") if path.stem != "cli")]
    # All in one process: if none of them is loaded by all together, none is loaded by one of them.
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert set(modules) <= loaded
    assert not loaded & {"lightning", "pytorch_lightning", "torchvision", "torchmetrics"}
