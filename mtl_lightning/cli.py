"""The command line: ``mtl-lightning fit|validate|test|predict|compare|single-tasks|report|preview``.

The first four are a :class:`~lightning.pytorch.cli.LightningCLI`: any LightningModule and any LightningDataModule, with
their networks, tasks, rules and callbacks, are named by class in the configuration. ``compare`` trains methods with
several seeds and writes tables, ``single-tasks`` the baselines of each task alone; ``report`` shows a run on one page,
and :func:`load` makes its module again; ``preview`` draws samples of a data module with all their labels.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import DefaultHelpFormatter
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from mtl_lightning.commands.compare import compare, single_tasks
from mtl_lightning.commands.loading import load as load
from mtl_lightning.commands.parsing import USER_ERRORS, Parser, instantiate, one_line
from mtl_lightning.commands.run_report import report
from mtl_lightning.datamodules.preview import write_preview
from mtl_lightning.endings import destroy_groups_at_exit
from mtl_lightning.modules.checkpoint_io import read_checkpoint
from mtl_lightning.modules.checkpoints import CheckpointError
from mtl_lightning.modules.waiting import LostRankError

_DOES = {
    "compare": "Train methods with several seeds and write tables.",
    "single-tasks": "Train each task alone: the baselines of delta m.",
    "report": "Show what a run has left on one page.",
    "preview": "Draw samples of a data module with all their labels.",
}


class MultiTaskCLI(LightningCLI):
    """The command line of this package; subclass it to add arguments or links, as with ``LightningCLI``."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose errors are one line."""
        parser = Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action="config", help="Path to a configuration file in json or yaml format."
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse them; a checkpoint is looked at before Lightning reads it, which cannot tell what is wrong with it."""
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        checkpoint = self.config[subcommand].get("ckpt_path") if subcommand else None
        if checkpoint is not None and Path(checkpoint).is_file():
            read_checkpoint(checkpoint, map_location="meta")

    def instantiate_classes(self) -> None:
        """Make the objects of the configuration; what their constructors refuse ends in one line, too."""
        try:
            super().instantiate_classes()
        except USER_ERRORS as error:
            self.parser.error(f"{type(error).__name__}: {error}")

    def after_fit(self) -> None:
        """Say where the results are, and how to look at them."""
        folder = None if self.trainer.logger is None else self.trainer.log_dir
        if folder is not None:
            rank_zero_info(f"Results are in {folder}. On one page: mtl-lightning report {shlex.quote(str(folder))}")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of the list of commands as they are."""


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
            parser_kwargs={
                "prog": "mtl-lightning",
                "description": "Multi-task optimisation with PyTorch Lightning.",
                "epilog": "\n".join(["other commands:", *(f"    {name:<19} {_DOES[name]}" for name in _DOES)]),
                "formatter_class": _HelpFormatter,
            },
            args=None if args is None else list(args),
        )
    except (MisconfigurationException, FileNotFoundError, CheckpointError, LostRankError) as error:
        sys.exit(f"mtl-lightning: error: {one_line(str(error))}")


def preview(args: Sequence[str]) -> Path:
    """Draw samples of a data module with all their labels, and return the path of the picture.

    Args:
        args: The arguments after ``preview``: ``--data``, or ``--config`` of a file that has it, such as one for
            ``fit``; ``--output``, ``--samples`` and ``--split``.
    """
    parser = Parser(prog="mtl-lightning preview", description=_DOES["preview"])
    parser.add_argument("--config", type=str, help="Configuration file, of which only `data` is read.")
    parser.add_argument("--output", type=str, default="preview.png", help="Path of the picture.")
    parser.add_argument("--samples", type=int, default=6, help="Number of samples.")
    parser.add_argument("--split", type=str, default="train", help="train, val or test.")
    # In a group it would be headed by the first line of the docstring of the class.
    parser.add_subclass_arguments(LightningDataModule, "data", as_group=False)
    try:
        files = [args[place + 1] for place, word in enumerate(args[:-1]) if word == "--config"]
        files += [word.partition("=")[2] for word in args if word.startswith("--config=")]
        for file in files:
            content = yaml.safe_load(Path(file).read_text()) or {}
            if isinstance(content, dict) and "data" in content:
                parser.set_defaults({"data": content["data"]})
        parsed = parser.parse_args(list(args))
        if parsed.data is None:
            parser.error(
                "`--config FILE`, a configuration with `data` such as one for `fit`, or `--data CLASS` should say what "
                f"to draw. Found {' and '.join(files) + ' without `data`' if files else 'neither'}. For example: "
                "mtl-lightning preview --data mtl_lightning.datamodules.MultiDigitsDataModule"
            )
        config = instantiate(parser, parsed)
        path = write_preview(config.output, config.data, config.samples, config.split)
    except (*USER_ERRORS, yaml.YAMLError) as error:
        parser.error(f"{type(error).__name__}: {error}")
    sys.stdout.write(f"{path}\n")
    return path


def main() -> None:
    """Run the command line with the arguments of the process; without any, print the help."""
    commands = {"preview": preview, "compare": compare, "single-tasks": single_tasks, "report": report}
    known = [*MultiTaskCLI.subcommands(), *commands]
    if not sys.argv[1:]:
        run(["--help"])
    destroy_groups_at_exit()
    command, *arguments = sys.argv[1:]
    if command in commands:
        commands[command](arguments)
    elif command in known or command.startswith("-"):
        run()
    else:
        sys.exit(f"mtl-lightning: error: The command should be one of {', '.join(known)}. Found {command!r}.")


if __name__ == "__main__":
    main()
