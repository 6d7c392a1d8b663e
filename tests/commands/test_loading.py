from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtl_lightning.cli import load
from mtl_lightning.cli import run as run_cli
from mtl_lightning.datamodules import MultiDigitsDataModule
from mtl_lightning.modules import MT2OModule
from mtl_lightning.report import page, read_run

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "mt2o_multi_digits.yaml"

# What a reader does: the lines of the page, then the loss of each task over the data of the validation.
_READER = """
import json, sys, torch
from mtl_lightning.datamodules import MultiDigitsDataModule

data = MultiDigitsDataModule(num_train=256, num_val=256, num_test=64, batch_size=128)
data.prepare_data()
data.setup("fit")
for code in json.load(sys.stdin):
    scope = {}
    exec(code, scope)
    losses = {}
    with torch.no_grad():
        for inputs, targets in data.val_dataloader():
            for name, output in scope["model"](inputs).items():
                loss = torch.nn.functional.cross_entropy(output, targets[name], reduction="sum")
                losses[name] = losses.get(name, 0.0) + loss.item() / 256
    print(json.dumps([losses["left"], losses["right"]]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the command line, with a quote and a space in its path."""
    where = tmp_path_factory.mktemp("a 'quoted' folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        run_cli(
            [
                "fit",
                f"--config={CONFIG}",
                "--model.init_args.growth.init_args.every_n_batches=1",
                "--trainer.max_epochs=2",
                "--trainer.enable_progress_bar=false",
                "--trainer.accelerator=cpu",
                "--data.init_args.num_train=256",
                "--data.init_args.num_val=256",
                "--data.init_args.num_test=64",
            ]
        )
    return where / "runs" / "mt2o_multi_digits" / "version_0"


def _shown(folder: Path) -> Iterator[tuple[str, list[float]]]:
    """Return, for each model that can be picked on the page, its lines and its losses."""
    found = re.search(r'id="run">(.*?)</script>', page(read_run(folder)))
    assert found is not None
    content = json.loads(found[1])
    codes = {one["path"]: one["code"] for one in content["checkpoints"]}
    for choice in content["fronts"][0]["choices"]:
        for model in content["fronts"][0]["models"]:
            if model["step"] == choice["step"]:
                yield codes[choice["path"]] + model["code"], model["objectives"]


def test_the_lines_of_the_page_give_the_models_whose_losses_it_shows(folder: Path, tmp_path: Path) -> None:
    shown = list(_shown(folder))
    assert len(shown) >= 8
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _READER],
        input=json.dumps([code for code, _ in shown]),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,  # the lines do not depend on where they are run
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    losses = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor([values for _, values in shown]), rtol=1e-5, atol=1e-6
    )
    # Models differ by more than the tolerance, so that another one would be noticed.
    assert len({round(left, 4) for left, _ in losses}) > 4


def test_a_module_is_made_to_be_evaluated_and_its_lines_are_as_documented(folder: Path) -> None:
    module = load(str(folder), "checkpoints/last.ckpt")
    assert isinstance(module, MT2OModule)
    assert not any(part.training for part in module.modules())
    assert not module.select((0.3, 0.7)).training
    absolute = load(folder, folder / "checkpoints" / "last.ckpt")
    assert isinstance(absolute, MT2OModule)
    assert torch.equal(absolute.population.theta, module.population.theta)


def test_the_data_of_a_run_are_not_made(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    content: dict[str, Any] = yaml.safe_load((copy / "config.yaml").read_text())
    content["data"] = {"class_path": "nowhere.Data"}
    content["trainer"] = {"devices": 17}
    (copy / "config.yaml").write_text(yaml.safe_dump(content))
    assert load(copy, "checkpoints/last.ckpt").preferences.shape == (8, 2)


def test_without_a_configuration_the_lines_load_into_a_module_of_the_user(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    module = load(folder, "checkpoints/last.ckpt")
    (copy / "config.yaml").unlink()
    shown = [(code, values) for code, values in _shown(copy) if "last.ckpt" in code]
    assert len(shown) == 8
    data = MultiDigitsDataModule(num_train=256, num_val=256, num_test=64, batch_size=256)
    data.prepare_data()
    data.setup("fit")
    inputs, targets = next(iter(data.val_dataloader()))
    for code, values in shown:
        scope: dict[str, Any] = {"module": module}
        exec(code, scope)
        with torch.no_grad():
            outputs = scope["model"](inputs)
        losses = [float(torch.nn.functional.cross_entropy(outputs[name], targets[name])) for name in ("left", "right")]
        assert losses == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        (None, FileNotFoundError, r"should have left .*config.yaml'. Found none"),
        ("a: [", ValueError, "should be a YAML file"),
        ("a: 1", ValueError, "with a `model`"),
        ("model: {class_path: mtl_lightning.modules.Nope}", ValueError, "no attribute 'Nope'"),
        ("model: {class_path: mtl_lightning.modules.MT2OModule, init_args: {nope: 1}}", ValueError, "can be made"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(
    change: str | None, error: type[Exception], expected: str, folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "config.yaml").unlink() if change is None else (copy / "config.yaml").write_text(change)
    with pytest.raises(error, match=expected) as raised:
        load(copy, "checkpoints/last.ckpt")
    assert "\n" not in str(raised.value)


def test_a_missing_checkpoint_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.ckpt"):
        load(folder, "nope.ckpt")
