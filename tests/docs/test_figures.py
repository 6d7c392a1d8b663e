"""What the page on concepts says of its figures."""

from __future__ import annotations

import torch

from docs.figures.concepts import FIGURES, FOLDER, affinity_figure, front_figure, train, transfer_figure, two_clusters
from mtl_lightning.callbacks.output import draw
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.problems import Fonseca
from mtl_lightning.scalarization import Linear, SmoothChebyshev

PREFERENCES = simplex_lattice(num_tasks=2, num_divisions=10)


def test_on_a_concave_front_the_weighted_sum_ends_at_the_ends() -> None:
    found = train(Fonseca(), Linear(), PREFERENCES, steps=600)[-1]
    assert bool((found.min(dim=1).values < 0.02).all())


def test_on_a_concave_front_chebyshev_finds_points_in_between() -> None:
    problem = Fonseca()
    found = train(problem, SmoothChebyshev(mu=0.02), PREFERENCES, steps=600)[-1]
    assert bool((found[1:-1] > 0.02).all())
    distances = torch.cdist(found, problem.front(500)).min(dim=1).values
    assert bool((distances < 0.02).all())


def test_the_two_clusters_are_the_groups() -> None:
    matrix, groups = two_clusters()
    assert groups == [[0, 1, 2], [3, 4, 5]]
    assert bool((matrix[:3, :3] > 0).all())
    assert bool((matrix[:3, 3:] < 0).all())


def test_figures_are_drawn_and_kept() -> None:
    for figure in (front_figure, transfer_figure, affinity_figure):
        picture = draw(figure())
        assert picture.std() > 0
    assert {path.stem for path in FOLDER.glob("*.png")} == set(FIGURES)
