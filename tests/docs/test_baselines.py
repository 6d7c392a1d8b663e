"""Every line of the table of baselines makes a module that trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lightning.datamodules import MultiDigitsDataModule
from tests.modules.common import trainer

PAGE = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text(encoding="utf-8")
METHODS = dict(re.findall(r"^\| ([^|*]+) \| `([^`]+)` \|", PAGE, re.MULTILINE))


@pytest.fixture
def names() -> dict[str, Any]:
    pytest.importorskip("torchjd")
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(block.split("\nmodule = ")[0], found)
    return found


def test_there_are_methods() -> None:
    assert len(METHODS) > 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains(method: str, names: dict[str, Any]) -> None:
    module = eval(METHODS[method], names)
    before = {name: value.clone() for name, value in module.named_parameters()}
    run = trainer(limit_train_batches=2, limit_val_batches=1)
    run.fit(module, datamodule=MultiDigitsDataModule(num_train=64, num_val=32, num_test=32, batch_size=32))
    assert any(not torch.equal(value, before[name]) for name, value in module.named_parameters())
    assert torch.tensor([float(value) for value in run.callback_metrics.values()]).isfinite().all()
