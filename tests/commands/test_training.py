from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from mtl_lightning.commands.claims import ClaimedError, claim
from mtl_lightning.commands.configuration import Run, load_comparison
from mtl_lightning.commands.parsing import FitConfiguration
from mtl_lightning.commands.results import Result, load_failure, load_result
from mtl_lightning.commands.training import complete
from mtl_lightning.pareto import hypervolume
from tests.commands.cases import JOINT, content, write


def _run(folder: Path, name: str, **changes: Any) -> Run:
    return load_comparison(write(folder, **changes)).methods[name][0]


def _weights(run: Run, name: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run.folder / "checkpoints" / name, weights_only=True)["state_dict"]
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _numbers(result: Result) -> tuple[Any, ...]:
    """Return what has to be the same in runs that are the same."""
    counts = [result.cost[key] for key in ("gradient_evaluations", "batches", "samples", "forwards", "backwards")]
    return result.selected, result.validation, result.test, result.preferences, counts


def test_a_single_model_leaves_its_values_its_costs_and_its_configuration(tmp_path: Path) -> None:
    run = _run(tmp_path, "joint")
    result = complete(run)
    assert load_result(run) == result
    assert not result.population
    assert result.task_names == ["left", "right"]
    expected = {"loss/left", "loss/right", "accuracy/left", "accuracy/right"}
    assert set(result.validation) == set(result.test) == expected
    assert result.selected["value"] == pytest.approx(result.losses(result.validation).mean().item(), rel=1e-6)
    assert result.cost["batches"] == result.cost["gradient_evaluations"] == 2 * 4
    assert result.cost["samples"] == 2 * 256
    # The configuration is one for `fit`, and its model takes the checkpoint.
    text = (run.folder / "config.yaml").read_text()
    assert FitConfiguration(run.content).resolved() in text
    model = FitConfiguration(run.content).instantiate()[0]
    model.load_state_dict(torch.load(run.folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"])


def test_a_population_is_selected_by_its_hypervolume_and_tested_model_by_model(tmp_path: Path) -> None:
    run = _run(tmp_path, "front")
    result = complete(run)
    assert result.population
    assert result.preferences == [pytest.approx(row) for row in [[0.8, 0.2], [0.5, 0.5], [0.2, 0.8]]]
    assert all(len(values) == 3 for values in result.test.values())
    selected = hypervolume(result.losses(result.validation), (3.0, 3.0))
    assert result.selected["value"] == pytest.approx(selected, rel=1e-6)
    with (run.folder / "pareto_front" / "hypervolume.csv").open() as file:
        curve = [float(row["hypervolume"]) for row in csv.DictReader(file)]
    assert len(curve) == 2  # the evaluations after the training leave it alone
    assert max(curve) == pytest.approx(selected, rel=1e-6)
    assert result.cost["gradient_evaluations"] == 3 * 2 * 4


def test_the_test_is_not_read_before_the_training_is_done_and_changes_no_choice(tmp_path: Path) -> None:
    """The labels of one test are right, those of the other are not, and their loss grows from epoch to epoch."""
    results, runs = [], []
    for shift in (0, 1):
        folder = tmp_path / str(shift)
        folder.mkdir()
        trained = folder / "runs" / "joint" / "seed_0" / "trained.json"
        data = {
            "class_path": "tests.commands.cases.WatchedDigits",
            "init_args": {"trained": str(trained), "shift": shift},
        }
        runs.append(_run(folder, "joint", data=data, trainer={"max_epochs": 6, "accelerator": "cpu", "devices": 1}))
        results.append(complete(runs[-1]))
    right, wrong = results
    assert right.selected == wrong.selected
    assert right.validation == wrong.validation
    best, other = _weights(runs[0], "best.ckpt"), _weights(runs[1], "best.ckpt")
    assert all(torch.equal(best[key], other[key]) for key in best)
    assert right.selected["epoch"] == 5
    assert wrong.losses(wrong.test).mean() > right.losses(right.test).mean() + 0.5


def test_the_model_of_the_best_epoch_is_tested_not_the_last_one(tmp_path: Path) -> None:
    select = {"single": {"monitor": "val_loss", "mode": "max"}}  # the first epoch, then
    result = complete(
        _run(tmp_path, "joint", select=select, trainer={"max_epochs": 4, "accelerator": "cpu", "devices": 1})
    )
    assert result.selected["epoch"] == 0
    assert result.selected["value"] == pytest.approx(result.losses(result.validation).mean().item(), rel=1e-6)
    other = complete(_run(tmp_path, "joint", trainer={"max_epochs": 4, "accelerator": "cpu", "devices": 1}))
    assert other.selected["epoch"] == 3
    assert other.losses(other.test).mean() < result.losses(result.test).mean()


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    run = _run(tmp_path, "joint")
    complete(run)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    complete(run)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_another_configuration_is_run_anew_and_the_old_one_is_kept_aside(tmp_path: Path) -> None:
    old = _run(tmp_path, "joint")
    first = complete(old)
    shared = content(tmp_path)["shared"]
    shared["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    new = _run(tmp_path, "joint", shared=shared)
    second = complete(new)
    assert second.test != first.test
    assert second.cost["batches"] == 2 * 4  # from the beginning
    kept = tmp_path / "runs" / "superseded" / "joint" / f"seed_0.{old.digest}"
    assert (kept / "result.json").exists()
    third = complete(old)
    assert _numbers(third) == _numbers(first)
    assert (tmp_path / "runs" / "superseded" / "joint" / f"seed_0.{new.digest}" / "result.json").exists()


class _StopError(Exception):
    pass


@pytest.mark.parametrize(("method", "epoch"), [("joint", 1), ("front", 2)])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    method: str, epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"max_epochs": 3, "accelerator": "cpu", "devices": 1}
    folder = tmp_path / "stopped"
    folder.mkdir()
    run = _run(folder, method, trainer=trainer)
    whole = complete(_run(tmp_path, method, trainer=trainer))
    kind = type(FitConfiguration(run.content).instantiate()[0])
    step = kind.training_step

    def stopping(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == epoch and batch_idx == 2:
            raise _StopError
        return step(self, batch, batch_idx)

    monkeypatch.setattr(kind, "training_step", stopping)
    with pytest.raises(_StopError):
        complete(run)
    assert load_failure(run) == "_StopError:"
    monkeypatch.undo()
    assert _numbers(complete(run)) == _numbers(whole)
    assert load_failure(run) is None
    trained, uninterrupted = _weights(run, "last.ckpt"), _weights(_run(tmp_path, method, trainer=trainer), "last.ckpt")
    assert all(torch.equal(trained[key], uninterrupted[key]) for key in trained)


def test_a_run_that_was_stopped_after_the_training_is_only_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path, "joint")
    whole = complete(run)
    (run.folder / "result.json").unlink()
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_, **__: pytest.fail("trained again"))
    assert complete(run) == whole


def test_a_run_that_was_stopped_before_its_costs_were_written_keeps_them(tmp_path: Path) -> None:
    run = _run(tmp_path, "front")
    whole = complete(run)
    (run.folder / "result.json").unlink()
    (run.folder / "trained.json").unlink()
    assert _numbers(complete(run)) == _numbers(whole)


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    run = _run(tmp_path, "failing", methods={"failing": {"model": {"class_path": "tests.commands.cases.Failing"}}})
    with pytest.raises(ValueError, match="cannot be trained"):
        complete(run)
    assert load_failure(run) == "ValueError: this method cannot be trained"


def test_a_run_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    run = _run(tmp_path, "joint")
    with claim(tmp_path / "runs" / ".claims" / "compare.joint.0.lock"), pytest.raises(ClaimedError, match="elsewhere"):
        complete(run)
    assert not run.folder.exists()


def test_a_quantity_that_is_not_logged_is_named(tmp_path: Path) -> None:
    run = _run(tmp_path, "joint", methods={"joint": {**JOINT, "select": {"monitor": "val_los", "mode": "min"}}})
    with pytest.raises(MisconfigurationException, match=r"(?s)'val_los'.*'val_loss'"):
        complete(run)


def test_no_validation_split_is_no_choice(tmp_path: Path) -> None:
    data = content(tmp_path)["data"]
    data["init_args"]["val_fraction"] = 0.0
    with pytest.raises(ValueError, match=r"logged in validation. Found 'val_loss'"):
        complete(_run(tmp_path, "joint", data=data))
