"""MT2O: multi-task learning with multi-task optimisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_lightning.elementwise import ignores_parameters
from mtl_lightning.growth import Growth
from mtl_lightning.mixing import Mixing
from mtl_lightning.modules.base import LRSchedulerCallable, LRSchedulerInterval, OptimizerCallable, check_count
from mtl_lightning.modules.population import Part, PopulationModule, check_kinds
from mtl_lightning.population import Chunk, Compiler
from mtl_lightning.preferences import check_preferences
from mtl_lightning.scalarization import Linear, Scalarization
from mtl_lightning.task import Task
from mtl_lightning.transfer import NeighborTransfer, TransferContext, TransferRule, check_matrix


class MT2OModule(PopulationModule):
    r"""A population of scalarised subproblems, one per preference vector, trained jointly with parameter transfer.

    Subproblem ``i`` minimises ``F_i(theta) = s(w_i, f_1(theta), ..., f_T(theta))``. One step, for all at once, is

        ``theta_i <- sum_j m_ij theta_j + Delta_i,    m_ij >= 0,  sum_j m_ij = 1``

    with gradients taken at the unmixed ``theta_i`` and ``Delta_i`` what the optimiser would add, so that the transfer
    is decoupled from momentum and moments. One run yields ``P`` models spread along the Pareto front.

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor. Its state is copied.
        tasks: The ``T >= 2`` tasks.
        preferences: One preference vector per subproblem, shape ``(P, T)``, on the simplex; a tensor or nested lists.
        optimizer: From parameters to an element-wise optimiser, such as
            ``functools.partial(torch.optim.Adam, lr=1e-3)``.
        scalarization: ``s``; :class:`~mtl_lightning.scalarization.Linear` by default, which cannot reach the concave
            parts of a front; the Chebyshev family can.
        transfer: Gives ``M``; :class:`~mtl_lightning.transfer.NeighborTransfer` by default.
        growth: Start with fewer subproblems and split them; see :mod:`mtl_lightning.growth`. All from the start by
            default.
        lr_scheduler: From the optimiser to a scheduler.
        lr_scheduler_interval: Whether it is stepped after each epoch or after each optimiser step.
        lr_scheduler_monitor: The logged metric that ``ReduceLROnPlateau`` reads.
        gradient_clip_norm: The largest norm of the gradient of each subproblem.
        accumulate_batches: Over how many batches gradients are averaged before a step.
        transfer_every: A transfer happens at the first step after this many batches.
        transfer_parameters: Shell patterns (``"encoder.*"``) of the parameters and buffers that are transferred; all by
            default.
        init: ``"common"``, or ``"independent"`` through ``reset_parameters``.
        batches: ``"shared"``: every subproblem sees the whole batch. ``"independent"``: each sees its own slice of it,
            so that mixing averages gradient noise; make the batch ``P`` times larger. What remains of a batch when it
            is divided by the number of subproblems is left out.
        on_nonfinite: What becomes of a subproblem whose loss, gradient or parameters are not finite. It is left out of
            every transfer and its gradient is dropped at once. At the next batch, or on a GPU at the one after that:
            ``"reseed"`` copies its nearest healthy neighbour, with the state of the optimiser; ``"freeze"`` trains it
            no further; ``"raise"`` stops the run.
        backend: ``"vmap"``, ``"loop"``, or ``"auto"``, which times both on the first batch; see
            :class:`~mtl_lightning.population.Population`.
        chunk_size: How many subproblems share one backward pass under vmap.
        compiler: Compiles the evaluation of the network, such as ``torch.compile``; see
            :class:`~mtl_lightning.population.Population`.

    Attributes:
        population: The subproblems, a :class:`~mtl_lightning.population.Population`.

    Raises:
        ValueError: If the preferences are not on the simplex or do not have one column per task, the tasks are fewer
            than two or share a name, or an argument is out of range; when training is set up, if the optimiser is not
            element-wise.
        TypeError: If an argument is of the wrong kind.

    Note:
        Logged are ``train_loss`` and ``train_loss/<task>``, ``val_loss``, ``val_loss/<task>`` and
        ``val_<metric>/<task>`` (means over the subproblems), and in a test also ``test_<...>/<task>/<index>`` of each
        subproblem. With several validation loaders the means are over all of them together.

        What torch's element-wise optimisers without weight decay add does not depend on the parameters. These are then
        mixed in place within the step, when all hooks have had their turn. With weight decay, hooks of the optimiser
        or another optimiser, what the transfer adds is computed before the step and added after it, in the memory of
        one more copy of the parameters.

        Limits: the trainable parameters share one dtype and one set of optimiser hyper-parameters. ``backend="auto"``
        may choose differently from run to run, which changes results in the last digits; a resumed run keeps the
        choice.

    References:
        L. Bai, A. Gupta, Y.-S. Ong, "Multi-Task Learning with Multi-Task Optimization", arXiv 2403.16162. The rules and
        defaults of transfer, growth, independent batches and the care for failed subproblems are this library's.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from mtl_lightning.networks import MLP, MultiHeadNetwork
        >>> from mtl_lightning.preferences import simplex_lattice
        >>> network = MultiHeadNetwork(MLP(8, [16]), {"price": torch.nn.Linear(16, 1), "risk": torch.nn.Linear(16, 1)})
        >>> module = MT2OModule(
        ...     network=network,
        ...     tasks=[Task("price", torch.nn.MSELoss()), Task("risk", torch.nn.L1Loss())],
        ...     preferences=simplex_lattice(num_tasks=2, num_divisions=4),
        ...     optimizer=partial(torch.optim.Adam, lr=1e-3),
        ... )
        >>> {name: tuple(outputs.shape) for name, outputs in module(torch.ones(3, 8)).items()}
        {'price': (5, 3, 1), 'risk': (5, 3, 1)}
        >>> type(module.select((0.3, 0.7))).__name__
        'MultiHeadNetwork'
    """

    def __init__(
        self,
        network: nn.Module,
        tasks: Sequence[Task],
        preferences: Tensor | list[list[float]],
        optimizer: OptimizerCallable,
        scalarization: Scalarization | None = None,
        transfer: TransferRule | None = None,
        growth: Growth | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: LRSchedulerInterval = "epoch",
        lr_scheduler_monitor: str | None = None,
        gradient_clip_norm: float | None = None,
        accumulate_batches: int = 1,
        transfer_every: int = 1,
        transfer_parameters: Sequence[str] | None = None,
        init: Literal["common", "independent"] = "common",
        batches: Literal["shared", "independent"] = "shared",
        on_nonfinite: Literal["reseed", "freeze", "raise"] = "reseed",
        backend: Literal["auto", "vmap", "loop"] = "auto",
        chunk_size: int | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        check_kinds(("scalarization", scalarization, Scalarization | None), ("transfer", transfer, TransferRule | None))
        super().__init__(
            network=network,
            tasks=tasks,
            preferences=preferences,
            optimizer=optimizer,
            growth=growth,
            lr_scheduler=lr_scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            lr_scheduler_monitor=lr_scheduler_monitor,
            gradient_clip_norm=gradient_clip_norm,
            accumulate_batches=accumulate_batches,
            init=init,
            batches=batches,
            on_nonfinite=on_nonfinite,
            backend=backend,
            chunk_size=chunk_size,
            compiler=compiler,
        )
        check_count("transfer_every", transfer_every)
        if isinstance(transfer_parameters, str):
            raise TypeError(f"`transfer_parameters` should be a list of patterns. Found {transfer_parameters!r}.")
        self.scalarization = Linear() if scalarization is None else scalarization
        every = check_preferences(preferences, num_tasks=len(self.tasks))
        self.scalarization(every, every)  # an ideal point of the wrong length is refused here
        self.transfer = NeighborTransfer() if transfer is None else transfer
        self.transfer_every = transfer_every
        self.population.columns(transfer_parameters)  # a pattern that matches nothing is refused here
        self._transfer_parameters = transfer_parameters
        self._transfers = 0
        self._transferred_at = 0
        self._matrix_checked = False
        self._mixing: Mixing | None = None
        self._mix: Callable[[], None] | None = None  # within a step

    def add_gradients(self, chunk: Chunk, part: Part) -> Tensor:
        """Add the gradients of the objectives ``F_i`` at the unmixed parameters; return the losses, ``(c, T')``.

        Over several ranks the scalarisation is applied to the losses of the whole batch, as in one process: its slopes
        there weigh the losses of the ranks, whose gradients are averaged before the step.
        """
        preferences = part.preferences[chunk.members]
        losses, values = self.losses_in_ranks(chunk, part)
        if self.data_world_size == 1:
            assert losses is not None
            objectives = self.scalarization(losses, preferences, tasks=part.tasks)
            self.manual_backward(objectives.sum() / self.accumulate_batches)
            return values
        leaf = values.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(self.scalarization(leaf, preferences, tasks=part.tasks).sum(), leaf)
        if losses is not None:
            mine = [part.tasks.index(task) for task in part.own]
            self.manual_backward((slopes[:, mine] * losses).sum() / self.accumulate_batches)
        return values

    def before_gradients(self, is_last: bool) -> None:
        """Send the parameters off if a transfer follows; they travel while the gradients are computed."""
        if is_last and self._is_transfer_due():
            self._prepared_mixing().start()

    def update_parameters(self, losses: Tensor, tasks: tuple[int, ...], step: Any) -> None:
        """``theta_i <- sum_j m_ij theta_j + Delta_i``."""
        if not self._is_transfer_due():
            step()
        else:
            mixing, mixed = self._prepared_mixing(), None
            # Under autocast the product would be of half precision, and its rows would no longer sum to one.
            with torch.autocast(self.population.theta.device.type, enabled=False):
                rows = mixing.receive()
                matrix = self._transfer_matrix(losses, tasks, rows)
                mix = partial(mixing.mix, rows, matrix, self._healthy)
                if not ignores_parameters(self._torch_optimizer):
                    mixed = mixing.step(rows, matrix, self._healthy)
            # What the optimiser adds may be the same before and after mixing; then it is done in place.
            with self._mixing_in_step(mix if mixed is None else None):
                step()
            with torch.autocast(self.population.theta.device.type, enabled=False):
                if mixed is not None:
                    mixing.add(mixed)
                    self._count_transfer()
                mixing.mix_buffers(matrix, self._healthy)
        self.scalarization.observe(losses.masked_fill(~self._healthy.unsqueeze(1), torch.nan))

    @contextmanager
    def _mixing_in_step(self, mix: Callable[[], None] | None) -> Iterator[None]:
        """Let the step mix the parameters when all hooks have had their turn, so that they find those of before."""
        self._mix = mix
        try:
            yield
            if self._mix is not None:
                raise RuntimeError(
                    "`on_before_optimizer_step` of a subclass should call that of `MT2OModule`, which transfers "
                    "parameters. Found that it was not called. Add `super().on_before_optimizer_step(optimizer)`."
                )
        finally:
            self._mix = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients; mix the parameters if it is time."""
        super().on_before_optimizer_step(optimizer)
        if self._mix is not None:
            with torch.autocast(self.population.theta.device.type, enabled=False):
                self._mix()
            self._mix = None
            self._count_transfer()

    def _count_transfer(self) -> None:
        self._transfers += 1
        self._transferred_at = self.batches_seen + 1

    def mixes_parameters(self) -> bool:
        """Return whether a transfer is due."""
        return self._is_transfer_due()

    def _is_transfer_due(self) -> bool:
        batch = self.batches_seen + 1
        due = batch // self.transfer_every > self._transferred_at // self.transfer_every
        return due and self.shards.size > 1 and not self.transfer.is_over(self._transfers, self.population.theta.dtype)

    def _prepared_mixing(self) -> Mixing:
        if self._mixing is None:
            givers = self.transfer.givers(self.preferences)
            self._mixing = Mixing(self.population, self.shards, givers, self._transfer_parameters)
        return self._mixing

    def _transfer_matrix(self, losses: Tensor, tasks: tuple[int, ...], rows: Tensor) -> Tensor:
        parameters: Tensor | None = self.population.theta.detach()
        if self.shards.is_spread:
            parameters = rows if len(rows) == self.shards.size else None
        matrix: Tensor = self.transfer(
            TransferContext(
                preferences=self.preferences,
                losses=losses,
                parameters=parameters,
                step=self._transfers,
                learning_rate=float(self._torch_optimizer.param_groups[0]["lr"]),
                healthy=self._healthy,
                tasks=tasks,
                scalarization=self.scalarization,
            )
        )
        if not self._matrix_checked:  # once: it waits for the device
            check_matrix(matrix, self.shards.size, self.transfer)
            self._matrix_checked = True
        return matrix

    def on_fit_start(self) -> None:
        """Forget what was prepared for the device, and for the preferences, of an earlier run."""
        super().on_fit_start()
        self._mixing = None

    def on_replaced(self, subproblems: Sequence[int] | None) -> None:
        """Let the rule forget what it measured on them."""
        self.transfer.reset(subproblems)

    def _placed(self, group: Any) -> None:
        super()._placed(group)
        self._mixing = None
        self._matrix_checked = False

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on and is not a parameter or a buffer."""
        return super().get_extra_state() | {"transfers": self._transfers, "transferred_at": self._transferred_at}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        super().set_extra_state(state)
        self._transfers = state["transfers"]
        self._transferred_at = state["transferred_at"]
