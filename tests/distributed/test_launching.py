"""The same training under every way in which processes are started: by Lightning, torchrun, SLURM, the command line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.program import main

PROGRAM = str(Path(__file__).with_name("program.py"))
ROOT = Path(__file__).parents[2]
LIMIT = 180.0


def _port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _run(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]) -> None:
    """Run commands at the same time; fail with their output if one does, or if they take too long."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    base |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    running = [
        subprocess.Popen(command, env=base | dict(own), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, own in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]


def _by_lightning(output: Path) -> None:
    _run([[sys.executable, PROGRAM, "population", "2", "1", str(output)]], [{}])


def _by_torchrun_on_two_nodes(output: Path) -> None:
    port = str(_port())
    commands = [
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)),
            *("--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port),
            *(PROGRAM, "population", "1", "2", str(output)),
        ]
        for node in range(2)
    ]
    _run(commands, [{}, {}])


def _by_slurm_on_two_nodes(output: Path) -> None:
    """As ``srun`` starts them: one process for each task, told apart by variables."""
    common = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "training",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port()),
    }
    ranks = [common | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)]
    _run([[sys.executable, PROGRAM, "ddp", "1", "2", str(output)]] * 2, ranks)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what one process trains."""
    path = tmp_path_factory.mktemp("alone") / "alone.pt"
    main("auto", 1, 1, str(path))
    result: dict[str, Any] = torch.load(path)
    return result


@pytest.mark.parametrize("start", [_by_lightning, _by_torchrun_on_two_nodes, _by_slurm_on_two_nodes])
def test_every_launcher_trains_what_one_process_does(start: Any, alone: dict[str, Any], tmp_path: Path) -> None:
    start(tmp_path / "run.pt")
    found = torch.load(tmp_path / "run.pt")
    tolerance = 1e-6 if start is _by_slurm_on_two_nodes else 0.0  # data parallel sums in another order
    torch.testing.assert_close(found, alone, rtol=tolerance, atol=tolerance)


def test_the_command_line_takes_the_strategy(tmp_path: Path) -> None:
    def fit(folder: Path, *arguments: str) -> Any:
        changes = {
            "config": ROOT / "configs" / "mt2o_multi_digits.yaml",
            "trainer.max_epochs": 1,
            "trainer.limit_train_batches": 3,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": "false",
            "trainer.default_root_dir": folder,
            "trainer.logger.init_args.save_dir": folder,
            "model.init_args.backend": "loop",
            "model.init_args.growth": "null",
        }
        options = [f"--{key}={value}" for key, value in changes.items()]
        _run([[sys.executable, "-m", "mtl_lightning.cli", "fit", *options, *arguments]], [{"MPLBACKEND": "Agg"}])
        (path,) = folder.rglob("last.ckpt")
        return torch.load(path, weights_only=True)["state_dict"]["population.theta"]

    one = fit(tmp_path / "one")
    two = fit(
        tmp_path / "two",
        "--trainer.strategy.class_path=mtl_lightning.strategies.PopulationParallelStrategy",
        "--trainer.strategy.init_args.process_group_backend=gloo",
        "--trainer.devices=2",
    )
    assert torch.equal(one, two)


def test_groups_are_destroyed_before_python_ends() -> None:
    # Threads of gloo that outlive Python may abort a program that is done.
    program = """
import atexit, tempfile
import torch.distributed as dist
from mtl_lightning.endings import destroy_groups_at_exit
atexit.register(lambda: print("alive" if dist.is_initialized() else "destroyed"))
destroy_groups_at_exit()
destroy_groups_at_exit()
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert done.stdout == "destroyed\n"
