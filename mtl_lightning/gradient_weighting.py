"""Weights of the tasks that depend on their gradients, one set for each preference.

A scalarisation turns losses into one objective whatever the gradients are. The rules of this family look at the
gradients as well, through their inner products: with the gradients of the ``T`` tasks as rows of a Jacobian ``J``, the
Gramian is ``J J'``, shape ``(T, T)``, and the direction of descent is ``-J' w``. One file holds one rule:
:mod:`~mtl_lightning.mgda`, :mod:`~mtl_lightning.pareto_mtl`, :mod:`~mtl_lightning.exact_pareto`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GradientWeighting(nn.Module):
    """The base of the rules: from Gramians, losses and preferences to weights of the tasks.

    A subclass overrides :meth:`weights`. State that changes belongs into buffers, so that it is in checkpoints.
    """

    def weights(self, gramian: Tensor, losses: Tensor, preferences: Tensor, step: int = 0) -> Tensor:
        """Return the weights of the tasks, shape ``(..., T)``, in dtype and on the device of ``gramian``.

        The gradient to step along is the sum of the gradients of the tasks, each times its weight.

        Args:
            gramian: The inner products of the gradients of the tasks, shape ``(..., T, T)``. A common factor does not
                matter.
            losses: The losses of the tasks, shape ``(..., T)``.
            preferences: The preference vectors, shape ``(..., T)``. Where tasks without labels are left out, a row need
                not sum to one.
            step: How many steps of the optimiser there have been.
        """
        raise NotImplementedError(f"{type(self).__name__} should implement `weights`.")


def check_statistics(gramian: Tensor, losses: Tensor, preferences: Tensor) -> None:
    """Raise an error unless the shapes fit and everything is finite.

    Raises:
        ValueError: If ``gramian`` is not of shape ``(..., T, T)`` or the others not of shape ``(..., T)``, or an entry
            is not finite.
    """
    shape = gramian.shape
    if gramian.ndim < 2 or shape[-1] != shape[-2] or not shape[-1]:
        raise ValueError(f"`gramian` should have shape (..., T, T). Found shape {tuple(shape)}.")
    for name, tensor in (("losses", losses), ("preferences", preferences)):
        if tensor.shape != shape[:-1]:
            raise ValueError(
                f"`{name}` should have shape {tuple(shape[:-1])}, as the Gramian. Found shape {tuple(tensor.shape)}."
            )
    for name, tensor in (("gramian", gramian), ("losses", losses), ("preferences", preferences)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"`{name}` should be finite. Found NaN or infinity; leave out the rows that it comes from."
            )


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy of ``tensor`` in double precision on the CPU, where small systems are solved fastest."""
    return tensor.detach().to("cpu", torch.float64)
