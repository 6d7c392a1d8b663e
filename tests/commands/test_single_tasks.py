from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mtl_lightning.callbacks import RelativeImprovementCallback
from mtl_lightning.commands.configuration import load_comparison
from mtl_lightning.commands.single_tasks import SingleTaskModule, write_baselines
from mtl_lightning.commands.training import complete
from mtl_lightning.metrics import RelativeImprovement, load_baselines
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.task import Task
from tests.commands.cases import write

Batch = tuple[Tensor, dict[str, Tensor]]


def _batches() -> list[Batch]:
    """Return batches of which every second one lacks the labels of ``risk``."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for index in range(6):
        inputs = torch.randn(8, 4, generator=generator)
        targets = {name: torch.randn(8, 1, generator=generator) for name in ("price", "risk")}
        if index % 2:
            targets["risk"] = torch.full((8, 1), torch.nan)
        batches.append((inputs, targets))
    return batches


class _Named(nn.Module):
    """A network that is no ``MultiHeadNetwork``: its heads stay."""

    def __init__(self, inner: MultiHeadNetwork) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        outputs = self.inner(inputs)
        return {"price": outputs["price"], "risk": outputs["risk"]}


def _reference(network: MultiHeadNetwork, task: str, batches: list[Batch], epochs: int) -> MultiHeadNetwork:
    """Train the encoder and one head by a plain loop; skip batches without labels."""
    network = copy.deepcopy(network)
    parameters = [*network.encoder.parameters(), *network.heads[task].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    for _ in range(epochs):
        for inputs, targets in batches:
            if not targets[task].isnan().any():
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(network.heads[task](network.encoder(inputs)), targets[task])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return network


@pytest.mark.parametrize("wrapped", [False, True], ids=["heads", "whole"])
@pytest.mark.parametrize("task", ["price", "risk"])
def test_a_task_alone_is_trained_as_by_a_plain_loop(task: str, wrapped: bool) -> None:
    network = MultiHeadNetwork(MLP(4, [8]), {"price": nn.Linear(8, 1), "risk": nn.Linear(8, 1)})
    start = copy.deepcopy(network)
    expected = _reference(network, task, _batches(), epochs=2)
    module = SingleTaskModule(
        network=_Named(network) if wrapped else network,
        tasks=[Task(name, nn.MSELoss()) for name in ("price", "risk")],
        task=task,
        optimizer=partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    )
    loader: Any = DataLoader(_batches(), batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, loader, loader)
    for part in ("encoder", f"heads.{task}"):
        found = dict(network.get_submodule(part).named_parameters())
        for name, parameter in expected.get_submodule(part).named_parameters():
            torch.testing.assert_close(found[name], parameter)
    assert set(network.heads) == ({"price", "risk"} if wrapped else {task})
    if wrapped:  # neither weight decay nor momentum has reached the other head
        other = "risk" if task == "price" else "price"
        for found_other, before in zip(network.heads[other].parameters(), start.heads[other].parameters(), strict=True):
            assert torch.equal(found_other, before)
    values = trainer.callback_metrics
    assert values["val_loss"] == values[f"val_loss/{task}"]


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of 'a', 'b'\. Found 'c'"):
        SingleTaskModule(
            network=MultiHeadNetwork(MLP(4, [8]), {"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)}),
            tasks=[Task(name, nn.MSELoss()) for name in ("a", "b")],
            task="c",
            optimizer=partial(torch.optim.SGD, lr=0.1),
        )


def test_baselines_are_the_means_over_the_seeds_in_files_for_delta_m(tmp_path: Path) -> None:
    path = write(tmp_path, methods=None, seeds=[0, 1], seed_arguments=["data.init_args.seed"])
    comparison = load_comparison(path, command="single-tasks")
    with pytest.raises(ValueError, match="Found none of left alone, seed 0"):
        write_baselines(comparison)
    results = {(run.name, run.seed): complete(run) for run in comparison.runs("single-tasks")}
    assert set(results["left", 0].test) == {"loss/left", "accuracy/left"}  # nothing of the other task
    test, val, spread = write_baselines(comparison)
    found = load_baselines(test)
    assert set(found) == {"test_accuracy/left", "test_loss/right"}
    lefts = [results["left", seed].test["accuracy/left"][0] for seed in (0, 1)]
    assert found["test_accuracy/left"].value == pytest.approx(sum(lefts) / 2)
    assert found["test_accuracy/left"].higher_is_better is True
    assert found["test_loss/right"].higher_is_better is False
    assert lefts == list(json.loads(spread.read_text())["test_accuracy/left"]["seeds"].values())
    baselines = load_baselines(val)
    assert RelativeImprovement(val)({name: baseline.value for name, baseline in baselines.items()}) == 0
    assert RelativeImprovementCallback(val).improvement.baselines == baselines
