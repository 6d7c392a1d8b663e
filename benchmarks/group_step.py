"""What a batch of task group updates costs, beside a joint step and beside the published loop.

All variants run in turn, round after round, in one process, on the same batches; a ratio is of two times of the same
round: on the CPU of processor time of one thread, on a GPU by the clock, over batches that nothing waits between.
``joint`` is the sum of all losses in a plain ``LightningModule``. ``published loop`` re-implements the course of the
official code plainly: all heads with a graph in every pass, losses copied to the host one by one, affinity
propagation in every batch. Groups are the same in all variants, whatever a rule returns, so that passes are.

    python benchmarks/group_step.py
    python benchmarks/group_step.py --device cuda --setups conv-32 conv-64 vit-96 conv-128 vit-224
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from record import machine, save
from torch import Tensor

from mtl_lightning.datamodules.scene_tasks import scene_tasks
from mtl_lightning.datamodules.scenes import SCENE_TASKS, ScenesDataModule
from mtl_lightning.grouping import AffinityPropagation, Exemplars, Fixed, GroupingRule
from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.networks import DenseHead, EncoderDecoder, MultiHeadNetwork, VisionTransformerEncoder

NAMES = ("semseg", "depth_zbuffer", "normal", "reshading", "edge_occlusion", "edge_texture", "keypoints2d")
GROUPS = (("semseg", "depth_zbuffer", "edge_occlusion"), ("normal", "reshading"), ("edge_texture", "keypoints2d"))
WARM = 3  # batches of a round that are not counted: the state of the optimiser is made, memory is found
JOINT, PUBLISHED = "joint", "published loop"

Batch = tuple[Tensor, dict[str, Tensor]]


class Batches(list[Batch]):
    """A list that Lightning takes for one loader, where it takes a plain one for a collection of them."""


class _Patches(VisionTransformerEncoder):
    """Returns the features of every patch, shape ``(B, width, height, width)``, for dense heads."""

    def forward(self, images: Tensor) -> Tensor:
        """Return them in the order of the image."""
        grid = self.patches(images)
        tokens = self.blocks(self.dropout(self.positions(grid.flatten(start_dim=2).transpose(1, 2))))
        return self.norm(tokens).transpose(1, 2).unflatten(2, grid.shape[2:])


@dataclass(frozen=True)
class Setup:
    """A trunk with the batches it is given."""

    trunk: str
    size: int
    batch_size: int

    def network(self) -> MultiHeadNetwork:
        """Return the network of all variants, the same for all of them."""
        torch.manual_seed(0)
        encoder: Any = EncoderDecoder((16, 32, 64))
        scale = 1
        if self.trunk == "ViT-Tiny":
            scale = 16
            encoder = _Patches(self.size, scale, in_channels=3, width=192, depth=12, num_heads=3)
        heads = {
            name: DenseHead(encoder.out_features, SCENE_TASKS[name].channels or 1, scale_factor=scale) for name in NAMES
        }
        return MultiHeadNetwork(encoder, heads)

    def batches(self, count: int) -> Batches:
        """Return some batches of the scenes."""
        seed_everything(0, verbose=False)
        data = ScenesDataModule(
            tasks=NAMES,
            size=self.size,
            num_train=count * self.batch_size,
            num_val=0,
            num_test=0,
            batch_size=self.batch_size,
            cache_dir=None,
        )
        data.prepare_data()
        data.setup("fit")
        return Batches(data.train_dataloader())

    def __str__(self) -> str:
        return f"{self.trunk}, {self.size} px, batch {self.batch_size}"


SETUPS = {
    "conv-32": Setup("convolutions", 32, 4),
    "conv-64": Setup("convolutions", 64, 8),
    "conv-128": Setup("convolutions", 128, 32),
    "vit-96": Setup("ViT-Tiny", 96, 4),
    "vit-224": Setup("ViT-Tiny", 224, 32),
}


class _Asked(Fixed):
    """Asks another rule for groups in every batch, and returns the fixed ones."""

    reads_affinity = True

    def __init__(self, rule: GroupingRule) -> None:
        super().__init__(GROUPS)
        self.rule = rule
        self.rule(torch.eye(len(NAMES)))  # what the first call imports is not counted

    def groups(self, affinity: Tensor) -> list[list[int]]:
        """Return the fixed groups."""
        self.rule(affinity)
        return super().groups(affinity)


class JointStep(LightningModule):
    """One step for the sum of all losses."""

    def __init__(self, network: MultiHeadNetwork, optimizer: Any) -> None:
        super().__init__()
        self.network, self.make = network, optimizer
        self.tasks = scene_tasks(NAMES)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum."""
        inputs, targets = batch
        outputs = self.network(inputs)
        return torch.stack([task.loss(outputs[task.name], targets[task.name]) for task in self.tasks]).sum()

    def configure_optimizers(self) -> Any:
        """Return the optimiser."""
        return self.make(self.parameters())


class PublishedLoop(JointStep):
    """The course of the official code, on fixed groups."""

    def __init__(self, network: MultiHeadNetwork, optimizer: Any, decay: float = 1e-3) -> None:
        super().__init__(network, optimizer)
        self.automatic_optimization = False
        self.decay = decay
        self.rule = AffinityPropagation()
        size = len(NAMES)
        self.affinity = [[1.0 if s == k else 0.1 * ((s * k) % 3) for k in range(size)] for s in range(size)]
        self.groups = [[NAMES.index(name) for name in group] for group in GROUPS]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Cluster, and update group by group."""
        inputs, targets = batch
        optimizer: Any = self.optimizers()
        self.rule(torch.tensor(self.affinity))
        before = [-1.0] * len(NAMES)
        for group in self.groups:
            outputs = self.network(inputs)
            losses = [task.loss(outputs[task.name], targets[task.name]) for task in self.tasks]
            optimizer.zero_grad()
            self.manual_backward(torch.stack([losses[task] for task in group]).sum())
            optimizer.step()
            after = [loss.item() for loss in losses]
            self._credit(group, before, after)
            before = after

    def _credit(self, group: Sequence[int], before: Sequence[float], after: Sequence[float]) -> None:
        gains = {task: (1 - after[task] / old) / len(group) for task, old in enumerate(before) if old > 0}
        for source in group:
            for target, gain in gains.items():
                if target == source and gain < 0:
                    continue
                if target in group and target != source and gain * gains[source] < 0:
                    gain = -max(gain, gains[source])
                old = self.affinity[source][target]
                self.affinity[source][target] = (1 - self.decay) * old + self.decay * gain


def variants() -> dict[str, Callable[[MultiHeadNetwork], LightningModule]]:
    """Return what is compared, by name: from the network to the module."""
    adam = partial(torch.optim.Adam, lr=1e-3)

    def groups(**arguments: Any) -> Callable[[MultiHeadNetwork], LightningModule]:
        arguments = {"grouping": Fixed(GROUPS), "warmup_batches": 0, "tasks": scene_tasks(NAMES)} | arguments
        return lambda network: TaskGroupModule(network, optimizer=adam, **arguments)

    return {
        JOINT: lambda network: JointStep(network, adam),
        "groups": groups(track_every=0),
        "+ affinity": groups(),
        "+ affinity, exact grouping": groups(grouping=_Asked(Exemplars())),
        "+ affinity, affinity propagation": groups(grouping=_Asked(AffinityPropagation())),
        "+ affinity, exact grouping, last step measured": groups(grouping=_Asked(Exemplars()), measure_last=True),
        PUBLISHED: lambda network: PublishedLoop(network, adam),
    }


class _Clock(Callback):
    """The seconds of a batch, from the end of the one before to its own."""

    def __init__(self, device: str, batches: int) -> None:
        self.device, self.batches = device, batches
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.device == "cpu":
            self.ends.append(time.process_time())
        elif batch_idx in (WARM - 1, self.batches - 1):
            torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the median of the batches, or their mean on a GPU, where the host runs ahead of them."""
        if self.device != "cpu":
            return (self.ends[-1] - self.ends[0]) / (self.batches - WARM)
        counted = self.ends[WARM - 1 :]
        return statistics.median(after - before for before, after in pairwise(counted))


class _Passes(Callback):
    """Counts the passes through the trunk."""

    def __init__(self) -> None:
        self.forward = self.backward = self.batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.handle = pl_module.network.encoder.register_forward_hook(self._count)

    def _count(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.forward += 1
        if output.requires_grad:
            output.register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward += 1

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def on_train_end(self, *_: Any) -> None:
        self.handle.remove()

    @property
    def joint_steps(self) -> float:
        """The passes of a batch in joint steps, where a backward pass costs two passes forward."""
        return (self.forward + 2 * self.backward) / 3 / self.batches


def fit(module: LightningModule, batches: Batches, device: str, callbacks: Sequence[Callback] = ()) -> None:
    """Train one epoch, and nothing else."""
    Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**6,
    ).fit(module, batches)


def peak(train: Callable[[], None], device: str) -> float:
    """Return the most MiB that tensors made in ``train`` held at a time."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()  # what is freed meanwhile would be taken off
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def measure(setup: Setup, device: str, rounds: int, count: int) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    made = variants()
    batches = setup.batches(WARM + count)
    few = Batches(batches[:2])
    peaks, passes = {}, {}
    for name, make in made.items():
        peaks[name] = peak(lambda make=make: fit(make(setup.network()), few, device), device)
        passes[name] = _Passes()
        fit(make(setup.network()), few, device, [passes[name]])
    modules = {name: make(setup.network()) for name, make in made.items()}
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(rounds):
        for name, module in modules.items():
            clock = _Clock(device, len(batches))
            fit(module, batches, device, [clock])
            times[name].append(clock.seconds())
    rows = []
    for name, values in times.items():
        row = {"setup": str(setup), "variant": name, "milliseconds": 1e3 * statistics.median(values)}
        for key, other in (("joint_steps", JOINT), ("published_loops", PUBLISHED)):
            ratios = [value / base for value, base in zip(values, times[other], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row |= {key: middle, f"{key}_quartiles": [low, high]}
        rows.append(row | {"floor": passes[name].joint_steps, "peak_mib": peaks[name]})
    return rows


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return a row for each trunk and variant; ratios are medians over the rounds, with quartiles."""
    head = ("trunk", "variant", "ms a batch", "passes", "joint steps", "published loops", "peak, MiB")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run in runs:
        ratios = [
            f"{run[key]:.2f} ({low:.2f} - {high:.2f})"
            for key in ("joint_steps", "published_loops")
            for low, high in (run[f"{key}_quartiles"],)
        ]
        cells = (run["setup"], run["variant"], f"{run['milliseconds']:.1f}", f"{run['floor']:.2f}", *ratios)
        lines.append(f"| {' | '.join(cells)} | {run['peak_mib']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Time all variants in turn, print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=["conv-32", "conv-64", "vit-96"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, default=5, help=f"counted in each round, after {WARM} more")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "group_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    runs: list[dict[str, Any]] = []
    for name in options.setups:
        runs += measure(SETUPS[name], options.device, options.rounds, options.batches)
        save(options.output, {"machine": machine(), "settings": settings, "runs": runs})
    print(table(runs))


if __name__ == "__main__":
    main()
