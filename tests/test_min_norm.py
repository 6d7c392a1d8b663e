from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl_lightning.min_norm import min_norm_weights

KINDS = ("plain", "scales", "repeats", "agreeing", "flat")


def _gradients(num_tasks: int, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = max(2, num_tasks // 2) if kind == "flat" else 3 * num_tasks
    rows = torch.randn(num_tasks, size, generator=generator, dtype=torch.float64)
    if kind == "scales":
        rows *= torch.logspace(-6, 6, num_tasks, dtype=torch.float64)[:, None]
    if kind == "repeats":
        rows = rows[torch.arange(num_tasks) % max(num_tasks // 2, 1)]
    if kind == "agreeing":
        rows += 3 * torch.randn(size, generator=generator, dtype=torch.float64)
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11, 40])
def test_no_gradient_is_shorter_along_the_vector_than_the_vector(num_tasks: int, kind: str) -> None:
    # For a point of a convex hull this says that it is the one of smallest norm.
    for seed in range(5):
        rows = _gradients(num_tasks, kind, seed)
        weights = min_norm_weights(rows @ rows.T)
        assert (weights >= 0).all()
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
        shortest = weights @ rows
        slack = rows @ shortest - shortest @ shortest
        # In units of what the products are made of, which is what rounding is relative to.
        lengths = rows.norm(dim=1)
        assert (slack / (lengths * (weights @ lengths))).min() >= -1e-10


@pytest.mark.parametrize(
    ("products", "expected"),
    [
        ((4.0, 0.0, 1.0), (0.2, 0.8)),  # orthogonal
        ((4.0, -1.0, 1.0), (2 / 7, 5 / 7)),  # in conflict
        ((4.0, 1.0, 1.0), (0.0, 1.0)),  # the shorter one is the nearest point, just
        ((4.0, 1.5, 1.0), (0.0, 1.0)),
        ((1.0, -1.0, 1.0), (0.5, 0.5)),  # opposite
    ],
)
def test_two_gradients_have_a_closed_form(products: tuple[float, ...], expected: tuple[float, ...]) -> None:
    a, b, c = products  # (c - b) / (a - 2 b + c), clipped to [0, 1]
    found = min_norm_weights(torch.tensor([[a, b], [b, c]], dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_orthogonal_gradients_are_weighted_by_their_inverse_squares() -> None:
    lengths = torch.logspace(-5, 5, 5, dtype=torch.float64)
    expected = lengths**-2 / (lengths**-2).sum()
    torch.testing.assert_close(min_norm_weights(torch.diag(lengths**2)), expected, rtol=1e-12, atol=0)


def test_gradients_that_cancel_out() -> None:
    angles = torch.arange(3, dtype=torch.float64) * (2 * torch.pi / 3)
    rows = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [10.0], [1e5]], dtype=torch.float64)
    weights = min_norm_weights(rows @ rows.T)
    torch.testing.assert_close(weights * torch.tensor([1.0, 10.0, 1e5]), weights[0].expand(3))


def test_gradients_of_zero_share_the_weight() -> None:
    gramian = torch.diag(torch.tensor([0.0, 2.0, 0.0]))
    assert min_norm_weights(gramian).tolist() == [0.5, 0.0, 0.5]
    assert min_norm_weights(torch.zeros(4, 4)).tolist() == [0.25] * 4


def test_the_order_of_the_tasks_and_a_common_factor_do_not_matter() -> None:
    rows = _gradients(7, "agreeing", seed=0)
    gramian, order = rows @ rows.T, torch.randperm(7, generator=torch.Generator().manual_seed(0))
    weights = min_norm_weights(gramian)
    torch.testing.assert_close(min_norm_weights(gramian[order][:, order]), weights[order])
    for factor in (1e-30, 1e30):
        torch.testing.assert_close(min_norm_weights(factor * gramian), weights)


def test_a_batch_is_solved_one_by_one_in_the_dtype_given() -> None:
    stack = torch.stack([_gradients(3, "plain", seed) for seed in range(4)]).view(2, 2, 3, 9).float()
    gramians = stack @ stack.mT
    found = min_norm_weights(gramians)
    assert found.dtype == torch.float32
    assert found.shape == (2, 2, 3)
    for i in range(2):
        for j in range(2):
            assert torch.equal(found[i, j], min_norm_weights(gramians[i, j]))


@pytest.mark.parametrize("gramian", [torch.ones(3), torch.ones(2, 3), torch.full((2, 2), torch.nan)], ids=str)
def test_bad_input_is_refused(gramian: Tensor) -> None:
    with pytest.raises(ValueError, match="`gramian` should"):
        min_norm_weights(gramian)
