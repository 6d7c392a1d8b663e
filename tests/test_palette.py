from __future__ import annotations

import pytest

from mtl_lightning import palette


def _luminance(colour: str) -> float:
    """WCAG 2, relative luminance."""
    parts = [part / 255 for part in palette.channels(colour)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", [palette.HELPS, palette.HURTS])
def test_numbers_can_be_read_on_the_largest_values(colour: str) -> None:
    assert _contrast(palette.on_white(colour), palette.INK) >= 4.5  # level AA for text


@pytest.mark.parametrize("colour", palette.PREFERENCE)
@pytest.mark.parametrize("ground", ["#FFFFFF", "#1A1E24"])
def test_preferences_stand_out_on_white_and_in_the_dark(colour: str, ground: str) -> None:
    assert _contrast(colour, ground) >= 2.5


def test_groups_are_told_apart() -> None:
    colours = [palette.channels(colour) for colour in (*palette.GROUPS, palette.ALONE)]
    for index, colour in enumerate(colours):
        for other in colours[:index]:
            assert sum((a - b) ** 2 for a, b in zip(colour, other, strict=True)) ** 0.5 > 30
