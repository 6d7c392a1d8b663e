"""Loss weightings that ask for more than the losses of a step.

- ``FAMO`` compares the losses of a batch before and after the step: one more forward pass per step.
- ``DynamicTaskPrioritization`` asks how well each task is done, by an indicator of the user's.
- ``GradNorm`` measures the gradient of each loss in one shared layer: part of a backward pass per task and step.

References:
    - Liu, Feng, Stone, Liu: FAMO: Fast Adaptive Multitask Optimization (2023), arXiv:2306.03792.
    - Guo, Haque, Huang, Yeung, Fei-Fei: Dynamic Task Prioritization for Multitask Learning (2018), ECCV.
    - Chen, Badrinarayanan, Lee, Rabinovich: GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
      Multitask Networks (2018), arXiv:1711.02257.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl_lightning.weighting import (
    EPSILON,
    Columns,
    ExactState,
    Indicator,
    LossWeighting,
    check_entries,
    check_positive,
    entries,
)


class FAMO(LossWeighting):
    """Weights under which all losses fall at the same relative rate (Liu et al., 2023).

    ``sum_t z_t log(f_t - b_t) / c`` with ``z = softmax(logits)`` and ``c = sum_t z_t / (f_t - b_t)``, so that the
    weights sum to one. After each step the logits descend along the change of the logarithms on the same batch: a loss
    that has fallen more than others loses weight.

    Args:
        lr: The learning rate of the logits, whose optimiser is an Adam of their own. The default is the one of the
            official code.
        weight_decay: Their weight decay, which draws the weights towards equal ones. The example in the official code
            has 0.01.
        minimum: A lower bound ``b_t`` of each loss, finite and not negative: by task name, with zero for those that are
            not named, or one per task in their order.

    Raises:
        ValueError: If a number is out of range.

    Note:
        The official code measures the losses after the step with fresh random numbers (dropout); modules here repeat
        those of the step. Gradient clipping, which it includes, is the module's. In a batch without the loss of a task
        the softmax is over the others, and the logit of the task stays. If a loss is not finite after the step, all
        logits stay.

    Example:
        >>> weighting = FAMO()
        >>> weighting.resolve(["depth", "edges"])
        >>> weighting.slopes(torch.tensor([1.0, 3.0]))
        tensor([0.7500, 0.2500])
        >>> weighting.observe_step(before=torch.tensor([1.0, 3.0]), after=torch.tensor([0.5, 2.9]))
        >>> weighting.logits
        tensor([-0.0250,  0.0250], dtype=torch.float64)
    """

    needs_positive_losses = True
    needs_losses_after_step = True
    logits: Tensor
    minimum: Tensor

    def __init__(
        self,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
        minimum: Mapping[str, float] | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.adam = _Adam(lr, weight_decay)
        self._minimum = check_entries("minimum", {} if minimum is None else minimum)
        self.register_buffer("logits", torch.empty(0, dtype=torch.float64))
        self.register_buffer("minimum", torch.empty(0, dtype=torch.float64))

    def reset(self) -> None:
        """Make logits of zero, shape ``(T,)``."""
        self.logits = self.logits.new_zeros(len(self.task_names))
        self.minimum = entries("minimum", self._minimum, self.task_names, 0.0, self.minimum.device)
        self.adam.reset(len(self.task_names))

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the weighted mean of the logarithms, scaled so that the weights of the losses sum to one."""
        shares = self.logits[columns].softmax(dim=0).to(losses)
        distances = self._distances(losses, columns)
        return (shares * distances.log()).sum() / (shares / distances.detach()).sum()

    @torch.no_grad()
    def observe_step(self, before: Tensor, after: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Update the logits by what the step did to the losses of a batch."""
        columns = self.columns(before, tasks)
        if after.shape != before.shape:
            raise ValueError(
                f"`after` should have the shape of `before`, {tuple(before.shape)}. Found {tuple(after.shape)}."
            )
        fallen = (self._distances(before, columns).log() - self._distances(after, columns).log()).to(self.logits)
        shares = self.logits[columns].softmax(dim=0)
        gradient = shares * (fallen - (shares * fallen).sum())
        self.adam.step(self.logits, gradient, columns)

    def _distances(self, losses: Tensor, columns: Columns) -> Tensor:
        return (losses - self.minimum[columns].to(losses)).clamp_min(0.0) + EPSILON


class DynamicTaskPrioritization(LossWeighting):
    """The more weight, the worse a task is done (DTP; Guo et al., 2018).

    ``w_t = -(1 - k_t)^gamma log k_t``, the focal loss of a key performance indicator ``k_t``, a number in (0, 1] such
    as the accuracy. It is a moving average over the batches. A task is of weight one until it is first seen.

    Args:
        indicators: By task name, a function from the prediction and the target of a batch to the indicator, such as
            ``torchmetrics.functional.accuracy`` with its options bound. It should mean the same in all batches, as
            averages over labels do; where it is NaN the average stays. For tasks that are not named it is
            ``exp(-f_t)``: of a cross entropy, the geometric mean of the probabilities of the true classes. That choice
            is ours, and needs losses that are not negative: below zero the weight is zero.
        gamma: The exponent, not negative; the larger, the less easy tasks count. The default is ours.
        decay: The weight of the new value in the moving average, in (0, 1]. The default is ours.
        floor: Smaller indicators count as this much, in (0, 1): the weight grows beyond all bounds at zero. The default
            is ours.

    Raises:
        TypeError: If an indicator is not callable.
        ValueError: If a number is out of range; in :meth:`resolve`, if an indicator is of no task.

    Example:
        >>> weighting = DynamicTaskPrioritization(decay=1.0)
        >>> weighting.resolve(["depth", "edges"])
        >>> weighting.observe_batch(losses=torch.tensor([1.0, 3.0]), indicators=torch.tensor([0.9, 0.5]))
        >>> weighting.slopes(torch.tensor([1.0, 3.0]))
        tensor([0.0105, 0.3466])
    """

    average: Tensor

    def __init__(
        self,
        indicators: Mapping[str, Indicator] | None = None,
        gamma: float = 1.0,
        decay: float = 0.1,
        floor: float = 0.01,
    ) -> None:
        super().__init__()
        self.indicators = {} if indicators is None else dict(indicators)
        for name, indicator in self.indicators.items():
            if not callable(indicator):
                raise TypeError(f"The indicator of task {name!r} should be callable. Found {type(indicator).__name__}.")
        if not 0.0 <= gamma < float("inf"):
            raise ValueError(f"`gamma` should be finite and not negative. Found {gamma}.")
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"`decay`, the weight of the new value, should lie in (0, 1]. Found {decay}.")
        if not 0.0 < floor < 1.0:
            raise ValueError(f"`floor` should lie in (0, 1). Found {floor}.")
        self.gamma = float(gamma)
        self.decay = float(decay)
        self.floor = float(floor)
        self.register_buffer("average", torch.empty(0, dtype=torch.float64))

    def reset(self) -> None:
        """Forget the averages, shape ``(T,)``; NaN for a task that was not seen yet."""
        unknown = [name for name in self.indicators if name not in self.task_names]
        if unknown:
            raise ValueError(
                f"`indicators` should name tasks, {', '.join(map(repr, self.task_names))}. "
                f"Found {', '.join(map(repr, unknown))}."
            )
        self.average = self.average.new_full((len(self.task_names),), torch.nan)

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the weighted sum."""
        average = self.average[columns].clamp(self.floor, 1.0)
        weights = -((1.0 - average) ** self.gamma) * average.log()
        return (torch.where(average.isnan(), 1.0, weights).to(losses) * losses).sum()

    @torch.no_grad()
    def observe_batch(self, losses: Tensor, indicators: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Take the indicators into the averages."""
        columns = self.columns(losses, tasks)
        if indicators.shape != losses.shape:
            raise ValueError(
                f"`indicators` should have the shape of `losses`, {tuple(losses.shape)}. "
                f"Found {tuple(indicators.shape)}."
            )
        without = torch.tensor([name not in self.indicators for name in self.task_names], device=losses.device)
        values = torch.where(without[columns] & indicators.isnan(), (-losses).exp(), indicators)
        values = values.to(self.average).clamp(0.0, 1.0)
        average = self.average[columns]
        average = torch.where(average.isnan(), values, average + self.decay * (values - average))
        self.average[columns] = torch.where(values.isnan(), self.average[columns], average)


class GradNorm(LossWeighting):
    """Weights under which slow tasks have the larger gradients in a shared layer (Chen et al., 2018).

    With ``n_t`` the norm of the gradient of ``f_t`` in the layer, the weights descend along ``sum_t |w_t n_t - g_t|``,
    where the aims ``g_t = mean(w n) r_t^alpha`` count as constants, and ``r_t`` is the part of its first loss that is
    left of ``f_t``, over the mean of these parts. After each update they are scaled to their sum before, ``T`` in all.

    Args:
        alpha: Not negative; with zero all gradients are to be equal, and the larger it is, the more slow tasks get. The
            default is the one of the paper for NYUv2.
        lr: The learning rate of the weights, whose optimiser is an Adam of their own. The default is ours.
        layer: The name of a module of the network, such as ``"encoder.layers.2"``; by default the last tensor of
            weights that all tasks share, which needs a network of an ``encoder`` and ``heads``.
        floor: The least weight, positive, before scaling, so that none can turn negative. It is ours.

    Raises:
        ValueError: If a number is out of range.

    Note:
        The weights have an optimiser of their own, so that their learning rate is not that of the network. In a batch
        without the loss of a task the others are balanced among each other, and its weight stays.

    Example:
        >>> weighting = GradNorm(lr=0.1)
        >>> weighting.resolve(["depth", "edges"])
        >>> weighting.observe_gradients(losses=torch.tensor([1.0, 3.0]), norms=torch.tensor([1.0, 5.0]))
        >>> weighting.weights
        tensor([1.1000, 0.9000], dtype=torch.float64)
    """

    needs_positive_losses = True
    needs_gradient_norms = True
    weights: Tensor
    initial: Tensor

    def __init__(self, alpha: float = 1.5, lr: float = 0.025, layer: str | None = None, floor: float = 1e-3) -> None:
        super().__init__()
        if not 0.0 <= alpha < float("inf"):
            raise ValueError(f"`alpha` should be finite and not negative. Found {alpha}.")
        self.alpha = float(alpha)
        self.floor = check_positive("floor", floor)
        self.layer = layer
        self.adam = _Adam(lr)
        self.register_buffer("weights", torch.empty(0, dtype=torch.float64))
        self.register_buffer("initial", torch.empty(0, dtype=torch.float64))

    def reset(self) -> None:
        """Make weights of one, and forget the first losses, each of shape ``(T,)``."""
        size = len(self.task_names)
        self.weights = self.weights.new_ones(size)
        self.initial = self.initial.new_full((size,), torch.nan)
        self.adam.reset(size)

    def objective(self, losses: Tensor, columns: Columns) -> Tensor:
        """Return the weighted sum."""
        return (self.weights[columns].to(losses) * losses).sum()

    @torch.no_grad()
    def observe_gradients(self, losses: Tensor, norms: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Update the weights by the norms of the gradients of the unweighted losses in the layer."""
        columns = self.columns(losses, tasks)
        if norms.shape != losses.shape:
            raise ValueError(
                f"`norms` should have the shape of `losses`, {tuple(losses.shape)}. Found {tuple(norms.shape)}."
            )
        losses, norms = losses.to(self.weights).clamp_min(EPSILON), norms.to(self.weights)
        self.initial[columns] = torch.where(self.initial[columns].isnan(), losses, self.initial[columns])
        left = losses / self.initial[columns]
        old = self.weights[columns].clone()
        aims = (old * norms).mean() * (left / left.mean()) ** self.alpha
        self.adam.step(self.weights, (old * norms - aims).sign() * norms, columns)
        new = self.weights[columns].clamp_min(self.floor)
        self.weights[columns] = new * (old.sum() / new.sum())


class _Adam(ExactState):
    """Adam with L2 weight decay on the entries of a vector, each with a count of its own, in place.

    Those left out of a step stay as they are, and so do all if a gradient is not finite.
    """

    first: Tensor
    second: Tensor
    steps: Tensor

    def __init__(self, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.lr = check_positive("lr", lr)
        if not 0.0 <= weight_decay < float("inf"):
            raise ValueError(f"`weight_decay` should be finite and not negative. Found {weight_decay}.")
        self.weight_decay = float(weight_decay)
        for name in ("first", "second", "steps"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def reset(self, size: int) -> None:
        """Make moments and counts of zero."""
        self.first, self.second, self.steps = (state.new_zeros(size) for state in (self.first, self.second, self.steps))

    def step(self, values: Tensor, gradient: Tensor, columns: Columns) -> None:
        """Step the entries ``columns`` of ``values``, shape ``(T,)``, along a gradient of shape ``(T',)``."""
        old = values[columns]
        gradient = gradient + self.weight_decay * old
        first = 0.9 * self.first[columns] + 0.1 * gradient
        second = 0.999 * self.second[columns] + 0.001 * gradient.square()
        steps = self.steps[columns] + 1.0
        new = old - self.lr * (first / (1.0 - 0.9**steps)) / ((second / (1.0 - 0.999**steps)).sqrt() + 1e-8)
        # Nothing is read from the device.
        finite = gradient.isfinite().all()
        for state, entry in ((values, new), (self.first, first), (self.second, second), (self.steps, steps)):
            state[columns] = torch.where(finite, entry, state[columns])
