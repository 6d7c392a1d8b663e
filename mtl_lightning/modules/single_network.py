"""What the modules that train one network share: its evaluation, and training by passes that DDP is kept out of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from mtl_lightning.modules.base import LRSchedulerCallable, LRSchedulerInterval, MultiTaskModule, OptimizerCallable
from mtl_lightning.modules.evaluation import PopulationEvaluation
from mtl_lightning.modules.gradients import average_gradients, average_statistics, mean_gradients
from mtl_lightning.modules.scaling import ScaledSteps, gradient_scale
from mtl_lightning.sharding import (
    clip_gradient_norm,
    gathered,
    is_sharded,
    misplaced_units,
    reshard,
    shard_network,
    spread_like,
)
from mtl_lightning.task import Task

_EXTRA = "_extra_state"  # what torch calls it in a `state_dict`


@dataclass
class LabelledPart:
    """What a batch holds of the tasks with labels on this rank.

    Attributes:
        inputs: What the network is called with.
        targets: The targets of these tasks, by name.
        shares: This rank's part in the mean over all labels, by task; see :meth:`SingleNetworkModule.label_shares`.
    """

    inputs: Any
    targets: dict[str, Tensor]
    shares: list[float]


class SingleNetworkModule(MultiTaskModule):
    """Base of the modules that train one network for ``T`` tasks; it validates, tests and predicts.

    Of training it has the parts: labels counted on the host, losses averaged over labels and ranks, clipping, steps
    under a gradient scaler. Gradients are those of each rank until a module averages them before a step.

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor.
        tasks: At least two tasks.
        optimizer: See :class:`~mtl_lightning.modules.base.MultiTaskModule`, also for the other arguments.

    Note:
        Logged are ``<split>_loss`` (the mean over the tasks), ``<split>_loss/<task>`` and ``<split>_<metric>/<task>``,
        with ``val`` or ``test`` as the split. Losses are means over labels and over all ranks; with several loaders,
        over all of them together.

        With 16-bit mixed precision the scaler of gradients is updated once for all steps of a batch. A step whose
        gradient overflows is skipped, on all ranks alike; ``skipped_steps``, how many there were, is logged with the
        training losses once there are any. Means over ranks are those of :meth:`reduced`, in float64 for losses and
        labels. With ``bf16-true`` and ``16-true`` networks and losses are evaluated in 16 bits, so that all that is
        decided from losses knows them to 3 digits, or 4, only, and in ``16-true`` nothing keeps small gradients from
        vanishing: mixed precision is to be preferred.

        Where a subclass allows for it (:attr:`can_be_sharded`), ``ModelParallelStrategy(data_parallel_size=...,
        tensor_parallel_size=1)`` spreads parameters, gradients and the state of the optimiser over the ranks: the
        encoder and each head are units of FSDP2, or a network without them as a whole; for smaller units, override
        :meth:`configure_model` and call :func:`~mtl_lightning.sharding.shard_network`. Checkpoints, distributed or
        full, hold what else decides how the run goes on as ``extra_states``, outside the ``state_dict``. Lightning
        resumes none from before the first step, nor a full one of an optimiser without state (plain SGD).
    """

    #: Whether a subclass leaves gradients to the backward passes of its objective, in which FSDP averages them.
    can_be_sharded: ClassVar[bool] = False

    def __init__(
        self,
        network: nn.Module,
        tasks: Sequence[Task],
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: LRSchedulerInterval = "epoch",
        lr_scheduler_monitor: str | None = None,
        gradient_clip_norm: float | None = None,
        accumulate_batches: int = 1,
    ) -> None:
        super().__init__(
            tasks=tasks,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            lr_scheduler_monitor=lr_scheduler_monitor,
            gradient_clip_norm=gradient_clip_norm,
            accumulate_batches=accumulate_batches,
        )
        if not isinstance(network, nn.Module):
            raise TypeError(f"`network` should be a `torch.nn.Module`. Found {network!r}.")
        self.network = network
        self._evaluation = PopulationEvaluation(self.tasks, size=1)
        self._scaled_steps = ScaledSteps()
        self._pending_gradients: dict[int, Tensor] | None = None

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Return the predictions, task name to tensor of shape ``(B, ...)``."""
        outputs: dict[str, Tensor] = self.network(inputs)
        return outputs

    def batch_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the loss of each task with labels in ``batch``, shape ``()``, float32, with its graph."""
        inputs, targets = self.unpack_batch(batch)
        counts = self.count_labels(targets).tolist()
        present = {name: targets[name] for name, count in zip(self.task_names, counts, strict=True) if count}
        return self.checked_losses(self(inputs), present) if present else {}

    # ------------------------------------------------------------------------------------------------------- training

    def configure_model(self) -> None:
        """Shard the network under Lightning's ``ModelParallelStrategy``, unless an override has done so.

        See :func:`~mtl_lightning.sharding.shard_network`, to be called in an override for smaller units.
        """
        if self.shards_network:
            shard_network(self.network, self.trainer.strategy.device_mesh["data_parallel"])  # type: ignore[attr-defined]

    @property
    def shards_network(self) -> bool:
        """Whether the parameters are spread over the ranks, by Lightning's ``ModelParallelStrategy``."""
        # `load_from_checkpoint` calls `configure_model` of a module without a trainer.
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    def on_fit_start(self) -> None:
        """Refuse strategies under which gradients are not those of the mean over all labels.

        Raises:
            MisconfigurationException: If the strategy is none of a single device, DDP without a static graph and
                ``ModelParallelStrategy`` without tensor parallelism, or what is sharded is not what is called.
        """
        super().on_fit_start()
        kind = type(self).__name__
        sharding = ", or sharded, with `ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)`"
        is_known = isinstance(self.trainer.strategy, DDPStrategy) or (self.shards_network and self.can_be_sharded)
        if (self.trainer.world_size > 1 or self.shards_network) and not is_known:
            raise MisconfigurationException(
                f"`{kind}` trains on one device or with DDP (`Trainer(strategy='ddp')`)"
                f"{sharding if self.can_be_sharded else ''}. Found {type(self.trainer.strategy).__name__}."
            )
        if self.shards_network:
            self._check_shards()
        if getattr(self.trainer.model, "static_graph", False):
            raise MisconfigurationException(
                f"`{kind}` needs `DDPStrategy(static_graph=False)`, since not every backward pass has the same graph. "
                "Found `static_graph=True`; remove it."
            )

    def _check_shards(self) -> None:
        kind = type(self).__name__
        strategy: Any = self.trainer.strategy
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            raise MisconfigurationException(
                f"`{kind}` shards data and parameters: `ModelParallelStrategy(data_parallel_size={strategy.world_size},"
                f" tensor_parallel_size=1)`. Found {strategy.device_mesh['tensor_parallel'].size()} tensor-parallel "
                "ranks."
            )
        misplaced = misplaced_units(self, self.network)
        if misplaced:
            names = ", ".join(f"`{name}`" if name else "the module itself" for name in misplaced)
            raise MisconfigurationException(
                "What `configure_model` shards should be what a training step calls: the encoder and each head of a "
                f"network that has them, and any other network as a whole. Found that it shards {names}. Call "
                '`shard_network(self.network, self.device_mesh["data_parallel"])` of `mtl_lightning.sharding` there.'
            )

    def shared_part(self, batch: Any) -> tuple[LabelledPart, list[int]]:
        """Return what the batch in training holds for this rank, and the tasks with labels on any; once a batch."""
        inputs, targets = self.unpack_batch(batch)
        counts = self.take_label_counts(targets)
        totals = self.total_labels(counts)
        known = {name: targets[name] for name, count in zip(self.task_names, counts, strict=True) if count}
        part = LabelledPart(inputs, known, self.label_shares(counts, totals))
        return part, [task for task, total in enumerate(totals) if total]

    def own_losses(self, outputs: Mapping[str, Tensor], part: LabelledPart) -> dict[int, Tensor]:
        """Return the losses of the tasks with labels on this rank, by task, each of shape ``()``."""
        losses = self.checked_losses(outputs, part.targets) if part.targets else {}
        return {self.task_names.index(name): loss for name, loss in losses.items()}

    def mean_over_labels(self, values: Mapping[int, Tensor], shares: Sequence[float], tasks: Sequence[int]) -> Tensor:
        """Return the part of a batch in the means over all labels and ranks, float64, shape ``(T,)``.

        Args:
            values: What is to be averaged, by task, of those with labels in the batch on this rank.
            shares: See :meth:`label_shares`.
            tasks: The tasks with labels anywhere; the others are NaN.
        """
        # One dtype, since ranks may hold losses of different ones; made on the device, not copied to it.
        means = torch.full((len(self.tasks),), torch.nan, dtype=torch.float64, device=self.device)
        for task in tasks:
            means[task] = values[task].detach() * shares[task] if task in values else 0.0
        return self.reduced(means, "mean") if self.trainer.world_size > 1 else means

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Return a context in which DDP leaves gradients alone: it knows one backward pass per forward only."""
        no_sync = getattr(self.trainer.model, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()

    def finish_passes(self) -> None:
        """Give up what FSDP has gathered for the passes of a step; until then parameters are not those that step."""
        if self.shards_network:
            reshard(self.network)

    def average_over_ranks(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over the ranks; FSDP has done so already for those that are sharded."""
        if self.trainer.world_size == 1:
            return
        whole = [parameter for parameter in parameters if not is_sharded(parameter)]
        average_gradients(whole, partial(self.reduced, operation="mean"))

    def take_step(self, is_last: bool = True) -> bool:
        """Step the optimiser and clear the gradients; return whether the gradient scaler has not skipped the step.

        The steps of a batch count as one, in ``global_step`` and for the scaler.

        Args:
            is_last: Whether it is the last step of the batch.
        """
        optimizer: Any = self.optimizers()
        raw = optimizer.optimizer
        # Past the counter of Lightning, which would count every group as a step of the run.
        between = partial(self.trainer.strategy.optimizer_step, raw, closure=_nothing)
        is_taken = self._scaled_steps.take(
            self.trainer.precision_plugin, raw, optimizer.step if is_last else between, is_last
        )
        optimizer.zero_grad(set_to_none=True)
        return is_taken

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient; the limit is scaled where the gradient still is."""
        if self.gradient_clip_norm is not None:
            scale = gradient_scale(self.trainer.precision_plugin, optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            clip_gradient_norm(parameters, self.gradient_clip_norm * scale)

    def logged_skips(self) -> dict[str, float]:
        """Return the number of steps that the gradient scaler has skipped, to be logged, if there are any."""
        return {"skipped_steps": float(self._scaled_steps.skipped)} if self._scaled_steps.skipped else {}

    def is_logging_due(self, batch_idx: int) -> bool:
        """Return whether training should log in this batch."""
        # A call to `log` costs about a millisecond, so it is made only where loggers take the values in before the next
        # update, at the beginning, and for what is read at the end of an epoch.
        every = self.trainer.log_every_n_steps or torch.inf  # type: ignore[attr-defined]  # set by a connector
        due = -(self.trainer.fit_loop.total_batch_idx + 1) % every < self.accumulate_batches
        return bool(due or batch_idx < self.accumulate_batches or self.trainer.is_last_batch)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation; see that no rank's own statistics are validated."""
        if self.trainer.world_size > 1:
            average_statistics(self.network, partial(self.reduced, operation="mean"))
        self._evaluation.reset(1, self.device)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in one batch of the validation set."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the losses and metrics."""
        self._log_evaluation("val")
        super().on_validation_epoch_end()

    def on_test_epoch_start(self) -> None:
        """Forget the last test."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in one batch of the test set."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log the losses and metrics."""
        self._log_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the predictions, task name to tensor. A batch that is not a pair is taken for the inputs."""
        labelled = isinstance(batch, Sequence) and len(batch) == 2
        return self(self.unpack_batch(batch)[0] if labelled else batch)

    def _evaluate(self, batch: Any) -> None:
        inputs, targets = self.unpack_batch(batch)
        labels = {task: count for task, count in enumerate(self.count_labels(targets).tolist()) if count}
        if not labels:
            return
        present = {self.task_names[task]: targets[self.task_names[task]] for task in labels}
        outputs = self(inputs)
        losses = self.loss_vector(outputs, present).unsqueeze(0)
        one: Mapping[str, Any] = {name: [outputs[name]] for name in present}  # a population of one
        self._evaluation.update(one, losses, present, labels)

    def _log_evaluation(self, split: str) -> None:
        losses, metrics = self._evaluation.compute(partial(self.reduced, operation="sum"))
        values = {f"{split}_loss/{name}": losses[0, task] for task, name in enumerate(self.task_names)}
        values |= {f"{split}_{name}": value[0] for name, value in metrics.items()}
        # Equal on all ranks already; Lightning warns of values that it does not reduce.
        self.log_dict(values, sync_dist=True)
        self.log(f"{split}_loss", torch.nanmean(losses), prog_bar=True, sync_dist=True)

    # --------------------------------------------------------------------------------------------------------- state

    def configure_optimizers(self) -> Any:
        """Return the optimiser and, if there is one, the scheduler with its interval."""
        self.finish_passes()  # an evaluation may have come before
        return super().configure_optimizers()

    def get_extra_state(self) -> dict[str, Any]:
        """Return the counters and the seed, as part of the ``state_dict``."""
        return super().get_extra_state() | {"skipped_steps": self._scaled_steps.skipped}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the counters and the seed of a checkpoint."""
        super().set_extra_state(state)
        self._scaled_steps.skipped = state["skipped_steps"]

    # Lightning's `ModelParallelStrategy` loads no extra state from a full checkpoint, and from a distributed one only
    # if it has the structure of that before loading. There it travels with what Lightning knows of the run.

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return parameters and buffers and, unless they are sharded, what else decides how the run goes on."""
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.shards_network:
            for key in [key for key in state if key.endswith(_EXTRA)]:
                del state[key]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take up parameters, buffers and, unless they are sharded, what else decides how the run goes on."""
        own = self._extra_states() if self.shards_network else {}
        return super().load_state_dict(own | dict(state_dict), strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what decides how the run goes on, of a network that is sharded."""
        if self.shards_network:
            checkpoint["extra_states"] = self._extra_states()

    @property
    def ranks_meet_in_checkpoint(self) -> bool:
        """Whether there are several ranks, all of which write the checkpoint that is being written."""
        # Inside a batch, as after an exception, the others may be elsewhere; shards are written by all in any case.
        return self.trainer.world_size > 1 and (self.shards_network or not self._in_batch)

    def saved_extra_state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint holds of :meth:`get_extra_state`, after :meth:`on_save_checkpoint` of this class."""
        states = checkpoint["extra_states"] if self.shards_network else checkpoint["state_dict"]
        found: dict[str, Any] = states[_EXTRA]
        return found

    def accumulated_gradients(self) -> dict[int, Tensor]:
        """Return the gradients that are being accumulated, by the place of the parameter, for the state of a run."""
        if self._pending_gradients is not None:
            return self._pending_gradients
        accumulated = enumerate(self.parameters()) if self._accumulated else ()
        return {index: parameter.grad for index, parameter in accumulated if parameter.grad is not None}

    def take_up_gradients(self) -> None:
        """Give the parameters the gradients that a checkpoint holds; Lightning zeroes gradients after loading."""
        if self._pending_gradients is not None:
            parameters = list(self.parameters())
            for index, gradient in self._pending_gradients.items():
                parameters[index].grad = spread_like(parameters[index], gradient.to(parameters[index]))
            self._pending_gradients = None

    def save_mean_gradients(self, checkpoint: dict[str, Any]) -> bool:
        """Let the checkpoint hold as ``gradients`` the means over the ranks, each of which has seen its own batches.

        Returns:
            Whether it does: whether gradients are being accumulated, on several ranks that write it together.
        """
        if not self._accumulated or not self.ranks_meet_in_checkpoint:
            return False
        parameters = dict(enumerate(self.parameters()))
        gradients = {i: gathered(p.grad) for i, p in parameters.items() if is_sharded(p) and p.grad is not None}
        whole = {index: parameter for index, parameter in parameters.items() if not is_sharded(parameter)}
        means = mean_gradients(whole.values(), partial(self.reduced, operation="mean"))
        gradients |= {index: mean for index, mean in zip(whole, means, strict=True) if mean is not None}
        self.saved_extra_state(checkpoint)["gradients"] = gradients
        return True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up.

        Raises:
            ValueError: If it is missing.
        """
        if not self.shards_network:
            return
        if "extra_states" not in checkpoint:
            raise ValueError(
                "A checkpoint of a network that is sharded should hold `extra_states`, which `on_save_checkpoint` "
                f"adds. Found {', '.join(sorted(map(repr, checkpoint)))}. An override of that hook should call the one "
                "of `super()`."
            )
        self.load_state_dict(checkpoint["extra_states"], strict=False)

    def _extra_states(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, module in self.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                found[f"{name}.{_EXTRA}" if name else _EXTRA] = module.get_extra_state()
        return found


def zero_of(predictions: Any) -> Tensor:
    """Return zero with the graph of the predictions, a tensor or several.

    A rank without labels of a task goes through the same graph as those with some: FSDP and synchronised batch
    normalisation exchange tensors in the backward pass, and would wait for it for ever.
    """
    tensors = [tensor for tensor in pytree.tree_leaves(predictions) if isinstance(tensor, Tensor)]
    return torch.stack([(tensor * 0.0).sum() for tensor in tensors]).sum()


def _nothing() -> None:
    return None
