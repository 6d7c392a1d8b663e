"""What may be asked of a device without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_read_at_once(tensor: Tensor) -> bool:
    """Return whether the host reads ``tensor`` without waiting for a device."""
    return tensor.device.type == "cpu"


def may_be_any(mask: Tensor) -> bool:
    """Return whether an entry of ``mask`` may be true; it is looked up on the host only, where that costs no waiting.

    Example:
        >>> import torch
        >>> may_be_any(torch.tensor([False, False]))
        False
    """
    return not is_read_at_once(mask) or bool(mask.any())


class Sent:
    """A tensor on its way to the host, to be read later, when the device has long gone on with other work.

    Args:
        tensor: What is sent, as it will be after what the device has been given to do.

    Example:
        >>> import torch
        >>> counts = torch.zeros(2)
        >>> sent = Sent(counts)
        >>> _ = counts.add_(1)
        >>> sent.read()
        tensor([0., 0.])
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._copy = tensor.detach().to("cpu", copy=True)

    def read(self) -> Tensor:
        """Return it, on the host."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._copy

    def __reduce__(self) -> Any:
        return type(self), (self.read(),)  # events cannot be copied
