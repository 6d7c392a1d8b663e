"""A contact sheet of a data module: samples with all their labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sample = tuple[Tensor, dict[str, Tensor]]

_MAP_SIZE = 1.6  # inches, like the next two
_LETTER_WIDTH, _LINE_HEIGHT = 0.075, 0.16  # at the size of the text
_FONT_SIZE = 8
_LONG_NAME = 8  # letters; where one over text has more, all of them are written upright


def preview_figure(datamodule: LightningDataModule, num_samples: int = 6, split: str = "train") -> Figure:
    """Return a figure with one row for each of the first samples and one column for the input and for each task.

    What is shown depends on the shape: maps of integers as classes, maps of one or two channels (the first) as a colour
    scale, maps of three channels as colours, and everything else as text, in a column as narrow as that. Scales are
    those of the whole sheet. Values that maps lack, NaN or -1, are hatched.

    Args:
        datamodule: Its batches are ``(inputs, {task: target})``. It is prepared and set up here.
        num_samples: The number of rows.
        split: ``"train"``, ``"val"`` or ``"test"``, as its loader gives it: augmented, if that loader augments.

    Raises:
        ValueError: If there is no such split, or a batch has another form.
    """
    from matplotlib.figure import Figure

    samples = list(_samples(datamodule, num_samples, split))
    columns = [("input", [inputs for inputs, _ in samples])]
    columns += [(name, [targets[name] for _, targets in samples]) for name in samples[0][1]]
    over_text = [name for name, cells in columns if len(name) > _letters(cells) and not _has_maps(cells)]
    longest = max(map(len, over_text), default=0)
    upright = over_text if longest > _LONG_NAME else []
    widths = [_width(cells, "" if name in upright else name) for name, cells in columns]
    height = max(_height(cells) for _, cells in columns) * len(samples)
    height += longest * _LETTER_WIDTH if upright else 2 * _LINE_HEIGHT
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    axes = figure.subplots(len(samples), len(columns), squeeze=False, width_ratios=widths)
    for column, (name, cells) in enumerate(columns):
        limits = _limits(cells)
        for row, cell in enumerate(cells):
            _draw(axes[row][column], cell, limits)
        axes[0][column].set_title(name, fontsize=_FONT_SIZE, rotation=90 if name in upright else 0)
    return figure


def write_preview(
    path: str | Path, datamodule: LightningDataModule, num_samples: int = 6, split: str = "train"
) -> Path:
    """Write :func:`preview_figure` as PNG to ``path``, and return where.

    Raises:
        ValueError: See :func:`preview_figure`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    preview_figure(datamodule, num_samples, split).savefig(path, format="png", dpi=100)
    return path


def _samples(datamodule: LightningDataModule, count: int, split: str) -> Iterator[Sample]:
    if split not in ("train", "val", "test"):
        raise ValueError(f"`split` should be 'train', 'val' or 'test'. Found {split!r}.")
    if count < 1:
        raise ValueError(f"`num_samples` should be at least 1. Found {count}.")
    datamodule.prepare_data()
    datamodule.setup("test" if split == "test" else "fit")
    loader = getattr(datamodule, f"{split}_dataloader")()
    found = 0
    for batch in loader or ():
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Mapping):
            raise ValueError(f"Batches should be `(inputs, {{task: target}})`. Found {type(batch).__name__}.")
        inputs, targets = batch
        for index in range(min(len(inputs), count - found)):
            yield inputs[index], {name: target[index] for name, target in targets.items()}
            found += 1
        if found == count:
            return
    if not found:
        raise ValueError(f"The split {split!r} should hold samples. Found none.")


def _width(cells: list[Tensor], title: str) -> float:
    return _MAP_SIZE if _has_maps(cells) else max(len(title), _letters(cells)) * _LETTER_WIDTH + 0.2


def _height(cells: list[Tensor]) -> float:
    lines = max(len(_text(cell).splitlines()) for cell in cells)
    return _MAP_SIZE if _has_maps(cells) else lines * _LINE_HEIGHT + 0.1


def _letters(cells: list[Tensor]) -> int:
    return max(len(line) for cell in cells for line in _text(cell).splitlines())


def _has_maps(cells: list[Tensor]) -> bool:
    return any(_is_map(cell) for cell in cells)


def _is_map(cell: Tensor) -> bool:
    has_planes = cell.ndim == 2 or (cell.ndim == 3 and cell.shape[0] in (1, 2, 3))
    return has_planes and min(cell.shape[-2:]) >= 4


def _limits(cells: list[Tensor]) -> tuple[float, float]:
    values = torch.cat([cell.flatten().float() for cell in cells])
    values = values[values.isfinite()]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _draw(axes: Any, cell: Tensor, limits: tuple[float, float]) -> None:
    if not _is_map(cell):
        axes.set_axis_off()
        axes.text(0.5, 0.5, _text(cell), ha="center", va="center", fontsize=_FONT_SIZE, transform=axes.transAxes)
        return
    axes.set_anchor("N")  # or names over pictures would not be level with those over text
    axes.set_xticks([])
    axes.set_yticks([])
    missing = cell.isnan() if cell.is_floating_point() else cell < 0
    if missing.ndim == 3:
        missing = missing.any(dim=0)
    axes.patch.set(hatch="////", edgecolor="0.6", facecolor="white")
    if not cell.is_floating_point():
        shown: NDArray[Any] = np.ma.masked_array((cell % 20).numpy(), missing.numpy())  # classes beyond repeat colours
        axes.imshow(shown, cmap="tab20", vmin=-0.5, vmax=19.5, interpolation="nearest")
    elif cell.ndim == 3 and cell.shape[0] == 3:
        low, high = limits
        colours = ((cell - low) / max(high - low, 1e-12)).nan_to_num().movedim(0, -1)
        opaque = (~missing).float().unsqueeze(-1)
        axes.imshow(torch.cat([colours, opaque], dim=-1).numpy(), interpolation="nearest")
    else:
        plane = cell if cell.ndim == 2 else cell[0]
        shown = np.ma.masked_array(plane.numpy(), missing.numpy())
        axes.imshow(shown, cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest")


def _text(cell: Tensor) -> str:
    if cell.numel() <= 4:
        return ", ".join(f"{value:.3g}" for value in cell.flatten().tolist())
    return f"{tuple(cell.shape)}\n{cell.min().item():.3g} to {cell.max().item():.3g}"
