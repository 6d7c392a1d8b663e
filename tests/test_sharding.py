from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from mtl_lightning.networks import MLP, MultiHeadNetwork
from mtl_lightning.sharding import (
    called_modules,
    clip_gradient_norm,
    gathered,
    is_sharded,
    misplaced_units,
    reshard,
    shard_network,
    spread_like,
    units,
)
from tests.modules.processes import FSDP2_RUNS_ON_CPU, in_processes

on_ranks = pytest.mark.skipif(not FSDP2_RUNS_ON_CPU, reason="FSDP2 of this torch runs on no CPU")


def network() -> Any:
    torch.manual_seed(0)
    encoder = nn.Sequential(MLP(6, [8]), nn.TransformerEncoderLayer(8, 2, 8), nn.TransformerEncoderLayer(8, 2, 8))
    return MultiHeadNetwork(encoder, {"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})


class Whole(nn.Module):
    """Does more than to apply heads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.neck = nn.Linear(6, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})

    def forward(self, inputs: Any) -> Any:
        features = self.neck(self.encoder(inputs))
        return {name: head(features) for name, head in self.heads.items()}


def _in_group(function: Any) -> None:
    def run() -> None:
        torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
        function(init_device_mesh("cpu", (2,)))

    in_processes(run)


@pytest.mark.filterwarnings("ignore:`Whole` has an `encoder`")
def test_what_does_more_than_to_apply_heads_is_called_as_a_whole() -> None:
    assert list(called_modules(Whole())) == [""]


def test_units_that_share_a_parameter_are_refused() -> None:
    net = network()
    net.heads["b"].weight = net.heads["a"].weight
    with pytest.raises(ValueError, match=r"share no parameters. Found `weight` of `heads.b` in `heads.a` as well"):
        shard_network(net, mesh=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [0.5, 1e6])
def test_without_shards_gradients_are_clipped_as_by_torch(norm: float) -> None:
    nets = [nn.Linear(6, 8)]
    nets.append(copy.deepcopy(nets[0]))
    inputs = torch.randn(4, 6)
    for net in nets:
        net(inputs).square().sum().backward()
    clip_gradient_norm([*nets[0].parameters(), nn.Parameter(torch.zeros(3))], norm)
    torch.nn.utils.clip_grad_norm_(nets[1].parameters(), norm)
    for found, expected in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(found.grad, expected.grad)


@on_ranks
def test_units_are_the_encoder_the_heads_and_the_blocks() -> None:
    def check(mesh: Any) -> None:
        net = network()
        shard_network(net, mesh, blocks=(nn.TransformerEncoderLayer,))
        expected = [net.encoder, net.encoder[1], net.encoder[2], net.heads["a"], net.heads["b"]]
        assert list(units(net)) == expected
        assert all(is_sharded(parameter) for parameter in net.parameters())
        assert misplaced_units(nn.ModuleList([net]), net) == []
        before = [id(parameter) for parameter in net.parameters()]
        shard_network(net, mesh, blocks=(nn.TransformerEncoderLayer,))  # does nothing
        assert [id(parameter) for parameter in net.parameters()] == before

    _in_group(check)


@on_ranks
def test_a_step_is_seen_by_units_that_had_no_backward_pass() -> None:
    def check(mesh: Any) -> None:
        net = network()
        shard_network(net, mesh)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        inputs = torch.ones(2, 6)
        with torch.no_grad():
            before = net(inputs)["a"]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        reshard(net)
        assert all(is_sharded(parameter) for parameter in net.parameters())
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(net(inputs)["a"], before)

    _in_group(check)


@on_ranks
def test_sharded_and_whole_gradients_are_clipped_together() -> None:
    def check(mesh: Any) -> None:
        torch.manual_seed(0)
        net, other = nn.Linear(6, 8), nn.Parameter(torch.zeros(3))
        whole = [*(parameter.detach().clone() for parameter in net.parameters()), other]
        shard_network(net, mesh)
        gradients = [torch.randn_like(parameter) for parameter in whole]
        parameters = [*net.parameters(), other]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = spread_like(parameter, gradient.clone())
        clip_gradient_norm(parameters, 0.5)
        norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(gathered(parameter.grad), gradient * (0.5 / norm), rtol=1e-5, atol=1e-7)

    _in_group(check)
