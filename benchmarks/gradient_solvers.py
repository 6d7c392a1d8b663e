"""Milliseconds from a Gramian to the weights of the tasks: ours, TorchJD's where it runs, and the gradients themselves.

python benchmarks/gradient_solvers.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import machine, save
from torch import Tensor, nn
from torchjd import aggregation as torchjd

from mtl_lightning.aggregation import IMTLG, MGDA, AlignedMTL, PCGrad, UPGrad
from mtl_lightning.cagrad import CAGrad
from mtl_lightning.nash import NashMTL
from mtl_lightning.torchjd import ActiveSetProjector

RESULTS = Path(__file__).parent / "results" / "gradient_solvers.json"
TASKS = (2, 3, 11, 40)
REPETITIONS = 40
METHODS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "MGDA": (MGDA, torchjd.MGDAWeighting),
    "UPGrad": (UPGrad, torchjd.UPGradWeighting),
    "UPGrad with our projector": (UPGrad, lambda: torchjd.UPGradWeighting(projector=ActiveSetProjector())),
    "PCGrad": (PCGrad, torchjd.PCGradWeighting),
    "IMTLG": (IMTLG, torchjd.IMTLGWeighting),
    "AlignedMTL": (AlignedMTL, torchjd.AlignedMTLWeighting),
    "CAGrad": (CAGrad, lambda: torchjd.CAGradWeighting(c=0.5)),
    "NashMTL": (NashMTL, lambda: torchjd.NashMTL(n_tasks=2)),
}


def gramians(num_tasks: int, size: int) -> list[Tensor]:
    """Return the Gramians of random gradients."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(REPETITIONS, num_tasks, size, generator=generator, dtype=torch.float64)
    return list(rows @ rows.mT)


def milliseconds(function: Callable[[Any], Any], arguments: list[Any]) -> float:
    """Return the shortest time of a call: what else runs on a machine only adds to it."""
    function(arguments[0])
    times = []
    for argument in arguments:
        began = time.perf_counter()
        function(argument)
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def gradients_of_a_small_model(num_tasks: int) -> float:
    """Return the time of one forward pass and the gradients of all tasks, LeNet with 31 thousand shared parameters."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Conv2d(1, 10, 9), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(10, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    )
    trunk.append(nn.Sequential(nn.Linear(500, 50), nn.ReLU()))
    heads = nn.ModuleList(nn.Linear(50, 10) for _ in range(num_tasks))
    inputs, target = torch.randn(64, 1, 36, 36), torch.randint(10, (64,))
    parameters = list(trunk.parameters())

    def differentiate(_: Any) -> None:
        features = trunk(inputs)
        for head in heads:
            torch.autograd.grad(nn.functional.cross_entropy(head(features), target), parameters, retain_graph=True)

    return milliseconds(differentiate, [None] * 7)


def main() -> None:
    """Time every method on gradients of 2000 dimensions and of about half as many as tasks, and print the table."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for num_tasks in TASKS:
        settings = {"many": 2000, "few": num_tasks // 2 + 1}
        for name, (ours, theirs) in METHODS.items():
            aggregator = ours()
            aggregator.resolve([str(task) for task in range(num_tasks)])
            row: dict[str, Any] = {"tasks": num_tasks, "method": name}
            for setting, size in settings.items():
                row[f"ours_{setting}_ms"] = milliseconds(aggregator.weights, gramians(num_tasks, size))
                try:
                    row[f"torchjd_{setting}_ms"] = milliseconds(theirs(), gramians(num_tasks, size))
                except ImportError:  # a solver under the GPL, or one that is not installed
                    row[f"torchjd_{setting}_ms"] = None
            rows.append(row)
        rows.append({"tasks": num_tasks, "method": "gradients", "ours_many_ms": gradients_of_a_small_model(num_tasks)})
    keys = ("ours_many_ms", "torchjd_many_ms", "ours_few_ms", "torchjd_few_ms")
    print("| tasks | method | ours | TorchJD | ours, many conflicts | TorchJD, many conflicts |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = ("-" if row.get(key) is None else f"{row[key]:.2f}" for key in keys)
        print(f"| {row['tasks']} | {row['method']} | {' | '.join(cells)} |")
    save(RESULTS, {"machine": machine(), "repetitions": REPETITIONS, "runs": rows})


if __name__ == "__main__":
    main()
