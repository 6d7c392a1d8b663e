"""One network trained for a weighting of the task losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_lightning.modules.averaging import LossAverage
from mtl_lightning.modules.base import (
    LRSchedulerCallable,
    LRSchedulerInterval,
    MultiTaskModule,
    OptimizerCallable,
    check_count,
)
from mtl_lightning.modules.gradients import average_gradients
from mtl_lightning.modules.health import TaskHealth
from mtl_lightning.modules.single_network import SingleNetworkModule
from mtl_lightning.population import UserInputError
from mtl_lightning.split_network import SplitNetwork, frozen_statistics
from mtl_lightning.task import Task
from mtl_lightning.weighting import Equal, LossWeighting


class WeightedModule(SingleNetworkModule):
    """One network that minimises a weighting of the losses of its tasks.

    A batch costs one pass forward and one backward, a step of the optimiser is one of ``weighting``'s objective; what
    else a weighting needs is said there.

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor.
        tasks: The ``T >= 2`` tasks.
        optimizer: From parameters to an optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-4)``. Parameters
            of the weighting are a group of their own there, without weight decay.
        weighting: From the losses to the objective, :class:`~mtl_lightning.weighting.Equal` by default. It belongs to
            this module from now on, and starts anew.
        max_nonfinite: A task whose loss is not finite is left out of the batch; after so many in a row the run stops.
        lr_scheduler: From the optimiser to a scheduler.
        lr_scheduler_interval: Whether it is stepped after each epoch or after each step of the optimiser.
        lr_scheduler_monitor: The logged metric that ``ReduceLROnPlateau`` reads.
        gradient_clip_norm: The largest norm of the gradient, parameters of the weighting included.
        accumulate_batches: Over how many batches gradients are averaged before a step. Where the objective is not
            linear in the losses that is the mean of the batches' objectives, not the objective of one larger batch.

    Attributes:
        weighting: The weighting.

    Raises:
        ValueError: If an argument is out of range, or the weighting does not fit the tasks or the network.
        TypeError: If an argument is of the wrong kind.

    Note:
        Logged are ``train_loss`` (the mean over the tasks), ``train_loss/<task>``, ``weight/<task>``, the slope of the
        objective in the loss of the task, and, where there were any, ``nonfinite/<task>``, the batches that a task was
        left out of; all of them every ``log_every_n_steps`` batches of the trainer and with the last batch of an epoch.
        In validation see :class:`~mtl_lightning.modules.single_network.SingleNetworkModule`.

        With several ranks the objective is that of the losses over all labels of all ranks, and its slopes weigh the
        losses of each rank, so that two ranks with half batches equal one process.

        Limits: strategies other than one device and DDP are refused. Each batch waits once for the device, to see which
        losses are finite. With accumulated batches, the gradients in a checkpoint are those of rank zero only, and a
        weighting that looks at a batch before and after the step, or at gradients, sees the last one.

    Example:
        >>> from functools import partial
        >>> from mtl_lightning.networks import MLP, MultiHeadNetwork
        >>> from mtl_lightning.weighting import Uncertainty
        >>> network = MultiHeadNetwork(MLP(8, [16]), {"price": torch.nn.Linear(16, 1), "risk": torch.nn.Linear(16, 1)})
        >>> module = WeightedModule(
        ...     network=network,
        ...     tasks=[Task("price", torch.nn.MSELoss()), Task("risk", torch.nn.L1Loss())],
        ...     optimizer=partial(torch.optim.Adam, lr=1e-3),
        ...     weighting=Uncertainty(),
        ... )
        >>> module.weighting.slopes(torch.tensor([2.0, 0.1]))
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        network: nn.Module,
        tasks: Sequence[Task],
        optimizer: OptimizerCallable,
        weighting: LossWeighting | None = None,
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
        if weighting is not None and not isinstance(weighting, LossWeighting):
            raise TypeError(f"`weighting` should be an object of LossWeighting. Found {weighting!r}.")
        check_count("max_nonfinite", max_nonfinite)
        self.weighting = Equal() if weighting is None else weighting
        self.weighting.resolve(self.task_names)
        self.health = TaskHealth(self.task_names, max_nonfinite)
        self._layer = self._shared_layer() if self.weighting.needs_gradient_norms else []
        self._losses_of_step = LossAverage(len(self.tasks))
        self._counts_on_host: list[float] | None = None
        self._pending_gradients: dict[int, Tensor] | None = None

    # ------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Add the gradient of the objective of a batch, and step the optimiser if it is time."""
        inputs, targets = self.unpack_batch(batch)
        counts = self.count_labels(targets).tolist() if self._counts_on_host is None else self._counts_on_host
        self._counts_on_host = None
        present, shares = self._share_labels(counts)
        part = _Part(inputs, {self.task_names[task]: targets[self.task_names[task]] for task in shares}, shares)
        is_due = self.is_step_due()
        losses = self._backward(part, present, is_due, batch_idx) if present else None
        if is_due and self._losses_of_step.tasks:
            self._step(part, losses)
        if self.trainer.is_last_batch:
            self.weighting.end_epoch()
        self.finish_batch()

    def _share_labels(self, counts: Sequence[float]) -> tuple[list[int], dict[int, float]]:
        """Return the tasks with labels on any rank, and for those with labels here the factors of this rank's losses.

        The mean over ranks of the losses with these factors is the mean over all labels.
        """
        totals = list(counts)
        if self.trainer.world_size > 1:
            totals = self.reduced(torch.tensor(totals, device=self.device), "sum").tolist()
        shares = {
            task: counts[task] * self.trainer.world_size / totals[task] for task in range(len(counts)) if counts[task]
        }
        return [task for task, total in enumerate(totals) if total], shares

    def _backward(self, part: _Part, present: Sequence[int], is_due: bool, batch_idx: int) -> dict[int, Tensor]:
        """Add the gradient of the objective; return the losses of all labels that are finite, by task."""
        if self.weighting.needs_losses_after_step:
            torch.manual_seed(self.batch_seed())
        outputs = self(part.inputs)
        own = self._own_losses(outputs, part)
        values, indicators = self._reduced_values(outputs, own, part, present)
        self.health.observe(present, values)
        self.health.finish_batch()
        found = values.tolist()  # waits for the device
        tasks = [task for task in present if isfinite(found[task])]
        if not tasks:
            return {}
        self._check_positive({task: found[task] for task in tasks})
        losses = values[tasks]
        if self.weighting.needs_gradient_norms and is_due:
            norms = self._gradient_norms(own, part, tasks)
        with torch.autocast(self.device.type, enabled=False):
            self.weighting.observe_batch(losses, indicators[tasks], tasks)
            slopes = self.weighting.slopes(losses, tasks)
            objective = self.weighting(losses, tasks)  # has the graph of the weighting's own parameters only
        self._log_training(dict(zip(tasks, losses, strict=True)), dict(zip(tasks, slopes, strict=True)), batch_idx)
        if not objective.requires_grad:
            objective = torch.zeros((), device=self.device)
        for task, slope in zip(tasks, slopes, strict=True):
            if task in own and own[task].requires_grad:
                objective = objective + slope.to(own[task]) * part.shares[task] * own[task]
        if objective.requires_grad:  # else this rank has no labels, or there is nothing to train
            with self._unsynchronised():
                self.manual_backward(objective / self.accumulate_batches)
        if self.weighting.needs_gradient_norms and is_due:
            self.weighting.observe_gradients(losses, norms, tasks)
        self._losses_of_step.update(values.unsqueeze(0), tasks)
        return dict(zip(tasks, losses, strict=True))

    def _own_losses(self, outputs: Mapping[str, Tensor], part: _Part) -> dict[int, Tensor]:
        """Return the losses of the tasks with labels on this rank, by task."""
        if not part.targets:
            return {}
        return dict(zip(part.shares, self.checked_losses(outputs, part.targets).values(), strict=True))

    def _reduced_values(
        self, outputs: Mapping[str, Tensor], own: Mapping[int, Tensor], part: _Part, present: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return mean losses and indicators over all labels and ranks, float64, shape ``(T,)``; NaN without any."""
        # One dtype, since ranks may hold losses of different ones; made on the device, not copied to it.
        values = torch.full((2, len(self.tasks)), torch.nan, dtype=torch.float64, device=self.device)
        for task in present:
            name = self.task_names[task]
            indicator = self.weighting.indicators.get(name)
            values[0, task] = own[task].detach() * part.shares[task] if task in own else 0.0
            if indicator is not None:
                values[1, task] = 0.0
                if task in own:
                    with torch.no_grad():
                        values[1, task] = indicator(outputs[name], part.targets[name]) * part.shares[task]
        losses, indicators = self.reduced(values, "mean") if self.trainer.world_size > 1 else values
        return losses, indicators

    def _check_positive(self, losses: Mapping[int, float]) -> None:
        negative = [task for task, loss in losses.items() if loss < 0]
        if negative and self.weighting.needs_positive_losses:
            raise UserInputError(
                f"The loss of task {self.task_names[negative[0]]!r} should not be negative under "
                f"`{type(self.weighting).__name__}`. Found {losses[negative[0]]:g}. Add a constant to the loss, or "
                "choose another weighting."
            )

    def _gradient_norms(self, own: Mapping[int, Tensor], part: _Part, tasks: Sequence[int]) -> Tensor:
        """Return the norms of the gradients of the mean losses over all labels in the shared layer, shape ``(T',)``."""
        layer = self._layer
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # As in the backward pass, small gradients would vanish in half precision.
        scale = 1.0 if scaler is None else scaler.get_scale()
        rows = []
        for task in tasks:
            gradients: Sequence[Tensor | None] = [None] * len(layer)
            if task in own and own[task].requires_grad:
                loss = own[task] * (part.shares[task] * scale)
                gradients = torch.autograd.grad(loss, layer, retain_graph=True, allow_unused=True)
            zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(layer, gradients, strict=True))
            rows.append(torch.cat([gradient.flatten().float() for gradient in zeros]))
        matrix = torch.stack(rows) / scale
        matrix = self.reduced(matrix, "mean") if self.trainer.world_size > 1 else matrix
        return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)

    def _shared_layer(self) -> list[nn.Parameter]:
        """Return the parameters in which the weighting compares gradients.

        Raises:
            ValueError: If there are none.
        """
        name, kind = self.weighting.layer, type(self.weighting).__name__
        if name is not None:
            try:
                layer = [p for p in self.network.get_submodule(name).parameters() if p.requires_grad]
            except AttributeError as error:
                raise ValueError(f"`layer` of {kind} should name a module of the network. Found {name!r}.") from error
            if not layer:
                raise ValueError(f"`layer` of {kind} should name a module with trained parameters. Found {name!r}.")
            return layer
        split = SplitNetwork(self.network, self.task_names)
        shared = [p for p in split.shared_parameters() if p.requires_grad and p.ndim > 1]
        if not split.is_split or not shared:
            raise ValueError(
                f"`layer` of {kind} should name a module whose parameters all tasks share. Found None, and no network "
                f"of an `encoder`, with matrices to train, and `heads`: {type(self.network).__name__}."
            )
        return shared[-1:]

    def _step(self, part: _Part, before: dict[int, Tensor] | None) -> None:
        """Step the optimiser, and let the weighting learn from the step."""
        optimizer: Any = self.optimizers()
        if self.trainer.world_size > 1:
            average_gradients(self.trained_parameters(), partial(self.reduced, operation="mean"))
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0
        if scaler is not None:
            scaler.scale(
                torch.zeros((), device=self.device)
            )  # made at its first use, which a rank without labels lacks
            scale = scaler.get_scale()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        skipped = scaler is not None and scaler.get_scale() < scale

        tasks = self._losses_of_step.tasks
        self.weighting.observe(self._losses_of_step.compute()[0, list(tasks)], tasks)
        self._losses_of_step.reset()
        if before and self.weighting.needs_losses_after_step and not skipped:
            after = self._losses_after_step(part, list(before))
            self.weighting.observe_step(torch.stack(list(before.values())), after, list(before))
        self._steps += 1
        self.step_schedulers("step")

    def _losses_after_step(self, part: _Part, tasks: Sequence[int]) -> Tensor:
        """Return the losses of the batch once more, with the same random numbers, shape ``(T',)``."""
        torch.manual_seed(self.batch_seed())
        torch.clear_autocast_cache()  # within one autocast region it keeps the weights of before the step
        with torch.no_grad(), frozen_statistics(self.network.modules()):
            outputs = self(part.inputs)
            values, _ = self._reduced_values(outputs, self._own_losses(outputs, part), part, tasks)
        return values[list(tasks)]

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """Return a context in which DDP leaves gradients alone: they are averaged before the step."""
        no_sync = getattr(self.trainer.model, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient, after any gradient scaling is undone."""
        if self.gradient_clip_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip_norm)

    def _log_training(self, losses: Mapping[int, Tensor], slopes: Mapping[int, Tensor], batch_idx: int) -> None:
        # A call to `log` costs about a millisecond, so it is made only where loggers take the values in before the next
        # step, at the beginning, and for what is read at the end of an epoch.
        every = self.trainer.log_every_n_steps or torch.inf  # type: ignore[attr-defined]  # set by a connector
        due = -(self.trainer.fit_loop.total_batch_idx + 1) % every < self.accumulate_batches
        if not due and batch_idx >= self.accumulate_batches and not self.trainer.is_last_batch:
            return
        values: dict[str, Any] = {f"train_loss/{self.task_names[task]}": loss for task, loss in losses.items()}
        values |= {f"weight/{self.task_names[task]}": slope for task, slope in slopes.items()}
        failures = zip(self.task_names, self.health.known_total, strict=True)
        values |= {f"nonfinite/{name}": float(count) for name, count in failures if count}
        self.log_dict(values)
        self.log("train_loss", torch.stack(list(losses.values())).mean(), prog_bar=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the labels while they are on the host, where reading the counts waits for nothing."""
        if self.trainer.training and self._has_labels_before_transfer():
            self._counts_on_host = self.count_labels(self.unpack_batch(batch)[1]).tolist()
        return batch

    def _has_labels_before_transfer(self) -> bool:
        """Return whether the targets are known, and final, before the batch is on the device."""
        owners: list[Any] = [self, getattr(self.trainer, "datamodule", None)]
        hooks = ("transfer_batch_to_device", "on_after_batch_transfer")
        plain = (
            getattr(type(owner), hook) is getattr(DataHooks, hook)
            for owner in owners
            if owner is not None
            for hook in hooks
        )
        # An override of `unpack_batch` may need the device, or draw random numbers: it is called once.
        return type(self).unpack_batch is MultiTaskModule.unpack_batch and all(plain)

    def on_fit_start(self) -> None:
        """Refuse strategies under which gradients are not whole on every rank.

        Raises:
            MisconfigurationException: If the strategy is neither a single device nor DDP.
        """
        super().on_fit_start()
        if self.weighting.needs_gradient_norms:
            self._layer = self._shared_layer()  # it may have been replaced
        if self.trainer.world_size > 1 and not isinstance(self.trainer.strategy, DDPStrategy):
            raise MisconfigurationException(
                f"`{type(self).__name__}` trains on one device or with DDP (`Trainer(strategy='ddp')`). "
                f"Found {type(self.trainer.strategy).__name__}."
            )

    def on_train_epoch_end(self) -> None:
        """Report sick tasks; step the schedulers that monitor a metric."""
        self.health.report()
        super().on_train_epoch_end()

    # ------------------------------------------------------------------------------------------------ optimiser, state

    def make_optimizer(self) -> Optimizer:
        """Return the optimiser, with the parameters of the weighting in a group of their own, without weight decay."""
        learned = [parameter for parameter in self.weighting.parameters() if parameter.requires_grad]
        if not learned:
            return super().make_optimizer()
        ids = {id(parameter) for parameter in learned}
        rest = [parameter for parameter in self.trained_parameters() if id(parameter) not in ids]
        groups: Any = [{"params": rest}, {"params": learned, "weight_decay": 0.0}]
        return self._optimizer(groups)

    def on_train_start(self) -> None:
        """Take up the gradients that a checkpoint holds; Lightning zeroes gradients between loading and here."""
        if self._pending_gradients is not None:
            parameters = list(self.parameters())
            for index, gradient in self._pending_gradients.items():
                parameters[index].grad = gradient.to(parameters[index])
            self._pending_gradients = None
        super().on_train_start()

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on and is not a parameter or a buffer."""
        accumulated = enumerate(self.parameters()) if self._accumulated else ()
        return super().get_extra_state() | {
            "gradients": {index: p.grad for index, p in accumulated if p.grad is not None},
            "losses_of_step": self._losses_of_step.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        super().set_extra_state(state)
        self._pending_gradients = state["gradients"]
        self._losses_of_step.load_state_dict(state["losses_of_step"], self.device)


@dataclass
class _Part:
    """What a batch holds of the tasks with labels on this rank."""

    inputs: Any
    targets: dict[str, Tensor]
    shares: dict[int, float]  # factors of this rank's losses in the mean over all labels, by task
