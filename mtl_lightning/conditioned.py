"""Networks that follow a preference: one set of parameters for a whole Pareto front.

A conditioned network maps inputs and a preference vector, shape ``(T,)``, to predictions. Its forward pass has two
parts. ``condition`` computes what depends on the preference alone, such as the parameters that a hypernetwork
generates; ``predict`` computes the predictions from that. Whoever predicts for many batches with one preference calls
the first part once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ConditionedNetwork(nn.Module):
    """The base of all networks that follow a preference.

    A subclass overrides :meth:`predict`, and :meth:`condition` and :meth:`at` where it can do better.

    Example:
        >>> class Shifted(ConditionedNetwork):
        ...     def predict(self, inputs, condition):
        ...         return {"low": inputs - condition[0], "high": inputs + condition[1]}
        >>> network = Shifted()
        >>> network(torch.zeros(1), torch.tensor([0.25, 0.75]))
        {'low': tensor([-0.2500]), 'high': tensor([0.7500])}
        >>> network.at(torch.tensor([1.0, 0.0]))(torch.zeros(1))
        {'low': tensor([-1.]), 'high': tensor([0.])}
    """

    def condition(self, preference: Tensor) -> Any:
        """Return what depends on the preference, shape ``(T,)``, alone; by default the preference itself."""
        return preference

    def predict(self, inputs: Any, condition: Any) -> dict[str, Tensor]:
        """Return the predictions, task name to tensor of shape ``(B, ...)``.

        Args:
            inputs: The inputs of a batch.
            condition: What :meth:`condition` has returned.
        """
        raise NotImplementedError

    def forward(self, inputs: Any, preference: Tensor) -> dict[str, Tensor]:
        """Return the predictions for a preference, shape ``(T,)``: task name to tensor of shape ``(B, ...)``."""
        return self.predict(inputs, self.condition(preference))

    def at(self, preference: Tensor) -> nn.Module:
        """Return a copy with the preference, shape ``(T,)``, baked in: a plain module, from inputs to predictions."""
        return AtPreference(self, preference)


class AtPreference(nn.Module):
    """A copy of a conditioned network with one preference, which is a buffer.

    Args:
        network: The conditioned network.
        preference: Shape ``(T,)``.
    """

    preference: Tensor

    def __init__(self, network: ConditionedNetwork, preference: Tensor) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.register_buffer("preference", preference.detach().clone())

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Return the predictions, task name to tensor of shape ``(B, ...)``."""
        outputs: dict[str, Tensor] = self.network(inputs, self.preference)
        return outputs


class Skeleton(nn.Module):
    """A network without its trainable parameters, which are handed in with each call.

    Frozen parameters and buffers stay where they are: all calls share them.

    Args:
        network: Any module; it is copied.

    Attributes:
        shapes: The shapes of the trainable parameters, by their names in the network, in its order. Of tied parameters
            there is the first name only.

    Raises:
        ValueError: If nothing is trainable.
        TypeError: If a trainable parameter is not floating-point.

    Note:
        ``torch.utils.checkpoint`` inside the network is not supported: it calls layers again in the backward pass, when
        the parameters are no longer in place.

    Example:
        >>> skeleton = Skeleton(nn.Linear(2, 1))
        >>> skeleton.shapes
        {'weight': torch.Size([1, 2]), 'bias': torch.Size([1])}
        >>> skeleton(torch.ones(1, 2), {"weight": torch.ones(1, 2), "bias": torch.ones(1)})
        tensor([[3.]])
        >>> sorted(skeleton.state_dict())
        []
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("`network` should have a trainable parameter. Found none with `requires_grad=True`.")
        for name, parameter in trained.items():
            if not parameter.is_floating_point():
                raise TypeError(
                    f"The trainable parameters of `network` should be floating-point. Found {parameter.dtype} for "
                    f"{name!r}."
                )
        self.shapes = {name: parameter.shape for name, parameter in trained.items()}
        names = {id(parameter): name for name, parameter in trained.items()}
        # Paths, not modules: a layer may be replaced, as when batch normalisation is made to synchronise.
        self._places: dict[str, list[tuple[str, str]]] = {name: [] for name in trained}
        for path, module in self.network.named_modules():
            for name, found in module._parameters.items():
                if id(found) in names:
                    self._places[names[id(found)]].append((path, name))
        self._fill(self.network, dict.fromkeys(self.shapes))

    def forward(self, inputs: Any, parameters: Mapping[str, Tensor]) -> Any:
        """Return the output of the network with the given parameters, by name."""
        self._fill(self.network, parameters)
        try:
            return self.network(inputs)
        finally:
            self._fill(self.network, dict.fromkeys(self.shapes))

    def filled(self, parameters: Mapping[str, Tensor]) -> nn.Module:
        """Return a copy of the network with the given parameters, as it was made of, with its ``state_dict`` keys."""
        member = copy.deepcopy(self.network)
        self._fill(member, {name: nn.Parameter(value.detach().clone()) for name, value in parameters.items()})
        return member

    def _fill(self, network: nn.Module, parameters: Mapping[str, Tensor | None]) -> None:
        # None is torch's own mark of a parameter that a module does without: it is not listed, saved or moved.
        for name, places in self._places.items():
            for path, own in places:
                network.get_submodule(path)._parameters[own] = parameters[name]  # type: ignore[assignment]
        for module in network.modules():
            if isinstance(module, nn.RNNBase):  # it holds its weights a second time
                module._flat_weights = [getattr(module, own, None) for own in module._flat_weights_names]


def check_preference(preference: Tensor, num_tasks: int) -> Tensor:
    """Return ``preference``, or raise an error unless its shape is ``(T,)``.

    Raises:
        ValueError: If the shape is another.
    """
    if preference.shape != (num_tasks,):
        raise ValueError(
            f"`preference` should have shape ({num_tasks},), one weight per task. Found shape "
            f"{tuple(preference.shape)}."
        )
    return preference


def exact(device: torch.device) -> torch.autocast:
    """Return a context without autocast, in which parameters are made: half precision would round them."""
    return torch.autocast(device.type, enabled=False)
