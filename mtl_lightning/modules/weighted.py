"""One network trained for a weighting of the task losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_lightning.modules.base import (
    LRSchedulerCallable,
    LRSchedulerInterval,
    OptimizerCallable,
    check_count,
)
from mtl_lightning.modules.health import TaskHealth
from mtl_lightning.modules.scaling import gradient_scale
from mtl_lightning.modules.single_network import LabelledPart, SingleNetworkModule, zero_of
from mtl_lightning.population import UserInputError
from mtl_lightning.seeds import seed_generators
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
            linear in the losses, or a task lacks labels in one of them, that is the mean of the batches' objectives,
            not the objective of one larger batch. The gradient of what is left at the end of an epoch is divided by the
            same number, as Lightning does.

    Attributes:
        weighting: The weighting.

    Raises:
        ValueError: If an argument is out of range, or the weighting does not fit the tasks or the network.
        TypeError: If an argument is of the wrong kind.

    Note:
        Logged are ``train_loss`` (the mean over the tasks), ``train_loss/<task>``, ``weight/<task>``, the slope of the
        objective in the loss of the task, and, where there were any, ``nonfinite/<task>``, the batches that a task was
        left out of, and ``skipped_steps``; all of them every ``log_every_n_steps`` batches of the trainer and, for
        callbacks but not for loggers, with the last batch of an epoch. In validation see
        :class:`~mtl_lightning.modules.single_network.SingleNetworkModule`.

        With several ranks the objective is that of the losses over all labels of all ranks, and its slopes weigh the
        losses of each rank, so that two ranks with half batches equal one process.

        Limits: strategies other than one device, DDP and ``ModelParallelStrategy`` are refused, the last one also for
        weightings that read gradients. Each batch waits once for the device, to see which losses are finite. Averages
        and weights are kept in float64, which Apple's MPS does not have. With accumulated batches, a weighting that
        looks at a batch before and after the step, or at gradients, sees the last one.

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

    can_be_sharded: ClassVar[bool] = True

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
        self.health = TaskHealth(self.task_names, max_nonfinite, warns_of_nonpositive=False)
        self._layer = self._shared_layer() if self.weighting.needs_gradient_norms else []

    # ------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Add the gradient of the objective of a batch, and step the optimiser if it is time."""
        part, present = self.shared_part(batch)
        is_due = self.is_step_due()
        losses = self._pass(part, present, is_due, batch_idx)
        if is_due and self._losses_of_step.tasks:
            self._step(part, losses)
        if self.trainer.is_last_batch:
            self.weighting.end_epoch()
        self.finish_batch()

    def _pass(self, part: LabelledPart, present: Sequence[int], is_due: bool, batch_idx: int) -> dict[int, Tensor]:
        """Add the gradient of the objective of a batch; return the losses over all labels and ranks, by task.

        Args:
            part: The batch of this rank.
            present: The tasks with labels on any rank. Those whose loss is not finite take no part.
            is_due: Whether the optimiser steps after this batch.
            batch_idx: The place of the batch in the epoch.
        """
        if not present:
            return {}
        if self.weighting.needs_losses_after_step:
            seed_generators(self.batch_seed(), self.device)
        outputs = self(part.inputs)
        own = self.own_losses(outputs, part)
        values = self.mean_over_labels(own, part.shares, present)
        tasks = self._healthy(values, present)
        if not tasks:
            return {}
        losses = values[tasks]
        # Under autocast a weighting would be evaluated in half precision.
        with torch.autocast(self.device.type, enabled=False):
            self.weighting.observe_batch(losses, self._indicators(outputs, part, tasks)[tasks], tasks)
            slopes = dict(zip(tasks, self.weighting.slopes(losses, tasks), strict=True))
            price = self.weighting(losses, tasks)  # with the graph of the weighting's own parameters
        if self.weighting.needs_gradient_norms and is_due:
            self.weighting.observe_gradients(losses, self._gradient_norms(outputs, own, part, tasks), tasks)
        self._backward(outputs, own, part, slopes, price)
        self._losses_of_step.update(values.unsqueeze(0), tasks)
        found = dict(zip(tasks, losses, strict=True))
        self._log_training(found, slopes, batch_idx)
        return found

    def _healthy(self, values: Tensor, present: Sequence[int]) -> list[int]:
        """Return the tasks whose loss is finite, of those with labels; count the others.

        Raises:
            ValueError: If a loss is negative and the weighting has no use for it.
        """
        self.health.observe(present, values)
        self.health.finish_batch()
        losses = values.tolist()  # waits for the device
        for task in present:
            if losses[task] < 0 and self.weighting.needs_positive_losses:
                raise UserInputError(
                    f"The loss of task {self.task_names[task]!r} should not be negative under "
                    f"`{type(self.weighting).__name__}`. Found {losses[task]:g}. Add a constant to the loss, or choose "
                    "another weighting."
                )
        return [task for task in present if isfinite(losses[task])]

    def _backward(
        self,
        outputs: Mapping[str, Any],
        own: Mapping[int, Tensor],
        part: LabelledPart,
        slopes: Mapping[int, Tensor],
        price: Tensor,
    ) -> None:
        """Add the gradient of the objective: its slopes at the losses of all ranks weigh the losses of this one."""
        objective = price if price.requires_grad else torch.zeros((), device=self.device)
        for task, slope in slopes.items():
            if task not in own:
                objective = objective + zero_of(outputs[self.task_names[task]])
            elif own[task].requires_grad:
                objective = objective + slope.to(own[task]) * part.shares[task] * own[task]
        if objective.requires_grad:  # else there is nothing to train
            with self.unsynchronised():
                self.manual_backward(objective / self.accumulate_batches)

    @torch.no_grad()
    def _indicators(self, outputs: Mapping[str, Tensor], part: LabelledPart, tasks: Sequence[int]) -> Tensor:
        """Return what the weighting's indicators say of the batch over all labels, shape ``(T,)``; NaN without any.

        Raises:
            ValueError: If one of them returns more than a number.
        """
        named = [task for task in tasks if self.task_names[task] in self.weighting.indicators]
        if not named:
            return torch.full((len(self.tasks),), torch.nan, dtype=torch.float64, device=self.device)
        own = {}
        for task in named:
            name = self.task_names[task]
            if name in part.targets:
                own[task] = torch.as_tensor(self.weighting.indicators[name](outputs[name], part.targets[name]))
                if own[task].ndim != 0:
                    raise UserInputError(
                        f"The indicator of task {name!r} should return a number. Found shape {tuple(own[task].shape)}. "
                        "Use a reduction such as the mean."
                    )
        return self.mean_over_labels(own, part.shares, named)

    def _gradient_norms(
        self, outputs: Mapping[str, Any], own: Mapping[int, Tensor], part: LabelledPart, tasks: Sequence[int]
    ) -> Tensor:
        """Return the norms of the gradients of the mean losses over all labels in the shared layer, shape ``(T',)``."""
        # As in the backward pass, small gradients would vanish in half precision.
        scale = gradient_scale(self.trainer.precision_plugin)
        rows = []
        for task in tasks:
            gradients: Sequence[Tensor | None] = [None] * len(self._layer)
            loss = own[task] * part.shares[task] if task in own else zero_of(outputs[self.task_names[task]])
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss * scale, self._layer, retain_graph=True, allow_unused=True)
            zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(self._layer, gradients, strict=True))
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

    def _step(self, part: LabelledPart, before: Mapping[int, Tensor]) -> None:
        """Step the optimiser, and let the weighting learn from the step."""
        self.finish_passes()
        self.average_over_ranks(self.trained_parameters())
        is_taken = self.take_step()
        tasks = self._losses_of_step.tasks
        self.weighting.observe(self._losses_of_step.compute()[0, list(tasks)], tasks)
        self._losses_of_step.reset()
        if before and self.weighting.needs_losses_after_step and is_taken:
            after = self._losses_after_step(part, list(before))
            self.weighting.observe_step(torch.stack(list(before.values())), after, list(before))
        self._steps += 1
        self.step_schedulers("step")

    def _losses_after_step(self, part: LabelledPart, tasks: Sequence[int]) -> Tensor:
        """Return the losses of the batch once more, with the same random numbers, shape ``(T',)``."""
        seed_generators(self.batch_seed(), self.device)
        torch.clear_autocast_cache()  # within one autocast region it keeps the weights of before the step
        with torch.no_grad(), frozen_statistics(self.network.modules()):
            outputs = self(part.inputs)
            own = self.own_losses(outputs, part)
        return self.mean_over_labels(own, part.shares, tasks)[list(tasks)]

    def _log_training(self, losses: Mapping[int, Tensor], slopes: Mapping[int, Tensor], batch_idx: int) -> None:
        if not self.is_logging_due(batch_idx):
            return
        losses = {task: loss.float() for task, loss in losses.items()}  # what populations log, and validations
        values: dict[str, Any] = {f"train_loss/{self.task_names[task]}": loss for task, loss in losses.items()}
        values |= {f"weight/{self.task_names[task]}": slope for task, slope in slopes.items()}
        failures = zip(self.task_names, self.health.known_total, strict=True)
        values |= {f"nonfinite/{name}": float(count) for name, count in failures if count}
        self.log_dict(values | self.logged_skips())
        self.log("train_loss", torch.stack(list(losses.values())).mean(), prog_bar=True)

    def on_fit_start(self) -> None:
        """Look for the shared layer once more: it may have been replaced.

        Raises:
            MisconfigurationException: If the weighting needs gradients of single tasks, and parameters are sharded; see
                :class:`~mtl_lightning.modules.single_network.SingleNetworkModule` for other strategies.
        """
        super().on_fit_start()
        if self.shards_network and self.weighting.needs_gradient_norms:
            raise MisconfigurationException(
                f"`{type(self.weighting).__name__}` reads gradients of single tasks, which FSDP does not return. "
                "Choose another weighting, or `Trainer(strategy='ddp')`. Found `ModelParallelStrategy`."
            )
        if self.weighting.needs_gradient_norms:
            self._layer = self._shared_layer()

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
        """Take up the gradients and sums that a checkpoint holds; Lightning zeroes gradients after loading."""
        self.take_up_gradients()
        # It was loaded before the module was moved.
        self._losses_of_step.load_state_dict(self._losses_of_step.state_dict(), self.device)
        super().on_train_start()

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on and is not a parameter or a buffer."""
        return super().get_extra_state() | {
            "gradients": self.accumulated_gradients(),
            "losses_of_step": self._losses_of_step.state_dict(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint hold the accumulated gradient of all ranks, each of which has seen its own batches."""
        self.finish_passes()
        super().on_save_checkpoint(checkpoint)
        self.save_mean_gradients(checkpoint)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        super().set_extra_state(state)
        self._pending_gradients = state["gradients"]
        self._losses_of_step.load_state_dict(state["losses_of_step"], self.device)
