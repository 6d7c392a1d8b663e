from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from matplotlib import pyplot
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mtl_lightning.callbacks import TaskGroupCallback
from mtl_lightning.grouping import Threshold
from mtl_lightning.modules import TaskGroupModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.task import Task

Groups = list[list[str]]


class Grouped(pl.LightningModule):
    """Follows a script of groups, batch by batch."""

    task_names = ("a", "b", "c", "d")
    affinity_matrix = torch.zeros(4, 4)

    def __init__(self, script: list[Groups], batches: int = 4) -> None:
        super().__init__()
        self.script, self.batches = script, batches
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("count", torch.tensor(0))
        self.count: Tensor
        self.task_groups: Groups = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.task_groups = self.script[int(self.count) % len(self.script)]
        self.count += 1
        return self.weight.square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(self.batches, 1)))


def _random_script(length: int, seed: int = 0) -> list[Groups]:
    source, script = random.Random(seed), []
    for _ in range(length):
        labels = {name: source.randrange(3) for name in Grouped.task_names}
        groups = [[name for name in Grouped.task_names if labels[name] == label] for label in range(3)]
        source.shuffle(groups)
        script.append([group for group in groups if group])
    return script


def _labels(groups: Groups) -> list[int]:
    return [next(index for index, group in enumerate(groups) if name in group) for name in Grouped.task_names]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_means_are_those_of_the_scripted_partitions(make_trainer: Callable[..., pl.Trainer]) -> None:
    script = _random_script(12)
    callback = TaskGroupCallback(figure_every=0)
    trainer = make_trainer(callback)
    trainer.fit(Grouped(script))
    labels = [_labels(groups) for groups in script]
    # An epoch has 4 batches; each pair of consecutive partitions belongs to the epoch of the second one.
    ends = [(max(4 * epoch, 1), 4 * epoch + 4) for epoch in range(3)]
    pairs = list(combinations(range(4), 2))
    for row, (start, end) in zip(callback.history, ends, strict=True):
        agreements = [adjusted_rand_score(labels[index - 1], labels[index]) for index in range(start, end)]
        flips = [
            sum((labels[i - 1][a] == labels[i - 1][b]) != (labels[i][a] == labels[i][b]) for a, b in pairs) / 6
            for i in range(start, end)
        ]
        numbers = [len(groups) for groups in script[end - 4 : end]]
        assert row["batch"] == end
        assert row["number"] == pytest.approx(sum(numbers) / 4)
        assert row["number_so_far"] == pytest.approx(sum(map(len, script[:end])) / end)
        assert row["adjusted_rand_index"] == pytest.approx(sum(agreements) / len(agreements))
        assert row["pair_flip_rate"] == pytest.approx(sum(flips) / len(flips))
    for key in ("number", "adjusted_rand_index", "pair_flip_rate"):
        assert trainer.callback_metrics[f"groups/{key}"].item() == pytest.approx(callback.history[-1][key])


def test_together_is_the_share_of_batches(make_trainer: Callable[..., pl.Trainer]) -> None:
    script = _random_script(8)
    callback = TaskGroupCallback(figure_every=0)
    make_trainer(callback, max_epochs=2).fit(Grouped(script))
    labels = torch.tensor([_labels(groups) for groups in script])
    expected = (labels.unsqueeze(2) == labels.unsqueeze(1)).double().mean(dim=0)
    torch.testing.assert_close(callback.together, expected)


def test_timeline_holds_stretches_of_equal_partitions_whatever_the_order(
    make_trainer: Callable[..., pl.Trainer],
) -> None:
    first: list[Groups] = [[["a", "b"], ["c", "d"]], [["d", "c"], ["a", "b"]]]
    script = [*first, [["a"], ["b", "c", "d"]], *first, *first, [["a", "b"], ["c", "d"]]]
    callback = TaskGroupCallback(figure_every=0)
    make_trainer(callback, max_epochs=2).fit(Grouped(script))
    halves = [["a", "b"], ["c", "d"]]
    assert callback.timeline == [(0, 1, halves), (2, 2, [["a"], ["b", "c", "d"]]), (3, 7, halves)]
    assert callback.history[0]["number"] == 2.0


def test_only_every_nth_batch_is_sampled(make_trainer: Callable[..., pl.Trainer]) -> None:
    script = _random_script(12)
    callback = TaskGroupCallback(every_n_batches=3, figure_every=0)
    make_trainer(callback).fit(Grouped(script))
    sampled = [_labels(script[index]) for index in (0, 3, 6, 9)]
    expected = (torch.tensor(sampled).unsqueeze(2) == torch.tensor(sampled).unsqueeze(1)).double().mean(dim=0)
    torch.testing.assert_close(callback.together, expected)


def test_tasks_that_are_left_out_belong_to_no_group(make_trainer: Callable[..., pl.Trainer]) -> None:
    script: list[Groups] = [[["a", "b"], ["c"]], [], [["a"], ["c", "d"]], [["a", "b", "c", "d"]]]
    callback = TaskGroupCallback(figure_every=0)
    make_trainer(callback, max_epochs=1).fit(Grouped(script))
    assert [groups for _, _, groups in callback.timeline] == [script[0], script[2], script[3]]
    together = callback.together
    assert together[0, 1] == 1.0  # in both batches that have both
    assert together[0, 2] == 1 / 3
    assert callback.history[0]["number"] == pytest.approx(5 / 3)


def test_long_runs_are_thinned_and_the_means_are_not(
    make_trainer: Callable[..., pl.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtl_lightning.callbacks.task_groups._MOST_RUNS", 16)
    script = [groups for groups in _random_script(200) for _ in range(1 + len(groups))][:300]
    callback = TaskGroupCallback(figure_every=0)
    make_trainer(callback, max_epochs=1).fit(Grouped(script, batches=300))
    assert len(callback.timeline) <= 16
    every = max(1, min(first for first, _, _ in callback.timeline[1:]))
    assert every > 1
    for first, last, groups in callback.timeline:
        assert sorted(map(sorted, groups)) == sorted(map(sorted, script[first]))
        assert sorted(map(sorted, groups)) == sorted(map(sorted, script[last]))
    agreements = [adjusted_rand_score(_labels(before), _labels(now)) for before, now in pairwise(script)]
    assert callback.history[0]["adjusted_rand_index"] == pytest.approx(sum(agreements) / 299)


def test_tables_and_pictures_are_written(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    callback = TaskGroupCallback(dirpath=tmp_path)
    make_trainer(callback).fit(Grouped(_random_script(12)))
    rows = [{key: float(value) for key, value in row.items()} for row in _read(tmp_path / "groups.csv")]
    assert rows == callback.history
    timeline = [
        (int(row["from_batch"]), int(row["to_batch"]), json.loads(row["groups"]))
        for row in _read(tmp_path / "timeline.csv")
    ]
    assert timeline == callback.timeline
    together = [[float(row[name]) for name in "abcd"] for row in _read(tmp_path / "together.csv")]
    assert together == callback.together.tolist()
    assert {path.name for path in tmp_path.glob("*.png")} == {"timeline.png", "together.png"}


class _AtTheEnd(pl.Callback):
    """Calls something between the last epoch and the end of the fit."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.found: Any = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = self.call()


@pytest.mark.parametrize("figure_every", [1, 2, 3])
def test_the_final_figures_are_drawn_unless_they_are_there(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, figure_every: int
) -> None:
    def inode() -> int:
        return (tmp_path / "together.png").stat().st_ino if (tmp_path / "together.png").exists() else 0

    before = _AtTheEnd(inode)
    callback = TaskGroupCallback(dirpath=tmp_path, figure_every=figure_every)
    make_trainer(callback, before, max_epochs=4).fit(Grouped(_random_script(16)))
    assert (inode() == before.found) == (4 % figure_every == 0)


def test_figures_that_could_not_be_written_are_tried_again(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    (tmp_path / "together.png").mkdir()  # no file can take its place
    callback = TaskGroupCallback(dirpath=tmp_path)
    with pytest.warns(UserWarning, match="Callbacks should be able to write"):
        make_trainer(callback, _AtTheEnd((tmp_path / "together.png").rmdir)).fit(Grouped(_random_script(12)))
    assert (tmp_path / "together.png").is_file()


def test_pictures_reach_loggers(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    class Images(pl.loggers.CSVLogger):
        keys: list[str] = []  # noqa: RUF012  # one logger only

        def log_image(self, key: str, images: list[Any], step: int) -> None:
            self.keys.append(key)

    logger = Images(tmp_path)
    make_trainer(TaskGroupCallback(figure_every=2), logger=logger).fit(Grouped(_random_script(12)))
    assert logger.keys == ["task_groups/timeline", "task_groups/together"]


@pytest.mark.parametrize("step", [5, 8])
def test_resumed_record_equals_the_uninterrupted_one(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, step: int
) -> None:
    whole = TaskGroupCallback(dirpath=tmp_path / "whole", figure_every=0)
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=step)
    make_trainer(whole, checkpoints).fit(Grouped(_random_script(12)))
    resumed = TaskGroupCallback(dirpath=tmp_path / "resumed", figure_every=0)
    make_trainer(resumed).fit(Grouped(_random_script(12)), ckpt_path=tmp_path / f"epoch=1-step={step}.ckpt")
    for name in ("groups.csv", "timeline.csv", "together.csv", "timeline.png", "together.png"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_state_of_other_tasks_is_refused(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = TaskGroupCallback(figure_every=0)
    make_trainer(callback, max_epochs=1).fit(Grouped(_random_script(4)))
    with pytest.raises(ValueError, match=r"should be of the tasks \['a', 'b', 'c', 'd'\]. Found \['x'\]"):
        callback.load_state_dict(callback.state_dict() | {"task_names": ["x"]})


def test_module_without_groups_is_refused_before_training(
    single: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    module = single(torch.rand(3, 2), "validation_step")
    with pytest.raises(ValueError, match=r"a module that has `task_names` and `task_groups`.*Found a Single"):
        make_trainer(TaskGroupCallback()).fit(module)
    assert module.weight == 0.0


def test_fast_dev_run_writes_nothing(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    callback = TaskGroupCallback(figure_every=0)
    make_trainer(callback, fast_dev_run=True).fit(Grouped(_random_script(4)))
    assert len(callback.timeline) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_leaves_its_record(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        make_trainer(TaskGroupCallback(dirpath=tmp_path), Stop()).fit(Grouped(_random_script(4)))
    assert {"timeline.csv", "timeline.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_batches": 0}, "`every_n_batches` should be at least 1. Found 0"),
        ({"figure_every": -1}, "`figure_every` should be a number of epochs, or 0. Found -1"),
    ],
)
def test_unusable_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskGroupCallback(**options)


@pytest.mark.parametrize("name", ["timeline_figure", "together_figure"])
def test_drawing_without_samples_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least one sampled batch"):
        getattr(TaskGroupCallback(), name)()


def test_pyplot_does_not_know_the_figures(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = TaskGroupCallback(figure_every=0)
    make_trainer(callback, max_epochs=1).fit(Grouped(_random_script(4)))
    assert callback.timeline_figure().axes
    assert pyplot.get_fignums() == []


def test_tasks_alone_are_grey_and_those_together_of_one_colour(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = TaskGroupCallback()
    make_trainer(callback, max_epochs=1).fit(Grouped([[["a"], ["b", "d"], ["c"]]]))
    picture = callback.timeline_figure().axes[0].images[0].get_array()
    assert picture is not None
    a, b, c, d = (tuple(row) for row in picture[:, 0].tolist())
    assert a == c
    assert b == d != a
    assert max(a) - min(a) < 0.05


def _uneven_batches() -> DataLoader[Any]:
    """Samples by turns for two ranks, of which the second one knows nothing of the tasks c and d."""
    inputs, targets = torch.randn(48, 3), torch.randint(3, (48, 4))
    targets[1::2, 2:] = -100  # no label
    rows: Any = list(zip(inputs, targets, strict=True))

    def collate(batch: list[Any]) -> Any:
        columns = torch.stack([target for _, target in batch]).T
        return torch.stack([features for features, _ in batch]), dict(zip("abcd", columns, strict=True))

    return DataLoader(rows, batch_size=4, collate_fn=collate)


@pytest.mark.usefixtures("forked")
def test_ranks_agree_and_only_rank_zero_writes(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Report(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            logged = {name: float(value) for name, value in trainer.logged_metrics.items() if "groups/" in name}
            found = [callback.timeline, callback.together.tolist(), callback.history, logged]
            (tmp_path / f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))

    replace = os.replace

    def recording(source: Any, target: Any) -> None:
        with (tmp_path / "writers").open("a") as file:
            file.write(f"{torch.distributed.get_rank()}\n")
        replace(source, target)

    monkeypatch.setattr("mtl_lightning.callbacks.output.os.replace", recording)
    module = TaskGroupModule(
        network=MultiHeadNetwork(MLP(3, [4]), {name: nn.Linear(4, 3) for name in "abcd"}),
        tasks=[Task(name, nn.CrossEntropyLoss()) for name in "abcd"],
        optimizer=partial(torch.optim.SGD, lr=0.1),
        grouping=Threshold(),
        affinity_decay=0.5,
        warmup_batches=1,
    )
    callback = TaskGroupCallback(dirpath=tmp_path / "groups")
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    make_trainer(callback, Report(), devices=2, strategy=strategy).fit(module, _uneven_batches())
    found, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert found == other
    timeline, together, history, logged = found
    # What one rank knows nothing of is in the groups of both, and groups change, so that they could have differed.
    assert {name for _, _, groups in timeline for group in groups for name in group} == set("abcd")
    assert len(timeline) > 2
    assert logged["groups/number"] == pytest.approx(history[-1]["number"])
    assert set((tmp_path / "writers").read_text().split()) == {"0"}
    folder = tmp_path / "groups"
    assert [[float(row[name]) for name in "abcd"] for row in _read(folder / "together.csv")] == together
    rows = [{name: float(value) for name, value in row.items()} for row in _read(folder / "groups.csv")]
    assert rows == history
    expected = {"groups.csv", "timeline.csv", "together.csv", "timeline.png", "together.png"}
    assert {path.name for path in folder.iterdir()} == expected
