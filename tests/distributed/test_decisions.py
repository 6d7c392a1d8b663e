"""What MT2O decides on the way is the same on every rank, and the same as in one process."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from mtl_lightning.callbacks import HypervolumeCallback, ParetoFrontCallback
from mtl_lightning.growth import Doubling
from mtl_lightning.modules import MT2OModule
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.strategies import PopulationParallelStrategy
from mtl_lightning.transfer import AdvantageTransfer, DistanceTransfer, TransferContext, TransferRule
from tests.modules.common import Interleaved, Position, loader, mt2o, trainer


class Kept(TransferRule):
    """Another rule, of which every matrix is kept, with the subproblems that it has replaced."""

    def __init__(self, rule: TransferRule) -> None:
        super().__init__()
        self.rule = rule
        self.matrices: list[Tensor] = []
        self.replaced: list[list[int]] = []

    def givers(self, preferences: Tensor) -> Tensor | None:
        return self.rule.givers(preferences)

    def forward(self, context: TransferContext) -> Tensor:
        self.matrices.append(self.rule(context))
        return self.matrices[-1]

    def reset(self, subproblems: Any = None) -> None:
        self.replaced.append([-1] if subproblems is None else list(subproblems))
        self.rule.reset(subproblems)


class Poison(Callback):
    """Make a parameter of one subproblem NaN in one batch, wherever it is trained."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches_seen == 7 and 2 in pl_module.shards.own:
            pl_module.population.theta.data[2 - pl_module.shards.own.start, 0] = torch.nan


class Write(Callback):
    """Write all decisions of a rank."""

    def __init__(self, folder: Path, front: ParetoFrontCallback, curve: HypervolumeCallback) -> None:
        self.folder, self.front, self.curve = folder, front, curve

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        decisions = {
            "matrices": pl_module.transfer.matrices,
            "replaced": pl_module.transfer.replaced,
            "preferences": pl_module.preferences,
            "healthy": pl_module._healthy,
            "reference_point": self.curve.reference_point,
            "curve": [list(row.values()) for row in self.curve.curve],
            "archive": [[value for value in row.values() if isinstance(value, float)] for row in self.front.archive],
        }
        torch.save(decisions, self.folder / f"rank-{trainer.global_rank}.pt")


def _train(rule: TransferRule, strategy: Any, data: Any, folder: Path) -> None:
    folder.mkdir()
    front = ParetoFrontCallback(dirpath=folder / "front", figure_every=0)
    curve = HypervolumeCallback(dirpath=folder / "front")
    module: MT2OModule = mt2o(
        transfer=Kept(rule),
        preferences=simplex_lattice(num_tasks=2, num_divisions=4),
        growth=Doubling(every_n_batches=3),
        optimizer=partial(torch.optim.SGD, lr=0.05),
    )
    run = trainer(
        [front, curve, Poison(), Write(folder, front, curve)],
        max_epochs=3,
        strategy=strategy,
        devices=1 if strategy == "auto" else 2,
        use_distributed_sampler=False,
    )
    run.fit(module, data, data)


@pytest.mark.parametrize("rule", [AdvantageTransfer, DistanceTransfer])
@pytest.mark.parametrize("parallel", ["data", "population"])
@pytest.mark.filterwarnings("ignore:.*Not finite")
def test_ranks_decide_what_one_process_does(parallel: str, rule: Any, tmp_path: Path) -> None:
    make = DDPStrategy if parallel == "data" else PopulationParallelStrategy
    strategy = make(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    # Batches of 7 are shared unevenly by two ranks, and of the last one, of one sample, a rank gets nothing.
    batches = list(loader(36, batch_size=7))
    data: Any = Interleaved if parallel == "data" else Position
    _train(rule(), "auto", data(batches), tmp_path / "one")
    _train(rule(), strategy, data(batches), tmp_path / "two")
    expected = torch.load(tmp_path / "one" / "rank-0.pt")
    first, second = (torch.load(tmp_path / "two" / f"rank-{rank}.pt") for rank in range(2))
    assert expected["replaced"] == [[-1], [-1], [2], [-1]]  # grown three times, one subproblem restarted
    assert len(expected["matrices"]) > 10
    torch.testing.assert_close(second, first, rtol=0.0, atol=0.0)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)
