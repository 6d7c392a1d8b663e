"""How a program ends that has trained in several processes."""

from __future__ import annotations

import atexit

import torch.distributed as dist


def destroy_groups_at_exit() -> None:
    """Let process groups be destroyed while Python still runs, as Lightning does for NCCL only.

    A program that had done its work was seen to abort at its end ("terminate called without an active exception"),
    as threads of a library may that outlive Python; those of gloo end with its groups.
    """
    atexit.unregister(_destroy)  # once
    atexit.register(_destroy)


def _destroy() -> None:
    if dist.is_available() and dist.is_initialized() and "nccl" not in dist.get_backend():
        dist.destroy_process_group()
