from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest

from tests.modules.common import Position, SaveAfterEachBatch, assert_equal_states, loader, mt2o, trainer

CLOCK = tuple(int(part) for part in lightning.__version__.split(".")[:2]) >= (2, 6)


@pytest.mark.skipif(not CLOCK, reason="Lightning validates by the clock since 2.6")
def test_a_run_that_validates_by_the_clock_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": "00:01:00:00"}
    save, expected = SaveAfterEachBatch(tmp_path), mt2o()
    trainer([save], **options).fit(expected, Position(), loader())
    for path in (save.paths[1], save.paths[4]):  # inside an epoch, and at the end of one
        resumed = mt2o()
        trainer(**options).fit(resumed, Position(), loader(), ckpt_path=str(path))
        assert_equal_states(resumed.state_dict(), expected.state_dict())
