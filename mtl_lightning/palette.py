"""The colours of figures and of the page of a run, so that a thing has one colour wherever it is shown.

They stay apart for colour-blind readers and can be seen on white and on dark ground; most are those of Okabe and Ito.
The page takes other ones in the dark only where these would fade there.
"""

from __future__ import annotations

INK = "#3C4048"
"""Lines and numbers, and what is non-dominated so far."""

EARLIER = "#B4B9C1"
"""Models of other validations."""

GRID = "#E9ECF0"
"""Lines behind a plot, and what has no value."""

MODEL = "#0072B2"
"""Models of the validation that is looked at, where no preference tells them apart."""

PREFERENCE = ("#E67E22", "#966EBE", "#1E7DC8")
"""The weight of the first task in a preference, from 0 by 1/2 to 1; in between evenly mixed, as red, green and blue."""

HELPS = "#0072B2"
"""Positive values of a matrix of tasks, such as an affinity."""

HURTS = "#D55E00"
"""Negative ones."""

STRENGTH = 0.5
"""How much of these two there is in the largest values, the rest is ground: numbers in ink can be read on it."""

GROUPS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7A64B0"),
    *("#8C564B", "#7F7F7F", "#3A7D63", "#B2DF8A", "#A6761D", "#FB9A99", "#17BECF", "#D6336C"),
)
"""Tasks that are updated together."""

ALONE = "#C9CCD1"
"""A task that is updated alone."""


def channels(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue of a ``colour``, each from 0 to 255.

    Example:
        >>> channels("#0072B2")
        (0, 114, 178)
    """
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def on_white(colour: str, strength: float = STRENGTH) -> str:
    """Return a ``colour`` of which white shines through, ``strength`` in [0, 1].

    Example:
        >>> on_white("#000000", 0.6), on_white("#0072B2", 1.0)
        ('#666666', '#0072B2')
    """
    return "#" + "".join(f"{round(strength * part + (1.0 - strength) * 255):02X}" for part in channels(colour))
