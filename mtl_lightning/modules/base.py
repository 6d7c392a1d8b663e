"""What all multi-task modules share: tasks, the batch contract, the optimiser and its schedule."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mtl_lightning.modules.averaging import LossAverage
from mtl_lightning.modules.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from mtl_lightning.modules.checkpoints import check_record, check_shapes, make_record, population_facts
from mtl_lightning.modules.habits import check_callbacks
from mtl_lightning.modules.preemption import DeferredSignals
from mtl_lightning.modules.resuming import make_up_for_validation, missed_validation
from mtl_lightning.modules.waiting import meeting
from mtl_lightning.population import UserInputError
from mtl_lightning.seeds import mix_seed, seed_generators
from mtl_lightning.task import Task, check_tasks

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]
LRSchedulerInterval = Literal["epoch", "step"]


class MultiTaskModule(LightningModule):
    """Base of the multi-task modules, with manual optimisation.

    A batch is ``(inputs, targets)`` with a dict of targets, task name to tensor; override :meth:`unpack_batch` for
    another form. A network maps inputs to a dict of predictions, task name to tensor; override :meth:`task_losses`
    where the loss of a task needs more than its own prediction and target.

    Args:
        tasks: At least two tasks with different names.
        optimizer: From parameters to an optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-3)``.
        lr_scheduler: From the optimiser to a scheduler.
        lr_scheduler_interval: Whether it is stepped after each epoch or after each optimiser step.
        lr_scheduler_monitor: The logged metric that ``ReduceLROnPlateau`` reads at the end of an epoch.
        gradient_clip_norm: The largest norm of a gradient; none by default.
        accumulate_batches: Over how many batches gradients are averaged before a step. The last batch of an epoch
            always steps, as in Lightning.

    Raises:
        ValueError: If the tasks are fewer than two or share a name, or a number is out of range.
        TypeError: If ``optimizer`` or ``lr_scheduler`` is an object in place of a function that makes it.

    Note:
        Lightning refuses ``Trainer(gradient_clip_val=...)`` and ``Trainer(accumulate_grad_batches=...)`` in manual
        optimisation; the two arguments above take their place. Random numbers drawn within a batch (dropout) depend on
        the seed, the batch and the rank alone, so that a run resumed after any batch equals the uninterrupted one.

        Checkpoints are written whole or not at all, and read with ``weights_only=True``, on one device and with DDP: in
        the place of Lightning's ``TorchCheckpointIO`` the trainer is given an
        :class:`~mtl_lightning.modules.checkpoint_io.AtomicCheckpointIO`. One that is not of this module is refused with
        all that differs. Signals that Lightning acts on (``SIGTERM``, and ``SIGUSR1`` on SLURM with ``auto_requeue``)
        wait for the end of the batch, or of the validation, so that the checkpoint written then is exact; allow for
        that time when a signal is ordered (``sbatch --signal=SIGUSR1@90``).
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: LRSchedulerInterval = "epoch",
        lr_scheduler_monitor: str | None = None,
        gradient_clip_norm: float | None = None,
        accumulate_batches: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tasks = check_tasks(tasks)
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise ValueError(f"`gradient_clip_norm` should be positive, or None. Found {gradient_clip_norm}.")
        check_count("accumulate_batches", accumulate_batches)
        if not callable(optimizer):
            raise TypeError(
                "`optimizer` should make an optimiser from parameters, such as `functools.partial(torch.optim.Adam, "
                f"lr=1e-3)`. Found an object of {type(optimizer).__name__}."
            )
        if lr_scheduler is not None and not callable(lr_scheduler):
            raise TypeError(
                "`lr_scheduler` should make a scheduler from the optimiser, such as `functools.partial("
                f"torch.optim.lr_scheduler.StepLR, step_size=10)`. Found an object of {type(lr_scheduler).__name__}."
            )
        if lr_scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"`lr_scheduler_interval` should be 'epoch' or 'step'. Found {lr_scheduler_interval!r}.")
        self.gradient_clip_norm = gradient_clip_norm
        self.accumulate_batches = accumulate_batches
        self.batches_seen = 0
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._lr_scheduler_interval = lr_scheduler_interval
        self._lr_scheduler_monitor = lr_scheduler_monitor
        self._accumulated = 0
        self._losses_of_step = LossAverage(len(self.tasks))
        self._has_state = False
        self._steps = 0
        self._seed: int | None = None
        self._monitored: float | None = None
        self._has_validated = False
        self._in_batch = False
        self._counts_on_host: list[float] | None = None
        self._signals = DeferredSignals()
        # Losses may hold buffers of their own (class weights), which have to move with the module.
        self._losses = nn.ModuleList(task.loss for task in self.tasks if isinstance(task.loss, nn.Module))

    # --------------------------------------------------------------------------------------- to be overridden at will

    def unpack_batch(self, batch: Any) -> tuple[Any, dict[str, Tensor]]:
        """Return the inputs of the network and the targets, task name to tensor.

        Raises:
            ValueError: If the batch is not a pair.
        """
        if not isinstance(batch, Sequence) or len(batch) != 2:
            raise UserInputError(
                f"A batch should be `(inputs, targets)`. Found {type(batch).__name__}. Override `unpack_batch` for it."
            )
        inputs, targets = batch
        return inputs, targets

    def task_losses(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of each task in ``targets``, shape ``()``, for the outputs of one network.

        ``targets`` holds the tasks that have labels in this batch.
        """
        return {
            task.name: task.loss(outputs[task.name], targets[task.name]) for task in self.tasks if task.name in targets
        }

    # ------------------------------------------------------------------------------------------------------ contract

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the ``T`` tasks."""
        return tuple(task.name for task in self.tasks)

    def checked_losses(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of the tasks in ``targets``, in the order of the tasks, each of shape ``()``.

        They are float32, or float64 where a loss is.

        Raises:
            ValueError: If the outputs are no dict or lack a task, or a loss is no scalar tensor.
        """
        if not isinstance(outputs, Mapping):
            raise UserInputError(
                f"The network should return a dict, task name to prediction. Found {type(outputs).__name__}."
            )
        names = [name for name in self.task_names if name in targets]
        _check_names("The network's output", outputs, names)
        losses = self.task_losses(outputs, targets)
        _check_names("The result of `task_losses`", losses, names)
        for name in names:
            if not isinstance(losses[name], Tensor):
                kind = type(losses[name]).__name__
                raise UserInputError(f"The loss of task {name!r} should be a tensor, with its graph. Found {kind}.")
            if losses[name].ndim != 0:
                raise UserInputError(
                    f"The loss of task {name!r} should be a scalar. Found shape {tuple(losses[name].shape)}. "
                    "Use a reduction such as the mean."
                )
        return {name: losses[name].to(torch.promote_types(losses[name].dtype, torch.float32)) for name in names}

    def loss_vector(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """Return :meth:`checked_losses` as one tensor, shape ``(T',)``."""
        return torch.stack(list(self.checked_losses(outputs, targets).values()))

    def count_labels(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the number of labels of each task in the batch, float32, shape ``(T,)``.

        Raises:
            ValueError: If the targets are no dict, lack a task, or hold something else than tensors.
        """
        if not isinstance(targets, Mapping):
            raise UserInputError(f"The targets should be a dict, task name to tensor. Found {type(targets).__name__}.")
        _check_names("The targets", targets, self.task_names)
        for name in self.task_names:
            if not isinstance(targets[name], Tensor):
                kind = type(targets[name]).__name__
                raise UserInputError(f"The target of task {name!r} should be a tensor. Found {kind}.")
        counts = []
        for task in self.tasks:
            target = targets[task.name]
            # An override may count in Python.
            counts.append(torch.as_tensor(task.num_labels(target), dtype=torch.float32, device=target.device))
        return torch.stack(counts)

    @property
    def data_world_size(self) -> int:
        """How many ranks share the data of a step."""
        return self.trainer.world_size

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the labels while they are on the host, if to count them on the device would mean to wait for it."""
        self._counts_on_host = None
        is_training = self._trainer is not None and self.trainer.training
        if is_training and self._counts_ahead() and isinstance(batch, Sequence) and len(batch) == 2:
            # What is wrong is told in the step, and a loss may count with buffers that are on the device.
            with suppress(RuntimeError, ValueError):
                self._counts_on_host = self._counted(self.unpack_batch(batch)[1])
        return batch

    def _counted(self, targets: Any) -> list[float]:
        return self._presence(targets) or self.count_labels(targets).tolist()

    def _presence(self, targets: Any) -> list[float] | None:
        """Return a count of labels for each task that stands for all of them, if there is one.

        Where a batch is an update on one rank, its losses are the means already, and all that counts is whether there
        are labels. In most data the first sample tells; counting those of dense targets can take longer than a step.
        """
        is_whole = self.data_world_size == 1 and self.accumulate_batches == 1
        # An override may count otherwise than label by label.
        is_plain = type(self).count_labels is MultiTaskModule.count_labels and all(
            type(task).num_labels is Task.num_labels for task in self.tasks
        )
        if not is_whole or not is_plain or not isinstance(targets, Mapping):
            return None
        first = {
            name: target[:1] if isinstance(target, Tensor) and target.ndim else target
            for name, target in targets.items()
        }
        counts: list[float] = self.count_labels(first).tolist()
        return counts if all(counts) else None

    def _counts_ahead(self) -> bool:
        """Return whether the targets are on the host, and final, before the batch is on the device."""
        owners: list[Any] = [self, getattr(self.trainer, "datamodule", None)]
        hooks = ("transfer_batch_to_device", "on_after_batch_transfer")
        plain = (
            getattr(type(owner), hook) is getattr(DataHooks, hook)
            for owner in owners
            if owner is not None
            for hook in hooks
        )
        # An override of `unpack_batch` may need the device, or draw random numbers: it is called once.
        own = (type(self).unpack_batch.__module__, type(self).training_step.__module__)
        is_ours = all(str(name).startswith("mtl_lightning.") for name in own)  # what was executed has no module
        return self.device.type != "cpu" and is_ours and all(plain)

    def take_label_counts(self, targets: Mapping[str, Tensor]) -> list[float]:
        """Return the number of labels of each task in the batch in training; to be called once a batch."""
        counts, self._counts_on_host = self._counts_on_host, None
        # What was changed in place on the device was counted as it was before.
        is_known = counts is not None and all(isinstance(t, Tensor) and t._version == 0 for t in targets.values())
        return counts if counts is not None and is_known else self._counted(targets)

    def total_labels(self, counts: Sequence[float]) -> list[float]:
        """Return the number of labels of each task over all ranks."""
        if self.data_world_size == 1:
            return list(counts)
        # Training in half precision changes the default dtype, in which a count would be rounded.
        own = torch.tensor(counts, dtype=torch.float64, device=self.device)
        totals: list[float] = self.reduced(own, "sum").tolist()
        return totals

    def label_shares(self, counts: Sequence[float], totals: Sequence[float]) -> list[float]:
        """Return factors for the losses of a batch on this rank, by task, zero without labels.

        With them, the mean over ranks of the sum over batches is the mean over all labels, ``totals`` in number.
        """
        return [
            count * self.data_world_size / total if count else 0.0 for count, total in zip(counts, totals, strict=True)
        ]

    def reduced(self, tensor: Tensor, operation: Literal["mean", "sum"]) -> Tensor:
        """Return the mean or the sum of ``tensor`` over the ranks, equal on all of them; it may be changed."""
        if self.trainer.world_size == 1:
            return tensor
        # Lightning's reduction lets the ranks wait for each other first: one more exchange, for which the host waits.
        if operation == "mean":
            tensor = tensor / self.trainer.world_size  # before the sum, which could overflow in half precision
        with meeting(self.trainer.strategy):
            torch.distributed.all_reduce(tensor)
        return tensor

    # -------------------------------------------------------------------------------------------------- optimisation

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that the optimiser is made of."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def make_optimizer(self) -> Optimizer:
        """Return the optimiser of the trained parameters."""
        return self._optimizer(list(self.trained_parameters()))

    def configure_optimizers(self) -> Any:
        """Return the optimiser and, if there is one, the scheduler with its interval."""
        optimizer = self.make_optimizer()
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "`optimizer` should make an optimiser that steps along a given gradient, such as Adam. Found LBFGS, "
                "which evaluates the loss itself."
            )
        if self._lr_scheduler is None:
            return optimizer
        scheduler: dict[str, Any] = {
            "scheduler": self._lr_scheduler(optimizer),
            "interval": self._lr_scheduler_interval,
        }
        if isinstance(scheduler["scheduler"], ReduceLROnPlateau) and self._lr_scheduler_monitor is None:
            raise ValueError(
                "`ReduceLROnPlateau` needs `lr_scheduler_monitor`, the name of a logged metric. Found None."
            )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def configure_callbacks(self) -> list[Any]:
        """Refuse trainer flags that do not reach manual optimisation; see to checkpoints; add no callback."""
        # Lightning tells every user of a data module that the hook is that of the module; nobody has to act on it.
        warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer` in.*`LightningModule`.*")
        # Lightning refuses them as well, a little later, but cannot name our arguments.
        if self.trainer.gradient_clip_val is not None:
            raise MisconfigurationException(
                f"Gradients are clipped by `{type(self).__name__}(gradient_clip_norm=...)`. "
                f"Found `Trainer(gradient_clip_val={self.trainer.gradient_clip_val})`; remove it."
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"Gradients are accumulated by `{type(self).__name__}(accumulate_batches=...)`. "
                f"Found `Trainer(accumulate_grad_batches={self.trainer.accumulate_grad_batches})`; remove it."
            )
        if self.trainer.state.fn == "fit":
            check_callbacks(self)
        strategy = self.trainer.strategy
        is_plain = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
        if is_plain and type(strategy.checkpoint_io) is TorchCheckpointIO:  # else it is the user's choice
            strategy.checkpoint_io = AtomicCheckpointIO()
        return []

    def is_step_due(self) -> bool:
        """Count a batch whose gradients are ready; return whether the optimiser steps now."""
        self._accumulated += 1
        if self._accumulated < self.accumulate_batches and not self.trainer.is_last_batch:
            return False
        self._accumulated = 0
        return True

    def step_schedulers(self, interval: LRSchedulerInterval) -> None:
        """Step the schedulers of this interval, each as often as its configuration says; those that monitor wait."""
        count = self._steps if interval == "step" else self.current_epoch + 1
        for config in self.trainer.lr_scheduler_configs:
            due = config.interval == interval and count % config.frequency == 0
            if due and not isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step()

    def _step_plateau_schedulers(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if not isinstance(config.scheduler, ReduceLROnPlateau):
                continue
            value = self.trainer.callback_metrics.get(str(self._lr_scheduler_monitor), self._monitored)
            if value is None and self.trainer.enable_validation and not self._has_validated:
                continue  # it may be logged in the first validation, which is still to come
            if value is None:
                logged = ", ".join(sorted(self.trainer.callback_metrics)) or "none"
                raise MisconfigurationException(
                    "`lr_scheduler_monitor` should name a logged metric. "
                    f"Found {self._lr_scheduler_monitor!r}; logged are: {logged}."
                )
            config.scheduler.step(float(value))

    def finish_batch(self) -> None:
        """Count the batch; step the schedulers that go by epochs with the last one, before a checkpoint is written."""
        self.batches_seen += 1
        if self.trainer.is_last_batch:
            self.step_schedulers("epoch")
        self._in_batch = False

    def forget_step(self) -> None:
        """Forget the batches of a step that was not made, as those of a run that broke off.

        A subclass that keeps more than gradients and mean losses between batches forgets that as well.
        """
        self._accumulated = 0
        self._counts_on_host = None
        self._losses_of_step.reset()

    def on_fit_start(self) -> None:
        """Begin between two steps, or where a checkpoint was written; fix the seed of the run, the same on all ranks.

        The seed is that of ``seed_everything``, or a fresh one.
        """
        if not self._has_state:
            self.forget_step()
        self.zero_grad()  # gradients of a checkpoint are taken up later
        if self._seed is None:
            self._seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % 2**31))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the batch, so that what is random in it does not depend on where the run was started."""
        self._in_batch = True
        seed_generators(self.batch_seed(), self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let Lightning act on signals, now that a checkpoint is exact."""
        self._deliver_signals()

    def on_validation_end(self) -> None:
        """Let Lightning act on signals that came during the validation."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._deliver_signals()

    def on_train_end(self) -> None:
        """Let Lightning act on signals from now on."""
        with meeting(self.trainer.strategy):
            self._signals.release(self.device, self.trainer.world_size)

    def _deliver_signals(self) -> None:
        with meeting(self.trainer.strategy):
            self._signals.deliver(self.device, self.trainer.world_size)

    def batch_seed(self) -> int:
        """Return the seed of this batch on this rank."""
        assert self._seed is not None
        return mix_seed(self._seed, self.batches_seen * self.trainer.world_size + self.global_rank)

    def on_train_start(self) -> None:
        """Make up for a validation, and for the end of an epoch, that the checkpoint came before; hold back signals."""
        self._in_batch = False
        self._has_state = False
        with meeting(self.trainer.strategy):
            self._signals.hold(self.device, self.trainer.world_size)
        if missed_validation(self.trainer):
            make_up_for_validation(self.trainer)
        batches = self.trainer.fit_loop.epoch_loop
        if batches.restarted_on_train_batch_end and batches.batch_progress.is_last_batch:
            self._step_plateau_schedulers()

    def on_validation_epoch_end(self) -> None:
        """Remember what the schedulers monitor, for a checkpoint that is written before the epoch ends."""
        if self.trainer.sanity_checking:
            return
        self._has_validated = True
        value = self.trainer.callback_metrics.get(str(self._lr_scheduler_monitor))
        if value is not None:
            self._monitored = float(value)

    def on_train_epoch_end(self) -> None:
        """Step the schedulers that monitor a metric; the others have stepped with the last batch."""
        self._step_plateau_schedulers()

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients that are being accumulated when a validation comes between."""
        if not self._accumulated:
            super().on_validation_model_zero_grad()

    # --------------------------------------------------------------------------------------------------------- state

    def checkpoint_facts(self) -> dict[str, Any]:
        """Return what has to be the same in the module that loads a checkpoint of this one, with a name for each.

        Plain Python values only. Names and shapes of parameters and buffers need not be among them; an override adds
        what cannot be seen from these.
        """
        # A subclass may be renamed or moved, but what trains cannot be exchanged.
        kind = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("mtl_lightning."))
        return {"module": kind.__name__, "tasks": list(self.task_names)} | population_facts(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a ``state_dict``, after a check that it is that of such a module.

        Raises:
            CheckpointError: If the kind of the module, the tasks, or names or shapes differ, or another release of this
                package has written it in another format. The error names all that differs; ``strict=False`` allows
                for names.
        """
        check_record(state_dict, self.checkpoint_facts())
        try:
            loaded = super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            check_shapes(self, state_dict, strict, error)
            raise
        if state_dict["_extra_state"]["in_batch"]:
            rank_zero_warn(
                "A checkpoint should be written between two batches for a run to go on exactly. Found one from inside "
                "a batch, as an exception leaves it: part of that batch may be trained, and it is not repeated."
            )
        return loaded

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **arguments: Any,
    ) -> Any:
        """Return a module with the state of a checkpoint; see :meth:`LightningModule.load_from_checkpoint`.

        Args:
            checkpoint_path: The file, as a path, an address or an open file.
            map_location: See ``torch.load``.
            hparams_file: A file of arguments, where the checkpoint holds none.
            strict: Whether names have to agree.
            weights_only: ``False`` allows any pickle, which may run any code. The default does not.
            arguments: Arguments of the constructor that the checkpoint does not hold.

        Raises:
            CheckpointError: If the file cannot be read or is not that of such a module.
        """
        if weights_only is not False:
            # Before 2.6, Lightning reads any pickle here; and it cannot tell what is wrong with a file.
            read_checkpoint(checkpoint_path, map_location="meta")
            if not isinstance(checkpoint_path, str | Path):
                checkpoint_path.seek(0)
        known = inspect.signature(LightningModule.load_from_checkpoint).parameters
        if "weights_only" in known:
            arguments["weights_only"] = weights_only is not False
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, **arguments)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the counters and the seed, as part of the ``state_dict``."""
        return make_record(self.checkpoint_facts()) | {
            "batches_seen": self.batches_seen,
            "accumulated": self._accumulated,
            "steps": self._steps,
            "seed": self._seed,
            "monitored": self._monitored,
            "has_validated": self._has_validated,
            "in_batch": self._in_batch,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the counters and the seed of a checkpoint."""
        self._has_state = True
        self.batches_seen = state["batches_seen"]
        self._accumulated = state["accumulated"]
        self._steps = state["steps"]
        self._seed = state["seed"]
        self._monitored = state["monitored"]
        self._has_validated = state["has_validated"]


def check_count(name: str, value: int) -> None:
    """Raise an error unless ``value`` is an integer of at least one."""
    if not isinstance(value, int):
        raise TypeError(f"`{name}` should be an integer. Found {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` should be at least 1. Found {value}.")


def _check_names(what: str, found: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        raise UserInputError(
            f"{what} should hold every task. Missing: {', '.join(map(repr, missing))}; found: "
            f"{', '.join(map(repr, found)) or 'nothing'}."
        )
