"""Seeds that depend on a place in the run, so that what is drawn there does not depend on where the run was started."""

from __future__ import annotations

import torch


def mix_seed(seed: int, index: int) -> int:
    """Return a seed in ``[0, 2**63)`` for the ``index``-th draw of a run.

    Neighbouring seeds and indices give unrelated streams: one round of splitmix64.

    Example:
        >>> mix_seed(0, 0) == mix_seed(0, 0), mix_seed(0, 1) == mix_seed(1, 0)
        (True, False)
    """
    value = (seed * 0x9E3779B97F4A7C15 + index + 1) * 0xBF58476D1CE4E5B9 % 2**64
    return (value ^ (value >> 31)) % 2**63


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of ``device``, and of all devices of its kind.

    ``torch.manual_seed`` does the same for every kind of device there could be, which takes a millisecond where CUDA is
    built in but not in use: too long for every pass over a batch.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)
