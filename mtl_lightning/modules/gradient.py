"""One network trained along an aggregate of the gradients of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mtl_lightning.aggregation import GradientAggregator, gramian, weighted_sum
from mtl_lightning.modules.base import (
    LRSchedulerCallable,
    LRSchedulerInterval,
    OptimizerCallable,
    check_count,
)
from mtl_lightning.modules.health import TaskHealth
from mtl_lightning.modules.scaling import gradient_scale
from mtl_lightning.modules.single_network import LabelledPart, SingleNetworkModule, zero_of
from mtl_lightning.split_network import SplitNetwork
from mtl_lightning.task import Task


class GradientModule(SingleNetworkModule):
    """One network whose shared parameters follow an aggregate of the gradients of the tasks.

    A batch costs one pass forward and a backward pass per task, whose gradients are held side by side; with
    ``gradients="features"``, the heads' part of a backward pass per task and one pass through the encoder. Parameters
    of one task alone, as those of its head, follow the gradient of their loss as it is.

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor. Shared are the parameters that belong to no
            single head, if it has an ``encoder`` and ``heads`` and does no more than to apply these to what that
            returns; see :class:`~mtl_lightning.split_network.SplitNetwork`. Of any other network, a compiled one among
            them, they are those in which at least two tasks have had a gradient so far in the run.
        tasks: The ``T >= 2`` tasks.
        optimizer: From parameters to an optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-4)``.
        aggregator: From the gradients of the tasks to one, such as :class:`~mtl_lightning.aggregation.UPGrad`. It
            belongs to this module from now on, and starts anew.
        gradients: What the aggregator sees: the gradients of the losses in the shared ``"parameters"``, or in the
            ``"features"`` that the encoder returns for the batch (MGDA-UB in Sener and Koltun, 2018,
            arXiv:1810.04650), with one pass through the encoder for all tasks. What is known of a method then holds
            for the features; for the parameters only as far as the encoder keeps the angles of gradients.
        max_nonfinite: A task whose loss or gradient is not finite is left out of the batch; after so many in a row the
            run stops.
        lr_scheduler: From the optimiser to a scheduler.
        lr_scheduler_interval: Whether it is stepped after each epoch or after each step of the optimiser.
        lr_scheduler_monitor: The logged metric that ``ReduceLROnPlateau`` reads.
        gradient_clip_norm: The largest norm of the gradient, after the aggregation.
        accumulate_batches: Over how many batches the gradients of the tasks are averaged before they are aggregated and
            a step is made. Those in the features of a batch are aggregated batch by batch, and the results averaged.

    Attributes:
        aggregator: The aggregator.

    Raises:
        ValueError: If an argument is out of range, the aggregator does not fit the tasks, or ``gradients="features"``
            comes with a network that is not split, or an aggregator that needs more than the Gramian.
        TypeError: If an argument is of the wrong kind.

    Note:
        Logged are ``train_loss`` (the mean over the tasks), ``train_loss/<task>``, where the aggregator has them
        ``weight/<task>``, the weight of the task's gradient in the shared parameters, and, where there were any,
        ``nonfinite/<task>``, the batches that a task was left out of, and ``skipped_steps``; all of them every
        ``log_every_n_steps`` batches of the trainer and, for callbacks but not for loggers, with the last batch of an
        epoch. In validation see :class:`~mtl_lightning.modules.single_network.SingleNetworkModule`.

        With several ranks the aggregator sees the gradients of the losses over all labels of all ranks, in one
        collective, so that two ranks with half batches equal one process. Under a gradient scaler it sees gradients
        without the scale, and does not see a step that the scaler is going to skip; gradients that overflow are no
        fault of a task until the scale is down to one.

        Limits: strategies other than one device and DDP are refused. Gradients of all tasks in all shared parameters
        are held at once, ``T`` times their size in float32, and twice that if batches are accumulated or reduced over
        ranks; sparse ones are made dense. A batch waits for the device for its losses, for whether its gradients are
        finite, and for their Gramian. ``torch.utils.checkpoint`` needs ``use_reentrant=False``. The Gramian and the
        weighted sum are taken in float64, which Apple's MPS does not have. Backward passes are those of
        ``torch.autograd.grad``, which ``on_before_backward`` does not see. With ``gradients="features"`` the encoder
        and the heads are called, not the network: compile those.

    Example:
        >>> from functools import partial
        >>> from mtl_lightning.aggregation import UPGrad
        >>> from mtl_lightning.networks import MLP, MultiHeadNetwork
        >>> network = MultiHeadNetwork(MLP(8, [16]), {"price": torch.nn.Linear(16, 1), "risk": torch.nn.Linear(16, 1)})
        >>> module = GradientModule(
        ...     network=network,
        ...     tasks=[Task("price", torch.nn.MSELoss()), Task("risk", torch.nn.L1Loss())],
        ...     optimizer=partial(torch.optim.Adam, lr=1e-3),
        ...     aggregator=UPGrad(),
        ... )
        >>> module.aggregator.weights(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
        tensor([0.6250, 1.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        network: nn.Module,
        tasks: Sequence[Task],
        optimizer: OptimizerCallable,
        aggregator: GradientAggregator,
        gradients: Literal["parameters", "features"] = "parameters",
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
        if not isinstance(aggregator, GradientAggregator):
            raise TypeError(
                "`aggregator` should be an object of GradientAggregator, as in `mtl_lightning.aggregation`; those of "
                f"TorchJD go into `mtl_lightning.torchjd.TorchJD(...)`. Found {described(aggregator)}."
            )
        if gradients not in ("parameters", "features"):
            raise ValueError(f"`gradients` should be 'parameters' or 'features'. Found {gradients!r}.")
        check_count("max_nonfinite", max_nonfinite)
        self._split = _split(network, self.task_names, gradients)
        if gradients == "features" and aggregator.needs_jacobian:
            raise ValueError(
                "`gradients='features'` needs an aggregator of the Gramian, for no rank has the features of all. "
                f"Found {type(aggregator).__name__}, which needs the gradients themselves."
            )
        self.aggregator = aggregator
        self.aggregator.resolve(self.task_names)
        self.gradients = gradients
        self.health = TaskHealth(
            self.task_names, max_nonfinite, warns_of_nonpositive=False, observed="loss or gradient"
        )
        # Of the batches of a step: the Jacobian, shape (T, N), and which shared parameters it reached, (T, parameters).
        self._jacobian: Tensor | None = None
        self._reached: Tensor | None = None
        self._ever_reached: Tensor | None = None
        self._has_overflowed = False

    # ------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Add the gradients of the tasks of a batch; aggregate them and step the optimiser if it is time."""
        part, present = self.shared_part(batch)
        is_due = self.is_step_due()
        values: dict[str, Tensor] = {}
        if present and self.gradients == "parameters":
            values |= self._add_in_parameters(part, present)
        elif present:
            values |= self._add_in_features(part, present)
        if is_due and self._losses_of_step.tasks:
            values |= self._step()
        if self.is_logging_due(batch_idx):
            self._log_training(values)
        self.finish_batch()

    def _add_in_parameters(self, part: LabelledPart, present: Sequence[int]) -> dict[str, Tensor]:
        """Add the gradients of a batch to those of the step; return the losses, to be logged."""
        outputs = self(part.inputs)
        found = self._differentiate(outputs, part, present, self._shared(), self._rest())
        rows, reached = found.rows.div_(self.accumulate_batches), found.reached
        self._jacobian = rows if self._jacobian is None else self._jacobian.add_(rows)
        self._reached = reached if self._reached is None else self._reached | reached
        return found.losses

    def _add_in_features(self, part: LabelledPart, present: Sequence[int]) -> dict[str, Tensor]:
        """Aggregate the gradients of a batch in the features, and add what the encoder makes of the result.

        Returns:
            The losses and weights, to be logged.
        """
        encoder: Any = self.network.encoder
        heads: Any = self.network.heads
        leaves, structure = pytree.tree_flatten(encoder(part.inputs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        ends = [leaves[place] for place in places]
        for place in places:
            leaves[place] = leaves[place].detach().requires_grad_()
        features = pytree.tree_unflatten(leaves, structure)
        outputs = {name: head(features) for name, head in heads.items()}
        trained = list(self.trained_parameters())
        found = self._differentiate(outputs, part, present, [leaves[place] for place in places], trained)
        values = found.losses
        if not ends or not found.tasks:
            return values
        gradient = found.rows.sum(dim=0)
        if not self._has_overflowed:
            products, tasks = self._products_in_features(found)
            if not tasks:
                return values
            weights = self._weights(products, tasks)
            values |= self._named("weight", weights, tasks)
            with torch.autocast(self.device.type, enabled=False):
                gradient = weighted_sum(weights, found.rows[tasks])
        pieces = torch.split(gradient, [end.numel() for end in ends])
        directions = [piece.view_as(end).to(end) for piece, end in zip(pieces, ends, strict=True)]
        self._add(trained, _dense(torch.autograd.grad(ends, trained, directions, allow_unused=True)))
        return values

    def _products_in_features(self, found: _Found) -> tuple[Tensor, list[int]]:
        """Return the products of the gradients of the tasks that reach the features of any rank, and these tasks."""
        # The features of each rank are other variables: a loss over all labels has one share of each rank in its
        # gradient, of which the mean is taken elsewhere.
        products = gramian(found.rows) / (self._scale() * self.trainer.world_size) ** 2
        reached = found.reached.any(dim=1, keepdim=True).to(products)
        both = self.reduced(torch.cat([products, reached], dim=1), "sum").cpu()  # waits for the device
        tasks = [task for task in found.tasks if both[task, -1]]
        return both[tasks][:, tasks], tasks

    # ------------------------------------------------------------------------------------------- gradients of a batch

    def _differentiate(
        self,
        outputs: Mapping[str, Any],
        part: LabelledPart,
        present: Sequence[int],
        shared: Sequence[Tensor],
        rest: Sequence[nn.Parameter],
    ) -> _Found:
        """Return the gradients of the losses in what the tasks share, and add up those in the rest.

        Args:
            outputs: What the network returns.
            part: The batch of this rank.
            present: The tasks with labels on any rank. Those whose loss or gradient is not finite take no part.
            shared: What the rows of the Jacobian are the gradients in.
            rest: What gets the sum of the gradients.
        """
        own = self.own_losses(outputs, part)
        values = self.mean_over_labels(own, part.shares, present)
        losses = values.tolist()  # waits for the device
        finite = [task for task in present if isfinite(losses[task])]
        size = sum(tensor.numel() for tensor in shared)
        rows = torch.zeros(len(self.tasks), size, dtype=_common_dtype(shared), device=self.device)
        reached = torch.zeros(len(self.tasks), len(shared), dtype=torch.bool)
        of_rest: dict[int, Sequence[Tensor | None]] = {}
        inputs = [*shared, *rest]
        scale = self._scale()
        weighted = {
            # The same passes on all ranks: some layers exchange tensors in them.
            task: own[task] * (part.shares[task] * scale) if task in own else zero_of(outputs[self.task_names[task]])
            for task in finite
        }
        differentiable = [task for task, loss in weighted.items() if loss.requires_grad and inputs]
        for task in differentiable:
            loss, is_last = weighted.pop(task), task == differentiable[-1]
            gradients = _dense(torch.autograd.grad(loss, inputs, retain_graph=not is_last, allow_unused=True))
            of_rest[task] = gradients[len(shared) :]
            start = 0
            for index, (tensor, gradient) in enumerate(zip(shared, gradients, strict=False)):
                if gradient is not None:
                    rows[task, start : start + tensor.numel()] = gradient.flatten()
                    reached[task, index] = True
                start += tensor.numel()
        tasks = self._without_failures(rows, of_rest, finite, scale)
        for task in set(finite) - set(tasks):
            rows[task] = 0.0
            reached[task] = False
            values[task] = torch.nan
        self.health.observe(present, values)
        self.health.finish_batch()
        self._losses_of_step.update(values.unsqueeze(0), tasks)
        for task in tasks:
            self._add(rest, of_rest.get(task, ()))
        return _Found(rows, reached, tasks, self._named("train_loss", values[tasks], tasks))

    def _without_failures(
        self, rows: Tensor, of_rest: Mapping[int, Sequence[Tensor | None]], tasks: Sequence[int], scale: float
    ) -> list[int]:
        """Return the tasks whose gradients are finite on all ranks, of some tasks; all if it is the scale's fault."""
        if not tasks:
            return []
        failures = torch.zeros(len(self.tasks), device=self.device)
        for task, gradients in of_rest.items():
            parts = (rows[task], *(gradient for gradient in gradients if gradient is not None))
            failures[task] = ~torch.stack([part.isfinite().all() for part in parts]).all()
        if self.trainer.world_size > 1:
            failures = self.reduced(failures, "sum")
        failed = failures.tolist()  # waits for the device
        if scale > 1.0 and any(failed):
            self._has_overflowed = True
            return list(tasks)
        return [task for task in tasks if not failed[task]]

    def _add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Add gradients of a batch to those of the step."""
        for parameter, gradient in zip(parameters, gradients, strict=False):
            if gradient is None:
                continue
            part = gradient if self.accumulate_batches == 1 else gradient / self.accumulate_batches
            parameter.grad = part.detach() if parameter.grad is None else parameter.grad + part

    def _scale(self) -> float:
        """Return by what losses are multiplied, so that small gradients do not vanish in half precision."""
        return gradient_scale(self.trainer.precision_plugin)

    def _shared(self) -> list[nn.Parameter]:
        """Return the parameters in training that tasks may share."""
        return [parameter for parameter in self._split.shared_parameters() if parameter.requires_grad]

    def _rest(self) -> list[nn.Parameter]:
        """Return the other parameters in training."""
        shared = {id(parameter) for parameter in self._split.shared_parameters()}
        return [parameter for parameter in self.trained_parameters() if id(parameter) not in shared]

    # ------------------------------------------------------------------------------------------------------- the step

    def _step(self) -> dict[str, Tensor]:
        """Aggregate the gradients of the step, and step the optimiser; return the weights, to be logged."""
        of_parameters = self.gradients == "parameters"
        weights = self._aggregate() if of_parameters else {}
        self.average_over_ranks(self._rest() if of_parameters else self.trained_parameters())
        self.take_step()
        self._forget_step()
        self._steps += 1
        self.step_schedulers("step")
        return weights

    def _forget_step(self) -> None:
        self._losses_of_step.reset()
        self._jacobian = self._reached = None
        self._has_overflowed = False

    @torch.no_grad()
    def _aggregate(self) -> dict[str, Tensor]:
        """Give the shared parameters the aggregate of the gradients of the step; return the weights, to be logged."""
        assert self._jacobian is not None
        assert self._reached is not None
        shared, jacobian, reached = self._shared(), self._jacobian, self._reached
        if self.trainer.world_size > 1:
            # Divided in place, since one more copy of a Jacobian may be too many.
            both = torch.cat([jacobian, reached.to(jacobian)], dim=1).div_(self.trainer.world_size)
            jacobian, counts = torch.split(self.reduced(both, "sum"), [jacobian.shape[1], len(shared)], dim=1)
            reached = counts.cpu() > 0
        blocks = torch.split(jacobian, [parameter.numel() for parameter in shared], dim=1)
        is_common = [True] * len(shared)
        if not self._split.is_split:
            reached = self._without_zeros(reached, blocks)
            is_common = self._reached_by_several()
        common = [block for block, several in zip(blocks, is_common, strict=True) if several]
        values: dict[str, Tensor] = {}
        pieces: list[Tensor] = []
        if common:
            whole = jacobian if len(common) == len(blocks) else torch.cat(common, dim=1)
            gradient, values = self._combine(whole, reached[:, is_common].any(dim=1).tolist())
            pieces = list(torch.split(gradient, [block.shape[1] for block in common]))
        ways = zip(shared, blocks, is_common, reached.any(dim=0).tolist(), strict=True)
        for parameter, block, several, is_reached in ways:
            found = pieces.pop(0) if several else block.sum(dim=0)
            if is_reached:  # what no loss depends on has no gradient, not one of zero, with which it may be stepped
                parameter.grad = found.view_as(parameter).to(parameter)
        return values

    def _combine(self, jacobian: Tensor, is_reaching: Sequence[bool]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the aggregate of gradients of the step, still scaled as they are, and the weights, to be logged."""
        tasks = [task for task in self._losses_of_step.tasks if is_reaching[task]]
        if self._has_overflowed or not tasks:
            return jacobian.sum(dim=0), {}  # not finite, so that the scaler skips the step
        scale = self._scale()
        rows = jacobian if len(tasks) == len(self.tasks) else jacobian[tasks]
        with torch.autocast(self.device.type, enabled=False):  # or products would be taken in half precision
            if self.aggregator.needs_jacobian:
                gradient = self.aggregator(rows / scale, tasks) * scale
                self._check_finite(gradient)
                return gradient, {}
            weights = self._weights(gramian(rows).cpu() / scale**2, tasks)  # waits for the device
            return weighted_sum(weights, rows), self._named("weight", weights, tasks)

    def _weights(self, products: Tensor, tasks: Sequence[int]) -> Tensor:
        weights = self.aggregator.weights(products, tasks)
        self._check_finite(weights)
        return weights

    def _check_finite(self, result: Tensor) -> None:
        if not bool(result.isfinite().all()):
            raise FloatingPointError(
                f"`{type(self.aggregator).__name__}` should make finite numbers of finite gradients. Found some that "
                "are not. Look for a task whose gradient is zero, or choose another aggregator."
            )

    def _without_zeros(self, reached: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        """Return which tasks have reached the parameters in training of a network that is not split, and note it.

        A compiled network makes gradients of zero for all that a loss does not depend on. So a task has reached a
        parameter from the first gradient on that is not zero; one where there was none is left to those it is zero for.
        """
        candidates = self._split.shared_parameters()
        if self._ever_reached is None:
            self._ever_reached = torch.zeros(len(self.tasks), len(candidates), dtype=torch.bool)
        trained = [place for place, parameter in enumerate(candidates) if parameter.requires_grad]
        ever = self._ever_reached[:, trained]
        new = (reached & ~ever).nonzero().tolist()
        if new and not self._has_overflowed:
            known = torch.stack([blocks[place][task].any() for task, place in new]).tolist()  # waits for the device
            for (task, place), is_reached in zip(new, known, strict=True):
                ever[task, place] = is_reached
            self._ever_reached[:, trained] = ever
        return reached & (ever | ~ever.any(dim=0))

    def _reached_by_several(self) -> list[bool]:
        """Return which of the parameters in training of a network that is not split are aggregated."""
        assert self._ever_reached is not None
        counts = self._ever_reached.sum(dim=0).tolist()
        candidates = self._split.shared_parameters()
        return [count > 1 for count, parameter in zip(counts, candidates, strict=True) if parameter.requires_grad]

    # -------------------------------------------------------------------------------------------------------- logging

    def _named(self, name: str, values: Tensor, tasks: Sequence[int]) -> dict[str, Tensor]:
        return {f"{name}/{self.task_names[task]}": value for task, value in zip(tasks, values, strict=True)}

    def _log_training(self, values: Mapping[str, Tensor]) -> None:
        failures = zip(self.task_names, self.health.known_total, strict=True)
        counts = {f"nonfinite/{name}": float(count) for name, count in failures if count}
        values = {name: value.float() for name, value in values.items()}  # what populations log, and validations
        self.log_dict({**values, **counts, **self.logged_skips()})
        losses = [value for name, value in values.items() if name.startswith("train_loss/")]
        if losses:
            self.log("train_loss", torch.stack(losses).mean(), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """Report sick tasks; step the schedulers that monitor a metric."""
        self.health.report()
        super().on_train_epoch_end()

    # ---------------------------------------------------------------------------------------------------------- state

    def on_fit_start(self) -> None:
        """Look for what is shared once more: the network may have been replaced, or compiled.

        Raises:
            ValueError: If ``gradients="features"`` and the network is not split.
            MisconfigurationException: See :class:`~mtl_lightning.modules.single_network.SingleNetworkModule`.
        """
        super().on_fit_start()
        if self._split.network is not self.network:
            self._split = _split(self.network, self.task_names, self.gradients)
        if self.gradients == "features":
            self._split.warn_of_compilation()

    def on_train_start(self) -> None:
        """Take up the gradients and sums that a checkpoint holds; Lightning zeroes gradients after loading."""
        if self._pending_gradients is None:  # what a run that broke off has left belongs to gradients that are gone
            self._accumulated = 0
            self._forget_step()
        self.take_up_gradients()
        # They were loaded before the module was moved.
        self._losses_of_step.load_state_dict(self._losses_of_step.state_dict(), self.device)
        if self._jacobian is not None:
            self._jacobian = self._jacobian.to(self.device)
        super().on_train_start()

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on and is not a parameter or a buffer."""
        return super().get_extra_state() | {
            "gradients": self.accumulated_gradients(),
            "losses_of_step": self._losses_of_step.state_dict(),
            "jacobian": self._jacobian,
            "reached": self._reached,
            "ever_reached": self._ever_reached,
            "has_overflowed": self._has_overflowed,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint hold what all ranks have accumulated, each of which has seen its own batches."""
        super().on_save_checkpoint(checkpoint)
        if self.save_mean_gradients(checkpoint) and self._jacobian is not None and self._reached is not None:
            state = self.saved_extra_state(checkpoint)
            state["jacobian"] = self.reduced(self._jacobian.clone(), "mean")
            reached = self._reached.to(device=self.device, dtype=torch.float32)
            state["reached"] = self.reduced(reached, "sum").cpu() > 0

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        super().set_extra_state(state)
        self._pending_gradients = state["gradients"]
        self._losses_of_step.load_state_dict(state["losses_of_step"], self.device)
        self._jacobian = state["jacobian"]
        self._reached = state["reached"]
        self._ever_reached = state["ever_reached"]
        self._has_overflowed = state["has_overflowed"]


@dataclass
class _Found:
    """The gradients of a batch on this rank."""

    rows: Tensor  # in what the tasks share, times the scale of the scaler, shape (T, N)
    reached: Tensor  # which of the tensors that they share the tasks depend on, shape (T, tensors), on the host
    tasks: list[int]  # whose losses and gradients are finite on all ranks
    losses: dict[str, Tensor]  # of these tasks, to be logged


def _split(network: nn.Module, task_names: Sequence[str], gradients: str) -> SplitNetwork:
    split = SplitNetwork(network, task_names)
    if gradients == "features" and not split.is_split:
        raise ValueError(
            "`gradients='features'` needs a network that applies its `heads` to what its `encoder` returns. "
            f"Found {type(network).__name__}. If it is compiled, compile its parts: `network.encoder.compile()`."
        )
    return split


def _dense(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients with the sparse ones, as of ``nn.Embedding(sparse=True)``, made dense."""
    return [gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient for gradient in gradients]


def described(value: object) -> str:
    """Return what a value is, with the module of its class: there are two of the name of ``MGDA``."""
    kind = value if isinstance(value, type) else type(value)
    return f"{'the class' if kind is value else 'an object of'} {kind.__module__}.{kind.__qualname__}"


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return float32, or float64 where a tensor is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
