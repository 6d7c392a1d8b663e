from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

import mtl_lightning
from mtl_lightning.modules import MT2OModule, MultiTaskModule, TaskGroupModule, WeightedModule
from mtl_lightning.modules.checkpoints import FORMAT, CheckpointError
from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.preferences import simplex_lattice
from mtl_lightning.task import Task
from tests.modules.common import loader, mt2o, network, tasks, trainer

SGD = partial(torch.optim.SGD, lr=0.05)


def _three() -> Any:
    heads: dict[str, nn.Module] = {name: nn.Linear(8, 1) for name in "abc"}
    return MultiHeadNetwork(MLP(6, [8]), heads), [Task(name, nn.MSELoss()) for name in "abc"]


def weighted(**arguments: Any) -> WeightedModule:
    defaults: dict[str, Any] = {"network": network(), "tasks": tasks(), "optimizer": SGD}
    return WeightedModule(**(defaults | arguments))


def task_groups(**arguments: Any) -> TaskGroupModule:
    defaults: dict[str, Any] = {"network": network(), "tasks": tasks(), "optimizer": SGD}
    return TaskGroupModule(**(defaults | arguments))


def _checkpoint(module: MultiTaskModule, folder: Path) -> Path:
    run = trainer()
    run.fit(module, loader())
    run.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


def _of_three(kind: Any) -> MultiTaskModule:
    net, three = _three()
    more: Any = {"preferences": simplex_lattice(num_tasks=3, num_divisions=2)} if kind is MT2OModule else {}
    module: MultiTaskModule = kind(network=net, tasks=three, optimizer=SGD, **more)
    return module


@pytest.mark.parametrize("make", [mt2o, task_groups, weighted])
def test_another_number_of_tasks_is_refused(make: Any, tmp_path: Path) -> None:
    path = _checkpoint(make(), tmp_path)
    other = _of_three(type(make()))
    before = {name: value.clone() for name, value in other.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(CheckpointError, match=r"tasks \['a', 'b', 'c'\], found \['a', 'b'\]"):
        trainer(max_epochs=2).fit(other, loader(), ckpt_path=str(path))
    # It was found out before anything was loaded.
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())


def test_all_that_differs_is_named_at_once(tmp_path: Path) -> None:
    path = _checkpoint(task_groups(), tmp_path)
    net, three = _three()
    with pytest.raises(CheckpointError) as error:
        trainer().test(WeightedModule(net, three, SGD), loader(), ckpt_path=str(path))
    assert "module 'WeightedModule', found 'TaskGroupModule'" in str(error.value)
    assert "tasks ['a', 'b', 'c'], found ['a', 'b']" in str(error.value)


def test_other_shapes_and_names_are_listed(tmp_path: Path) -> None:
    path = _checkpoint(weighted(), tmp_path)
    other = weighted(network=network(hidden=12))
    other.network.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError) as error:
        trainer().validate(other, loader(), ckpt_path=str(path), verbose=False)
    message = str(error.value)
    assert "`network.heads.a.weight` of shape (1, 12), found (1, 8)" in message
    assert "with `network.extra.weight`, `network.extra.bias`, found without" in message
    assert "size mismatch" not in message


def test_a_population_of_other_networks_is_refused(tmp_path: Path) -> None:
    # Side by side in one matrix, their parameters show neither names nor shapes.
    path = _checkpoint(mt2o(), tmp_path)
    with pytest.raises(CheckpointError, match="number of parameters of `population`"):
        trainer(max_epochs=2).fit(mt2o(network=network(hidden=9)), loader(), ckpt_path=str(path))


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    path = _checkpoint(weighted(), tmp_path)
    content = torch.load(path, weights_only=True)
    assert content["state_dict"]["_extra_state"]["record"]["release"] == mtl_lightning.__version__
    content["state_dict"]["_extra_state"]["record"] |= {"format": FORMAT + 1, "release": "9.8.7"}
    torch.save(content, path)
    expected = rf"of format {FORMAT}.* Found format {FORMAT + 1}, written by mtl_lightning 9\.8\.7"
    with pytest.raises(CheckpointError, match=expected):
        trainer().fit(weighted(), loader(), ckpt_path=str(path))


def test_the_state_of_another_module_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": network().state_dict(), "pytorch-lightning_version": "2.5.0"}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="without its record: `encoder"):
        weighted().load_state_dict(network().state_dict())
    with pytest.raises(CheckpointError, match="without its record: `encoder"):
        WeightedModule.load_from_checkpoint(tmp_path / "other.ckpt", network=network(), tasks=tasks(), optimizer=SGD)


def test_names_may_differ_if_that_is_asked_for() -> None:
    module = weighted()
    state = weighted().state_dict()
    left_out = state.pop("network.heads.a.bias")
    state["network.other"] = left_out
    with pytest.raises(
        CheckpointError, match=r"with `network\.heads\.a\.bias`, found without; without `network\.other`"
    ):
        module.load_state_dict(state)
    found = module.load_state_dict(state, strict=False)
    assert found.missing_keys == ["network.heads.a.bias"]
    assert found.unexpected_keys == ["network.other"]


def test_a_subclass_may_be_renamed(tmp_path: Path) -> None:
    class Old(WeightedModule):
        pass

    class New(WeightedModule):
        pass

    path = _checkpoint(Old(network(), tasks(), SGD), tmp_path)
    new = New.load_from_checkpoint(path, network=network(), tasks=tasks(), optimizer=SGD)
    assert isinstance(new, New)
    assert new.batches_seen == 5


class _Fail(Callback):
    """Write a checkpoint in the middle of a batch, as an exception does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_a_checkpoint_from_inside_a_batch_is_told_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    inside, between = tmp_path / "inside.ckpt", _checkpoint(weighted(), tmp_path)
    trainer([_Fail(inside)]).fit(weighted(), loader())
    trainer(max_epochs=2).fit(weighted(), loader(), ckpt_path=str(between))
    assert not any("from inside a batch" in str(warning.message) for warning in recwarn)
    with pytest.warns(UserWarning, match="Found one from inside a batch"):
        trainer(max_epochs=2).fit(weighted(), loader(), ckpt_path=str(inside))


class _Code:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def _load(way: str, path: Path) -> None:
    arguments: dict[str, Any] = {"network": network(), "tasks": tasks(), "optimizer": SGD}
    if way == "path":
        WeightedModule.load_from_checkpoint(path, **arguments)
    elif way == "file":
        with path.open("rb") as file:
            WeightedModule.load_from_checkpoint(file, **arguments)
    else:
        getattr(trainer(), way)(weighted(), loader(), ckpt_path=str(path))


@pytest.mark.parametrize("way", ["fit", "validate", "test", "predict", "path", "file"])
def test_no_way_to_load_runs_code(way: str, tmp_path: Path) -> None:
    path, made = _checkpoint(weighted(), tmp_path), tmp_path / "made"
    torch.save(torch.load(path, weights_only=True) | {"callbacks": {"x": _Code(made)}}, path)
    with pytest.raises(CheckpointError, match=r"Found (posix|nt)\.mkdir; nothing was run"):
        _load(way, path)
    assert not made.exists()


def test_an_open_file_is_loaded(tmp_path: Path) -> None:
    module = weighted()
    with _checkpoint(module, tmp_path).open("rb") as file:
        loaded = WeightedModule.load_from_checkpoint(file, network=network(), tasks=tasks(), optimizer=SGD)
    weight = "network.heads.a.weight"
    assert torch.equal(loaded.state_dict()[weight], module.state_dict()[weight])
