"""A network seen as a trunk that all tasks share and one head per task."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from mtl_lightning.devices import is_read_at_once


class GradientGate:
    """Keeps the gradient of a task whose loss is not finite from what other tasks share with it.

    ``0 * nan`` is NaN, so that a weight of zero for such a loss is not enough: the gradient is replaced where it leaves
    the loss and where it leaves the head. Nothing waits for the device.

    Attributes:
        is_open: By task, whether its gradient passes; boolean tensors of shape ``()``, set before the backward pass.
            The gradient of a task that is not named passes as it is.
    """

    def __init__(self) -> None:
        self.is_open: Mapping[str, Tensor] = {}

    def decide(self, tasks: Sequence[str], losses: Tensor) -> None:
        """Let the gradients of ``tasks`` pass whose losses, shape ``(T',)``, are finite.

        A device is not asked: there every gradient is selected, which reads and writes it once more.
        """
        finite = losses.isfinite()
        passes = finite.tolist() if is_read_at_once(losses) else [False] * len(tasks)
        flags = zip(tasks, finite.unbind(), passes, strict=True)
        self.is_open = {task: flag for task, flag, is_known_to_pass in flags if not is_known_to_pass}

    def guard(self, task: str, tree: Any) -> Any:
        """Return ``tree`` with every tensor that has a graph behind the gate of ``task``."""

        def guarded(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            alias = tensor.view_as(tensor)
            alias.register_hook(partial(self._stop, task))  # type: ignore[no-untyped-call]
            return alias

        return pytree.tree_map_only(Tensor, guarded, tree)

    @contextmanager
    def guarded_parameters(self, task: str, module: Any) -> Iterator[None]:
        """Keep the parameters of ``module``, if it is one, behind the gate: those of a loss lie before the guards."""
        with ExitStack() as stack:
            for parameter in module.parameters() if isinstance(module, nn.Module) else ():
                if parameter.requires_grad:
                    handle = parameter.register_hook(partial(self._stop, task))  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)
            yield

    def _stop(self, task: str, gradient: Tensor) -> Tensor:
        return torch.where(self.is_open[task], gradient, 0.0) if task in self.is_open else gradient


class SplitNetwork:
    """A view of a network that evaluates only the heads that are asked for, with a graph only where it is needed.

    A network with a module ``encoder`` and a ``ModuleDict`` ``heads`` is split if its ``forward`` does no more than to
    apply each head to what the encoder returns, as that of :class:`~mtl_lightning.networks.MultiHeadNetwork` does; this
    is tried out with placeholders. Any other network is evaluated as a whole. It trains to the same parameters, since a
    gradient reaches only the heads of the losses it comes from, but every pass costs and stores all heads, and a
    failing head can reach the trunk (see :class:`GradientGate`). Hooks of the network itself are not called if it is
    split.

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
        children = dict(network.named_children())
        self.is_split = False
        if "encoder" not in children or not isinstance(children.get("heads"), nn.ModuleDict):
            return
        self.is_split = _only_applies_heads(network)
        if not self.is_split:
            warnings.warn(
                f"`{type(network).__name__}` has an `encoder` and `heads`, but its `forward` does more than to return "
                "each head of what the encoder returns. It is evaluated as a whole: every pass costs all heads.",
                stacklevel=2,
            )
            return
        heads = self._heads
        if set(heads) != set(self.task_names):
            raise ValueError(
                "The heads of the network should be those of the tasks, "
                f"{', '.join(map(repr, self.task_names))}. Found {', '.join(map(repr, heads)) or 'none'}."
            )
        own = self.head_parameters()
        for task, head in heads.items():
            if any(True for _ in head.parameters()) and not own[task]:
                raise ValueError(
                    f"The head of task {task!r} should have parameters of its own. Found that it shares all of them "
                    "with the encoder or other heads; give it a layer of its own, or let it have no parameters."
                )

    def warn_of_compilation(self) -> None:
        """Tell of a compiled network whose heads could be evaluated one by one, or are and so leave it unused."""
        inner = dict(self.network.named_children()).get("_orig_mod")  # what `torch.compile` wraps
        if isinstance(inner, nn.Module) and SplitNetwork(inner, self.task_names).is_split:
            found = "`torch.compile(network)`, of which every pass costs all heads"
        elif self.is_split and getattr(self.network, "_compiled_call_impl", None) is not None:
            found = "`network.compile()`, which training does not reach, since it calls the encoder and the heads"
        else:
            return
        warnings.warn(
            f"A network of an `encoder` and `heads` should be compiled in parts: `network.encoder.compile()`. "
            f"Found {found}.",
            stacklevel=2,
        )

    @property
    def _heads(self) -> dict[str, nn.Module]:
        # Looked up each time: heads may be replaced, as by a conversion of their normalisation.
        heads = self.network.heads
        assert isinstance(heads, nn.ModuleDict)
        return dict(heads.items())

    def head_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that belong to one head alone, by task; of a network that is not split none."""
        if not self.is_split:
            return {task: [] for task in self.task_names}
        heads = self._heads
        outside = {
            id(parameter)
            for name, module in self.network.named_children()
            if name != "heads"
            for parameter in module.parameters()
        } | {id(parameter) for parameter in self.network.parameters(recurse=False)}
        uses = Counter(id(parameter) for head in heads.values() for parameter in head.parameters())
        return {
            task: [p for p in head.parameters() if uses[id(p)] == 1 and id(p) not in outside]
            for task, head in heads.items()
        }

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that belong to no single head; of a network that is not split all."""
        own = {id(parameter) for parameters in self.head_parameters().values() for parameter in parameters}
        return [parameter for parameter in self.network.parameters() if id(parameter) not in own]

    def predict(
        self, inputs: Any, trained: Collection[str], measured: Collection[str], gate: GradientGate
    ) -> dict[str, Any]:
        """Return the predictions of some tasks, by name, and what else a network that is not split returns.

        Args:
            inputs: What the network is called with.
            trained: The tasks whose predictions have a graph; without any, nothing has.
            measured: The tasks to be evaluated; those in training among them.
            gate: Stands between the heads of the tasks in training and the rest.
        """
        # Within one autocast region the weights cast to half precision are kept. They are out of date after a step,
        # and have no graph if they were first used without.
        torch.clear_autocast_cache()
        if not self.is_split:
            return self._predict_as_a_whole(inputs, trained, measured, gate)
        encoder: Any = self.network.encoder
        with torch.set_grad_enabled(bool(trained)):
            features = encoder(inputs)
        outputs = {}
        for task, head in self._heads.items():  # always in this order, or paired passes would draw different numbers
            if task not in measured:
                continue
            torch.clear_autocast_cache()
            if task in trained:
                outputs[task] = gate.guard(task, head(gate.guard(task, features)))
            else:
                with torch.no_grad():
                    outputs[task] = head(features)
        return outputs

    def _predict_as_a_whole(
        self, inputs: Any, trained: Collection[str], measured: Collection[str], gate: GradientGate
    ) -> Any:
        with torch.set_grad_enabled(bool(trained)):
            outputs = self.network(inputs)
        if not isinstance(outputs, Mapping):
            return outputs
        found = {}
        for name, output in outputs.items():
            if name in trained:
                found[name] = gate.guard(name, output)
            elif name in measured:
                # What has a graph gets a gradient of zero from losses left out of a sum, and is then stepped.
                found[name] = pytree.tree_map_only(Tensor, Tensor.detach, output)
            elif name not in self.task_names:
                found[name] = output
        return found

    def frozen(self, seen: Collection[str]) -> AbstractContextManager[None]:
        """Return a context in which what has been evaluated on a batch does not take up its statistics again.

        It has to last through the backward pass, which evaluates layers again if their activations are not kept.

        Args:
            seen: The tasks whose heads, with the trunk, have been evaluated; if there is none, nothing is frozen.
        """
        if not seen:
            return frozen_statistics(())
        if not self.is_split:
            return frozen_statistics(self.network.modules())
        encoder: Any = self.network.encoder
        trees = [encoder, *(head for task, head in self._heads.items() if task in seen)]
        return frozen_statistics(module for tree in trees for module in tree.modules())


class _Encode(nn.Module):
    """Stands for an encoder: takes one placeholder and returns another."""

    def __init__(self, inputs: object, features: object) -> None:
        super().__init__()
        self.inputs, self.features = inputs, features

    def forward(self, inputs: object) -> object:
        if inputs is not self.inputs:
            raise ValueError("The encoder should be given the inputs of the network.")
        return self.features


def _only_applies_heads(network: nn.Module) -> bool:
    """Return whether a network returns, for each head, the head of what the encoder makes of the inputs."""
    encoder, heads = network.encoder, network.heads
    assert isinstance(heads, nn.ModuleDict)
    inputs, features, predictions = object(), object(), {name: object() for name in heads}
    try:
        network.encoder = _Encode(inputs, features)
        network.heads = nn.ModuleDict({name: _Encode(features, predictions[name]) for name in heads})
        outputs = network.forward(inputs)
    except Exception:  # whatever it does to placeholders, it is more than to pass them on
        return False
    finally:
        network.encoder, network.heads = encoder, heads
    return (
        isinstance(outputs, Mapping)
        and set(outputs) == set(predictions)
        and all(outputs[name] is prediction for name, prediction in predictions.items())
    )


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
