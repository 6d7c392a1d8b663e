import logging
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from torch import Tensor

from mtl_lightning import pareto
from mtl_lightning.pareto import hypervolume, hypervolume_method, is_nondominated


def _reference_is_nondominated(points: list[list[float]]) -> list[bool]:
    def dominates(a: list[float], b: list[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [
        not any(dominates(other, point) for other in points) and point not in points[:index]
        for index, point in enumerate(points)
    ]


def _reference_hypervolume(points: Tensor, reference: Tensor) -> float:
    """Inclusion and exclusion over all subsets of boxes."""
    sides = (reference - points).clamp(min=0.0)
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in combinations(range(len(points)), size):
            total += (-1) ** (size + 1) * sides[list(subset)].amin(dim=0).prod().item()
    return total


def _sphere(num_points: int, num_objectives: int) -> Tensor:
    directions = torch.rand(num_points, num_objectives, dtype=torch.float64) + 0.01
    return 1.0 - directions / directions.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 6])
def test_nondominated_agrees_with_the_definition(num_objectives: int) -> None:
    points = torch.randint(0, 4, (60, num_objectives)).double()
    assert is_nondominated(points).tolist() == _reference_is_nondominated(points.tolist())


def test_nondominated_of_no_points_is_empty() -> None:
    mask = is_nondominated(torch.empty(0, 3))
    assert mask.shape == (0,)
    assert mask.dtype == torch.bool


def test_hypervolume_of_the_fonseca_front() -> None:
    # f1 = 1 - exp(-n (s - 1 / sqrt(n))^2) and f2 alike with a plus, for -1 / sqrt(n) <= s <= 1 / sqrt(n), here n = 2.
    shift = 2**-0.5
    s = torch.linspace(-shift, shift, 5000, dtype=torch.float64)
    front = torch.stack([1 - torch.exp(-2 * (s - shift) ** 2), 1 - torch.exp(-2 * (s + shift) ** 2)], dim=1)
    assert hypervolume(front, (1.0, 1.0)) == pytest.approx(0.342113, abs=1e-3)


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 5])
def test_hypervolume_agrees_with_inclusion_and_exclusion(num_objectives: int) -> None:
    points = torch.rand(9, num_objectives, dtype=torch.float64)
    reference = torch.full((num_objectives,), 0.9, dtype=torch.float64)  # some points lie outside
    assert hypervolume(points, reference) == pytest.approx(_reference_hypervolume(points, reference), rel=1e-9)


@pytest.mark.parametrize(("num_points", "num_objectives"), [(40, 3), (70, 6)])
def test_hypervolume_ignores_order_and_dominated_points(num_points: int, num_objectives: int) -> None:
    points = _sphere(num_points, num_objectives)
    reference = [1.1] * num_objectives
    value = hypervolume(points, reference)
    assert hypervolume(points[torch.randperm(num_points)], reference) == pytest.approx(value, rel=1e-9)
    worse = points[:5] + 0.05
    assert hypervolume(torch.cat([worse, points, points]), reference) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("num_points", "num_objectives"), [(40, 3), (70, 6)])
def test_hypervolume_scales_with_the_units_and_not_with_the_origin(num_points: int, num_objectives: int) -> None:
    points = _sphere(num_points, num_objectives)
    reference = torch.full((num_objectives,), 1.1, dtype=torch.float64)
    units = torch.logspace(-3, 3, num_objectives, dtype=torch.float64)
    origin = torch.linspace(-5, 5, num_objectives, dtype=torch.float64)
    scaled = hypervolume(points * units + origin, reference * units + origin)
    assert scaled == pytest.approx(hypervolume(points, reference) * units.prod().item(), rel=1e-6)


def test_approximate_hypervolume_agrees_with_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    points = _sphere(45, 7) * torch.logspace(-3, 3, 7, dtype=torch.float64)
    reference = 1.1 * torch.logspace(-3, 3, 7, dtype=torch.float64)
    assert hypervolume_method(45, 7) == "exact"
    exact = hypervolume(points, reference)
    monkeypatch.setattr(pareto, "hypervolume_method", lambda num_points, num_objectives: "approximate")
    approximate = hypervolume(points, reference)
    assert approximate == pytest.approx(exact, rel=0.01)
    assert approximate != exact


def test_only_points_that_count_decide_on_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def recording(num_points: int, num_objectives: int) -> str:
        asked.append((num_points, num_objectives))
        return hypervolume_method(num_points, num_objectives)

    monkeypatch.setattr(pareto, "hypervolume_method", recording)
    front = _sphere(20, 7)
    hypervolume(torch.cat([front, front + 0.05, front + 2.0]), [1.5] * 7)
    assert asked == [(int(is_nondominated(front).sum()), 7)]


@pytest.mark.parametrize(
    ("num_points", "num_objectives", "method"),
    [(10_000, 5, "exact"), (50, 8, "exact"), (51, 6, "approximate"), (2, 9, "approximate")],
)
def test_method_follows_the_documented_rule(num_points: int, num_objectives: int, method: str) -> None:
    assert hypervolume_method(num_points, num_objectives) == method


def test_the_method_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pareto._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="mtl_lightning.pareto"):
        for _ in range(3):
            hypervolume(_sphere(4, 9), [1.1] * 9)
            hypervolume(_sphere(4, 2), [1.1] * 2)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "approximately" in messages[0]
    assert "exactly" in messages[1]


def test_a_point_on_or_beyond_the_reference_adds_nothing() -> None:
    assert hypervolume(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), (1.0, 1.0)) == 0.0


def test_empty_set_has_hypervolume_zero() -> None:
    assert hypervolume(torch.empty(0, 4), [1.0] * 4) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_any_dtype_is_accepted(dtype: torch.dtype) -> None:
    assert hypervolume(torch.tensor([[1, 2], [2, 1]], dtype=dtype), torch.tensor([3, 3], dtype=dtype)) == 3.0


def test_plain_numbers_keep_double_precision() -> None:
    assert hypervolume(torch.zeros(1, 2, dtype=torch.float64), (0.1, 0.1)) == 0.1 * 0.1


def test_gradients_are_dropped() -> None:
    points = torch.tensor([[0.5, 0.5]], requires_grad=True)
    assert hypervolume(points, torch.ones(2, requires_grad=True)) == 0.25
    assert is_nondominated(points).tolist() == [True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_objectives", [2, 3])
def test_nonfinite_values_are_refused(bad: float, num_objectives: int) -> None:
    points = torch.rand(4, num_objectives)
    points[2, 1] = bad
    with pytest.raises(ValueError, match=r"`points` should be finite.*row 2"):
        hypervolume(points, [1.0] * num_objectives)
    with pytest.raises(ValueError, match="`points` should be finite"):
        is_nondominated(points)
    with pytest.raises(ValueError, match="`reference_point` should be finite"):
        hypervolume(torch.rand(4, num_objectives), [1.0] * (num_objectives - 1) + [bad])


@pytest.mark.parametrize("shape", [(3,), (2, 3, 2), (4, 0)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`points` should have"):
        hypervolume(torch.rand(shape), (1.0, 1.0))
    with pytest.raises(ValueError, match=r"`points` should have"):
        is_nondominated(torch.rand(shape))


@pytest.mark.parametrize("reference", [[1.0], [1.0, 1.0, 1.0], [[1.0, 1.0]]])
def test_a_reference_of_another_length_is_refused(reference: list[float]) -> None:
    with pytest.raises(ValueError, match=r"`reference_point` should have shape \(2,\)"):
        hypervolume(torch.rand(3, 2), reference)


def test_more_objectives_than_moocore_supports_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 31 objectives"):
        hypervolume(torch.rand(3, 32), [1.0] * 32)
    assert hypervolume(torch.zeros(1, 31), [1.0] * 31) == pytest.approx(1.0, rel=0.06)


def test_the_package_itself_does_not_import_moocore() -> None:
    code = "import sys, mtl_lightning; assert 'moocore' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
