from math import comb, nan

import pytest
import torch
from torch import Tensor

from mtl_lightning.preferences import (
    check_preferences,
    nearest_preferences,
    riesz_energy,
    simplex_lattice,
    simplex_sample,
)

SIZES = [(2, 1), (2, 9), (3, 5), (4, 4), (6, 3)]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _makers() -> list[object]:
    return [
        pytest.param(simplex_lattice(3, 12), id="lattice"),
        pytest.param(simplex_sample(3, 50, generator=_generator()), id="sample"),
        pytest.param(simplex_sample(3, 50, concentration=0.01, generator=_generator()), id="sample-corners"),
        pytest.param(riesz_energy(3, 20), id="riesz"),
        pytest.param(riesz_energy(5, 3), id="riesz-fewer-than-tasks"),
        pytest.param(riesz_energy(4, 1), id="riesz-one"),
    ]


@pytest.mark.parametrize("preferences", _makers())
def test_rows_are_on_the_simplex(preferences: Tensor) -> None:
    assert bool((preferences >= 0).all())
    torch.testing.assert_close(preferences.sum(dim=-1), torch.ones(len(preferences)))


@pytest.mark.parametrize("preferences", _makers())
def test_own_preferences_pass_the_check(preferences: Tensor) -> None:
    assert check_preferences(preferences) is preferences


@pytest.mark.parametrize("preferences", [simplex_lattice(3, 12), riesz_energy(3, 20), riesz_energy(5, 3)])
def test_rows_are_distinct(preferences: Tensor) -> None:
    assert len(set(map(tuple, preferences.tolist()))) == len(preferences)


# simplex_lattice


@pytest.mark.parametrize(("num_tasks", "num_divisions"), SIZES)
def test_lattice_has_binomial_size(num_tasks: int, num_divisions: int) -> None:
    shape = simplex_lattice(num_tasks, num_divisions).shape
    assert shape == (comb(num_divisions + num_tasks - 1, num_tasks - 1), num_tasks)


@pytest.mark.parametrize(("num_tasks", "num_divisions"), SIZES)
def test_lattice_weights_are_multiples(num_tasks: int, num_divisions: int) -> None:
    multiples = simplex_lattice(num_tasks, num_divisions) * num_divisions
    torch.testing.assert_close(multiples, multiples.round())


@pytest.mark.parametrize(("num_tasks", "num_divisions"), SIZES)
def test_lattice_is_in_lexicographic_order(num_tasks: int, num_divisions: int) -> None:
    rows = simplex_lattice(num_tasks, num_divisions).tolist()
    assert rows == sorted(rows)


def test_lattice_of_two_tasks_gives_row_i_weight_i() -> None:
    weights = torch.arange(10) / 9
    torch.testing.assert_close(simplex_lattice(2, 9), torch.stack([weights, 1 - weights], dim=-1))


@pytest.mark.parametrize(("num_tasks", "num_divisions", "name"), [(1, 3, "num_tasks"), (2, 0, "num_divisions")])
def test_lattice_refuses_sizes_too_small(num_tasks: int, num_divisions: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` should be at least"):
        simplex_lattice(num_tasks, num_divisions)


# simplex_sample


@pytest.mark.parametrize("concentration", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("num_tasks", [2, 4])
def test_sample_has_the_mean_of_the_dirichlet_distribution(num_tasks: int, concentration: float) -> None:
    draws = simplex_sample(num_tasks, 20_000, concentration, _generator())
    deviation = (draws.mean(dim=0) - 1 / num_tasks).abs().max()
    assert deviation < 5 * _dirichlet_variance(num_tasks, concentration) ** 0.5 / 20_000**0.5


@pytest.mark.parametrize("concentration", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("num_tasks", [2, 4])
def test_sample_has_the_variance_of_the_dirichlet_distribution(num_tasks: int, concentration: float) -> None:
    variance = simplex_sample(num_tasks, 20_000, concentration, _generator()).var(dim=0)
    torch.testing.assert_close(
        variance, torch.full((num_tasks,), _dirichlet_variance(num_tasks, concentration)), rtol=0.06, atol=0
    )


def _dirichlet_variance(num_tasks: int, concentration: float) -> float:
    return (1 / num_tasks) * (1 - 1 / num_tasks) / (num_tasks * concentration + 1)


def test_sample_of_two_tasks_is_uniform() -> None:
    weights = simplex_sample(2, 10_000, generator=_generator())[:, 0].sort().values
    kolmogorov = (weights - (torch.arange(10_000) + 0.5) / 10_000).abs().max()
    assert kolmogorov < 1.95 / 100  # exceeded with probability 0.001


def test_sample_repeats_with_the_generator() -> None:
    assert torch.equal(simplex_sample(3, 5, generator=_generator(1)), simplex_sample(3, 5, generator=_generator(1)))


def test_sample_differs_with_another_seed() -> None:
    assert not torch.equal(simplex_sample(3, 5, generator=_generator(1)), simplex_sample(3, 5, generator=_generator(2)))


def test_sample_advances_the_generator() -> None:
    generator = _generator()
    assert not torch.equal(simplex_sample(3, 5, generator=generator), simplex_sample(3, 5, generator=generator))


def test_sample_follows_the_global_seed() -> None:
    torch.manual_seed(3)
    first = simplex_sample(3, 5)
    torch.manual_seed(3)
    assert torch.equal(simplex_sample(3, 5), first)


def test_sample_with_a_generator_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    simplex_sample(3, 5, generator=_generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("concentration", [0.0, -1.0, nan, float("inf")])
def test_sample_refuses_a_concentration_that_is_not_positive(concentration: float) -> None:
    with pytest.raises(ValueError, match="`concentration` should be positive"):
        simplex_sample(2, 3, concentration)


# riesz_energy


@pytest.mark.parametrize(("num_tasks", "num_preferences"), [(2, 1), (2, 7), (3, 2), (3, 3), (3, 11), (5, 8)])
def test_riesz_has_exactly_the_size_asked_for(num_tasks: int, num_preferences: int) -> None:
    assert riesz_energy(num_tasks, num_preferences, num_steps=20).shape == (num_preferences, num_tasks)


@pytest.mark.parametrize(("num_tasks", "num_preferences"), [(2, 2), (2, 7), (3, 4), (4, 10)])
def test_riesz_contains_the_corners(num_tasks: int, num_preferences: int) -> None:
    rows = riesz_energy(num_tasks, num_preferences, num_steps=50).tolist()
    assert all(corner in rows for corner in torch.eye(num_tasks).tolist())


@pytest.mark.parametrize(("num_tasks", "num_divisions"), [(2, 9), (3, 4), (4, 3)])
def test_riesz_is_nearly_as_spread_as_the_lattice(num_tasks: int, num_divisions: int) -> None:
    lattice = simplex_lattice(num_tasks, num_divisions)
    assert _spread(riesz_energy(num_tasks, len(lattice))) > 0.9 * _spread(lattice)


def test_riesz_is_more_spread_than_random() -> None:
    best = max(_spread(simplex_sample(3, 17, generator=_generator(seed))) for seed in range(100))
    assert _spread(riesz_energy(3, 17)) > 2 * best


def test_riesz_steps_lower_the_energy_of_the_start() -> None:
    assert _energy(riesz_energy(3, 17)) < 0.9 * _energy(riesz_energy(3, 17, num_steps=0))


def test_riesz_is_evenly_spaced_on_a_segment() -> None:
    torch.testing.assert_close(riesz_energy(2, 9), simplex_lattice(2, 8), rtol=0, atol=0.01)


def test_riesz_of_one_is_the_centre() -> None:
    torch.testing.assert_close(riesz_energy(4, 1), torch.full((1, 4), 0.25))


def test_riesz_is_in_lexicographic_order() -> None:
    rows = riesz_energy(3, 15, num_steps=50).tolist()
    assert rows == sorted(rows)


def test_riesz_repeats_with_the_seed() -> None:
    assert torch.equal(riesz_energy(3, 8, seed=4, num_steps=50), riesz_energy(3, 8, seed=4, num_steps=50))


def test_riesz_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    riesz_energy(3, 8, num_steps=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_riesz_works_without_gradients() -> None:
    with torch.no_grad():
        without = riesz_energy(3, 8, num_steps=20)
    assert torch.equal(without, riesz_energy(3, 8, num_steps=20))


def test_riesz_refuses_a_power_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="`power` should be positive"):
        riesz_energy(3, 8, power=0.0)


def _spread(points: Tensor) -> float:
    return float(torch.pdist(points).min())


def _energy(points: Tensor) -> float:
    return float(torch.pdist(points.double()).pow(-9).sum())


@pytest.mark.parametrize("make", [simplex_lattice, simplex_sample, riesz_energy])
def test_preferences_stay_on_the_cpu_inside_a_device_context(make: object) -> None:
    assert callable(make)
    with torch.device("meta"):
        assert make(3, 4).device.type == "cpu"


# nearest_preferences


@pytest.mark.parametrize("num_neighbors", [1, 3, 19])
def test_nearest_equals_brute_force(num_neighbors: int) -> None:
    preferences = simplex_sample(4, 20, generator=_generator())
    expected = _reference_nearest(preferences, num_neighbors)
    assert nearest_preferences(preferences, num_neighbors).tolist() == expected


def _reference_nearest(preferences: Tensor, num_neighbors: int) -> list[list[int]]:
    rows = preferences.double().tolist()
    result = []
    for i, row in enumerate(rows):
        distances = [(sum((a - b) ** 2 for a, b in zip(row, other, strict=True)), j) for j, other in enumerate(rows)]
        result.append([j for _, j in sorted(distances) if j != i][:num_neighbors])
    return result


@pytest.mark.parametrize("num_divisions", [9, 30, 100])
def test_nearest_resolves_ties_to_the_lower_index_despite_rounding(num_divisions: int) -> None:
    neighbors = nearest_preferences(simplex_lattice(2, num_divisions), 2)
    inner = torch.arange(1, num_divisions)
    assert torch.equal(neighbors[1:-1], torch.stack([inner - 1, inner + 1], dim=-1))


def test_nearest_excludes_the_row_itself_among_equal_rows() -> None:
    assert nearest_preferences(torch.full((3, 2), 0.5), 2).tolist() == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize(("size", "expected"), [(1, 0), (2, 1), (5, 4)])
def test_nearest_gives_all_others_if_there_are_no_more(size: int, expected: int) -> None:
    assert nearest_preferences(simplex_sample(3, size), 10).shape == (size, expected)


def test_nearest_gives_indices() -> None:
    assert nearest_preferences(simplex_lattice(2, 3), 1).dtype == torch.int64


def test_nearest_refuses_no_neighbors() -> None:
    with pytest.raises(ValueError, match="`num_neighbors` should be at least 1"):
        nearest_preferences(simplex_lattice(2, 3), 0)


# check_preferences


@pytest.mark.parametrize(
    ("preferences", "message"),
    [
        ([0.5, 0.5], r"should have shape \(P, T\), one row per subproblem. Found shape \(2,\)"),
        (torch.zeros(0, 2), r"at least one row and two columns. Found shape \(0, 2\)"),
        (torch.ones(3, 1), r"at least one row and two columns. Found shape \(3, 1\)"),
        ([[0.5, 0.5], [nan, 1.0], [nan, 1.0]], "should be finite. Found row 1 "),
        ([[0.5, 0.5], [float("inf"), 0.0]], "should be finite. Found row 1 "),
        ([[1.0, 0.0], [1.0, 0.0], [1.5, -0.5]], r"not be negative. Found row 2 = \[1.5, -0.5\]"),
        ([[1.0, 0.0], [0.5, 0.6], [0.5, 0.7]], "should sum to one. Found row 1 with sum 1.1"),
        ([[0.5, 0.4998]], "should sum to one. Found row 0 with sum 0.9998"),
    ],
)
def test_check_says_what_is_wrong(preferences: Tensor | list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_preferences(preferences)


def test_check_names_the_number_of_tasks() -> None:
    with pytest.raises(ValueError, match=r"should have shape \(P, 3\), one column per task. Found shape \(4, 2\)"):
        check_preferences(simplex_lattice(2, 3), num_tasks=3)


def test_check_allows_rounding() -> None:
    check_preferences([[0.33333, 0.33333, 0.33333]], num_tasks=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_check_keeps_floating_dtypes(dtype: torch.dtype) -> None:
    assert check_preferences(torch.eye(2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("preferences", [[[1, 0]], torch.eye(2, dtype=torch.int64)])
def test_check_makes_integers_floats(preferences: Tensor | list[list[float]]) -> None:
    assert check_preferences(preferences).dtype == torch.float32


def test_check_makes_contiguous() -> None:
    assert check_preferences(simplex_lattice(2, 1).flip(0).t()).is_contiguous()


# LightningCLI reads preferences from a configuration as a function that returns a tensor.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # `instantiate` is newer than the oldest version we allow
@pytest.mark.parametrize(
    ("function", "arguments", "shape"),
    [
        ("simplex_lattice", {"num_tasks": 2, "num_divisions": 9}, (10, 2)),
        ("simplex_sample", {"num_tasks": 3, "num_preferences": 4}, (4, 3)),
        ("riesz_energy", {"num_tasks": 3, "num_preferences": 4, "num_steps": 5}, (4, 3)),
        ("check_preferences", {"preferences": [[0.5, 0.5], [1.0, 0.0]]}, (2, 2)),
    ],
)
def test_configuration_names_a_function(function: str, arguments: dict[str, object], shape: tuple[int, int]) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--preferences", type=torch.Tensor)
    config = parser.parse_object(
        {"preferences": {"class_path": f"mtl_lightning.preferences.{function}", "init_args": arguments}}
    )
    assert parser.instantiate_classes(config).preferences.shape == shape
