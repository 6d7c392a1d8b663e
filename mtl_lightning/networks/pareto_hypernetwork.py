"""A network that generates the parameters of another one from the preference."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn

from mtl_lightning.conditioned import ConditionedNetwork, Skeleton, check_preference, exact
from mtl_lightning.networks.mlp import MLP


class ParetoHypernetwork(ConditionedNetwork):
    """The Pareto hypernetwork (PHN; Navon et al., 2021): from the preference to all parameters of a target network.

    An MLP with two hidden layers maps the preference to features, and a linear layer for each tensor of parameters
    maps these to its entries. Only they are trained. The target's frozen parameters (``requires_grad=False``) are not
    generated, and its buffers are shared by all preferences: running statistics of batch normalisation are those of a
    mixture of models. Choose another normalisation.

    Args:
        target: Maps inputs to a dict of predictions, task name to tensor. Its structure is copied, its parameters are
            not: training starts from what the hypernetwork generates at first, in the dtype of the first of them.
        num_tasks: The number of tasks ``T``.
        hidden: The width of the MLP and of its features, that of the paper's code by default. There are about
            ``hidden`` times as many parameters as in the target; larger targets need chunks of shared generators
            (Navon et al., 2021), which are not provided.

    Attributes:
        names: The names of the generated parameters, in the order of ``generators``.

    Raises:
        ValueError: If a number is not positive, or the target has no trainable parameter.

    References:
        - Navon, Shamsian, Chechik, Fetaya: Learning the Pareto Front with Hypernetworks (2021), ICLR, arXiv:2010.04104.

    Example:
        >>> import torch
        >>> from mtl_lightning.networks import MultiHeadNetwork
        >>> target = MultiHeadNetwork(nn.Linear(8, 4), {"left": nn.Linear(4, 10), "right": nn.Linear(4, 1)})
        >>> network = ParetoHypernetwork(target, num_tasks=2)
        >>> outputs = network(torch.zeros(5, 8), torch.tensor([0.3, 0.7]))
        >>> {name: tuple(output.shape) for name, output in outputs.items()}
        {'left': (5, 10), 'right': (5, 1)}
        >>> network.at(torch.tensor([0.3, 0.7])).state_dict().keys() == target.state_dict().keys()
        True
    """

    def __init__(self, target: nn.Module, num_tasks: int, hidden: int = 100) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.target = Skeleton(target)
        self.features = MLP(num_tasks, (hidden, hidden), out_features=hidden)
        self.names = tuple(self.target.shapes)
        self.generators = nn.ModuleList(nn.Linear(hidden, prod(shape)) for shape in self.target.shapes.values())
        generated = next(parameter for parameter in target.parameters() if parameter.requires_grad)
        for part in (self.features, self.generators):
            part.to(generated.device, generated.dtype)

    def condition(self, preference: Tensor) -> dict[str, Tensor]:
        """Return the parameters of the target for a preference, shape ``(T,)``: name to tensor.

        Raises:
            ValueError: If the preference has another shape.
        """
        check_preference(preference, self.num_tasks)
        with exact(preference.device):
            features = self.features(preference.to(self.generators[0].weight.dtype).unsqueeze(0))  # type: ignore[arg-type]
            return {
                name: generator(features).view(shape)
                for generator, (name, shape) in zip(self.generators, self.target.shapes.items(), strict=True)
            }

    def predict(self, inputs: Any, condition: Any) -> dict[str, Tensor]:
        """Return the target's predictions with the parameters of ``condition``."""
        outputs: dict[str, Tensor] = self.target(inputs, condition)
        return outputs

    def at(self, preference: Tensor) -> nn.Module:
        """Return a copy of the target with its parameters for a preference, shape ``(T,)``."""
        return self.target.filled(self.condition(preference))
