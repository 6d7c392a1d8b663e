"""A population whose subproblems weigh the gradients of their tasks: MGDA, Pareto MTL, exact Pareto optimal search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtl_lightning.aggregation import gramian
from mtl_lightning.gradient_weighting import GradientWeighting
from mtl_lightning.modules.base import LRSchedulerCallable, LRSchedulerInterval, OptimizerCallable
from mtl_lightning.modules.gradient import described
from mtl_lightning.modules.population import Part, PopulationModule
from mtl_lightning.population import Chunk
from mtl_lightning.task import Task


class GradientPopulationModule(PopulationModule):
    r"""``P`` networks, one per preference vector, each along a weighted sum of its tasks' gradients.

    In each step subproblem ``i`` takes the gradients ``g_t`` of its ``T`` losses, a rule turns their products into
    weights, and the optimiser steps along

        ``sum_t w_t(G_i, f_i, r_i) g_t,    G_i = (<g_s, g_t>)``

    The rules are :class:`~mtl_lightning.mgda.MGDA`, from ``P`` starts, :class:`~mtl_lightning.pareto_mtl.ParetoMTL` and
    :class:`~mtl_lightning.exact_pareto.EPO`. Nothing is transferred among the subproblems. For ``P`` scalarised runs,
    whose weights do not look at gradients, take :class:`~mtl_lightning.modules.mt2o.MT2OModule` with ``NoTransfer()``.

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor. Its state is copied.
        tasks: The ``T >= 2`` tasks.
        preferences: One preference vector per subproblem, shape ``(P, T)``, on the simplex; a tensor or nested lists.
            What they mean is up to the rule: with ``EPO`` a large one makes for a small loss, with ``ParetoMTL`` for a
            large share of the losses, and ``MGDA`` only counts them.
        optimizer: From parameters to an element-wise optimiser, such as
            ``functools.partial(torch.optim.Adam, lr=1e-3)``.
        weighting: The rule.
        lr_scheduler: From the optimiser to a scheduler.
        lr_scheduler_interval: Whether it is stepped after each epoch or after each optimiser step.
        lr_scheduler_monitor: The logged metric that ``ReduceLROnPlateau`` reads.
        gradient_clip_norm: The largest norm of the weighted gradient of each subproblem.
        accumulate_batches: Over how many batches the gradients of the tasks are averaged before they are weighed.
        init: ``"independent"``: every subproblem draws its own start through ``reset_parameters``, as in the papers.
            ``"common"``: all start from the network's parameters; under MGDA they would never part.
        on_nonfinite: What becomes of a subproblem whose loss, gradient or parameters are not finite: ``"reseed"``
            copies its nearest healthy neighbour, ``"freeze"`` trains it no further, ``"raise"`` stops the run.
        backend: ``"vmap"``, ``"loop"``, or ``"auto"``, which times both on the first batch; see
            :class:`~mtl_lightning.population.Population`.
        chunk_size: How many subproblems share one graph under vmap.

    Attributes:
        population: The subproblems, a :class:`~mtl_lightning.population.Population`.

    Raises:
        ValueError: If the preferences are not on the simplex or do not have one column per task, the tasks are fewer
            than two or share a name, or an argument is out of range; when training is set up, if the optimiser is not
            element-wise.
        TypeError: If an argument is of the wrong kind.

    Note:
        The gradients are those in all parameters that are trained, the heads among them. A step costs one forward and
        ``T`` backward passes of every subproblem, and memory for the gradients of all tasks, ``P T D`` numbers. Ranks
        average these before anything is decided, and the rule sees the losses over all ranks. Tasks without labels in
        the batches of a step take no part in it.

        What is logged is what :class:`~mtl_lightning.modules.mt2o.MT2OModule` logs, and its limits hold here.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from mtl_lightning.exact_pareto import EPO
        >>> from mtl_lightning.networks import MLP, MultiHeadNetwork
        >>> from mtl_lightning.preferences import simplex_lattice
        >>> network = MultiHeadNetwork(MLP(8, [16]), {"price": torch.nn.Linear(16, 1), "risk": torch.nn.Linear(16, 1)})
        >>> module = GradientPopulationModule(
        ...     network=network,
        ...     tasks=[Task("price", torch.nn.MSELoss()), Task("risk", torch.nn.L1Loss())],
        ...     preferences=simplex_lattice(num_tasks=2, num_divisions=4),
        ...     optimizer=partial(torch.optim.SGD, lr=1e-2),
        ...     weighting=EPO(),
        ... )
        >>> {name: tuple(outputs.shape) for name, outputs in module(torch.ones(3, 8)).items()}
        {'price': (5, 3, 1), 'risk': (5, 3, 1)}
    """

    def __init__(
        self,
        network: nn.Module,
        tasks: Sequence[Task],
        preferences: Tensor | list[list[float]],
        optimizer: OptimizerCallable,
        weighting: GradientWeighting,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: LRSchedulerInterval = "epoch",
        lr_scheduler_monitor: str | None = None,
        gradient_clip_norm: float | None = None,
        accumulate_batches: int = 1,
        init: Literal["common", "independent"] = "independent",
        on_nonfinite: Literal["reseed", "freeze", "raise"] = "reseed",
        backend: Literal["auto", "vmap", "loop"] = "auto",
        chunk_size: int | None = None,
    ) -> None:
        if not isinstance(weighting, GradientWeighting):
            raise TypeError(
                "`weighting` should be an object of GradientWeighting, such as `mtl_lightning.mgda.MGDA()`. "
                f"Found {described(weighting)}."
            )
        super().__init__(
            network=network,
            tasks=tasks,
            preferences=preferences,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            lr_scheduler_monitor=lr_scheduler_monitor,
            gradient_clip_norm=gradient_clip_norm,
            accumulate_batches=accumulate_batches,
            init=init,
            on_nonfinite=on_nonfinite,
            backend=backend,
            chunk_size=chunk_size,
        )
        self.weighting = weighting
        self._jacobian: Tensor | None = None

    def add_gradients(self, chunk: Chunk, part: Part) -> Tensor:
        """Add the gradients of each task to those kept for the step; return the losses, ``(c, T')``."""
        jacobian, theta = self._jacobian_of_step(), self.population.theta
        losses, values = self.losses_in_ranks(chunk, part)
        if losses is None:
            return values
        assert theta.grad is not None
        chunk.complete()
        gradient = theta.grad[chunk.members]  # a view of zeros, which a backward pass adds to
        for column, task in enumerate(part.own):
            is_last = column == len(part.own) - 1
            self.manual_backward(losses[:, column].sum() / self.accumulate_batches, retain_graph=not is_last)
            jacobian[chunk.members, task] += gradient
            gradient.zero_()
        return values

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Average the gradients of the tasks over the ranks, and write their weighted sum to ``theta.grad``."""
        jacobian = self._jacobian_of_step()
        if self.data_world_size > 1:
            jacobian.copy_(self.reduced(jacobian, "mean"))
        tasks = list(self._losses_of_step.tasks)
        gradient = self.population.theta.grad
        assert gradient is not None
        weights = self._weights(jacobian, self._losses_of_step.compute(), tasks).to(gradient)
        for column, task in enumerate(tasks):
            gradient.addcmul_(weights[:, column : column + 1], jacobian[:, task])
        jacobian.zero_()

    def _jacobian_of_step(self) -> Tensor:
        """Return the gradients of the tasks for the subproblems of this process, to be added to, ``(p, T, D)``."""
        if self._jacobian is None:
            theta = self.population.theta.detach()
            self._jacobian = theta.new_zeros(len(theta), len(self.tasks), theta.shape[1])
        return self._jacobian

    def _weights(self, jacobian: Tensor, losses: Tensor, tasks: list[int]) -> Tensor:
        """Return the weights of some tasks for the subproblems of this process, shape ``(p, T')``, on the host.

        Args:
            jacobian: Their gradients, shape ``(p, T, D)``.
            losses: Their losses, shape ``(p, T)``.
            tasks: The tasks that have any.
        """
        size = len(self.tasks)
        own = jacobian.new_zeros(len(jacobian), 1 + size, size, dtype=torch.float64)
        own[:, 0] = losses
        for row, gradients in zip(own, jacobian, strict=True):
            row[1:] = gramian(gradients)
        # The rules work on the host: one wait for the device, on which a choice among tasks would be one each.
        statistics = self.shards.gather(own).cpu()[:, :, tasks]
        known, products = statistics[:, 0], statistics[:, 1:][:, tasks]
        # A subproblem that failed has no say. Its gradient stays as it is, for the check that follows to find it.
        sound = known.isfinite().all(dim=1) & products.isfinite().all(dim=2).all(dim=1)
        known = torch.where(sound.unsqueeze(1), known, 1.0)
        products = torch.where(sound[:, None, None], products, torch.eye(len(tasks), dtype=products.dtype))
        preferences = self.preferences.to(statistics)[:, tasks]
        return self.weighting.weights(products, known, preferences, step=self._steps)[self.shards.members]

    def forget_step(self) -> None:
        """Forget the gradients of a step that was not made."""
        super().forget_step()
        self._jacobian = None

    def on_train_start(self) -> None:
        """Take up the gradients of the tasks that a checkpoint holds."""
        if self._pending_gradient is not None:
            self._jacobian = self._pending_gradient.to(self.population.theta)
            self._pending_gradient = None
        super().on_train_start()

    def on_train_end(self) -> None:
        """Give back the memory of the gradients, unless they wait for further batches."""
        if not self._accumulated:
            self._jacobian = None

    def _placed(self, group: Any) -> None:
        super()._placed(group)
        self._jacobian = None

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on and is not a parameter or a buffer."""
        gradient = self._jacobian if self._accumulated else None
        return super().get_extra_state() | {
            "gradient": gradient if self._pending_gradient is None else self._pending_gradient
        }
