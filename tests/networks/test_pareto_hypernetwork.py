from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mtl_lightning.networks import ConvEncoder, LeNetEncoder, MultiHeadNetwork, ParetoHypernetwork

PREFERENCE = torch.tensor([0.3, 0.7])


def _target(encoder: nn.Module | None = None) -> MultiHeadNetwork:
    encoder = LeNetEncoder(image_size=20, out_features=12) if encoder is None else encoder
    return MultiHeadNetwork(encoder, {"left": nn.Linear(12, 10), "right": nn.Linear(12, 1)})


def _reference_parameters(network: ParetoHypernetwork, preference: Tensor) -> dict[str, Tensor]:
    """Navon et al. (2021): three linear layers with ReLU between them, and one linear layer per tensor."""
    layers = [layer for layer in network.features.modules() if isinstance(layer, nn.Linear)]
    features = layers[2](layers[1](layers[0](preference).relu()).relu())
    shapes = network.target.shapes
    return {
        name: (generator.weight @ features + generator.bias).reshape(shapes[name])
        for name, generator in zip(network.names, network.generators, strict=True)
    }


def test_it_generates_every_parameter_of_the_target() -> None:
    target = _target()
    network = ParetoHypernetwork(target, num_tasks=2)
    parameters = network.condition(PREFERENCE)
    assert {name: p.shape for name, p in parameters.items()} == {n: p.shape for n, p in target.named_parameters()}
    expected = _reference_parameters(network, PREFERENCE)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected[name])


def test_the_layers_are_those_of_the_published_network() -> None:
    target = MultiHeadNetwork(LeNetEncoder(), {"left": nn.Linear(50, 10), "right": nn.Linear(50, 10)})
    network = ParetoHypernetwork(target, num_tasks=2)
    size = sum(parameter.numel() for parameter in target.parameters())
    assert size == 31_910
    mlp = 100 * (2 + 1) + 2 * 100 * (100 + 1)
    assert sum(parameter.numel() for parameter in network.parameters()) == mlp + size * (100 + 1)


def test_it_predicts_as_the_target_with_these_parameters() -> None:
    target, images = _target(), torch.rand(3, 1, 20, 20)
    network = ParetoHypernetwork(target, num_tasks=2)
    expected = torch.func.functional_call(target, network.condition(PREFERENCE), (images,))
    found = network(images, PREFERENCE)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_at_a_preference_it_is_a_plain_target() -> None:
    target, images = _target(), torch.rand(3, 1, 20, 20)
    network = ParetoHypernetwork(target, num_tasks=2)
    member = network.at(PREFERENCE)
    assert type(member) is MultiHeadNetwork
    assert list(member.state_dict()) == list(target.state_dict())
    target.load_state_dict(member.state_dict())
    found, expected = target(images), network(images, PREFERENCE)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in member.parameters())


def test_preferences_make_different_networks() -> None:
    network, images = ParetoHypernetwork(_target(), num_tasks=2), torch.rand(3, 1, 20, 20)
    first, second = (network(images, torch.tensor(weights)) for weights in ([0.1, 0.9], [0.9, 0.1]))
    assert not torch.allclose(first["left"], second["left"])


def test_gradients_reach_everything_that_is_trained() -> None:
    network = ParetoHypernetwork(_target(), num_tasks=2)
    outputs = network(torch.rand(3, 1, 20, 20), PREFERENCE)
    torch.autograd.backward([output.square().sum() for output in outputs.values()])
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_frozen_parameters_of_the_target_are_kept() -> None:
    target = _target()
    target.encoder.requires_grad_(False)
    network = ParetoHypernetwork(target, num_tasks=2)
    assert network.names == ("heads.left.weight", "heads.left.bias", "heads.right.weight", "heads.right.bias")
    member = network.at(PREFERENCE)
    for key, value in target.encoder.state_dict().items():
        assert torch.equal(member.state_dict()[f"encoder.{key}"], value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_generates_parameters_in_the_dtype_of_the_target(dtype: torch.dtype) -> None:
    target = _target(ConvEncoder((4, 12))).to(dtype)
    target.encoder.requires_grad_(False)
    images = torch.rand(3, 1, 20, 20, dtype=dtype)
    network = ParetoHypernetwork(target, num_tasks=2)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert network(images, PREFERENCE)["left"].dtype == dtype
    assert network.at(PREFERENCE)(images)["left"].dtype == dtype


def test_it_survives_a_state_dict_and_a_copy() -> None:
    source, images = ParetoHypernetwork(_target(ConvEncoder((4, 12))), num_tasks=2), torch.rand(3, 1, 20, 20)
    source(images, PREFERENCE)  # statistics of the batch
    source.eval()
    other = ParetoHypernetwork(_target(ConvEncoder((4, 12))), num_tasks=2).eval()
    other.load_state_dict(source.state_dict())
    expected = source(images, PREFERENCE)["left"]
    assert torch.equal(other(images, PREFERENCE)["left"], expected)
    assert torch.equal(copy.deepcopy(source)(images, PREFERENCE)["left"], expected)
    assert torch.equal(source.at(PREFERENCE)(images)["left"], expected)


def test_autocast_does_not_round_the_parameters() -> None:
    network = ParetoHypernetwork(_target(), num_tasks=2)
    expected = network.condition(PREFERENCE)
    with torch.autocast("cpu", torch.bfloat16):
        found = network.condition(PREFERENCE)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_refuses_a_preference_of_another_number_of_tasks() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\), one weight per task"):
        ParetoHypernetwork(_target(), num_tasks=2)(torch.rand(3, 1, 20, 20), torch.ones(3))


@pytest.mark.parametrize("arguments", [{"num_tasks": 0}, {"num_tasks": 2, "hidden": 0}])
def test_it_refuses_widths(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="All widths should be positive"):
        ParetoHypernetwork(_target(), **arguments)
