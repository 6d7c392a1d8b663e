"""A matrix of pairs of tasks as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtl_lightning.palette import GRID, HELPS, HURTS, INK, on_white

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NUMBERS = 12  # of tasks; beyond it the numbers in the cells would be too small to read
_MOST_LETTERS = 24  # of a name; longer ones would leave no room for the picture


def heat_map(
    matrix: np.ndarray,
    names: Sequence[str],
    title: str,
    labels: tuple[str, str],
    value: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Return ``matrix``, shape ``(T, T)``, as a new ``matplotlib.figure.Figure``, which ``pyplot`` does not manage.

    Args:
        matrix: The values; NaN where there is none, which is drawn grey.
        names: The names of the ``T`` tasks; see :func:`short_names`.
        title: Above the picture.
        labels: What the rows and what the columns are.
        value: What the values are, beside the colour bar.
        limits: The values at both ends of the colours. By default symmetric about zero, up to the largest magnitude off
            the diagonal: what a task does to itself is often much more, and would leave no colour for the rest.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    num_tasks, names = len(names), short_names(names)
    finite = np.isfinite(matrix)
    if limits is None:
        others = np.abs(matrix[finite & ~np.eye(num_tasks, dtype=bool)])
        top = float(others.max(initial=0.0)) or float(np.abs(matrix[finite]).max(initial=0.0)) or 1.0
        limits = (-top, top)
    low, high = limits
    ends = ["white", on_white(HELPS)]  # without negative values there is nothing to tell apart
    stops = [on_white(HURTS), *ends] if low < 0 else ends
    colours = LinearSegmentedColormap.from_list("heat", stops).with_extremes(bad=GRID)

    size = 2.6 + 0.62 * min(max(num_tasks, 3), 20)
    figure = Figure(figsize=(size + 1.0, size), dpi=130, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    image = axes.imshow(np.where(finite, matrix, np.nan), cmap=colours, vmin=low, vmax=high)
    beyond = (bool((matrix[finite] < low).any()), bool((matrix[finite] > high).any()))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[beyond]
    bar = figure.colorbar(image, ax=axes, extend=extend, shrink=0.8)
    bar.set_label(value, labelpad=9)
    bar.outline.set_visible(False)
    if num_tasks <= _MOST_NUMBERS:
        for row, column in np.argwhere(finite):
            axes.text(
                column,
                row,
                f"{matrix[row, column]:.2g}",
                ha="center",
                va="center",
                fontsize=8,
                color=INK,
            )
    upright = max(map(len, names)) <= 9  # letters, else neighbours would overlap
    axes.set_xticks(range(num_tasks), names, rotation=0 if upright else 35, ha="center" if upright else "right")
    axes.set_yticks(range(num_tasks), names)
    axes.set_ylabel(labels[0])
    axes.set_xlabel(labels[1])
    axes.set_title(title, fontsize=10)
    axes.set_xticks(np.arange(num_tasks + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_tasks + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return figure


def short_names(names: Sequence[str]) -> list[str]:
    """Return ``names`` with dots in the place of the middle of those of more than 24 letters.

    Example:
        >>> short_names(["normal", "depth_of_the_scene_in_metres_along_the_ray"])
        ['normal', 'depth_of_th...ong_the_ray']
    """
    half = (_MOST_LETTERS - 2) // 2
    return [name if len(name) <= _MOST_LETTERS else f"{name[:half]}...{name[-half:]}" for name in names]
