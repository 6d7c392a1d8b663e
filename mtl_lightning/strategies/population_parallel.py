"""Training a population over processes of which each holds some of the subproblems."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from torch import distributed as dist
from torch.amp import GradScaler
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from mtl_lightning.endings import destroy_groups_at_exit
from mtl_lightning.population_shards import Shards
from mtl_lightning.protocols import SpreadPopulationProtocol


class PopulationParallelStrategy(DDPStrategy):
    r"""Spreads the ``P`` subproblems of a population over the processes: each trains its own, on all data.

    No gradient leaves its process. What the processes tell each other in a step are the losses of their subproblems,
    and the parameters that a transfer asks for: those of the givers, if the rule names them, and otherwise all. They
    travel while gradients are computed, since a transfer uses the parameters of before the step. With ``W`` processes
    each one keeps ``P / W`` subproblems and their optimiser state.

    It trains what a single process trains, for modules that are built on
    :class:`~mtl_lightning.modules.PopulationModule`, such as :class:`~mtl_lightning.modules.MT2OModule`. Checkpoints
    hold the whole population and can be read by any number of processes; after ``fit`` every process holds all of it,
    in the memory of the host.

    Args:
        data_parallel_size: How many processes share each block of subproblems; every batch is split among them and
            their gradients are averaged. It divides the number of processes. Those with the same block are
            neighbours in rank, so that they lie on one node where possible.
        accelerator: Set by the ``Trainer``, as are the next three.
        parallel_devices: See there.
        cluster_environment: See there.
        checkpoint_io: See there.
        precision_plugin: See there.
        process_group_backend: ``"nccl"`` or ``"gloo"``; by the device, unless it is given.
        timeout: After how long a process that does not answer ends the run.
        start_method: How processes are started on one node.

    Raises:
        ValueError: If ``data_parallel_size`` is less than one.
        MisconfigurationException: When training is set up, if the module has no population, the number of processes is
            not divisible by ``data_parallel_size``, or there are more blocks than subproblems.

    Note:
        All processes have to see the same batches (with ``data_parallel_size`` above one: parts of the same batch).
        Lightning's samplers and those of this library's data modules do; the first batch is compared. Augmentation
        that is drawn at random from a generator that processes seed differently would go unnoticed later.

        Limits: synchronised batch normalisation is refused. While a population grows and there are fewer subproblems
        than blocks, the last processes wait. Random numbers in the network are those of one process with the loop as
        backend; under vmap they differ.

    Example:
        >>> from mtl_lightning.strategies import PopulationParallelStrategy
        >>> PopulationParallelStrategy(data_parallel_size=2).data_parallel_size
        2
    """

    def __init__(
        self,
        data_parallel_size: int = 1,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        if not isinstance(data_parallel_size, int) or data_parallel_size < 1:
            raise ValueError(f"`data_parallel_size` should be an integer of at least 1. Found {data_parallel_size!r}.")
        self.data_parallel_size = data_parallel_size
        self._groups: tuple[Any, Any] | None = None
        self._last_shards: Shards | None = None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What a sampler has to know: processes with different subproblems see the same samples."""
        return {"num_replicas": self.data_parallel_size, "rank": self.global_rank % self.data_parallel_size}

    def setup_environment(self) -> None:
        """Start the processes, and make the groups of those that share data and of those that share a population."""
        super().setup_environment()
        destroy_groups_at_exit()
        if self.world_size % self.data_parallel_size:
            raise MisconfigurationException(
                f"The number of processes should be divisible by `data_parallel_size`, {self.data_parallel_size}. "
                f"Found {self.world_size}."
            )
        if self._groups is None:
            self._groups = self._make_groups()

    def _make_groups(self) -> tuple[Any, Any]:
        """Return the group of those that share this process's data slot, and that of those with its subproblems."""
        size = self.data_parallel_size
        own: list[Any] = [None, None]
        # Every process has to make every group.
        for slot in range(size):
            group = dist.new_group(list(range(slot, self.world_size, size)), timeout=self._timeout)
            if self.global_rank % size == slot:
                own[0] = group
        for first in range(0, self.world_size, size):
            group = dist.new_group(list(range(first, first + size)), timeout=self._timeout)
            if first <= self.global_rank < first + size:
                own[1] = group
        return own[0], own[1]

    def setup(self, trainer: Trainer) -> None:
        """Give each process its subproblems, before the optimiser is made of them."""
        module = self._population_module()
        assert self._groups is not None
        if self._layer_sync is not None:
            raise MisconfigurationException(
                "`PopulationParallelStrategy` should be used without `Trainer(sync_batchnorm=True)`. Found it; remove "
                "it: every process sees the whole batch."
            )
        blocks = self.world_size // self.data_parallel_size
        final = len(module.final_preferences)
        if blocks > final:
            raise MisconfigurationException(
                f"There should be at least as many subproblems as processes with different ones, {blocks}. Found "
                f"{final}. Use fewer devices, or a larger `data_parallel_size`."
            )
        group, data_group = self._groups
        data_rank = self.global_rank % self.data_parallel_size
        self._share_the_rest(module)
        shards = Shards(module.shards.size, group)
        module.spread(shards, data_group, data_rank, self.data_parallel_size, self.root_device)
        self._share_overflows()
        # Not that of DDP, which lets the first process overwrite what the others hold.
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self._last_shards = None
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _share_the_rest(self, module: SpreadPopulationProtocol) -> None:
        """Let all processes have what the first one has of the parameters and buffers that are no rows."""
        rows = {f"population.{name}" for name in module.population.stacked_names}
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and name not in rows:
                shared = tensor.detach().to(self.root_device, copy=True)
                dist.broadcast(shared, 0)
                tensor.data.copy_(shared)

    def _share_overflows(self) -> None:
        """Let all processes skip a step under a gradient scaler if one has to."""
        plugin = self.precision_plugin
        if not isinstance(plugin, MixedPrecision) or plugin.scaler is None or not plugin.scaler.is_enabled():
            return
        if not isinstance(plugin.scaler, _SharedGradScaler):
            shared = _SharedGradScaler(self.root_device.type)
            shared.load_state_dict(plugin.scaler.state_dict())
            plugin.scaler = shared

    def _population_module(self) -> SpreadPopulationProtocol:
        module: Any = self.lightning_module
        if not hasattr(module, "spread") or not hasattr(module, "population"):
            raise MisconfigurationException(
                "`PopulationParallelStrategy` should train a module with a population, such as `MT2OModule`. Found "
                f"{type(module).__name__}; use `Trainer(strategy='ddp')` for it."
            )
        result: SpreadPopulationProtocol = module
        return result

    # -------------------------------------------------------------------------------------------------- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state of the whole population; every process has to call it."""
        return self._population_module().whole_state(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of the optimiser for the whole population; every process has to call it."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        shards = self._last_shards or self._population_module().shards
        if not shards.is_spread:
            return state
        # After the run it lies in the memory of the host, which not every backend can send from.
        return _with_rows(state, len(shards.own), lambda rows: shards.collect(rows.to(self.root_device)))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of the state of the optimiser."""
        shards = self._population_module().shards
        states = [
            _with_rows(state, shards.size, lambda rows: rows[shards.members].clone())
            for state in checkpoint["optimizer_states"]
        ]
        super().load_optimizer_state_dict({"optimizer_states": states})

    def teardown(self) -> None:
        """Bring the population together again, unless the run has failed; then other processes may not answer."""
        trainer = None if self.lightning_module is None else self.lightning_module._trainer
        if trainer is not None and trainer.state.status != TrainerStatus.INTERRUPTED:
            module = self._population_module()
            if module.shards.group is not None:
                if trainer.state.fn == TrainerFn.FITTING:
                    self._last_shards = module.shards
                module.gather()
        super().teardown()


class _SharedGradScaler(GradScaler):
    """Finds an overflow where any process does, so that all skip the same steps and have the same scale."""

    def unscale_(self, optimizer: Optimizer) -> None:
        # The one of FSDP does the same, but its flag has a shape that fused optimisers do not take.
        super().unscale_(optimizer)
        for found in self._found_inf_per_device(optimizer).values():
            dist.all_reduce(found)


def _with_rows(state: dict[str, Any], size: int, move: Any) -> dict[str, Any]:
    """Return the state of an element-wise optimiser with ``move`` of everything that has a row per subproblem."""
    moved = {
        parameter: {
            key: move(value) if isinstance(value, Tensor) and value.ndim == 2 and len(value) == size else value
            for key, value in sorted(values.items())
        }
        for parameter, values in state["state"].items()
    }
    return state | {"state": moved}
