"""Aggregators and weightings of TorchJD.

TorchJD is an optional dependency: ``pip install mtl-lightning[torchjd]``. Nothing else of this package knows it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtl_lightning.aggregation import GradientAggregator, project_onto_dual_cone
from mtl_lightning.seeds import mix_seed

if TYPE_CHECKING:
    from torchjd.aggregation import Aggregator, Weighting
    from torchjd.linalg import DualConeProjector
else:
    DualConeProjector = object  # TorchJD calls a projector without asking for its class

# What TorchJD keeps from call to call, by class. Some of it is no buffer, and its buffers appear only with the first
# call, so that a `state_dict` that holds them cannot be loaded.
STATE: Mapping[str, tuple[str, ...]] = {
    "GradVacWeighting": ("_phi_t", "_state_key"),
    "ExcessMTLWeighting": ("_weights", "_sq_grad_sum", "_initial_w", "_warmup_w_sum", "_n_steps", "_state_key"),
    "PCDWeighting": ("_sq_norm_ema", "_n_steps", "_state_key"),
    "MoDoWeighting": ("_lambda", "_state_key"),
    "SDMGradWeighting": ("_w", "_state_key"),
    "CRMOGMWeighting": ("_lambda",),
}
# Where TorchJD holds vectors with one entry per task that the user gave.
PER_TASK = ("weights", "leak", "_pref_vector", "_initial_weights")


class TorchJD(GradientAggregator):
    """An aggregator or weighting of TorchJD, with its state in checkpoints and the same random numbers on all ranks.

    Args:
        aggregator: An object of ``torchjd.aggregation.Aggregator``, or a ``torchjd.aggregation.Weighting`` that takes
            the Gramian. It belongs to this object from now on, and starts anew.
        seed: Another seed draws other numbers, for those that draw any. They depend on it and the number of steps
            alone; torch's generators are left as they were.

    Attributes:
        aggregator: The object of TorchJD.

    Raises:
        ImportError: If TorchJD is not installed.
        TypeError: If ``aggregator`` is of another kind.

    Note:
        ``UPGrad`` and ``DualProj`` ask for a solver under the GPL by default: give them
        ``projector=ActiveSetProjector()``, or take :class:`~mtl_lightning.aggregation.UPGrad`. For the ``NashMTL`` of
        TorchJD, which is refused, take :class:`~mtl_lightning.nash.NashMTL`.

        In a step without some of the tasks, vectors with one entry per task are cut down to the others. What has a
        state is replaced by a copy that starts anew, for this step, and goes on from its own when all tasks are back.
        ``PCD`` takes the first task that is there for the primary one. ``MoDoWeighting`` and ``SDMGradWeighting`` are
        given the Gramian of one batch, where their papers have the products of two. The state of classes that are not
        TorchJD's own is not saved.

    Example:
        >>> from torchjd.aggregation import FairGrad
        >>> aggregator = TorchJD(FairGrad(alpha=2.0))
        >>> aggregator.resolve(["depth", "edges"])
        >>> aggregator(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).round(decimals=4)
        tensor([1., 1.])
    """

    def __init__(self, aggregator: Aggregator | Weighting[Any], seed: int = 0) -> None:
        super().__init__()
        try:
            from torchjd.aggregation import Aggregator, ExcessMTLWeighting, NashMTL, Weighting
        except ImportError as error:
            raise ImportError(
                "`TorchJD` should have TorchJD to call. Found that it is not installed; "
                "`pip install mtl-lightning[torchjd]`."
            ) from error
        if not isinstance(aggregator, (Aggregator, Weighting)):
            raise TypeError(
                "`aggregator` should be an object of `torchjd.aggregation.Aggregator` or "
                f"`torchjd.aggregation.Weighting`. Found {aggregator!r}."
            )
        if isinstance(aggregator, NashMTL):
            raise TypeError("`aggregator` should not be TorchJD's NashMTL. Take `mtl_lightning.nash.NashMTL`.")
        if isinstance(aggregator, Weighting) and any(isinstance(m, ExcessMTLWeighting) for m in aggregator.modules()):
            raise TypeError(
                "`aggregator` should be a weighting that takes the Gramian. Found one that takes the Jacobian; wrap it "
                "in `torchjd.aggregation.WeightedAggregator`."
            )
        self.seed = seed
        self._held = (aggregator,)  # in a tuple, or it would be a submodule, with a `state_dict`
        self._draws = 0
        self._loaded: list[dict[str, Any]] | None = None
        self.needs_jacobian = _of_the_gramian(aggregator) is None

    @property
    def aggregator(self) -> Aggregator | Weighting[Any]:
        """The object of TorchJD."""
        return self._held[0]

    def reset(self) -> None:
        """Forget what the object of TorchJD has learned."""
        self._draws = 0
        self._loaded = None
        _reset(self.aggregator)

    def solve(self, gramian: Tensor, columns: list[int]) -> Tensor:
        """Return the weights that TorchJD gives some tasks."""
        return self._call(gramian, columns).double()

    def combine(self, jacobian: Tensor, columns: list[int]) -> Tensor:
        """Return the gradient that TorchJD makes of those of some tasks."""
        return self._call(jacobian, columns)

    @torch.no_grad()
    def _call(self, statistic: Tensor, columns: list[int]) -> Tensor:
        if self._loaded is not None:
            _load(self.aggregator, self._loaded, statistic.device)
            self._loaded = None
        found = self.aggregator
        if len(columns) < len(self.task_names):
            found = copy.deepcopy(found)
            _reset(found)
        for module, name, vector in _vectors(found):
            whole = len(vector) == len(self.task_names)
            setattr(module, name, (vector[columns] if whole else vector).to(statistic))
        function: Any = found if self.needs_jacobian else _of_the_gramian(found)
        devices = [statistic.device] if statistic.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            seed = mix_seed(self.seed, self._draws)
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[torch.device(device).index].manual_seed(seed)
            result: Tensor = function(statistic)
        self._draws += 1
        return result

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the object of TorchJD and how often it was called, as part of the ``state_dict``."""
        state = _state(self.aggregator) if self._loaded is None else self._loaded
        return {"draws": self._draws, "state": state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self._draws = state["draws"]
        self._loaded = state["state"]  # until the next call, which knows the device


class ActiveSetProjector(DualConeProjector):
    """The projection that ``UPGrad`` and ``DualProj`` of TorchJD are made of, without a solver under the GPL.

    It is exact: the Gramian is not regularised, as it is by default in TorchJD.

    Example:
        >>> from torchjd.aggregation import DualProj
        >>> DualProj(projector=ActiveSetProjector())(torch.tensor([[1.0, 0.0], [-3.0, 1.0]]))
        tensor([0.0000, 0.5000])
    """

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:  # noqa: N803  # the names are TorchJD's
        """Return the weights of the projections, shape ``(..., T)``, of sums of gradients with the weights ``U``."""
        return project_onto_dual_cone(U.to(G), G)


def _of_the_gramian(aggregator: nn.Module) -> nn.Module | None:
    """Return what maps a Gramian to weights, or ``None`` if the Jacobian is needed."""
    from torchjd.aggregation import GramianWeightedAggregator, WeightedAggregator, Weighting

    if isinstance(aggregator, Weighting):
        return aggregator
    if isinstance(aggregator, GramianWeightedAggregator):
        return aggregator.gramian_weighting
    if isinstance(aggregator, WeightedAggregator) and _reads_only_the_shape(aggregator.weighting):
        return aggregator.weighting
    return None


def _reads_only_the_shape(weighting: nn.Module) -> bool:
    from torchjd.aggregation import (
        ConstantWeighting,
        CRMOGMWeighting,
        MeanWeighting,
        RandomWeighting,
        SumWeighting,
    )

    if isinstance(weighting, CRMOGMWeighting):
        return _reads_only_the_shape(weighting.weighting)
    return isinstance(weighting, (ConstantWeighting, MeanWeighting, RandomWeighting, SumWeighting))


def _reset(aggregator: nn.Module) -> None:
    from torchjd import Stateful

    for module in aggregator.modules():
        if isinstance(module, Stateful):
            module.reset()


def _vectors(aggregator: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Return where there are vectors with one entry per task, with their names, and the vectors."""
    places = ((module, name, getattr(module, name, None)) for module in aggregator.modules() for name in PER_TASK)
    return [(module, name, value) for module, name, value in places if isinstance(value, Tensor) and value.ndim == 1]


def _names(module: nn.Module) -> Sequence[str]:
    """Return the names of what a module keeps from call to call."""
    return next((STATE[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in STATE), ())


def _state(aggregator: nn.Module) -> list[dict[str, Any]]:
    return [{name: getattr(module, name) for name in _names(module)} for module in aggregator.modules()]


def _load(aggregator: nn.Module, state: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    for module, values in zip(aggregator.modules(), state, strict=True):
        for name, value in values.items():
            setattr(module, name, _moved(value, device))


def _moved(value: Any, device: torch.device) -> Any:
    """Return a part of a state for the device that the statistic is on, where TorchJD would have made it."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, tuple):
        return tuple(device if isinstance(entry, torch.device) else entry for entry in value)
    return value
