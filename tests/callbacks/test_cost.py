from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mtl_lightning.callbacks import AffinityCallback, CostCallback


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 3)
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.encoder(inputs)
        return {name: head(features) for name, head in self.heads.items()}


class Toy(pl.LightningModule):
    """Four batches of two samples; validated as well."""

    def __init__(self, passes: int = 0) -> None:
        super().__init__()
        self.passes = passes
        self.automatic_optimization = passes == 0
        self.network: nn.Module = Network()

    def batch_losses(self, batch: Any) -> dict[str, Tensor]:
        return {name: output.square().mean() for name, output in self.network(batch["inputs"][0]).items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return torch.stack(list(self.batch_losses(batch).values())).sum()
        optimizer: Any = self.optimizers()
        for _ in range(self.passes):
            for name in ("a", "b"):
                optimizer.zero_grad()
                self.manual_backward(self.batch_losses(batch)[name])
            optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.batch_losses(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2, collate_fn=_collate)

    val_dataloader = train_dataloader


def _collate(samples: list[tuple[Tensor]]) -> dict[str, Any]:
    return {"name": "batch", "inputs": [torch.stack([sample[0] for sample in samples])]}


def _counts(callback: CostCallback) -> tuple[Any, ...]:
    totals = callback.totals
    return totals.forwards, totals.backwards, totals.optimizer_steps, totals.batches, totals.samples


def test_automatic_optimisation_has_one_of_each_per_batch(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = CostCallback()
    make_trainer(callback).fit(Toy())
    assert _counts(callback) == (12, 12, 12, 12, 24)


def test_accumulation_saves_steps_only(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = CostCallback()
    make_trainer(callback, accumulate_grad_batches=2).fit(Toy())
    assert _counts(callback) == (12, 12, 6, 12, 24)


def test_manual_optimisation_is_counted_pass_by_pass(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = CostCallback()
    make_trainer(callback).fit(Toy(passes=3))
    assert _counts(callback) == (72, 72, 36, 12, 24)


@pytest.mark.parametrize("first", [False, True])
def test_measurements_of_other_callbacks_are_left_out(make_trainer: Callable[..., pl.Trainer], first: bool) -> None:
    cost, affinity = CostCallback(), AffinityCallback(every_n_batches=1, losses_fn=_slow_losses)
    make_trainer(*((cost, affinity) if first else (affinity, cost)), max_epochs=1).fit(Toy())
    assert _counts(cost) == (4, 4, 4, 4, 8)
    assert affinity.measure_seconds > 4 * 3 * 0.05
    assert 0.0 < cost.totals.seconds < affinity.measure_seconds


def _slow_losses(module: Toy, batch: Any) -> dict[str, Tensor]:
    time.sleep(0.05)
    return module.batch_losses(batch)


class Whole(Toy):
    """Has a `forward` of its own and children that are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        del self.network
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs))

    def batch_losses(self, batch: Any) -> dict[str, Tensor]:
        return {"a": self(batch["inputs"][0]).mean()}


class Child(Whole):
    """Has one child with parameters, called twice."""

    def __init__(self) -> None:
        super().__init__()
        del self.second
        self.loss = nn.MSELoss()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.first(inputs) + self.first(-inputs)


class Nested(Toy):
    """Has the network in another module, and calls only the network."""

    def __init__(self) -> None:
        super().__init__()
        self.holder = nn.ModuleDict({"network": self.network})
        del self.network

    def batch_losses(self, batch: Any) -> dict[str, Tensor]:
        return {name: output.mean() for name, output in self.holder["network"](batch["inputs"][0]).items()}


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [(Nested, None, 12), (Toy, "network.heads.a", 12), (Whole, None, 12), (Whole, "second", 12), (Child, None, 24)],
)
def test_forward_passes_are_calls_of_the_submodule(
    make_trainer: Callable[..., pl.Trainer], module: type[Toy], name: str | None, expected: int
) -> None:
    callback = CostCallback(module=name)
    make_trainer(callback).fit(module())
    assert callback.totals.forwards == expected


def test_submodule_that_is_never_called_is_reported(make_trainer: Callable[..., pl.Trainer]) -> None:
    with pytest.warns(UserWarning, match=r"No forward pass of 'network.heads' has been seen"):
        make_trainer(CostCallback("network.heads")).fit(Toy())


def test_unknown_submodule_is_refused_before_training(make_trainer: Callable[..., pl.Trainer]) -> None:
    with pytest.raises(ValueError, match=r"should name a submodule, such as 'network', .* Found 'encoder'"):
        make_trainer(CostCallback("encoder")).fit(Toy())


def test_hooks_do_not_outlive_the_run(make_trainer: Callable[..., pl.Trainer]) -> None:
    module = Toy()
    for _ in range(2):
        callback = CostCallback()
        make_trainer(callback, max_epochs=1).fit(module)
        assert callback.totals.forwards == 4
    assert not module.network.encoder._forward_pre_hooks  # type: ignore[union-attr]


def test_seconds_are_those_of_training_steps(make_trainer: Callable[..., pl.Trainer]) -> None:
    class Slow(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(0.5)

    callback = CostCallback()
    start = time.perf_counter()
    make_trainer(callback, max_epochs=1, num_sanity_val_steps=0).fit(Slow())
    # Each of four validation batches sleeps for half a second.
    assert 4 * 0.02 < callback.totals.seconds < time.perf_counter() - start - 4 * 0.5


def test_peak_memory_holds_the_largest_tensor(make_trainer: Callable[..., pl.Trainer]) -> None:
    callback = CostCallback()
    size = 64 * 2**20
    held = torch.ones(size, dtype=torch.uint8)
    make_trainer(callback, max_epochs=1).fit(Toy())
    assert callback.totals.peak_memory_mib > held.numel() / 2**20


def test_totals_are_logged_and_written(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    callback = CostCallback(dirpath=tmp_path)
    trainer = make_trainer(callback)
    trainer.fit(Toy(passes=1))
    with (tmp_path / "cost.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == callback.history
    assert [row["forwards"] for row in rows] == [8, 16, 24]
    for key in ("forwards", "backwards", "optimizer_steps", "batches", "samples", "seconds", "peak_memory_mib"):
        assert trainer.callback_metrics[f"cost/{key}"].item() == pytest.approx(getattr(callback.totals, key), rel=1e-6)


def test_batches_that_do_not_tell_have_no_samples(make_trainer: Callable[..., pl.Trainer]) -> None:
    class Numbers(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return sum(self.network(torch.ones(1, 2)).values()).sum()

        def train_dataloader(self) -> Any:
            return DataLoader([1, 2, 3], batch_size=None)  # type: ignore[arg-type]

    callback = CostCallback()
    trainer = make_trainer(callback, limit_val_batches=0)
    trainer.fit(Numbers())
    assert callback.totals.samples is None
    assert "cost/samples" not in trainer.callback_metrics


@pytest.mark.parametrize("step", [6, 8])
def test_resumed_run_goes_on_counting(make_trainer: Callable[..., pl.Trainer], tmp_path: Path, step: int) -> None:
    whole = CostCallback(dirpath=tmp_path / "whole")
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=step)
    make_trainer(whole, checkpoints).fit(Toy())
    resumed = CostCallback(dirpath=tmp_path / "resumed")
    make_trainer(resumed).fit(Toy(), ckpt_path=tmp_path / f"epoch=1-step={step}.ckpt")
    assert _counts(resumed) == _counts(whole) == (12, 12, 12, 12, 24)
    assert len(resumed.history) == 3
    assert resumed.history[0] == whole.history[0]
    assert resumed.totals.seconds > whole.history[0]["seconds"]  # type: ignore[operator]


def test_fast_dev_run_writes_nothing(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    callback = CostCallback()
    make_trainer(callback, fast_dev_run=True).fit(Toy())
    assert callback.totals.batches == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("kind", [Toy, Whole])
def test_ranks_agree(make_trainer: Callable[..., pl.Trainer], tmp_path: Path, kind: type[Toy]) -> None:
    class Report(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            report = [*_counts(callback), callback.totals.seconds, callback.totals.peak_memory_mib]
            (tmp_path / f"rank-{trainer.global_rank}.json").write_text(json.dumps(report))

    class Slow(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            time.sleep(0.1 * trainer.global_rank)

    callback = CostCallback()
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    make_trainer(callback, Slow(), Report(), devices=2, strategy=strategy, limit_val_batches=0).fit(kind())
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert reports[0] == reports[1]
    assert reports[0][:5] == [6, 6, 6, 6, 12]
    assert reports[0][5] > 6 * 0.1  # the slowest rank counts
    assert math.isfinite(reports[0][6])


def test_the_sanity_check_after_a_stopped_run_is_not_counted(make_trainer: Callable[..., pl.Trainer]) -> None:
    class Stop(pl.Callback):
        def on_before_optimizer_step(self, *arguments: Any) -> None:
            raise RuntimeError("stopped")

    callback = CostCallback()
    with pytest.raises(RuntimeError, match="stopped"):
        make_trainer(callback, Stop(), max_epochs=1).fit(Toy())
    before = callback.totals.forwards
    make_trainer(callback, max_epochs=1, num_sanity_val_steps=2).fit(Toy())
    assert callback.totals.forwards == before + 4
