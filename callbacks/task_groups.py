"""How a module's task groups change over training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from torch import Tensor, from_numpy

from mtl_lightning.callbacks.heat_map import heat_map, short_names
from mtl_lightning.callbacks.measuring import finite, publish
from mtl_lightning.callbacks.output import draw, log_picture, logged_step, output_folder, write_picture, write_rows
from mtl_lightning.palette import ALONE, GROUPS
from mtl_lightning.partitions import adjusted_rand_index, matched_labels, pair_flip_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ABSENT = -1
_MOST_RUNS = 4096  # more than twice as many as the timeline has columns
_MOST_COLUMNS = 1500

_Run = tuple[int, int, tuple[int, ...]]


class TaskGroupCallback(Callback):
    """Records into which groups a module splits its tasks, batch by batch.

    For modules that update tasks in groups (``mtl_lightning.protocols.TaskGroupProtocol``, such as
    ``TaskGroupModule``). It reads lists of names and never waits for the device. The order of groups does not count.

    Logged at the end of each epoch, over its sampled batches:

    - ``groups/number``: the mean number of groups;
    - ``groups/adjusted_rand_index``: the mean agreement of consecutive partitions, 1 where they are equal
      (:func:`~mtl_lightning.partitions.adjusted_rand_index`);
    - ``groups/pair_flip_rate``: the mean share of task pairs that were together and now are apart, or the reverse, from
      one sampled batch to the next;
    - ``task_groups/timeline`` and ``task_groups/together``, the figures, to TensorBoard and W&B.

    Files, from rank zero and each whole or not at all, after each epoch:

    - ``groups.csv``: ``epoch``, ``batch`` (how many have been trained), ``number``, ``number_so_far`` (the mean since
      the start), ``adjusted_rand_index``, ``pair_flip_rate``;
    - ``timeline.csv``: ``from_batch`` and ``to_batch`` (counted from 0, both inclusive) of each stretch of equal
      partitions, and its ``groups`` as JSON; and ``timeline.png``, where tasks of one colour are one group, and tasks
      that are alone are grey. A group keeps the colour of that before it with which it shares most tasks. With more
      than 16 tasks two groups may have one colour;
    - ``together.csv`` and ``together.png``: for each pair of tasks, in how many of the sampled batches it was together.

    Beyond 4096 stretches every other sample of the timeline is dropped, again and again, so that memory and checkpoint
    stay small; the numbers count all samples. All of it is part of the checkpoint. ``fast_dev_run`` writes nothing.

    Args:
        every_n_batches: Sample the first and then every such number of batches.
        dirpath: The folder; by default ``task_groups`` in ``trainer.log_dir``, or in ``trainer.default_root_dir``.
        figure_every: Draw after every such number of epochs; 0 draws when fitting ends only.

    Raises:
        ValueError: If an argument is not usable; before training, if the module has no groups.
        OSError: Before training, if the folder is not writable.

    Example:
        >>> TaskGroupCallback(every_n_batches=10).timeline
        []
    """

    def __init__(self, every_n_batches: int = 1, *, dirpath: str | Path | None = None, figure_every: int = 1) -> None:
        if every_n_batches < 1:
            raise ValueError(f"`every_n_batches` should be at least 1. Found {every_n_batches}.")
        if figure_every < 0:
            raise ValueError(f"`figure_every` should be a number of epochs, or 0. Found {figure_every}.")
        self.every_n_batches = every_n_batches
        self.dirpath = dirpath
        self.figure_every = figure_every
        self.folder: Path | None = None
        self.batches_seen = 0
        self._task_names: tuple[str, ...] = ()
        self._runs: list[_Run] = []
        self._every = every_n_batches  # of the timeline, which is thinned where it would grow too long
        self._latest: tuple[int, ...] = ()  # the latest partition
        self._colours: tuple[int, ...] = ()  # the latest label of each task, also of those that are absent since
        self._together = np.zeros((0, 0), dtype=np.int64)
        self._present = np.zeros((0, 0), dtype=np.int64)
        self._number = [0, 0]  # the sum of the numbers of groups, and how many, since the start
        self._sums: dict[str, list[float]] = _no_sums()  # the same of each logged value, in this epoch
        self._rows: list[dict[str, int | float]] = []
        self._drawn_at: int | None = None  # after which batch the figures in the folder were drawn
        self._open_epoch: int | None = None  # that of batches whose row is still to be written

    @property
    def task_names(self) -> tuple[str, ...]:
        """The ``T`` tasks; empty before ``setup``."""
        return self._task_names

    @property
    def history(self) -> list[dict[str, int | float]]:
        """One row per epoch: the columns of ``groups.csv``."""
        return [dict(row) for row in self._rows]

    @property
    def timeline(self) -> list[tuple[int, int, list[list[str]]]]:
        """The first and the last sampled batch of each stretch of equal partitions, and its groups."""
        return [(first, last, self._groups(labels)) for first, last, labels in self._runs]

    @property
    def together(self) -> Tensor:
        """The share of sampled batches in which two tasks were in one group, shape ``(T, T)``; NaN without a sample."""
        return from_numpy(self._shares())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check module and folder before anything is trained."""
        if stage != "fit":
            return
        if not {"task_names", "task_groups"} <= set(dir(pl_module)):
            raise ValueError(
                "`TaskGroupCallback` should be used with a module that has `task_names` and `task_groups` "
                f"(`mtl_lightning.protocols.TaskGroupProtocol`). Found a {type(pl_module).__name__} without them."
            )
        self._start(tuple(pl_module.task_names))  # type: ignore[arg-type]  # checked above
        self.folder = output_folder(trainer, self.dirpath, default="task_groups")
        self._drawn_at = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sample the groups if it is time."""
        if self.batches_seen % self.every_n_batches == 0:
            self._sample(pl_module.task_groups)
        self.batches_seen += 1
        self._open_epoch = trainer.current_epoch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for the end of an epoch whose last batch was followed by the checkpoint of which this run goes on."""
        if self._open_epoch is not None and self._open_epoch != trainer.current_epoch:
            self._finish_epoch(trainer, pl_module, self._open_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the means of the epoch, write the tables and, if it is time, the figures."""
        self._finish_epoch(trainer, pl_module, trainer.current_epoch, epoch_is_over=True)
        due = self.figure_every > 0 and (trainer.current_epoch + 1) % self.figure_every == 0
        if self.folder is not None and trainer.is_global_zero and self._runs and due:
            for name, picture in self._write_pictures(self.folder).items():
                step = logged_step(trainer, epoch_is_over=True)
                log_picture(trainer, f"task_groups/{name}", picture, step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the tables and the final figures, unless they were drawn after the last batch."""
        if self.folder is not None and trainer.is_global_zero and self._runs:
            self._write_tables(self.folder)
            if self._drawn_at != self.batches_seen:
                self._write_pictures(self.folder)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what there is of a run that was stopped."""
        self.on_fit_end(trainer, pl_module)

    def timeline_figure(self) -> Figure:
        """Return the groups over the batches as a new ``matplotlib.figure.Figure``.

        Raises:
            ValueError: If nothing has been sampled yet.
        """
        if not self._runs:
            raise ValueError("There should be at least one sampled batch to draw. Found none.")
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure

        palette = np.array([to_rgb(colour) for colour in GROUPS])
        end = self._runs[-1][1] + 1
        edges = np.linspace(0, end, min(end, _MOST_COLUMNS) + 1)
        starts = np.array([first for first, _, _ in self._runs])
        columns = np.searchsorted(starts, edges[:-1], side="right").clip(1) - 1
        labels = np.array([labels for _, _, labels in self._runs])[columns].T
        picture = np.where((labels == _ABSENT)[..., None], 1.0, palette[labels % len(palette)])
        is_alone = (labels[:, None] == labels[None, :]).sum(axis=1) == 1
        picture[is_alone & (labels != _ABSENT)] = to_rgb(ALONE)

        num_tasks = len(self._task_names)
        figure = Figure(
            figsize=(9.0, 1.4 + 0.34 * min(num_tasks, 24)), dpi=130, layout="constrained", facecolor="white"
        )
        axes = figure.add_subplot()
        axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(0.0, float(end), num_tasks - 0.5, -0.5))
        axes.hlines(np.arange(1, num_tasks) - 0.5, 0, end, colors="white", linewidth=2.0)
        axes.set_yticks(range(num_tasks), short_names(self._task_names))
        axes.set_xlabel("batch")
        axes.set_title("In each batch, tasks of one colour are updated together, grey ones alone", fontsize=10)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        return figure

    def together_figure(self) -> Figure:
        """Return how often each pair was together as a new ``matplotlib.figure.Figure``.

        Raises:
            ValueError: If nothing has been sampled yet.
        """
        if not self._runs:
            raise ValueError("There should be at least one sampled batch to draw. Found none.")
        return heat_map(
            self._shares(),
            self._task_names,
            title=f"Tasks in one group, {self._number[0] / self._number[1]:.3g} groups on average",
            labels=("task", "task"),
            value="share of batches",
            limits=(0.0, 1.0),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, which Lightning can load with ``weights_only=True``."""
        return {
            "task_names": list(self._task_names),
            "batches_seen": self.batches_seen,
            "runs": [[first, last, list(labels)] for first, last, labels in self._runs],
            "every": self._every,
            "latest": list(self._latest),
            "colours": list(self._colours),
            "together": self._together.tolist(),
            "present": self._present.tolist(),
            "number": list(self._number),
            "sums": {name: list(pair) for name, pair in self._sums.items()},
            "rows": self.history,
            "open_epoch": self._open_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record of a checkpoint.

        Raises:
            ValueError: If its tasks are not those of the module.
        """
        names = tuple(state_dict["task_names"])
        if self._task_names and names != self._task_names:
            raise ValueError(
                f"The groups in the checkpoint should be of the tasks {list(self._task_names)}. Found {list(names)}."
            )
        self._start(names)
        self.batches_seen = state_dict["batches_seen"]
        self._runs = [(first, last, tuple(labels)) for first, last, labels in state_dict["runs"]]
        self._every = state_dict["every"]
        self._latest = tuple(state_dict["latest"])
        self._colours = tuple(state_dict["colours"])
        self._together = np.array(state_dict["together"], dtype=np.int64)
        self._present = np.array(state_dict["present"], dtype=np.int64)
        self._number = list(state_dict["number"])
        self._sums = {name: list(pair) for name, pair in state_dict["sums"].items()}
        self._rows = [dict(row) for row in state_dict["rows"]]
        self._open_epoch = state_dict["open_epoch"]

    def _start(self, names: tuple[str, ...]) -> None:
        if names != self._task_names:
            self._task_names = names
            self._together = np.zeros((len(names), len(names)), dtype=np.int64)
            self._present = np.zeros_like(self._together)
            self._colours = (0,) * len(names)

    def _sample(self, groups: Sequence[Sequence[str]]) -> None:
        if not any(groups):  # such as with a batch without labels
            return
        found = {name: index for index, group in enumerate(groups) for name in group}
        raw = [found.get(name, _ABSENT) for name in self._task_names]
        present = [index for index, label in enumerate(raw) if label != _ABSENT]
        if not present:
            return
        near = _matched(tuple(self._colours[index] for index in present), tuple(raw[index] for index in present))
        colours, labels = list(self._colours), [_ABSENT] * len(raw)
        for index, label in zip(present, near, strict=True):
            colours[index] = labels[index] = label
        self._count(tuple(labels))
        self._colours, self._latest = tuple(colours), tuple(labels)
        if self.batches_seen % self._every == 0:
            self._runs = _extended(self._runs, self.batches_seen, self._latest)
            if len(self._runs) > _MOST_RUNS:
                self._every *= 2
                self._runs = _thinned(self._runs, self._every)

    def _count(self, labels: tuple[int, ...]) -> None:
        here, together = _pairs(labels)
        self._present += here
        self._together += together
        number = len(set(labels) - {_ABSENT})
        self._number = [self._number[0] + number, self._number[1] + 1]
        values = {"number": float(number)} | (_agreement(self._latest, labels) if self._latest else {})
        for name, value in values.items():
            self._sums[name][0] += value
            self._sums[name][1] += 1

    def _finish_epoch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, epoch_is_over: bool = False
    ) -> None:
        self._open_epoch = None
        means = {name: total / count if count else float("nan") for name, (total, count) in self._sums.items()}
        self._sums = _no_sums()
        if self._number[1] == 0:
            return
        own = {"epoch": epoch, "batch": self.batches_seen}
        self._rows.append(own | means | {"number_so_far": self._number[0] / self._number[1]})
        step = logged_step(trainer, epoch_is_over=epoch_is_over)
        publish(trainer, pl_module, finite({f"groups/{name}": value for name, value in means.items()}), step)
        if self.folder is not None and trainer.is_global_zero:
            self._write_tables(self.folder)

    def _shares(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return self._together / self._present

    def _groups(self, labels: tuple[int, ...]) -> list[list[str]]:
        groups: dict[int, list[str]] = {}
        for name, label in zip(self._task_names, labels, strict=True):
            if label != _ABSENT:
                groups.setdefault(label, []).append(name)
        return list(groups.values())

    def _write_tables(self, folder: Path) -> None:
        columns = ("epoch", "batch", "number", "number_so_far", "adjusted_rand_index", "pair_flip_rate")
        write_rows(folder / "groups.csv", columns, self._rows)
        runs = [
            {"from_batch": first, "to_batch": last, "groups": json.dumps(groups)}
            for first, last, groups in self.timeline
        ]
        write_rows(folder / "timeline.csv", ("from_batch", "to_batch", "groups"), runs)
        shares = [
            {"task": name, **dict(zip(self._task_names, row, strict=True))}
            for name, row in zip(self._task_names, self._shares().tolist(), strict=True)
        ]
        write_rows(folder / "together.csv", ("task", *self._task_names), shares)

    def _write_pictures(self, folder: Path) -> dict[str, np.ndarray]:
        pictures = {"timeline": draw(self.timeline_figure()), "together": draw(self.together_figure())}
        written = [write_picture(folder / f"{name}.png", picture) for name, picture in pictures.items()]
        self._drawn_at = self.batches_seen if all(written) else None
        return pictures


# Most batches have the partition of the one before. To look up what is known of it is faster than to compute it between
# the passes of a network, which leave nothing of the code in the caches of the processor.
_matched = lru_cache(maxsize=256)(matched_labels)


@lru_cache(maxsize=16)
def _pairs(labels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return which pairs of tasks are present, and which of them together, each of shape ``(T, T)``."""
    array = np.array(labels)
    here = array != _ABSENT
    both = np.logical_and.outer(here, here)
    return both, both & np.equal.outer(array, array)


@lru_cache(maxsize=256)
def _agreement(before: tuple[int, ...], now: tuple[int, ...]) -> dict[str, float]:
    """Return how much two partitions agree on the tasks of both; nothing for fewer than two such tasks."""
    pairs = [pair for pair in zip(before, now, strict=True) if _ABSENT not in pair]
    if len(pairs) < 2:
        return {}
    first, second = zip(*pairs, strict=True)
    return {
        "adjusted_rand_index": adjusted_rand_index(first, second),
        "pair_flip_rate": pair_flip_rate(first, second),
    }


def _no_sums() -> dict[str, list[float]]:
    return {name: [0.0, 0] for name in ("number", "adjusted_rand_index", "pair_flip_rate")}


def _extended(runs: list[_Run], batch: int, labels: tuple[int, ...]) -> list[_Run]:
    if runs and runs[-1][2] == labels:
        runs[-1] = (runs[-1][0], batch, labels)
    else:
        runs.append((batch, batch, labels))
    return runs


def _thinned(runs: list[_Run], every: int) -> list[_Run]:
    """Return what ``runs`` would be if only multiples of ``every`` had been sampled."""
    kept: list[_Run] = []
    for first, last, labels in runs:
        first, last = -(-first // every) * every, last // every * every
        if first > last:
            continue
        kept = _extended(kept, first, labels)
        kept[-1] = (kept[-1][0], last, labels)
    return kept
