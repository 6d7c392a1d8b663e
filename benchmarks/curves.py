"""Runs of MT2O with their hypervolume against gradient evaluations and seconds, and tables of them."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from record import machine, save, summary

from mtl_lightning.growth import Doubling
from mtl_lightning.modules import MT2OModule
from mtl_lightning.pareto import hypervolume
from mtl_lightning.transfer import (
    AdvantageTransfer,
    DistanceTransfer,
    NeighborTransfer,
    NoTransfer,
    ProportionalTransfer,
)

REFERENCE = torch.tensor([2.0, 2.0])

Method = Callable[[int, int], dict[str, Any]]
"""From the number of batches and of subproblems to arguments of ``MT2OModule``."""

METHODS: dict[str, Method] = {
    "no transfer": lambda batches, size: {"transfer": NoTransfer()},
    "neighbour": lambda batches, size: {"transfer": NeighborTransfer(decay=0.01 ** (2 / batches))},
    "proportional": lambda batches, size: {"transfer": ProportionalTransfer(rate=100.0)},
    "distance": lambda batches, size: {"transfer": DistanceTransfer(decay=0.01 ** (2 / batches))},
    "advantage": lambda batches, size: {"transfer": AdvantageTransfer()},
    "growth": lambda batches, size: {"transfer": NoTransfer(), "growth": _doubling(batches, size)},
    "growth + advantage": lambda batches, size: {"transfer": AdvantageTransfer(), "growth": _doubling(batches, size)},
    "independent batches": lambda batches, size: {"transfer": NoTransfer(), "batches": "independent"},
    "independent + neighbour": lambda batches, size: {
        "transfer": NeighborTransfer(decay=0.01 ** (2 / batches)),
        "batches": "independent",
    },
}


def _doubling(batches: int, size: int) -> Doubling:
    # All subproblems are live for the last half of the batches.
    return Doubling(every_n_batches=max(1, batches // (2 * math.ceil(math.log2(size)))))


class Curve(Callback):
    """Hypervolume of the validation losses against gradient evaluations and seconds of training.

    A gradient evaluation is one backward pass of one subproblem on one batch. Seconds are of training, validation left
    out: on a GPU by the clock, on the CPU of processor time, which other load on the machine hardly changes.
    """

    def __init__(self) -> None:
        self.now = time.perf_counter if torch.cuda.is_available() else time.process_time
        self.points: list[dict[str, float]] = []
        self.evaluations = 0
        self.seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._since = self.now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.evaluations += pl_module.population.size

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.seconds += self.now() - self._since

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        value = hypervolume(pl_module.objective_values, REFERENCE)
        self.points.append({"evaluations": self.evaluations, "seconds": self.seconds, "hypervolume": value})
        self._since = self.now()


def run(
    build: Callable[[dict[str, Any]], MT2OModule],
    data: LightningDataModule,
    method: Method,
    batches: int,
    size: int,
    validations: int,
    seed: int,
) -> dict[str, Any]:
    """Train one population; return its curve, and hypervolume and losses on the test set."""
    seed_everything(seed, verbose=False)
    module = build(method(batches, size))
    curve = Curve()
    trainer = Trainer(
        max_steps=batches,
        max_epochs=-1,
        val_check_interval=max(1, batches // validations),
        check_val_every_n_epoch=None,
        accelerator="auto",
        devices=1,
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    losses = module.objective_values
    return {
        "curve": curve.points,
        "seconds": curve.seconds,
        "evaluations": curve.evaluations,
        "backend": module.population.active_backend,
        "test_hypervolume": hypervolume(losses, REFERENCE),
        "test_losses": losses.tolist(),
        "test_metrics": {name: values.tolist() for name, values in module.metric_values.items()},
    }


def reach(curve: Sequence[dict[str, float]], target: float, what: str) -> float | None:
    """Return how much of ``what`` the curve needed to reach the target, between validations by interpolation."""
    before = {"evaluations": 0.0, "seconds": 0.0, "hypervolume": 0.0}
    for point in curve:
        if point["hypervolume"] >= target:
            share = (target - before["hypervolume"]) / (point["hypervolume"] - before["hypervolume"])
            return before[what] + share * (point[what] - before[what])
        before = point
    return None


def table(runs: Sequence[dict[str, Any]], baseline: str = "no transfer", share: float = 0.95) -> str:
    """Return a Markdown table of the methods: test hypervolume, and the cost of reaching the baseline's level.

    The level is a share of the last validation hypervolume of the baseline with the same seed. Differences and ratios
    are to the baseline with the same seed, means with 95 % confidence intervals (Student's t).
    """
    methods = list(dict.fromkeys(run["method"] for run in runs))
    of = {(run["method"], run["seed"]): run for run in runs}
    # Of an unfinished comparison, the seeds that all methods have.
    seeds = [seed for seed in sorted({run["seed"] for run in runs}) if all((method, seed) in of for method in methods)]
    lines = [
        f"| method | test hypervolume | difference | evaluations to {share:.0%} | seconds to {share:.0%} | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        costs = {}
        for what in ("evaluations", "seconds"):
            ratios = []
            for seed in seeds:
                base, own = of[baseline, seed]["curve"], of[method, seed]["curve"]
                target = share * base[-1]["hypervolume"]
                needed, usual = reach(own, target, what), reach(base, target, what)
                ratios.append(math.inf if needed is None or usual is None else needed / usual)
            reached = [ratio for ratio in ratios if math.isfinite(ratio)]
            costs[what] = f"x {statistics.fmean(reached):.2f}" if reached else "not reached"
            if reached and len(reached) < len(ratios):
                costs[what] += f" ({len(reached)} of {len(ratios)} runs)"
        values = [of[method, seed]["test_hypervolume"] for seed in seeds]
        differences = summary(
            [value - of[baseline, seed]["test_hypervolume"] for value, seed in zip(values, seeds, strict=True)]
        )
        difference = "" if method == baseline else differences
        seconds = statistics.fmean(of[method, seed]["seconds"] for seed in seeds)
        cells = (method, f"{statistics.fmean(values):.3f}", difference, *costs.values(), f"{seconds:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(
    path: Path,
    settings: dict[str, Any],
    build: Callable[[dict[str, Any]], MT2OModule],
    data: Callable[[int, int], LightningDataModule],
    variant: str,
    methods: Mapping[str, Method],
    seeds: int,
    batches: int,
    size: int,
    validations: int,
) -> list[dict[str, Any]]:
    """Run every method with every seed; skip what the file at ``path`` holds; return the runs of this variant.

    The methods of one seed are run one after another, so that their seconds are comparable where the machine's speed
    drifts.

    Args:
        path: The result file, written after each run.
        settings: What the runs depend on; a file with other settings is refused.
        build: From arguments of ``MT2OModule`` to the module.
        data: From the seed and the factor on the batch size to the data module.
        variant: The name of the data.
        methods: What is compared, by name.
        seeds: How many seeds.
        batches: How many training batches.
        size: The number of subproblems.
        validations: How many validations.
    """
    result = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "settings": settings, "runs": []}
    if result["settings"] != settings:
        raise ValueError(
            f"{path} should hold runs with the same settings. Found {result['settings']}. Name another file."
        )
    done = {(run["variant"], run["method"], run["seed"]) for run in result["runs"]}
    for seed in range(seeds):
        for name, method in methods.items():
            if (variant, name, seed) in done:
                continue
            module = data(seed, size if name.startswith("independent") else 1)
            outcome = run(build, module, method, batches, size, validations, seed)
            result["runs"].append({"variant": variant, "method": name, "seed": seed, **outcome})
            save(path, result)
            hypervolume, seconds = outcome["test_hypervolume"], outcome["seconds"]
            print(f"{variant}, seed {seed}, {name}: {hypervolume:.3f} in {seconds:.0f} s", flush=True)
    return [run for run in result["runs"] if run["variant"] == variant]
