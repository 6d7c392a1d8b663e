"""What every module has trained leaves it as a plain module, and this library with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.habits.common import FRONTS, MODULES, every_module, train_loader
from tests.modules.common import Pairs, network, trainer


def trained(name: str) -> nn.Module:
    """Train, and return the model of a user's choice, ready for use."""
    module: Any = MODULES[name]()
    trainer(max_steps=3).fit(module, train_loader())
    model: nn.Module = module.select((0.25, 0.75)) if name in FRONTS else module.network
    return model.eval()


@every_module
def test_the_state_of_what_is_chosen_fits_the_network_of_the_user(name: str) -> None:
    model, inputs = trained(name), Pairs(10).inputs
    other = network(seed=1).eval()
    other.load_state_dict(model.state_dict())
    for task, predictions in model(inputs).items():
        assert torch.equal(predictions, other(inputs)[task])


@every_module
def test_what_is_chosen_can_be_exported(name: str, tmp_path: Path) -> None:
    model, inputs = trained(name), Pairs(10).inputs
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model, (inputs[:2],), dynamic_shapes=batch), tmp_path / "model.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, inputs[:2], strict=False).save(tmp_path / "model.pt")  # type: ignore[no-untyped-call]
        traced = torch.jit.load(tmp_path / "model.pt")  # type: ignore[no-untyped-call]
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for task, predictions in model(inputs).items():
        assert torch.allclose(loaded(inputs)[task], predictions, atol=1e-6)
        assert torch.allclose(traced(inputs)[task], predictions, atol=1e-6)


@every_module
def test_what_is_chosen_can_be_written_as_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = trained(name), Pairs(10).inputs
    names = list(model(inputs))
    torch.onnx.export(
        model,
        (inputs[:2],),
        tmp_path / "model.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        input_names=["inputs"],
        output_names=names,
        verbose=False,
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for task, found in zip(names, session.run(names, {"inputs": inputs.numpy()}), strict=True):
        assert torch.allclose(torch.from_numpy(found), model(inputs)[task], atol=1e-5)
