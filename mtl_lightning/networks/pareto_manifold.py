"""A network whose parameters are mixed from one set per task."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtl_lightning.conditioned import ConditionedNetwork, Skeleton, check_preference, exact
from mtl_lightning.population import Population


class ParetoManifold(ConditionedNetwork):
    """Pareto manifold learning (PaMaL; Dimitriadis et al., 2023): parameters ``sum_t w_t theta_t``.

    Each of the ``T`` ends ``theta_t`` is a network of its own; the preference mixes them to one, and at a vertex of the
    simplex is one of them. The conjecture is that the Pareto front is the image of such a flat piece of the parameter
    space. Frozen parameters (``requires_grad=False``) are held once. So are buffers: running statistics of batch
    normalisation are those of a mixture of models. Choose another normalisation.

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor. Its state is copied.
        num_tasks: The number of tasks ``T``.
        init: ``"independent"``: each end draws its own parameters through the ``reset_parameters`` methods of the
            network's modules, from torch's global generator; this is what the paper's code does. ``"common"``: all
            start from the network's.

    Attributes:
        ends: The trainable parameters, each of shape ``(T, ...)``: slice ``t`` is that of the end of task ``t``.
        names: Their names in the network, in the same order.

    Raises:
        ValueError: If ``num_tasks`` is not positive, the network has no trainable parameter, or
            ``init="independent"`` cannot reach every one.
        TypeError: If the trainable parameters differ in dtype.

    Note:
        An optimiser sees the ``T`` ends of a tensor as one. That is the same for all element-wise optimisers, such as
        SGD and Adam; those that take norms over a tensor, such as LAMB, couple the ends.

    References:
        - Dimitriadis, Frossard, Fleuret: Pareto Manifold Learning: Tackling Multiple Tasks via Ensembles of Single-Task
          Models (2023), ICML, arXiv:2210.09759.

    Example:
        >>> from mtl_lightning.networks import MultiHeadNetwork
        >>> base = MultiHeadNetwork(nn.Linear(8, 4), {"left": nn.Linear(4, 10), "right": nn.Linear(4, 1)})
        >>> network = ParetoManifold(base, num_tasks=2)
        >>> outputs = network(torch.zeros(5, 8), torch.tensor([0.3, 0.7]))
        >>> {name: tuple(output.shape) for name, output in outputs.items()}
        {'left': (5, 10), 'right': (5, 1)}
        >>> end = network.at(torch.tensor([0.0, 1.0]))
        >>> torch.equal(end.encoder.bias, network.ends[1][1])
        True
    """

    def __init__(
        self, network: nn.Module, num_tasks: int, init: Literal["independent", "common"] = "independent"
    ) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"`num_tasks` should be at least 1. Found {num_tasks}.")
        if init not in ("independent", "common"):
            raise ValueError(f"`init` should be 'independent' or 'common'. Found {init!r}.")
        self.num_tasks = num_tasks
        self.network = Skeleton(network)
        self.names = tuple(self.network.shapes)
        copies = Population(network, num_tasks, init)
        parameters = [dict(copies.member(task).named_parameters()) for task in range(num_tasks)]
        self.ends = nn.ParameterList(
            nn.Parameter(torch.stack([own[name].detach() for own in parameters])) for name in self.names
        )

    def condition(self, preference: Tensor) -> dict[str, Tensor]:
        """Return the mixed parameters for a preference, shape ``(T,)``: name to tensor.

        Raises:
            ValueError: If the preference has another shape.
        """
        check_preference(preference, self.num_tasks)
        with exact(preference.device):
            return {
                name: torch.tensordot(preference.to(ends.dtype), ends, dims=1)
                for name, ends in zip(self.names, self.ends, strict=True)
            }

    def predict(self, inputs: Any, condition: Any) -> dict[str, Tensor]:
        """Return the network's predictions with the parameters of ``condition``."""
        outputs: dict[str, Tensor] = self.network(inputs, condition)
        return outputs

    def at(self, preference: Tensor) -> nn.Module:
        """Return a copy of the network with its parameters for a preference, shape ``(T,)``."""
        return self.network.filled(self.condition(preference))
