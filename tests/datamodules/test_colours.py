from __future__ import annotations

import pytest
import torch

from mtl_lightning.datamodules.colours import COLOURS, checked_colours, standardised


def _image() -> torch.Tensor:
    return torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0))


def test_none_changes_nothing() -> None:
    assert standardised(_image(), checked_colours(None)).equal(_image())


def test_symmetric_colours_reach_from_minus_one_to_one() -> None:
    torch.testing.assert_close(standardised(_image(), COLOURS["symmetric"]), 2 * _image() - 1)


def test_each_colour_has_its_own_mean_and_deviation() -> None:
    mean, std = COLOURS["imagenet"]
    for channel, colour in enumerate(standardised(_image(), checked_colours("imagenet"))):
        torch.testing.assert_close(colour, (_image()[channel] - mean[channel]) / std[channel])


def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of imagenet, symmetric, or None\. Found 'mnist'"):
        checked_colours("mnist")
