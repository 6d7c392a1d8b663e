"""Configurations as ``fit`` reads them, and errors of one line."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

USER_ERRORS = (MisconfigurationException, OSError, TypeError, ValueError)
"""What constructors and trainers raise for something that the user can change."""


class Parser(LightningArgumentParser):
    """A parser that ends in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line and leave."""
        sys.exit(f"mtl-lightning: error: {one_line(message)}")


class _RaisingParser(LightningArgumentParser):
    """A parser whose errors are for the caller."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong."""
        raise ValueError(one_line(message))


class FitConfiguration:
    """The parts of a configuration of ``mtl-lightning fit``: ``seed_everything``, ``trainer``, ``model``, ``data``.

    Args:
        content: The configuration, as a YAML file would hold it.

    Raises:
        ValueError: If a class or an argument does not exist, or a value has the wrong type. Nothing is made yet.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._parser = _RaisingParser(prog="mtl-lightning compare")
        self._parser.add_argument("--seed_everything", type=int, default=0)
        self._parser.add_lightning_class_args(Trainer, "trainer")
        self._parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        self._parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        # The parser puts objects of its own into what it reads.
        self._parsed = self._parser.parse_object(copy.deepcopy(dict(content)))

    def resolved(self) -> str:
        """Return the configuration with all defaults, as the text of a YAML file for ``fit``."""
        # Without it, what is null in the file, but not by default, would be lost.
        try:
            text: str = self._parser.dump(self._parsed, skip_unset=False)
        except TypeError:  # the name of the argument before jsonargparse 4.49
            text = self._parser.dump(self._parsed, skip_none=False)
        return text

    def instantiate(self) -> tuple[LightningModule, LightningDataModule, dict[str, Any]]:
        """Return the model, the data module, and the arguments of the trainer, with objects in the place of classes.

        Objects are made in this order: trainer, model, data.
        """
        made = instantiate(self._parser, self._parsed)
        return made.model, made.data, dict(made.trainer)


def instantiate(parser: LightningArgumentParser, parsed: Any) -> Any:
    """Return what a parser has read, with objects in the place of classes."""
    # jsonargparse 4.49 has renamed it, and warns of the old name.
    return parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)


def one_line(message: str) -> str:
    """Return what is to be read of a message of many lines."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    if "Errors:" in lines:
        # A union of types is reported with the failure of each member, the named class first and None last. Unions
        # nest: what to read is the first failure of the innermost.
        first = len(lines) - lines[::-1].index("Errors:")
        last = first + (2 if lines[first].endswith(":") else 1)
        lines = [*(line for line in lines[:1] if line.startswith("Parser key")), *lines[first:last]]
    return " ".join(" ".join(lines).split())
