import os

# Two processes share the cores of a small CI machine, and forked processes hang on inherited OpenMP pools.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # What a test has given to `seed_everything` would seed the processes that the next one forks, and the addresses and
    # ranks that a launcher leaves behind would have the next one wait for processes that nobody starts.
    for name in ("PL_GLOBAL_SEED", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
