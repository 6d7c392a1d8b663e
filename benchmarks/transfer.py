"""What a transfer of parameters costs beside a step of the population.

A step and a transfer run in turn, round after round, in one process; a share is of two times of the same round. The
limit beside them is the time of one large copy of as many bytes as the parameters have: each is read and written once.

    python benchmarks/transfer.py
    python benchmarks/transfer.py --device cuda
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from population_step import Problem, population, problems, synchronize
from record import machine, save
from torch import Tensor

from mtl_lightning.mixing import Mixing
from mtl_lightning.population import Population
from mtl_lightning.population_shards import Shards

OUTPUT = Path(__file__).parent / "results" / "transfer.json"


def matrices(size: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return transfer matrices with those who give in them; ``None`` for all."""
    near = (torch.arange(size)[:, None] - torch.arange(size)).abs() <= 1
    neighbours = near / near.sum(dim=1, keepdim=True)
    everyone = torch.softmax(torch.randn(size, size), dim=1)
    return {"two neighbours": (neighbours.to(device), near), "everyone": (everyone.to(device), None)}


def transfer(networks: Population, matrix: Tensor, givers: Tensor | None, is_in_place: bool) -> Callable[[], None]:
    """Return one transfer, as ``MT2OModule`` does it: in place, unless the optimiser reads the parameters."""
    mixing = Mixing(networks, Shards(networks.size), givers)
    healthy = torch.ones(networks.size, dtype=torch.bool, device=matrix.device)

    def call() -> None:
        mixing.start()
        rows = mixing.receive()
        if is_in_place:
            mixing.mix(rows, matrix, healthy)
        else:
            mixing.add(mixing.step(rows, matrix, healthy))
        mixing.mix_buffers(matrix, healthy)

    return call


def one_by_one(networks: Population, matrix: Tensor) -> Callable[[], None]:
    """Return the same transfer among separate networks, tensor by tensor."""
    members = [networks.member(index) for index in range(networks.size)]
    parameters = [list(member.parameters()) for member in members]
    weights = matrix.tolist()

    @torch.no_grad()
    def call() -> None:
        mixed = [
            [
                sum((weight * some[place] for weight, some in zip(row, parameters, strict=True) if weight), 0.0 * own)
                for place, own in enumerate(parameters[index])
            ]
            for index, row in enumerate(weights)
        ]
        for some, new in zip(parameters, mixed, strict=True):
            for parameter, value in zip(some, new, strict=True):
                parameter.copy_(value)

    return call


def _copy(source: Tensor, destination: Tensor) -> None:
    destination.copy_(source)


def rows_of(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each kind of transfer in a problem."""
    device = problem.inputs.device
    networks = Population(problem.network, problem.size)
    steps = {backend: population(problem, backend) for backend in ("loop", "vmap")}
    calls: dict[str, Callable[[], None]] = {}
    for name, (matrix, givers) in matrices(problem.size, device).items():
        calls[name] = transfer(networks, matrix, givers, is_in_place=True)
        calls[f"{name}, added after the step"] = transfer(networks, matrix, givers, is_in_place=False)
        calls[f"{name}, separate networks"] = one_by_one(networks, matrix)
    other = torch.empty_like(networks.theta.data)
    calls["limit"] = partial(_copy, networks.theta.data, other)
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, *calls)}
    for number in range(rounds + 1):
        for name, call in {**steps, **calls}.items():
            repeats = 1 if name in steps or "separate" in name else 10
            call()
            synchronize(device)
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            synchronize(device)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / repeats)
    fastest = min(steps, key=lambda name: statistics.median(seconds[name]))
    rows = []
    for name in calls:
        shares = [own / step for own, step in zip(seconds[name], seconds[fastest], strict=True)]
        low, _, high = statistics.quantiles(shares, n=4)
        rows.append(
            {
                "problem": problem.name,
                "size": problem.size,
                "parameters": networks.num_parameters,
                "backend": fastest,
                "step_milliseconds": 1e3 * statistics.median(seconds[fastest]),
                "transfer": name,
                "milliseconds": 1e3 * statistics.median(seconds[name]),
                "share": [statistics.median(shares), low, high],
            }
        )
    return rows


def table(runs: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| network | P | step, ms | transfer | ms | share of a step | quartiles |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in runs:
        share, low, high = row["share"]
        lines.append(
            f"| {row['problem']} | {row['size']} | {row['step_milliseconds']:.1f} ({row['backend']}) "
            f"| {row['transfer']} | {row['milliseconds']:.3f} | {share:.1%} | {low:.1%} to {high:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Time all transfers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--networks", nargs="+", default=["mlp", "lenet", "resnet", "vit"])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    runs: list[dict[str, Any]] = []
    for make in problems(torch.device(options.device), options.networks):
        runs += rows_of(make(), options.rounds)
        sys.stderr.write(f"{runs[-1]['problem']}, P = {runs[-1]['size']}: done\n")
    print(table(runs))
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    save(options.output, {"machine": machine(), "settings": settings, "runs": runs})


if __name__ == "__main__":
    main()
