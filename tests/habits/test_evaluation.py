"""Validating, testing and predicting, also from a checkpoint, with every module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.habits.common import FRONTS, MODULES, every_module, train_loader, val_loader
from tests.modules.common import Pairs, trainer


@every_module
def test_a_checkpoint_is_validated_tested_and_predicted_like_the_module_that_wrote_it(
    name: str, tmp_path: Path
) -> None:
    module = MODULES[name]()
    run = trainer(max_epochs=2)
    run.fit(module, train_loader(), val_loader())
    validated = run.validate(module, val_loader(), verbose=False)
    tested = run.test(module, val_loader(), verbose=False)
    predicted: Any = run.predict(module, val_loader())
    path = tmp_path / "trained.ckpt"
    run.save_checkpoint(path)

    other, fresh = MODULES[name](), trainer()
    assert fresh.validate(other, val_loader(), ckpt_path=path, verbose=False) == validated
    assert fresh.test(MODULES[name](), val_loader(), ckpt_path=path, verbose=False) == tested
    again: Any = fresh.predict(MODULES[name](), val_loader(), ckpt_path=path)
    for batch, expected in zip(again, predicted, strict=True):
        for task in ("a", "b"):
            assert torch.equal(batch[task], expected[task])
    if name in FRONTS:
        module_values: Any = other.objective_values
        assert module_values.mean() == pytest.approx(validated[0]["val_loss"], rel=1e-6)


@every_module
def test_the_checkpoint_of_the_fit_is_found_by_its_name(name: str, tmp_path: Path) -> None:
    run = trainer(max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    module = MODULES[name]()
    run.fit(module, train_loader(), val_loader())
    expected = run.validate(module, val_loader(), verbose=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert run.validate(module, val_loader(), ckpt_path="best", verbose=False) == expected


@every_module
def test_predictions_need_no_labels_and_are_those_of_the_models(name: str) -> None:
    module = MODULES[name]()
    inputs = Pairs(20, seed=2).inputs
    loader: DataLoader[Any] = DataLoader(inputs, batch_size=8)  # type: ignore[arg-type]
    predictions: Any = trainer().predict(module, loader)
    with torch.no_grad():
        expected = module.eval()(inputs)
    dimension = 1 if name in FRONTS else 0
    for task in ("a", "b"):
        found = torch.cat([batch[task] for batch in predictions], dim=dimension)
        assert torch.allclose(found, expected[task], atol=1e-6)
        assert found.shape == ((3, 20, 1) if name in FRONTS else (20, 1))
