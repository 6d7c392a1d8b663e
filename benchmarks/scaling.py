"""Step time and traffic against the number of processes, data parallel and population parallel.

A fixed global batch and a fixed population are trained by one, two and four processes. Step time is the median over
batches by the clock of the slowest process; processor time is the sum over processes. Traffic is what a process
receives in a step, counted at every collective: ``2 (W - 1) / W n`` bytes for an all-reduce of ``n`` bytes,
``(W - 1) n`` for an all-gather of ``n`` from each, ``n`` for a broadcast and for a message.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from record import machine, save
from torch import Tensor, nn

from mtl_lightning.aggregation import UPGrad
from mtl_lightning.grouping import Fixed
from mtl_lightning.modules import GradientModule, MT2OModule, TaskGroupModule, WeightedModule
from mtl_lightning.networks import MLP, LeNetEncoder, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.strategies import PopulationParallelStrategy
from mtl_lightning.task import Task
from mtl_lightning.transfer import DistanceTransfer, NeighborTransfer
from mtl_lightning.weighting import Equal

SUBPROBLEMS = 8
TASKS = ("left", "right")


class Batches:
    """Random batches of a global size, of which each process takes its part."""

    def __init__(self, kind: str, size: int, count: int, parts: int, place: Callable[[], int]) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (size, 100) if kind == "mlp" else (size, 1, 36, 36)
        self.inputs = torch.randn(shape, generator=generator)
        self.targets = torch.randint(10, (size,), generator=generator)
        self.count, self.parts, self.place = count, parts, place

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        part = slice(self.place() if self.parts > 1 else 0, None, self.parts)
        for _ in range(self.count):
            yield self.inputs[part], dict.fromkeys(TASKS, self.targets[part])


class Measure(Callback):
    """Times batches and counts the bytes that a process receives, and writes both at the end."""

    def __init__(self, folder: Path, warmup: int) -> None:
        self.folder, self.warmup = folder, warmup
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.received: list[float] = []
        self.calls: list[int] = []
        self._bytes, self._calls = 0.0, 0

    def on_train_start(self, *_: Any) -> None:
        """Count from here on."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1:
            return
        plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast", "batch_isend_irecv")}

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            size = dist.get_world_size(group)
            self._add(2 * (size - 1) / size * tensor.nbytes)
            return plain["all_reduce"](tensor, *args, **kwargs)

        def all_gather(parts: list[Tensor], own: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._add((len(parts) - 1) * own.nbytes)
            return plain["all_gather"](parts, own, *args, **kwargs)

        def broadcast(tensor: Tensor, src: int, *args: Any, **kwargs: Any) -> Any:
            self._add(tensor.nbytes if src != dist.get_rank() else 0)
            return plain["broadcast"](tensor, src, *args, **kwargs)

        def batch_isend_irecv(operations: list[Any]) -> Any:
            self._add(sum(one.tensor.nbytes for one in operations if one.op is dist.irecv))
            return plain["batch_isend_irecv"](operations)

        for function in (all_reduce, all_gather, broadcast, batch_isend_irecv):
            setattr(dist, function.__name__, function)

    def _add(self, received: float) -> None:
        self._bytes += received
        self._calls += 1

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clocks."""
        self._bytes, self._calls = 0.0, 0
        self._began, self._began_processor = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the clocks."""
        self.seconds.append(time.perf_counter() - self._began)
        self.processor.append(time.process_time() - self._began_processor)
        self.received.append(self._bytes)
        self.calls.append(self._calls)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Write medians."""
        columns = {"seconds": self.seconds, "processor": self.processor, "bytes": self.received, "calls": self.calls}
        medians = {name: statistics.median(values[self.warmup :]) for name, values in columns.items()}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(medians))


def network(kind: str) -> MultiHeadNetwork:
    """Return an MLP with 30 thousand parameters, or a LeNet with 32 thousand."""
    encoder: nn.Module = MLP(100, [128, 128]) if kind == "mlp" else LeNetEncoder()
    width = 128 if kind == "mlp" else 50
    return MultiHeadNetwork(encoder, {name: nn.Linear(width, 10) for name in TASKS})


def build(method: str, kind: str) -> LightningModule:
    """Return the module of a method."""
    seed_everything(0, verbose=False)
    common: dict[str, Any] = {
        "network": network(kind),
        "tasks": [Task(name, nn.CrossEntropyLoss()) for name in TASKS],
        "optimizer": partial(torch.optim.Adam, lr=1e-3),
    }
    if method.startswith("MT2O"):
        rule = DistanceTransfer() if "all" in method else NeighborTransfer()
        backend: Any = "vmap" if kind == "mlp" else "loop"
        preferences = simplex_lattice(num_tasks=2, num_divisions=SUBPROBLEMS - 1)
        return MT2OModule(preferences=preferences, transfer=rule, backend=backend, **common)
    if method == "task groups":
        return TaskGroupModule(grouping=Fixed([["left"], ["right"]]), **common)
    if method == "gradients (UPGrad)":
        return GradientModule(aggregator=UPGrad(), **common)
    return WeightedModule(weighting=Equal(), **common)


METHODS = (
    ("MT2O, neighbours", "data"),
    ("MT2O, neighbours", "population"),
    ("MT2O, all", "data"),
    ("MT2O, all", "population"),
    ("task groups", "data"),
    ("weighted", "data"),
    ("gradients (UPGrad)", "data"),
)


def run(method: str, parallel: str, kind: str, processes: int, batch_size: int, batches: int) -> dict[str, Any]:
    """Train for some batches and return the medians."""
    strategy: Any = "auto"
    started: dict[str, Any] = {
        "process_group_backend": "gloo",
        "start_method": "fork",
        "timeout": timedelta(seconds=120),
    }
    if processes > 1:
        strategy = DDPStrategy(**started) if parallel == "data" else PopulationParallelStrategy(**started)
    parts = processes if parallel == "data" else 1
    data = Batches(kind, batch_size, batches, parts, lambda: dist.get_rank())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=processes,
            strategy=strategy,
            callbacks=[Measure(Path(folder), warmup=batches // 4)],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(build(method, kind), data)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]
    return {
        "method": method,
        "parallel": parallel,
        "network": kind,
        "processes": processes,
        "milliseconds": 1e3 * max(one["seconds"] for one in found),
        "processor_milliseconds": 1e3 * sum(one["processor"] for one in found),
        "kibibytes": statistics.fmean(one["bytes"] for one in found) / 1024,
        "calls": max(one["calls"] for one in found),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Return a row for each method and network, with columns for each number of processes."""
    counts = sorted({one["processes"] for one in runs})
    head = ["method", "parallel", "network"]
    head += [f"{what}, {count}" for what in ("ms a step", "KiB a step", "calls") for count in counts]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key in dict.fromkeys((one["method"], one["parallel"], one["network"]) for one in runs):
        by_count = {one["processes"]: one for one in runs if (one["method"], one["parallel"], one["network"]) == key}
        cells = list(key)
        cells += [f"{by_count[count]['milliseconds']:.1f}" for count in counts]
        cells += [f"{by_count[count]['kibibytes']:.1f}" for count in counts]
        cells += [f"{by_count[count]['calls']:.0f}" for count in counts]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run everything, print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--networks", nargs="+", default=["mlp", "lenet"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    runs = []
    for kind in arguments.networks:
        for method, parallel in METHODS:
            for processes in arguments.processes:
                one = run(method, parallel, kind, processes, arguments.batch_size, arguments.batches)
                runs.append(one)
                print({key: round(value, 1) if isinstance(value, float) else value for key, value in one.items()})
    save(
        arguments.output,
        {
            "command": "python benchmarks/scaling.py",
            "machine": machine(),
            "batch_size": arguments.batch_size,
            "batches": arguments.batches,
            "subproblems": SUBPROBLEMS,
            "runs": runs,
        },
    )
    print(table(runs))


if __name__ == "__main__":
    main()
