import json
import os
from collections.abc import Mapping
from math import inf, isnan, nan
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mtl_lightning.metrics import Baseline, RelativeImprovement, load_baselines, relative_improvement, save_baselines

# Single-task networks on NYUv2, from nash.
NYUV2 = {
    "val_miou/semantics": Baseline(0.3830, True),
    "val_accuracy/semantics": Baseline(0.6376, True),
    "val_absolute/depth": Baseline(0.6754, False),
    "val_relative/depth": Baseline(0.2780, False),
    "val_mean/normal": Baseline(25.01, False),
    "val_median/normal": Baseline(19.21, False),
    "val_11/normal": Baseline(0.3014, True),
    "val_22/normal": Baseline(0.5720, True),
    "val_30/normal": Baseline(0.6915, True),
}


def _reference_improvement(values: Mapping[str, float], baselines: Mapping[str, Baseline], per: str) -> float:
    gains = {
        name: (-1) ** (not baseline.higher_is_better) * 100 * (values[name] - baseline.value) / baseline.value
        for name, baseline in baselines.items()
    }
    if per == "metric":
        return float(np.mean(list(gains.values())))
    tasks = {name.split("/")[1] for name in gains}
    return float(np.mean([np.mean([gain for name, gain in gains.items() if name.endswith(task)]) for task in tasks]))


@pytest.mark.parametrize("per", ["task", "metric"])
def test_agrees_with_the_formula(per: Literal["task", "metric"]) -> None:
    noise = torch.rand(len(NYUV2), dtype=torch.float64) + 0.5
    values = {name: base.value * factor for (name, base), factor in zip(NYUV2.items(), noise.tolist(), strict=True)}
    assert relative_improvement(values, NYUV2, per) == pytest.approx(_reference_improvement(values, NYUV2, per))


@pytest.mark.parametrize("per", ["task", "metric"])
def test_the_baselines_themselves_have_none(per: Literal["task", "metric"]) -> None:
    assert relative_improvement({name: baseline.value for name, baseline in NYUV2.items()}, NYUV2, per) == 0.0


@pytest.mark.parametrize("per", ["task", "metric"])
def test_ten_percent_better_everywhere_is_ten(per: Literal["task", "metric"]) -> None:
    values = {name: value * (1.1 if higher else 0.9) for name, (value, higher) in NYUV2.items()}
    assert relative_improvement(values, NYUV2, per) == pytest.approx(10.0)


@pytest.mark.parametrize(("per", "expected"), [("task", (0 + 0 + 20) / 3), ("metric", 2 * 20 / 9)])
def test_the_conventions_differ_by_what_counts_once(per: Literal["task", "metric"], expected: float) -> None:
    values = {name: value for name, (value, _) in NYUV2.items()}
    values["val_absolute/depth"] *= 0.8
    values["val_relative/depth"] *= 0.8
    assert relative_improvement(values, NYUV2, per) == pytest.approx(expected)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_units_do_not_matter(factor: float) -> None:
    values = {"mm/depth": 3.0 * factor}
    assert relative_improvement(values, {"mm/depth": Baseline(4.0 * factor, False)}) == pytest.approx(25.0)


def test_a_negative_baseline_keeps_the_sign() -> None:
    assert relative_improvement({"loglik/a": -1.0}, {"loglik/a": Baseline(-2.0, True)}) == 50.0


def test_the_task_is_what_follows_the_last_slash() -> None:
    baselines = {name: Baseline(1.0, True) for name in ("a/b/left", "left", "val/right")}
    assert relative_improvement({"a/b/left": 2.0, "left": 2.0, "val/right": 1.0}, baselines) == 50.0


def test_a_value_that_is_nan_makes_it_nan() -> None:
    assert isnan(relative_improvement({"a": nan, "b": 1.0}, {"a": Baseline(1.0, True), "b": Baseline(1.0, True)}))


def test_what_has_no_baseline_does_not_matter() -> None:
    improvement = RelativeImprovement({"val_loss/left": Baseline(2.0, False)})
    assert improvement({"val_loss/left": torch.tensor(1.0), "epoch": 3.0, "train_loss": torch.tensor(9.0)}) == 50.0


@pytest.mark.parametrize("as_text", [True, False])
def test_baselines_survive_the_file(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "größe.json"
    values = {name: torch.tensor(value, dtype=torch.float64) for name, (value, _) in NYUV2.items()}
    save_baselines(path, {**values, "epoch": 3}, {name: higher for name, (_, higher) in NYUV2.items()})
    assert load_baselines(str(path) if as_text else path) == NYUV2
    assert RelativeImprovement(str(path) if as_text else path).baselines == NYUV2
    assert os.listdir(tmp_path) == ["größe.json"]


def test_a_mapping_may_be_written_like_the_file() -> None:
    given: Any = {"loss/a": {"value": 2, "higher_is_better": False}}
    assert RelativeImprovement(given)({"loss/a": 1.0}) == 50.0


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "baselines.json"
    save_baselines(path, {"loss/a": 1.0}, {"loss/a": False})

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_baselines(path, {"loss/a": 2.0}, {"loss/a": False})
    assert load_baselines(path)["loss/a"].value == 1.0
    assert os.listdir(tmp_path) == ["baselines.json"]


@pytest.mark.parametrize("value", [0.0, nan, inf, -inf])
def test_what_cannot_be_divided_by_is_not_saved(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="`values` should hold a finite number other than zero for 'loss/a'"):
        save_baselines(tmp_path / "baselines.json", {"loss/a": value}, {"loss/a": False})
    assert os.listdir(tmp_path) == []


def test_what_is_not_there_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Found no 'loss/b', but 'loss/a'"):
        save_baselines(tmp_path / "baselines.json", {"loss/a": 1.0}, {"loss/b": False})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "should be a JSON file of baselines"),
        ("[1]", "should hold an object, metric name to baseline. Found list"),
        ("{}", "should hold at least one metric"),
        ('{"a": 1}', "should give 'a' a `value` and `higher_is_better`, and nothing else. Found 1"),
        ('{"a": {"value": 1}}', "should give 'a' a `value` and `higher_is_better`"),
        ('{"a": {"value": 1, "higher_is_better": true, "x": 1}}', "should give 'a' a `value` and `higher_is_better`"),
        ('{"a": {"value": 0, "higher_is_better": true}}', "a finite number other than zero for 'a'. Found 0"),
        ('{"a": {"value": NaN, "higher_is_better": true}}', "a finite number other than zero for 'a'. Found nan"),
        ('{"a": {"value": "1", "higher_is_better": true}}', "a finite number other than zero for 'a'. Found '1'"),
        ('{"a": {"value": true, "higher_is_better": true}}', "a finite number other than zero for 'a'. Found True"),
        ('{"a": {"value": 1, "higher_is_better": 1}}', "true or false whether higher is better for 'a'"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "baselines.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        RelativeImprovement(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "baselines.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="should be a JSON file of baselines"):
        RelativeImprovement(path)


def test_a_missing_file_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"which is missing\. Write it with `save_baselines`"):
        RelativeImprovement(tmp_path / "baselines.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"val_loss/left": 1.0, "x": 1.0}, "Found no 'val_loss/right', but 'val_loss/left', 'x'"),
        ({"test_loss/left": 1.0}, "Found none of them, but 'test_loss/left'. Log the model under the names"),
        ({}, "Found none of them, but nothing"),
    ],
)
def test_metrics_without_a_value_are_named(values: dict[str, float], message: str) -> None:
    improvement = RelativeImprovement({"val_loss/left": Baseline(2.0, False), "val_loss/right": Baseline(2.0, False)})
    with pytest.raises(ValueError, match=message):
        improvement(values)


def test_other_conventions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`per` should be 'task' or 'metric'\. Found 'pixel'"):
        RelativeImprovement(NYUV2, per="pixel")  # type: ignore[arg-type]


class _TwoLosses(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        left, right = self.layer(batch).square().mean(dim=0)
        self.log_dict({"val_loss/left": left, "val_loss/right": right})


@pytest.mark.filterwarnings("ignore")
def test_logged_values_are_compared_with_those_of_an_earlier_run(tmp_path: Path) -> None:
    module, path = _TwoLosses(), tmp_path / "baselines.json"
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(accelerator="cpu", **quiet)  # type: ignore[arg-type]
    loader: DataLoader[Tensor] = DataLoader(torch.rand(8, 2), batch_size=4)  # type: ignore[arg-type]
    trainer.validate(module, loader, verbose=False)
    save_baselines(path, trainer.callback_metrics, {"val_loss/left": False, "val_loss/right": False})
    assert set(json.loads(path.read_text())) == {"val_loss/left", "val_loss/right"}
    module.layer.weight.data *= 0.5**0.5
    module.layer.bias.data *= 0.5**0.5
    trainer.validate(module, loader, verbose=False)
    assert RelativeImprovement(path)(trainer.callback_metrics) == pytest.approx(50.0, rel=1e-5)
