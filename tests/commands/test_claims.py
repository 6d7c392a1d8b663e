from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_lightning.commands.claims import ClaimedError, claim

HOLD = """
import sys, time
from pathlib import Path
from mtl_lightning.commands.claims import claim
with claim(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    return process


def test_a_claim_keeps_others_out_and_says_whose_it_is(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "run.lock"
    process = _holder(path)
    try:
        with pytest.raises(ClaimedError, match=rf"in work elsewhere: process {process.pid} on "), claim(path):
            pass
    finally:
        process.kill()
        process.communicate()


def test_a_claim_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    process = _holder(path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with claim(path):
        assert f'"pid": {os.getpid()}' in path.read_text()
    with claim(path):  # and with its context
        pass


def test_a_claim_ends_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with pytest.raises(RuntimeError, match="failed"), claim(path):
        raise RuntimeError("failed")
    with claim(path):
        pass
