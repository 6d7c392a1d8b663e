"""How a program ends that has trained in several processes."""

from __future__ import annotations

import atexit

import torch.distributed as dist


def destroy_groups_at_exit() -> None:
    """Let process groups be destroyed while Python still runs, as Lightning does for NCCL only.

    Threads of gloo that are left to the end of Python abort, now and then, a program that has done its work
    ("terminate called without an active exception").
    """
    atexit.unregister(_destroy)  # once
    atexit.register(_destroy)


def _destroy() -> None:
    if dist.is_available() and dist.is_initialized() and "nccl" not in dist.get_backend():
        dist.destroy_process_group()
