"""Several processes on one machine, for strategies that Lightning cannot fork by itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.multiprocessing.spawn import start_processes

# The stand-in for streams that FSDP2 uses on the CPU lacks a method in torch 2.6.
FSDP2_RUNS_ON_CPU = hasattr(torch.cpu.current_stream(), "record_event")


def in_processes(function: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Call ``function(*arguments)`` in forked processes that know their ranks; raise what one of them raises."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    start_processes(_call, (port, count, function, arguments), count, start_method="fork")  # type: ignore[no-untyped-call]


def _call(rank: int, port: int, count: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    ranks = {"LOCAL_RANK": rank, "WORLD_SIZE": count, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Synchronised(nn.Module):
    """Normalises by the statistics of all ranks, which it exchanges in the forward and in the backward pass.

    So does ``torch.nn.SyncBatchNorm``, but not on the CPU.
    """

    def forward(self, features: Tensor) -> Tensor:
        moments = torch.stack([features.mean(dim=0), features.square().mean(dim=0)])
        if torch.distributed.is_initialized():
            moments = all_reduce(moments) / torch.distributed.get_world_size()  # type: ignore[no-untyped-call]
        mean, square = moments
        return (features - mean) / (square - mean.square() + 1e-3).sqrt()


def sharded(**arguments: Any) -> ModelParallelStrategy:
    defaults: dict[str, Any] = {
        "data_parallel_size": 2,
        "tensor_parallel_size": 1,
        "process_group_backend": "gloo",
        "timeout": timedelta(seconds=60),
    }
    return ModelParallelStrategy(**(defaults | arguments))
