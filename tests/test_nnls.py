from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from mtl_lightning.nnls import nonnegative_least_squares


def _problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, columns, generator=generator, dtype=torch.float64),
        torch.randn(rows, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("columns", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("rows", [3, 20, 60])
def test_the_fit_is_that_of_scipy(rows: int, columns: int) -> None:
    for seed in range(5):
        matrix, target = _problem(rows, columns, seed)
        found = nonnegative_least_squares(matrix.T @ matrix, matrix.T @ target)
        expected = scipy.optimize.nnls(matrix.numpy(), target.numpy())[0]
        assert (found >= 0).all()
        # With more columns than rows several fits are equally good; what they fit is unique.
        np.testing.assert_allclose((matrix @ found).numpy(), matrix.numpy() @ expected, atol=1e-9)


def test_columns_of_any_scale() -> None:
    matrix, target = _problem(20, 6, seed=0)
    scales = torch.logspace(-8, 8, 6, dtype=torch.float64)
    plain = nonnegative_least_squares(matrix.T @ matrix, matrix.T @ target)
    scaled = matrix * scales
    found = nonnegative_least_squares(scaled.T @ scaled, scaled.T @ target)
    torch.testing.assert_close(found * scales, plain)


def test_columns_that_repeat_and_columns_of_zeros() -> None:
    matrix, target = _problem(20, 3, seed=1)
    plain = nonnegative_least_squares(matrix.T @ matrix, matrix.T @ target)
    wide = torch.cat([matrix, matrix, torch.zeros(20, 1, dtype=torch.float64)], dim=1)
    found = nonnegative_least_squares(wide.T @ wide, wide.T @ target)
    torch.testing.assert_close(wide @ found, matrix @ plain)
    assert found[-1] == 0


def test_columns_that_cancel_out_but_for_rounding_are_not_fitted_with_huge_numbers() -> None:
    for seed in range(50):
        matrix, target = _problem(6, 4, seed)
        matrix[:, 2] = -(0.3 * matrix[:, 0] + 0.7 * matrix[:, 1])
        exact, _ = scipy.optimize.nnls(matrix.numpy(), target.numpy())
        rounded = matrix.float().double()
        found = nonnegative_least_squares(rounded.T @ rounded, rounded.T @ target)
        assert found.max() < 1e3
        np.testing.assert_allclose((rounded @ found).numpy(), matrix.numpy() @ exact, atol=1e-5)


def test_a_batch_is_solved_one_by_one_in_the_dtype_given() -> None:
    problems = [_problem(10, 4, seed) for seed in range(6)]
    gramians = torch.stack([matrix.T @ matrix for matrix, _ in problems]).view(2, 3, 4, 4).float()
    products = torch.stack([matrix.T @ target for matrix, target in problems]).view(2, 3, 4).float()
    found = nonnegative_least_squares(gramians, products)
    assert found.dtype == torch.float32
    for place in np.ndindex(2, 3):
        assert torch.equal(found[place], nonnegative_least_squares(gramians[place], products[place]))


@pytest.mark.parametrize(
    ("gramian", "products", "match"),
    [
        (torch.eye(2)[:1], torch.ones(2), r"`gramian` should have shape \(\.\.\., T, T\)"),
        (torch.ones(0, 0), torch.ones(0), r"`gramian` should have shape"),
        (torch.eye(2), torch.ones(3), r"`products` should have shape \(2,\)"),
        (torch.full((2, 2), torch.nan), torch.ones(2), "`gramian` should be finite"),
        (torch.eye(2), torch.tensor([1.0, torch.inf]), "`products` should be finite"),
    ],
    ids=["oblong", "empty", "products", "nan", "inf"],
)
def test_bad_input_is_refused(gramian: Tensor, products: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        nonnegative_least_squares(gramian, products)
