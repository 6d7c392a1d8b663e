"""The losses of single tasks and their gradients, measured on a module in training without leaving a trace."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from mtl_lightning.protocols import TaskLossesProtocol
from mtl_lightning.seeds import mix_seed

LossesFn = Callable[[Any, Any], Mapping[str, Tensor]]
"""From the LightningModule and a batch to the loss of each task with labels in it, shape ``()``, with its graph."""

ParametersFn = Callable[[Any], Iterable[nn.Parameter]]
"""From the LightningModule to the parameters that the tasks share."""


class TaskGradients:
    """Takes the gradients of the tasks' losses on shared parameters.

    Nothing of the training changes: parameters, their ``grad``, buffers (batch-norm statistics), the train mode and the
    random numbers of torch, of its CUDA device, of NumPy and of Python are afterwards what they were. Every forward
    pass of one measurement sees the same random numbers (the same dropout), which depend on a seed and the rank alone,
    so that a resumed run measures what the uninterrupted one does. Neither DDP's reducer nor hooks on ``grad`` are
    triggered, since ``torch.autograd.grad`` is used; gradients and losses are averaged over the ranks that have the
    task, so all ranks have to measure at the same time, and have equal results.

    By default the shared parameters are those that at least two losses depend on. That is found out by one more
    backward pass for each task when it is first seen.

    Args:
        losses_fn: From module and batch to the losses; by default the module's ``batch_losses(batch)``
            (``mtl_lightning.protocols.TaskLossesProtocol``), or else its ``task_losses(batch)`` if that takes one
            argument. It should neither log nor update metrics. A loss that is not finite, or has no graph, counts as
            that of a task without labels in the batch.
        parameters_fn: From the module to the shared parameters; those that are frozen are left out.
    """

    def __init__(self, losses_fn: LossesFn | None = None, parameters_fn: ParametersFn | None = None) -> None:
        self.losses_fn = losses_fn
        self.parameters_fn = parameters_fn
        self._reach: dict[str, list[bool]] = {}
        self._candidates: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the module can be asked for its losses.

        Raises:
            ValueError: If not, or if the trainer shards the parameters.
        """
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError(
                "Gradients of single tasks should be measured with whole parameters on each rank, such as with "
                f"strategy='ddp'. Found {type(trainer.strategy).__name__}."
            )
        self._resolve(pl_module)

    @contextmanager
    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, seed: int
    ) -> Iterator[Measurement | None]:
        """Give the losses on ``batch`` and their gradients while the context is open, with random numbers by ``seed``.

        The value is None if fewer than two tasks have labels in the batch, on all ranks together.

        Raises:
            ValueError: If the losses are no mapping from names to scalars, or the tasks share no parameters.
        """
        losses_of, moment = self._resolve(pl_module), _Moment(pl_module, mix_seed(seed, trainer.global_rank))

        def forward() -> dict[str, Tensor]:
            with trainer.precision_plugin.train_step_context():
                return _checked(losses_of(batch))

        def forward_again() -> dict[str, Tensor]:
            with moment.again():
                return forward()

        with moment.again(), torch.enable_grad():
            losses = {name: loss for name, loss in forward().items() if loss.requires_grad and bool(loss.isfinite())}
            names = _union_over_ranks(trainer, list(losses))
            if len(names) < 2:
                yield None
                return
            parameters = self._shared_parameters(trainer, pl_module, losses, names)
            yield Measurement(trainer, pl_module, parameters, losses, names, forward_again)

    def _resolve(self, pl_module: pl.LightningModule) -> Callable[[Any], Mapping[str, Tensor]]:
        given = self.losses_fn
        if given is not None:
            return lambda batch: given(pl_module, batch)
        if callable(getattr(pl_module, "batch_losses", None)):
            return cast(TaskLossesProtocol, pl_module).batch_losses
        task_losses: Any = getattr(pl_module, "task_losses", None)
        if callable(task_losses) and len(inspect.signature(task_losses).parameters) == 1:
            return task_losses
        raise ValueError(
            "`losses_fn` should map the module and a batch to the losses of the tasks, unless the module has a method "
            "`batch_losses(batch)` (`mtl_lightning.protocols.TaskLossesProtocol`) or `task_losses(batch)`. "
            f"Found none, and a {type(pl_module).__name__}."
        )

    def _shared_parameters(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, losses: Mapping[str, Tensor], names: list[str]
    ) -> list[nn.Parameter]:
        if self.parameters_fn is not None:
            given = [parameter for parameter in self.parameters_fn(pl_module) if parameter.requires_grad]
            if not given:
                raise ValueError("`parameters_fn` should return parameters that are trained. Found none.")
            return given
        trained = {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        if list(trained) != self._candidates:  # layers were frozen or thawed since
            self._candidates, self._reach = list(trained), {}
        new = [name for name in names if name not in self._reach]
        if new:
            reached = torch.zeros(len(new), len(trained), device=pl_module.device)
            for row, name in zip(reached, new, strict=True):
                if name in losses:
                    row.copy_(_depends(losses[name], list(trained.values())))
            reached = trainer.strategy.reduce(reached, reduce_op="sum")
            self._reach |= dict(zip(new, (reached > 0).tolist(), strict=True))
        counts = [sum(reaches) for reaches in zip(*self._reach.values(), strict=True)]
        shared = [parameter for parameter, count in zip(trained.values(), counts, strict=True) if count >= 2]
        if not shared:
            raise ValueError(
                f"The tasks {list(self._reach)} should share trained parameters. Found none that get a gradient from "
                "two of them; name them with `parameters_fn`."
            )
        return shared


class Measurement:
    """The losses of one batch and their gradients on ``D`` shared parameters, averaged over ranks.

    All methods are collective. Everything is float32, or float64 where a shared parameter is.

    Attributes:
        names: The names of the ``T`` tasks that have labels in the batch on any rank.
        losses: Their losses, shape ``(T,)``.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        parameters: list[nn.Parameter],
        losses: Mapping[str, Tensor],
        names: list[str],
        forward_again: Callable[[], dict[str, Tensor]],
    ) -> None:
        self.names = names
        self._trainer, self._pl_module = trainer, pl_module
        self._parameters = parameters
        is_double = any(parameter.dtype == torch.float64 for parameter in parameters)
        self._dtype = torch.float64 if is_double else torch.float32
        self._local = losses
        self._forward_again = forward_again
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())  # in float16 small gradients would vanish
        present = torch.tensor([float(name in losses) for name in names], device=pl_module.device)
        self._num_ranks = trainer.strategy.reduce(present, reduce_op="sum")
        self.losses = self._mean(losses)

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of the loss of task ``name``, shape ``(D,)``."""
        if name in self._local:
            gradients = _gradients(self._local[name] * self._scale, self._parameters)
        else:
            gradients = [None] * len(self._parameters)
        pairs = zip(gradients, self._parameters, strict=True)
        flat = torch.cat(
            [
                (torch.zeros_like(parameter) if gradient is None else gradient).to(self._dtype).flatten()
                for gradient, parameter in pairs
            ]
        )
        total = self._trainer.strategy.reduce(flat, reduce_op="sum")
        return total.div_(self._scale * self._num_ranks[self.names.index(name)])

    def gramian(self) -> Tensor:
        """Return the inner products of the gradients of all tasks, shape ``(T, T)``."""
        gradients = [self.gradient(name) for name in self.names]
        # One by one, since a matrix product may be computed in TensorFloat-32, with three decimal digits.
        return torch.stack([torch.stack([torch.dot(first, second) for second in gradients]) for first in gradients])

    def losses_after(self, step: Tensor) -> Tensor:
        """Return the losses, shape ``(T,)``, after subtracting ``step``, shape ``(D,)``, from the shared parameters."""
        sizes = [parameter.numel() for parameter in self._parameters]
        originals = [parameter.data for parameter in self._parameters]
        try:
            # Other tensors take the place of the values, which are thus kept to the last bit; and the graph, which
            # still serves the other tasks, does not take this for a change of what it has saved.
            for parameter, original, part in zip(self._parameters, originals, torch.split(step, sizes), strict=True):
                parameter.data = original - part.view_as(original).to(original.dtype)
            with torch.no_grad():
                losses = self._forward_again()
        finally:
            for parameter, original in zip(self._parameters, originals, strict=True):
                parameter.data = original
        return self._mean({name: losses[name] for name in self._local})

    def _mean(self, losses: Mapping[str, Tensor]) -> Tensor:
        zero = torch.zeros((), device=self._pl_module.device)
        local = torch.stack([losses.get(name, zero).detach().to(self._dtype) for name in self.names])
        return self._trainer.strategy.reduce(local, reduce_op="sum") / self._num_ranks


class _Moment:
    """The buffers of a module at one moment, to which any number of forward passes can return; and a seed for them."""

    def __init__(self, pl_module: pl.LightningModule, seed: int) -> None:
        self._pl_module = pl_module
        self._seed = seed
        self._buffers = _buffers(pl_module)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Work on copies of the buffers and with the same random numbers, and leave both as they are now."""
        buffers, random_states = _buffers(self._pl_module), _random_states(self._pl_module.device)
        copies = {id(buffer): buffer.clone() for _, _, buffer in self._buffers}
        try:
            # Other tensors instead of other values: a graph may have saved the buffers that are there now.
            for module, name, buffer in self._buffers:
                setattr(module, name, copies[id(buffer)])
            _seed_all(self._seed, self._pl_module.device)
            yield
        finally:
            for module, name, buffer in buffers:
                setattr(module, name, buffer)
            _set_random_states(random_states, self._pl_module.device)


def _buffers(pl_module: pl.LightningModule) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, buffer) for module in pl_module.modules() for name, buffer in module.named_buffers(recurse=False)
    ]


def _seed_all(seed: int, device: torch.device) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which seeds all CUDA devices
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _random_states(device: torch.device) -> tuple[Any, ...]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device


def _set_random_states(states: tuple[Any, ...], device: torch.device) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3], device)


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


def _depends(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return on which parameters ``loss`` depends, booleans.

    Losses that were stacked and taken apart again have all parameters in their graph, and a head that starts at zero
    has a zero gradient on all layers below it. Where NaN arrives there is a path, for zero times NaN is NaN.
    """
    with torch.autograd.set_detect_anomaly(False):
        gradients = torch.autograd.grad(
            loss, parameters, torch.full_like(loss, torch.nan), retain_graph=True, allow_unused=True
        )
    unused = torch.zeros((), dtype=torch.bool, device=loss.device)
    return torch.stack([unused if gradient is None else gradient.isnan().any() for gradient in gradients])


def _checked(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(losses, Mapping):
        raise ValueError(f"The losses should be a mapping, task name to loss. Found {type(losses).__name__}.")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"The loss of task {name!r} should be a tensor of shape (). Found {found}.")
    return dict(losses)


def _union_over_ranks(trainer: pl.Trainer, names: list[str]) -> list[str]:
    """Return the names that any rank has, in the same order on all ranks."""
    if trainer.world_size == 1:
        return names
    gathered: list[list[str]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(gathered, names)
    return list(dict.fromkeys(name for part in gathered for name in part))
