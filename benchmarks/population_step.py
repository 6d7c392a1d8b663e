"""The step of a population: forward, backward and optimiser of P networks on one batch, two losses and more each.

All variants run in turn, round after round, in one process; a ratio is of two times of the same round. The limit beside
them is what the machine needs for the floating-point operations at the speed of a large matrix product, and for the
bytes that optimiser and parameters move at the speed of a large copy, both measured in the same run.

    python benchmarks/population_step.py
    python benchmarks/population_step.py --device cuda
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import logging
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from lightning.pytorch import Callback, Trainer
from record import machine, save
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils.flop_counter import FlopCounterMode

from mtl_lightning.modules import MT2OModule
from mtl_lightning.networks import MLP, LeNetEncoder, MultiHeadNetwork, VisionTransformerEncoder
from mtl_lightning.population import Population
from mtl_lightning.preferences import simplex_sample
from mtl_lightning.task import Task
from mtl_lightning.transfer import NoTransfer

OUTPUT = Path(__file__).parent / "results" / "population_step.json"
LOOP, FUSED = "P models, P optimisers", "P models, one fused optimiser"
MODULE = "`MT2OModule` in a `Trainer`"


class Problem(NamedTuple):
    """A network, a batch and how many copies are trained."""

    name: str
    network: nn.Module
    inputs: Tensor
    targets: dict[str, Tensor]
    size: int

    @property
    def preferences(self) -> Tensor:
        """One row per subproblem."""
        generator = torch.Generator().manual_seed(0)
        return simplex_sample(len(self.targets), self.size, generator=generator).to(self.inputs.device)


def problems(device: torch.device, chosen: list[str]) -> list[Callable[[], Problem]]:
    """Return how to make the problems."""

    def problem(name: str, encoder: nn.Module, width: int, inputs: Tensor, heads: int, size: int) -> Problem:
        network = MultiHeadNetwork(encoder, {f"task{k}": nn.Linear(width, 1) for k in range(heads)})
        targets = {f"task{k}": torch.randn(len(inputs), 1, device=device) for k in range(heads)}
        return Problem(name, network.to(device), inputs.to(device), targets, size)

    def mlp(size: int, heads: int, batch: int) -> Problem:
        return problem(
            f"MLP, {heads} heads, batch {batch}", MLP(32, [128, 128]), 128, torch.randn(batch, 32), heads, size
        )

    def lenet(size: int) -> Problem:
        encoder = LeNetEncoder(in_channels=1)
        return problem("LeNet, 2 heads, batch 64", encoder, encoder.out_features, torch.randn(64, 1, 36, 36), 2, size)

    def resnet(size: int, batch: int) -> Problem:
        encoder: Any = torchvision.models.resnet18(num_classes=64)
        return problem(f"ResNet-18, 2 heads, batch {batch}", encoder, 64, torch.randn(batch, 3, 32, 32), 2, size)

    def vit(size: int) -> Problem:
        encoder = VisionTransformerEncoder(64, 8, in_channels=3, width=64, depth=4, num_heads=4)
        return problem("ViT, 2 heads, batch 64", encoder, 64, torch.randn(64, 3, 64, 64), 2, size)

    every: dict[str, list[Callable[[], Problem]]] = {
        "mlp": [partial(mlp, 5, 3, 128), partial(mlp, 25, 3, 128), partial(mlp, 25, 8, 256)],
        "lenet": [partial(lenet, 5), partial(lenet, 25)],
        "resnet": [partial(resnet, 5, 16), partial(resnet, 5, 128)],
        "vit": [partial(vit, 5)],
    }
    return [make for name in chosen for make in every[name]]


def losses_of(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Return the losses of one network, shape ``(T,)``."""
    return torch.stack([(outputs[name] - target).square().mean() for name, target in targets.items()])


def loop(problem: Problem, is_fused: bool) -> Callable[[], None]:
    """Return the step of P separate networks, one after another."""
    networks = [copy.deepcopy(problem.network) for _ in range(problem.size)]
    preferences = problem.preferences
    adam = partial(torch.optim.Adam, lr=1e-3)
    if is_fused:
        optimizers = [adam([p for network in networks for p in network.parameters()], fused=True)]
    else:
        optimizers = [adam(network.parameters()) for network in networks]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        for network, preference in zip(networks, preferences, strict=True):
            (losses_of(network(problem.inputs), problem.targets) * preference).sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def torch_func(problem: Problem, chunk_size: int | None = None) -> Callable[[], None]:
    """Return the step as torch's guide on ensembles has it: stacked parameters, ``functional_call`` under vmap."""
    networks = [copy.deepcopy(problem.network) for _ in range(problem.size)]
    parameters, buffers = stack_module_state(networks)
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-3, fused=True)
    base, preferences = copy.deepcopy(problem.network).to("meta"), problem.preferences

    def one(parameters: Any, buffers: Any) -> Tensor:
        return losses_of(functional_call(base, (parameters, buffers), (problem.inputs,)), problem.targets)

    def step() -> None:
        optimizer.zero_grad()
        losses = torch.vmap(one, randomness="different", chunk_size=chunk_size)(parameters, buffers)
        (losses * preferences).sum().backward()
        optimizer.step()

    return step


def population(problem: Problem, backend: Any, chunk_size: int | None = None) -> Callable[[], None]:
    """Return the step of a ``Population``."""
    networks = Population(problem.network, problem.size, backend=backend, chunk_size=chunk_size)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3, fused=True)
    preferences = problem.preferences

    def step() -> None:
        for chunk in networks.chunks():
            losses = chunk.evaluate(losses_of, problem.inputs, problem.targets)
            (losses * preferences[chunk.members]).sum().backward()
        optimizer.step()
        networks.theta.grad = None

    return step


class _Clock(Callback):
    """Takes the time of batches, without those of the first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        synchronize(self.device)
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self._began)


class _Repeated(torch.utils.data.Dataset[Any]):
    """The same batch again and again."""

    def __init__(self, batch: Any, length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.batch


class InTrainer:
    """Batches of the module in a trainer, logging and all, in the backend that it has picked."""

    def __init__(self, problem: Problem, **arguments: Any) -> None:
        self.problem = problem
        self.module = MT2OModule(
            network=problem.network,
            tasks=[Task(name, nn.MSELoss()) for name in problem.targets],
            preferences=problem.preferences.cpu().double().div(problem.preferences.cpu().double().sum(1, keepdim=True)),
            optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
            **arguments,
        )

    def seconds(self, batches: int) -> list[float]:
        """Return the seconds of some batches; the first ones, in which the backend is picked, are left out."""
        device = self.problem.inputs.device
        clock = _Clock(device)
        data = _Repeated(
            (self.problem.inputs.cpu(), {k: v.cpu() for k, v in self.problem.targets.items()}), batches + 2
        )
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.module, torch.utils.data.DataLoader(data, batch_size=None))
        return clock.seconds[2:]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def variants(problem: Problem) -> dict[str, Callable[[], Callable[[], None]]]:
    """Return how to make the steps that are compared."""
    steps = {
        LOOP: partial(loop, problem, is_fused=False),
        FUSED: partial(loop, problem, is_fused=True),
        "`torch.func` under vmap": partial(torch_func, problem),
        "`Population`, loop": partial(population, problem, "loop"),
        "`Population`, vmap": partial(population, problem, "vmap"),
    }
    if problem.size > 5:
        steps["`torch.func`, `vmap(chunk_size=5)`"] = partial(torch_func, problem, 5)
        steps["`Population`, vmap, `chunk_size=5`"] = partial(population, problem, "vmap", 5)
    return steps


def timed(problem: Problem, rounds: int) -> tuple[dict[str, list[float]], str]:
    """Return the seconds of a step of every variant in every round, and the backend that the module has picked."""
    steps = {name: make() for name, make in variants(problem).items()}
    modules = {
        MODULE: InTrainer(problem, transfer=NoTransfer()),
        f"{MODULE}, with transfer": InTrainer(problem),
    }
    device = problem.inputs.device
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, *modules)}
    for step in steps.values():
        step()
    began = time.perf_counter()
    steps[LOOP]()
    synchronize(device)
    repeats = max(1, min(20, int(0.1 / (time.perf_counter() - began))))
    for number in range(rounds + 1):
        for name, step in steps.items():
            step()  # what the variant before has left in the caches is not counted
            synchronize(device)
            began = time.perf_counter()
            for _ in range(repeats):
                step()
            synchronize(device)
            seconds[name].append((time.perf_counter() - began) / repeats)
        for name, module in modules.items():
            seconds[name].append(statistics.median(module.seconds(max(3, repeats))))
        if number == 0:  # the first round warms up
            for values in seconds.values():
                values.clear()
    return seconds, modules[MODULE].module.population.active_backend


def choosing(problem: Problem) -> dict[str, Any]:
    """Return what ``backend="auto"`` picks on a new population, and how long it takes for that, once."""
    networks = Population(problem.network, problem.size, backend="auto")
    began = time.perf_counter()
    backend = networks.choose_backend(losses_of, problem.inputs, problem.targets)
    synchronize(problem.inputs.device)
    return {
        "problem": problem.name,
        "size": problem.size,
        "variant": f'`backend="auto"` picks {backend}, once',
        "milliseconds": 1e3 * (time.perf_counter() - began),
    }


def peak_memory(problem: Problem, name: str) -> float:
    """Return by how many MiB a step exceeds the memory of the state; on a CPU in a process of its own."""
    device = problem.inputs.device
    if device.type == "cuda":
        step = variants(problem)[name]()
        step()
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_rise_of_resident_memory, (problem, name))


def _rise_of_resident_memory(problem: Problem, name: str) -> float:
    torch.set_num_threads(1)  # threads do not survive a fork; the memory is the same
    step = variants(problem)[name]()
    step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def limits(problem: Problem) -> dict[str, float]:
    """Return what a step has to compute and to move, and how long this machine takes for it at best."""
    network = copy.deepcopy(problem.network)
    with FlopCounterMode(display=False) as counter:
        losses_of(network(problem.inputs), problem.targets).sum().backward()
    operations = counter.get_total_flops() * problem.size
    numbers = sum(parameter.numel() for parameter in network.parameters()) * problem.size
    # Parameters are read forward and backward; a gradient is written once and read once; Adam reads and writes the
    # parameter and two moments.
    moved = 4 * numbers * (2 + 2 + 6)
    device = problem.inputs.device
    speed, bandwidth = _speed(device), _bandwidth(device)
    return {
        "gigaflop": operations / 1e9,
        "mebibytes": moved / 2**20,
        "gigaflops": speed / 1e9,
        "gigabytes_per_second": bandwidth / 1e9,
        "milliseconds": 1e3 * (operations / speed + moved / bandwidth),
    }


def _best(function: Callable[[], Any], device: torch.device) -> float:
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def _speed(device: torch.device, size: int = 1536) -> float:
    left, right = torch.randn(2, size, size, device=device).unbind()
    return 2 * size**3 / _best(lambda: left @ right, device)


def _bandwidth(device: torch.device, size: int = 32 * 2**20) -> float:
    source, destination = torch.randn(2, size, device=device).unbind()
    return 2 * 4 * size / _best(lambda: destination.copy_(source), device)


def rows_of(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each variant of a problem."""
    limit = limits(problem)
    seconds, backend = timed(problem, rounds)
    rows = []
    for name, values in seconds.items():
        row: dict[str, Any] = {
            "problem": problem.name,
            "size": problem.size,
            "variant": f"{name} ({backend})" if name.startswith(MODULE) else name,
            "milliseconds": 1e3 * statistics.median(values),
        }
        for other in (LOOP, FUSED):
            ratios = [base / value for base, value in zip(seconds[other], values, strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            row[f"faster than {other}"] = [statistics.median(ratios), low, high]
        row["limit"] = limit
        if not name.startswith(MODULE) and Path("/proc/self/clear_refs").exists():
            row["mebibytes"] = peak_memory(problem, name)
        rows.append(row)
    best = min(row["milliseconds"] for row in rows if row["variant"].startswith("`Population`"))
    return [*rows, {**(choice := choosing(problem)), "steps": choice["milliseconds"] / best, "limit": limit}]


def table(runs: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| network | P | step of | ms | limit, ms | as fast as P optimisers, times | as one fused | MiB above state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in runs:
        if "steps" in row:
            took = f"as long as {row['steps']:.1f} steps"
            lines.append(
                f"| {row['problem']} | {row['size']} | {row['variant']} | {row['milliseconds']:.1f} |  | {took} |  |  |"
            )
            continue
        ratios = [
            f"{median:.2f} ({low:.2f} to {high:.2f})"
            for median, low, high in (row[f"faster than {LOOP}"], row[f"faster than {FUSED}"])
        ]
        memory = f"{row['mebibytes']:.0f}" if "mebibytes" in row else ""
        lines.append(
            f"| {row['problem']} | {row['size']} | {row['variant']} | {row['milliseconds']:.1f} "
            f"| {row['limit']['milliseconds']:.1f} | {ratios[0]} | {ratios[1]} | {memory} |"
        )
    return "\n".join(lines)


def headline(runs: list[dict[str, Any]]) -> str:
    """Return the step of 25 subproblems as Markdown, without what is of interest to few."""
    lines = [
        "| a step of 25 networks | variant | ms | times as fast as 25 models with 25 optimisers |",
        "|---|---|---|---|",
    ]
    for row in runs:
        name = row["variant"]
        if row["size"] != 25 or "steps" in row or "chunk_size" in name or "transfer" in name or name == LOOP:
            continue
        lines.append(f"| {row['problem']} | {name} | {row['milliseconds']:.1f} | {row[f'faster than {LOOP}'][0]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Time all variants of all problems and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--networks", nargs="+", default=["mlp", "lenet", "resnet", "vit"])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    runs: list[dict[str, Any]] = []
    for make in problems(torch.device(options.device), options.networks):
        runs += rows_of(make(), options.rounds)
        sys.stderr.write(f"{runs[-1]['problem']}, P = {runs[-1]['size']}: done\n")
    print(table(runs))
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    save(options.output, {"machine": machine(), "settings": settings, "runs": runs})


if __name__ == "__main__":
    main()
