"""Least squares with coefficients that are not negative, from a Gramian.

References:
    - Lawson, Hanson: Solving Least Squares Problems (1974), chapter 23.
    - Bro, De Jong: A Fast Non-Negativity-Constrained Least Squares Algorithm (1997), Journal of Chemometrics 11.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

DEPENDENT = 1e-13  # the squared sine of an angle that is rounding; of gradients in float32 it is 1e-14


def nonnegative_least_squares(gramian: Tensor, products: Tensor) -> Tensor:
    """Return the ``x >= 0`` that minimises ``x' G x / 2 - c' x``, shape ``(..., T)``.

    With ``G = A' A`` and ``c = A' y`` that is the least squares problem ``|A x - y|``. An active set method: which
    entries are zero is found in finitely many steps, and the others solve a linear system, so that the result is exact
    up to rounding. It works in float64 on the host, whatever it is given, and takes columns of any scale.

    Args:
        gramian: ``G``, symmetric and positive semi-definite, shape ``(..., T, T)``.
        products: ``c``, in the range of ``G``, shape ``(..., T)``. Where it is not, there may be no minimum, and the
            result is some ``x`` of a finite value.

    Raises:
        ValueError: If the shapes do not fit, or an entry is not finite.

    Example:
        >>> nonnegative_least_squares(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([2.0, -1.0]))
        tensor([1., 0.])
    """
    check_gramian(gramian)
    if products.shape != gramian.shape[:-1]:
        raise ValueError(
            f"`products` should have shape {tuple(gramian.shape[:-1])}, as the Gramian. "
            f"Found shape {tuple(products.shape)}."
        )
    if not bool(products.isfinite().all()):
        raise ValueError("`products` should be finite. Found NaN or infinity.")
    matrices, vectors = as_array(gramian), as_array(products)
    found = np.zeros_like(vectors)
    for index in np.ndindex(vectors.shape[:-1]):
        found[index] = nnls(matrices[index], vectors[index])
    return torch.from_numpy(found).to(products)


def nnls(gramian: Array, products: Array) -> Array:
    """Return :func:`nonnegative_least_squares` of one problem, for arrays that have been checked."""
    norms = np.sqrt(np.clip(np.diagonal(gramian), 0.0, None))
    candidates = norms > 0  # a column of zeros has no part in any fit
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=candidates)
    matrix = inverse[:, None] * gramian * inverse
    matrix = (matrix + matrix.T) / 2
    target = inverse * products
    size = np.abs(target).max(initial=0.0)
    if size == 0:
        return np.zeros_like(products)
    target = target / size
    x = np.zeros_like(target)
    passive = np.zeros(len(x), dtype=bool)
    rejected = ~candidates
    rounding = 16 * len(x) * np.finfo(np.float64).eps
    for _ in range(8 * len(x)):  # exact arithmetic needs no bound, and no case is known that comes near this one
        slopes = target - matrix @ x
        tolerance = rounding * max(1.0, x.sum())
        open_to = ~passive & ~rejected & (slopes > tolerance)
        if not open_to.any():
            break
        entering = int(np.argmax(np.where(open_to, slopes, -np.inf)))
        # A column that is, up to rounding, a sum of those in the fit has no slope but for rounding, and could be fitted
        # with huge numbers only.
        if not _is_independent(matrix, passive, entering):
            rejected[entering] = True
            continue
        passive[entering] = True
        solution = _fit(matrix, target, passive)
        if solution[entering] <= 0:  # so small was its slope
            passive[entering] = False
            rejected[entering] = True
            continue
        while (solution[passive] <= 0).any():
            blocking = passive & (solution <= 0)
            x = x + np.min(x[blocking] / (x[blocking] - solution[blocking])) * (solution - x)
            gone = blocking & (x <= rounding * max(1.0, x.max()))
            gone[np.argmin(np.where(blocking, x, np.inf))] = True
            passive &= ~gone
            x[~passive] = 0.0
            solution = _fit(matrix, target, passive)
        x = solution
        rejected = ~candidates
    return size * inverse * x


def _is_independent(matrix: Array, passive: Mask, entering: int) -> bool:
    """Return whether a column of length one has a part that the columns of the fit have not."""
    (chosen,) = np.nonzero(passive)
    row = matrix[entering, chosen]
    return bool(1 - row @ np.linalg.solve(matrix[np.ix_(chosen, chosen)], row) > DEPENDENT)


def _fit(matrix: Array, target: Array, passive: Mask) -> Array:
    """Return the least squares fit with some columns only."""
    found = np.zeros_like(target)
    (chosen,) = np.nonzero(passive)
    found[chosen] = np.linalg.solve(matrix[np.ix_(chosen, chosen)], target[chosen])
    return found


def as_array(tensor: Tensor) -> Array:
    """Return a tensor as an array of float64; waits for its device."""
    array: Array = tensor.detach().cpu().double().numpy()
    return array


def check_gramian(gramian: Tensor) -> None:
    """Raise a ``ValueError`` unless ``gramian`` is of shape ``(..., T, T)`` and finite."""
    if gramian.ndim < 2 or gramian.shape[-1] != gramian.shape[-2] or not gramian.shape[-1]:
        raise ValueError(f"`gramian` should have shape (..., T, T). Found shape {tuple(gramian.shape)}.")
    if not bool(gramian.isfinite().all()):
        raise ValueError("`gramian` should be finite. Found NaN or infinity; leave out the tasks that it comes from.")
