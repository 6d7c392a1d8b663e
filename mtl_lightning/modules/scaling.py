"""Steps under the gradient scaler of 16-bit mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer


class ScaledSteps:
    """The steps of an optimiser on one batch, for which a gradient scaler is updated once.

    Lightning's precision plugin updates the scaler with every step. With ``G`` steps per batch the scale would grow
    ``G`` times as often as its ``growth_interval`` says, and an overflow, which tends to meet all groups of a batch,
    would lower it by ``2^G``. Here all steps of a batch see the same scale. It is lowered once if any of them was
    skipped, and counts one batch towards its growth if none was.

    Attributes:
        skipped: How many steps were skipped, in all.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._before: dict[str, Any] | None = None  # the state of the scaler at the first step of the batch
        self._after: dict[str, Any] | None = None  # that after the last one

    def take(self, precision: Any, optimizer: Optimizer, step: Callable[[], object], is_last: bool) -> bool:
        """Take a step; return whether it was taken, and not skipped for a gradient that is not finite.

        Args:
            precision: The precision plugin, with a ``scaler`` or without.
            optimizer: What the step is one of.
            step: Steps the optimiser through the plugin.
            is_last: Whether it is the last step of the batch.
        """
        scaler = getattr(precision, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            step()
            return True
        # States are numbers on the host; a step under a scaler waits for the device anyway.
        if self._before is None:
            self._before = scaler.state_dict()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        is_taken = True
        if all(parameter.grad is None for parameter in parameters):
            with _without_scaler(precision):  # which refuses to step without any gradient
                step()
        else:
            # The scale is made with its first use, which this may be on a rank that had no loss to scale.
            scaler.scale(torch.zeros((), device=parameters[0].device))
            step()
            after = scaler.state_dict()
            is_taken = after["scale"] >= self._before["scale"]
            if self._after is None or not is_taken:
                self._after = after
        self.skipped += not is_taken
        if not is_last:
            scaler.load_state_dict(self._before)
            return is_taken
        if self._after is not None:
            scaler.load_state_dict(self._after)
        self._before = self._after = None
        return is_taken


def gradient_scale(precision: Any, optimizer: Optimizer | None = None) -> float:
    """Return the factor by which gradients are too large, one without a scaler.

    Args:
        precision: The precision plugin.
        optimizer: The optimiser that is about to step. The plugin has undone the scaling by then, unless the optimiser
            does so itself, as fused ones do.
    """
    scaler = getattr(precision, "scaler", None)
    if scaler is None or (optimizer is not None and not getattr(optimizer, "_step_supports_amp_scaling", False)):
        return 1.0
    return float(scaler.get_scale())


@contextmanager
def _without_scaler(precision: Any) -> Iterator[None]:
    scaler, precision.scaler = precision.scaler, None
    try:
        yield
    finally:
        precision.scaler = scaler
