"""One run: train, keep the best epoch of the validation, test it once."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from mtl_lightning.callbacks.cost import CostCallback
from mtl_lightning.callbacks.hypervolume import HypervolumeCallback
from mtl_lightning.callbacks.objectives import is_population
from mtl_lightning.commands.claims import claim
from mtl_lightning.commands.configuration import Run
from mtl_lightning.commands.effort import EffortCallback, resident_memory
from mtl_lightning.commands.parsing import USER_ERRORS, FitConfiguration, one_line
from mtl_lightning.commands.results import (
    Result,
    Values,
    load_result,
    machine,
    read_json,
    save_failure,
    save_result,
    write_json,
    write_text,
)


def complete(run: Run) -> Result:
    """Return the result of a run; train and test it if that has not been done with its present configuration.

    A run that was stopped goes on from its last checkpoint. What another configuration has left in the folder of the
    run is moved to ``superseded``. Results, tables and checkpoints come from rank zero; the others only train.

    Raises:
        ClaimedError: If another process is at it.
        Exception: Whatever the training raises; ``failure.json`` says it in one line.
    """
    if not is_rank_zero():  # started by the trainer of rank zero, which has the claim
        return _train_and_test(run, FitConfiguration(run.content))
    with claim(_claim_path(run)):
        done = load_result(run)
        if done is not None:
            return done
        configuration = FitConfiguration(run.content)
        _prepare(run, configuration.resolved())
        try:
            result = _train_and_test(run, configuration)
        except Exception as error:
            kind = "" if isinstance(error, USER_ERRORS[:1]) else f"{type(error).__name__}: "
            save_failure(run, one_line(f"{kind}{error}"))
            raise
        save_result(run, result)
        return result


def is_rank_zero() -> bool:
    """Return whether this process is the one that writes; known before anything distributed has begun."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _claim_path(run: Run) -> Path:
    # Not in the folder of the run, which may be moved away.
    return run.output / ".claims" / f"{run.command}.{run.name}.{run.seed}.lock"


def _prepare(run: Run, resolved: str) -> None:
    """Make the folder of the run; move away what another configuration has left in it."""
    config = run.folder / "config.yaml"
    header = f"# {run.digest}\n"
    if config.exists() and not config.read_text(encoding="utf-8").startswith(header):
        old = config.read_text(encoding="utf-8").partition("\n")[0].strip("# ")
        target = run.output / "superseded" / run.folder.relative_to(run.output).with_name(f"{run.folder.name}.{old}")
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{run.folder.name}.{old}.{number}")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(run.folder, target)
    write_text(config, header + resolved)


def _train_and_test(run: Run, configuration: FitConfiguration) -> Result:
    # The evaluation needs none of the callbacks that the checkpoint has states of.
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # of Lightning itself; see `cli.run`
    resident = resident_memory()
    seed_everything(run.seed, workers=True, verbose=False)
    model, data, arguments = configuration.instantiate()
    _check_data(data)
    best = run.folder / "checkpoints" / "best.ckpt"
    trained_path = run.folder / "trained.json"
    effort = EffortCallback(resident)
    cost = CostCallback(dirpath=run.folder / "cost")
    trainer = _trainer(run, model, arguments, [effort, cost])

    trained = read_json(trained_path)
    if trained is None:
        last = run.folder / "checkpoints" / "last.ckpt"
        trainer.fit(model, datamodule=data, ckpt_path=str(last) if last.exists() else None)
        if not trainer.state.finished:
            raise RuntimeError("The training was interrupted; started again, it goes on from its last checkpoint.")
        if not best.exists():
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(
                f"`select` should monitor what is logged in validation. Found {run.select.monitor!r}; logged: {logged}."
            )
        trained = {"cost": _cost(cost, effort, trainer), "machine": machine(trainer.strategy.root_device)}
        if trainer.is_global_zero:
            write_json(trained_path, trained)
    trainer.strategy.barrier()

    # The callbacks would take up their state at the best epoch, and write their files once more.
    trainer.callbacks = []  # type: ignore[attr-defined]  # set by a connector
    task_names: Any = getattr(model, "task_names", ())
    names = list(task_names)
    values: dict[str, Values] = {}
    for split, evaluate in (("val", trainer.validate), ("test", trainer.test)):
        evaluate(model, datamodule=data, ckpt_path=str(best), verbose=False)
        values[split] = _values(trainer, model, split)
        if not values[split]:
            raise ValueError(f"The {split} split should log values {split}_<metric>/<task>. Found none.")
    names = names or [name.partition("/")[2] for name in values["test"] if name.startswith("loss/")]
    if run.command == "single-tasks":
        names = [run.name]
        values = {
            split: {name: of_split[name] for name in of_split if name.endswith(f"/{run.name}")}
            for split, of_split in values.items()
        }
    return Result(
        digest=run.digest,
        name=run.name,
        seed=run.seed,
        population=is_population(model),
        task_names=names,
        preferences=model.preferences.tolist() if is_population(model) else [],
        selected=_selected(run, best),
        validation=values["val"],
        test=values["test"],
        cost=trained["cost"],
        machine=trained["machine"],
    )


def _check_data(data: LightningDataModule) -> None:
    """Refuse data without a validation: nothing but the test would be left to select on."""
    if type(data).val_dataloader is LightningDataModule.val_dataloader:
        raise ValueError(f"`data` should have a validation split to select on. Found none in {type(data).__name__}.")


def _trainer(run: Run, model: LightningModule, arguments: dict[str, Any], own: list[Callback]) -> Trainer:
    given = arguments.get("callbacks") or []
    callbacks = [*(given if isinstance(given, list) else [given]), *own]
    names = getattr(model, "task_names", ())
    if run.reference_point is not None and run.command == "compare" and names:
        objectives = None if is_population(model) else dict.fromkeys([f"val_loss/{name}" for name in names], "min")
        callbacks.append(
            HypervolumeCallback(run.reference_point, objectives, dirpath=run.folder / "pareto_front")  # type: ignore[arg-type]
        )
    folder = run.folder / "checkpoints"
    callbacks += [
        ModelCheckpoint(
            folder, filename="best", monitor=run.select.monitor, mode=run.select.mode, enable_version_counter=False
        ),
        # At the end of the epoch, when all other callbacks have written their part of the state.
        ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False),
    ]
    defaults: dict[str, Any] = {
        # A version per attempt, so that what was logged before a stop remains.
        "logger": CSVLogger(save_dir=run.folder, name="logs"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    taken = {key: value for key, value in arguments.items() if key in run.content["trainer"]}
    return Trainer(**{**defaults, **taken, "callbacks": callbacks, "default_root_dir": str(run.folder)})


def _values(trainer: Trainer, model: LightningModule, split: str) -> Values:
    """Return the values of the latest evaluation, one per model."""
    if is_population(model):
        losses = model.objective_values.double().cpu()
        values = {f"loss/{name}": losses[:, task].tolist() for task, name in enumerate(model.task_names)}
        return values | {name: column.double().cpu().tolist() for name, column in model.metric_values.items()}
    start = f"{split}_"
    return {
        name.removeprefix(start): [float(value)]
        for name, value in trainer.callback_metrics.items()
        if name.startswith(start) and "/" in name
    }


def _cost(cost: CostCallback, effort: EffortCallback, trainer: Trainer) -> dict[str, Any]:
    totals, own = asdict(cost.totals), asdict(effort.effort)
    rise = own.pop("memory_rise_mib")
    on_cuda = trainer.strategy.root_device.type == "cuda"
    resident = totals.pop("peak_memory_mib")
    return {**totals, **own, "peak_memory_mib": resident if on_cuda else rise}


def _selected(run: Run, best: Path) -> dict[str, Any]:
    state = torch.load(best, map_location="cpu", weights_only=True)
    scores = [
        float(value["best_model_score"])
        for key, value in state["callbacks"].items()
        if key.startswith("ModelCheckpoint") and value.get("monitor") == run.select.monitor
    ]
    return {
        "monitor": run.select.monitor,
        "mode": run.select.mode,
        "value": scores[0] if scores else float("nan"),
        "epoch": state["epoch"],
    }
