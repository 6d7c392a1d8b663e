"""Hypervolume as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mtl_lightning.pareto import hypervolume, is_nondominated


class Hypervolume(Metric):
    """The hypervolume of all points seen, shape ``()``; see ``mtl_lightning.pareto.hypervolume``.

    Points of several updates, processes or merged states count as one set. The state holds the non-dominated points of
    each update, in the metric's ``dtype`` (``set_dtype`` changes it).

    Args:
        reference_point: The worst value of interest of each of the ``T`` objectives, minimised.
        kwargs: Options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If the reference point is empty or not finite, or if the points of an update are not finite or do
            not have shape ``(N, T)``.

    Example:
        >>> import torch
        >>> metric = Hypervolume(reference_point=(4.0, 4.0))
        >>> metric.update(torch.tensor([[1.0, 3.0], [3.0, 3.0]]))
        >>> metric.update(torch.tensor([[2.0, 2.0]]))
        >>> metric.compute()
        tensor(5.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    points: list[Tensor]

    def __init__(self, reference_point: Sequence[float] | Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        values = torch.as_tensor(reference_point, dtype=torch.float64)
        if values.ndim != 1 or len(values) == 0 or not values.isfinite().all():
            raise ValueError(
                f"`reference_point` should hold one finite value per objective. Found {reference_point!r}."
            )
        self.reference_point: tuple[float, ...] = tuple(values.tolist())
        # Rows are stored flat: torchmetrics gathers a tensor of shape (0,) from a process that has seen no points, and
        # gathering needs the same number of dimensions everywhere.
        self.add_state("points", default=[], dist_reduce_fx="cat")

    def update(self, points: Tensor) -> None:
        """Add ``points``, shape ``(N, T)``."""
        num_objectives = len(self.reference_point)
        if points.ndim != 2 or points.shape[1] != num_objectives:
            raise ValueError(
                f"`points` should have shape (N, {num_objectives}), one column per value of `reference_point`. "
                f"Found shape {tuple(points.shape)}."
            )
        self.points.append(points[is_nondominated(points)].detach().to(self.device, self.dtype).flatten())

    def compute(self) -> Tensor:
        """Return the hypervolume, shape ``()``; 0 if there are no points."""
        if len(self.points) == 0:
            return torch.zeros((), device=self.device, dtype=self.dtype)
        points = dim_zero_cat(self.points).reshape(-1, len(self.reference_point))
        return torch.tensor(hypervolume(points, self.reference_point), device=self.device, dtype=self.dtype)
