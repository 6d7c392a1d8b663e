import pytest
import torch
from torch import nn
from torch.nn import functional

from mtl_lightning.networks import LeNetEncoder, MultiHeadNetwork


@pytest.mark.parametrize(("kernel_sizes", "count"), [((9, 5), 31_910), ((5, 5), 42_350)])
def test_has_the_published_number_of_parameters(kernel_sizes: tuple[int, int], count: int) -> None:
    network = MultiHeadNetwork(
        LeNetEncoder(kernel_sizes=kernel_sizes), {"left": nn.Linear(50, 10), "right": nn.Linear(50, 10)}
    )
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_equals_the_published_order_of_relu_and_pooling() -> None:
    encoder, images = LeNetEncoder(), torch.randn(3, 1, 36, 36)
    features = functional.max_pool2d(encoder.conv1(images).relu(), 2)
    features = functional.max_pool2d(encoder.conv2(features).relu(), 2)
    torch.testing.assert_close(encoder(images), encoder.linear(features.flatten(1)).relu())


@pytest.mark.parametrize(("in_channels", "image_size"), [(3, 32), (1, 28), (1, 37)])
def test_takes_other_images(in_channels: int, image_size: int) -> None:
    encoder = LeNetEncoder(in_channels, image_size, out_features=7)
    assert encoder(torch.zeros(2, in_channels, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize("image_size", [1, 10, 19])
def test_refuses_images_that_are_too_small(image_size: int) -> None:
    with pytest.raises(ValueError, match=rf"`image_size` should leave.*\(9, 5\)`. Found {image_size}"):
        LeNetEncoder(image_size=image_size)


def test_takes_the_smallest_images() -> None:
    assert LeNetEncoder(image_size=20)(torch.zeros(1, 1, 20, 20)).shape == (1, 50)
