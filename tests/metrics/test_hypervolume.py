import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from mtl_lightning.metrics import Hypervolume


def _reference_hypervolume(points: Tensor, reference: tuple[float, float]) -> float:
    """A sweep over two objectives: slices between neighbouring first coordinates."""
    area, lowest = 0.0, reference[1]
    for x, y in sorted(points.tolist()):
        if x < reference[0] and y < lowest:
            area += (reference[0] - x) * (lowest - y)
            lowest = y
    return area


def test_agrees_with_a_sweep_over_several_updates() -> None:
    points = torch.rand(60, 2, dtype=torch.float64)
    metric = Hypervolume(reference_point=(0.9, 0.8)).set_dtype(torch.float64)
    for part in torch.split(points, 7):
        metric.update(part)
    assert metric.compute().shape == ()
    assert metric.compute().item() == pytest.approx(_reference_hypervolume(points, (0.9, 0.8)), rel=1e-9)


def test_merged_states_count_as_one_set() -> None:
    points = torch.rand(30, 2)
    whole, one, other = (Hypervolume(reference_point=(1.0, 1.0)) for _ in range(3))
    whole.update(points)
    one.update(points[:10])
    other.update(points[10:])
    one.merge_state(other)
    assert one.compute() == whole.compute()
    assert one.compute() > other.compute()


def test_without_points_it_is_zero_and_reset_forgets() -> None:
    metric = Hypervolume(reference_point=(1.0, 1.0))
    metric.update(torch.tensor([[0.5, 0.5]]))
    assert metric.compute() == 0.25
    metric.reset()
    metric.update(torch.empty(0, 2))
    assert metric.compute() == 0.0


def test_larger_is_better() -> None:
    assert Hypervolume(reference_point=(1.0, 1.0)).higher_is_better is True


@pytest.mark.parametrize("reference", [(), (1.0, float("nan")), ((1.0, 1.0),)])
def test_unusable_reference_points_are_refused(reference: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="one finite value per objective"):
        Hypervolume(reference_point=reference)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_points_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(N, 2\)"):
        Hypervolume(reference_point=(1.0, 1.0)).update(torch.rand(shape))


def test_nonfinite_points_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Hypervolume(reference_point=(1.0, 1.0)).update(torch.tensor([[0.5, float("nan")]]))


def _worker(rank: int, folder: str) -> None:
    # A file, not a port: the store must not end with the first process that does.
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=60), rank=rank, world_size=3
    )
    metric = Hypervolume(reference_point=(4.0, 4.0))
    # Unequal numbers of points, and rank 2 has seen no batch at all.
    if rank == 0:
        metric.update(torch.tensor([[1.0, 3.0], [3.0, 3.5], [3.5, 1.0]]))
    elif rank == 1:
        metric.update(torch.tensor([[2.0, 2.0]]))
    Path(folder, str(rank)).write_text(str(metric.compute().item()))
    torch.distributed.barrier()  # nobody leaves while another still reads
    torch.distributed.destroy_process_group()


def test_processes_agree_on_the_union(tmp_path: Path) -> None:
    launch: Any = start_processes
    context = launch(_worker, (str(tmp_path),), 3, join=False, start_method="fork")
    deadline = time.monotonic() + 60
    while not context.join(timeout=1):  # true once all have ended; raises what a process raised
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes did not finish")
    points = torch.tensor([[1.0, 3.0], [3.5, 1.0], [2.0, 2.0]])
    expected = _reference_hypervolume(points, (4.0, 4.0))
    assert [float(Path(tmp_path, str(rank)).read_text()) for rank in range(3)] == [expected] * 3
