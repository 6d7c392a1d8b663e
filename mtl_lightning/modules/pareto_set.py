"""One network for the whole Pareto front: it follows a preference, which is drawn anew for every batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from mtl_lightning.aggregation import gramian
from mtl_lightning.conditioned import ConditionedNetwork
from mtl_lightning.gradient_weighting import GradientWeighting
from mtl_lightning.modules.base import (
    LRSchedulerCallable,
    LRSchedulerInterval,
    OptimizerCallable,
    check_count,
)
from mtl_lightning.modules.evaluation import PopulationEvaluation
from mtl_lightning.modules.health import TaskHealth
from mtl_lightning.modules.scaling import gradient_scale
from mtl_lightning.modules.single_network import LabelledPart, SingleNetworkModule, zero_of
from mtl_lightning.ordering import OrderingPenalty
from mtl_lightning.population import UserInputError
from mtl_lightning.preferences import as_preference, check_preferences
from mtl_lightning.scalarization import Linear, Scalarization
from mtl_lightning.seeds import mix_seed
from mtl_lightning.task import Task

_PREFERENCES = 0x9A7E  # keeps the stream of preferences apart from that of what is random in a batch


class ParetoSetModule(SingleNetworkModule):
    r"""One network that follows a preference vector, trained for all preferences at once.

    For each batch a preference ``w`` is drawn from the symmetric Dirichlet distribution, and the network takes a step
    for the objective of the losses ``f_1(w), ..., f_T(w)`` of its predictions with this preference. What network and
    what objective makes the method:

    - COSMOS: :class:`~mtl_lightning.networks.PreferenceConcatenation` and :class:`~mtl_lightning.cosmos.COSMOS`,
      ``concentration=1.2``;
    - Pareto hypernetworks: :class:`~mtl_lightning.networks.ParetoHypernetwork` and the weighted sum (PHN-LS) or
      :class:`~mtl_lightning.exact_pareto.EPO` (PHN-EPO), ``concentration=0.2``;
    - Pareto manifold learning: :class:`~mtl_lightning.networks.ParetoManifold` and the weighted sum or
      :class:`~mtl_lightning.gradient_normalization.GradientNormalization`, with ``preferences_per_batch`` of 2 to 4 and
      :class:`~mtl_lightning.ordering.OrderingPenalty`.

    These concentrations are those of the published experiments with two digits in an image.

    Args:
        network: Maps inputs and a preference, shape ``(T,)``, to a dict of predictions, task name to tensor.
        tasks: The ``T >= 2`` tasks.
        preferences: Where the front is validated, tested and predicted: shape ``(P, T)``, on the simplex; a tensor or
            nested lists. Training does not know them, and a checkpoint can be loaded for others.
        optimizer: From parameters to an optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-4)``.
        objective: From losses and preference to the objective, :class:`~mtl_lightning.scalarization.Linear` by default;
            or a :class:`~mtl_lightning.gradient_weighting.GradientWeighting`, which weighs the losses by the gradients
            of the tasks in the trained parameters of the network. It costs one gradient more per task and preference.
        penalty: Added to the mean of the objectives: from the losses and preferences of a batch, both shape
            ``(K, T)``, to a number. None by default.
        concentration: Of the Dirichlet distribution: 1 is uniform on the simplex, smaller values favour its corners.
        preferences_per_batch: How many preferences are drawn for a batch, ``K``. Each costs a pass over it, and the
            memory of its graph.
        max_nonfinite: A task whose loss is not finite for one of them is left out of the batch; after so many in a row
            the run stops.
        lr_scheduler: From the optimiser to a scheduler.
        lr_scheduler_interval: Whether it is stepped after each epoch or after each step of the optimiser.
        lr_scheduler_monitor: The logged metric that ``ReduceLROnPlateau`` reads.
        gradient_clip_norm: The largest norm of the gradient.
        accumulate_batches: Over how many batches, each with preferences of its own, gradients are averaged before a
            step. The gradient of what is left at the end of an epoch is divided by the same number, as Lightning does.

    Attributes:
        network: The conditioned network.

    Raises:
        ValueError: If the preferences are not on the simplex or do not have one column per task, the tasks are fewer
            than two or share a name, or an argument is out of range.
        TypeError: If an argument is of the wrong kind.

    Note:
        Logged are ``train_loss`` and ``train_loss/<task>``, means over the preferences of the batch and therefore
        noisy, and, where there were any, ``nonfinite/<task>``, the batches that a task was left out of. In validation
        and test ``<split>_loss``, ``<split>_loss/<task>`` and ``<split>_<metric>/<task>`` are means over the ``P``
        preferences, and in a test there are also ``test_<...>/<task>/<index>`` of each. With several loaders they are
        over all of them together.

        The preferences depend on the seed of the run and the number of the batch alone, so that all ranks draw the
        same. With several ranks objective and rule see the losses, and the gradients, over all labels of all ranks, so
        that two ranks with half batches equal one process.

        Limits: strategies other than one device and DDP are refused. Each batch waits once for the device, to see which
        losses are finite, and once more for rules that work on the host, such as EPO. Losses are averaged in float64,
        which Apple's MPS does not have. Buffers of the network, such as running statistics, are shared by all
        preferences. A validation or a prediction keeps what the network computes from the preferences alone for all
        ``P``: for a hypernetwork or a manifold, ``P`` times the parameters of one model. A rule takes gradients that
        are not finite, as those that a gradient scaler has let overflow, for orthogonal ones of length one. It
        differentiates a compiled network only with ``torch._functorch.config.donated_buffer = False``.

        For PHN-EPO the gradients are those in the parameters of the hypernetwork, as in its authors' code
        (github.com/AvivNavon/pareto-hypernetworks, revision 6355fd2); that code multiplies the weights, whose sum is
        one, by ``T``.

    References:
        - Navon, Shamsian, Chechik, Fetaya: Learning the Pareto Front with Hypernetworks (2021), ICLR, arXiv:2010.04104.
        - Ruchte, Grabocka: Scalable Pareto Front Approximation for Deep Multi-Objective Learning (2021), ICDM,
          arXiv:2103.13392.
        - Dimitriadis, Frossard, Fleuret: Pareto Manifold Learning: Tackling Multiple Tasks via Ensembles of Single-Task
          Models (2023), ICML, arXiv:2210.09759.

    Example:
        >>> from functools import partial
        >>> from mtl_lightning.networks import MLP, MultiHeadNetwork, ParetoHypernetwork
        >>> from mtl_lightning.preferences import simplex_lattice
        >>> target = MultiHeadNetwork(MLP(8, [16]), {"price": torch.nn.Linear(16, 1), "risk": torch.nn.Linear(16, 1)})
        >>> module = ParetoSetModule(
        ...     network=ParetoHypernetwork(target, num_tasks=2),
        ...     tasks=[Task("price", torch.nn.MSELoss()), Task("risk", torch.nn.L1Loss())],
        ...     preferences=simplex_lattice(num_tasks=2, num_divisions=24),
        ...     optimizer=partial(torch.optim.Adam, lr=1e-4),
        ...     concentration=0.2,
        ... )
        >>> {name: tuple(outputs.shape) for name, outputs in module(torch.ones(3, 8)).items()}
        {'price': (25, 3, 1), 'risk': (25, 3, 1)}
        >>> type(module.select((0.3, 0.7))).__name__
        'MultiHeadNetwork'
    """

    network: ConditionedNetwork

    def __init__(
        self,
        network: ConditionedNetwork,
        tasks: Sequence[Task],
        preferences: Tensor | list[list[float]],
        optimizer: OptimizerCallable,
        objective: Scalarization | GradientWeighting | None = None,
        penalty: nn.Module | None = None,
        concentration: float = 1.0,
        preferences_per_batch: int = 1,
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
        if not isinstance(network, ConditionedNetwork):
            raise TypeError(
                "`network` should be a `ConditionedNetwork`, which takes a preference, such as `ParetoHypernetwork`. "
                f"Found {type(network).__name__}."
            )
        if objective is not None and not isinstance(objective, Scalarization | GradientWeighting):
            raise TypeError(f"`objective` should be a `Scalarization` or a `GradientWeighting`. Found {objective!r}.")
        if penalty is not None and not isinstance(penalty, nn.Module):
            raise TypeError(f"`penalty` should be a `torch.nn.Module`. Found {penalty!r}.")
        if not (isfinite(concentration) and concentration > 0):
            raise ValueError(f"`concentration` should be positive and finite. Found {concentration}.")
        check_count("preferences_per_batch", preferences_per_batch)
        check_count("max_nonfinite", max_nonfinite)
        self._preferences = check_preferences(preferences, num_tasks=len(self.tasks))
        self.objective = Linear() if objective is None else objective
        if isinstance(self.objective, Scalarization):
            self.objective(self._preferences, self._preferences)  # an ideal point of the wrong length is refused here
        if isinstance(penalty, OrderingPenalty) and preferences_per_batch < 2:
            raise ValueError(
                "`OrderingPenalty` compares preferences: `preferences_per_batch` should be at least 2. Found "
                f"{preferences_per_batch}."
            )
        self.penalty = penalty
        self.concentration = concentration
        self.preferences_per_batch = preferences_per_batch
        self.health = TaskHealth(self.task_names, max_nonfinite, warns_of_nonpositive=False)

        self._conditions: list[Any] = []
        self._final_values: Tensor | None = None
        self._final_metrics: dict[str, Tensor] = {}
        self._evaluation = PopulationEvaluation(self.tasks, size=len(self._preferences))
        self._evaluated = False

    # ------------------------------------------------------------------------------------------------ what users read

    @property
    def preferences(self) -> Tensor:
        """The preference vectors at which the front is evaluated, shape ``(P, T)``."""
        # No buffer: half precision would round it with the parameters. Nor is it kept where it has been moved to: what
        # is made in a validation can take no part in a backward pass.
        return self._preferences.to(self.device)

    @property
    def objective_values(self) -> Tensor:
        """The mean loss on each task at each preference in the latest validation or test, shape ``(P, T)``.

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
        """The metrics of the latest validation, ``<metric>/<task>`` to one value per preference, shape ``(P,)``."""
        self._finish_evaluation()
        return self._final_metrics

    def subproblem(self, index: int) -> nn.Module:
        """Return a copy of the network at preference ``index`` of :attr:`preferences`, as a plain module.

        Raises:
            IndexError: If there is no such preference.
        """
        if not -len(self.preferences) <= index < len(self.preferences):
            raise IndexError(f"`index` should lie in [0, {len(self.preferences)}). Found {index}.")
        return self.select(self.preferences[index])

    @torch.inference_mode(False)  # a callback that asks in a validation gets a model that can be trained
    @torch.no_grad()
    def select(self, preference: Tensor | Sequence[float]) -> nn.Module:
        """Return a copy of the network at exactly this preference, shape ``(T,)``, as a plain module.

        It maps inputs to predictions. Where the network makes parameters for another one, it is that one, with the
        ``state_dict`` keys of the original.

        Args:
            preference: A weight for each task. It is divided by its sum, so that ``(3, 7)`` is ``(0.3, 0.7)``.

        Raises:
            ValueError: If there is not one weight per task, one is negative or not finite, or all are zero.
        """
        wanted = as_preference(preference, num_tasks=len(self.tasks))
        return self.network.at(wanted.to(self.preferences))

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Return the predictions at all :attr:`preferences`, task name to tensor of shape ``(P, B, ...)``."""
        known = self._conditions if self._trainer is not None and self.trainer.predicting else []
        conditions = known or map(self.network.condition, self.preferences)
        rows = [self.network.predict(inputs, condition) for condition in conditions]
        return {name: torch.stack([row[name] for row in rows]) for name in self.task_names}

    def batch_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of ``batch`` at the centre of the simplex, of each task with labels; with their graph."""
        inputs, targets = self.unpack_batch(batch)
        counts = self.count_labels(targets).tolist()
        present = {name: targets[name] for name, count in zip(self.task_names, counts, strict=True) if count}
        if not present:
            return {}
        centre = torch.full_like(self.preferences[0], 1 / len(self.tasks))
        return self.checked_losses(self.network(inputs, centre), present)

    # ------------------------------------------------------------------------------------------------------- training

    def configure_model(self) -> None:
        """Refuse to shard the network: its parts are called one by one.

        Raises:
            MisconfigurationException: If the strategy is ``ModelParallelStrategy``.
        """
        if self.shards_network:
            raise MisconfigurationException(
                f"`{type(self).__name__}` trains on one device or with DDP (`Trainer(strategy='ddp')`). "
                f"Found {type(self.trainer.strategy).__name__}."
            )

    def draw_preferences(self) -> Tensor:
        """Return the preferences of the batch in training, shape ``(K, T)``: the same on all ranks."""
        assert self._seed is not None
        seed = mix_seed(mix_seed(self._seed, _PREFERENCES), self.batches_seen)
        alpha = [self.concentration] * len(self.tasks)
        drawn = np.random.default_rng(seed).dirichlet(alpha, size=self.preferences_per_batch)
        # Training in half precision changes the default dtype, in which they would be rounded.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return torch.from_numpy(drawn).to(self.device, dtype)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Add the gradient of the objectives of a batch, and step the optimiser if it is time."""
        part, present = self.shared_part(batch)
        is_due = self.is_step_due()
        if present:
            self._pass(part, present, batch_idx)
        if is_due and self._losses_of_step.tasks:
            self._step()
        self.finish_batch()

    def _pass(self, part: LabelledPart, present: Sequence[int], batch_idx: int) -> None:
        """Add the gradient of the objectives of a batch, at the preferences that are drawn for it.

        Args:
            part: The batch of this rank.
            present: The tasks with labels on any rank. Those whose loss is not finite take no part.
            batch_idx: The place of the batch in the epoch.
        """
        preferences = self.draw_preferences()
        own = [self._own_losses(part, preference) for preference in preferences]
        values = torch.stack([self.mean_over_labels(one.losses, part.shares, present) for one in own])
        tasks = self._healthy(values, present)
        if not tasks:
            return
        parts = [{task: self._share(one, part, task) for task in tasks} for one in own]
        # Under autocast the objective would be evaluated in half precision.
        with torch.autocast(self.device.type, enabled=False):
            slopes = self._slopes(values[:, tasks], preferences[:, tasks].to(values), parts)
        self._backward(parts, slopes)
        self._losses_of_step.update(values, tasks)
        self._log_training(values, tasks, batch_idx)

    def _own_losses(self, part: LabelledPart, preference: Tensor) -> _Predicted:
        """Return predictions for a preference, and the losses of the tasks with labels on this rank, by task."""
        outputs = self.network(part.inputs, preference)
        return _Predicted(outputs, self.own_losses(outputs, part))

    def _share(self, own: _Predicted, part: LabelledPart, task: int) -> Tensor:
        """Return this rank's part in the mean loss of a task over all labels, with its graph; zero without labels."""
        if task in own.losses:
            return own.losses[task] * part.shares[task]
        return zero_of(own.outputs[self.task_names[task]])

    def _healthy(self, values: Tensor, present: Sequence[int]) -> list[int]:
        """Return the tasks, of those with labels, whose loss is finite at all preferences; count the others."""
        worst = values.mean(dim=0)
        self.health.observe(present, worst)
        self.health.finish_batch()
        losses = worst.tolist()  # waits for the device
        return [task for task in present if isfinite(losses[task])]

    def _slopes(self, losses: Tensor, preferences: Tensor, parts: Sequence[Mapping[int, Tensor]]) -> Tensor:
        """Return the weights of the losses in the gradient of the mean objective, shape ``(K, T')``.

        Args:
            losses: The losses over all labels and ranks, shape ``(K, T')``.
            preferences: The preferences, shape ``(K, T')``.
            parts: This rank's parts in the losses, with their graphs, for each preference and by task.
        """
        leaf = losses.detach().requires_grad_()
        total = torch.zeros_like(losses[0, 0])
        if isinstance(self.objective, Scalarization):
            total = self.objective(leaf, preferences, tasks=list(parts[0])).mean()
        if self.penalty is not None:
            price = self.penalty(leaf, preferences)
            if price.ndim != 0:
                raise UserInputError(f"`penalty` should return a number, shape (). Found shape {tuple(price.shape)}.")
            total = total + price
        slopes = torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(losses)
        if isinstance(self.objective, GradientWeighting):
            gramians = torch.stack([self._gramian(part) for part in parts])
            finite = gramians.isfinite().flatten(1).all(dim=1)
            orthogonal = torch.eye(gramians.shape[-1], dtype=gramians.dtype, device=gramians.device)
            gramians = torch.where(finite[:, None, None], gramians, orthogonal)
            weights = self.objective.weights(gramians, losses, preferences, self._steps)
            slopes = slopes + weights.to(slopes) / len(weights)
        return slopes

    def _gramian(self, part: Mapping[int, Tensor]) -> Tensor:
        """Return the inner products of the gradients of the losses over all labels and ranks, float64, ``(T', T')``."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        # As in the backward pass, small gradients would vanish in half precision.
        scale = gradient_scale(self.trainer.precision_plugin)
        rows = []
        for loss in part.values():
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
            zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))
            rows.append(torch.cat([g.flatten().to(torch.promote_types(g.dtype, torch.float32)) for g in zeros]))
        jacobian = torch.stack(rows)
        jacobian = self.reduced(jacobian, "mean") if self.trainer.world_size > 1 else jacobian
        return gramian(jacobian) / scale**2

    def _backward(self, parts: Sequence[Mapping[int, Tensor]], slopes: Tensor) -> None:
        """Add the gradient: the slopes at the losses of all ranks weigh the losses of this one."""
        objective = torch.zeros((), device=self.device)
        for part, weights in zip(parts, slopes, strict=True):
            for loss, weight in zip(part.values(), weights, strict=True):
                if loss.requires_grad:
                    objective = objective + weight.to(loss) * loss
        if objective.requires_grad:  # else there is nothing to train
            with self.unsynchronised():
                self.manual_backward(objective / self.accumulate_batches)

    def _step(self) -> None:
        """Step the optimiser, and let the objective learn from the losses of the step."""
        self.average_over_ranks(self.trained_parameters())
        self.take_step()
        if isinstance(self.objective, Scalarization):
            tasks = self._losses_of_step.tasks
            self.objective.observe(self._losses_of_step.compute()[:, list(tasks)], tasks)
        self._losses_of_step.reset()
        self._steps += 1
        self.step_schedulers("step")

    def _log_training(self, values: Tensor, tasks: Sequence[int], batch_idx: int) -> None:
        if not self.is_logging_due(batch_idx):
            return
        means = values.mean(dim=0)
        logged: dict[str, Any] = {f"train_loss/{self.task_names[task]}": means[task] for task in tasks}
        failures = zip(self.task_names, self.health.known_total, strict=True)
        logged |= {f"nonfinite/{name}": float(count) for name, count in failures if count}
        self.log_dict(logged | self.logged_skips())
        self.log("train_loss", means[list(tasks)].mean(), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """Report sick tasks; step the schedulers that monitor a metric."""
        self.health.report()
        super().on_train_epoch_end()

    # ----------------------------------------------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation; compute what depends on the preferences alone."""
        super().on_validation_epoch_start()
        self._evaluation.reset(len(self.preferences), self.device)
        self._evaluated = True
        self._conditions = list(map(self.network.condition, self.preferences))

    def on_predict_epoch_start(self) -> None:
        """Compute what depends on the preferences alone."""
        self._conditions = list(map(self.network.condition, self.preferences))

    def on_predict_epoch_end(self) -> None:
        """Give back its memory."""
        self._conditions = []

    def _evaluate(self, batch: Any) -> None:
        inputs, targets = self.unpack_batch(batch)
        labels = {task: count for task, count in enumerate(self.count_labels(targets).tolist()) if count}
        if not labels:
            return
        present = {self.task_names[task]: targets[self.task_names[task]] for task in labels}
        outputs = [self.network.predict(inputs, condition) for condition in self._conditions]
        losses = torch.stack([self.loss_vector(row, present) for row in outputs])
        rows: Mapping[str, Any] = {name: [row[name] for row in outputs] for name in present}
        self._evaluation.update(rows, losses, present, labels)

    def _finish_evaluation(self) -> None:
        if self._evaluated:
            self._final_values, self._final_metrics = self._evaluation.compute(partial(self.reduced, operation="sum"))
            self._evaluated = False

    def _log_evaluation(self, split: str) -> None:
        self._conditions = []
        columns = {f"loss/{name}": self.objective_values[:, task] for task, name in enumerate(self.task_names)}
        columns |= self.metric_values
        # Equal on all ranks already; Lightning warns of values that it does not reduce.
        self.log_dict({f"{split}_{name}": column.nanmean() for name, column in columns.items()}, sync_dist=True)
        self.log(f"{split}_loss", self.objective_values.nanmean(), prog_bar=True, sync_dist=True)
        if split == "test":
            for name, column in columns.items():
                self.log_dict({f"test_{name}/{index}": value for index, value in enumerate(column)}, sync_dist=True)

    # ------------------------------------------------------------------------------------------------ optimiser, state

    def on_train_start(self) -> None:
        """Take up the gradients and sums that a checkpoint holds; Lightning zeroes gradients after loading."""
        self.take_up_gradients()
        # It was loaded before the module was moved.
        self._losses_of_step.load_state_dict(self._losses_of_step.state_dict(), self.device)
        super().on_train_start()

    def get_extra_state(self) -> dict[str, Any]:
        """Return everything that decides how the run goes on and is not a parameter or a buffer."""
        return super().get_extra_state() | {
            "gradients": self.accumulated_gradients(),
            "losses_of_step": self._losses_of_step.state_dict(),
            "preferences": self._preferences,
            "objective_values": self._final_values,
            "metric_values": dict(self._final_metrics),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint hold the accumulated gradient of all ranks, each of which has seen its own batches."""
        super().on_save_checkpoint(checkpoint)
        self.save_mean_gradients(checkpoint)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        super().set_extra_state(state)
        self._pending_gradients = state["gradients"]
        self._losses_of_step.load_state_dict(state["losses_of_step"], self.device)
        is_same = torch.equal(state["preferences"].to(self._preferences), self._preferences)
        self._final_values = state["objective_values"] if is_same else None
        self._final_metrics = state["metric_values"] if is_same else {}


@dataclass
class _Predicted:
    """What the network predicts for a preference."""

    outputs: Mapping[str, Any]
    losses: dict[int, Tensor]  # of the tasks with labels on this rank, with their graphs
