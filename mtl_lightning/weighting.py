"""Loss weightings: from the losses of the tasks to the one objective that a single model minimises.

A weighting maps losses, shape ``(T,)``, to an objective, shape ``()``; its slopes there are the weights of the tasks.
What it learns of the run are buffers and parameters, so that checkpoints hold them. Which one to use:

- ``Equal`` and ``Fixed``: no state; what all others are to be compared with, at several learning rates.
- ``ScaleInvariant`` and ``GeometricMean``: no state, and the unit of a loss does not matter. Losses should be positive.
- ``Uncertainty`` and ``IMTLLoss``: one number per task, learned with the network; slowly, they even out the scales too.
  Losses should not be negative.
- ``DynamicWeightAverage``: by how fast each loss falls from epoch to epoch. Losses should not be negative.
- ``RandomWeights``: random in every step; what a weighting that follows the losses has to beat.
- ``Scalarized``: any scalarisation with a preference vector, such as smooth Chebyshev.
- ``mtl_lightning.adaptive_weighting``: those that ask for more than the losses of a step.

References:
    - Kendall, Gal, Cipolla: Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics
      (2018), arXiv:1705.07115.
    - Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention (2019), arXiv:1803.10704.
    - Chennupati, Sistu, Yogamani, Rawashdeh: MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy
      for Multi-Task Learning (2019), arXiv:1904.08492.
    - Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang: Towards Impartial Multi-Task Learning (2021), ICLR.
    - Lin, Ye, Zhang, Tsang: Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning (2022),
      arXiv:2111.10603.
    - Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya: Multi-Task Learning as a Bargaining Game (2022),
      arXiv:2202.01017.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lightning.scalarization import Scalarization, SmoothChebyshev
from mtl_lightning.seeds import mix_seed

EPSILON = 1e-8  # losses below it count as this much where their logarithm or inverse is taken
Indicator = Callable[[Tensor, Tensor], Tensor | float]
Columns = slice | list[int]


class ExactState(nn.Module):
    """A module whose buffers keep their precision whatever it is cast to.

    Training in half precision casts the whole module. Sums and small updates would be rounded away: of buffers only the
    device is taken over.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactState:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            cast = self.get_buffer(name)
            if cast.dtype != kept.dtype:
                setattr(self, name, kept.to(cast.device))
        return self


class LossWeighting(ExactState):
    """The base of all loss weightings: losses of the tasks, shape ``(T,)``, to an objective, shape ``()``.

    A subclass overrides :meth:`objective`. If it has a state, it makes it in :meth:`reset`, one entry per task, and
    changes it in one of the hooks whose names begin with ``observe``; ``forward`` changes nothing. Modules call the
    hooks with values that are reduced over ranks, so that all ranks learn the same.

    Attributes:
        task_names: The names of the ``T`` tasks, empty before :meth:`resolve`.
        needs_positive_losses: Whether a negative loss has no meaning; modules refuse one then. Zero is allowed.
        needs_losses_after_step: Whether :meth:`observe_step` is to be called. It costs a forward pass per step.
        needs_gradient_norms: Whether :meth:`observe_gradients` is to be called. It costs a gradient per task and step.
        layer: The name of the module of the network in whose parameters those gradients are taken, or ``None`` for the
            last tensor of weights that all tasks share.
        indicators: By task, a function of prediction and target to a number in [0, 1] that tells how well the task is
            done, for :meth:`observe_batch`.
    """

    needs_positive_losses: bool = False
    needs_losses_after_step: bool = False
    needs_gradient_norms: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.task_names: tuple[str, ...] = ()
        self.layer: str | None = None
        self.indicators: Mapping[str, Indicator] = {}

    def resolve(self, task_names: Sequence[str]) -> None:
        """Take up the names of the tasks, and start anew. Modules call it once, before anything else.

        Raises:
            ValueError: If the weighting does not fit these tasks.
        """
        if not task_names:
            raise ValueError("`task_names` should hold at least one name. Found none.")
        self.task_names = tuple(task_names)
        self.reset()

    def reset(self) -> None:
        """Make the state anew, for the tasks of ``task_names``; by default there is none."""

    def forward(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the objective, shape ``()``.

        Args:
            losses: The losses of the tasks, shape ``(T,)``.
            tasks: If some tasks have no loss in this batch, the indices of those that have. ``losses`` then holds their
                entries only, in this order, and the others take no part.

        Raises:
            RuntimeError: Before :meth:`resolve`.
            ValueError: If the shape is wrong, or ``tasks`` are not indices of different tasks.
        """
        return self.objective(losses, self.columns(losses, tasks))

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the objective of the losses of some tasks, of checked shape; ``columns`` picks them from the state."""
        raise NotImplementedError

    def slopes(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Return the derivatives of the objective with respect to the losses: the weights of the tasks, ``(T,)``."""
        leaf = losses.detach().requires_grad_()
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(self(leaf, tasks), leaf)
        return slopes

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Learn from the mean losses of the batches of one optimiser step, after it; by default nothing."""

    def observe_batch(self, losses: Tensor, indicators: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Learn from the losses and the indicators of a batch, before its objective; by default nothing.

        An indicator is NaN for a task that :attr:`indicators` does not name.
        """

    def observe_step(self, before: Tensor, after: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Learn from the losses of one batch before and after an optimiser step; by default nothing."""

    def observe_gradients(self, losses: Tensor, norms: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Learn from the norms of the gradients of the unweighted losses in the shared layer; by default nothing."""

    def end_epoch(self) -> None:
        """Learn that an epoch of training is over; by default nothing."""

    def columns(self, losses: Tensor, tasks: Sequence[int] | None) -> Columns:
        """Return what picks the entries of the tasks from a state of shape ``(T,)``, after a check of the losses."""
        num_tasks = len(self.task_names)
        if not num_tasks:
            raise RuntimeError("`resolve` should be called with the names of the tasks first, as modules do.")
        chosen = list(range(num_tasks)) if tasks is None else [int(task) for task in tasks]
        if len(set(chosen)) < len(chosen) or not all(0 <= task < num_tasks for task in chosen):
            raise ValueError(f"`tasks` should be indices of different tasks below {num_tasks}. Found {chosen}.")
        if losses.shape != (len(chosen),) or not chosen:
            raise ValueError(
                f"`losses` should have shape ({len(chosen) or 'T'},), one entry per task. "
                f"Found shape {tuple(losses.shape)}."
            )
        # A slice, where it will do, since a list is copied to the device.
        return slice(None) if chosen == list(range(num_tasks)) else chosen


class Equal(LossWeighting):
    """The sum of the losses.

    Example:
        >>> weighting = Equal()
        >>> weighting.resolve(["depth", "edges"])
        >>> weighting(torch.tensor([1.0, 3.0]))
        tensor(4.)
    """

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the sum."""
        return losses.sum()


class Fixed(LossWeighting):
    """The sum of the losses with given weights.

    Args:
        weights: The weights, finite and not negative: by task name, with one for those that are not named, or one per
            task in their order.

    Raises:
        ValueError: If a weight is out of range; in :meth:`resolve`, if the weights do not fit the tasks.

    Example:
        >>> weighting = Fixed({"edges": 0.5})
        >>> weighting.resolve(["depth", "edges"])
        >>> weighting(torch.tensor([1.0, 3.0]))
        tensor(2.5000)
    """

    weights: Tensor

    def __init__(self, weights: Mapping[str, float] | Sequence[float]) -> None:
        super().__init__()
        self._weights = check_entries("weights", weights)
        self.register_buffer("weights", torch.empty(0, dtype=torch.float64))

    def reset(self) -> None:
        """Look up the weights."""
        self.weights = entries("weights", self._weights, self.task_names, 1.0, self.weights.device)

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the weighted sum."""
        return (self.weights[columns].to(losses) * losses).sum()


class ScaleInvariant(LossWeighting):
    """The sum of the logarithms of the losses, ``sum_t log f_t``; a baseline of Navon et al. (2022).

    A task's part of the gradient, ``grad f_t / f_t``, does not depend on the unit of its loss. Losses should be
    positive; those below 1e-8 count as 1e-8, without a slope.

    Example:
        >>> weighting = ScaleInvariant()
        >>> weighting.resolve(["depth", "edges"])
        >>> weighting.slopes(torch.tensor([0.5, 4.0]))
        tensor([2.0000, 0.2500])
    """

    needs_positive_losses = True

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the sum of the logarithms."""
        return losses.clamp_min(EPSILON).log().sum()


class GeometricMean(LossWeighting):
    """The geometric mean of the losses, ``(prod_t f_t)^(1/T)`` (GLS; Chennupati et al., 2019).

    It has the direction of :class:`ScaleInvariant`, and a length that shrinks with the losses. Losses should be
    positive; those below 1e-8 count as 1e-8, without a slope. The mean is over the tasks that have a loss. The paper's
    focus on chosen tasks is not included.

    Example:
        >>> weighting = GeometricMean()
        >>> weighting.resolve(["depth", "edges"])
        >>> weighting(torch.tensor([1.0, 4.0]))
        tensor(2.)
    """

    needs_positive_losses = True

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the geometric mean."""
        # By logarithms, since a product of many small losses underflows.
        return losses.clamp_min(EPSILON).log().mean().exp()


class RandomWeights(LossWeighting):
    """The sum of the losses with random weights, new in every step (RLW; Lin et al., 2022).

    The weights are the softmax of normal numbers, so that those of all tasks sum to one. They depend on the seed and
    the number of steps alone, and so are equal on all ranks.

    Args:
        seed: Another seed draws other weights. The seed of the run does not: give every run one of its own.

    Example:
        >>> weighting = RandomWeights()
        >>> weighting.resolve(["depth", "edges"])
        >>> before = weighting.slopes(torch.ones(2))
        >>> weighting.observe(torch.ones(2))
        >>> bool((weighting.slopes(torch.ones(2)) != before).all())
        True
    """

    weights: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._draws = 0
        self.register_buffer("weights", torch.empty(0, dtype=torch.float64))

    def reset(self) -> None:
        """Draw the first weights."""
        self._draws = 0
        self._draw()

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the weighted sum."""
        return (self.weights[columns].to(losses) * losses).sum()

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Draw the weights of the next step."""
        self._draws += 1
        self._draw()

    def _draw(self) -> None:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self._draws))
        logits = torch.randn(len(self.task_names), generator=generator, dtype=torch.float64)
        self.weights = logits.softmax(dim=0).to(self.weights.device)

    def get_extra_state(self) -> dict[str, Any]:
        """Return how often weights were drawn, as part of the ``state_dict``."""
        return {"draws": self._draws}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self._draws = state["draws"]


class Uncertainty(LossWeighting):
    """The losses weighted by learned variances, ``sum_t f_t exp(-s_t) / 2 + s_t / 2`` (UW; Kendall et al., 2018).

    ``s_t``, the logarithm of a variance, is a parameter, for the optimiser of the network. The optimum is where
    ``s_t = log f_t``: every weighted loss is one half then.

    Args:
        initial: The logarithms of the variances at the start. The default is ours.

    Note:
        The paper has ``f_t exp(-s_t) + s_t / 2`` for a cross entropy. That is the same with ``s_t`` less ``log 2``, up
        to a constant, so that the one form serves all losses. The objective may be negative, but no loss: its weight
        would grow without end. In a batch without the loss of a task its ``s_t`` has a gradient of zero, so that
        momentum still moves it.

    Example:
        >>> weighting = Uncertainty()
        >>> weighting.resolve(["depth", "edges"])
        >>> weighting(torch.tensor([1.0, 3.0]))
        tensor(2., grad_fn=<SumBackward0>)
    """

    needs_positive_losses = True

    def __init__(self, initial: float = 0.0) -> None:
        super().__init__()
        self.initial = initial
        self.log_variances = nn.Parameter(torch.empty(0))

    def reset(self) -> None:
        """Make the parameter, shape ``(T,)``."""
        self.log_variances = _filled(self.log_variances, len(self.task_names), self.initial)

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the weighted losses with the price of the variances."""
        log_variances = self.log_variances[columns].to(losses)
        return (0.5 * (losses * (-log_variances).exp() + log_variances)).sum()


class IMTLLoss(LossWeighting):
    """The losses with learned scales, ``sum_t exp(s_t) f_t - s_t`` (IMTL-L; Liu et al., 2021).

    ``s_t`` is a parameter, for the optimiser of the network. The optimum is where every scaled loss is one, whatever
    its unit; a negative loss has none. The paper combines it with IMTL-G, which balances gradients. In a batch without
    the loss of a task its ``s_t`` has a gradient of zero, so that momentum still moves it.

    Args:
        initial: The ``s_t`` at the start.

    Example:
        >>> weighting = IMTLLoss()
        >>> weighting.resolve(["depth", "edges"])
        >>> weighting(torch.tensor([1.0, 3.0]))
        tensor(4., grad_fn=<SumBackward0>)
    """

    needs_positive_losses = True

    def __init__(self, initial: float = 0.0) -> None:
        super().__init__()
        self.initial = initial
        self.log_scales = nn.Parameter(torch.empty(0))

    def reset(self) -> None:
        """Make the parameter, shape ``(T,)``."""
        self.log_scales = _filled(self.log_scales, len(self.task_names), self.initial)

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the scaled losses with the price of the scales."""
        log_scales = self.log_scales[columns].to(losses)
        return (log_scales.exp() * losses - log_scales).sum()


class DynamicWeightAverage(LossWeighting):
    """The more weight, the slower a loss falls from epoch to epoch (DWA; Liu, Johns and Davison, 2019).

    ``w_t = T softmax(r / temperature)_t`` with ``r_t`` the mean loss of the last epoch over that of the epoch before.
    In the first two epochs, and for a task that had no loss in one of the last two, ``r_t`` is one. The weights of all
    tasks sum to ``T``.

    Args:
        temperature: Positive; the larger, the more even the weights. The default is the one of the paper.

    Raises:
        ValueError: If it is not positive.

    Example:
        >>> weighting = DynamicWeightAverage()
        >>> weighting.resolve(["depth", "edges"])
        >>> for losses in (torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.9])):
        ...     weighting.observe(losses)
        ...     weighting.end_epoch()
        >>> weighting.slopes(torch.ones(2))
        tensor([0.9003, 1.0997])
    """

    needs_positive_losses = True
    weights: Tensor
    sums: Tensor
    counts: Tensor
    previous: Tensor

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        for name in ("weights", "sums", "counts", "previous"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def reset(self) -> None:
        """Make the sums of the epoch, the means of the epoch before, and weights of one, each of shape ``(T,)``."""
        size = len(self.task_names)
        self.weights = self.weights.new_ones(size)
        self.sums, self.counts = self.sums.new_zeros(size), self.counts.new_zeros(size)
        self.previous = self.previous.new_full((size,), torch.nan)

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the weighted sum."""
        return (self.weights[columns].to(losses) * losses).sum()

    @torch.no_grad()
    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Add the losses to the sums of the epoch."""
        columns = self.columns(losses, tasks)
        self.sums[columns] += losses.to(self.sums)
        self.counts[columns] += 1.0

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Make the weights of the next epoch."""
        means = self.sums / self.counts  # NaN for a task that had no loss
        ratios = means / self.previous
        ratios = torch.where(ratios.isfinite(), ratios, 1.0)
        self.weights = len(self.task_names) * (ratios / self.temperature).softmax(dim=0)
        self.previous = means
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)


class Scalarized(LossWeighting):
    """A scalarisation with a fixed preference vector; by default :class:`~mtl_lightning.scalarization.SmoothChebyshev`.

    Args:
        scalarization: From losses and preferences to the objective.
        preference: The preferences, finite and not negative: by task name, with one for those that are not named, or
            one per task in their order; equal by default. They are scaled to sum to one.

    Raises:
        TypeError: If the scalarisation is of another kind.
        ValueError: If a preference is out of range; in :meth:`resolve`, if they do not fit the tasks or all are zero.

    Example:
        >>> weighting = Scalarized(preference={"depth": 3.0})
        >>> weighting.resolve(["depth", "edges"])
        >>> weighting(torch.tensor([1.0, 3.0]))
        tensor(0.8193)
    """

    preference: Tensor

    def __init__(
        self,
        scalarization: Scalarization | None = None,
        preference: Mapping[str, float] | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if scalarization is not None and not isinstance(scalarization, Scalarization):
            raise TypeError(f"`scalarization` should be an object of Scalarization. Found {scalarization!r}.")
        self.scalarization = SmoothChebyshev() if scalarization is None else scalarization
        self._preference = check_entries("preference", {} if preference is None else preference)
        self.register_buffer("preference", torch.empty(0, dtype=torch.float64))

    def reset(self) -> None:
        """Look up the preferences; what the scalarisation has learned stays."""
        found = entries("preference", self._preference, self.task_names, 1.0, self.preference.device)
        if not found.any():
            raise ValueError(f"`preference` should have a positive entry. Found {found.tolist()}.")
        self.preference = found / found.sum()

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the scalarised losses."""
        tasks = None if isinstance(columns, slice) else columns
        objective: Tensor = self.scalarization(losses, self.preference[columns].to(losses), tasks=tasks)
        return objective

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Let the scalarisation observe the losses."""
        self.scalarization.observe(losses, tasks)


def check_entries(name: str, values: Mapping[str, float] | Sequence[float]) -> dict[str, float] | list[float]:
    """Return numbers by task name, or one per task, or raise an error if one is negative or not finite."""
    numbers: dict[str, float] | list[float]
    if isinstance(values, Mapping):
        numbers = {key: float(value) for key, value in values.items()}
    else:
        numbers = [float(value) for value in values]
    for value in numbers.values() if isinstance(numbers, dict) else numbers:
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` should be finite and not negative. Found {value}.")
    return numbers


def entries(
    name: str,
    values: Mapping[str, float] | Sequence[float],
    task_names: Sequence[str],
    missing: float,
    device: torch.device,
) -> Tensor:
    """Return one number per task, shape ``(T,)``, float64; ``missing`` for those that are not named."""
    if isinstance(values, Mapping):
        unknown = [key for key in values if key not in task_names]
        if unknown:
            raise ValueError(
                f"`{name}` should name tasks, {', '.join(map(repr, task_names))}. "
                f"Found {', '.join(map(repr, unknown))}."
            )
        values = [values.get(key, missing) for key in task_names]
    if len(values) != len(task_names):
        raise ValueError(f"`{name}` should have one entry per task, {len(task_names)}. Found {len(values)}.")
    return torch.tensor(list(values), dtype=torch.float64, device=device)


def check_positive(name: str, value: float) -> float:
    """Return ``value``, or raise an error unless it is positive and finite."""
    if not (isfinite(value) and value > 0):
        raise ValueError(f"`{name}` should be positive and finite. Found {value}.")
    return float(value)


def _filled(parameter: nn.Parameter, size: int, value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((size,), value, dtype=parameter.dtype, device=parameter.device))
