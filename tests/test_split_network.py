from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_lightning.networks import MultiHeadNetwork
from mtl_lightning.split_network import GradientGate, SplitNetwork, frozen_statistics

NAMES = ("a", "b", "c")


def network() -> Any:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    return MultiHeadNetwork(encoder, {name: nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2)) for name in NAMES})


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, inputs: Tensor) -> Any:
        return self.inner(inputs)


def test_predictions_are_those_of_the_network() -> None:
    net, inputs = network(), torch.randn(6, 4)
    expected = net(inputs)
    found = SplitNetwork(net, NAMES).predict(inputs, trained=["b"], measured=NAMES, gate=GradientGate())
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("make", [network, Whole])
def test_only_what_is_trained_has_a_graph(make: Any) -> None:
    split = SplitNetwork(make(), NAMES)
    found = split.predict(torch.randn(6, 4), trained=["b"], measured=["a", "b"], gate=GradientGate())
    assert {name: value.requires_grad for name, value in found.items()} == {"a": False, "b": True}


def test_without_training_nothing_has_a_graph() -> None:
    found = SplitNetwork(network(), NAMES).predict(torch.randn(6, 4), trained=[], measured=NAMES, gate=GradientGate())
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("make", [network, Whole])
def test_gradients_reach_the_trunk_and_the_heads_in_training(make: Any) -> None:
    net = make()
    found = SplitNetwork(net, NAMES).predict(torch.randn(6, 4), ["b"], NAMES, GradientGate())
    found["b"].sum().backward()
    with_gradient = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    inner = "" if isinstance(net, MultiHeadNetwork) else "inner."
    assert with_gradient == {
        name for name, _ in net.named_parameters() if name.startswith((f"{inner}encoder", f"{inner}heads.b"))
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_closed_gate_stops_gradients_that_are_not_finite(value: float) -> None:
    net, gate = network(), GradientGate()
    found = SplitNetwork(net, NAMES).predict(torch.randn(6, 4), ["a", "b"], NAMES, gate)
    gate.is_open = {"a": torch.tensor(False), "b": torch.tensor(True)}
    found["a"].backward(torch.full((6, 2), value), retain_graph=True)
    assert all(not parameter.grad.any() for parameter in net.encoder.parameters())
    found["b"].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.encoder.parameters())


def test_a_closed_gate_stops_what_a_broken_head_makes_of_zero() -> None:
    net, gate = network(), GradientGate()
    with torch.no_grad():
        net.heads["a"][0].weight.fill_(torch.nan)
    found = SplitNetwork(net, NAMES).predict(torch.randn(6, 4), ["a"], NAMES, gate)
    gate.is_open = {"a": torch.tensor(False)}
    found["a"].backward(torch.zeros(6, 2))
    assert all(not parameter.grad.any() for parameter in net.encoder.parameters())


def test_statistics_are_taken_up_by_the_first_pass_alone() -> None:
    net, reference, inputs, seen = network(), network(), torch.randn(6, 4), set[str]()
    split = SplitNetwork(net, NAMES)
    for trained, measured in ((["a"], ["a", "b"]), (["b"], ["b"]), ([], NAMES)):
        with split.frozen(seen):
            split.predict(inputs, trained, measured, GradientGate())
        seen.update(measured)
    reference(inputs)
    for (name, found), expected in zip(net.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)])
def test_frozen_statistics_change_no_output(norm: Any, training: bool) -> None:
    inputs = torch.randn(6, 3, 4)
    norm.train(training)
    before = norm.running_mean.clone()
    with frozen_statistics([norm]):
        found = norm(inputs)
    assert torch.equal(norm.running_mean, before)
    torch.testing.assert_close(found, norm(inputs))


class _Adapted(nn.Module):
    """Has an encoder and heads, and something in between or beside."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.encoder = nn.Linear(4, 5)
        self.neck = nn.Linear(5, 5)
        self.heads = nn.ModuleDict({name: nn.Linear(5, 2) for name in NAMES})

    def forward(self, inputs: Tensor) -> Any:
        inputs = inputs * 2 if self.kind == "before" else inputs
        features = self.encoder(inputs)
        features = self.neck(features) if self.kind == "between" else features
        outputs = {name: head(features) for name, head in self.heads.items()}
        if self.kind == "after":
            outputs = {name: output.tanh() for name, output in outputs.items()}
        return outputs | ({"features": features} if self.kind == "beside" else {})


@pytest.mark.parametrize("kind", ["before", "between", "after", "beside"])
def test_a_network_that_does_more_than_to_apply_heads_is_evaluated_as_a_whole(kind: str) -> None:
    net, inputs = _Adapted(kind), torch.randn(6, 4)
    modules = dict(net.named_modules())
    with pytest.warns(UserWarning, match="`_Adapted` has an `encoder` and `heads`, but"):
        split = SplitNetwork(net, NAMES)
    found, expected = split.predict(inputs, trained=["a"], measured=NAMES, gate=GradientGate()), net(inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert dict(net.named_modules()) == modules  # the placeholders are gone


def test_nothing_in_between_is_split() -> None:
    assert SplitNetwork(_Adapted("no"), NAMES).is_split


def test_heads_that_are_replaced_later_are_evaluated() -> None:
    net, inputs = network(), torch.randn(6, 4)
    split = SplitNetwork(net, NAMES)
    net.heads["b"] = nn.Linear(5, 3)
    assert split.predict(inputs, ["b"], NAMES, GradientGate())["b"].shape == (6, 3)
    assert split.head_parameters()["b"] == list(net.heads["b"].parameters())


def test_parameters_of_a_loss_are_behind_its_gate() -> None:
    gate, loss = GradientGate(), nn.Linear(1, 1)
    for is_open in (False, True):
        gate.is_open = {"a": torch.tensor(is_open)}
        with gate.guarded_parameters("a", loss):
            (loss(torch.ones(1, 1)) * (1.0 if is_open else torch.nan)).sum().backward()
        assert loss.bias.grad is not None
        assert torch.equal(loss.bias.grad, torch.full((1,), float(is_open)))


def test_parameters_of_several_heads_are_shared() -> None:
    net = network()
    common = nn.Linear(5, 5)
    for name in ("a", "b"):
        net.heads[name] = nn.Sequential(common, net.heads[name])
    split = SplitNetwork(net, NAMES)
    shared = {id(parameter) for parameter in split.shared_parameters()}
    assert {id(parameter) for parameter in common.parameters()} <= shared
    own = [parameter for parameters in split.head_parameters().values() for parameter in parameters]
    assert len(own) + len(shared) == len(list(net.parameters()))
    assert len(own) == 3 * 4


def test_a_network_without_heads_is_evaluated_as_a_whole() -> None:
    split = SplitNetwork(Whole(), NAMES)
    assert not split.is_split
    assert len(split.shared_parameters()) == len(list(split.network.parameters()))


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c", "d"), ("a", "b", "x")])
def test_heads_that_are_not_those_of_the_tasks_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="heads of the network should be those of the tasks"):
        SplitNetwork(network(), names)


def test_a_head_that_is_a_part_of_the_trunk_is_refused() -> None:
    net = network()
    net.heads["b"] = net.encoder[0]
    with pytest.raises(ValueError, match="head of task 'b' should have parameters of its own"):
        SplitNetwork(net, NAMES)
