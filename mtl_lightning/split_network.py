"""A network seen as a trunk that all tasks share and one head per task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree


class GradientGate:
    """Keeps the gradient of a task whose loss is not finite from what other tasks share with it.

    ``0 * nan`` is NaN, so that a weight of zero for such a loss is not enough: the gradient is replaced where it leaves
    the loss and where it leaves the head. Nothing waits for the device.

    Attributes:
        is_open: By task, whether its gradient passes; boolean tensors of shape ``()``, set before the backward pass.
    """

    def __init__(self) -> None:
        self.is_open: Mapping[str, Tensor] = {}

    def guard(self, task: str, tree: Any) -> Any:
        """Return ``tree`` with every tensor that has a graph behind the gate of ``task``."""

        def stop(gradient: Tensor) -> Tensor:
            return torch.where(self.is_open[task], gradient, 0.0) if task in self.is_open else gradient

        def guarded(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            alias = tensor.view_as(tensor)
            alias.register_hook(stop)  # type: ignore[no-untyped-call]
            return alias

        return pytree.tree_map_only(Tensor, guarded, tree)


class SplitNetwork:
    """A view of a network that evaluates only the heads that are asked for, with a graph only where it is needed.

    A network with a module ``encoder`` and a ``ModuleDict`` ``heads``, of which it applies each to what the encoder
    returns, is split; :class:`~mtl_lightning.networks.MultiHeadNetwork` is one. Any other network is evaluated as a
    whole. It trains to the same parameters, since a gradient reaches only the heads of the losses it comes from, but
    every pass costs and stores all heads, and a failing head can reach the trunk (see :class:`GradientGate`).

    Args:
        network: Maps inputs to a dict of predictions, task name to tensor.
        task_names: The names of the tasks.

    Attributes:
        network: The network.
        is_split: Whether the heads are evaluated apart from the encoder.

    Raises:
        ValueError: If the heads are not those of the tasks, or a head has parameters but none of its own.

    Example:
        >>> from mtl_lightning.networks import MultiHeadNetwork
        >>> network = MultiHeadNetwork(nn.Linear(8, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
        >>> split = SplitNetwork(network, ["a", "b"])
        >>> predictions = split.predict(torch.zeros(2, 8), trained=["a"], measured=["a", "b"], gate=GradientGate())
        >>> {task: prediction.requires_grad for task, prediction in predictions.items()}
        {'a': True, 'b': False}
    """

    def __init__(self, network: nn.Module, task_names: Sequence[str]) -> None:
        self.network = network
        self.task_names = tuple(task_names)
        encoder, heads = getattr(network, "encoder", None), getattr(network, "heads", None)
        self.is_split = isinstance(encoder, nn.Module) and isinstance(heads, nn.ModuleDict)
        self._heads: dict[str, nn.Module] = dict(heads.items()) if isinstance(heads, nn.ModuleDict) else {}
        if not self.is_split:
            return
        if set(self._heads) != set(self.task_names):
            raise ValueError(
                "The heads of the network should be those of the tasks, "
                f"{', '.join(map(repr, self.task_names))}. Found {', '.join(map(repr, self._heads)) or 'none'}."
            )
        for task, head in self._heads.items():
            if any(True for _ in head.parameters()) and not self.head_parameters()[task]:
                raise ValueError(
                    f"The head of task {task!r} should have parameters of its own. Found that it shares all of them "
                    "with the encoder or other heads; give it a layer of its own, or let it have no parameters."
                )

    def head_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that belong to one head alone, by task; of a network that is not split none."""
        if not self.is_split:
            return {task: [] for task in self.task_names}
        outside = {
            id(parameter)
            for name, module in self.network.named_children()
            if name != "heads"
            for parameter in module.parameters()
        } | {id(parameter) for parameter in self.network.parameters(recurse=False)}
        uses = Counter(id(parameter) for head in self._heads.values() for parameter in head.parameters())
        return {
            task: [p for p in self._heads[task].parameters() if uses[id(p)] == 1 and id(p) not in outside]
            for task in self.task_names
        }

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that belong to no single head; of a network that is not split all."""
        own = {id(parameter) for parameters in self.head_parameters().values() for parameter in parameters}
        return [parameter for parameter in self.network.parameters() if id(parameter) not in own]

    def predict(
        self,
        inputs: Any,
        trained: Collection[str],
        measured: Collection[str],
        gate: GradientGate,
        seen: set[str] | None = None,
    ) -> dict[str, Tensor]:
        """Return the predictions of some tasks, by name.

        Args:
            inputs: What the network is called with.
            trained: The tasks whose predictions have a graph; without any, nothing has.
            measured: The tasks to be evaluated; those in training among them.
            gate: Stands between the heads of the tasks in training and the rest.
            seen: What has been evaluated on these inputs already. Batch statistics are taken up by the first pass over
                a module alone, since the others do not see new data; the set is extended.
        """
        seen = set() if seen is None else seen
        # Within one autocast region the weights cast to half precision are kept. They are out of date after a step,
        # and have no graph if they were first used without.
        torch.clear_autocast_cache()
        if not self.is_split:
            with torch.set_grad_enabled(bool(trained)), frozen_statistics(self.network.modules() if seen else ()):
                outputs = self.network(inputs)
            seen.add("")
            if not isinstance(outputs, Mapping):
                return outputs
            return {
                # What has a graph gets a gradient of zero from losses that are left out of a sum, and is then stepped.
                task: gate.guard(task, prediction) if task in trained else prediction.detach()
                for task, prediction in outputs.items()
                if task in measured
            }
        encoder = self.network.encoder
        assert isinstance(encoder, nn.Module)
        with torch.set_grad_enabled(bool(trained)), frozen_statistics(encoder.modules() if "" in seen else ()):
            features = encoder(inputs)
        seen.add("")
        outputs = {}
        for task, head in self._heads.items():  # always in this order, or paired passes would draw different numbers
            if task not in measured:
                continue
            torch.clear_autocast_cache()
            with frozen_statistics(head.modules() if task in seen else ()):
                if task in trained:
                    outputs[task] = gate.guard(task, head(gate.guard(task, features)))
                else:
                    with torch.no_grad():
                        outputs[task] = head(features)
            seen.add(task)
        return outputs


@contextmanager
def frozen_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let batch and instance normalisation among ``modules`` not take up the statistics of what they see."""
    # Each of the two classes ignores the attribute that the other one reads.
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, _NormBase) and module.track_running_stats and module.training:
                name, value = ("momentum", 0.0) if isinstance(module, _InstanceNorm) else ("track_running_stats", False)
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield
