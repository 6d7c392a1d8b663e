from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from mtl_lightning.aggregation import (
    IMTLG,
    MGDA,
    AlignedMTL,
    GradientAggregator,
    PCGrad,
    UPGrad,
    gramian,
    project_onto_dual_cone,
    weighted_sum,
)
from mtl_lightning.cagrad import CAGrad
from mtl_lightning.nash import NashMTL
from mtl_lightning.seeds import mix_seed

FAMILY: dict[str, Callable[[], GradientAggregator]] = {
    "MGDA": MGDA,
    "MGDA of unit vectors": lambda: MGDA(normalized=True),
    "UPGrad": UPGrad,
    "PCGrad": PCGrad,
    "IMTLG": IMTLG,
    "AlignedMTL": AlignedMTL,
    "CAGrad": CAGrad,
    "NashMTL": lambda: NashMTL(max_norm=None),
}
family = pytest.mark.parametrize("name", FAMILY)


def resolved(aggregator: GradientAggregator, num_tasks: int) -> Any:
    aggregator.resolve([f"t{task}" for task in range(num_tasks)])
    return aggregator


def gradients(num_tasks: int, size: int = 8, seed: int = 0, scales: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tasks, size, generator=generator, dtype=torch.float64)
    return rows * torch.logspace(-2, 2, num_tasks, dtype=torch.float64)[:, None] if scales else rows


# --------------------------------------------------------------------------------------------- what all of them owe


@pytest.mark.parametrize("name", sorted(set(FAMILY) - {"PCGrad"}))  # which draws an order
def test_the_order_of_the_tasks_does_not_matter(name: str) -> None:
    rows, order = gradients(5, scales=True), torch.tensor([3, 0, 4, 1, 2])
    found = resolved(FAMILY[name](), 5)(rows[order])
    torch.testing.assert_close(found, resolved(FAMILY[name](), 5)(rows))


@family
def test_the_direction_does_not_depend_on_a_common_factor(name: str) -> None:
    rows = gradients(4)
    directions = []
    for factor in (1e-12, 1.0, 1e12):
        vector = resolved(FAMILY[name](), 4)(factor * rows)
        directions.append(vector / vector.norm())
    torch.testing.assert_close(directions[0], directions[1])
    torch.testing.assert_close(directions[2], directions[1])


@family
def test_tasks_that_are_left_out_take_no_part(name: str) -> None:
    rows, tasks = gradients(5), [0, 2, 3]
    found = resolved(FAMILY[name](), 5)(rows[tasks], tasks)
    assert torch.equal(found, resolved(FAMILY[name](), 3)(rows[tasks]))


@family
def test_one_task_follows_its_gradient(name: str) -> None:
    rows = gradients(3)[:1]
    found = resolved(FAMILY[name](), 3)(rows, [1])
    torch.testing.assert_close(found / found.norm(), rows[0] / rows[0].norm())


@family
def test_the_result_is_that_of_the_weights_in_the_dtype_of_the_gradients(name: str) -> None:
    rows = gradients(4).float()
    found = resolved(FAMILY[name](), 4)(rows)
    weights = resolved(FAMILY[name](), 4).weights(gramian(rows))
    assert (found.dtype, weights.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(found, weights.float() @ rows)


@family
@pytest.mark.parametrize(
    "rows",
    [torch.zeros(3, 4), torch.ones(3, 4), torch.eye(3)[[0, 0, 1]], torch.tensor([[1.0], [-1.0], [0.0]])],
    ids=["zeros", "equal", "repeated", "opposite"],
)
def test_degenerate_gradients_give_a_finite_vector(name: str, rows: Tensor) -> None:
    assert resolved(FAMILY[name](), 3)(rows).isfinite().all()


@pytest.mark.parametrize("name", ["MGDA", "MGDA of unit vectors", "UPGrad", "CAGrad", "NashMTL"])
@pytest.mark.parametrize("num_tasks", [2, 3, 11])
def test_no_task_gets_worse(name: str, num_tasks: int) -> None:
    for seed in range(5):
        rows = gradients(num_tasks, size=2 * num_tasks, seed=seed, scales=True)
        # With a radius of less than one CAGrad may stay too near to a mean gradient that harms a task.
        aggregator = CAGrad(c=1.0) if name == "CAGrad" else FAMILY[name]()
        vector = resolved(aggregator, num_tasks)(rows)
        assert (rows @ vector / rows.norm(dim=1)).min() >= -1e-9 * vector.norm()


@family
@pytest.mark.parametrize("tasks", [[0, 0], [3], [-1], []], ids=str)
def test_tasks_that_are_none_are_refused(name: str, tasks: list[int]) -> None:
    with pytest.raises(ValueError, match="`tasks` should be indices of different tasks below 3"):
        resolved(FAMILY[name](), 3)(gradients(max(len(tasks), 1)), tasks)


@family
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    aggregator = resolved(FAMILY[name](), 3)
    with pytest.raises(ValueError, match="should be 3 gradients, one per task"):
        aggregator(gradients(2))
    with pytest.raises(ValueError, match=r"`jacobian` should have shape \(T, N\)"):
        aggregator(torch.ones(3))
    with pytest.raises(ValueError, match=r"`gramian` should have shape \(T, T\)"):
        aggregator.weights(torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match="`gramian` should be finite"):
        aggregator.weights(torch.full((3, 3), torch.nan))


@family
def test_names_come_first(name: str) -> None:
    with pytest.raises(RuntimeError, match="`resolve` should be called"):
        FAMILY[name]()(gradients(2))
    with pytest.raises(ValueError, match="`task_names` should hold at least one name"):
        FAMILY[name]().resolve([])


def test_an_aggregator_of_the_gradients_themselves_has_no_weights() -> None:
    class Median(GradientAggregator):
        needs_jacobian = True

        def combine(self, jacobian: Tensor, columns: list[int]) -> Tensor:
            return jacobian.median(dim=0).values

    aggregator = resolved(Median(), 3)
    assert aggregator(torch.tensor([[1.0, 5.0], [2.0, 4.0], [9.0, 3.0]])).tolist() == [2.0, 4.0]
    with pytest.raises(TypeError, match="Found Median, which needs the gradients themselves"):
        aggregator.weights(torch.eye(3))
    with pytest.raises(ValueError, match=r"`jacobian` should have shape \(T, N\)"):
        aggregator(torch.ones(3))


def test_the_gramian_is_taken_in_double_precision_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([[1e4, 1.0, 3.0], [-1e4, 1.0, 5.0]])
    expected = rows.double() @ rows.double().T
    monkeypatch.setattr("mtl_lightning.aggregation.CHUNK", 2)
    assert torch.equal(gramian(rows), expected)


def test_the_weighted_sum_is_taken_in_double_precision_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gradients(3, size=7).float()
    weights = torch.tensor([1e7, -1e7, 1.0], dtype=torch.float64)
    expected = (weights @ rows.double()).float()
    monkeypatch.setattr("mtl_lightning.aggregation.CHUNK", 2)
    assert torch.equal(weighted_sum(weights, rows), expected)


# ------------------------------------------------------------------------------------------------- one by one: theory


def test_mgda_of_unit_vectors_is_the_bisector_of_two() -> None:
    rows = gradients(2, scales=True)
    found = resolved(MGDA(normalized=True), 2)(rows)
    units = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, units.mean(dim=0))


def _reference_projection(rows: Tensor, vector: Tensor) -> Tensor:
    """The nearest vector of the dual cone, by Moreau: what is taken away is a projection onto the negative cone."""
    found, _ = scipy.optimize.nnls(rows.T.numpy(), -vector.numpy())
    return vector + rows.T @ torch.from_numpy(found)


@pytest.mark.parametrize("num_tasks", [2, 3, 11, 25])
@pytest.mark.parametrize("scales", [False, True])
def test_upgrad_is_the_mean_of_the_projections_onto_the_dual_cone(num_tasks: int, scales: bool) -> None:
    for seed in range(3):
        rows = gradients(num_tasks, size=num_tasks + 3, seed=seed, scales=scales)
        expected = torch.stack([_reference_projection(rows, row) for row in rows]).mean(dim=0)
        torch.testing.assert_close(resolved(UPGrad(), num_tasks)(rows), expected)


def test_upgrad_without_a_conflict_is_the_mean() -> None:
    rows = gradients(4).abs()
    torch.testing.assert_close(resolved(UPGrad(), 4)(rows), rows.mean(dim=0))


@pytest.mark.parametrize("make", [UPGrad, AlignedMTL])
def test_preferences_are_named_or_listed_and_sum_to_one(make: Callable[..., GradientAggregator]) -> None:
    rows = torch.eye(3, dtype=torch.float64)
    assert resolved(make({"t1": 2.0}), 3)(rows).tolist() == pytest.approx([0.25, 0.5, 0.25])
    listed = resolved(make([1.0, 0.0, 3.0]), 3)
    assert listed(rows).tolist() == pytest.approx([0.25, 0.0, 0.75])
    assert listed(rows[:2], [0, 1]).tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert listed(rows[1:2], [1]).tolist() == pytest.approx([0.0, 1.0, 0.0])  # better than not to move
    with pytest.raises(ValueError, match="`preference` should name tasks"):
        resolved(make({"t5": 1.0}), 3)
    with pytest.raises(ValueError, match="`preference` should have a positive entry"):
        resolved(make([0.0, 0.0, 0.0]), 3)
    with pytest.raises(ValueError, match="`preference` should be finite and not negative"):
        make([-1.0, 1.0, 1.0])


def test_projections_come_in_batches() -> None:
    rows = gradients(3)
    sums = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = project_onto_dual_cone(sums, rows @ rows.T) @ rows
    for place in np.ndindex(2, 4):
        torch.testing.assert_close(found[place], _reference_projection(rows, sums[place] @ rows))


def _reference_pcgrad(rows: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Algorithm 1 of Yu et al. (2020), with vectors."""
    total = torch.zeros_like(rows[0])
    for task, order in enumerate(orders):
        vector = rows[task].clone()
        for other in order:
            if other != task and vector @ rows[other] < 0:
                vector = vector - (vector @ rows[other]) / rows[other].square().sum() * rows[other]
        total += vector
    return total


@pytest.mark.parametrize("num_tasks", [2, 3, 11])
def test_pcgrad_is_the_algorithm_of_the_paper_with_orders_of_seed_and_step(num_tasks: int) -> None:
    rows = gradients(num_tasks, size=6, scales=True)
    aggregator = resolved(PCGrad(seed=3), num_tasks)
    for step in range(3):
        generator = torch.Generator().manual_seed(mix_seed(3, step))
        orders = [torch.randperm(num_tasks, generator=generator).tolist() for _ in range(num_tasks)]
        torch.testing.assert_close(aggregator(rows), _reference_pcgrad(rows, orders))


def test_pcgrad_draws_from_a_source_of_its_own_that_a_checkpoint_holds() -> None:
    rows = gradients(6, size=4)
    before = torch.get_rng_state()
    first, again = resolved(PCGrad(), 6), resolved(PCGrad(), 6)
    found = [first(rows) for _ in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(found[0], found[1])
    for _ in range(2):
        again(rows)
    third = resolved(PCGrad(), 6)
    third.load_state_dict(again.state_dict())
    assert torch.equal(third(rows), found[2])
    first.resolve(first.task_names)
    assert torch.equal(first(rows), found[0])


def test_pcgrad_without_a_conflict_is_the_sum() -> None:
    rows = gradients(4).abs()
    torch.testing.assert_close(resolved(PCGrad(), 4)(rows), rows.sum(dim=0))


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_imtlg_projects_onto_all_gradients_alike(num_tasks: int) -> None:
    rows = gradients(num_tasks, scales=True)
    aggregator = resolved(IMTLG(), num_tasks)
    vector = aggregator(rows)
    projections = rows @ vector / rows.norm(dim=1)
    torch.testing.assert_close(projections, projections.mean().expand(num_tasks))
    assert float(aggregator.weights(rows @ rows.T).sum()) == pytest.approx(1.0)


def test_imtlg_is_against_all_tasks_where_the_formula_is() -> None:
    # The short gradient lies between the long ones, which the vector of equal projections has to make up for.
    units = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 0.0, 0.5], [0.0, 0.3, 1.0]], dtype=torch.float64)
    units /= units.norm(dim=1, keepdim=True)
    for length, sign in ((1.0, 1.0), (0.1, -1.0)):
        rows = units * torch.tensor([[1.0], [1.0], [length]], dtype=torch.float64)
        projections = units @ resolved(IMTLG(), 3)(rows)
        torch.testing.assert_close(projections, projections[0].expand(3))
        assert projections[0].sign() == sign


def test_imtlg_does_not_step_where_there_is_no_solution() -> None:
    assert not resolved(IMTLG(), 2)(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).any()


def test_imtlg_gives_no_weight_to_a_gradient_of_zero() -> None:
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = resolved(IMTLG(), 3).weights(rows @ rows.T)
    assert found.tolist() == pytest.approx([1 / 3, 0.0, 2 / 3])


@pytest.mark.parametrize(("num_tasks", "size"), [(2, 8), (5, 8), (8, 8)])
def test_aligned_gradients_are_the_nearest_of_condition_one(num_tasks: int, size: int) -> None:
    rows = gradients(num_tasks, size)
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    aligned = values[-1] * left @ right  # Procrustes, with the smallest singular value as the common one
    torch.testing.assert_close(resolved(AlignedMTL(), num_tasks)(rows), aligned.mean(dim=0))
    first = resolved(AlignedMTL([1.0] + [0.0] * (num_tasks - 1)), num_tasks)
    torch.testing.assert_close(first(rows), aligned[0])


def test_aligned_gradients_of_less_than_full_rank_leave_out_the_null_space() -> None:
    rows = gradients(2)[[0, 0, 1]]
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    expected = (values[1] * left[:, :2] @ right[:2]).mean(dim=0)
    torch.testing.assert_close(resolved(AlignedMTL(), 3)(rows), expected)


# ---------------------------------------------------------------------------------------------------- against TorchJD


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
@pytest.mark.parametrize("name", ["MGDA", "PCGrad", "IMTLG", "AlignedMTL"])
def test_torchjd_finds_the_same(name: str, num_tasks: int) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = gradients(num_tasks, size=12)
    if name == "PCGrad":  # orders do not matter to two tasks
        rows = rows[:2]
    arguments = {"epsilon": 1e-9, "max_iters": 20000} if name == "MGDA" else {}
    expected = getattr(aggregation, name)(**arguments)(rows)
    found = resolved(FAMILY[name](), len(rows))(rows)
    # Frank and Wolfe's method, in TorchJD's MGDA, nears the solution slowly.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-3 if name == "MGDA" else 1e-8)
