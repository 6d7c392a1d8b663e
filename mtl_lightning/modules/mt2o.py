"""MT2O: multi-task learning with multi-task optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from mtl_lightning.elementwise import check_elementwise
from mtl_lightning.growth import Growth, Stage
from mtl_lightning.modules.averaging import LossAverage
from mtl_lightning.modules.base import (
    LRSchedulerCallable,
    LRSchedulerInterval,
    MultiTaskModule,
    OptimizerCallable,
    check_count,
)
from mtl_lightning.modules.evaluation import PopulationEvaluation
from mtl_lightning.population import Chunk, Population, UserInputError
from mtl_lightning.preferences import check_preferences
from mtl_lightning.scalarization import Linear, Scalarization
from mtl_lightning.task import Task
from mtl_lightning.transfer import NeighborTransfer, NoTransfer, TransferContext, TransferRule, check_matrix


class MT2OModule(MultiTaskModule):
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
            every transfer and its gradient is dropped at once. At the next batch: ``"reseed"`` copies its nearest
            healthy neighbour, with the state of the optimiser; ``"freeze"`` trains it no further; ``"raise"`` stops
            the run.
        backend: ``"vmap"``, ``"loop"``, or ``"auto"``, which times both on the first batch; see
            :class:`~mtl_lightning.population.Population`.
        chunk_size: How many subproblems share one backward pass under vmap.

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
        preferences = check_preferences(preferences, num_tasks=len(self.tasks))
        check_count("transfer_every", transfer_every)
        for argument, given, kind in (
            ("network", network, nn.Module),
            ("scalarization", scalarization, Scalarization | None),
            ("transfer", transfer, TransferRule | None),
            ("growth", growth, Growth | None),
        ):
            if not isinstance(given, kind):
                raise TypeError(f"`{argument}` should be an object of {kind}. Found {given!r}.")
        if isinstance(transfer_parameters, str):
            raise TypeError(f"`transfer_parameters` should be a list of patterns. Found {transfer_parameters!r}.")
        for name, value, choices in (
            ("batches", batches, ("shared", "independent")),
            ("on_nonfinite", on_nonfinite, ("reseed", "freeze", "raise")),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` should be one of {', '.join(map(repr, choices))}. Found {value!r}.")
        if growth is not None and init == "independent":
            raise ValueError("With `growth` children inherit from their parents: `init` should be 'common'.")
        self.scalarization = Linear() if scalarization is None else scalarization
        self.scalarization(preferences, preferences)  # an ideal point of the wrong length is refused here
        self.transfer = NeighborTransfer() if transfer is None else transfer
        self.growth = growth
        self.transfer_every = transfer_every
        self.batches = batches
        self.on_nonfinite = on_nonfinite

        self._stages = [Stage(preferences, ())] if growth is None else growth.stages(preferences)
        self._stage = 0
        size = len(self._stages[0].preferences)
        self.population = Population(network, size, init=init, backend=backend, chunk_size=chunk_size)
        self._columns = self.population.columns(transfer_parameters)
        self._transfer_parameters = transfer_parameters

        self._transfers = 0
        self._transferred_at = 0
        self._timed_size: int | None = None
        self._frozen: tuple[int, ...] = ()
        self._losses_of_step = LossAverage(len(self.tasks))
        self._matrix_checked = False
        self._pending_gradient: Tensor | None = None
        self._final_values: Tensor | None = None
        self._final_metrics: dict[str, Tensor] = {}
        self._evaluation = PopulationEvaluation(self.tasks, size)
        self._evaluated = False
        self._live = self._stages[0].preferences
        self._healthy: Tensor
        self.register_buffer("_healthy", torch.ones(size, dtype=torch.bool), persistent=False)

    # ------------------------------------------------------------------------------------------------ what users read

    @property
    def preferences(self) -> Tensor:
        """The preference vectors of the live subproblems, shape ``(P, T)``."""
        # No buffer: half precision would round it with the parameters.
        if self._live.device != self.device:
            self._live = self._live.to(self.device)
        return self._live

    @property
    def objective_values(self) -> Tensor:
        """The mean loss of each subproblem on each task in the latest validation or test, shape ``(P, T)``.

        The first read after a validation reduces over ranks, so every rank has to read it.

        Raises:
            RuntimeError: Before the first validation.
        """
        self._finish_evaluation()
        if self._final_values is None:
            raise RuntimeError("`objective_values` are known after a validation. Found none; call `Trainer.validate`.")
        return self._final_values

    @property
    def metric_values(self) -> Mapping[str, Tensor]:
        """The metrics of the latest validation, ``<metric>/<task>`` to one value per subproblem, shape ``(P,)``."""
        self._finish_evaluation()
        return self._final_metrics

    def subproblem(self, index: int) -> nn.Module:
        """Return a copy of subproblem ``index`` as a plain module, with the ``state_dict`` keys of the original."""
        return self.population.member(index)

    def select(self, preference: Tensor | Sequence[float]) -> nn.Module:
        """Return the subproblem with the preference nearest to ``preference``, shape ``(T,)``, as a plain module.

        Raises:
            ValueError: If ``preference`` is not on the simplex.
        """
        wanted = check_preferences(torch.as_tensor(preference).unsqueeze(0), num_tasks=len(self.tasks))
        distances = (self.preferences - wanted.to(self.preferences)).norm(dim=1)
        return self.subproblem(int(distances.argmin()))

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Return the predictions of all subproblems, task name to tensor of shape ``(P, B, ...)``."""
        outputs: dict[str, Tensor] = self.population(inputs)
        return outputs

    # ------------------------------------------------------------------------------------------------------- training

    def on_train_epoch_end(self) -> None:
        """Look after subproblems that failed in the last batch; step the schedulers that monitor a metric."""
        self._heal()
        super().on_train_epoch_end()

    def on_train_start(self) -> None:
        """Take up the gradients that a checkpoint holds; Lightning zeroes gradients between loading and here.

        Raises:
            RuntimeError: If layers of the network were replaced after the population was made.
        """
        self.population.check_structure()
        if self._pending_gradient is not None:
            self.population.theta.grad = self._pending_gradient.to(self.population.theta)
            self._pending_gradient = None
        # It was loaded before the module was moved.
        self._losses_of_step.load_state_dict(self._losses_of_step.state_dict(), self.device)
        super().on_train_start()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do one step of MT2O."""
        inputs, targets = self.unpack_batch(batch)
        labels = self.count_labels(targets)
        self._heal()
        self._grow()
        own, tasks, shares = self._shares(labels)
        if tasks:
            losses = self._backward(inputs, targets, own, tasks, shares)
            self._losses_of_step.update(losses, tasks)
            self._log_training(losses, tasks, batch_idx)
        if self.is_step_due() and self._losses_of_step.tasks:
            self._step(self._losses_of_step.compute(), self._losses_of_step.tasks)
            self._losses_of_step.reset()
            assert self.population.theta.grad is not None
            self.population.theta.grad.zero_()
        self.finish_batch()

    def _shares(self, labels: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
        """Return the tasks with labels here, those with labels on any rank, and the weights of this rank's losses.

        The mean over ranks of the weighted losses is the mean over all labels, shape ``(T,)``.
        """
        total = self.reduced(labels.clone(), "sum")
        here, anywhere = torch.stack([labels, total]).tolist()  # waits for the device
        shares = labels * self.trainer.world_size / total.clamp(min=1.0)
        own = tuple(task for task, count in enumerate(here) if count)
        return own, tuple(task for task, count in enumerate(anywhere) if count), shares

    def _backward(
        self, inputs: Any, targets: Mapping[str, Tensor], own: tuple[int, ...], tasks: tuple[int, ...], shares: Tensor
    ) -> Tensor:
        """Add the gradients of all ``F_i`` at the unmixed parameters; return the task losses, ``(P, T)``.

        Args:
            inputs: The inputs of this rank.
            targets: The targets of this rank.
            own: The tasks with labels on this rank.
            tasks: The tasks with labels on any rank.
            shares: The weights of this rank's losses, shape ``(T,)``.
        """
        targets = {self.task_names[task]: targets[self.task_names[task]] for task in own}
        independent = self.batches == "independent"
        if independent:
            cut = partial(_sliced, size=self.population.size)
            inputs, targets = pytree.tree_map_only(Tensor, cut, (inputs, targets))
        self._choose_backend(inputs, targets, independent)

        losses = torch.full((self.population.size, len(self.tasks)), torch.nan, device=self.device, dtype=torch.float32)
        preferences = self.preferences[:, list(tasks)]
        for chunk in self.population.chunks():
            if self.trainer.world_size == 1:
                values = chunk.evaluate(self.loss_vector, inputs, targets, independent)
                objectives = self.scalarization(values, preferences[chunk.members], tasks=tasks)
                self.manual_backward(objectives.sum() / self.accumulate_batches)
            else:
                values = self._backward_over_ranks(
                    chunk, inputs, targets, independent, own, tasks, shares, preferences[chunk.members]
                )
            losses[chunk.members, list(tasks)] = values.detach().to(losses)
        return losses

    def _backward_over_ranks(
        self,
        chunk: Chunk,
        inputs: Any,
        targets: Any,
        independent: bool,
        own: tuple[int, ...],
        tasks: tuple[int, ...],
        shares: Tensor,
        preferences: Tensor,
    ) -> Tensor:
        """Add this rank's part of the gradients of some ``F_i``; return their losses over all ranks, ``(c, T')``.

        The scalarisation is applied to the losses of the whole batch, as in one process: its slopes there weigh the
        losses of the ranks, whose gradients are averaged before the step.
        """
        mine = [tasks.index(task) for task in own]
        values = torch.zeros(len(preferences), len(tasks), device=self.device, dtype=torch.float32)
        weighted = None
        if own:
            weighted = chunk.evaluate(self.loss_vector, inputs, targets, independent) * shares[list(own)]
            values[:, mine] = weighted.detach()
        values = self.reduced(values, "mean").requires_grad_()
        (slopes,) = torch.autograd.grad(self.scalarization(values, preferences, tasks=tasks).sum(), values)
        if weighted is not None:
            self.manual_backward((slopes[:, mine] * weighted).sum() / self.accumulate_batches)
        return values

    def _step(self, losses: Tensor, tasks: tuple[int, ...]) -> None:
        """``theta_i <- sum_j m_ij theta_j + Delta_i``."""
        optimizer, theta = self.optimizers(), self.population.theta
        assert theta.grad is not None
        if self.trainer.world_size > 1:
            theta.grad.copy_(self.reduced(theta.grad, "mean"))
        self._healthy = self._find_healthy(losses, tasks)
        theta.grad.masked_fill_(~self._healthy.unsqueeze(1), 0.0)
        frozen = {index: theta.detach()[index].clone() for index in self._frozen}

        # Under autocast the product would be of half precision, and its rows would no longer sum to one.
        with torch.autocast(theta.device.type, enabled=False):
            matrix = self._transfer_matrix(losses, tasks)
            mixing = None if matrix is None else self.population.transfer_step(matrix, self._healthy, self._columns)
        optimizer.step()  # type: ignore[union-attr]
        if matrix is not None and mixing is not None:
            with torch.autocast(theta.device.type, enabled=False):
                theta.data.add_(mixing)
                self.population.mix_buffers(matrix, self._healthy, self._transfer_parameters)

        for index, row in frozen.items():
            theta.data[index] = row
        self.scalarization.observe(losses.masked_fill(~self._healthy.unsqueeze(1), torch.nan))
        self._steps += 1
        self.step_schedulers("step")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient of each subproblem, after any gradient scaling is undone."""
        if self.gradient_clip_norm is not None:
            self.population.clip_grad_norm_(self.gradient_clip_norm)

    def _transfer_matrix(self, losses: Tensor, tasks: tuple[int, ...]) -> Tensor | None:
        batch = self.batches_seen + 1
        due = batch // self.transfer_every > self._transferred_at // self.transfer_every
        if isinstance(self.transfer, NoTransfer) or self.population.size == 1 or not due:
            return None
        matrix: Tensor = self.transfer(
            TransferContext(
                preferences=self.preferences,
                losses=losses,
                parameters=self.population.theta.detach(),
                step=self._transfers,
                learning_rate=float(self._torch_optimizer.param_groups[0]["lr"]),
                healthy=self._healthy,
                tasks=tasks,
                scalarization=self.scalarization,
            )
        )
        if not self._matrix_checked:  # once: it waits for the device
            check_matrix(matrix, self.population.size, self.transfer)
            self._matrix_checked = True
        self._transfers += 1
        self._transferred_at = batch
        return matrix

    @property
    def _torch_optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        return optimizer

    def _choose_backend(self, inputs: Any, targets: Any, independent: bool) -> None:
        if self._timed_size == self.population.size:
            return
        backend = None
        if self.trainer.is_global_zero and targets:
            backend = self.population.choose_backend(self.loss_vector, inputs, targets, independent)
        backend = self.trainer.strategy.broadcast(backend)
        if backend is not None:
            self.population.active_backend = backend
            self._timed_size = self.population.size

    # ---------------------------------------------------------------------------------------------------- growth, care

    def _grow(self) -> None:
        """Split the subproblems if it is time, between two steps."""
        if self.growth is None or self._accumulated:
            return
        stage = self.growth.stage_at(self.batches_seen, len(self._stages))
        while self._stage < stage:
            sources = self._healthy_sources()
            parents = [sources[parent] for parent in self._stages[self._stage + 1].parents]
            self._inherit(parents)
            self._enter(self._stage + 1)
            self.transfer.reset()
            rank_zero_info(f"The population has grown to {len(parents)} subproblems.")

    def _enter(self, stage: int) -> None:
        """Take up the preferences of a stage, for a population that has its size."""
        self._stage = stage
        self._live = self._stages[stage].preferences
        size = len(self._live)
        self._healthy = self._healthy.new_ones(size)
        self._matrix_checked = False
        self._frozen = ()

    def _inherit(self, parents: Sequence[int]) -> None:
        """Let row ``i`` continue row ``parents[i]``: parameters, buffers and the state of the optimiser."""
        theta, size = self.population.theta, self.population.size
        index = torch.as_tensor(parents, device=theta.device)
        self.population.select_(parents)
        for key, value in self._torch_optimizer.state[theta].items():
            if isinstance(value, Tensor) and value.ndim and len(value) == size:
                self._torch_optimizer.state[theta][key] = value.index_select(0, index)

    def _find_healthy(self, losses: Tensor, tasks: tuple[int, ...]) -> Tensor:
        theta = self.population.theta
        healthy = losses[:, list(tasks)].isfinite().all(dim=1) & theta.detach().sum(dim=1).isfinite()
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            # Under a gradient scaler an overflow is no failure: the scaler skips the step and lowers the scale.
            assert theta.grad is not None
            healthy &= theta.grad.sum(dim=1).isfinite()
        for index in self._frozen:
            healthy[index] = False
        return healthy

    def _heal(self) -> None:
        """Look at the subproblems that failed in the last step, and do what ``on_nonfinite`` says."""
        failed = [index for index in (~self._healthy).nonzero().flatten().tolist() if index not in self._frozen]
        if not failed or self._accumulated:
            return
        names = "; ".join(
            f"subproblem {index} with preference ({', '.join(f'{weight:.3g}' for weight in self.preferences[index])})"
            for index in failed
        )
        report = f"Not finite after {self.batches_seen} batches: {names}."
        healthy = self._healthy.nonzero().flatten().tolist()
        if self.on_nonfinite == "raise" or not healthy:
            raise FloatingPointError(
                f"Losses, gradients and parameters should be finite. {report} Lower the learning rate, set "
                "`gradient_clip_norm`, or look for invalid values in the data."
            )
        if self.on_nonfinite == "freeze":
            self._frozen = (*self._frozen, *failed)
            rank_zero_warn(f"{report} It is trained no further.")
            return
        sources = self._healthy_sources()
        self._inherit(sources)
        self._healthy = torch.ones_like(self._healthy)
        self.transfer.reset(failed)
        rank_zero_warn(f"{report} Restarted from subproblem {', '.join(str(sources[index]) for index in failed)}.")

    def _healthy_sources(self) -> list[int]:
        """Return for each subproblem itself, if it is healthy, or else the healthy one of the nearest preference."""
        healthy = self._healthy.nonzero().flatten().tolist()
        nearest = torch.cdist(self.preferences, self.preferences)[:, healthy].argmin(dim=1).tolist()
        return [index if index in healthy else healthy[nearest[index]] for index in range(self.population.size)]

    # ----------------------------------------------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation; see that no failed subproblem and no rank's own statistics are validated."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._heal()
        if self.trainer.world_size > 1:
            for buffer in self.population.network.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.reduced(buffer.clone(), "mean"))
        self._evaluation.reset(self.population.size, self.device)
        self._evaluated = True

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in one batch of the validation set."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the subproblems."""
        self._log_evaluation("val")
        super().on_validation_epoch_end()

    def on_test_epoch_start(self) -> None:
        """Forget the last test."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in one batch of the test set."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log the means over the subproblems, and each subproblem."""
        self._log_evaluation("test")
        values = {f"loss/{name}": self.objective_values[:, task] for task, name in enumerate(self.task_names)}
        for name, column in {**values, **self.metric_values}.items():
            self.log_dict({f"test_{name}/{index}": value for index, value in enumerate(column)}, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the predictions of all subproblems, task name to tensor of shape ``(P, B, ...)``.

        A batch that is not a pair is taken for the inputs.
        """
        labelled = isinstance(batch, Sequence) and len(batch) == 2
        return self(self.unpack_batch(batch)[0] if labelled else batch)

    def _evaluate(self, batch: Any) -> None:
        inputs, targets = self.unpack_batch(batch)
        labels = {task: count for task, count in enumerate(self.count_labels(targets).tolist()) if count}
        if not labels:
            return
        present = {self.task_names[task]: targets[self.task_names[task]] for task in labels}
        outputs, losses = self.population.evaluate(self._outputs_and_losses, inputs, present)
        self._evaluation.update(outputs, losses, present, labels)
        self._evaluated = True

    def _outputs_and_losses(self, outputs: Any, targets: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
        losses = self.loss_vector(outputs, targets)
        return {name: outputs[name] for name in targets}, losses

    def _finish_evaluation(self) -> None:
        if self._evaluated:
            self._final_values, self._final_metrics = self._evaluation.compute(partial(self.reduced, operation="sum"))
            self._evaluated = False

    def _log_evaluation(self, split: str) -> None:
        values = {f"{split}_loss/{name}": self.objective_values[:, task] for task, name in enumerate(self.task_names)}
        values |= {f"{split}_{name}": column for name, column in self.metric_values.items()}
        self.log_dict({name: column.nanmean() for name, column in values.items()}, sync_dist=True)
        self.log(f"{split}_loss", self.objective_values.nanmean(), prog_bar=True, sync_dist=True)

    def _log_training(self, losses: Tensor, tasks: tuple[int, ...], batch_idx: int) -> None:
        # A call to `log` costs about a millisecond, so it is made only when loggers take the values in.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if (self.batches_seen + 1) % every and batch_idx and not self.trainer.is_last_batch:
            return
        columns = {f"train_loss/{self.task_names[task]}": losses[:, task].nanmean() for task in tasks}
        self.log_dict(columns)
        self.log("train_loss", losses.nanmean(), prog_bar=True)

    # ------------------------------------------------------------------------------------------------ optimiser, state

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return ``theta``, the one parameter of all subproblems."""
        return [self.population.theta]

    def configure_optimizers(self) -> Any:
        """Return the optimiser of ``theta`` and its schedule, after a check that it treats every element by itself."""
        check_elementwise(self._optimizer, self.population.theta.device)
        return super().configure_optimizers()

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on and is not a parameter or a buffer."""
        gradient = self.population.theta.grad if self._accumulated else None
        return super().get_extra_state() | {
            "stage": self._stage,
            "size": self.population.size,
            "transfers": self._transfers,
            "transferred_at": self._transferred_at,
            "frozen": list(self._frozen),
            "healthy": self._healthy,
            "backend": self.population.active_backend,
            "timed_size": self._timed_size,
            "gradient": gradient,
            "losses_of_step": self._losses_of_step.state_dict(),
            "objective_values": self._final_values,
            "metric_values": dict(self._final_metrics),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, and give the population the size it had."""
        super().set_extra_state(state)
        stage, size = state["stage"], state["size"]
        if stage >= len(self._stages) or len(self._stages[stage].preferences) != size:
            sizes = [len(stage.preferences) for stage in self._stages]
            raise ValueError(
                "`preferences` and `growth` should be those of the run that wrote the checkpoint. Found a checkpoint "
                f"of {size} subproblems in stage {stage}, and stages of {sizes} here."
            )
        if size != self.population.size:
            self.population.select_([0] * size)
        self._enter(stage)
        device = self._healthy.device
        self._healthy = state["healthy"].to(device)
        self._losses_of_step.load_state_dict(state["losses_of_step"], device)
        self._transfers = state["transfers"]
        self._transferred_at = state["transferred_at"]
        self._frozen = tuple(state["frozen"])
        self._timed_size = state["timed_size"]
        if self.population.backend == "auto":
            self.population.active_backend = state["backend"]
        self._pending_gradient = state["gradient"]
        self._final_values = state["objective_values"]
        self._final_metrics = state["metric_values"]


def _sliced(tensor: Tensor, size: int) -> Tensor:
    """Return ``tensor``, shape ``(B, ...)``, as one slice per subproblem, shape ``(P, B // P, ...)``."""
    if len(tensor) < size:
        raise UserInputError(
            f"With `batches='independent'` a batch should hold at least one sample per subproblem ({size}). Found "
            f"{len(tensor)}. Make batches larger, and drop an incomplete last one."
        )
    width = len(tensor) // size
    return tensor[: width * size].view(size, width, *tensor.shape[1:])
