"""``mtl-lightning report``: one page of what a run has left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mtl_lightning.commands.parsing import Parser
from mtl_lightning.report import find_run, read_run, write_page


def report(args: Sequence[str]) -> Path:
    """Write the page of a run, and return its path.

    Args:
        args: The arguments after ``report``: the folder of the run, or that of its versions, and ``--output``.
    """
    parser = Parser(
        prog="mtl-lightning report",
        description="Write one page of HTML that shows what a run has left: the Pareto front with a slider to pick a "
        "model and the line that loads it, hypervolume, affinity, task groups, cost, metrics. It needs no network.",
    )
    parser.add_argument("run_dir", type=str, help="Folder of a run; or of its version_N folders: the newest is taken.")
    parser.add_argument("--output", type=str, help="Path of the page; by default report.html in the folder of the run.")
    parsed = parser.parse_args(list(args))
    try:
        folder = find_run(parsed.run_dir)
        path = folder / "report.html" if parsed.output is None else Path(parsed.output)
        write_page(read_run(folder), path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if folder != Path(parsed.run_dir).resolve():
        sys.stdout.write(f"{folder.name} is the newest run in {parsed.run_dir}\n")
    sys.stdout.write(f"{path}\n")
    return path
