"""What a batch of task group updates costs, in joint steps, and where the excess goes.

All variants run in turn, round after round, in one process; a ratio is of two medians of the same round, in processor
time of one thread (on a GPU by the clock, after synchronisation). ``published loop`` is a plain re-implementation of
the course of the official code: all heads with a graph in every pass, losses copied to the host one by one, affinity
propagation in every batch.

    python benchmarks/task_groups_overhead.py
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from record import machine, save
from torch import Tensor

from mtl_lightning.datamodules.scene_tasks import scene_tasks
from mtl_lightning.datamodules.scenes import SCENE_TASKS, ScenesDataModule
from mtl_lightning.grouping import AffinityPropagation, AllTogether, Exemplars, Fixed
from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.networks import DenseHead, EncoderDecoder, MultiHeadNetwork

NAMES = ("semseg", "depth_zbuffer", "normal", "reshading", "edge_occlusion", "edge_texture", "keypoints2d")
GROUPS = (("semseg", "depth_zbuffer", "edge_occlusion"), ("normal", "reshading"), ("edge_texture", "keypoints2d"))


class _Asked(Fixed):
    """Asks another rule for groups in every batch, and returns the fixed ones."""

    reads_affinity = True

    def __init__(self, rule: Any) -> None:
        super().__init__(GROUPS)
        self.rule = rule
        self.rule(torch.eye(len(NAMES)))  # what the first call imports is not counted
        self.seconds = 0.0
        self.calls = 0

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return the fixed groups, and keep the time of the other rule."""
        began = time.perf_counter()
        self.rule(affinity)
        self.seconds += time.perf_counter() - began
        self.calls += 1
        return super().groups(affinity)


class PublishedLoop(LightningModule):
    """The course of the official code, on fixed groups so that the number of passes is the same."""

    def __init__(self, network: MultiHeadNetwork, optimizer: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.make = network, optimizer
        self.tasks = {task.name: task for task in scene_tasks(NAMES)}
        self.rule = AffinityPropagation()
        self.affinity = torch.eye(len(NAMES), dtype=torch.float64) + 0.1 * torch.rand(len(NAMES), len(NAMES))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        optimizer: Any = self.optimizers()
        self.rule(self.affinity)
        before = [-1.0] * len(NAMES)
        for group in GROUPS:
            outputs = self.network(inputs)
            losses = {name: self.tasks[name].loss(outputs[name], targets[name]) for name in NAMES}
            optimizer.zero_grad(set_to_none=False)
            self.manual_backward(torch.stack([losses[name] for name in group]).sum())
            optimizer.step()
            after = [losses[name].item() for name in NAMES]
            for source in group:
                for k in range(len(NAMES)):
                    if before[k] > 0:
                        row, gain = NAMES.index(source), (1 - after[k] / before[k]) / len(group)
                        self.affinity[row, k] = 0.999 * self.affinity[row, k] + 0.001 * gain
            before = after

    def configure_optimizers(self) -> Any:
        """Return the optimiser."""
        return self.make(self.parameters())


class _Clock(Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = _now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(_now() - self._began)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def network(channels: Sequence[int]) -> MultiHeadNetwork:
    """Return the network of all variants."""
    encoder = EncoderDecoder(channels=channels)
    return MultiHeadNetwork(
        encoder, {name: DenseHead(encoder.out_features, SCENE_TASKS[name].channels or 1) for name in NAMES}
    )


def variants(channels: Sequence[int]) -> dict[str, LightningModule]:
    """Return what is compared, by name."""
    adam = partial(torch.optim.Adam, lr=1e-3)

    def groups(**arguments: Any) -> TaskGroupModule:
        return TaskGroupModule(network(channels), scene_tasks(NAMES), adam, **{"warmup_batches": 0, **arguments})

    return {
        "joint": groups(grouping=AllTogether(), single_group="once", track_every=0),
        "groups": groups(grouping=Fixed(GROUPS), track_every=0),
        "+ affinity": groups(grouping=Fixed(GROUPS)),
        "+ last step measured": groups(grouping=Fixed(GROUPS), measure_last=True),
        "+ affinity, exact grouping": groups(grouping=_Asked(Exemplars())),
        "+ affinity, affinity propagation": groups(grouping=_Asked(AffinityPropagation())),
        "published loop": PublishedLoop(network(channels), adam),
    }


def main() -> None:
    """Time all variants in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=6, help="in each round; the first two are not counted")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/task_groups_overhead.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = ScenesDataModule(
        tasks=NAMES, size=options.size, num_train=64, num_val=0, num_test=0, batch_size=options.batch_size
    )
    modules = variants(options.channels)
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(options.rounds):
        for name, module in modules.items():
            clock = _Clock()
            Trainer(
                max_epochs=1,
                limit_train_batches=options.batches,
                callbacks=[clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=10**6,
            ).fit(module, datamodule=data)
            times[name].append(statistics.median(clock.times[2:]))
    rows = []
    for name, values in times.items():
        ratios = [value / joint for value, joint in zip(values, times["joint"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        row = {"variant": name, "milliseconds": 1e3 * statistics.median(values), "ratio": statistics.median(ratios)}
        rule = getattr(getattr(modules[name], "updates", None), "grouping", None)
        if isinstance(rule, _Asked):
            row["grouping_share"] = rule.seconds / rule.calls / statistics.median(values)
        rows.append(row | {"quartiles": [quartiles[0], quartiles[2]]})
    print("| variant | ms a batch | joint steps | quartiles | grouping |")
    print("|---|---|---|---|---|")
    for row in rows:
        share = f"{row['grouping_share']:.2%}" if "grouping_share" in row else ""
        low, high = row["quartiles"]
        print(
            f"| {row['variant']} | {row['milliseconds']:.1f} | {row['ratio']:.2f} | {low:.2f} - {high:.2f} | {share} |"
        )
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    save(options.output, {"machine": machine(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
