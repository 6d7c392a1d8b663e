"""Are two planted clusters of tasks found? The correct attribution of affinities beside the published one.

Tasks of a cluster pull the shared parameters to the same place, the two clusters to opposite ones, with noise in every
batch; each task also has a parameter of its own. Loss ``k`` is ``(|s - c_k - n_k|^2 + (a_k - y_k - m_k)^2 + 0.2) / 2``.

    python benchmarks/planted_clusters.py --seeds 100
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from record import machine, save
from torch import Tensor

from mtl_lightning.affinity import Attribution, ProximalAffinity
from mtl_lightning.group_updates import GroupUpdates
from mtl_lightning.grouping import AffinityPropagation, Exemplars, GroupingRule

RESULTS = Path(__file__).parent / "results" / "planted_clusters.json"


@dataclass(frozen=True)
class Found:
    """What one run found: whether the last partition is the planted one, and how often pairs were together."""

    recovered: bool
    within: float
    across: float


def run(
    seed: int,
    attribution: Attribution,
    *,
    num_tasks: int = 4,
    rule: GroupingRule | None = None,
    batches: int = 100,
    warmup: int = 50,
    noise: float = 0.3,
) -> Found:
    """Return what is found with ``num_tasks`` tasks in two clusters of equal size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sign = torch.tensor([1.0] * (num_tasks // 2) + [-1.0] * (num_tasks // 2), dtype=torch.float64)
    order = torch.randperm(num_tasks, generator=generator)
    sign = sign[order]
    direction = draw(8)
    centers = sign[:, None] * direction / direction.norm() + 0.2 * draw(num_tasks, 8)
    shared, own, goals = draw(8), torch.zeros(num_tasks, dtype=torch.float64), draw(num_tasks)
    updates = GroupUpdates(
        Exemplars() if rule is None else rule,
        ProximalAffinity(num_tasks, decay=0.05, attribution=attribution),
        warmup_batches=warmup,
    )
    together = torch.zeros(num_tasks, num_tasks)
    for batch in range(batches):
        targets, values = centers + noise * draw(num_tasks, 8), goals + noise * draw(num_tasks)
        for group in updates.begin(batch, seed):
            away, off = shared - targets, own - values
            updates.observe(group, (away.square().sum(dim=1) + off.square()) / 2 + 0.1)
            shared = shared - 0.1 * away[group].sum(dim=0)
            own[group] -= 0.1 * off[group]
        if batch >= warmup:
            for group in updates.partition:
                together[torch.tensor(group)[:, None], torch.tensor(group)] += 1 / (batches - warmup)
    same = sign[:, None] == sign
    planted = sorted(torch.nonzero(sign == value).flatten().tolist() for value in (1.0, -1.0))
    return Found(
        recovered=updates.partition == planted,
        within=float(together[same & ~torch.eye(num_tasks, dtype=torch.bool)].mean()),
        across=float(together[~same].mean()),
    )


def main() -> None:
    """Run all settings and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    rows = []
    for num_tasks in (4, 6):
        for name, rule in (("exact", Exemplars), ("messages", AffinityPropagation)):
            for attribution in get_args(Attribution):
                found = [run(seed, attribution, num_tasks=num_tasks, rule=rule()) for seed in range(seeds)]
                rows.append(
                    {
                        "tasks": num_tasks,
                        "search": name,
                        "attribution": attribution,
                        "recovered": sum(one.recovered for one in found) / seeds,
                        "within": sum(one.within for one in found) / seeds,
                        "across": sum(one.across for one in found) / seeds,
                    }
                )
    print("| tasks | search | attribution | recovered | together within | together across |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['tasks']} | {row['search']} | {row['attribution']} | {row['recovered']:.0%} | {row['within']:.2f} "
            f"| {row['across']:.2f} |"
        )
    save(RESULTS, {"machine": machine(), "seeds": seeds, "rows": rows})


if __name__ == "__main__":
    main()
