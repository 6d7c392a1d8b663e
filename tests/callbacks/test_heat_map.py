from __future__ import annotations

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from mtl_lightning.callbacks.heat_map import heat_map
from mtl_lightning.callbacks.output import draw


def _draw(matrix: np.ndarray, limits: tuple[float, float] | None = None) -> Figure:
    names = [f"task{index}" for index in range(len(matrix))]
    return heat_map(matrix, names, title="title", labels=("from", "to"), value="value", limits=limits)


@pytest.mark.parametrize(
    ("matrix", "top"),
    [([[9.0, -0.5], [0.25, 7.0]], 0.5), ([[9.0, 0.0], [0.0, -7.0]], 9.0), ([[0.0, 0.0], [np.nan, 0.0]], 1.0)],
)
def test_colours_are_symmetric_about_zero_and_spread_off_the_diagonal(matrix: list[list[float]], top: float) -> None:
    image = _draw(np.array(matrix)).axes[0].images[0]
    assert image.get_clim() == (-top, top)


def test_given_limits_hold() -> None:
    assert _draw(np.eye(2), limits=(0.0, 2.0)).axes[0].images[0].get_clim() == (0.0, 2.0)


def test_cells_hold_their_numbers_unless_there_are_none() -> None:
    axes = _draw(np.array([[1.0, np.nan], [-0.123, 0.0]])).axes[0]
    cells = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "1", (0, 1): "-0.12", (1, 1): "0"}


@pytest.mark.parametrize(("num_tasks", "count"), [(12, 144), (13, 0)])
def test_numbers_too_small_to_read_are_left_out(num_tasks: int, count: int) -> None:
    assert len(_draw(np.ones((num_tasks, num_tasks))).axes[0].texts) == count


def test_rows_and_columns_are_named() -> None:
    axes = _draw(np.eye(2)).axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("from", "to")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["task0", "task1"]


def test_long_names_leave_room_for_the_picture() -> None:
    names = [f"{letter * 60}_{letter}" for letter in "abcd"]
    figure = heat_map(np.eye(4), names, title="title", labels=("from", "to"), value="value")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that does not fit
        draw(figure)
    assert figure.axes[0].get_position().width > 0.3
