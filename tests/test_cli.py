from __future__ import annotations

import csv
import logging
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from mtl_lightning.cli import main, preview, run
from mtl_lightning.modules.waiting import LostRankError

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG = CONFIGS / "mt2o_multi_digits.yaml"
SCENES = CONFIGS / "task_groups_scenes.yaml"
FOR_FIT = sorted(path for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("compare"))
SHORT = [
    "--model.init_args.growth.init_args.every_n_batches=1",
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=4",
    "--trainer.limit_val_batches=2",
    "--trainer.limit_test_batches=2",
    "--trainer.limit_predict_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--data.init_args.num_train=512",
    "--data.init_args.num_val=256",
    "--data.init_args.num_test=256",
]

SHORT_SCENES = [
    "--model.init_args.warmup_batches=2",
    "--model.init_args.network.init_args.encoder.init_args.channels=[16,16]",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--data.init_args.num_train=24",
    "--data.init_args.num_val=8",
    "--data.init_args.num_test=8",
    "--data.init_args.batch_size=8",
    "--data.init_args.cache_dir=null",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run to the error and return its one line."""
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    message = stop.value.code
    assert isinstance(message, str)
    assert "Traceback" not in capsys.readouterr().err
    assert "\n" not in message
    return message


def test_the_shipped_configuration_trains_validates_tests_and_predicts(folder: Path) -> None:
    run(["fit", f"--config={CONFIG}", *SHORT])
    output = folder / "runs" / "mt2o_multi_digits" / "version_0"
    with (output / "pareto_front" / "archive.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 + 10  # the population has grown between two validations
    for picture in ("front.png", "hypervolume.png"):
        assert (output / "pareto_front" / picture).read_bytes().startswith(b"\x89PNG")
    checkpoint = output / "checkpoints" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 8
    for command in ("validate", "test", "predict"):
        run([command, f"--config={CONFIG}", *SHORT, f"--ckpt_path={checkpoint}"])


class AllTrain(Callback):
    """Sees that no part of the module is left in evaluation when training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert not [name for name, module in pl_module.named_modules() if not module.training]


def test_training_goes_on_from_a_checkpoint(folder: Path) -> None:
    run(["fit", f"--config={CONFIG}", *SHORT])
    checkpoint = folder / "runs" / "mt2o_multi_digits" / "version_0" / "checkpoints" / "last.ckpt"
    going_on = ["fit", f"--config={CONFIG}", *SHORT, "--trainer.max_epochs=3", f"--ckpt_path={checkpoint}"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in eval mode")
        run([*going_on, "--trainer.callbacks+=tests.test_cli.AllTrain"])
    with (folder / "runs" / "mt2o_multi_digits" / "version_1" / "pareto_front" / "archive.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0"] * 8 + ["1"] * 10 + ["2"] * 10


def test_task_groups_leave_their_heat_map_timeline_and_metrics(folder: Path) -> None:
    module = run(["fit", f"--config={SCENES}", *SHORT_SCENES]).model
    assert module.affinity_matrix.any()
    output = folder / "runs" / "task_groups_scenes" / "version_0"
    for picture in ("affinity/affinity.png", "task_groups/timeline.png", "task_groups/together.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    with (output / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert sum(bool(row["val_normal_mean_angle/normal"]) for row in logged) == 2
    with (output / "cost" / "cost.csv").open() as file:
        cost = list(csv.DictReader(file))
    # Two batches of single tasks and one that the affinity groups in the first epoch; the last step is measured.
    assert int(cost[0]["batches"]) == 3
    assert int(cost[0]["forwards"]) == int(cost[0]["optimizer_steps"]) + 3
    checkpoint = output / "checkpoints" / "last.ckpt"
    for command in ("validate", "test", "predict"):
        run([command, f"--config={SCENES}", *SHORT_SCENES, f"--ckpt_path={checkpoint}"])
    resumed = run(["fit", f"--config={SCENES}", *SHORT_SCENES, "--trainer.max_epochs=3", f"--ckpt_path={checkpoint}"])
    assert resumed.model.batches_seen == 9


@pytest.mark.parametrize("config", FOR_FIT, ids=lambda path: path.stem)
def test_the_printed_configuration_can_be_read_back(
    config: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(["fit", f"--config={config}", "--print_config"])
    first = capsys.readouterr().out
    (folder / "printed.yaml").write_text(first)
    with pytest.raises(SystemExit):
        run(["fit", f"--config={folder / 'printed.yaml'}", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(first)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model=mtl_lightning.modules.MT2OModul"], "no attribute 'MT2OModul'"),
        (["--model.init_args.transfer=mtl_lightning.transfer.Nope"], "no attribute 'Nope'"),
        (["--model.init_args.transferr=1"], "transferr"),
        (["--trainer.max_epoch_s=1"], "max_epoch_s"),
        (["--model.init_args.on_nonfinite=ignore"], "on_nonfinite"),
        (["--model.init_args.preferences.init_args.num_tasks=3"], "one column per task. Found shape (55, 3)"),
        (["--data=mtl_lightning.datamodules.Nope"], "no attribute 'Nope'"),
        (["--trainer.gradient_clip_val=1"], "gradient_clip_norm"),
        (["--trainer.accumulate_grad_batches=2"], "accumulate_batches"),
        (["--ckpt_path=nope.ckpt"], "nope.ckpt"),
    ],
)
def test_a_wrong_class_or_key_ends_in_one_line(
    arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _run(capsys, "fit", f"--config={CONFIG}", *arguments)
    assert message.startswith("mtl-lightning: error: ")
    assert expected in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.init_args.grouping=mtl_lightning.grouping.Nope"], "no attribute 'Nope'"),
        (["--model.init_args.affinity_decay=2"], "(0, 1]"),
        (["--model.init_args.loss_weights={nope: 1}"], "'nope'"),
        (["--data.init_args.tasks=[semseg,nope]"], "nope"),
        (["--data.init_args.size=16"], "[32, 224]"),
    ],
)
def test_wrong_arguments_of_task_groups_end_in_one_line(
    arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in _run(capsys, "fit", f"--config={SCENES}", *arguments)


def test_preference_vectors_can_be_written_out(folder: Path) -> None:
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["model"]["init_args"]["preferences"] = [[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]
    (folder / "vectors.yaml").write_text(yaml.safe_dump(config))
    module = run(["fit", "--config=vectors.yaml", *SHORT]).model
    assert torch.equal(module.preferences, torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]))


def test_a_missing_file_ends_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nope.yaml" in _run(capsys, "fit", "--config=nope.yaml")


def test_a_broken_checkpoint_ends_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "half.ckpt").write_bytes(b"PK half of it")
    message = _run(capsys, "fit", f"--config={CONFIG}", *SHORT, "--ckpt_path=half.ckpt")
    assert message.startswith("mtl-lightning: error: The checkpoint half.ckpt should be a whole file")


class LosesRank(Callback):
    """Ends a run as a rank that has lost another one."""

    def on_train_start(self, *_: Any) -> None:
        raise LostRankError("All ranks should meet.\nFound one that does not answer.")


def test_a_lost_rank_ends_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _run(capsys, "fit", f"--config={CONFIG}", *SHORT, "--trainer.callbacks+=tests.test_cli.LosesRank")
    assert message == "mtl-lightning: error: All ranks should meet. Found one that does not answer."


def test_the_weight_decay_of_adamw_is_what_the_configuration_says(folder: Path) -> None:
    """Configuration files give AdamW the default weight decay of Adam, 0, so it should be written out."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["model"]["init_args"]["optimizer"] = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 1e-3, "weight_decay": 0.01},
    }
    (folder / "adamw.yaml").write_text(yaml.safe_dump(config))
    run(["fit", "--config=adamw.yaml", *SHORT])
    checkpoint = folder / "runs" / "mt2o_multi_digits" / "version_0" / "checkpoints" / "last.ckpt"
    groups = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert groups[0]["weight_decay"] == 0.01


@pytest.mark.parametrize("form", ["config", "flags"])
def test_preview_draws_the_data_of_a_configuration(form: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.init_args.num_train=8", "--data.init_args.size=32", "--data.init_args.cache_dir=null"]
    start = [f"--config={SCENES}"] if form == "config" else ["--data=mtl_lightning.datamodules.ScenesDataModule"]
    path = preview([*start, *flags, "--output=sheets/scenes.png", "--samples=2"])
    assert (folder / "sheets" / "scenes.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{path}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--data CLASS` should say what to draw. Found neither. For example: mtl-lightning preview --data"),
        (["--config=nope.yaml"], "nope.yaml"),
        ([f"--config={CONFIG}", "--split=validation"], "'train', 'val' or 'test'"),
        ([f"--config={CONFIG}", "--samples=0"], "at least 1"),
        ([f"--config={CONFIG}", "--data.init_args.num_train=0"], "num_train"),
    ],
)
def test_what_preview_cannot_draw_ends_in_one_line(arguments: list[str], expected: str, folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"^mtl-lightning: error: ") as stop:
        preview(arguments)
    assert expected in str(stop.value.code)
    assert "\n" not in str(stop.value.code)


def test_preview_tells_which_file_has_no_data(folder: Path) -> None:
    (folder / "model.yaml").write_text("model: {}")
    with pytest.raises(SystemExit, match=r"Found model\.yaml without `data`"):
        preview(["--config=model.yaml"])


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_the_command_is_installed_and_lists_all_commands(arguments: list[str]) -> None:
    command = Path(sys.executable).with_name("mtl-lightning")
    result = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    listed = re.findall(r"^    ([\w-]+) {2,}\w", result.stdout, re.MULTILINE)
    assert listed == ["fit", "validate", "test", "predict", "compare", "single-tasks", "report", "preview"]


def test_a_misspelt_command_ends_in_one_line_with_all_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mtl-lightning", "previw"])
    with pytest.raises(SystemExit, match=r"^mtl-lightning: error: .*fit.* preview.* Found 'previw'\.$"):
        main()


def test_the_help_of_preview_ends_no_sentence_early(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preview(["--help"])
    assert "is:\n" not in capsys.readouterr().out


def test_fit_says_where_the_results_are_and_what_shows_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=my runs"]
    with caplog.at_level(logging.INFO):
        run(["fit", f"--config={CONFIG}", *SHORT, "--trainer.max_epochs=1", *logger])
    (said,) = [record.getMessage() for record in caplog.records if "mtl-lightning report" in record.getMessage()]
    assert said.startswith("Results are in my runs/mt2o_multi_digits/version_0.")
    monkeypatch.setattr(sys, "argv", shlex.split(said[said.index("mtl-lightning report") :]))
    main()
    assert (folder / "my runs" / "mt2o_multi_digits" / "version_0" / "report.html").exists()
    assert capsys.readouterr().out.endswith("report.html\n")


@pytest.mark.parametrize("option", ["--trainer.logger=false", "--trainer.fast_dev_run=true"])
def test_fit_without_a_logger_names_no_folder(option: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = ["--trainer.enable_checkpointing=false", "--trainer.callbacks=[]"]
    with caplog.at_level(logging.INFO):
        run(["fit", f"--config={CONFIG}", *SHORT, "--trainer.max_epochs=1", *callbacks, option])
    assert "Results are in" not in caplog.text


@pytest.mark.parametrize("command", ["compare", "single-tasks"])
def test_the_command_is_handed_its_arguments(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["mtl-lightning", command, f"--config={CONFIGS / 'compare_multi_digits.yaml'}", "--list"]
    )
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (4 + 6 if command == "compare" else 4)
    assert lines[0].startswith("mtl-lightning single-tasks --config=")
