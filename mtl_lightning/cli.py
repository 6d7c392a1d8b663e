"""The command line: ``mtl-lightning fit|validate|test|predict --config FILE``.

It is a :class:`~lightning.pytorch.cli.LightningCLI`: any LightningModule and any LightningDataModule, with their
networks, tasks, rules and callbacks, are named by class in the configuration.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


class _Parser(LightningArgumentParser):
    """A parser that ends in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line and leave."""
        sys.exit(f"mtl-lightning: error: {_one_line(message)}")


class MultiTaskCLI(LightningCLI):
    """The command line of this package; subclass it to add arguments or links, as with ``LightningCLI``."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose errors are one line."""
        parser = _Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action="config", help="Path to a configuration file in json or yaml format."
        )
        return parser

    def instantiate_classes(self) -> None:
        """Make the objects of the configuration; what their constructors refuse ends in one line, too."""
        try:
            super().instantiate_classes()
        except (MisconfigurationException, OSError, TypeError, ValueError) as error:
            self.parser.error(f"{type(error).__name__}: {error}")


def run(args: Sequence[str] | None = None) -> MultiTaskCLI:
    """Run the command line and return it, with its ``model``, ``datamodule`` and ``trainer``.

    Args:
        args: The arguments; those of the process by default.
    """
    # Lightning 2.6 with torch >= 2.12 warns of torch's internals on every run; nobody but Lightning can act on it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    try:
        return MultiTaskCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            args=None if args is None else list(args),
        )
    except (MisconfigurationException, FileNotFoundError) as error:  # found when the run begins: flags and checkpoints
        sys.exit(f"mtl-lightning: error: {_one_line(str(error))}")


def main() -> None:
    """Run the command line with the arguments of the process."""
    run()


def _one_line(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    if "Errors:" in lines:
        # A union of types is reported with the failure of each member, the named class first and None last. Unions
        # nest: what to read is the first failure of the innermost.
        first = len(lines) - lines[::-1].index("Errors:")
        last = first + (2 if lines[first].endswith(":") else 1)
        lines = [*(line for line in lines[:1] if line.startswith("Parser key")), *lines[first:last]]
    return " ".join(" ".join(lines).split())
