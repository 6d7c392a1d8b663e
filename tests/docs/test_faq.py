"""The lines that silence Lightning do so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FAQ = Path(__file__).parents[2] / "docs" / "faq.md"
PROGRAM = """
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

Trainer(max_steps=1, accelerator="cpu", enable_progress_bar=False, logger=False).fit(BoringModel())
"""


def test_nothing_is_left_of_what_the_lines_silence(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(import logging.*?)```", FAQ.read_text(encoding="utf-8"), re.DOTALL)
    command = [sys.executable, "-c", block + PROGRAM]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = result.stdout + result.stderr
    assert "`max_steps=1` reached" in said  # the filters leave the rest
    assert not re.search("LeafSpec|litlogger|litmodels", said)
