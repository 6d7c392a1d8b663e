import pytest
import torch
from torch import nn

from mtl_lightning.networks import DenseHead, EncoderDecoder, MultiHeadNetwork
from mtl_lightning.networks.encoder_decoder import group_norm


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 8), (16, 12), (4, 20)])
def test_gives_features_at_the_stride(size: tuple[int, int], stride: int) -> None:
    encoder = EncoderDecoder((4, 6, 10), in_channels=2, stride=stride)
    height, width = size
    features = encoder(torch.zeros(2, 2, height, width))
    assert features.shape == (2, encoder.out_features, height // stride, width // stride)


@pytest.mark.parametrize(("stride", "expected"), [(1, 4), (2, 6), (4, 10)])
def test_has_the_channels_of_the_stage_where_it_stops(stride: int, expected: int) -> None:
    encoder = EncoderDecoder((4, 6, 10), stride=stride)
    assert (encoder.out_features, encoder.stride) == (expected, stride)


def test_a_single_stage_keeps_the_resolution() -> None:
    assert EncoderDecoder((5,), in_channels=1)(torch.zeros(1, 1, 7, 9)).shape == (1, 5, 7, 9)


def test_has_the_number_of_parameters_of_the_docstring() -> None:
    assert sum(parameter.numel() for parameter in EncoderDecoder((16, 32, 64)).parameters()) == 86_480


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_gradients_reach_every_parameter(stride: int) -> None:
    encoder = EncoderDecoder((4, 6, 10), stride=stride)
    encoder(torch.randn(2, 3, 8, 8)).square().sum().backward()
    missed = [name for name, p in encoder.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert missed == []


def test_every_feature_sees_the_surroundings_of_its_pixel() -> None:
    # Without normalisation, which joins all pixels, only the coarsest stage reaches this far.
    encoder = EncoderDecoder((4, 6, 10), norm=lambda channels: nn.Identity())
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    encoder(images)[0, :, 0, 0].sum().backward()
    assert images.grad is not None
    assert bool(images.grad[..., 8, 8].any())


def test_images_of_a_batch_do_not_meet() -> None:
    encoder, images = EncoderDecoder((4, 6)).double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(encoder(images), alone)


def test_another_normalisation_takes_its_place() -> None:
    encoder = EncoderDecoder((4, 6), norm=nn.BatchNorm2d)
    assert not any(isinstance(module, nn.GroupNorm) for module in encoder.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in encoder.modules()) == 5


def test_evaluation_equals_training() -> None:
    encoder, images = EncoderDecoder((4, 6)), torch.randn(2, 3, 8, 8)
    assert torch.equal(encoder.train()(images), encoder.eval()(images))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 2), (8, 8), (24, 8), (36, 4), (7, 1)])
def test_group_normalisation_has_groups_that_divide_the_channels(channels: int, groups: int) -> None:
    norm = group_norm(channels)
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_with_heads_predicts_every_pixel(stride: int) -> None:
    encoder = EncoderDecoder((4, 6, 10), stride=stride)
    heads: dict[str, nn.Module] = {
        "depth": DenseHead(encoder.out_features, 1, scale_factor=stride),
        "classes": DenseHead(encoder.out_features, 5, hidden=6, scale_factor=stride),
    }
    predictions = MultiHeadNetwork(encoder, heads)(torch.randn(2, 3, 16, 12))
    assert {name: tuple(prediction.shape) for name, prediction in predictions.items()} == {
        "depth": (2, 1, 16, 12),
        "classes": (2, 5, 16, 12),
    }


def test_learns_where_edges_are() -> None:
    torch.manual_seed(0)
    images = (torch.rand(8, 1, 16, 16) > 0.5).float()
    target = (images - images.roll(1, dims=-1)).abs()
    network = nn.Sequential(EncoderDecoder((8, 16), in_channels=1), DenseHead(8, 1))
    optimizer, loss = torch.optim.Adam(network.parameters(), lr=1e-2), nn.BCEWithLogitsLoss()
    for _ in range(40):
        optimizer.zero_grad()
        loss(network(images), target).backward()
        optimizer.step()
    accuracy = ((network(images) > 0) == target.bool()).float().mean().item()
    assert accuracy > 0.9


@pytest.mark.parametrize("size", [(6, 8), (8, 10), (9, 9)])
def test_refuses_images_that_stages_cannot_halve(size: tuple[int, int]) -> None:
    message = rf"`images` should be multiples of 4, as 3 stages halve them 2 times. Found {size[0]} and {size[1]}"
    with pytest.raises(ValueError, match=message):
        EncoderDecoder((4, 6, 8))(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("channels", [(), (4, 0)])
def test_refuses_stages_without_channels(channels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`channels` should hold the positive number"):
        EncoderDecoder(channels)


@pytest.mark.parametrize("stride", [0, 3, 8])
def test_refuses_a_stride_of_no_stage(stride: int) -> None:
    with pytest.raises(ValueError, match=rf"`stride` should be one of the stages', \[1, 2, 4\]. Found {stride}"):
        EncoderDecoder((4, 6, 8), stride=stride)
