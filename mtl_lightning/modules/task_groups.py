"""Selective task group updates: groups of tasks, updated one after another in each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_lightning.affinity import Attribution, ProximalAffinity
from mtl_lightning.exemplars import MOST_TASKS
from mtl_lightning.fisher import root_fisher_gramian
from mtl_lightning.group_updates import GroupUpdates
from mtl_lightning.grouping import AffinityPropagation, Exemplars, Fisher, GroupingRule
from mtl_lightning.modules.base import (
    LRSchedulerCallable,
    LRSchedulerInterval,
    MultiTaskModule,
    OptimizerCallable,
    check_count,
)
from mtl_lightning.modules.gradients import average_tensors
from mtl_lightning.modules.habits import tell_once
from mtl_lightning.modules.health import TaskHealth
from mtl_lightning.modules.scaling import gradient_scale
from mtl_lightning.modules.single_network import SingleNetworkModule, zero_of
from mtl_lightning.seeds import seed_generators
from mtl_lightning.split_network import GradientGate, SplitNetwork
from mtl_lightning.task import Task


@dataclass
class _Part:
    """One batch of an update, with the tasks that have labels in it."""

    inputs: Any
    targets: dict[str, Tensor]
    counts: list[float]  # of labels, by task
    seed: int
    seen: set[str] = field(default_factory=set)
    shares: list[float] = field(default_factory=list)  # this batch's part in the mean over all labels, by task

    def kept(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold of it."""
        return {"inputs": self.inputs, "targets": self.targets, "counts": self.counts, "seed": self.seed}


class TaskGroupModule(SingleNetworkModule):
    r"""One network whose tasks are updated in groups, one group after another on each batch.

    For each group ``G`` of a partition of the tasks, in random order, on the same batch:

        ``theta <- theta - step(sum of w_k grad L_k(theta) over k in G)``

    The forward pass of a group also tells what the step of the group before it did to the losses of all tasks. That is
    the proximal inter-task affinity, and from it the partition of the next batch is made. A batch of ``G`` groups costs
    ``G`` passes forward and backward. Heads outside the group are evaluated without a graph; neither they nor the state
    of the optimiser for them change in its step.

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor. If it applies the modules of a
            ``ModuleDict`` ``heads`` to what a module ``encoder`` returns, as
            :class:`~mtl_lightning.networks.MultiHeadNetwork` does, heads are evaluated one by one; see
            :class:`~mtl_lightning.split_network.SplitNetwork`.
        tasks: The ``T >= 2`` tasks.
        optimizer: From parameters to an optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-4)``.
        grouping: Makes groups from the affinity. By default :class:`~mtl_lightning.grouping.Exemplars`, the optimum of
            what :class:`~mtl_lightning.grouping.AffinityPropagation`, the rule of the official code, searches for; with
            more than 16 tasks the latter.
        loss_weights: From task name to the weight ``w_k`` of its loss in the objective, one by default. Affinities are
            of unweighted losses.
        affinity_decay: The weight of the new value in the moving average of the affinity.
        attribution: ``"stepping_group"`` credits a change of the losses to the group that caused it, ``"published"`` to
            the next one, as the official code does; see :class:`~mtl_lightning.affinity.ProximalAffinity`.
        bias_correction: Whether the average is corrected for its start at zero.
        warmup_batches: For how many updates every task is alone, where the rule reads the affinity.
        regroup_every: After how many updates the rule is asked again.
        track_every: The affinity is measured in every so-manieth update; in the others heads outside the group are not
            evaluated at all. With 0 it is never measured; a rule that reads it needs at least 1.
        shuffle: Whether the order of the groups is random.
        single_group: Whether a group that is all alone steps twice on a batch (``"repeat"``), or once (``"once"``).
            With the latter nothing is measured of it, unless by ``measure_last``, and a rule that reads the affinity
            does not part it again.
        measure_last: Whether one more pass, without a graph, measures what the last step of a batch did.
        paired: Whether all passes over a batch draw the same random numbers (dropout, stochastic depth), so that they
            do not enter the affinity.
        inactive_heads: ``"skip"`` leaves heads outside the group alone. ``"zero_grad"`` steps them with a gradient of
            zero once they had one, as the official code did under torch 1: momentum and weight decay go on.
        head_lr_scale: A factor on the learning rate of the parameters that belong to one head alone.
        max_nonfinite: A task whose loss is not finite is left out of the step; after so many in a row the run stops.
        lr_scheduler: From the optimiser to a scheduler.
        lr_scheduler_interval: Whether it is stepped after each epoch or after each update of all groups.
        lr_scheduler_monitor: The logged metric that ``ReduceLROnPlateau`` reads.
        gradient_clip_norm: The largest norm of the gradient of a group.
        accumulate_batches: How many batches one update is made of; they are kept until then, and each group steps once
            on all of them, as on one larger batch.

    Attributes:
        updates: Partition, order and affinity, a :class:`~mtl_lightning.group_updates.GroupUpdates`.

    Raises:
        ValueError: If an argument is out of range, the heads or the groups do not fit the tasks, or a head shares all
            its parameters.
        TypeError: If an argument is of the wrong kind.

    Note:
        ``global_step`` counts updates of all groups, so that ``max_steps`` and ``every_n_train_steps`` do not depend on
        the number of groups. Logged are ``train_loss`` and ``train_loss/<task>``, the first losses measured on a batch,
        ``num_groups`` and, where there were any, ``nonfinite/<task>``, the steps that a task was left out of, and
        ``skipped_steps``; all of them every ``log_every_n_steps`` batches of the trainer and, for callbacks but not for
        loggers, with the last batch of an epoch. In validation see
        :class:`~mtl_lightning.modules.single_network.SingleNetworkModule`.

        Where :meth:`task_losses` is overridden all heads are evaluated in every pass, so that a loss may read several
        predictions. Those of tasks outside the group are constants.

        To be compiled, an encoder is compiled in place, ``network.encoder.compile()``; the network then stays split.

        Limits: strategies other than one device, DDP and ``ModelParallelStrategy`` are refused, the last one also for
        :class:`~mtl_lightning.grouping.Fisher`. With DDP, gradients are averaged here, past the hooks that it calls; of
        a network that is not split the heads outside the group are in the exchange, as zeros. A loss that is finite
        with a gradient that is not goes unnoticed. Batch normalisation takes up the statistics of a batch once, on each
        rank its own. Random numbers that are not torch's are not paired. A task whose loss is not finite gets a
        gradient of zero, so that momentum and weight decay still move its head. Batches that are kept for
        ``accumulate_batches`` are in checkpoints, those of all ranks. Learnable weights of a loss that is a module are
        trained with the groups of its task. Optimisers that evaluate the loss themselves (LBFGS) are refused.

    References:
        W. Jeong, K.-J. Yoon, "Selective Task Group Updates for Multi-Task Optimization", ICLR 2025, arXiv 2502.11986.
        :meth:`official` trains as its official code does.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from mtl_lightning.networks import MLP, MultiHeadNetwork
        >>> network = MultiHeadNetwork(MLP(8, [16]), {"price": torch.nn.Linear(16, 1), "risk": torch.nn.Linear(16, 1)})
        >>> module = TaskGroupModule(
        ...     network=network,
        ...     tasks=[Task("price", torch.nn.MSELoss()), Task("risk", torch.nn.L1Loss())],
        ...     optimizer=partial(torch.optim.Adam, lr=1e-3),
        ... )
        >>> module.task_groups
        [['price'], ['risk']]
        >>> module.affinity_matrix
        tensor([[0., 0.],
                [0., 0.]], dtype=torch.float64)
    """

    can_be_sharded: ClassVar[bool] = True

    def __init__(
        self,
        network: nn.Module,
        tasks: Sequence[Task],
        optimizer: OptimizerCallable,
        grouping: GroupingRule | None = None,
        loss_weights: Mapping[str, float] | None = None,
        affinity_decay: float = 1e-3,
        attribution: Attribution = "stepping_group",
        bias_correction: bool = True,
        warmup_batches: int = 100,
        regroup_every: int = 1,
        track_every: int = 1,
        shuffle: bool = True,
        single_group: Literal["repeat", "once"] = "repeat",
        measure_last: bool = False,
        paired: bool = True,
        inactive_heads: Literal["skip", "zero_grad"] = "skip",
        head_lr_scale: float = 1.0,
        max_nonfinite: int = 20,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: LRSchedulerInterval = "epoch",
        lr_scheduler_monitor: str | None = None,
        gradient_clip_norm: float | None = None,
        accumulate_batches: int = 1,
    ) -> None:
        super().__init__(
            network=network,
            tasks=tasks,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            lr_scheduler_monitor=lr_scheduler_monitor,
            gradient_clip_norm=gradient_clip_norm,
            accumulate_batches=accumulate_batches,
        )
        if grouping is not None and not isinstance(grouping, GroupingRule):
            raise TypeError(f"`grouping` should be an object of {GroupingRule.__name__}. Found {grouping!r}.")
        if inactive_heads not in ("skip", "zero_grad"):
            raise ValueError(f"`inactive_heads` should be 'skip' or 'zero_grad'. Found {inactive_heads!r}.")
        if not head_lr_scale > 0:
            raise ValueError(f"`head_lr_scale` should be positive. Found {head_lr_scale}.")
        if not isinstance(track_every, int) or track_every < 0:
            raise ValueError(f"`track_every` should be an integer of at least 0. Found {track_every!r}.")
        check_count("max_nonfinite", max_nonfinite)
        self.loss_weights = _checked_weights(loss_weights, self.task_names)
        self.track_every = track_every
        self.measure_last = measure_last
        self.paired = paired
        self.inactive_heads = inactive_heads
        self.head_lr_scale = head_lr_scale

        if grouping is None:
            grouping = Exemplars() if len(self.tasks) <= MOST_TASKS else AffinityPropagation()
        if grouping.reads_affinity and track_every == 0:
            raise ValueError(
                f"`track_every` should be at least 1 for {type(grouping).__name__}, which reads the affinity. Found 0, "
                "with which it is never measured."
            )
        grouping.resolve(self.task_names)
        self.updates = GroupUpdates(
            grouping,
            ProximalAffinity(len(self.tasks), affinity_decay, attribution, bias_correction),
            warmup_batches=warmup_batches,
            regroup_every=regroup_every,
            shuffle=shuffle,
            single_group=single_group,
        )
        self.health = TaskHealth(self.task_names, max_nonfinite)
        self._split = SplitNetwork(network, self.task_names)
        if head_lr_scale != 1.0 and not self._split.is_split:
            raise ValueError(
                "`head_lr_scale` needs a network that applies a ModuleDict `heads` to what a module `encoder` returns. "
                f"Found {type(network).__name__}."
            )
        self._parts: list[_Part] = []
        self._kept_parts: list[dict[str, Any]] = []  # those of a checkpoint, of all ranks, until training starts
        self._had_gradient: set[int] = set()
        self._order: list[list[int]] = list(self.updates.partition)

    @classmethod
    def official(
        cls,
        network: nn.Module,
        tasks: Sequence[Task],
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        affinity_decay: float = 1e-3,
        head_lr_scale: float = 1.0,
        max_batches: int = 40_000,
    ) -> TaskGroupModule:
        """Return a module that makes every choice of the official code, revision 53a8ba2.

        That is: the change of the losses is credited to the group *after* the one that stepped; no correction of the
        average; 101 batches of single tasks; random numbers differ between the passes over a batch; heads outside the
        group step with zero gradients; a single group steps twice. Regrouping every batch, shuffled order and no
        measurement of the last step are the defaults here, too.

        Where the official code's behaviour is an error rather than a choice it is not repeated: losses are reduced over
        ranks, ranks agree on order and groups, and affinity, groups and random state are in checkpoints.

        Args:
            network: See the class; the published runs use a ViT with one 1x1 convolution per task.
            tasks: The tasks.
            optimizer: Adam with learning rate 2e-5 and (L2) weight decay 1e-6 by default.
            lr_scheduler: Polynomial with power 0.9 over ``max_batches`` by default, stepped per batch.
            affinity_decay: 1e-3 for NYUD-v2 and PASCAL-Context, 1e-4 for Taskonomy.
            head_lr_scale: The number of tasks for NYUD-v2 and PASCAL-Context, 1 for Taskonomy. No baseline of the
                official code has it.
            max_batches: The length of the default schedule.
        """
        return cls(
            network=network,
            tasks=tasks,
            optimizer=partial(torch.optim.Adam, lr=2e-5, weight_decay=1e-6) if optimizer is None else optimizer,
            grouping=AffinityPropagation(),
            affinity_decay=affinity_decay,
            attribution="published",
            bias_correction=False,
            warmup_batches=101,
            regroup_every=1,
            track_every=1,
            shuffle=True,
            single_group="repeat",
            measure_last=False,
            paired=False,
            inactive_heads="zero_grad",
            head_lr_scale=head_lr_scale,
            lr_scheduler=partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=max_batches, power=0.9)
            if lr_scheduler is None
            else lr_scheduler,
            lr_scheduler_interval="step",
        )

    # ------------------------------------------------------------------------------------------------ what users read

    @property
    def affinity_matrix(self) -> Tensor:
        """The affinity from row to column, shape ``(T, T)``, float64; equal on all ranks."""
        return self.updates.affinity.matrix

    @property
    def task_groups(self) -> list[list[str]]:
        """The groups of the last update, in the order of their steps."""
        unique = [group for place, group in enumerate(self._order) if group not in self._order[:place]]
        return [[self.task_names[task] for task in group] for group in unique]

    # ------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Update all groups, one after another."""
        inputs, targets = self.unpack_batch(batch)
        self._parts.append(_Part(inputs, dict(targets), self.take_label_counts(targets), self.batch_seed()))
        if self.is_step_due():
            self._update(batch_idx)
            self._parts = []
        self.finish_batch()

    def _update(self, batch_idx: int) -> None:
        """Do what the algorithm box says."""
        present = self._share_labels()
        self._refresh_fisher(present)
        assert self._seed is not None
        self._order = self.updates.begin(self._steps, self._seed)
        order = [group for group in ([task for task in group if task in present] for group in self._order) if group]
        tracked = self.track_every > 0 and self._steps % self.track_every == 0
        first: Tensor | None = None
        passes: list[list[int]] = [*order, []] if order and tracked and self.measure_last else order
        for place, group in enumerate(passes):
            losses = self._backward(group, present if tracked else group, tracked, place == len(passes) - 1)
            if group:
                first = losses if first is None else torch.where(first.isnan(), losses, first)
                self._step(group, is_last=place == len(order) - 1)
        self.updates.forget()
        if first is not None:
            self.health.finish_batch()
            self._steps += 1
            self.step_schedulers("step")
            self._log_training(first, present, batch_idx)

    def _share_labels(self) -> list[int]:
        """Give the batches their shares; return the tasks with labels in any of them, on any rank."""
        totals = self.total_labels([sum(counts) for counts in zip(*(part.counts for part in self._parts), strict=True)])
        for part in self._parts:
            part.shares = self.label_shares(part.counts, totals)
        return [task for task, total in enumerate(totals) if total]

    def _backward(self, group: Sequence[int], measured: Sequence[int], tracked: bool, is_last: bool) -> Tensor:
        """Add the gradients of the losses of a group; return the measured losses of all labels, shape ``(T,)``.

        Args:
            group: The tasks that step; with none nothing has a graph.
            measured: The tasks whose losses are measured; those of others are NaN.
            tracked: Whether the losses enter the affinity.
            is_last: Whether it is the last pass over the batches.
        """
        values: list[Tensor] = []

        def take(own: Tensor) -> None:
            values.append(own)
            if tracked and len(values) == len(self._parts):
                self.updates.observe(group or None, _sum(values), is_last=is_last)

        for part in self._parts:
            self._pass(part, group, measured, take)
        return _sum(values)

    def _pass(self, part: _Part, group: Sequence[int], measured: Sequence[int], take: Callable[[Tensor], None]) -> None:
        """Do the same for one batch; ``take`` gets the losses of this batch. Nothing else of the pass is kept."""
        gate = GradientGate()
        with self._split.frozen(part.seen):
            outputs, own = self._evaluate_part(part, group, measured, gate)
            part.seen.update(outputs)
            values = self.mean_over_labels(own, part.shares, measured)
            # Before the backward pass, in which the device is busy while the host reads the affinity.
            take(values)
            if group:
                gate.decide(self.task_names, values)
                self.health.observe(group, values)
                # What is only measured is not kept through the backward pass.
                outputs = {self.task_names[task]: outputs[self.task_names[task]] for task in group}
                own = {task: own[task] for task in group if task in own}
                self._accumulate_gradients(part, group, outputs, own, gate)

    def _evaluate_part(
        self, part: _Part, group: Sequence[int], measured: Sequence[int], gate: GradientGate
    ) -> tuple[Mapping[str, Any], dict[int, Tensor]]:
        """Return the predictions and the losses of the tasks that have labels in this batch on this rank."""
        if self.paired:
            seed_generators(part.seed, self.device)
        # A loss of the user's own may read the predictions of other tasks.
        is_plain = type(self).task_losses is MultiTaskModule.task_losses
        evaluated = {self.task_names[task] for task in measured} if is_plain else set(self.task_names)
        trained = {self.task_names[task] for task in group}
        outputs = self._split.predict(part.inputs, trained, evaluated, gate)
        own = [task for task in measured if part.counts[task]]
        targets = {self.task_names[task]: part.targets[self.task_names[task]] for task in own}
        if not targets:
            return outputs, {}
        with torch.set_grad_enabled(bool(group)):
            return outputs, dict(zip(own, self.checked_losses(outputs, targets).values(), strict=True))

    def _accumulate_gradients(
        self,
        part: _Part,
        group: Sequence[int],
        outputs: Mapping[str, Any],
        own: Mapping[int, Tensor],
        gate: GradientGate,
    ) -> None:
        objective = torch.zeros((), device=self.device)
        with ExitStack() as stack:
            for task in group:
                name = self.task_names[task]
                stack.enter_context(gate.guarded_parameters(name, self.tasks[task].loss))
                if task in own and own[task].requires_grad:
                    weighted = own[task] * (self.loss_weights[name] * part.shares[task])
                    is_open = gate.is_open.get(name)
                    objective = objective + (weighted if is_open is None else torch.where(is_open, weighted, 0.0))
                else:
                    # No labels here: the same graph as on the ranks that have some, with gradients of zero.
                    objective = objective + zero_of(outputs[name])
            if objective.requires_grad:  # else there is nothing to train in this group
                stack.enter_context(self.unsynchronised())
                self.manual_backward(objective)

    def _step(self, group: Sequence[int], is_last: bool) -> None:
        """Step the optimiser for the gradients of a group, and clear them."""
        self.finish_passes()
        if self.trainer.world_size > 1:
            own = self._split.head_parameters()
            inactive = {id(p) for task, name in enumerate(self.task_names) if task not in group for p in own[name]}
            self.average_over_ranks(p for p in self.trained_parameters() if id(p) not in inactive)
        if self.inactive_heads == "zero_grad":
            self._zero_gradients()
        if not self.take_step(is_last):
            self.updates.forget()  # the scaler has skipped the step: there is nothing to measure

    def _zero_gradients(self) -> None:
        """Give a gradient of zero to the parameters that have none now and had one before."""
        for index, parameter in enumerate(self.parameters()):
            if parameter.grad is not None:
                self._had_gradient.add(index)
            elif index in self._had_gradient and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _refresh_fisher(self, present: Sequence[int]) -> None:
        """Measure the Fisher information for the rules that group by it."""
        rules = [rule for rule in self.updates.grouping.modules() if isinstance(rule, Fisher)]
        rules = [rule for rule in rules if rule.similarity is None or self._steps % rule.refresh_every == 0]
        if not rules or len(present) < len(self.tasks):  # a task without labels would get no gradient
            return
        shared = [parameter for parameter in self._split.shared_parameters() if parameter.requires_grad]
        if not shared:
            return
        parts = [self._shared_gradients(part, shared) for part in self._parts]
        gradients = [
            [sum(column[1:], column[0]) for column in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)
        ]
        if self.trainer.world_size > 1:
            for row in gradients:
                average_tensors(row, partial(self.reduced, operation="mean"))
        with torch.autocast(self.device.type, enabled=False):  # it would multiply in half precision
            gramian = root_fisher_gramian(gradients)
        if gramian.isfinite().all():  # else a loss was not, and the groups stay as they are
            for rule in rules:
                rule.update(gramian)

    def _shared_gradients(self, part: _Part, shared: Sequence[nn.Parameter]) -> list[list[Tensor]]:
        """Return the gradients of each task in the shared parameters; nothing is left of the pass."""
        every = range(len(self.tasks))
        scale = gradient_scale(self.trainer.precision_plugin)  # small gradients would vanish in half precision
        with self._split.frozen(self.task_names):
            outputs, own = self._evaluate_part(part, every, every, GradientGate())
            rows = []
            for task in every:
                loss = own[task] * part.shares[task] if task in own else zero_of(outputs[self.task_names[task]])
                found: Sequence[Tensor | None] = [None] * len(shared)
                if loss.requires_grad:
                    found = torch.autograd.grad(loss * scale, shared, retain_graph=True, allow_unused=True)
                pairs = zip(shared, found, strict=True)
                rows.append([torch.zeros_like(p) if g is None else g / scale for p, g in pairs])
        return rows

    def _log_training(self, losses: Tensor, present: Sequence[int], batch_idx: int) -> None:
        if not self.is_logging_due(batch_idx):
            return
        losses = losses.float()  # what populations log, and validations
        values: dict[str, Any] = {f"train_loss/{self.task_names[task]}": losses[task] for task in present}
        failures = zip(self.task_names, self.health.known_total, strict=True)
        values |= {f"nonfinite/{name}": float(count) for name, count in failures if count}
        self.log_dict(values | self.logged_skips() | {"num_groups": float(len(self.task_groups))})
        self.log("train_loss", losses.nanmean(), prog_bar=True)

    def on_fit_start(self) -> None:
        """Look at the network once more: it may have been replaced.

        Raises:
            MisconfigurationException: If the rule needs gradients of single tasks, and parameters are sharded; see
                :class:`~mtl_lightning.modules.single_network.SingleNetworkModule` for other strategies.
        """
        super().on_fit_start()
        if self.shards_network and any(isinstance(rule, Fisher) for rule in self.updates.grouping.modules()):
            raise MisconfigurationException(
                "`Fisher` groups by gradients of single tasks, which FSDP does not return. Choose another rule, or "
                "`Trainer(strategy='ddp')`. Found `ModelParallelStrategy`."
            )
        if self._split.network is not self.network:
            self._split = SplitNetwork(self.network, self.task_names)
        self._split.warn_of_compilation()
        tell_once(
            "`global_step`, and with it `max_steps` and `every_n_train_steps`, counts updates of all groups, not the "
            "step of each."
        )

    def on_train_epoch_end(self) -> None:
        """Report sick tasks; step the schedulers that monitor a metric."""
        self.health.report()
        super().on_train_epoch_end()

    # ------------------------------------------------------------------------------------------------ optimiser, state

    def make_optimizer(self) -> Optimizer:
        """Return the optimiser, with the parameters of heads in a group of their own if their rate differs."""
        if self.head_lr_scale == 1.0:
            return super().make_optimizer()
        heads = {id(p) for parameters in self._split.head_parameters().values() for p in parameters}
        trained = list(self.trained_parameters())
        parts = [[p for p in trained if id(p) not in heads], [p for p in trained if id(p) in heads]]
        groups: Any = [{"params": part} for part in parts]
        optimizer = self._optimizer(groups)
        optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"] * self.head_lr_scale
        return optimizer

    def configure_optimizers(self) -> Any:
        """Return the optimiser and, if there is one, the scheduler; tell if the scheduler undoes ``head_lr_scale``."""
        configured = super().configure_optimizers()
        if self.head_lr_scale != 1.0 and isinstance(configured, dict):
            shared, heads = (float(group["lr"]) for group in configured["optimizer"].param_groups)
            if shared == heads != 0.0:
                scheduler = type(configured["lr_scheduler"]["scheduler"]).__name__
                rank_zero_warn(
                    f"`{scheduler}` gives heads the learning rate of the trunk, so that `head_lr_scale` has no effect. "
                    "Give it two rates, for the trunk and for the heads, such as `max_lr=[1e-3, 4e-3]`."
                )
        return configured

    def forget_step(self) -> None:
        """Forget the batches of a step that was not made."""
        super().forget_step()
        self._parts = []

    def on_train_start(self) -> None:
        """Take this rank's share of the batches that a checkpoint holds."""
        if self._kept_parts:
            rank, size = self.global_rank, self.trainer.world_size
            # All ranks go through as many passes. What is there twice then has no labels.
            surplus = [part | {"counts": [0.0] * len(self.tasks)} for part in self._kept_parts[:1]]
            own = (self._kept_parts + surplus * (-len(self._kept_parts) % size))[rank::size]
            self._parts = [_Part(**move_data_to_device(part, self.device)) for part in own]
            self._kept_parts = []
        super().on_train_start()

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on and is not a parameter or a buffer."""
        return super().get_extra_state() | {
            "parts": self._kept_parts or [part.kept() for part in self._parts],
            "order": self._order,
            "had_gradient": sorted(self._had_gradient),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint hold the batches that all ranks have kept for the next step, those of a time together."""
        super().on_save_checkpoint(checkpoint)
        if not self._parts or not self.ranks_meet_in_checkpoint:
            return
        own = move_data_to_device([part.kept() for part in self._parts], torch.device("cpu"))
        found: list[Any] = [None] * self.trainer.world_size
        torch.distributed.gather_object(own, found if self.trainer.is_global_zero else None)
        if self.trainer.is_global_zero:  # which writes it
            self.saved_extra_state(checkpoint)["parts"] = [part for parts in zip(*found, strict=True) for part in parts]

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        super().set_extra_state(state)
        self._kept_parts, self._parts = state["parts"], []
        self._order = state["order"]
        self._had_gradient = set(state["had_gradient"])


def _sum(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum(dim=0)


def _checked_weights(weights: Mapping[str, float] | None, task_names: Sequence[str]) -> dict[str, float]:
    weights = {} if weights is None else weights
    unknown = [name for name in weights if name not in task_names]
    if unknown:
        raise ValueError(
            f"`loss_weights` should name tasks, {', '.join(map(repr, task_names))}. "
            f"Found {', '.join(map(repr, unknown))}."
        )
    for name, weight in weights.items():
        if not 0.0 < weight < float("inf"):
            raise ValueError(f"The weight of task {name!r} should be positive and finite. Found {weight}.")
    return {name: float(weights.get(name, 1.0)) for name in task_names}
