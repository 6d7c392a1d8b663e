"""Affinity among tasks: how much a step for one task helps another.

The measure of selective task group updates needs no extra backward pass. The tasks are updated in groups, one after the
other on the same batch, and the losses of all tasks are known before and after each step. What the step of a whole
group did is divided into increments for pairs of tasks, and these are averaged over time.

References:
    W. Jeong, K.-J. Yoon, "Selective Task Group Updates for Multi-Task Optimization", ICLR 2025, arXiv 2502.11986.
    Official code: https://github.com/wooseong97/sel-update-mtl, revision 53a8ba2, ``utils/train_utils.py``.

    C. Fifty, E. Amid, Z. Zhao, T. Yu, R. Anil, C. Finn, "Efficiently Identifying Task Groupings for Multi-Task
    Learning", NeurIPS 2021, arXiv 2109.04617.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Attribution = Literal["stepping_group", "published"]
"""Which group a change of the losses is credited to: see :class:`ProximalAffinity`."""


class ProximalAffinity(nn.Module):
    r"""The moving average of proximal inter-task affinity, from row (source) to column (target).

    The step of group ``G`` changes the loss of task ``k`` by ``B_Gk = 1 - after_k / before_k``, positive where the step
    helped. With ``b_k = B_Gk / |G|``, each source ``s`` in ``G`` gets towards each target ``k`` the increment

    ================================== =====================================================================
    case                               increment of entry ``(s, k)``
    ================================== =====================================================================
    ``k`` not in ``G``                 ``b_k``
    ``k = s``                          ``b_s`` if ``b_s >= 0``, else the entry is not updated
    other ``k`` in ``G``, same sign    ``b_k``; zero has the sign of both
    other ``k`` in ``G``, else         ``-max(b_k, b_s)``, minus the positive one, in both directions
    ================================== =====================================================================

    and ``E_sk <- (1 - decay) E_sk + decay * increment``, from zero. For ``G = {i}``, SGD and weight one, ``B_ik`` of
    another task ``k`` is exactly the look-ahead affinity of Fifty et al. On the diagonal and inside groups it also
    holds what the heads of ``G`` gained by moving, so that conflict there is seen only where it exceeds that gain.

    A loss counts where it is finite and positive before and after the step. Any other one, such as NaN of a task
    without labels in the batch, leaves its task out as source and as target: those entries keep value and count.
    ``|G|`` is still the size of the whole group.

    Departures from the official code; ``attribution="published"`` undoes the first two, ``bias_correction=False`` the
    third:

    - The official code credits the change of the losses to the wrong group. It computes the losses of a group, steps,
      and then compares them with those of the group before: the comparison spans the step of the group *before*, and
      the current one gets the credit. For single tasks in random order, ``E_ik`` thus approaches the mean of ``B_jk``
      over all ``j`` but ``i``, which *falls* with the true ``B_ik``. See ``next_group`` of :meth:`update`.
    - In the official code a source whose own loss does not count is still credited for the targets outside its group.
      Such a task had no part in the step.
    - Entries are updated unequally often and start at zero, which the official code does not correct for.
    - The official code looks at the sign of the loss before the step only, and one NaN stays in the average for good;
      here the loss after the step has to be finite and positive too. It keeps the average in float32.

    Nothing here waits for the device if the losses are on that of the module: :meth:`update` neither reads a value nor
    copies one to the device. The state is equal on all ranks if the losses are, so reduce them first.

    Args:
        num_tasks: The number of tasks ``T``.
        decay: The weight of the *new* value, in (0, 1]. The default is the official code's for NYUD-v2 and PASCAL, a
            half-life of 693 updates; it is 1e-4 for Taskonomy.
        attribution: ``"stepping_group"`` credits the group that has stepped between the losses, ``"published"`` the
            group that steps next, as the official code does.
        bias_correction: Whether :attr:`matrix` divides by ``1 - (1 - decay)^n``, with ``n`` the updates of the entry,
            which makes it a weighted mean of the increments.

    Attributes:
        average: The moving average ``E``, shape ``(T, T)``, float64 whatever the module is cast to.
        counts: How often each entry was updated, shape ``(T, T)``, int64.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        The first two tasks step together, which harms the third:

        >>> import torch
        >>> affinity = ProximalAffinity(num_tasks=3)
        >>> affinity.update([0, 1], before=torch.tensor([0.5, 0.5, 2.0]), after=torch.tensor([0.18, 0.045, 3.38]))
        >>> affinity.matrix
        tensor([[ 0.3200,  0.4550, -0.3450],
                [ 0.3200,  0.4550, -0.3450],
                [ 0.0000,  0.0000,  0.0000]], dtype=torch.float64)
    """

    average: Tensor
    counts: Tensor

    def __init__(
        self,
        num_tasks: int,
        decay: float = 1e-3,
        attribution: Attribution = "stepping_group",
        bias_correction: bool = True,
    ) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"`num_tasks` should be at least 1. Found {num_tasks}.")
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"`decay`, the weight of the new value, should lie in (0, 1]. Found {decay}.")
        if attribution not in get_args(Attribution):
            raise ValueError(f"`attribution` should be one of {get_args(Attribution)}. Found {attribution!r}.")
        self.num_tasks = num_tasks
        self.decay = float(decay)
        self.attribution: Attribution = attribution
        self.bias_correction = bias_correction
        self.register_buffer("average", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_tasks, num_tasks, dtype=torch.int64))

    @torch.no_grad()
    def update(
        self, group: Sequence[int], before: Tensor, after: Tensor, *, next_group: Sequence[int] | None = None
    ) -> None:
        """Take up what the step of ``group`` did to the losses of all tasks.

        Args:
            group: The tasks that have stepped.
            before: The losses of all tasks before the step, shape ``(T,)``, unweighted; NaN where there is none.
            after: The losses after it, on the same batch and with the same random numbers, shape ``(T,)``.
            next_group: The tasks that step next on the same batch, ``None`` after the last step on it. Used by the
                published attribution only, where it takes the place of ``group`` in the increments, its size included;
                with ``None`` there is nothing to credit and nothing changes, as the official code never measures the
                last step. A group that is alone steps twice on a batch there, so it is its own next group once.

        Raises:
            ValueError: If a group is empty, repeats a task or names one out of range, or a shape is wrong.
        """
        stepped = self._checked("group", group)
        follows = None if next_group is None else self._checked("next_group", next_group)
        for name, losses in (("before", before), ("after", after)):
            if losses.shape != (self.num_tasks,):
                raise ValueError(
                    f"`{name}` should have shape ({self.num_tasks},), one loss per task. Found {tuple(losses.shape)}."
                )
        credited = stepped if self.attribution == "stepping_group" else follows
        if credited is None:
            return
        increment, updated = self._increments(credited, before.to(self.average), after.to(self.average))
        # `where` instead of a product with zero: what is left out may hold NaN.
        self.average.copy_(
            torch.where(updated, (1.0 - self.decay) * self.average + self.decay * increment, self.average)
        )
        self.counts.add_(updated)

    def _increments(self, group: Sequence[int], before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Return the increments and which entries they update, each of shape ``(T, T)``."""
        gains = (1.0 - after / before) / len(group)
        # The quotient of a huge and a tiny loss overflows, hence the third test.
        valid = _is_positive(before) & _is_positive(after) & gains.isfinite()
        measured_source, measured_target = valid.unsqueeze(1), valid.unsqueeze(0)
        members = torch.zeros_like(valid)
        for task in group:
            members[task].fill_(True)  # an index tensor made of Python numbers would be copied to the device
        inside = members.unsqueeze(0)
        source, target = gains.unsqueeze(1), gains.unsqueeze(0)
        conflict = inside & (source * target < 0)
        increment = torch.where(conflict, -torch.maximum(source, target), target)
        harmed_itself = torch.diag(gains < 0)
        if self.attribution == "published":
            measured_source = measured_source | ~inside
        return increment, members.unsqueeze(1) & measured_source & measured_target & ~harmed_itself

    @property
    def matrix(self) -> Tensor:
        """The affinity from row to column, shape ``(T, T)``, float64; zero where nothing was measured."""
        if not self.bias_correction:
            return self.average.clone()
        # Through logarithms, since 1 - (1 - decay)^n cancels where `decay` is small; and (1 - 1)^n is no special case.
        rate = math.log1p(-self.decay) if self.decay < 1.0 else -math.inf
        share = -torch.expm1(self.counts.double() * rate)
        return torch.where(self.counts > 0, self.average / share, 0.0)

    def reset(self) -> None:
        """Forget everything measured."""
        self.average.zero_()
        self.counts.zero_()

    def extra_repr(self) -> str:
        """Return the arguments."""
        return (
            f"num_tasks={self.num_tasks}, decay={self.decay:g}, attribution={self.attribution!r}, "
            f"bias_correction={self.bias_correction}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProximalAffinity:
        # Training in half precision casts the whole module. With a small `decay`, the increments would then be rounded
        # away: only the device is taken over.
        average = self.average
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.average.dtype != average.dtype:
            self.average = average.to(self.average.device)
        return self

    def _checked(self, name: str, group: Sequence[int]) -> list[int]:
        tasks = [operator.index(task) for task in group]
        if not tasks:
            raise ValueError(f"`{name}` should name at least one task. Found none.")
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"`{name}` should name each task once. Found {tasks}.")
        if min(tasks) < 0 or max(tasks) >= self.num_tasks:
            raise ValueError(f"`{name}` should name tasks from 0 to {self.num_tasks - 1}. Found {tasks}.")
        return tasks


def _is_positive(losses: Tensor) -> Tensor:
    return losses.isfinite() & (losses > 0)
