from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import nn

from mtl_lightning.networks import ConvEncoder, LeNetEncoder, MultiHeadNetwork, ParetoManifold

PREFERENCE = torch.tensor([0.2, 0.3, 0.5])


def _network(encoder: nn.Module | None = None) -> MultiHeadNetwork:
    encoder = LeNetEncoder(image_size=20, out_features=12) if encoder is None else encoder
    return MultiHeadNetwork(encoder, {"left": nn.Linear(12, 10), "right": nn.Linear(12, 1)})


def _ends(network: ParetoManifold) -> list[dict[str, torch.Tensor]]:
    return [
        {name: end.detach()[task] for name, end in zip(network.names, network.ends, strict=True)} for task in range(3)
    ]


def test_at_a_vertex_it_is_the_network_of_that_end() -> None:
    base, images = _network(), torch.rand(3, 1, 20, 20)
    manifold = ParetoManifold(base, num_tasks=3)
    for task, parameters in enumerate(_ends(manifold)):
        vertex = torch.eye(3)[task]
        base.load_state_dict(parameters)
        expected, found = base(images), manifold(images, vertex)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        member = manifold.at(vertex)
        assert type(member) is MultiHeadNetwork
        assert list(member.state_dict()) == list(base.state_dict())
        assert all(torch.equal(value, parameters[name]) for name, value in member.state_dict().items())


def test_parameters_are_the_mixture_of_the_ends() -> None:
    manifold = ParetoManifold(_network(), num_tasks=3)
    ends = _ends(manifold)
    for name, parameter in manifold.at(PREFERENCE).named_parameters():
        expected = sum(float(weight) * end[name] for weight, end in zip(PREFERENCE, ends, strict=True))
        torch.testing.assert_close(parameter.detach(), expected)


def test_gradients_of_the_ends_are_those_of_the_mixture_times_the_weights() -> None:
    manifold, images = ParetoManifold(_network(), num_tasks=3), torch.rand(3, 1, 20, 20)
    torch.autograd.backward([manifold(images, PREFERENCE)["left"].square().sum()])
    member = manifold.at(PREFERENCE)
    torch.autograd.backward([member(images)["left"].square().sum()])
    gradients = {name: parameter.grad for name, parameter in member.named_parameters() if parameter.grad is not None}
    for name, ends in zip(manifold.names, manifold.ends, strict=True):
        if name in gradients:
            expected = torch.stack([weight * gradients[name] for weight in PREFERENCE])
            torch.testing.assert_close(ends.grad, expected)
    assert len(gradients) == 8  # the head of the other task has none


@pytest.mark.parametrize("init", ["independent", "common"])
def test_ends_start_apart_or_together(init: Literal["independent", "common"]) -> None:
    base = _network()
    first, second, _ = _ends(ParetoManifold(base, num_tasks=3, init=init))
    key = "encoder.conv1.weight"
    assert torch.equal(first[key], second[key]) == (init == "common")
    assert torch.equal(first[key], base.state_dict()[key]) == (init == "common")


def test_frozen_parameters_are_held_once() -> None:
    base = _network()
    base.encoder.requires_grad_(False)
    manifold = ParetoManifold(base, num_tasks=3)
    trained = sum(parameter.numel() for parameter in manifold.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in manifold.parameters() if not parameter.requires_grad)
    assert trained == 3 * sum(parameter.numel() for parameter in base.heads.parameters())
    assert frozen == sum(parameter.numel() for parameter in base.encoder.parameters())
    assert torch.equal(
        manifold.at(PREFERENCE).state_dict()["encoder.conv1.weight"], base.state_dict()["encoder.conv1.weight"]
    )


def test_it_survives_a_state_dict_and_a_copy() -> None:
    source, images = ParetoManifold(_network(ConvEncoder((4, 12))), num_tasks=3), torch.rand(3, 1, 20, 20)
    source(images, PREFERENCE)  # statistics of the batch
    source.eval()
    other = ParetoManifold(_network(ConvEncoder((4, 12))), num_tasks=3).eval()
    other.load_state_dict(source.state_dict())
    expected = source(images, PREFERENCE)["left"]
    for network in (other, copy.deepcopy(source)):
        assert torch.equal(network(images, PREFERENCE)["left"], expected)
    assert torch.equal(source.at(PREFERENCE)(images)["left"], expected)


def test_autocast_does_not_round_the_parameters() -> None:
    manifold = ParetoManifold(_network(), num_tasks=3)
    expected = manifold.condition(PREFERENCE)
    with torch.autocast("cpu", torch.bfloat16):
        found = manifold.condition(PREFERENCE)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class _Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2))


def test_it_refuses_what_it_cannot_draw_anew() -> None:
    with pytest.raises(ValueError, match="should belong to a module with `reset_parameters`"):
        ParetoManifold(_Bare(), num_tasks=2)


def test_it_refuses_arguments() -> None:
    with pytest.raises(ValueError, match="`num_tasks` should be at least 1"):
        ParetoManifold(_network(), num_tasks=0)
    with pytest.raises(ValueError, match="`init` should be"):
        ParetoManifold(_network(), num_tasks=2, init="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(3,\), one weight per task"):
        ParetoManifold(_network(), num_tasks=3)(torch.rand(3, 1, 20, 20), torch.ones(2))
