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
    # What a test has given to `seed_everything` would seed the processes that the next one forks.
    os.environ.pop("PL_GLOBAL_SEED", None)
