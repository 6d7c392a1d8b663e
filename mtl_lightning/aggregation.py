"""Gradient aggregation: from the gradients of the tasks to the one that a single model steps along.

An aggregator sees the Jacobian of the losses in the parameters that tasks share, shape ``(T, N)``, one gradient a row.
Most of them weigh the rows by what the Gramian of these says, shape ``(T, T)``, their lengths and angles. Which one to
use:

- ``UPGrad``: the mean of the gradients, each relieved of what hurts another task. Follows the lengths of the gradients,
  and is against no task.
- ``MGDA``: the shortest vector in the hull of the gradients. Against no task either, but led by the shortest gradient.
- ``mtl_lightning.cagrad.CAGrad``: near the mean gradient, the best for the task that gains least.
- ``mtl_lightning.nash.NashMTL``, ``IMTLG``: the unit of a loss does not matter.
- ``AlignedMTL``: the gradients made orthogonal and of one length, with the least change.
- ``PCGrad``: each gradient relieved of its conflicts in turn; with more than two tasks some may be left.
- ``mtl_lightning.torchjd.TorchJD``: those of TorchJD.

What they all are to be compared with is the plain sum, :class:`~mtl_lightning.weighting.Equal`, at several learning
rates: it needs one backward pass where these need one per task.

References:
    - Désidéri: Multiple-Gradient Descent Algorithm (MGDA) for Multiobjective Optimization (2012), Comptes Rendus
      Mathématique 350.
    - Sener, Koltun: Multi-Task Learning as Multi-Objective Optimization (2018), arXiv:1810.04650.
    - Yu, Kumar, Gupta, Levine, Hausman, Finn: Gradient Surgery for Multi-Task Learning (2020), arXiv:2001.06782.
    - Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang: Towards Impartial Multi-Task Learning (2021), ICLR.
    - Senushkin, Patakin, Kuznetsov, Konushin: Independent Component Alignment for Multi-Task Learning (2023), CVPR,
      arXiv:2305.19000.
    - Quinton, Rey: Jacobian Descent for Multi-Objective Optimization (2024), arXiv:2406.16232.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_lightning.min_norm import min_norm_weights
from mtl_lightning.nnls import check_gramian, nonnegative_least_squares
from mtl_lightning.seeds import mix_seed
from mtl_lightning.weighting import ExactState, check_entries, entries

CHUNK = 2**20  # columns of a Jacobian that are held in float64 at a time


class GradientAggregator(ExactState):
    """The base of all aggregators: gradients of the tasks, shape ``(T, N)``, to one, shape ``(N,)``.

    A subclass overrides :meth:`solve`, from the Gramian of the gradients to the weights of the tasks. One that needs
    the gradients themselves sets :attr:`needs_jacobian` and overrides :meth:`combine`. Each call is a step of the run:
    what an aggregator learns or draws, it may change then, in buffers or extra state, so that checkpoints hold it.
    Modules call it with values that are reduced over ranks, so that all ranks do the same.

    Attributes:
        task_names: The names of the ``T`` tasks, empty before :meth:`resolve`.
        needs_jacobian: Whether it needs more than the Gramian; it has no weights then.
    """

    needs_jacobian: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.task_names: tuple[str, ...] = ()

    def resolve(self, task_names: Sequence[str]) -> None:
        """Take up the names of the tasks, and start anew. Modules call it once, before anything else.

        Raises:
            ValueError: If the aggregator does not fit these tasks.
        """
        if not task_names:
            raise ValueError("`task_names` should hold at least one name. Found none.")
        self.task_names = tuple(task_names)
        self.reset()

    def reset(self) -> None:
        """Make the state anew, for the tasks of ``task_names``; by default there is none."""

    def forward(self, jacobian: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the gradient to step along, shape ``(N,)``, in dtype and on the device of ``jacobian``.

        Args:
            jacobian: The gradients of the tasks, shape ``(T, N)``, finite.
            tasks: If some tasks have no gradient in this step, the indices of those that have. ``jacobian`` then holds
                their rows only, in this order, and the others take no part.

        Raises:
            RuntimeError: Before :meth:`resolve`.
            ValueError: If the shape is wrong, or ``tasks`` are not indices of different tasks.
        """
        if self.needs_jacobian:
            if jacobian.ndim != 2:
                raise ValueError(f"`jacobian` should have shape (T, N). Found shape {tuple(jacobian.shape)}.")
            return self.combine(jacobian, self._columns(len(jacobian), tasks))
        return weighted_sum(self.weights(gramian(jacobian), tasks), jacobian)

    def weights(self, gramian: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the weights of the tasks, shape ``(T,)``, float64, on the device of ``gramian``.

        Args:
            gramian: Of the gradients, shape ``(T, T)``, finite; best in float64.
            tasks: See :meth:`forward`.

        Raises:
            RuntimeError: Before :meth:`resolve`.
            TypeError: If the aggregator needs the gradients themselves.
            ValueError: If the shape is wrong, or ``tasks`` are not indices of different tasks.
        """
        if self.needs_jacobian:
            raise TypeError(
                f"`weights` should be asked of an aggregator that is one of the Gramian. Found {type(self).__name__}, "
                "which needs the gradients themselves; call it with the Jacobian."
            )
        # Problems of this size are solved faster on the host than a device could be told to.
        products = gramian.detach().cpu().double()
        check_gramian(products)
        if products.ndim != 2:
            raise ValueError(f"`gramian` should have shape (T, T). Found shape {tuple(products.shape)}.")
        return self.solve(products, self._columns(len(products), tasks)).to(gramian.device)

    def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
        """Return the weights of some tasks, float64; ``gramian`` is theirs, float64, on the host."""
        raise NotImplementedError

    def combine(self, jacobian: Tensor, columns: list[int]) -> Tensor:
        """Return the gradient to step along, for an aggregator that needs the gradients of the tasks ``columns``."""
        raise NotImplementedError

    def _columns(self, rows: int, tasks: Sequence[int] | None) -> list[int]:
        num_tasks = len(self.task_names)
        if not num_tasks:
            raise RuntimeError("`resolve` should be called with the names of the tasks first, as modules do.")
        chosen = list(range(num_tasks)) if tasks is None else [int(task) for task in tasks]
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= task < num_tasks for task in chosen):
            raise ValueError(f"`tasks` should be indices of different tasks below {num_tasks}. Found {chosen}.")
        if rows != len(chosen):
            raise ValueError(f"There should be {len(chosen)} gradients, one per task. Found {rows}.")
        return chosen


def gramian(jacobian: Tensor) -> Tensor:
    """Return the scalar products of the rows of a Jacobian, shape ``(T, N)`` to ``(T, T)``, float64.

    Raises:
        ValueError: If the shape is wrong.

    Example:
        >>> gramian(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([[1., 1.],
                [1., 2.]], dtype=torch.float64)
    """
    if jacobian.ndim != 2:
        raise ValueError(f"`jacobian` should have shape (T, N). Found shape {tuple(jacobian.shape)}.")
    total = jacobian.new_zeros(len(jacobian), len(jacobian), dtype=torch.float64)
    for part in torch.split(jacobian.detach(), CHUNK, dim=1):
        rows = part.double()  # products of float32 would lose the angles of gradients of very different lengths
        total += rows @ rows.T
    return total


def weighted_sum(weights: Tensor, jacobian: Tensor) -> Tensor:
    """Return the sum of the rows of a Jacobian, shape ``(T, N)``, each times its weight, shape ``(N,)``.

    It is summed in float64 and returned in dtype and on the device of ``jacobian``: where gradients nearly cancel out,
    weights may be so large that products of float32 would leave little else than rounding.

    Example:
        >>> weighted_sum(torch.tensor([1e6, -1e6], dtype=torch.float64), torch.tensor([[1.25], [1.0]]))
        tensor([250000.])
    """
    weights = weights.to(jacobian.device, torch.float64)
    return torch.cat([(weights @ part.double()).to(jacobian) for part in torch.split(jacobian, CHUNK, dim=1)])


class _Preferred(GradientAggregator):
    """An aggregator that gives the tasks weights of the user's."""

    def __init__(self, preference: Mapping[str, float] | Sequence[float] | None) -> None:
        super().__init__()
        self._given = None if preference is None else check_entries("preference", preference)
        self._preference: Tensor | None = None

    def reset(self) -> None:
        """Look up the preference."""
        if self._given is not None:
            self._preference = entries("preference", self._given, self.task_names, 1.0, torch.device("cpu"))
            if not self._preference.any():
                raise ValueError("`preference` should have a positive entry. Found zeros only.")

    def preference_of(self, columns: list[int]) -> Tensor:
        """Return the weights of some tasks before any aggregation, shape ``(T',)``, float64; their sum is one."""
        chosen = torch.ones(len(columns), dtype=torch.float64)
        if self._preference is not None and self._preference[columns].any():
            chosen = self._preference[columns]
        return chosen / chosen.sum()


class MGDA(GradientAggregator):
    """The shortest vector in the convex hull of the gradients (MGDA; Désidéri, 2012; Sener and Koltun, 2018).

    Its product with each gradient is at least its own squared length, so that a small step along it makes no task
    worse; it is zero where there is no such step. The weights are those of
    :func:`~mtl_lightning.min_norm.min_norm_weights`, exact, where the papers end an iteration early.

    Args:
        normalized: Whether gradients are brought to length one before; the vector found is then near their bisector,
            not near the shortest. Weights are still those of the gradients as they are.

    Example:
        >>> aggregator = MGDA()
        >>> aggregator.resolve(["depth", "edges"])
        >>> aggregator(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([0.4000, 0.8000])
    """

    def __init__(self, normalized: bool = False) -> None:
        super().__init__()
        self.normalized = normalized

    def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
        """Return the weights on the simplex; over the lengths of the gradients, if these are normalised."""
        if not self.normalized:
            return min_norm_weights(gramian)
        inverse = _inverse(gramian.diagonal().clamp_min(0).sqrt())
        return inverse * min_norm_weights(inverse[:, None] * gramian * inverse)


class UPGrad(_Preferred):
    """The mean of the gradients, each projected onto what hurts no task (UPGrad; Quinton and Rey, 2024).

    The projection is onto the dual cone of the gradients, the vectors whose products with them are not negative. Their
    mean is in it again: a small step makes no task worse. Without a conflict it is the mean of the gradients. The
    projections are exact, by :func:`~mtl_lightning.nnls.nonnegative_least_squares`, where TorchJD regularises.

    Args:
        preference: The weights of the projected gradients, by task name, with one for those that are not named, or one
            per task in their order; scaled to a sum of one. Equal by default, as in the paper.

    Raises:
        ValueError: If a weight is out of range; in :meth:`resolve`, if the weights do not fit the tasks.

    Example:
        >>> aggregator = UPGrad()
        >>> aggregator.resolve(["depth", "edges"])
        >>> aggregator(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.2500, 0.7500])
    """

    def __init__(self, preference: Mapping[str, float] | Sequence[float] | None = None) -> None:
        super().__init__(preference)

    def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
        """Return the sum of the weights of the projections."""
        return project_onto_dual_cone(torch.diag(self.preference_of(columns)), gramian).sum(dim=0)


def project_onto_dual_cone(weights: Tensor, gramian: Tensor) -> Tensor:
    """Return the weights of the projections of weighted sums of gradients onto their dual cone, shape ``(..., T)``.

    The vector nearest to ``J' u`` whose products with the rows of ``J`` are not negative is ``J' v``, with the
    ``v >= u`` that minimises ``v' G v`` (Quinton and Rey, 2024, proposition 1).

    Args:
        weights: ``u``, shape ``(..., T)``.
        gramian: ``G = J J'``, shape ``(T, T)``.

    Raises:
        ValueError: If the shapes do not fit, or an entry is not finite.

    Example:
        >>> project_onto_dual_cone(torch.tensor([0.0, 1.0]), torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
        tensor([1., 1.])
    """
    products = -(weights @ gramian)
    return weights + nonnegative_least_squares(gramian.expand(*products.shape, len(gramian)), products)


class PCGrad(GradientAggregator):
    """The sum of the gradients, each without its parts against the others (PCGrad; Yu et al., 2020).

    A gradient meets the others in random order; with each whose product with what is left of it is negative, that part
    is taken out. With two tasks the sum conflicts with neither.

    Args:
        seed: Another seed draws other orders. The orders depend on it and the number of steps alone, and so are equal
            on all ranks. The seed of the run does not: give every run one of its own.

    Example:
        >>> aggregator = PCGrad()
        >>> aggregator.resolve(["depth", "edges"])
        >>> aggregator(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._draws = 0

    def reset(self) -> None:
        """Go back to the first orders."""
        self._draws = 0

    def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
        """Return the sum of the weights of the projected gradients."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self._draws))
        self._draws += 1
        orders = [torch.randperm(len(columns), generator=generator).tolist() for _ in columns]
        rows = gramian.tolist()  # arithmetic of single numbers is ten times faster in Python than with tensors
        total = torch.zeros(len(columns), dtype=torch.float64)
        for own, order in enumerate(orders):
            weights = [float(task == own) for task in range(len(columns))]
            products = list(rows[own])
            for other in order:
                if other == own or products[other] >= 0:
                    continue
                step = products[other] / rows[other][other]
                weights[other] -= step
                products = [product - step * entry for product, entry in zip(products, rows[other], strict=True)]
            total += torch.tensor(weights, dtype=torch.float64)
        return total

    def get_extra_state(self) -> dict[str, Any]:
        """Return how often orders were drawn, as part of the ``state_dict``."""
        return {"draws": self._draws}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self._draws = state["draws"]


class IMTLG(GradientAggregator):
    """The weighted sum whose projections onto all gradients are equally long (IMTL-G; Liu et al., 2021).

    The weights sum to one, and may be negative. Where gradients are linearly dependent, the condition is met as well as
    it can be, as in TorchJD; gradients of zero have no direction and no weight.

    Note:
        Where the weights of all solutions sum to zero there is none, and all weights are zero: no step. Near such a
        point the weights are large; clip the gradient. Beyond it, as where a short gradient lies between long ones, the
        projections are all negative, and a step makes every task worse: so the formula of the paper has it.

    Example:
        >>> aggregator = IMTLG()
        >>> aggregator.resolve(["depth", "edges"])
        >>> aggregator(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([0.6667, 0.6667])
    """

    def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
        """Return the weights ``w`` with equal products of ``J' w`` and the unit vectors of the gradients."""
        inverse = _inverse(gramian.diagonal().clamp_min(0).sqrt())
        if not inverse.any():
            return torch.zeros_like(inverse)
        correlations = inverse[:, None] * gramian * inverse
        found = inverse * (torch.linalg.pinv(correlations, hermitian=True) @ (inverse > 0).double())
        total = found.sum()
        if abs(total) <= 1e-12 * found.abs().sum():
            return torch.zeros_like(found)
        return found / total


class AlignedMTL(_Preferred):
    """The gradients made orthogonal and of one length by the least change, then averaged (Senushkin et al., 2023).

    The matrix of the changed gradients is the nearest one of condition number one: the singular values of the Jacobian
    are all replaced by the smallest. Directions of a singular value of zero are left out.

    Args:
        preference: The weights of the changed gradients, by task name, with one for those that are not named, or one
            per task in their order; scaled to a sum of one. Equal by default.

    Raises:
        ValueError: If a weight is out of range; in :meth:`resolve`, if the weights do not fit the tasks.

    Note:
        An eigenvalue of the Gramian counts as zero below ``T`` times the precision of float32 times the largest, as in
        the official code. One that is just above makes the step very small: gradients that nearly agree, or nearly
        cancel out, hardly move the model.

    Example:
        >>> aggregator = AlignedMTL()
        >>> aggregator.resolve(["depth", "edges"])
        >>> aggregator(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 0.5000])
    """

    def __init__(self, preference: Mapping[str, float] | Sequence[float] | None = None) -> None:
        super().__init__(preference)

    def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
        """Return ``s V S^-1 V' w``, with ``G = V S^2 V'`` and ``s`` the smallest singular value."""
        values, vectors = torch.linalg.eigh(gramian)
        rank = values > values[-1] * len(values) * torch.finfo(torch.float32).eps
        if not rank.any():
            return torch.zeros_like(values)
        values, vectors = values[rank], vectors[:, rank]
        balance = (vectors * (values[0] / values).sqrt()) @ vectors.T
        return balance @ self.preference_of(columns)


def _inverse(lengths: Tensor) -> Tensor:
    """Return one over each length, and zero for a length of zero."""
    return torch.where(lengths > 0, 1 / lengths, 0.0)
