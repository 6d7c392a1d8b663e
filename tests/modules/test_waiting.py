from __future__ import annotations

from datetime import timedelta

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from mtl_lightning.modules.waiting import LostRankError, meeting


@pytest.mark.parametrize(
    "reported",
    [
        "[pair.cc:561] Connection closed by peer [127.0.0.1]:14738",
        "[unbound_buffer.cc:78] Timed out waiting 30000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=2)",
    ],
)
def test_a_lost_rank_is_explained_with_what_was_reported(reported: str) -> None:
    strategy = DDPStrategy(timeout=timedelta(minutes=2))
    with pytest.raises(LostRankError) as error, meeting(strategy), meeting(strategy):
        raise RuntimeError(reported)
    assert "whose limit here is 120 seconds" in str(error.value)
    assert str(error.value).count("Reported was") == 1
    assert str(error.value).endswith(reported)


def test_the_strategy_with_the_limit_is_named() -> None:
    strategy = ModelParallelStrategy(timeout=timedelta(minutes=3))
    expected = r"within the limit of `ModelParallelStrategy\(timeout=.*whose limit here is 180 seconds"
    with pytest.raises(LostRankError, match=expected), meeting(strategy):
        raise RuntimeError("Connection closed by peer")


def test_other_errors_are_left_as_they_are() -> None:
    original = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as error, meeting(SingleDeviceStrategy("cpu")):
        raise original
    assert error.value is original
    with pytest.raises(ValueError, match="timeout"), meeting(SingleDeviceStrategy("cpu")):
        raise ValueError("a timeout of another kind")
