"""Non-dominated points and hypervolume, thin over moocore.

Everything is minimised; negate an objective that is maximised, and its reference with it.

References:
    - [Zitzler1999] Zitzler, Thiele. Multiobjective evolutionary algorithms: a comparative case study and the strength
      Pareto approach. IEEE Transactions on Evolutionary Computation 3(4), 1999.
    - [López-Ibáñez2026] The approximation and its name, ``"Rphi-FWE+"``, are those of ``moocore.hv_approx``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Literal

import moocore
import numpy as np
import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

MAX_OBJECTIVES = 31
"""The most objectives that moocore supports."""


def is_nondominated(points: Tensor) -> Tensor:
    """Return which of ``points``, shape ``(N, T)``, no other point dominates, shape ``(N,)``, bool.

    A point dominates another if it is nowhere larger and somewhere smaller. Of equal points only the first is kept, as
    in BoTorch's ``is_non_dominated``, so that the result is a set.

    Args:
        points: One point per row, minimised.

    Raises:
        ValueError: If the shape is not ``(N, T)`` with ``1 <= T <= 31``, or if a value is NaN or infinite.

    Example:
        >>> import torch
        >>> is_nondominated(torch.tensor([[1.0, 3.0], [2.0, 2.0], [2.0, 3.0], [2.0, 2.0]]))
        tensor([ True,  True, False, False])
    """
    mask = moocore.is_nondominated(_checked(points))
    return torch.from_numpy(mask).to(points.device)


def hypervolume(points: Tensor, reference_point: Tensor | Sequence[float]) -> float:
    """Return the volume that ``points``, shape ``(N, T)``, dominate up to ``reference_point``, shape ``(T,)``.

    The volume of the union of the boxes between each point and the reference [Zitzler1999]. Points that do not lie
    below the reference in every objective add nothing, so it is 0 for an empty set. Computed in float64 on the CPU,
    without gradients. ``hypervolume_method`` says when the value is approximated; then the objectives are first scaled
    to a common range, because the error of the approximation grows with the ratio of their ranges.

    Args:
        points: One point per row, minimised.
        reference_point: The worst value of interest of each objective.

    Raises:
        ValueError: If a shape does not fit, if there are more than 31 objectives, or if a value is NaN or infinite.

    Example:
        >>> import torch
        >>> hypervolume(torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 3.0]]), reference_point=(4.0, 4.0))
        5.0
    """
    values = _checked(points)
    reference = _to_numpy(reference_point)
    num_objectives = values.shape[1]
    if reference.shape != (num_objectives,):
        raise ValueError(
            f"`reference_point` should have shape ({num_objectives},), one value per objective of `points`. "
            f"Found shape {reference.shape}."
        )
    if not np.isfinite(reference).all():
        raise ValueError(f"`reference_point` should be finite. Found {reference.tolist()}.")

    values = values[(values < reference).all(axis=1)]
    if len(values) == 0:
        return 0.0
    values = values[moocore.is_nondominated(values)]
    method = hypervolume_method(len(values), num_objectives)
    _announce(method)
    if method == "exact":
        return float(moocore.hypervolume(values, ref=reference))
    extent = reference - values.min(axis=0)
    unit = moocore.hv_approx((values - reference) / extent, ref=np.zeros(num_objectives))
    return float(unit * extent.prod())


def hypervolume_method(num_points: int, num_objectives: int) -> Literal["exact", "approximate"]:
    """Return how ``hypervolume`` treats ``num_points`` non-dominated points of ``num_objectives`` objectives.

    ``"exact"`` up to 5 objectives, and up to 8 objectives with at most 50 points: a few ms, 40 ms at that limit. Beyond
    it the exact time explodes (8 objectives, 200 points: over a minute), so the rest is ``"approximate"``:
    ``moocore.hv_approx`` with its default method and number of samples, deterministic, within 0.1 % up to 12 objectives
    in our measurements and 5 % at 31. Only points below the reference point count, so a growing set may change from one
    method to the other.

    Raises:
        ValueError: If there are fewer than 1 or more than 31 objectives.

    Example:
        >>> hypervolume_method(1000, 3), hypervolume_method(50, 8), hypervolume_method(51, 8)
        ('exact', 'exact', 'approximate')
    """
    if not 1 <= num_objectives <= MAX_OBJECTIVES:
        raise ValueError(f"There should be 1 to {MAX_OBJECTIVES} objectives. Found {num_objectives}.")
    exact = num_objectives <= 5 or (num_objectives <= 8 and num_points <= 50)
    return "exact" if exact else "approximate"


def _to_numpy(values: Tensor | Sequence[float]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()  # first, because not every device has float64
    return torch.as_tensor(values, dtype=torch.float64).numpy()


def _checked(points: Tensor) -> np.ndarray:
    values = _to_numpy(points)
    if values.ndim != 2:
        raise ValueError(f"`points` should have shape (N, T), one row per point. Found shape {values.shape}.")
    if not 1 <= values.shape[1] <= MAX_OBJECTIVES:
        raise ValueError(f"`points` should have 1 to {MAX_OBJECTIVES} objectives (columns). Found {values.shape[1]}.")
    # moocore does not check: NaN counts as non-dominated, and -inf crashes the process.
    bad_rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad_rows) > 0:
        raise ValueError(
            f"`points` should be finite; leave out rows of failed models, `points[points.isfinite().all(dim=1)]`. "
            f"Found {values[bad_rows[0]].tolist()} in row {bad_rows[0]}, and {len(bad_rows)} such rows in all."
        )
    return np.ascontiguousarray(values)


@functools.cache
def _announce(method: str) -> None:
    """Log the method, once per process and method."""
    accuracy = "exactly" if method == "exact" else "approximately (within 0.1 % up to 12 objectives)"
    _logger.info("The hypervolume is computed %s with moocore.", accuracy)
