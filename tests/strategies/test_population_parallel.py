"""Populations spread over real processes equal populations in one."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError

from mtl_lightning.growth import Doubling
from mtl_lightning.modules import MT2OModule
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.scalarization import SmoothChebyshev, TrackedIdeal
from mtl_lightning.strategies import PopulationParallelStrategy
from mtl_lightning.task import Task
from mtl_lightning.transfer import (
    AdvantageTransfer,
    DistanceTransfer,
    NeighborTransfer,
    NoTransfer,
    ProportionalTransfer,
    TransferRule,
)
from tests.distributed.ranks import Ranks, run_ranks
from tests.modules.common import Interleaved, Position, assert_equal_states, flat, loader, mt2o, network, rows, trainer

RULES: dict[str, Callable[[], TransferRule]] = {
    "none": NoTransfer,
    "neighbor": partial(NeighborTransfer, decay=0.9),
    "proportional": partial(ProportionalTransfer, rate=3.0),
    "distance": DistanceTransfer,
    "advantage": AdvantageTransfer,
}
ADAM = partial(torch.optim.Adam, lr=1e-2)
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
SGD = partial(torch.optim.SGD, lr=0.05)


class Write(Callback):
    """Write what each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.save(
            {
                "theta": rows(pl_module),
                "values": pl_module.objective_values,
                "metrics": dict(pl_module.metric_values),
                "buffers": [buffer.clone() for buffer in pl_module.population.network.buffers()],
                "logged": {k: v for k, v in trainer.callback_metrics.items() if k.startswith(("val", "train"))},
                "skipped": pl_module.get_extra_state()["skipped_steps"],
            },
            self.folder / f"rank-{trainer.global_rank}.pt",
        )


def strategy(data_parallel_size: int = 1) -> PopulationParallelStrategy:
    return PopulationParallelStrategy(
        data_parallel_size, process_group_backend="gloo", timeout=timedelta(seconds=60), start_method="fork"
    )


def ranked(devices: int = 2, data_parallel_size: int = 1, **arguments: Any) -> Trainer:
    """Return a trainer for a process that `Ranks` has started."""
    own = PopulationParallelStrategy(data_parallel_size, process_group_backend="gloo", timeout=timedelta(seconds=30))
    return trainer(strategy=own, devices=devices, use_distributed_sampler=False, **arguments)


def spread(devices: int = 2, data_parallel_size: int = 1, **arguments: Any) -> Trainer:
    return trainer(strategy=strategy(data_parallel_size), devices=devices, use_distributed_sampler=False, **arguments)


def batches() -> list[Any]:
    return list(loader())


def fixed() -> Position:
    """Return the same batches in the same order on every process."""
    return Position(batches())


def compare(
    build: Callable[[], MT2OModule],
    folder: Path,
    devices: int = 2,
    data_parallel_size: int = 1,
    exact: bool = False,
    data: Callable[[], Any] = fixed,
    **arguments: Any,
) -> None:
    """Train in one process and in several, and compare everything on every rank."""
    arguments = {"max_epochs": 2} | arguments
    (folder / "alone").mkdir()
    alone = build()
    trainer(callbacks=[Write(folder / "alone")], **arguments).fit(alone, data(), data())
    module = build()
    run = spread(devices, data_parallel_size, callbacks=[Write(folder)], **arguments)
    run.fit(module, data(), data())
    expected = torch.load(folder / "alone" / "rank-0.pt")
    close = (
        partial(torch.testing.assert_close, rtol=0.0, atol=0.0)
        if exact
        else partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    )
    close(rows(module), rows(alone))
    for rank in range(devices):
        close(torch.load(folder / f"rank-{rank}.pt"), expected)


@pytest.mark.parametrize("name", RULES)
def test_two_processes_train_what_one_does(name: str, tmp_path: Path) -> None:
    def build() -> MT2OModule:
        return mt2o(
            transfer=RULES[name](),
            scalarization=SmoothChebyshev(mu=0.1, ideal=TrackedIdeal(num_tasks=2)),
            tasks=[Task("a", nn.MSELoss(), MeanAbsoluteError()), Task("b", nn.L1Loss())],
            preferences=simplex_lattice(num_tasks=2, num_divisions=4),  # five subproblems: two and three
            optimizer=ADAM,
            gradient_clip_norm=0.5,
        )

    compare(build, tmp_path, exact=name != "distance")


def test_dropout_and_batch_norm_are_those_of_one_process(tmp_path: Path) -> None:
    def build() -> MT2OModule:
        return mt2o(network=network(dropout=0.3), transfer=NeighborTransfer(), transfer_every=2, accumulate_batches=2)

    compare(build, tmp_path, exact=True)


def test_the_buffers_of_a_dense_transfer_are_mixed_over_processes(tmp_path: Path) -> None:
    def build() -> MT2OModule:
        return mt2o(network=network(dropout=0.3), transfer=DistanceTransfer(), optimizer=ADAM, init="independent")

    torch.manual_seed(3)
    state = torch.get_rng_state()

    def seeded() -> MT2OModule:
        torch.set_rng_state(state)
        return build()

    compare(seeded, tmp_path)


@pytest.mark.parametrize("devices", [2, 3])
def test_growth_from_fewer_subproblems_than_processes(devices: int, tmp_path: Path) -> None:
    def build() -> MT2OModule:
        return mt2o(growth=Doubling(every_n_batches=2), optimizer=ADAM, transfer=NeighborTransfer())

    compare(build, tmp_path, devices=devices, exact=True)


def test_growth_under_vmap_where_a_process_has_no_subproblem(tmp_path: Path) -> None:
    compare(lambda: mt2o(growth=Doubling(every_n_batches=2), backend="vmap", optimizer=ADAM), tmp_path)


def test_metrics_of_a_population_that_grows_between_validations(tmp_path: Path) -> None:
    """Those of new subproblems are copies of one that has been synchronised; those inside of others are their own."""

    def build() -> MT2OModule:
        known = [Task("a", nn.MSELoss(), 2.0 * MeanAbsoluteError()), Task("b", nn.L1Loss(), MeanAbsoluteError())]
        return mt2o(tasks=known, growth=Doubling(every_n_batches=5), optimizer=ADAM)

    compare(build, tmp_path, exact=True, max_epochs=4)


def test_vmap_in_every_process(tmp_path: Path) -> None:
    compare(lambda: mt2o(backend="vmap", batches="shared", optimizer=ADAM), tmp_path)


def test_every_subproblem_has_its_own_slice_of_a_batch(tmp_path: Path) -> None:
    compare(lambda: mt2o(batches="independent"), tmp_path, exact=True)


@pytest.mark.parametrize("patterns", [["encoder.*"], ["heads.*.bias"]])  # the latter one number wide, twice
@pytest.mark.parametrize("optimizer", [ADAM, ADAMW], ids=["adam", "adamw"])
def test_some_parameters_are_transferred(patterns: list[str], optimizer: Any, tmp_path: Path) -> None:
    start = network()  # which seeds

    def build() -> MT2OModule:
        torch.manual_seed(3)
        lattice = simplex_lattice(num_tasks=2, num_divisions=2)  # three subproblems: one process has a single one
        own = {"transfer_parameters": patterns, "preferences": lattice, "init": "independent"}
        return mt2o(network=start, optimizer=optimizer, **own)

    compare(build, tmp_path, exact=True)


def test_what_is_added_after_the_step_is_that_of_one_process(tmp_path: Path) -> None:
    compare(lambda: mt2o(optimizer=ADAMW), tmp_path, exact=True)


def test_a_rule_that_reads_parameters_reads_all_where_some_are_transferred(tmp_path: Path) -> None:
    start = network()

    def build() -> MT2OModule:
        torch.manual_seed(3)
        own = {"transfer": DistanceTransfer(), "transfer_parameters": ["encoder.*"], "init": "independent"}
        return mt2o(network=start, optimizer=ADAM, **own)

    compare(build, tmp_path)


def test_frozen_parameters_of_any_layout_and_dtype(tmp_path: Path) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last).requires_grad_(False)
            self.frozen = nn.Parameter(torch.randn(6, 6).bfloat16().t(), requires_grad=False)
            self.register_buffer("mask", torch.tensor([True, False] * 3))
            self.rest = network()

        def forward(self, inputs: Tensor) -> Any:
            return self.rest((inputs * self.get_buffer("mask")) @ self.frozen.float() + self.conv.weight.sum())

    compare(lambda: mt2o(network=Network(), optimizer=ADAM), tmp_path, exact=True)


def test_inputs_may_hold_nan(tmp_path: Path) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest = network()

        def forward(self, inputs: Tensor) -> Any:
            return self.rest(inputs.nan_to_num(0.0, 0.0, 0.0))

    def data() -> Position:
        found = batches()
        found[0][0][0, 0], found[0][0][1, 1] = torch.nan, torch.inf
        return Position(found)

    compare(lambda: mt2o(network=Network()), tmp_path, exact=True, data=data)


def _train_from_random_preferences(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.manual_seed(rank)  # as processes that nobody has seeded alike
    weights = torch.rand(6, 2)
    module = mt2o(preferences=weights / weights.sum(dim=1, keepdim=True), network=network(seed=rank), optimizer=ADAM)
    ranked(max_epochs=1).fit(module, fixed())
    torch.save((module.preferences, rows(module)), folder / f"rank-{rank}.pt")


def test_all_processes_have_the_preferences_of_the_first(tmp_path: Path) -> None:
    run_ranks(_train_from_random_preferences, [tmp_path], folder=tmp_path)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    torch.testing.assert_close(second, first, rtol=0.0, atol=0.0)
    torch.manual_seed(0)
    weights = torch.rand(6, 2)
    alone = mt2o(preferences=weights / weights.sum(dim=1, keepdim=True), optimizer=ADAM)
    trainer().fit(alone, fixed())
    assert torch.equal(first[1], rows(alone))


@pytest.mark.parametrize("transfer", [NeighborTransfer, DistanceTransfer])
def test_growth_of_subproblems_times_data(transfer: Any, tmp_path: Path) -> None:
    alone, module = (
        mt2o(transfer=transfer(), optimizer=SGD, growth=Doubling(every_n_batches=2), gradient_clip_norm=1.0)
        for _ in range(2)
    )
    trainer(max_epochs=2).fit(alone, Interleaved(batches()), Interleaved(batches()))
    run = spread(4, data_parallel_size=2, max_epochs=2, callbacks=[Write(tmp_path)])
    run.fit(module, _Halves(batches()), _Halves(batches()))
    for rank in range(4):
        found = torch.load(tmp_path / f"rank-{rank}.pt")
        torch.testing.assert_close(found["theta"], rows(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["neighbor", "distance"])
def test_subproblems_times_data(name: str, tmp_path: Path) -> None:
    """Two blocks of subproblems, each on two processes with half of every batch."""
    alone, module = (mt2o(transfer=RULES[name](), optimizer=SGD) for _ in range(2))
    trainer(max_epochs=2).fit(alone, Interleaved(batches()), Interleaved(batches()))
    run = spread(4, data_parallel_size=2, max_epochs=2, callbacks=[Write(tmp_path)])
    run.fit(module, _Halves(batches()), _Halves(batches()))
    for rank in range(4):
        found = torch.load(tmp_path / f"rank-{rank}.pt")
        torch.testing.assert_close(found["theta"], rows(alone), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["values"], alone.objective_values, rtol=1e-5, atol=1e-6)


class _Halves(Interleaved):
    """Every batch split into two halves by the place of a process among those with the same subproblems."""

    def __iter__(self) -> Any:
        half = torch.distributed.get_rank() % 2
        for inputs, targets in self.batches:
            yield inputs[half::2], {name: target[half::2] for name, target in targets.items()}


def test_labels_that_are_missing_are_missing_everywhere(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            known = ~target.isnan()
            return torch.where(known, preds - target, 0.0).square().sum() / known.sum()

    def data() -> Position:
        found = batches()
        found[1][1]["b"][:] = torch.nan
        for name in ("a", "b"):
            found[2][1][name][:] = torch.nan
        found[3][1]["a"][:3] = torch.nan
        return Position(found)

    tasks = [Task("a", Masked()), Task("b", Masked())]
    compare(lambda: mt2o(tasks=tasks, optimizer=ADAM), tmp_path, exact=True, data=data)


class _Poison(Callback):
    """Make a parameter of one subproblem NaN at a batch, on the process that holds it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.batches_seen == 3 and 2 in pl_module.shards.own:
            pl_module.population.theta.data[2 - pl_module.shards.own.start, 0] = torch.nan


@pytest.mark.parametrize("care", ["reseed", "freeze"])
@pytest.mark.filterwarnings("ignore:.*Not finite")
def test_a_sick_subproblem_is_looked_after_by_all(care: Any, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone, module = (mt2o(on_nonfinite=care, optimizer=ADAM, transfer=AdvantageTransfer()) for _ in range(2))
    trainer(max_epochs=2, callbacks=[_Poison()]).fit(alone, fixed())
    spread(max_epochs=2, callbacks=[_Poison()]).fit(module, fixed())
    assert torch.equal(rows(module).nan_to_num(7.0), rows(alone).nan_to_num(7.0))


# ----------------------------------------------------------------------------------------------------- checkpoints


class Save(Callback):
    """Write a checkpoint in the middle of the second epoch."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches_seen == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_checkpoint_goes_on_with_any_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    def build() -> MT2OModule:
        return mt2o(
            network=network(dropout=0.3), optimizer=ADAM, accumulate_batches=2, growth=Doubling(every_n_batches=4)
        )

    def run(processes: int, *callbacks: Callback) -> Trainer:
        make = trainer if processes == 1 else partial(spread, processes)
        return make(max_epochs=3, callbacks=list(callbacks))

    whole = build()
    trainer(max_epochs=3).fit(whole, Position())
    # The seventh batch is in the middle of a step: gradients and losses are waiting.
    run(before, Save(tmp_path / "run.ckpt", 7)).fit(build(), Position())
    resumed = build()
    run(after).fit(resumed, Position(), ckpt_path=str(tmp_path / "run.ckpt"))
    assert torch.equal(rows(resumed), rows(whole))


def test_a_checkpoint_of_many_processes_is_that_of_one(tmp_path: Path) -> None:
    make = partial(mt2o, optimizer=ADAM)
    trainer(max_epochs=2, callbacks=[Save(tmp_path / "one.ckpt", 7)]).fit(make(), fixed())
    spread(max_epochs=2, callbacks=[Save(tmp_path / "two.ckpt", 7)]).fit(make(), fixed())
    one, two = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("one", "two"))
    assert_equal_states(two["state_dict"], one["state_dict"])
    assert_equal_states(two["optimizer_states"][0]["state"], one["optimizer_states"][0]["state"])


class _AfterFit(Callback):
    """Use the whole population once training is over, and save once more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches_seen == 6:
            theirs = [flat(pl_module.subproblem(index)) for index in range(4)]
            everyone = pl_module(torch.ones(2, 6))
            own = torch.stack([pl_module.subproblem(index)(torch.ones(2, 6))["a"] for index in range(4)])
            torch.testing.assert_close(everyone["a"], own)
            assert pl_module.population.size == 2
            torch.save(theirs, self.folder / f"members-{trainer.global_rank}.pt")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        assert pl_module.population.size == 4
        assert not pl_module.shards.is_spread
        trainer.save_checkpoint(self.folder / "after.ckpt")


def test_models_can_be_picked_during_and_after_training(tmp_path: Path) -> None:
    module = mt2o(optimizer=ADAM)
    spread(max_epochs=2, callbacks=[_AfterFit(tmp_path)]).fit(module, fixed())
    first, second = (torch.load(tmp_path / f"members-{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    whole = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert torch.equal(whole["state_dict"]["population.theta"], rows(module))
    assert whole["optimizer_states"][0]["state"][0]["exp_avg"].shape == rows(module).shape


def _all_stages(folder: Path) -> None:
    """Fit, validate, test, predict and fit again, in this process alone and among others."""
    found = {}
    for name, make in (("spread", ranked), ("alone", trainer)):
        own = folder if name == "spread" else folder / os.environ["LOCAL_RANK"]
        (own / name).mkdir(parents=True, exist_ok=True)
        known = [Task("a", nn.MSELoss(), MeanAbsoluteError()), Task("b", nn.L1Loss())]
        module = mt2o(tasks=known, optimizer=ADAM, accumulate_batches=2)
        saving = ModelCheckpoint(own / name, monitor="val_loss", save_last=True)
        run = make(
            max_epochs=2,
            callbacks=[saving, EarlyStopping("val_loss")],
            enable_checkpointing=True,
            num_sanity_val_steps=1,
            val_check_interval=3,
        )
        run.fit(module, fixed(), fixed())
        run.validate(module, fixed(), verbose=False)
        run.save_checkpoint(own / name / "after.ckpt")
        after = torch.load(own / name / "after.ckpt", weights_only=True)
        results = [rows(module), after["state_dict"]["population.theta"], after["optimizer_states"]]
        results += [run.validate(module, fixed(), verbose=False, ckpt_path="best")]
        results += [run.test(module, fixed(), verbose=False, ckpt_path="best"), run.predict(module, fixed())]
        run.fit_loop.max_epochs = 4
        run.fit(module, fixed(), fixed())
        copied = copy.deepcopy(module)
        results += [rows(module), trainer().validate(copied, fixed(), verbose=False), copied.objective_values]
        found[name] = [*results, pickle.loads(pickle.dumps(copied.population)).theta.detach()]
    torch.testing.assert_close(found["spread"], found["alone"], rtol=0.0, atol=0.0)


def test_every_stage_is_that_of_one_process(tmp_path: Path) -> None:
    run_ranks(_all_stages, [tmp_path], folder=tmp_path)


def _validate_on_the_first_process(folder: Path) -> None:
    module = mt2o(tasks=[Task("a", nn.MSELoss(), MeanAbsoluteError()), Task("b", nn.L1Loss())])
    ranked().fit(module, fixed(), fixed())
    expected = module.objective_values, dict(module.metric_values)
    if os.environ["LOCAL_RANK"] == "0":  # no other process is there to be waited for
        trainer().validate(module, fixed(), verbose=False)
        torch.testing.assert_close((module.objective_values, dict(module.metric_values)), expected)
    torch.distributed.barrier()


def test_one_process_can_validate_after_the_run(tmp_path: Path) -> None:
    run_ranks(_validate_on_the_first_process, [tmp_path], folder=tmp_path)


class _Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = True


def _stop_within_a_step(folder: Path) -> None:
    make = partial(mt2o, optimizer=ADAM, accumulate_batches=2)
    run = ranked(callbacks=[_Stop()], min_epochs=0, max_epochs=2)
    run.fit(make(), fixed())
    run.save_checkpoint(folder / "stopped.ckpt")  # the gradient of the first batch is still to be used
    resumed = make()
    ranked(max_epochs=1).validate(resumed, fixed(), ckpt_path=str(folder / "stopped.ckpt"), verbose=False)
    own = torch.load(folder / "stopped.ckpt", weights_only=True)["state_dict"]["_extra_state"]
    assert own["accumulated"] == 1
    torch.testing.assert_close(resumed.get_extra_state()["gradient"], own["gradient"], rtol=0.0, atol=0.0)
    alone, expected = make(), trainer(callbacks=[_Stop()], max_epochs=2)
    expected.fit(alone, fixed())
    torch.testing.assert_close(own["gradient"], alone.population.theta.grad, rtol=0.0, atol=0.0)


def test_a_run_that_stops_within_a_step_keeps_its_gradient(tmp_path: Path) -> None:
    run_ranks(_stop_within_a_step, [tmp_path], folder=tmp_path)


def _train_on_one_block(folder: Path, data_parallel_size: int) -> None:
    module = mt2o(optimizer=ADAM)
    ranked(data_parallel_size, data_parallel_size, max_epochs=1).fit(module, fixed(), fixed())
    module.trainer = None
    copy.deepcopy(module)  # no process group is left in it
    trainer(max_epochs=1).fit(module, fixed())
    alone = mt2o(optimizer=ADAM)
    for _ in range(2):
        trainer(max_epochs=1).fit(alone, fixed())
    torch.testing.assert_close(rows(module), rows(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data_parallel_size", [1, 2])
def test_a_single_block_of_subproblems_leaves_no_group_behind(data_parallel_size: int, tmp_path: Path) -> None:
    size = data_parallel_size
    run_ranks(_train_on_one_block, [tmp_path, size], world_size=size, folder=tmp_path)


def test_validation_of_a_trained_population(tmp_path: Path) -> None:
    module = mt2o()
    trainer().fit(module, fixed())
    trainer().validate(module, fixed(), verbose=False)
    expected = module.objective_values.clone()
    (found,) = spread().validate(module, fixed(), verbose=False)
    torch.testing.assert_close(torch.tensor(found["val_loss"]), expected.mean().float())


# ---------------------------------------------------------------------------------------------------------- errors


def test_processes_that_see_other_batches_are_told(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="should see the same batches"):
        spread(max_epochs=1).fit(mt2o(), Interleaved(batches()))


def test_more_processes_than_subproblems_are_refused() -> None:
    with pytest.raises(Exception, match=r"at least as many subproblems as processes.*Found 2"):
        spread(3).fit(mt2o(preferences=[[1.0, 0.0], [0.0, 1.0]]), fixed())


def test_a_module_without_a_population_is_refused() -> None:
    class Plain(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            """Do nothing."""

        def configure_optimizers(self) -> None:
            """Have none."""

    with pytest.raises(Exception, match=r"should train a module with a population.*Found Plain"):
        spread(2).fit(Plain(), fixed())


def test_processes_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(Exception, match=r"divisible by `data_parallel_size`, 2\. Found 3"):
        spread(3, data_parallel_size=2).fit(mt2o(), fixed())


@pytest.mark.parametrize("size", [0, 1.5])
def test_a_bad_data_parallel_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="`data_parallel_size` should be an integer of at least 1"):
        PopulationParallelStrategy(data_parallel_size=size)


class _End(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and trainer.global_rank == 1:
            os._exit(3)


def _train_until_one_ends() -> None:
    ranked(callbacks=[_End()]).fit(mt2o(), fixed())


def test_after_the_end_of_a_process_the_others_say_so(tmp_path: Path) -> None:
    with Ranks(_train_until_one_ends, folder=tmp_path) as ranks:
        assert ranks.join() == [1, 3], ranks.report()
        assert "Found one that has ended or does not answer" in ranks.log(0), ranks.report()


# ------------------------------------------------------------------------------------------------------- precision


class _Overflow(Callback):
    """Make the gradient of one subproblem overflow in one batch, wherever it is trained."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        scaler = trainer.precision_plugin.scaler  # type: ignore[attr-defined]
        scaler.scale(torch.zeros(()))  # it starts with its first use
        if pl_module.batches_seen == 4 and 3 in pl_module.shards.own:
            scaler._scale.fill_(2.0**127)  # on the process of that subproblem alone


@pytest.mark.parametrize("fused", [False, True])
def test_all_skip_a_step_that_overflows_in_one_process(fused: bool, tmp_path: Path) -> None:
    """Under a gradient scaler, as under float16 on a GPU."""

    def half(**arguments: Any) -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "max_epochs": 2} | arguments

    (tmp_path / "alone").mkdir()
    optimizer = partial(torch.optim.Adam, lr=1e-2, fused=fused)
    alone, module = mt2o(optimizer=optimizer), mt2o(optimizer=optimizer)
    trainer(**half(callbacks=[_Overflow(), Write(tmp_path / "alone")])).fit(alone, fixed(), fixed())
    spread(**half(callbacks=[_Overflow(), Write(tmp_path)])).fit(module, fixed(), fixed())
    assert rows(alone).isfinite().all()
    torch.testing.assert_close(rows(module), rows(alone), rtol=1e-3, atol=1e-4)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    assert first["skipped"] == torch.load(tmp_path / "alone" / "rank-0.pt")["skipped"] > 0


def _fit_twice_in_half_precision(folder: Path) -> None:
    states = []
    for make in (ranked, trainer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        run = make(max_epochs=1, plugins=[plugin])
        for epochs in (1, 2):
            run.fit_loop.max_epochs = epochs
            run.fit(mt2o(optimizer=ADAM), fixed())
        states.append(plugin.scaler.state_dict())  # type: ignore[union-attr]
    assert states[0] == states[1]
    assert states[0]["scale"] == 2.0**12


def test_the_scaler_goes_on_in_the_next_fit(tmp_path: Path) -> None:
    run_ranks(_fit_twice_in_half_precision, [tmp_path], folder=tmp_path)


def _keep_a_scaler_that_is_off() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", enabled=False))
    ranked(max_epochs=1, plugins=[plugin]).fit(mt2o(optimizer=ADAM), fixed())
    assert plugin.scaler is not None
    assert not plugin.scaler.is_enabled()


def test_a_scaler_that_is_off_stays_off(tmp_path: Path) -> None:
    run_ranks(_keep_a_scaler_that_is_off, folder=tmp_path)
