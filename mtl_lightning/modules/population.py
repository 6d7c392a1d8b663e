"""A population of subproblems, one per preference vector: what the modules that train one share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from mtl_lightning.devices import Sent, is_read_at_once, may_be_any
from mtl_lightning.elementwise import check_elementwise
from mtl_lightning.growth import Growth, Stage
from mtl_lightning.modules.base import (
    LRSchedulerCallable,
    LRSchedulerInterval,
    MultiTaskModule,
    OptimizerCallable,
)
from mtl_lightning.modules.evaluation import PopulationEvaluation
from mtl_lightning.modules.gradients import average_statistics
from mtl_lightning.modules.scaling import ScaledSteps
from mtl_lightning.modules.waiting import meeting
from mtl_lightning.population import Chunk, Compiler, Population, UserInputError
from mtl_lightning.population_shards import Shards
from mtl_lightning.preferences import as_preference, check_preferences
from mtl_lightning.seeds import mix_seed, seed_generators
from mtl_lightning.task import Task


@dataclass
class Part:
    """A batch on one rank.

    Attributes:
        inputs: What the network is called with.
        targets: The targets of the tasks with labels on this rank, by name.
        per_subproblem: Whether inputs and targets have one slice for each subproblem of this rank, ``(p, B, ...)``.
        own: The tasks with labels on this rank.
        tasks: The tasks with labels on any rank.
        preferences: Those of the subproblems of this process, shape ``(p, T')``, with the columns of ``tasks``.
        shares: A factor for each task's losses on this rank: the mean over ranks of the weighted losses is the mean
            over all labels.
    """

    inputs: Any
    targets: dict[str, Tensor]
    per_subproblem: bool
    own: tuple[int, ...]
    tasks: tuple[int, ...]
    preferences: Tensor
    shares: list[float]


class PopulationModule(MultiTaskModule):
    """Base of the modules that train ``P`` networks, one per preference vector, as one population.

    It holds and evaluates the population, grows it, and looks after subproblems that fail. A subclass adds the
    gradients of a batch in :meth:`add_gradients` and may change in :meth:`update_parameters` how parameters move. The
    subproblems may be spread over processes (:class:`~mtl_lightning.strategies.PopulationParallelStrategy`); a subclass
    that does not look at other subproblems need not know.

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor. Its state is copied.
        tasks: The ``T >= 2`` tasks.
        preferences: One preference vector per subproblem, shape ``(P, T)``, on the simplex; a tensor or nested lists.
        optimizer: From parameters to an element-wise optimiser.
        growth: Start with fewer subproblems and split them; all from the start by default.
        lr_scheduler: See :class:`~mtl_lightning.modules.base.MultiTaskModule`, also for the next two.
        lr_scheduler_interval: See there.
        lr_scheduler_monitor: See there.
        gradient_clip_norm: The largest norm of the gradient of each subproblem.
        accumulate_batches: Over how many batches gradients are averaged before a step.
        init: ``"common"``, or ``"independent"`` through ``reset_parameters``.
        batches: ``"shared"`` or ``"independent"``, a slice of the batch for each subproblem.
        on_nonfinite: What becomes of a subproblem that is not finite: ``"reseed"``, ``"freeze"`` or ``"raise"``.
        backend: ``"vmap"``, ``"loop"`` or ``"auto"``.
        chunk_size: How many subproblems share one backward pass under vmap.
        compiler: Compiles the evaluation of the network, such as ``torch.compile``; see
            :class:`~mtl_lightning.population.Population`.

    Note:
        With 16-bit mixed precision a step in which the gradient of any subproblem overflows is skipped for all of them,
        by all processes; ``skipped_steps``, how many there were, is logged with the training losses once there are any.

    Attributes:
        population: The subproblems of this process, a :class:`~mtl_lightning.population.Population`.
        shards: Which of all they are, :class:`~mtl_lightning.population_shards.Shards`.
    """

    def __init__(
        self,
        network: nn.Module,
        tasks: Sequence[Task],
        preferences: Tensor | list[list[float]],
        optimizer: OptimizerCallable,
        growth: Growth | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: LRSchedulerInterval = "epoch",
        lr_scheduler_monitor: str | None = None,
        gradient_clip_norm: float | None = None,
        accumulate_batches: int = 1,
        init: Literal["common", "independent"] = "common",
        batches: Literal["shared", "independent"] = "shared",
        on_nonfinite: Literal["reseed", "freeze", "raise"] = "reseed",
        backend: Literal["auto", "vmap", "loop"] = "auto",
        chunk_size: int | None = None,
        compiler: Compiler | None = None,
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
        check_kinds(("network", network, nn.Module), ("growth", growth, Growth | None))
        for name, value, choices in (
            ("batches", batches, ("shared", "independent")),
            ("on_nonfinite", on_nonfinite, ("reseed", "freeze", "raise")),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` should be one of {', '.join(map(repr, choices))}. Found {value!r}.")
        if growth is not None and init == "independent":
            raise ValueError("With `growth` children inherit from their parents: `init` should be 'common'.")
        self.growth = growth
        self.batches = batches
        self.on_nonfinite = on_nonfinite

        self._stages = [Stage(preferences, ())] if growth is None else growth.stages(preferences)
        self._stage = 0
        size = len(self._stages[0].preferences)
        self.population = Population(
            network, size, init=init, backend=backend, chunk_size=chunk_size, compiler=compiler
        )
        self.shards = Shards(size)
        self._data_group: Any = None  # the processes with the same subproblems; None for all
        self._data_ranks = (0, 1)

        self._timed_size: int | None = None
        self._frozen: tuple[int, ...] = ()
        self._scaled_steps = ScaledSteps()
        self._pending_gradient: Tensor | None = None
        self._inputs_compared = False
        self._final_values: Tensor | None = None
        self._final_metrics: dict[str, Tensor] = {}
        self._evaluation = PopulationEvaluation(self.tasks, size)
        self._evaluated = False
        self._live = self._stages[0].preferences
        # No buffer: callbacks average buffers, and these are no numbers.
        self._healthy = torch.ones(size, dtype=torch.bool)
        self._sent_health: list[Sent] = []  # of the last two steps, where to look would mean to wait

    # ------------------------------------------------------------------------------------------------ what users read

    @property
    def preferences(self) -> Tensor:
        """The preference vectors of the live subproblems, shape ``(P, T)``."""
        # No buffer: half precision would round it with the parameters.
        if self._live.device != self.device:
            with torch.inference_mode(False):  # a validation may be the first to read it, and training comes after
                self._live = self._live.to(self.device)
        return self._live

    @property
    def final_preferences(self) -> Tensor:
        """The preference vectors of all subproblems that there will be after growth, shape ``(P, T)``."""
        return self._stages[-1].preferences

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
        """Return a copy of subproblem ``index`` as a plain module, with the ``state_dict`` keys of the original.

        While the population is spread over processes, every one of them has to call it.

        Raises:
            IndexError: If there is no such subproblem.
        """
        size = self.shards.size
        if not -size <= index < size:
            raise IndexError(f"`index` should lie in [0, {size}). Found {index}.")
        with torch.inference_mode(False):  # it may be trained later, wherever it is picked
            return self.population.member_of(lambda rows: self.shards.fetch(rows, index % size))

    def select(self, preference: Tensor | Sequence[float]) -> nn.Module:
        """Return the subproblem with the preference nearest to ``preference``, shape ``(T,)``, as a plain module.

        Args:
            preference: A weight for each task. It is divided by its sum, so that ``(3, 7)`` is ``(0.3, 0.7)``.

        Raises:
            ValueError: If there is not one weight per task, one is negative or not finite, or all are zero.
        """
        wanted = as_preference(preference, num_tasks=len(self.tasks))
        distances = (self.preferences - wanted.to(self.preferences)).norm(dim=1)
        return self.subproblem(int(distances.argmin()))

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Return the predictions of all subproblems, task name to tensor of shape ``(P, B, ...)``.

        Raises:
            RuntimeError: If the population is spread over more processes than there are subproblems.
        """
        if not self.shards.blocks[-1]:
            raise RuntimeError(
                "For predictions of all subproblems every process should hold one of them. Found "
                f"{self.shards.size} subproblems on {self.shards.count} processes."
            )
        outputs: dict[str, Tensor] = self.population(inputs)
        return {name: self.shards.gather(output) for name, output in outputs.items()}

    # ---------------------------------------------------------------------------------------------- for the subclasses

    def add_gradients(self, chunk: Chunk, part: Part) -> Tensor:
        """Add the gradients of some subproblems, of this rank's data, to ``theta.grad``.

        Args:
            chunk: The subproblems; ``chunk.members`` are their places among those of this process.
            part: The batch.

        Returns:
            Their losses over all ranks, shape ``(c, T')``, detached, with the columns of ``part.tasks``.
        """
        raise NotImplementedError(f"{type(self).__name__} should implement `add_gradients`.")

    def before_gradients(self, is_last: bool) -> None:
        """Hook before the gradients of a batch are computed; ``is_last`` tells whether a step follows."""

    def reduce_gradients(self) -> None:
        """Average ``theta.grad`` over the ranks that hold the same subproblems."""
        theta = self.population.theta
        if self.data_world_size > 1:
            assert theta.grad is not None
            theta.grad.copy_(self.reduced(theta.grad, "mean"))

    def update_parameters(self, losses: Tensor, tasks: tuple[int, ...], step: Any) -> None:
        """Move the parameters; ``step`` is the step of the optimiser, to be called once.

        Args:
            losses: The losses of all subproblems on the batches of the step, shape ``(P, T)``.
            tasks: The tasks that had labels.
            step: Takes no argument.
        """
        step()

    def mixes_parameters(self) -> bool:
        """Return whether subproblems are given parameters of others in this step, so that these have to be finite.

        Those of a network that gives finite losses and gradients seldom are not; otherwise they are looked at before a
        validation and at the end of an epoch.
        """
        return False

    def losses_in_ranks(self, chunk: Chunk, part: Part) -> tuple[Tensor | None, Tensor]:
        """Evaluate some subproblems on this rank's data.

        Returns:
            The weighted losses of this rank with their graph, shape ``(c, T_own)``, or ``None`` without labels here;
            and the losses over all labels of all ranks, shape ``(c, T')``, detached.
        """
        size = chunk.members.stop - chunk.members.start
        if self.data_world_size == 1:
            losses = chunk.evaluate(self.loss_vector, part.inputs, part.targets, part.per_subproblem)
            return losses, losses.detach()
        values = torch.zeros(size, len(part.tasks), device=self.device, dtype=torch.float32)
        weighted = None
        if part.own:
            losses = chunk.evaluate(self.loss_vector, part.inputs, part.targets, part.per_subproblem)
            weighted = losses * losses.new_tensor([part.shares[task] for task in part.own])
            values[:, [part.tasks.index(task) for task in part.own]] = weighted.detach().to(values)
        return weighted, self.reduced(values, "mean")

    # ----------------------------------------------------------------------------------------------------- processes

    @property
    def data_world_size(self) -> int:
        """How many ranks hold the same subproblems and share the data."""
        return self.trainer.world_size if self._data_group is None else self._data_ranks[1]

    def reduced(self, tensor: Tensor, operation: Literal["mean", "sum"]) -> Tensor:
        """Return the mean or the sum of ``tensor`` over the ranks with the same subproblems; it may be changed."""
        if self.data_world_size == 1:
            return tensor
        # Lightning's reduction lets the ranks wait for each other first, and under the loop there is one for each row.
        if operation == "mean":
            tensor = tensor / self.data_world_size  # before the sum, which could overflow in half precision
        with meeting(self.trainer.strategy):
            torch.distributed.all_reduce(tensor, group=self._data_group)
        return tensor

    def batch_seed(self) -> int:
        """Return the seed of this batch on this rank; ranks that see the same data have the same."""
        if self._data_group is None:
            return super().batch_seed()
        assert self._seed is not None
        rank, size = self._data_ranks
        return mix_seed(self._seed, self.batches_seen * size + rank)

    def spread(self, shards: Shards, data_group: Any, data_rank: int, data_size: int, device: torch.device) -> None:
        """Keep the subproblems of this process only; the first process of each group says what they are.

        Args:
            shards: Who holds which subproblem, for all that are live.
            data_group: The processes that hold the same ones.
            data_rank: The place of this process among them.
            data_size: Their number.
            device: Where this process keeps its subproblems.

        Raises:
            RuntimeError: If the subproblems of other processes are not at hand.
        """
        if self.shards.is_spread:
            raise RuntimeError(
                "The population should be whole before it is spread over processes. Found the rows of this process "
                "only, as a run that failed leaves them. Load a checkpoint into a new module."
            )
        self._data_group, self._data_ranks = data_group, (data_rank, data_size)
        self.population.rearrange_(lambda rows: shards.scatter(rows, device))
        self._losses_of_step.rearrange(lambda rows: shards.scatter(rows, device))
        if self._pending_gradient is not None:
            self._pending_gradient = shards.scatter(self._pending_gradient, device)
        self.shards = shards
        self._inputs_compared = False
        self._placed(data_group)

    def gather(self) -> None:
        """Bring the subproblems of all processes together again, in the memory of the host."""
        shards, gradient = self.shards, self.get_extra_state()["gradient"]
        self._pending_gradient = None if gradient is None else shards.collect(gradient)
        self.population.rearrange_(shards.collect)
        self._losses_of_step.rearrange(shards.collect)
        self.shards, self._data_group, self._data_ranks = Shards(shards.size), None, (0, 1)
        self._placed(None)

    def _placed(self, group: Any) -> None:
        """Follow the subproblems to where they are now."""
        self._evaluation.group = group

    def whole_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the ``state_dict`` of the whole population, given that of this process; all have to call it."""
        if not self.shards.is_spread:
            return state
        names = [f"population.{name}" for name in self.population.stacked_names]
        state = state | {name: self.shards.collect(state[name]) for name in names}
        extra = dict(state["_extra_state"])
        if extra["gradient"] is not None:
            extra["gradient"] = self.shards.collect(extra["gradient"])
        sums = extra["losses_of_step"]["sums"]
        if sums is not None:
            extra["losses_of_step"] = extra["losses_of_step"] | {"sums": self.shards.collect(sums)}
        return state | {"_extra_state": extra}

    # ------------------------------------------------------------------------------------------------------- training

    def configure_callbacks(self) -> list[Any]:
        """Refuse strategies under which the rows of the population are not whole, before they are set up.

        Raises:
            MisconfigurationException: If the strategy is neither a single device nor DDP nor population parallel, or a
                flag of the trainer does not reach manual optimisation.
        """
        strategy = self.trainer.strategy
        fits = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        if self.trainer.state.fn == "fit" and not fits:
            raise MisconfigurationException(
                f"`{type(self).__name__}` trains on one device, with DDP (`Trainer(strategy='ddp')`) or, where the "
                "population is too large for one device, with `Trainer(strategy=PopulationParallelStrategy())`. "
                f"Found {type(strategy).__name__}."
            )
        return super().configure_callbacks()

    def on_fit_start(self) -> None:
        """Let all processes have the preferences of the first one, which may have been drawn at random."""
        super().on_fit_start()
        self._stages = self.trainer.strategy.broadcast(self._stages)
        self._live = self._stages[self._stage].preferences

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
        self._losses_of_step.rearrange(lambda rows: rows.to(self.device))
        super().on_train_start()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do one step of all subproblems."""
        with meeting(self.trainer.strategy):
            self._train(batch, batch_idx)

    def _train(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = self.unpack_batch(batch)
        counts = self.take_label_counts(targets)
        self._compare_inputs(inputs)
        self._heal(waits=False)
        self._grow()
        part = self._part(inputs, targets, counts)
        is_due = self.is_step_due()
        self.before_gradients(is_due and bool(part.tasks or self._losses_of_step.tasks))
        if part.tasks:
            losses = self._add_all_gradients(part)
            self._losses_of_step.update(losses, part.tasks)
            self._log_training(losses, part.tasks, batch_idx)
        if is_due and self._losses_of_step.tasks:
            self._step(self._losses_of_step.compute(), self._losses_of_step.tasks)
            self._losses_of_step.reset()
            self.population.theta.grad = None
        self.finish_batch()

    def _compare_inputs(self, inputs: Any) -> None:
        """See once that processes with different subproblems are given the same batch.

        Raises:
            ValueError: If they are not.
        """
        if self._inputs_compared or not self.shards.is_spread:
            return
        self._inputs_compared = True
        own = torch.zeros(2, dtype=torch.float64, device=self.device)
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                # What is missing in the inputs may be NaN, which equals nothing.
                values = leaf.detach().double().nan_to_num(0.0, 0.0, 0.0)
                own += torch.stack([values.sum(), values.abs().sum()]).to(self.device)
        every = Shards(self.shards.count, self.shards.group).gather(own.unsqueeze(0))
        if not torch.equal(every, every[:1].expand_as(every)):
            raise UserInputError(
                "Processes that train different subproblems should see the same batches. Found other inputs on "
                "another process. Let the sampler take `trainer.distributed_sampler_kwargs`, or leave it to Lightning, "
                "and draw random augmentation from a generator that all processes seed alike."
            )

    def _part(self, inputs: Any, targets: Mapping[str, Tensor], here: list[float]) -> Part:
        anywhere = self.total_labels(here)
        shares = self.label_shares(here, anywhere)
        own = tuple(task for task, count in enumerate(here) if count)
        known: Any = {self.task_names[task]: targets[self.task_names[task]] for task in own}
        independent = self.batches == "independent"
        if independent:
            cut = partial(_sliced, size=self.shards.size, members=self.shards.members)
            inputs, known = pytree.tree_map_only(Tensor, cut, (inputs, known))
        tasks = tuple(task for task, count in enumerate(anywhere) if count)
        preferences = self.preferences[self.shards.members]
        preferences = preferences if len(tasks) == len(self.tasks) else preferences[:, list(tasks)]
        return Part(inputs, known, independent, own, tasks, preferences, shares)

    def _add_all_gradients(self, part: Part) -> Tensor:
        """Add the gradients of all subproblems of this process; return their losses, shape ``(p, T)``."""
        self._choose_backend(part)
        losses = torch.full((self.population.size, len(self.tasks)), torch.nan, device=self.device, dtype=torch.float32)
        every = [self.add_gradients(chunk, part) for chunk in self._seeded_chunks()]
        if every:
            found = torch.cat(every).to(losses)
            if len(part.tasks) == len(self.tasks):
                return found
            losses[:, list(part.tasks)] = found
        return losses

    def _seeded_chunks(self) -> Iterator[Chunk]:
        """Yield the subproblems in parts, each with random numbers of its own wherever it is trained."""
        for chunk in self.population.chunks():
            seed_generators(mix_seed(self.batch_seed(), self.shards.own[chunk.members.start]), self.device)
            yield chunk

    def _step(self, losses: Tensor, tasks: tuple[int, ...]) -> None:
        """Move the parameters for the gradients of one or several batches.

        Args:
            losses: The losses of the subproblems of this process, shape ``(p, T)``.
            tasks: The tasks that had labels.
        """
        theta = self.population.theta
        self.reduce_gradients()
        assert theta.grad is not None
        losses, self._healthy = self._share_health(losses, tasks)
        if not is_read_at_once(theta):
            self._sent_health = [*self._sent_health[-1:], Sent(self._healthy)]
        failed = ~self._healthy[self.shards.members]
        if may_be_any(failed):
            theta.grad.masked_fill_(failed.unsqueeze(1), 0.0)
        own = self.shards.own
        places = [index - own.start for index in self._frozen if index in own]
        frozen = {place: theta.detach()[place].clone() for place in places}
        self.update_parameters(losses, tasks, self._take_step)
        for place, row in frozen.items():
            theta.data[place] = row
        self._steps += 1
        self.step_schedulers("step")

    def _take_step(self) -> None:
        """Step the optimiser, unless the gradient scaler has all processes skip the step."""
        optimizer: Any = self.optimizers()
        raw, precision = optimizer.optimizer, self.trainer.precision_plugin
        scaler = getattr(precision, "scaler", None)

        def step() -> None:
            if scaler is not None and getattr(raw, "_step_supports_amp_scaling", False):
                # Lightning leaves it to a fused optimiser, inside of which no other process hears of an overflow.
                scaler.unscale_(raw)
            optimizer.step()

        self._scaled_steps.take(precision, raw, step, is_last=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient of each subproblem, after any gradient scaling is undone."""
        if self.gradient_clip_norm is not None:
            self.population.clip_grad_norm_(self.gradient_clip_norm)

    def _choose_backend(self, part: Part) -> None:
        if self._timed_size == self.shards.size:
            return
        backend = None
        if self.trainer.is_global_zero and part.targets:
            backend = self.population.choose_backend(self.loss_vector, part.inputs, part.targets, part.per_subproblem)
        backend = self.trainer.strategy.broadcast(backend)
        if backend is not None:
            self.population.active_backend = backend
            self._timed_size = self.shards.size

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
            self._placed(self._data_group)
            self.on_replaced(None)
            rank_zero_info(f"The population has grown to {len(parents)} subproblems.")

    def on_replaced(self, subproblems: Sequence[int] | None) -> None:
        """Hook after these subproblems, or all, were replaced by others."""

    def _enter(self, stage: int) -> None:
        """Take up the preferences of a stage, for a population that has its size."""
        self._stage = stage
        self._live = self._stages[stage].preferences
        size = len(self._live)
        self._healthy, self._sent_health = self._healthy.new_ones(size), []
        self._frozen = ()

    def _inherit(self, parents: Sequence[int]) -> None:
        """Let row ``i`` continue row ``parents[i]``: parameters, buffers and the state of the optimiser."""
        shards, theta = self.shards.resized(len(parents)), self.population.theta
        state, shape = self._torch_optimizer.state[theta], theta.shape
        move = partial(self.shards.rearrange, parents=parents, new=shards)
        self.population.rearrange_(move)
        for key in sorted(state):
            if isinstance(state[key], Tensor) and state[key].shape == shape:
                state[key] = move(state[key])
        self.shards = shards

    @property
    def _torch_optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        return optimizer

    def _share_health(self, losses: Tensor, tasks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the losses of all subproblems, ``(P, T)``, and which of them are finite, ``(P,)``."""
        theta = self.population.theta
        known = losses if len(tasks) == losses.shape[1] else losses[:, list(tasks)]  # the others hold NaN
        healthy = known.isfinite().all(dim=1)
        if self.mixes_parameters():
            healthy &= _are_finite(theta.detach())
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            # Under a gradient scaler an overflow is no failure: the scaler skips the step and lowers the scale.
            assert theta.grad is not None
            healthy &= _are_finite(theta.grad)
        if self.shards.is_spread:  # in one piece
            every = self.shards.gather(torch.cat([losses, healthy.unsqueeze(1).to(losses)], dim=1))
            losses, healthy = every[:, :-1], every[:, -1] > 0
        for index in self._frozen:
            healthy[index] = False
        return losses, healthy

    def _heal(self, waits: bool = True) -> None:
        """Look at the subproblems that failed in the last step, and do what ``on_nonfinite`` says.

        Args:
            waits: Whether to wait for a device that is not done with that step. If not, it is that of the step before.
        """
        at_once = is_read_at_once(self.population.theta)
        if self._accumulated or not (at_once or waits or len(self._sent_health) == 2):
            return
        well = self._healthy
        if waits:
            well = well.cpu() & self.shards.gather(_are_finite(self.population.theta.detach())).cpu()
        if not at_once:
            well = _all_of(well, self._sent_health) if waits else self._sent_health[0].read()
        if not self._newly_failed(well):
            return
        self._healthy = self._healthy & well.to(self._healthy.device)  # a step later they may look well
        failed = self._newly_failed(self._healthy)
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
        self._healthy, self._sent_health = torch.ones_like(self._healthy), []
        self.on_replaced(failed)
        rank_zero_warn(f"{report} Restarted from subproblem {', '.join(str(sources[index]) for index in failed)}.")

    def _newly_failed(self, healthy: Tensor) -> list[int]:
        return [index for index in (~healthy).nonzero().flatten().tolist() if index not in self._frozen]

    def _healthy_sources(self) -> list[int]:
        """Return for each subproblem itself, if it is healthy, or else the healthy one of the nearest preference."""
        healthy = self._healthy.nonzero().flatten().tolist()
        nearest = torch.cdist(self.preferences, self.preferences)[:, healthy].argmin(dim=1).tolist()
        return [index if index in healthy else healthy[nearest[index]] for index in range(self.shards.size)]

    # ----------------------------------------------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation; see that no failed subproblem and no rank's own statistics are validated."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._heal()
        if self.data_world_size > 1:
            average_statistics(self.population.network, partial(self.reduced, operation="mean"))
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
        outputs: dict[str, Tensor] = {}
        losses = torch.zeros(0, len(labels), device=self.device)
        if self.population.size:
            outputs, losses = self.population.evaluate(self._outputs_and_losses, inputs, present)
        self._evaluation.update(outputs, losses, present, labels)
        self._evaluated = True

    def _outputs_and_losses(self, outputs: Any, targets: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
        losses = self.loss_vector(outputs, targets)
        return {name: outputs[name] for name in targets}, losses

    def _finish_evaluation(self) -> None:
        if self._evaluated:
            with meeting(self.trainer.strategy):
                values, metrics = self._evaluation.compute(
                    partial(self.reduced, operation="sum"), is_alone=self.data_world_size == 1
                )
                self._final_values = self.shards.gather(values)
                self._final_metrics = {name: self.shards.gather(value) for name, value in metrics.items()}
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
        losses = self.shards.gather(losses)
        columns: dict[str, Any] = {f"train_loss/{self.task_names[task]}": losses[:, task].nanmean() for task in tasks}
        skipped = self._scaled_steps.skipped
        self.log_dict(columns | ({"skipped_steps": float(skipped)} if skipped else {}))
        self.log("train_loss", losses.nanmean(), prog_bar=True)

    # ------------------------------------------------------------------------------------------------ optimiser, state

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return ``theta``, the one parameter of all subproblems."""
        return [self.population.theta]

    def configure_optimizers(self) -> Any:
        """Return the optimiser of ``theta`` and its schedule, after a check that it treats every element by itself."""
        check_elementwise(self._optimizer, self.population.theta.device)
        return super().configure_optimizers()

    def checkpoint_facts(self) -> dict[str, Any]:
        """Return what a checkpoint and this module have to share: beside the rest, the preferences."""
        preferences = [[round(weight, 6) for weight in row] for row in self.final_preferences.tolist()]
        return super().checkpoint_facts() | {"preferences": preferences}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint hold the accumulated gradient of all ranks, each of which has seen its own batches."""
        super().on_save_checkpoint(checkpoint)
        gradient = self.get_extra_state()["gradient"]
        # Inside a batch, as after an exception, the other ranks may be elsewhere.
        if gradient is not None and self.data_world_size > 1 and not self._in_batch:
            mean = self.reduced(gradient.clone(), "mean")
            mean = self.shards.collect(mean) if self.shards.is_spread else mean
            checkpoint["state_dict"]["_extra_state"]["gradient"] = mean

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on and is not a parameter or a buffer."""
        gradient = self.population.theta.grad if self._accumulated else None
        gradient = gradient if self._pending_gradient is None else self._pending_gradient
        return super().get_extra_state() | {
            "stage": self._stage,
            "size": self.shards.size,
            "frozen": list(self._frozen),
            "healthy": self._healthy,
            "sent_health": [sent.read() for sent in self._sent_health],
            "backend": self.population.active_backend,
            "timed_size": self._timed_size,
            "gradient": gradient,
            "losses_of_step": self._losses_of_step.state_dict(),
            "skipped_steps": self._scaled_steps.skipped,
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
        self.shards = self.shards.resized(size)
        self._enter(stage)
        device = self._healthy.device
        self._healthy = state["healthy"].to(device)
        self._sent_health = [Sent(sent) for sent in state["sent_health"]]
        self._losses_of_step.load_state_dict(state["losses_of_step"], device)
        self._scaled_steps.skipped = state["skipped_steps"]
        self._frozen = tuple(state["frozen"])
        self._timed_size = state["timed_size"]
        if self.population.backend == "auto":
            self.population.active_backend = state["backend"]
        self._pending_gradient = state["gradient"]
        self._final_values = state["objective_values"]
        self._final_metrics = state["metric_values"]
        self._placed(self._data_group)


def check_kinds(*arguments: tuple[str, Any, Any]) -> None:
    """Raise an error unless each argument, ``(name, value, kind)``, is an object of its kind."""
    for name, value, kind in arguments:
        if not isinstance(value, kind):
            raise TypeError(f"`{name}` should be an object of {kind}. Found {value!r}.")


def _are_finite(rows: Tensor) -> Tensor:
    """Return which rows hold finite numbers only, shape ``(p,)``."""
    wide = torch.promote_types(rows.dtype, torch.float32)  # in half precision the sum of a row may overflow
    return rows.sum(dim=1, dtype=wide).isfinite()


def _all_of(healthy: Tensor, sent: Sequence[Sent]) -> Tensor:
    return torch.stack([healthy, *(one.read() for one in sent)]).all(dim=0)


def _sliced(tensor: Tensor, size: int, members: slice) -> Tensor:
    """Return ``tensor``, shape ``(B, ...)``, as one slice per member, shape ``(p, B // P, ...)``."""
    if len(tensor) < size:
        raise UserInputError(
            f"With `batches='independent'` a batch should hold at least one sample per subproblem ({size}). Found "
            f"{len(tensor)}. Make batches larger, and drop an incomplete last one."
        )
    width = len(tensor) // size
    return tensor[: width * size].view(size, width, *tensor.shape[1:])[members]
