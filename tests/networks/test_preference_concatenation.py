from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_lightning.networks import (
    MLP,
    LeNetEncoder,
    MultiHeadNetwork,
    PreferenceConcatenation,
    PreferenceUpsampling,
)

PREFERENCE = torch.tensor([0.2, 0.3, 0.5])


class _Seen(nn.Module):
    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"seen": inputs}


def _digits(in_channels: int, kernel_sizes: tuple[int, int] = (5, 5)) -> MultiHeadNetwork:
    encoder = LeNetEncoder(in_channels, kernel_sizes=kernel_sizes)
    return MultiHeadNetwork(encoder, {"left": nn.Linear(50, 10), "right": nn.Linear(50, 10)})


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 1, 8, 7)])
def test_the_weights_fill_channels_after_those_of_the_inputs(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape)
    seen = PreferenceConcatenation(_Seen())(inputs, PREFERENCE)["seen"]
    assert torch.equal(seen[:, : shape[1]], inputs)
    for task, weight in enumerate(PREFERENCE):
        assert torch.equal(seen[:, shape[1] + task], weight.expand_as(seen[:, shape[1] + task]))
    assert seen.shape[1] == shape[1] + 3


def test_an_embedding_takes_the_place_of_the_preference() -> None:
    embedding = nn.Linear(3, 2)
    seen = PreferenceConcatenation(_Seen(), embedding)(torch.zeros(4, 1, 5, 5), PREFERENCE)["seen"]
    assert seen.shape == (4, 3, 5, 5)
    torch.testing.assert_close(seen[3, 1:, 2, 4], embedding(PREFERENCE))


def test_with_the_learned_image_it_has_the_parameters_of_the_published_network() -> None:
    network = PreferenceConcatenation(_digits(in_channels=3), PreferenceUpsampling(2, image_size=36))
    assert sum(parameter.numel() for parameter in network.parameters()) == 43_058
    outputs = network(torch.rand(2, 1, 36, 36), torch.tensor([0.1, 0.9]))
    torch.autograd.backward([output.square().sum() for output in outputs.values()])
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_image_is_of_the_asked_size() -> None:
    assert PreferenceUpsampling(3, image_size=(20, 31))(PREFERENCE[None]).shape == (1, 3, 20, 31)


def test_the_copy_at_a_preference_predicts_the_same() -> None:
    network, images = PreferenceConcatenation(_digits(in_channels=3)), torch.rand(2, 1, 36, 36)
    preference = torch.tensor([0.1, 0.9])
    member = network.at(preference)
    expected = network(images, preference)
    assert all(torch.equal(output, expected[name]) for name, output in member(images).items())


def test_it_works_in_half_precision() -> None:
    network = PreferenceConcatenation(_digits(in_channels=3), PreferenceUpsampling(2, image_size=36)).bfloat16()
    outputs = network(torch.rand(2, 1, 36, 36, dtype=torch.bfloat16), torch.tensor([0.1, 0.9]))
    assert outputs["left"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("inputs", "kind", "match"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "Found torch.int64"),
        ([1.0], TypeError, "Found list"),
        (torch.zeros(3), ValueError, r"Found shape \(3,\)"),
    ],
)
def test_it_refuses_inputs(inputs: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        PreferenceConcatenation(MLP(6, (3,)))(inputs, PREFERENCE)


@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 20, 20)])
def test_it_refuses_an_image_that_does_not_fit(shape: tuple[int, ...]) -> None:
    network = PreferenceConcatenation(_Seen(), PreferenceUpsampling(3, image_size=36))
    with pytest.raises(ValueError, match=r"`embedding` should return a shape that fits .* \(1, 3, 36, 36\)"):
        network(torch.zeros(shape), PREFERENCE)


class _Flat(nn.Module):
    def forward(self, preference: Tensor) -> Tensor:
        return preference[0]


def test_it_refuses_an_embedding_of_several_samples() -> None:
    # Of shape (3,), which fits three samples and would give each of them another one.
    network = PreferenceConcatenation(_Seen(), _Flat())
    with pytest.raises(ValueError, match=r"`embedding` should return a shape that fits .* Found shape \(3,\)"):
        network(torch.zeros(3, 6), PREFERENCE)


@pytest.mark.parametrize(("num_tasks", "image_size"), [(0, 36), (2, 0), (2, (36, -1))])
def test_the_image_refuses_sizes(num_tasks: int, image_size: Any) -> None:
    with pytest.raises(ValueError, match="`num_tasks` and `image_size` should be positive"):
        PreferenceUpsampling(num_tasks, image_size)
