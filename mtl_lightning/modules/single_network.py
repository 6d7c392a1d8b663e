"""What the modules that train one network share: its evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lightning.modules.base import LRSchedulerCallable, LRSchedulerInterval, MultiTaskModule, OptimizerCallable
from mtl_lightning.modules.evaluation import PopulationEvaluation
from mtl_lightning.task import Task


class SingleNetworkModule(MultiTaskModule):
    """Base of the modules that train one network for ``T`` tasks; it validates, tests and predicts.

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
