"""The Fisher information of tasks in the parameters that they share, as far as their similarity needs it.

References:
    S.-I. Amari, "Natural gradient works efficiently in learning", Neural Computation 10, 1998, for the Fisher
    information.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def root_fisher_gramian(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Return ``<sqrt F_i, sqrt F_j>``, shape ``(T, T)``, of the tasks' gradients in one batch.

    The diagonal Fisher information of a task is the mean of its squared gradients, element by element. With the
    gradient of one batch in place of the mean, ``sqrt F_i = |g_i|``, and the entry is ``sum |g_i| |g_j|``: how much the
    tasks use the same parameters, be it in the same direction or not. The gradient of a batch's mean loss stands for
    those of its samples. Parameters are added up one after another, so that no more than one of them is copied.

    Args:
        gradients: For each task the gradients of the shared parameters, in the same order; ``None`` stands for zeros,
            as ``torch.autograd.grad(..., allow_unused=True)`` returns it.

    Returns:
        The Gramian on the device of the first gradient, float64 if that is, else float32; zeros if all are ``None``.

    Raises:
        ValueError: If there is no task, or tasks differ in how many gradients they have.

    Example:
        >>> gradients = [[torch.tensor([3.0, -4.0]), None], [torch.tensor([-3.0, 4.0]), torch.tensor([[2.0]])]]
        >>> root_fisher_gramian(gradients)
        tensor([[25., 25.],
                [25., 29.]])
    """
    counts = [len(row) for row in gradients]
    if len(set(counts)) != 1:
        raise ValueError(
            f"`gradients` should hold as many gradients for each task, one per shared parameter. Found {counts}."
        )
    first = next((gradient for row in gradients for gradient in row if gradient is not None), torch.empty(()))
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    gramian = torch.zeros(len(gradients), len(gradients), dtype=dtype, device=first.device)
    for column in zip(*gradients, strict=True):
        tasks = [task for task, gradient in enumerate(column) if gradient is not None]
        if tasks:
            rows = torch.stack([gradient.detach().flatten().to(dtype) for gradient in column if gradient is not None])
            index = torch.tensor(tasks, device=gramian.device)
            gramian[index[:, None], index] += (rows.abs() @ rows.abs().T).to(gramian.device)
    return gramian
