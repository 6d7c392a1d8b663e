from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_lightning.conditioned import AtPreference, ConditionedNetwork, Skeleton, check_preference
from mtl_lightning.networks import ConvEncoder, LeNetEncoder, VisionTransformerEncoder

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet": lambda: LeNetEncoder(image_size=20),
    "conv": lambda: ConvEncoder((4, 6)),
    "vit": lambda: VisionTransformerEncoder(image_size=20, patch_size=5, width=16, depth=1),
}


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs))


def _others(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(p.shape, generator=generator) for name, p in network.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_a_skeleton_equals_the_network_with_those_parameters(name: str) -> None:
    network, images = NETWORKS[name](), torch.rand(3, 1, 20, 20)
    parameters = _others(network)
    skeleton = Skeleton(network)
    found = skeleton(images, parameters)
    assert torch.equal(found, torch.func.functional_call(network, parameters, (images,)))
    for key, buffer in skeleton.network.named_buffers():  # batch statistics are taken up
        assert torch.equal(buffer, network.get_buffer(key))


@pytest.mark.parametrize("make", [*NETWORKS.values(), _Tied], ids=[*NETWORKS, "tied"])
def test_a_filled_skeleton_is_the_network_again(make: Any) -> None:
    network = make()
    filled = Skeleton(network).filled(dict(network.named_parameters()))
    assert type(filled) is type(network)
    state, expected = filled.state_dict(), network.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert [name for name, _ in filled.named_parameters()] == [name for name, _ in network.named_parameters()]
    assert all(
        own.data_ptr() != given.data_ptr() for own, given in zip(filled.parameters(), network.parameters(), strict=True)
    )


def test_gradients_reach_the_given_parameters() -> None:
    network, inputs = nn.Linear(3, 2), torch.randn(5, 3)
    given = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    Skeleton(network)(inputs, given).square().sum().backward()
    network(inputs).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(given[name].grad, parameter.grad)


def test_tied_parameters_are_one() -> None:
    skeleton, inputs = Skeleton(_Tied()), torch.randn(2, 4)
    assert list(skeleton.shapes) == ["first.weight", "first.bias", "second.bias"]
    zero = torch.zeros(4)
    weight = torch.randn(4, 4)
    found = skeleton(inputs, {"first.weight": weight, "first.bias": zero, "second.bias": zero})
    torch.testing.assert_close(found, inputs @ weight.T @ weight.T)


def test_frozen_parameters_and_buffers_stay_in_the_skeleton() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    network[0].requires_grad_(False)
    skeleton = Skeleton(network)
    assert list(skeleton.shapes) == ["1.weight", "1.bias"]
    keys = ["0.weight", "0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(skeleton.state_dict()) == [f"network.{key}" for key in keys]


def test_recurrent_layers_take_the_given_parameters() -> None:
    network, inputs = nn.GRU(3, 2), torch.randn(4, 1, 3)
    skeleton = Skeleton(nn.GRU(3, 2))
    parameters = dict(network.named_parameters())
    torch.testing.assert_close(skeleton(inputs, parameters)[0], network(inputs)[0])
    torch.testing.assert_close(skeleton.filled(parameters)(inputs)[0], network(inputs)[0])


def test_a_failed_call_leaves_no_parameters_behind() -> None:
    skeleton = Skeleton(nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        skeleton(torch.zeros(1, 7), {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    assert list(skeleton.network.parameters()) == []


def test_a_copied_skeleton_works_by_itself() -> None:
    skeleton = Skeleton(nn.Sequential(nn.Linear(3, 2)))
    twin = copy.deepcopy(skeleton)
    del skeleton.network
    parameters = {"0.weight": torch.ones(2, 3), "0.bias": torch.zeros(2)}
    assert torch.equal(twin(torch.ones(1, 3), parameters), torch.full((1, 2), 3.0))


def test_a_skeleton_needs_something_to_train() -> None:
    with pytest.raises(ValueError, match="should have a trainable parameter"):
        Skeleton(nn.Linear(2, 2).requires_grad_(False))


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))


def test_a_skeleton_refuses_parameters_that_are_not_floating_point() -> None:
    with pytest.raises(TypeError, match=r"floating-point. Found torch.complex64 for 'phase'"):
        Skeleton(_Complex())


class _Scaled(ConditionedNetwork):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def predict(self, inputs: Tensor, condition: Tensor) -> dict[str, Tensor]:
        return {"a": self.scale * condition[0] * inputs, "b": self.scale * condition[1] * inputs}


def test_the_copy_at_a_preference_is_fixed() -> None:
    network, preference, inputs = _Scaled(), torch.tensor([0.25, 0.75]), torch.ones(2)
    member = network.at(preference)
    with torch.no_grad():
        network.scale.fill_(7.0)
        preference.fill_(0.0)
    assert torch.equal(member(inputs)["b"], torch.full((2,), 0.75))
    assert sorted(member.state_dict()) == ["network.scale", "preference"]
    again = AtPreference(_Scaled(), torch.zeros(2))
    again.load_state_dict(member.state_dict())
    assert torch.equal(again(inputs)["b"], member(inputs)["b"])


def test_a_preference_has_one_weight_per_task() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\), one weight per task. Found shape \(1, 3\)"):
        check_preference(torch.zeros(1, 3), 3)
