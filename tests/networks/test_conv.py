import pytest
import torch
from torch import nn

from mtl_lightning.networks import ConvEncoder


@pytest.mark.parametrize("channels", [(4,), (4, 8), (8, 4, 6)])
def test_gives_the_last_channels(channels: tuple[int, ...]) -> None:
    encoder = ConvEncoder(channels, in_channels=3)
    assert encoder(torch.zeros(2, 3, 9, 9)).shape == (2, encoder.out_features) == (2, channels[-1])


def test_halves_the_image_at_every_stage_but_the_first() -> None:
    assert ConvEncoder((4, 4, 4)).blocks(torch.zeros(1, 1, 16, 16)).shape[-2:] == (4, 4)


def test_training_moves_the_statistics() -> None:
    encoder = ConvEncoder((4,))
    encoder(torch.randn(8, 1, 6, 6) + 3)
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(bool((norm.running_mean != 0).all()) for norm in norms if norm.running_mean is not None)


@pytest.mark.parametrize("channels", [(), (4, 0)])
def test_refuses_stages_without_channels(channels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`channels` should hold the positive number"):
        ConvEncoder(channels)
