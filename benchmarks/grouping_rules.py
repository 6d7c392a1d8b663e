"""The exact search for exemplars beside affinity propagation: time per call, convergence and agreement.

python benchmarks/grouping_rules.py
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from record import machine, save

from mtl_lightning.grouping import AffinityPropagation, Exemplars

RESULTS = Path(__file__).parent / "results" / "grouping_rules.json"


def main() -> None:
    """Compare the two rules on random affinities with a unit diagonal, and print the table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for num_tasks in (4, 5, 7, 9, 11):
        exact, messages = Exemplars(), AffinityPropagation()
        times: tuple[list[float], list[float]] = ([], [])
        converged = agree = 0
        for _ in range(300):
            affinity = 2 * torch.rand(num_tasks, num_tasks, generator=generator, dtype=torch.float64) - 1
            affinity = ((affinity + affinity.T) / 2).fill_diagonal_(1.0)
            found = []
            for rule, seconds in zip((exact, messages), times, strict=True):
                began = time.perf_counter()
                found.append(rule(affinity))
                seconds.append(time.perf_counter() - began)
            converged += messages.converged
            agree += messages.converged and found[0] == found[1]
        rows.append(
            {
                "tasks": num_tasks,
                "exact_ms": 1e3 * statistics.median(times[0]),
                "messages_ms": 1e3 * statistics.median(times[1]),
                "converged": converged / 300,
                "agree": agree / converged,
            }
        )
    print("| tasks | exact, ms | messages, ms | messages converged | and agree |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['tasks']} | {row['exact_ms']:.2f} | {row['messages_ms']:.2f} | {row['converged']:.0%} "
            f"| {row['agree']:.0%} |"
        )
    save(RESULTS, {"machine": machine(), "matrices": 300, "rows": rows})


if __name__ == "__main__":
    main()
