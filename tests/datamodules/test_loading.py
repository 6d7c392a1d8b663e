from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from mtl_lightning.datamodules.loading import EpochIndexSampler, EpochSampler, ResumableDataLoader, derive_seed

SIZE, BATCH_SIZE, EPOCHS = 11, 3, 3
BATCHES = 4  # ceil(11 / 3)


class _Indices(Dataset[Tensor]):
    """Returns its indices and counts, over all processes, how often each was read."""

    def __init__(self, size: int = SIZE) -> None:
        self.reads = torch.zeros(size, dtype=torch.int64)
        self.reads.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> Tensor:
        self.reads[index] += 1
        return torch.tensor(index)


class _Recorder(LightningModule):
    """Records the batches that it is trained on, and writes them to ``folder``, one file per rank."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.folder = folder
        self.seen: list[list[int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch.tolist())
        return self.layer(batch[:, None].float()).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def on_train_end(self) -> None:
        if self.folder is not None:
            (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(self.seen))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def _loader(num_workers: int = 0, dataset: _Indices | None = None, **options: Any) -> ResumableDataLoader[Tensor]:
    dataset = dataset or _Indices()
    return ResumableDataLoader(dataset, EpochSampler(dataset, **options), BATCH_SIZE, num_workers=num_workers)


def _trainer(folder: Path, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults: dict[str, Any] = {"default_root_dir": folder, "accelerator": "cpu", "max_epochs": EPOCHS, **quiet}
    return Trainer(**(defaults | options))


def _fit(
    folder: Path, loader: DataLoader[Tensor], ckpt_path: Path | None = None, validate: bool = False, **options: Any
) -> list[list[int]]:
    module = _Recorder()
    val = DataLoader(_Indices(2)) if validate else None
    _trainer(folder, **options).fit(module, loader, val, ckpt_path=ckpt_path)
    return module.seen


def _checkpointed(
    folder: Path, num_workers: int, validate: bool = False, options: dict[str, Any] | None = None, **when: Any
) -> list[list[int]]:
    """Return the batches of an uninterrupted run that leaves a checkpoint ``<global step>.ckpt`` at each ``when``."""
    callback = ModelCheckpoint(folder, "{step}", save_top_k=-1, auto_insert_metric_name=False, **when)
    saving: dict[str, Any] = {"callbacks": [callback], "enable_checkpointing": True}
    return _fit(folder, _loader(num_workers), validate=validate, **(saving | (options or {})))


def _epoch(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


# The order


def test_each_epoch_is_another_permutation() -> None:
    sampler = EpochSampler(range(50), seed=3)
    epochs = [_epoch(sampler, epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 4


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first, second = EpochSampler(range(50), seed=3), EpochSampler(range(50), seed=3)
    _epoch(first, 0)
    torch.manual_seed(12)
    assert _epoch(first, 5) == _epoch(second, 5)
    assert _epoch(EpochSampler(range(50), seed=4), 5) != _epoch(first, 5)


def test_seed_and_epoch_are_not_added() -> None:
    assert _epoch(EpochSampler(range(50), seed=0), 1) != _epoch(EpochSampler(range(50), seed=1), 0)


def test_without_shuffling_the_order_is_that_of_the_data_set() -> None:
    sampler = EpochSampler(range(7), shuffle=False)
    assert _epoch(sampler, 0) == _epoch(sampler, 3) == list(range(7))


@pytest.mark.parametrize(
    ("left", "right"), list(itertools.combinations([(0,), (0, 0), (1, 0), (10,), ("1", 0), ("10",)], 2))
)
def test_different_keys_have_different_seeds(left: tuple[int | str, ...], right: tuple[int | str, ...]) -> None:
    assert derive_seed(*left) != derive_seed(*right)


# Ranks


def _ranks(size: int, num_replicas: int, **options: Any) -> list[EpochSampler]:
    return [EpochSampler(range(size), num_replicas=num_replicas, rank=rank, **options) for rank in range(num_replicas)]


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [2, 12, 13])
@pytest.mark.parametrize("remainder", ["repeat", "drop", "keep"])
def test_ranks_share_the_samples(size: int, num_replicas: int, remainder: str) -> None:
    orders = [list(sampler) for sampler in _ranks(size, num_replicas, remainder=remainder)]
    together = [index for order in orders for index in order]
    if remainder == "repeat":
        assert set(together) == set(range(size))
        assert len({len(order) for order in orders}) == 1
        assert len(together) - size < num_replicas
    elif remainder == "drop":
        assert len(set(together)) == len(together) == size - size % num_replicas
        assert len({len(order) for order in orders}) == 1
    else:
        assert sorted(together) == list(range(size))
    assert [len(order) for order in orders] == [len(s) for s in _ranks(size, num_replicas, remainder=remainder)]


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_a_global_batch_holds_the_samples_of_one_process_with_the_whole_batch(num_replicas: int) -> None:
    dataset = _Indices(36)
    whole = DataLoader(dataset, 4 * num_replicas, sampler=EpochSampler(dataset))
    parts = [DataLoader(dataset, 4, sampler=sampler) for sampler in _ranks(36, num_replicas)]
    for expected, *found in zip(whole, *parts, strict=True):
        assert sorted(torch.cat(found).tolist()) == sorted(expected.tolist())


def test_a_state_resumes_on_another_number_of_ranks_with_the_same_global_batch() -> None:
    def loaders(num_replicas: int) -> list[ResumableDataLoader[Tensor]]:
        dataset = _Indices(24)
        return [ResumableDataLoader(dataset, sampler, 6 // num_replicas) for sampler in _ranks(24, num_replicas)]

    (one,) = loaders(1)
    expected = [sorted(batch.tolist()) for batch in one]
    stopped = loaders(2)[0]
    next(iter(stopped))
    resumed = loaders(3)
    for loader in resumed:
        loader.load_state_dict(stopped.state_dict())
    found = [sorted(torch.cat(batches).tolist()) for batches in zip(*resumed, strict=True)]
    assert found == expected[1:]


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    class _PerRank(_Recorder):
        def train_dataloader(self) -> ResumableDataLoader[Tensor]:
            dataset = _Indices(12)
            sampler = EpochSampler(dataset, num_replicas=self.trainer.world_size, rank=self.global_rank)
            return ResumableDataLoader(dataset, sampler, 4 // self.trainer.world_size)

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    _trainer(tmp_path, devices=2, strategy=strategy, max_epochs=2).fit(_PerRank(tmp_path))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    single = _PerRank()
    _trainer(tmp_path, devices=1, max_epochs=2).fit(single)
    assert [sorted(left + right) for left, right in zip(*ranks, strict=True)] == [
        sorted(batch) for batch in single.seen
    ]


# Resuming


@pytest.fixture(params=[0, 2], ids=["no workers", "2 workers"], scope="module")
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, Any]:
    """A run that has left a checkpoint after each batch: its folder, its workers and its batches."""
    folder = tmp_path_factory.mktemp("steps")
    return folder, request.param, _checkpointed(folder, request.param, every_n_train_steps=1)


@pytest.mark.parametrize("step", range(1, EPOCHS * BATCHES))
def test_a_run_stopped_after_any_batch_goes_on_with_the_next(
    steps: tuple[Path, int, list[list[int]]], step: int, tmp_path: Path
) -> None:
    folder, num_workers, uninterrupted = steps
    assert len(uninterrupted) == EPOCHS * BATCHES
    resumed = _fit(tmp_path, _loader(num_workers), folder / f"{step}.ckpt")
    assert resumed == uninterrupted[step:]


def test_a_checkpoint_inside_an_epoch_counts_the_batches_that_were_trained(
    steps: tuple[Path, int, list[list[int]]],
) -> None:
    for step in range(1, EPOCHS * BATCHES + 1):
        checkpoint = torch.load(steps[0] / f"{step}.ckpt", weights_only=True)
        (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert (state["epoch"], state["batches"]) == ((step - 1) // BATCHES, (step - 1) % BATCHES + 1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("when", "validate"),
    [
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, False),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, True),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, True),
    ],
    ids=["epoch end", "epoch end after validation", "validation end"],
)
def test_a_run_stopped_at_an_epoch_end_goes_on_with_the_next(
    num_workers: int, when: dict[str, Any], validate: bool, tmp_path: Path
) -> None:
    uninterrupted = _checkpointed(tmp_path, num_workers, validate, **when)
    for step in (BATCHES, 2 * BATCHES):
        resumed = _fit(tmp_path, _loader(num_workers), tmp_path / f"{step}.ckpt", validate)
        assert resumed == uninterrupted[step:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_stopped_at_a_validation_inside_an_epoch_goes_on(num_workers: int, tmp_path: Path) -> None:
    uninterrupted = _checkpointed(
        tmp_path, num_workers, True, {"val_check_interval": 2}, every_n_epochs=1, save_on_train_epoch_end=False
    )
    for step in (2, BATCHES, BATCHES + 2):
        resumed = _fit(tmp_path, _loader(num_workers), tmp_path / f"{step}.ckpt", True, val_check_interval=2)
        assert resumed == uninterrupted[step:]


@pytest.mark.parametrize("step", [1, BATCHES, BATCHES + 2])
def test_a_run_ended_by_max_steps_goes_on(step: int, tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1)
    stopped = _fit(tmp_path, _loader(), max_epochs=-1, max_steps=step, callbacks=[callback], enable_checkpointing=True)
    resumed = _fit(tmp_path, _loader(), tmp_path / "last.ckpt", max_epochs=-1, max_steps=EPOCHS * BATCHES)
    assert len(stopped) == step
    assert stopped + resumed == _fit(tmp_path, _loader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_was_seen_is_not_read_again(num_workers: int) -> None:
    loader = _loader()
    first = [batch.tolist() for batch in itertools.islice(loader, 2)]
    dataset = _Indices()
    resumed = _loader(num_workers, dataset)
    resumed.load_state_dict(loader.state_dict())
    rest = [batch.tolist() for batch in resumed]
    assert sorted(itertools.chain(*first, *rest)) == list(range(SIZE))
    assert dataset.reads.nonzero().flatten().tolist() == sorted(itertools.chain(*rest))
    assert dataset.reads.max() == 1


def test_the_pass_after_the_resumed_one_is_whole() -> None:
    loader = _loader()
    loader.load_state_dict(loader.state_dict() | {"batches": 3})
    assert [len(list(loader)), len(list(loader))] == [1, BATCHES]


def test_a_state_belongs_to_its_epoch() -> None:
    loader = _loader()
    loader.load_state_dict(loader.state_dict() | {"batches": 3})
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == BATCHES


def test_a_broken_off_pass_does_not_shorten_the_next() -> None:
    loader = _loader()
    next(iter(loader))
    assert len(list(loader)) == BATCHES


@pytest.mark.parametrize("num_workers", [0, 2])
def test_set_epoch_counts_until_the_first_batch(num_workers: int) -> None:
    loader, expected = _loader(num_workers), _loader()
    iterator = iter(loader)
    loader.sampler.set_epoch(2)
    expected.sampler.set_epoch(2)
    assert [batch.tolist() for batch in iterator] == [batch.tolist() for batch in expected]


def test_a_state_is_that_of_the_loader_it_was_loaded_into() -> None:
    loader, resumed = _loader(), _loader()
    next(iter(loader))
    resumed.load_state_dict(loader.state_dict())
    assert resumed.state_dict() == loader.state_dict()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generator_is_left_alone(num_workers: int) -> None:
    before = torch.get_rng_state()
    assert len(list(_loader(num_workers))) == BATCHES
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("drop_last", [False, True])
def test_drop_last_leaves_out_the_incomplete_batch(drop_last: bool) -> None:
    dataset = _Indices()
    loader = ResumableDataLoader(dataset, EpochSampler(dataset), BATCH_SIZE, drop_last=drop_last)
    assert [len(batch) for batch in loader] == [3, 3, 3] + [2] * (not drop_last)
    assert len(loader) == BATCHES - drop_last


# Bad input


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`dataset` should hold at least one sample\. Found none"):
        EpochSampler([])


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"`rank` should be in \[0, 2\), the number of ranks\. Found {rank}"):
        EpochSampler(range(4), num_replicas=2, rank=rank)


def test_another_sampler_is_refused() -> None:
    dataset = _Indices()
    with pytest.raises(TypeError, match=r"`sampler` should be an `EpochSampler`\. Found SequentialSampler"):
        ResumableDataLoader(dataset, SequentialSampler(dataset))  # type: ignore[arg-type]


@pytest.mark.parametrize(("state", "found"), [({}, "nothing"), ({"epoch": 1}, "epoch")])
def test_the_state_of_another_kind_is_refused(state: dict[str, int], found: str) -> None:
    with pytest.raises(ValueError, match=rf"should hold epoch, batches, .*\. Found {found}\."):
        _loader().load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "resumed"),
    [
        ("seed", {"seed": 1}),
        ("shuffle", {"shuffle": False}),
        ("size", {"dataset": _Indices(SIZE + 1)}),
        ("global_batch_size", {"num_replicas": 2}),
    ],
)
def test_another_order_inside_an_epoch_is_refused(name: str, resumed: dict[str, Any]) -> None:
    loader = _loader()
    next(iter(loader))
    with pytest.raises(ValueError, match=rf"resumed in the order in which it was begun: `{name}` \d+\. Found `{name}`"):
        _loader(**resumed).load_state_dict(loader.state_dict())


def test_another_order_is_taken_after_an_epoch() -> None:
    loader = _loader()
    assert len(list(loader)) == BATCHES
    resumed = _loader(seed=1)
    resumed.load_state_dict(loader.state_dict())
    resumed.sampler.set_epoch(1)
    assert [b.tolist() for b in resumed] == [
        _epoch(EpochSampler(range(SIZE), seed=1), 1)[i : i + 3] for i in (0, 3, 6, 9)
    ]


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_indices_that_tell_the_epoch_are_in_the_same_order(epoch: int, ranks: int) -> None:
    for rank in range(ranks):
        plain, telling = (
            _epoch(sampler(range(SIZE), seed=4, num_replicas=ranks, rank=rank), epoch)
            for sampler in (EpochSampler, EpochIndexSampler)
        )
        assert [divmod(index, SIZE) for index in telling] == [(epoch, index) for index in plain]
