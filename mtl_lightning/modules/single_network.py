"""What the modules that train one network share: its evaluation, and training by passes that DDP is kept out of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_lightning.modules.base import LRSchedulerCallable, LRSchedulerInterval, MultiTaskModule, OptimizerCallable
from mtl_lightning.modules.evaluation import PopulationEvaluation
from mtl_lightning.task import Task


class SingleNetworkModule(MultiTaskModule):
    """Base of the modules that train one network for ``T`` tasks; it validates, tests and predicts.

    Of training it has the parts: labels counted on the host, losses averaged over labels and ranks, clipping. Gradients
    are those of each rank until a module averages them before a step.

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor.
        tasks: At least two tasks.
        optimizer: See :class:`~mtl_lightning.modules.base.MultiTaskModule`, also for the other arguments.

    Note:
        Logged are ``<split>_loss`` (the mean over the tasks), ``<split>_loss/<task>`` and ``<split>_<metric>/<task>``,
        with ``val`` or ``test`` as the split. Losses are means over labels and over all ranks; with several loaders,
        over all of them together.
    """

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
        self._counts_on_host: list[float] | None = None

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

    def on_fit_start(self) -> None:
        """Refuse strategies under which gradients are not whole on every rank.

        Raises:
            MisconfigurationException: If the strategy is neither a single device nor DDP, or DDP with a static graph.
        """
        super().on_fit_start()
        # Lightning tells every user of a data module that the hook is that of the module; nobody has to act on it.
        warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer` in `LightningModule`.*")
        kind = type(self).__name__
        if self.trainer.world_size > 1 and not isinstance(self.trainer.strategy, DDPStrategy):
            raise MisconfigurationException(
                f"`{kind}` trains on one device or with DDP (`Trainer(strategy='ddp')`). "
                f"Found {type(self.trainer.strategy).__name__}."
            )
        if getattr(self.trainer.model, "static_graph", False):
            raise MisconfigurationException(
                f"`{kind}` needs `DDPStrategy(static_graph=False)`, since not every backward pass has the same graph. "
                "Found `static_graph=True`; remove it."
            )

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

    def take_label_counts(self, targets: Mapping[str, Tensor]) -> list[float]:
        """Return the number of labels of each task in the batch in training; to be called once a batch."""
        counts = self.count_labels(targets).tolist() if self._counts_on_host is None else self._counts_on_host
        self._counts_on_host = None
        return counts

    def total_labels(self, counts: Sequence[float]) -> list[float]:
        """Return the number of labels of each task over all ranks."""
        if self.trainer.world_size == 1:
            return list(counts)
        totals: list[float] = self.reduced(torch.tensor(counts, device=self.device), "sum").tolist()
        return totals

    def label_shares(self, counts: Sequence[float], totals: Sequence[float]) -> list[float]:
        """Return factors for the losses of a batch on this rank, by task, zero without labels.

        With them, the mean over ranks of the sum over batches is the mean over all labels, ``totals`` in number.
        """
        world_size = self.trainer.world_size
        return [count * world_size / total if count else 0.0 for count, total in zip(counts, totals, strict=True)]

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

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient, after any gradient scaling is undone."""
        if self.gradient_clip_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip_norm)

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
            for buffer in self.network.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.reduced(buffer.clone(), "mean"))
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
