"""How far several processes end from one, for every module, and how far TorchJD ends under plain DDP.

The same batches are trained on by one process and, split in halves or whole, by two or four; what is reported is the
largest difference of a parameter after all steps, between the processes and from one process.

    python benchmarks/equality.py
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
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
from torch.nn.parallel import DistributedDataParallel

from mtl_lightning.aggregation import UPGrad
from mtl_lightning.exact_pareto import EPO
from mtl_lightning.grouping import Exemplars
from mtl_lightning.modules import (
    GradientModule,
    GradientPopulationModule,
    MT2OModule,
    ParetoSetModule,
    TaskGroupModule,
    WeightedModule,
)
from mtl_lightning.networks import MLP, MultiHeadNetwork, PreferenceConcatenation
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.strategies import PopulationParallelStrategy
from mtl_lightning.task import Task
from mtl_lightning.transfer import DistanceTransfer, NeighborTransfer
from mtl_lightning.weighting import Uncertainty

NAMES = ("a", "b", "c")
STEPS = 16


def batches() -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return 16 batches of 32 samples with three noisy targets of other scales; some labels are missing."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(NAMES), 8, 1, generator=generator)
    result = []
    for _ in range(STEPS):
        inputs = torch.randn(32, 8, generator=generator)
        noise = torch.randn(len(NAMES), 32, 1, generator=generator)
        targets = {name: 3.0**index * (inputs @ weights[index] + noise[index]) for index, name in enumerate(NAMES)}
        targets["c"][::3] = torch.nan  # ranks have unequal numbers of labels
        result.append((inputs, targets))
    return result


class Split:
    """The batches, of which each of ``parts`` processes takes every so-manieth sample."""

    def __init__(self, parts: int) -> None:
        self.batches, self.parts = batches(), parts

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        place = dist.get_rank() % self.parts if dist.is_initialized() else 0
        for inputs, targets in self.batches:
            part = slice(place, None, self.parts)
            yield inputs[part], {name: target[part] for name, target in targets.items()}


class MaskedSquares(nn.Module):
    """The mean squared error of the targets that are known."""

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape ``()``."""
        known = ~target.isnan()
        return torch.where(known, preds - target, 0.0).square().sum() / known.sum()


def network(more: int = 0) -> MultiHeadNetwork:
    """Return an MLP with three heads."""
    return MultiHeadNetwork(MLP(8 + more, [32, 32]), {name: nn.Linear(32, 1) for name in NAMES})


def modules() -> dict[str, tuple[str, Callable[[], LightningModule]]]:
    """Return what is trained: the kinds of parallelism, and how it is made."""
    common: dict[str, Any] = {
        "tasks": [Task(name, MaskedSquares()) for name in NAMES],
        "optimizer": partial(torch.optim.SGD, lr=2e-3),
        "gradient_clip_norm": 5.0,
    }
    lattice = simplex_lattice(num_tasks=3, num_divisions=3)  # ten of them
    return {
        "MT2O, neighbours": (
            "data population mesh",
            lambda: MT2OModule(network(), preferences=lattice, transfer=NeighborTransfer(), backend="loop", **common),
        ),
        "MT2O, distances": (
            "data population mesh",
            lambda: MT2OModule(network(), preferences=lattice, transfer=DistanceTransfer(), backend="loop", **common),
        ),
        "population of EPO": (
            "data population",
            lambda: GradientPopulationModule(
                network(), preferences=lattice, weighting=EPO(), backend="loop", init="common", **common
            ),
        ),
        "task groups": ("data", lambda: TaskGroupModule(network(), grouping=Exemplars(), warmup_batches=4, **common)),
        "weighted, uncertainty": ("data", lambda: WeightedModule(network(), weighting=Uncertainty(), **common)),
        "gradients, UPGrad": ("data", lambda: GradientModule(network(), aggregator=UPGrad(), **common)),
        "Pareto set, COSMOS network": (
            "data",
            lambda: ParetoSetModule(PreferenceConcatenation(network(more=3)), preferences=lattice, **common),
        ),
    }


class Keep(Callback):
    """Writes the parameters of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them."""
        state = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


def train(make: Callable[[], LightningModule], parallel: str) -> list[Tensor]:
    """Return the parameters of each process at the end."""
    started: dict[str, Any] = {
        "process_group_backend": "gloo",
        "start_method": "fork",
        "timeout": timedelta(seconds=120),
    }
    strategies: dict[str, tuple[int, int, Callable[[], Any]]] = {
        "one": (1, 1, lambda: "auto"),
        "data": (2, 2, lambda: DDPStrategy(**started)),
        "population": (2, 1, lambda: PopulationParallelStrategy(**started)),
        "mesh": (4, 2, lambda: PopulationParallelStrategy(data_parallel_size=2, **started)),
    }
    processes, parts, strategy = strategies[parallel]
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=processes,
            strategy=strategy(),
            callbacks=[Keep(Path(folder))],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(make(), Split(parts))
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)]


def _torchjd_step(model: nn.Module, plain: MultiHeadNetwork, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    from torchjd.aggregation import MGDA
    from torchjd.autojac import jac_to_grad, mtl_backward

    inputs, targets = batch
    optimizer.zero_grad()
    features: list[Tensor] = []
    hook = plain.encoder.register_forward_hook(lambda *arguments: features.append(arguments[-1]))
    outputs = model(inputs)
    hook.remove()
    losses = [MaskedSquares()(outputs[name], targets[name]) for name in NAMES]
    mtl_backward(losses, features=features[0], parallel_chunk_size=1)
    jac_to_grad(list(plain.encoder.parameters()), MGDA())
    optimizer.step()


def _torchjd_process(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    plain = network()
    model: nn.Module = DistributedDataParallel(plain) if world_size > 1 else plain
    optimizer = torch.optim.SGD(plain.parameters(), lr=2e-3)
    for batch in Split(world_size):
        _torchjd_step(model, plain, batch, optimizer)
    torch.save(torch.cat([p.detach().flatten() for p in plain.parameters()]), Path(folder) / f"{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def torchjd(world_size: int) -> list[Tensor]:
    """Return what TorchJD's documented calls train in a plain loop, under DDP if there are several processes."""
    import socket

    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        torch.multiprocessing.start_processes(
            _torchjd_process, (world_size, port, folder), nprocs=world_size, start_method="fork"
        )
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]


def row(name: str, parallel: str, one: Tensor, found: list[Tensor]) -> dict[str, Any]:
    """Return the largest differences."""
    return {
        "module": name,
        "parallel": parallel,
        "processes": len(found),
        "between_processes": max(float((other - found[0]).abs().max()) for other in found),
        "from_one_process": max(float((other - one).abs().max()) for other in found),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Return a row for each module and kind of parallelism."""
    lines = ["| module | parallel | processes | between processes | from one process |", "|---|---|---|---|---|"]
    for run in runs:
        differences = f"{run['between_processes']:.1e} | {run['from_one_process']:.1e}"
        lines.append(f"| {run['module']} | {run['parallel']} | {run['processes']} | {differences} |")
    return "\n".join(lines)


def main() -> None:
    """Train everything, print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "equality.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    runs = []
    for name, (kinds, make) in modules().items():
        (one,) = train(make, "one")
        runs += [row(name, parallel, one, train(make, parallel)) for parallel in kinds.split()]
    (one,) = torchjd(1)
    runs.append(row("TorchJD 0.18, MGDA, under DDP", "data", one, torchjd(2)))
    save(
        arguments.output,
        {"command": "python benchmarks/equality.py", "machine": machine(), "steps": STEPS, "runs": runs},
    )
    print(table(runs))


if __name__ == "__main__":
    main()
