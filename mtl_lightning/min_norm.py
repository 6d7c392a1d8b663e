"""The point of smallest norm in the convex hull of some vectors, from their Gramian.

References:
    - Désidéri: Multiple-Gradient Descent Algorithm (MGDA) for Multiobjective Optimization (2012), Comptes Rendus
      Mathématique 350.
    - Sener, Koltun: Multi-Task Learning as Multi-Objective Optimization (2018), arXiv:1810.04650.
    - Lawson, Hanson: Solving Least Squares Problems (1974), chapter 23.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtl_lightning.nnls import Array, as_array, check_gramian, nnls


def min_norm_weights(gramian: Tensor) -> Tensor:
    """Return the weights ``w`` on the simplex that minimise ``w' G w``, shape ``(..., T)``.

    With the gradients of the tasks as rows of a Jacobian ``J`` and ``G = J J'``, ``J' w`` is the shortest vector in the
    convex hull of the gradients. Against it no task gets worse: ``(G w)_t >= w' G w`` for all ``t``, with equality
    where ``w_t > 0``, which is also what tells that ``w`` is optimal. It is zero if the point is Pareto stationary.

    The result is exact up to rounding, not the end of an iteration: an active set method that works in float64 on the
    host, whatever it is given, and takes vectors of very different norms. Where several ``w`` give the shortest vector,
    it is one of them; vectors of zero share the weight equally.

    Args:
        gramian: ``G``, symmetric and positive semi-definite, shape ``(..., T, T)``.

    Returns:
        The weights, in dtype and on the device of ``gramian``.

    Raises:
        ValueError: If the shape is wrong, or an entry is not finite.

    Example:
        >>> min_norm_weights(torch.diag(torch.tensor([1.0, 3.0])))
        tensor([0.7500, 0.2500])
    """
    check_gramian(gramian)
    matrices = as_array(gramian)
    weights = np.zeros(matrices.shape[:-1])
    for index in np.ndindex(weights.shape[:-1]):
        weights[index] = _min_norm(matrices[index])
    return torch.from_numpy(weights).to(gramian)


def _min_norm(gramian: Array) -> Array:
    norms = np.sqrt(np.clip(np.diagonal(gramian), 0.0, None))
    if norms.min() == 0:
        zeros = (norms == 0).astype(np.float64)
        return zeros / zeros.sum()
    # The smallest w' G w / (sum of w)^2 over w >= 0 is where |A w|^2 + (1 - sum of w)^2 is smallest, up to a factor.
    # With w = r u, r the inverse norms, all numbers are of order one, however different the norms are.
    inverse = norms.min() / norms
    correlations = gramian / norms[:, None] / norms
    weights = inverse * nnls(correlations + np.outer(inverse, inverse), inverse)
    weights /= weights.sum()
    return weights
