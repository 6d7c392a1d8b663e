"""Selective task group updates on nine tasks of rendered rooms, beside other ways to spend the same steps.

Every run trains for the same processor time and is validated on the way, so that runs are compared at equal seconds, at
equal optimiser steps and at equal batches. Delta m is against one run for each task alone, with the same network.

    python benchmarks/task_groups_scenes.py --seeds 3 --seconds 90 --workers 2
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from record import machine, save, summary

from mtl_lightning.datamodules.scene_tasks import scene_tasks
from mtl_lightning.datamodules.scenes import SCENE_TASKS, ScenesDataModule
from mtl_lightning.grouping import AllTogether, Exemplars, Fixed, GroupingRule, OneByOne, SizeMatchedRandom
from mtl_lightning.metrics import Baseline, relative_improvement
from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.networks import DenseHead, EncoderDecoder, MultiHeadNetwork
from mtl_lightning.task import Task

GEOMETRY = ("semseg", "depth_zbuffer", "depth_euclidean", "normal", "reshading", "edge_occlusion")
APPEARANCE = ("edge_texture", "keypoints2d", "albedo")
NAMES = GEOMETRY + APPEARANCE
METRICS = {
    "semseg": ("val_miou", True),
    "normal": ("val_mean_angle", False),
    "edge_occlusion": ("val_f1", True),
    **{name: ("val_absolute_error", False) for name in NAMES if name not in ("semseg", "normal", "edge_occlusion")},
}

Method = tuple[Callable[[], GroupingRule], dict[str, Any]]
METHODS: dict[str, Method] = {
    "joint": (AllTogether, {"single_group": "once", "track_every": 0}),
    "joint, rate x 3": (AllTogether, {"single_group": "once", "track_every": 0, "rate": 3.0}),
    "joint, 3 steps a batch": (lambda: _Thrice(), {"single_group": "once", "track_every": 0}),
    "one by one": (OneByOne, {"track_every": 0}),
    "true clusters": (lambda: Fixed([GEOMETRY, APPEARANCE]), {"track_every": 0}),
    "random, sizes of selective": (lambda: SizeMatchedRandom(Exemplars()), {}),
    "dissimilar": (lambda: Exemplars(dissimilar=True), {}),
    "selective": (Exemplars, {}),
    "selective, published attribution": (Exemplars, {"attribution": "published", "bias_correction": False}),
}


class _Thrice(AllTogether):
    """Marks a run whose joint step is taken three times on each batch."""


class _ThriceModule(TaskGroupModule):
    """Takes the step of all tasks three times."""

    def _update(self, batch_idx: int) -> None:
        order = self.updates.begin
        self.updates.begin = lambda batch, seed: order(batch, seed) * 3  # type: ignore[method-assign]
        super()._update(batch_idx)
        self.updates.begin = order  # type: ignore[method-assign]


class Alone(LightningModule):
    """One task with a network of its own."""

    def __init__(self, task: Task, rate: float) -> None:
        super().__init__()
        self.task, self.rate = task, rate
        self.network = network([task.name])
        self.metric, self.key = task.metrics, METRICS[task.name][0].removeprefix("val_")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.task.loss(self.network(batch[0])[self.task.name], batch[1][self.task.name])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metric.update(self.network(batch[0])[self.task.name], batch[1][self.task.name])  # type: ignore[union-attr]

    def on_validation_epoch_end(self) -> None:
        value = self.metric.compute()[self.key]  # type: ignore[union-attr]
        self.metric.reset()  # type: ignore[union-attr]
        self.log(f"val_{self.key}/{self.task.name}", value)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


class Curve(Callback):
    """Keeps the metrics of each validation with batches, steps and processor seconds of training; ends the run."""

    def __init__(self, seconds: float) -> None:
        self.limit = seconds
        self.batches, self.steps, self.seconds = 0, 0, 0.0
        self.points: list[dict[str, Any]] = []
        self.groups = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.process_time()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.steps += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seconds += time.process_time() - self._began
        self.batches += 1
        self.groups += len(getattr(pl_module, "task_groups", ()))
        trainer.should_stop = self.seconds >= self.limit

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = {
            name: float(trainer.callback_metrics[f"{metric}/{name}"])
            for name, (metric, _) in METRICS.items()
            if f"{metric}/{name}" in trainer.callback_metrics
        }
        self.points.append({"batches": self.batches, "steps": self.steps, "seconds": self.seconds, "metrics": metrics})


def network(names: Sequence[str]) -> MultiHeadNetwork:
    """Return the network of all runs."""
    encoder = EncoderDecoder(channels=(16, 32, 64))
    return MultiHeadNetwork(
        encoder, {name: DenseHead(encoder.out_features, SCENE_TASKS[name].channels or 1) for name in names}
    )


def run(method: str, seed: int, seconds: float, every: int, rate: float) -> dict[str, Any]:
    """Train once; ``method`` is one of ``METHODS``, or ``alone:<task>``."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = ScenesDataModule(
        tasks=NAMES, size=32, num_train=3000, num_val=300, num_test=0, batch_size=16, augment=True, seed=seed
    )
    seed_everything(seed, verbose=False)
    tasks = {task.name: task for task in scene_tasks(NAMES)}
    name = method.removeprefix("alone:")
    module: LightningModule
    if name != method:
        module = Alone(tasks[name], rate)
    else:
        make, arguments = METHODS[method]
        rule = make()
        arguments = {"affinity_decay": 0.01, "warmup_batches": 30, **arguments}
        factor = arguments.pop("rate", 1.0)
        build = _ThriceModule if isinstance(rule, _Thrice) else TaskGroupModule
        module = build(
            network(NAMES),
            list(tasks.values()),
            optimizer=partial(torch.optim.Adam, lr=rate * factor),
            grouping=rule,
            **arguments,
        )
    curve = Curve(seconds)
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[curve],
        val_check_interval=every,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    if curve.points[-1]["batches"] < curve.batches:
        trainer.validate(module, datamodule=data, verbose=False)
    affinity = module.affinity_matrix.tolist() if isinstance(module, TaskGroupModule) else None
    return {
        "method": method,
        "seed": seed,
        "curve": curve.points,
        "groups": curve.groups / curve.batches,
        "affinity": affinity,
    }


def at(curve: Sequence[Mapping[str, Any]], what: str, place: float) -> dict[str, float]:
    """Return the metrics at a number of batches, steps or seconds, linearly between two validations."""
    later = next((index for index, point in enumerate(curve) if point[what] >= place), len(curve) - 1)
    if later == 0 or curve[later][what] <= place:
        return dict(curve[later]["metrics"])
    left, right = curve[later - 1], curve[later]
    share = (place - left[what]) / (right[what] - left[what])
    return {name: (1 - share) * left["metrics"][name] + share * right["metrics"][name] for name in left["metrics"]}


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return delta m at equal batches, steps and seconds, mean and confidence interval over seeds."""
    together = [one for one in runs if not one["method"].startswith("alone:")]
    seeds = sorted({one["seed"] for one in together})
    least = {what: min(one["curve"][-1][what] for one in together) for what in ("batches", "steps", "seconds")}
    header = " | ".join(f"{least[what]:.0f} {what}" for what in least)
    lines = [f"| method | {header} | batches | groups |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        mine = {one["seed"]: one for one in together if one["method"] == method}
        if len(mine) < len(seeds):
            continue
        cells = []
        for what, place in least.items():
            values = [delta(runs, seed, at(mine[seed]["curve"], what, place)) for seed in seeds]
            cells.append(summary(values))
        batches = sum(one["curve"][-1]["batches"] for one in mine.values()) / len(mine)
        groups = sum(one["groups"] for one in mine.values()) / len(mine)
        lines.append(f"| {method} | {' | '.join(cells)} | {batches:.0f} | {groups:.1f} |")
    return "\n".join(lines)


def delta(runs: Sequence[Mapping[str, Any]], seed: int, metrics: Mapping[str, float]) -> float:
    """Return delta m in percent against the runs of single tasks with the same seed."""
    baselines = {
        name: Baseline(one["curve"][-1]["metrics"][name], higher_is_better=METRICS[name][1])
        for name in NAMES
        for one in runs
        if one["method"] == f"alone:{name}" and one["seed"] == seed
    }
    return relative_improvement(dict(metrics), baselines)


def main() -> None:
    """Run what the file does not hold yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=90.0, help="of processor time, for each run")
    parser.add_argument("--every", type=int, default=50, help="batches between validations")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/task_groups_scenes.json"))
    options = parser.parse_args()
    settings = {"seconds": options.seconds, "every": options.every, "rate": options.rate}
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "settings": settings, "runs": []}
    if options.output.exists():
        result = json.loads(options.output.read_text())
    if result["settings"] != settings:
        raise ValueError(f"{options.output} should hold runs with the same settings. Found {result['settings']}.")
    done = {(one["method"], one["seed"]) for one in result["runs"]}
    wanted = [
        (name, seed) for seed in range(options.seeds) for name in [*(f"alone:{t}" for t in NAMES), *options.methods]
    ]
    for seed in range(options.seeds):  # once, before the runs share the files
        ScenesDataModule(size=32, num_train=3000, num_val=300, num_test=0, seed=seed).prepare_data()
    with ProcessPoolExecutor(options.workers) as pool:
        futures = [
            pool.submit(
                run,
                name,
                seed,
                options.seconds / 3 if name.startswith("alone:") else options.seconds,
                options.every,
                options.rate,
            )
            for name, seed in wanted
            if (name, seed) not in done
        ]
        for future in as_completed(futures):
            one = future.result()
            result["runs"].append(one)
            save(options.output, result)
            print(f"seed {one['seed']}, {one['method']}: {one['curve'][-1]['batches']} batches", flush=True)
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
