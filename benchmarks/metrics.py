"""What observing costs: the hypervolume of a front, and the share of an epoch that callbacks take.

The profiler of Lightning takes the time of every hook of every callback; the share is that of all hooks together in the
seconds of the epochs, validation included, without the first epoch. What they do once, when the fit has ended, stands
beside, as milliseconds. ``CostCallback`` is one of the callbacks; its own seconds of training are told, too.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --device cuda
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from record import machine, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mtl_lightning.callbacks import (
    CostCallback,
    HypervolumeCallback,
    ParetoFrontCallback,
    RelativeImprovementCallback,
    TaskGroupCallback,
)
from mtl_lightning.metrics import Baseline
from mtl_lightning.modules import MT2OModule, TaskGroupModule
from mtl_lightning.networks import LeNetEncoder, MultiHeadNetwork
from mtl_lightning.pareto import hypervolume
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task

OUTPUT = Path(__file__).parent / "results" / "metrics.json"
NAMES = ("left", "right")


def front(num_points: int, num_objectives: int) -> Tensor:
    """Return points of the unit sphere's concave front, none of which dominates another."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(num_points, num_objectives, generator=generator)
    return 1 - points / points.norm(dim=1, keepdim=True)


def hypervolume_rows(rounds: int = 51) -> list[dict[str, Any]]:
    """Return the milliseconds of a hypervolume for fronts of several sizes."""
    rows = []
    for num_points, num_objectives in ((25, 2), (200, 2), (200, 3), (1000, 3), (200, 4)):
        points, reference = front(num_points, num_objectives), torch.ones(num_objectives) * 1.1
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            hypervolume(points, reference)
            seconds.append(time.perf_counter() - began)
        rows.append(
            {
                "kind": "hypervolume",
                "points": num_points,
                "objectives": num_objectives,
                "milliseconds": 1e3 * statistics.median(seconds),
            }
        )
    return rows


def loaders(batches: int, batch_size: int, num_val: int) -> tuple[Any, Any]:
    """Return loaders of random pictures of the size of MultiMNIST."""
    generator = torch.Generator().manual_seed(0)

    def loader(size: int, shuffle: bool) -> Any:
        images = torch.rand(size, 1, 36, 36, generator=generator)
        labels = torch.randint(10, (2, size), generator=generator)
        return DataLoader(
            TensorDataset(images, *labels),
            batch_size=batch_size,
            shuffle=shuffle,
            collate_fn=_collate,
        )

    return loader(batches * batch_size, True), loader(num_val, False)


def _collate(samples: Any) -> Any:
    images, *labels = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return images, dict(zip(NAMES, labels, strict=True))


def population() -> LightningModule:
    """Return 25 subproblems of LeNet."""
    return MT2OModule(
        network=_network(),
        tasks=_tasks(),
        preferences=simplex_lattice(num_tasks=2, num_divisions=24),
        optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
        backend="loop",
    )


def groups() -> LightningModule:
    """Return one LeNet with task groups."""
    return TaskGroupModule(
        network=_network(),
        tasks=_tasks(),
        optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
        warmup_batches=1,
    )


def _network() -> nn.Module:
    return MultiHeadNetwork(LeNetEncoder(), {name: nn.Linear(50, 10) for name in NAMES})


def _tasks() -> list[Task]:
    return [Task(name, nn.CrossEntropyLoss()) for name in NAMES]


def _population_callbacks(figure_every: int) -> list[Callback]:
    return [
        ParetoFrontCallback(figure_every=figure_every),
        HypervolumeCallback(reference_point=(2.5, 2.5)),
        CostCallback(),
    ]


def _group_callbacks(figure_every: int) -> list[Callback]:
    baselines = {f"val_loss/{name}": Baseline(2.5, higher_is_better=False) for name in NAMES}
    return [
        TaskGroupCallback(figure_every=figure_every),
        RelativeImprovementCallback(baselines),
        CostCallback(),
    ]


class _Epochs(Callback):
    """Takes the time of epochs, from the start of one to the start of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def on_train_end(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())


class _Hooks(SimpleProfiler):
    """Forgets the first epoch."""

    def forget(self) -> None:
        self.recorded_durations.clear()


class _Forget(Callback):
    def __init__(self, profiler: _Hooks) -> None:
        self.profiler = profiler

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.profiler.forget()


def callback_row(
    name: str,
    build: Callable[[], LightningModule],
    callbacks: list[Callback],
    batches: int,
    epochs: int,
    device: str,
) -> dict[str, Any]:
    """Return the seconds of an epoch and the share of the callbacks in it."""
    profiler, clock = _Hooks(), _Epochs()
    train, val = loaders(batches, batch_size=256, num_val=2000)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            max_epochs=epochs,
            callbacks=[clock, _Forget(profiler), *callbacks],
            profiler=profiler,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(build(), train, val)
    total = clock.starts[-1] - clock.starts[1]
    kinds = {type(callback).__name__ for callback in callbacks}
    spent, at_the_end = dict.fromkeys(sorted(kinds), 0.0), 0.0
    for action, seconds in profiler.recorded_durations.items():
        for kind in kinds:
            if not action.startswith(f"[Callback]{kind}"):  # arguments may follow
                continue
            if action.endswith(".on_fit_end"):
                at_the_end += sum(seconds)
            else:
                spent[kind] += sum(seconds)
    cost = next(callback for callback in callbacks if isinstance(callback, CostCallback))
    return {
        "kind": "callbacks",
        "run": name,
        "batches": batches,
        "epoch_seconds": total / (epochs - 1),
        "training_seconds": cost.totals.seconds / epochs,
        "shares": {kind: seconds / total for kind, seconds in spent.items()},
        "end_milliseconds": 1e3 * at_the_end,
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| points | objectives | hypervolume, ms |", "|---|---|---|"]
    lines += [
        f"| {row['points']} | {row['objectives']} | {row['milliseconds']:.2f} |"
        for row in runs
        if row["kind"] == "hypervolume"
    ]
    lines += [
        "",
        "| run | batches an epoch | epoch, s | of it training, s | callbacks | share of an epoch | at the end, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in runs:
        if row["kind"] == "callbacks":
            each = ", ".join(f"`{kind}` {share:.2%}" for kind, share in row["shares"].items())
            lines.append(
                f"| {row['run']} | {row['batches']} | {row['epoch_seconds']:.1f} | {row['training_seconds']:.1f} "
                f"| {each} | {sum(row['shares'].values()):.2%} | {row['end_milliseconds']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    runs = hypervolume_rows()
    for figure_every, how in ((0, "figures at the end"), (1, "a figure each validation")):
        for name, build, callbacks, batches in (
            ("25 LeNets", population, _population_callbacks(figure_every), 60),
            ("one LeNet, task groups", groups, _group_callbacks(figure_every), 469),
        ):
            run = f"{name}, {how}"
            runs.append(callback_row(run, build, callbacks, batches, options.epochs, options.device))
    print(table(runs))
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    save(options.output, {"machine": machine(), "settings": settings, "runs": runs})


if __name__ == "__main__":
    main()
