"""What is said when a rank waits in vain for another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.strategies import DDPStrategy, Strategy

# As gloo, NCCL and the store between the ranks put it; there is no class of errors for it.
_SIGNS = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe", "connection refused")


class LostRankError(RuntimeError):
    """A rank has stopped to answer, or has ended."""


@contextmanager
def meeting(strategy: Strategy) -> Iterator[None]:
    """Say, of an error in an exchange between ranks, what it means and which setting it depends on.

    Raises:
        LostRankError: If the exchange has timed out, or another rank has ended.

    Example:
        >>> from lightning.pytorch.strategies import DDPStrategy
        >>> with meeting(DDPStrategy()):  # doctest: +ELLIPSIS
        ...     raise RuntimeError("Timed out waiting 3000ms for recv operation to complete")
        Traceback (most recent call last):
        ...
        mtl_lightning.modules.waiting.LostRankError: All ranks should meet in this exchange ...
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if isinstance(error, LostRankError) or not any(sign in text for sign in _SIGNS):
            raise
        limit = getattr(strategy, "_timeout", None)
        waited = "" if limit is None else f", whose limit here is {limit.total_seconds():g} seconds"
        kind = DDPStrategy.__name__ if limit is None else type(strategy).__name__
        raise LostRankError(
            f"All ranks should meet in this exchange within the limit of `{kind}(timeout=timedelta(...))`. Found "
            f"one that has ended or does not answer{waited}. Its own log says why, if it has ended; if it is only "
            f"slow, raise the limit. The run goes on from the last checkpoint. Reported was: {error}"
        ) from error
