from __future__ import annotations

from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from mtl_lightning.datamodules.combined import (
    PerTaskDataModule,
    PerTaskDataset,
    TaskBalancedSampler,
    combine_batches,
)
from mtl_lightning.datamodules.loading import ResumableDataLoader
from mtl_lightning.grouping import OneByOne
from mtl_lightning.losses import MaskedCrossEntropyLoss, MaskedMSELoss
from mtl_lightning.metrics import MaskedMeanAbsoluteError
from mtl_lightning.modules import MT2OModule, TaskGroupModule, WeightedModule
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task

SIZES = {"a": 5, "b": 12, "c": 8}
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


def _sets(sizes: dict[str, int] = SIZES) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Data sets whose inputs are ``(number of the task, number of the sample)``, which is also the label."""
    return {
        task: [(torch.tensor([place, number]).float(), torch.tensor(number)) for number in range(size)]
        for place, (task, size) in enumerate(sizes.items())
    }


def _dataset(sizes: dict[str, int] = SIZES, **options: Any) -> PerTaskDataset:
    return PerTaskDataset(_sets(sizes), **options)


def _loader(batch_size: int = 6, num_workers: int = 0, **options: Any) -> ResumableDataLoader[Any]:
    dataset = _dataset()
    return ResumableDataLoader(
        dataset, TaskBalancedSampler(dataset, **options), batch_size=batch_size, num_workers=num_workers
    )


def _seen(batches: Any) -> list[list[tuple[int, int]]]:
    """Return the samples of each batch, as numbers of task and sample."""
    return [[(int(task), int(number)) for task, number in inputs.tolist()] for inputs, _ in batches]


# The samples


def test_each_sample_has_the_label_of_its_own_task_only() -> None:
    for inputs, labels in _dataset():
        own = list(SIZES)[int(inputs[0])]
        assert list(labels) == list(SIZES)
        assert {task: int(label) for task, label in labels.items()} == {
            task: int(inputs[1]) if task == own else -1 for task in SIZES
        }


def test_all_samples_are_there_once() -> None:
    seen = [tuple(inputs.tolist()) for inputs, _ in _dataset()]
    assert Counter(task for task, _ in seen) == dict(enumerate(SIZES.values()))
    assert len(set(seen)) == len(seen)


def test_the_order_goes_round_the_tasks() -> None:
    tasks = [int(inputs[0]) for inputs, _ in _dataset()]
    assert tasks[:15] == [0, 1, 2] * 5
    assert tasks[15:] == [1, 2] * 3 + [1] * 4


def test_a_missing_label_has_the_shape_and_kind_of_the_labels() -> None:
    sets = {"map": [(torch.zeros(1), torch.zeros(2, 3))], "kind": [(torch.zeros(1), 4)]}
    (_, first), (_, second) = PerTaskDataset(sets)
    assert first["kind"].item() == -1
    assert second["map"].shape == (2, 3)
    assert second["map"].isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32])
def test_labels_of_any_integers_can_be_missing(dtype: torch.dtype) -> None:
    (_, own), (_, other) = PerTaskDataset({"a": [(0, torch.tensor(1).to(dtype))], "b": [(0, 0.5)]})
    assert (own["a"].item(), other["a"].item()) == (1, -1)
    assert own["a"].dtype == other["a"].dtype == torch.int64


def test_examples_of_labels_spare_a_reading() -> None:
    class Unread(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            raise AssertionError

    PerTaskDataset({"a": Unread([0])}, labels={"a": torch.tensor(0)})


def test_the_transform_draws_by_seed_visit_and_sample() -> None:
    def noise(inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + torch.rand(2, generator=generator)

    dataset, other = _dataset(transform=noise, seed=1), _dataset(transform=noise, seed=2)
    total = len(dataset)
    draws = [dataset[index][0] - dataset[index][0].floor() for index in (0, 1, total, total + 1)]
    assert torch.equal(dataset[total + 1][0], dataset[total + 1][0])
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert not torch.equal(dataset[0][0], other[0][0])


@pytest.mark.parametrize(
    ("sets", "message"), [({}, "at least one data set"), ({"a": [], "b": [(0, 0)]}, r"Found none for a\.")]
)
def test_no_samples_are_refused(sets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerTaskDataset(sets)


# The order


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
@pytest.mark.parametrize("batch_size", [3, 6, 9])
def test_every_batch_is_balanced(mode: Any, batch_size: int) -> None:
    for batch in _seen(_loader(batch_size, mode=mode)):
        assert len(set(Counter(task for task, _ in batch).values())) == 1
        assert {task for task, _ in batch} == {0, 1, 2}


def test_the_epoch_ends_with_the_largest_set_and_smaller_ones_begin_again() -> None:
    seen = Counter(sample for batch in _seen(_loader()) for sample in batch)
    assert sum(seen.values()) == 36
    assert {seen[1, number] for number in range(12)} == {1}
    assert {seen[0, number] for number in range(5)} == {2, 3}
    assert {seen[2, number] for number in range(8)} == {1, 2}


def test_the_epoch_ends_with_the_smallest_set_and_others_change_with_the_epoch() -> None:
    loader = _loader(mode="min_size")
    epochs = []
    for epoch in range(8):
        loader.sampler.set_epoch(epoch)
        epochs.append({sample for batch in _seen(loader) for sample in batch})
    assert all(len(seen) == 15 for seen in epochs)
    assert len(set.union(*epochs)) == sum(SIZES.values())


def test_a_set_that_begins_again_does_so_in_another_order() -> None:
    first = [number for batch in _seen(_loader()) for task, number in batch if task == 2]
    assert sorted(first[:8]) == list(range(8))
    assert first[:4] != first[8:]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[tuple[int, int]]]:
        loader = _loader(seed=seed)
        loader.sampler.set_epoch(epoch)
        return _seen(loader)

    assert order(3, 1) == order(3, 1)
    assert len({str(order(seed, epoch)) for seed, epoch in ((3, 1), (4, 1), (3, 2), (4, 0))}) == 4


def test_visits_of_a_sample_have_different_numbers() -> None:
    sampler = TaskBalancedSampler(_dataset({"a": 2, "b": 9}))
    numbers: list[int] = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        numbers += sampler
    assert len(set(numbers)) == len(numbers) == 54


# Ranks


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
def test_ranks_hold_together_the_batches_of_one_process(num_replicas: int, mode: Any) -> None:
    whole = _seen(_loader(6 * num_replicas, mode=mode))
    ranks = [_seen(_loader(6, mode=mode, num_replicas=num_replicas, rank=rank)) for rank in range(num_replicas)]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    for number, batch in enumerate(whole):
        together = [sample for batches in ranks for sample in batches[number]]
        if len(batch) == 6 * num_replicas:
            assert sorted(together) == sorted(batch)
        assert set(batch) <= set(together)


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_ranks_see_the_visits_of_one_process(num_replicas: int) -> None:
    def numbers(**options: Any) -> list[int]:
        sampler = TaskBalancedSampler(_dataset(), **options)
        sampler.set_epoch(3)
        return list(sampler)

    ranks = [numbers(num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)]
    assert sorted(number for rank in ranks for number in rank) == sorted(numbers())  # of twelve rounds


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_every_rank_has_every_task(num_replicas: int) -> None:
    for rank in range(num_replicas):
        for batch in _seen(_loader(3, num_replicas=num_replicas, rank=rank)):
            assert [task for task, _ in batch] == [0, 1, 2]


# Resumption


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stopped_after", [1, 4])
def test_a_stopped_epoch_goes_on_where_it_was(num_workers: int, stopped_after: int) -> None:
    whole = _seen(_loader())
    loader, resumed = _loader(), _loader(num_workers=num_workers)
    for _ in zip(range(stopped_after), loader, strict=False):
        pass
    resumed.load_state_dict(loader.state_dict())
    assert _seen(resumed) == whole[stopped_after:]


def test_a_batch_size_that_the_tasks_do_not_divide_is_refused_on_resuming() -> None:
    loader, resumed = _loader(4), _loader(4)
    next(iter(loader))
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"multiple of the 3 tasks\. Found 4 samples"):
        next(iter(resumed))


# Modules


def _samples(task: str, size: int, offset: int) -> list[tuple[Tensor, Tensor]]:
    """Noise-free samples: ``kind`` is the sign of the first number, ``size`` the sum of all."""
    generator = torch.Generator().manual_seed(offset)
    inputs = torch.randn(size, 4, generator=generator)
    labels = (inputs[:, 0] > 0).long() if task == "kind" else inputs.sum(1, keepdim=True)
    return list(zip(inputs, labels, strict=True))


class _KindAndSize(PerTaskDataModule):
    def __init__(self, batch_size: int = 16, num_workers: int = 0) -> None:
        super().__init__(num_tasks=2, batch_size=batch_size, num_workers=num_workers, seed=0)

    def setup(self, stage: str | None = None) -> None:
        self.datasets = {
            "train": PerTaskDataset({"kind": _samples("kind", 200, 0), "size": _samples("size", 130, 1)}),
            "val": PerTaskDataset({"kind": _samples("kind", 60, 2), "size": _samples("size", 40, 3)}),
        }


def _tasks() -> list[Task]:
    accuracy = MulticlassAccuracy(2, average="micro", ignore_index=-1)
    return [
        Task("kind", MaskedCrossEntropyLoss(ignore_index=-1), MetricCollection({"accuracy": accuracy})),
        Task("size", MaskedMSELoss(), MetricCollection({"error": MaskedMeanAbsoluteError()})),
    ]


def _module(kind: type[Any] = TaskGroupModule, **options: Any) -> Any:
    torch.manual_seed(0)
    heads: dict[str, nn.Module] = {"kind": nn.Linear(16, 2), "size": nn.Linear(16, 1)}
    defaults = {"optimizer": partial(torch.optim.Adam, lr=1e-2), "tasks": _tasks()}
    options = {"network": MultiHeadNetwork(MLP(4, [16]), heads), **defaults, **options}
    if issubclass(kind, MT2OModule):
        return kind(preferences=simplex_lattice(2, 2), backend="loop", **options)
    return kind(**options)


def _trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(**{"default_root_dir": folder, "accelerator": "cpu", **QUIET, **options})


@pytest.mark.parametrize("kind", [MT2OModule, TaskGroupModule, WeightedModule])
def test_modules_learn_from_batches_with_missing_labels(tmp_path: Path, kind: type[Any]) -> None:
    module = _module(kind)
    trainer = _trainer(tmp_path, max_epochs=8)
    trainer.fit(module, _KindAndSize())
    values = trainer.callback_metrics
    assert all(value.isfinite() for value in values.values())
    if kind is not MT2OModule:
        assert values["val_accuracy/kind"] > 0.85
        assert values["val_error/size"] < 0.6
    else:
        losses = module.objective_values
        assert losses[:, 0].min() < 0.4
        assert losses[:, 1].min() < 0.5


def test_batches_of_one_task_alone_validate_as_mixed_ones(tmp_path: Path) -> None:
    module, datamodule = _module(), _KindAndSize()
    datamodule.setup()
    samples = datamodule.datasets["val"]
    assert isinstance(samples, PerTaskDataset)
    apart = [samples[int(index)] for task in (0, 1) for index in samples.indices(task)]
    results = [
        _trainer(tmp_path).validate(module, DataLoader(loaded, batch_size=20), verbose=False)[0]  # type: ignore[arg-type]
        for loaded in (list(samples), apart)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_was_stopped_in_an_epoch_equals_the_whole_one(tmp_path: Path, num_workers: int) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0}
    whole = _module(grouping=OneByOne())
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=9, save_top_k=-1, auto_insert_metric_name=False)
    _trainer(tmp_path, **options, callbacks=[saving], enable_checkpointing=True).fit(whole, _KindAndSize())
    resumed = _module(grouping=OneByOne())
    _trainer(tmp_path, **options).fit(resumed, _KindAndSize(num_workers=num_workers), ckpt_path=tmp_path / "9.ckpt")
    for expected, found in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    states = []
    for devices, batch_size in ((1, 16), (2, 8)):
        module = _module(grouping=OneByOne(), optimizer=partial(torch.optim.SGD, lr=1e-2))
        options: dict[str, Any] = {"max_steps": 10, "limit_val_batches": 0, "devices": devices}
        if devices > 1:
            options["strategy"] = DDPStrategy(
                start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60)
            )
        trainer = _trainer(tmp_path, **options)
        trainer.fit(module, _KindAndSize(batch_size))
        states.append([parameter.detach().clone() for parameter in module.parameters()])
    assert not all(torch.equal(one, two) for one, two in zip(states[0], _module().parameters(), strict=True))
    for one, two in zip(*states, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_overfitting_reads_balanced_batches(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watching(TaskGroupModule):
        def unpack_batch(self, batch: Any) -> tuple[Any, dict[str, Tensor]]:
            seen.append((batch[1]["kind"] >= 0).sum())
            return super().unpack_batch(batch)

    _trainer(tmp_path, max_epochs=2, overfit_batches=1, limit_val_batches=0).fit(_module(Watching), _KindAndSize())
    assert {int(count) for count in seen} == {8}


# Batches of existing loaders


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
@pytest.mark.parametrize("kind", [MT2OModule, TaskGroupModule, WeightedModule])
def test_a_combined_loader_serves_through_unpack_batch(tmp_path: Path, kind: type[Any], mode: Any) -> None:
    class FromLoaders(kind):  # type: ignore[misc]
        def unpack_batch(self, batch: Any) -> tuple[Any, dict[str, Tensor]]:
            return combine_batches(batch) if isinstance(batch, dict) else super().unpack_batch(batch)

    loaders = {
        task: DataLoader(TensorDataset(*map(torch.stack, zip(*_samples(task, size, 0), strict=True))), batch_size=8)
        for task, size in (("kind", 40), ("size", 24))
    }
    module = _module(FromLoaders)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer = _trainer(tmp_path, max_epochs=1)
    trainer.fit(module, CombinedLoader(loaders, mode))
    assert trainer.global_step == (3 if mode == "min_size" else 5)
    assert not all(torch.equal(one, two) for one, two in zip(before, module.parameters(), strict=True))


def test_combined_batches_equal_those_of_the_samples() -> None:
    sets = _sets({"a": 2, "b": 3})
    batches = {
        task: (torch.stack([inputs for inputs, _ in samples]), torch.stack([label for _, label in samples]))
        for task, samples in sets.items()
    }
    inputs, targets = combine_batches(batches)
    samples = sorted(PerTaskDataset(sets), key=lambda sample: sample[0].tolist())
    assert torch.equal(inputs, torch.stack([sample for sample, _ in samples]))
    for task in sets:
        assert torch.equal(targets[task], torch.stack([labels[task] for _, labels in samples]))


def test_unsigned_labels_can_be_missing() -> None:
    labels = torch.tensor([3, 255], dtype=torch.uint8)
    _, targets = combine_batches({"a": (torch.zeros(2, 1), labels), "b": (torch.zeros(1, 1), torch.zeros(1))})
    assert targets["a"].tolist() == [3, 255, -1]


X, Y = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({}, r"should have one shape\. Found no batch"),
        ({"a": (X, Y), "b": None}, r"task 'b' should be there\. Found None\..*'min_size' or 'max_size_cycle'"),
        ({"a": X}, r"task 'a' should be `\(inputs, labels\)`, two tensors"),
        ({"a": (X, [1, 2])}, r"task 'a' should be `\(inputs, labels\)`, two tensors"),
        ({"a": (X, Y[:1])}, r"task 'a' should have one label per input\. Found 2 and 1"),
        ({"a": (X, Y), "b": (X[:, :2], Y)}, r"should have one shape\. Found \[\(2,\), \(3,\)\]"),
    ],
)
def test_batches_of_another_form_are_refused(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine_batches(batches)


# Bad input


def test_a_batch_size_that_the_tasks_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`batch_size` should be a multiple of 2, .* Found 15"):
        _KindAndSize(batch_size=15)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TaskBalancedSampler(_dataset(), mode="sequential"),  # type: ignore[arg-type]
        lambda: PerTaskDataModule(num_tasks=1, mode="sequential", batch_size=1, num_workers=0, seed=0),  # type: ignore[arg-type]
    ],
)
def test_another_mode_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"`mode` should be 'max_size_cycle' or 'min_size'\. Found 'sequential'"):
        make()


def test_another_training_set_is_refused() -> None:
    datamodule = _KindAndSize()
    datamodule.datasets = {"train": TensorDataset(X)}
    with pytest.raises(TypeError, match=r"should be a `PerTaskDataset`\. Found TensorDataset"):
        datamodule.train_dataloader()
