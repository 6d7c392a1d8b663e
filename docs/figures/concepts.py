"""The figures of the page on concepts, from problems small enough to be known exactly.

python docs/figures/concepts.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from mtl_lightning.affinity import ProximalAffinity
from mtl_lightning.callbacks.heat_map import heat_map
from mtl_lightning.callbacks.output import draw, write_picture
from mtl_lightning.group_updates import GroupUpdates
from mtl_lightning.grouping import Exemplars
from mtl_lightning.pareto import hypervolume
from mtl_lightning.population import Population
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.problems import VLMOP1, Fonseca, Problem
from mtl_lightning.scalarization import Linear, Scalarization, SmoothChebyshev
from mtl_lightning.transfer import NeighborTransfer, TransferContext

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).parents[1] / "images" / "concepts"
INK, GREY = "#3C4048", "#B4B9C1"
TASKS = ("a1", "a2", "a3", "b1", "b2", "b3")


def train(problem: Problem, scalarization: Scalarization, preferences: Tensor, steps: int = 1500) -> Tensor:
    """Return the objectives of each model before each step and after the last, shape ``(steps + 1, P, T)``.

    Every model starts at a random point of its own, and is trained for one preference, without transfer.
    """
    torch.manual_seed(0)
    population = Population(problem, len(preferences), init="independent", backend="vmap")
    optimizer = torch.optim.Adam(population.parameters(), lr=5e-3)
    course = []
    for _ in range(steps):
        outputs = population(torch.zeros(1, 1))
        losses = torch.cat([outputs[name] for name in problem.task_names], dim=1)
        course.append(losses.detach())
        optimizer.zero_grad()
        scalarization(losses, preferences).sum().backward()
        optimizer.step()
    outputs = population(torch.zeros(1, 1))
    return torch.stack([*course, torch.cat([outputs[name] for name in problem.task_names], dim=1).detach()])


def two_clusters(batches: int = 100, seed: int = 0) -> tuple[Tensor, list[list[int]]]:
    """Return the affinity of six tasks, three of which pull the shared parameters one way and three the other; groups.

    The affinity has the shape ``(6, 6)``, from row to column.
    """
    generator = torch.Generator().manual_seed(seed)
    draw_normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    direction = draw_normal(8)
    sign = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    centers = sign[:, None] * direction / direction.norm() + 0.2 * draw_normal(6, 8)
    shared, own, goals = draw_normal(8), torch.zeros(6, dtype=torch.float64), draw_normal(6)
    updates = GroupUpdates(Exemplars(), ProximalAffinity(6, decay=0.05), warmup_batches=batches // 2)
    for batch in range(batches):
        targets, values = centers + 0.3 * draw_normal(6, 8), goals + 0.3 * draw_normal(6)
        for group in updates.begin(batch, seed):
            away, off = shared - targets, own - values
            updates.observe(group, (away.square().sum(dim=1) + off.square()) / 2 + 0.1)
            shared = shared - 0.1 * away[group].sum(dim=0)
            own[group] -= 0.1 * off[group]
    return updates.affinity.matrix, updates.partition


def _panel(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel("loss of task 1")
    axes.set_ylabel("loss of task 2")
    axes.spines[["top", "right"]].set_visible(False)


def _new(num_panels: int) -> tuple[Figure, list[Axes]]:
    rows = num_panels // 2
    # White in dark pages, too: the colours are chosen for it.
    figure = Figure(figsize=(7.2, 3.3 * rows), dpi=130, layout="constrained", facecolor="white")
    return figure, [figure.add_subplot(rows, 2, panel + 1) for panel in range(num_panels)]


def front_figure() -> Figure:
    """Return what a front is: a point, what it dominates, and the hypervolume of a set."""
    problem = VLMOP1()
    points = problem.front(5)[1:-1]
    reference = torch.tensor([4.0, 4.0])
    curve = problem.front(200)
    figure, (left, right) = _new(2)
    _panel(left, "Pareto front")
    left.fill_between(curve[:, 0], curve[:, 1], 4.6, color=GREY, alpha=0.35, linewidth=0, label="reachable")
    left.plot(*curve.T, color="#0072B2", linewidth=2.5, label="front")
    left.plot(2.2, 2.2, "o", color="#D55E00")
    left.annotate("dominated", (2.2, 2.2), xytext=(2.35, 2.35), color="#D55E00", fontsize=9)
    left.plot(1.0, 1.0, "o", color="#0072B2")
    left.annotate("dominates it", (1.0, 1.0), xytext=(0.25, 0.3), color="#0072B2", fontsize=9)
    left.annotate("", (2.13, 2.13), xytext=(1.07, 1.07), arrowprops={"arrowstyle": "<-", "color": INK})
    left.set(xlim=(0, 4.6), ylim=(0, 4.6))
    left.legend(frameon=False, fontsize=9, loc="upper right")
    value = hypervolume(points, reference)
    _panel(right, f"hypervolume of three models: {value:.1f}")
    for first, second in points.tolist():
        right.fill_between([first, 4.0], second, 4.0, color="#0072B2", alpha=0.18, linewidth=0)
    right.plot(*points.T, "o", color="#0072B2")
    right.plot(*reference, "x", color=INK)
    right.annotate("reference point", (4.0, 4.0), xytext=(2.55, 4.15), color=INK, fontsize=9)
    right.set(xlim=(0, 4.6), ylim=(0, 4.6))
    return figure


def scalarization_figure() -> Figure:
    """Return what eleven preferences find on a convex and on a concave front, by two scalarisations."""
    preferences = simplex_lattice(num_tasks=2, num_divisions=10)
    figure, panels = _new(4)
    cases = [
        (VLMOP1(), Linear(), "convex front, weighted sum"),
        (VLMOP1(), SmoothChebyshev(mu=0.05), "convex front, smooth Chebyshev"),
        (Fonseca(), Linear(), "concave front, weighted sum"),
        (Fonseca(), SmoothChebyshev(mu=0.02), "concave front, smooth Chebyshev"),
    ]
    for axes, (problem, scalarization, title) in zip(panels, cases, strict=True):
        found = train(problem, scalarization, preferences)[-1]
        _panel(axes, title)
        axes.plot(*problem.front(300).T, color=GREY, linewidth=3, zorder=1)
        colours = colormaps["viridis"](preferences[:, 0].numpy())
        axes.scatter(found[:, 0], found[:, 1], c=colours, s=36, zorder=2, edgecolor="white", linewidth=0.6)
        for end, x, y in ((found[:, 0] < 0.01, 0.04, 0.82), (found[:, 1] < 0.01, 0.62, 0.07)):
            if end.sum() > 1:  # points that lie on each other
                axes.text(x, y, f"{int(end.sum())} models", transform=axes.transAxes, color=INK, fontsize=9)
    return figure


def population_figure() -> Figure:
    """Return the way of eleven models to a concave front, at four times."""
    preferences = simplex_lattice(num_tasks=2, num_divisions=10)
    problem = Fonseca()
    course = train(problem, SmoothChebyshev(mu=0.02), preferences)
    figure, panels = _new(4)
    for axes, step in zip(panels, (0, 30, 80, 1500), strict=True):
        value = hypervolume(course[step], torch.tensor(problem.reference_point))
        _panel(axes, f"step {step}, hypervolume {value:.2f}")
        axes.plot(*problem.front(300).T, color=GREY, linewidth=3, zorder=1)
        for index in range(len(preferences)):
            colour = colormaps["viridis"](float(preferences[index, 0]))
            axes.plot(*course[: step + 1, index].T, color=colour, linewidth=0.8, alpha=0.7, zorder=2)
            axes.plot(*course[step, index], "o", color=colour, markersize=5, zorder=3)
        axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    return figure


def transfer_figure() -> Figure:
    """Return the matrix of a transfer at the start and 200 transfers later."""
    preferences = simplex_lattice(num_tasks=2, num_divisions=6)
    rule = NeighborTransfer(strength=0.5, decay=0.99, num_neighbors=2)
    figure, panels = _new(2)
    for axes, step in zip(panels, (0, 200), strict=True):
        matrix = rule(TransferContext.of(preferences, step=step))
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.argwhere(matrix.numpy() > 0.005):
            value = float(matrix[row, column])
            colour = "white" if value > 0.6 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        names = [f"{value:.2f}" for value in preferences[:, 0].tolist()]
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("gives (preference for task 1)")
        axes.set_ylabel("receives")
        axes.set_title(f"after {step} transfers" if step else "first transfer", fontsize=10, color=INK)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


def affinity_figure() -> Figure:
    """Return the affinity of six tasks in two clusters, and the groups that the rule makes of it."""
    matrix, groups = two_clusters()
    listed = " | ".join(", ".join(TASKS[task] for task in group) for group in groups)
    return heat_map(matrix.numpy(), TASKS, f"groups: {listed}", ("a step for this task", "moves this task"), "affinity")


FIGURES = {
    "front": front_figure,
    "scalarization": scalarization_figure,
    "population": population_figure,
    "transfer": transfer_figure,
    "affinity": affinity_figure,
}


def main() -> None:
    """Write all figures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        write_picture(FOLDER / f"{name}.png", draw(figure()))


if __name__ == "__main__":
    main()
