from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtl_lightning.commands.configuration import Run, Select
from mtl_lightning.commands.results import (
    Result,
    load_failure,
    load_result,
    read_json,
    save_failure,
    save_result,
    write_json,
)


def _run(folder: Path, epochs: int = 1) -> Run:
    return Run("compare", "joint", 0, folder, {"trainer": {"max_epochs": epochs}}, Select("val_loss", "min"))


def _result(run: Run) -> Result:
    return Result(
        digest=run.digest,
        name="joint",
        seed=0,
        population=False,
        task_names=["left", "right"],
        preferences=[],
        selected={"monitor": "val_loss", "mode": "min", "value": 0.5, "epoch": 3},
        validation={"loss/left": [0.4], "loss/right": [0.6]},
        test={"loss/left": [0.5, math.inf], "loss/right": [0.7, math.nan]},
        cost={"seconds": 1.5, "peak_memory_mib": math.nan},
        machine={"device": "cpu"},
    )


def test_a_result_comes_back_as_it_was_and_the_file_is_json(tmp_path: Path) -> None:
    run = _run(tmp_path)
    save_result(run, _result(run))
    found = load_result(run)
    assert found is not None
    assert found.test["loss/left"] == [0.5, math.inf]
    assert math.isnan(found.test["loss/right"][1])
    assert math.isnan(found.cost["peak_memory_mib"])
    assert replace(found, test={}, cost={}) == replace(_result(run), test={}, cost={})
    text = (run.folder / "result.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_result_of_another_configuration_is_none(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert load_result(run) is None
    save_result(run, _result(run))
    assert load_result(_run(tmp_path, epochs=2)) is None


def test_a_failure_is_forgotten_with_the_result(tmp_path: Path) -> None:
    run = _run(tmp_path)
    save_failure(run, "out of memory")
    assert load_failure(run) == "out of memory"
    assert load_failure(_run(tmp_path, epochs=2)) is None
    save_result(run, _result(run))
    assert load_failure(run) is None


def test_losses_have_a_row_for_each_model(tmp_path: Path) -> None:
    result = _result(_run(tmp_path))
    assert torch.equal(result.losses(result.validation), torch.tensor([[0.4, 0.6]], dtype=torch.float64))
    assert result.losses(result.test).shape == (2, 2)
    with pytest.raises(ValueError, match="'joint' should log val_loss/<task>"):
        result.losses({"loss/left": [0.1]})


def test_a_file_that_is_broken_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json' should be a JSON file"):
        read_json(tmp_path / "a.json")


def test_a_result_of_another_release_is_named(tmp_path: Path) -> None:
    run = _run(tmp_path)
    write_json(run.folder / "result.json", {"digest": run.digest, "name": "joint"})
    with pytest.raises(ValueError, match=r"result\.json' should be a result of this release.*Delete it"):
        load_result(run)
