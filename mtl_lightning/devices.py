"""What may be asked of a device without waiting for it."""

from __future__ import annotations

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
