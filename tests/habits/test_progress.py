"""Progress bars with every module."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from mtl_lightning.callbacks import HypervolumeCallback
from tests.habits.common import MODULES, every_module, objectives, train_loader, val_loader
from tests.modules.common import trainer

SHOWN = ("train_loss", "val_loss", "hypervolume")


@every_module
def test_tqdm_shows_our_quantities(name: str, capsys: Any, tmp_path: Path) -> None:
    callbacks = [TQDMProgressBar(), HypervolumeCallback((20.0, 20.0), **objectives(name), dirpath=tmp_path)]
    trainer(callbacks, max_epochs=2, enable_progress_bar=True).fit(MODULES[name](), train_loader(), val_loader())
    text = "".join(capsys.readouterr())
    for key in SHOWN:
        assert f"{key}=" in text


@every_module
def test_rich_shows_our_quantities(name: str, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    file = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": file, "force_terminal": True, "width": 200})
    callbacks = [bar, HypervolumeCallback((20.0, 20.0), **objectives(name), dirpath=tmp_path)]
    trainer(callbacks, max_epochs=2, enable_progress_bar=True).fit(MODULES[name](), train_loader(), val_loader())
    text = file.getvalue()
    for key in SHOWN:
        assert f"{key}: " in text
