"""Networks with stacked parameters: what ``P`` copies of a network return, in few and large products.

Linear layers, activations and chains of them are evaluated for all copies by hand. A linear layer is one batched
product that adds its bias; linear heads on the same features are one product together, which reads the features once.
What is not known here is evaluated under ``torch.vmap``, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_modules
from torch.utils import _pytree as pytree

_ELEMENTWISE = (
    nn.ELU,
    nn.GELU,
    nn.Hardswish,
    nn.Identity,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Tanh,
)
_KNOWN: dict[type, bool] = {}  # a compiler that traces a call does not look into classes
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Values(NamedTuple):
    """What goes from layer to layer.

    Attributes:
        tree: A tensor, or a structure of tensors.
        is_stacked: Whether the tensors have a leading dimension ``P``; if not, all copies share them.
    """

    tree: Any
    is_stacked: bool


Call = Callable[[nn.Module, Any], Any]


class Composed(Protocol):
    """A module that only hands values from part to part, and says how.

    ``compose`` is ``forward`` with ``call(part, values)`` in place of every call of a part, and with nothing else done
    to values. ``call`` of a ``ModuleDict`` is that of all its modules, by name.

    Example:
        >>> from torch import nn
        >>> class Tower(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.below, self.above = nn.Linear(4, 8), nn.Linear(8, 2)
        ...     def forward(self, inputs):
        ...         return self.above(self.below(inputs))
        ...     def compose(self, call, inputs):
        ...         return call(self.above, call(self.below, inputs))
        >>> is_composed(Tower())
        True
    """

    def compose(self, call: Call, inputs: Any) -> Any:
        """Return what ``forward`` does, every part evaluated by ``call``."""
        ...


def is_composed(module: nn.Module) -> bool:
    """Return whether it is known how ``module`` is composed; of a subclass with a ``forward`` of its own it is not."""
    return not _is_altered(module) and _is_known(type(module))


def _is_known(kind: type) -> bool:
    if kind not in _KNOWN:
        owner = next(base for base in kind.__mro__ if "forward" in base.__dict__)
        above = kind.__mro__[: kind.__mro__.index(owner) + 1]
        says_how = any("compose" in base.__dict__ for base in above)
        _KNOWN[kind] = kind in (nn.Sequential, nn.Linear) or says_how
    return _KNOWN[kind]


def stacked_outputs(
    network: nn.Module, inputs: Tensor, is_stacked: bool, size: int, trainable: Mapping[nn.Module, Iterable[str]]
) -> Any:
    """Return the outputs of ``size`` copies of a network, each tensor with a leading dimension ``P``.

    Args:
        network: One for which :func:`is_composed` is true, without buffers, and with stacked parameters ``(P, ...)`` in
            place of its own.
        inputs: Those of all copies, shape ``(B, ...)``, or of each, ``(P, B, ...)``.
        is_stacked: Which of the two.
        size: ``P``.
        trainable: The names of the stacked parameters of each module; others are shared.
    """
    values = _Evaluation(size, trainable).evaluate(network, Values(inputs, is_stacked))
    return pytree.tree_map(
        lambda value: _stacked(value, size).tree, values, is_leaf=lambda value: isinstance(value, Values)
    )


class _Evaluation:
    def __init__(self, size: int, trainable: Mapping[nn.Module, Iterable[str]]) -> None:
        self._size = size
        self._trainable = trainable

    def evaluate(self, module: nn.Module, values: Any) -> Any:
        """Return the values behind ``module``; by name behind the modules of a ``ModuleDict``."""
        if isinstance(module, nn.ModuleDict) and type(module) is nn.ModuleDict:
            return self._each(module, values)
        if not (isinstance(values, Values) and isinstance(values.tree, Tensor)) or _is_altered(module):
            return self._under_vmap(module, values)
        kind = type(module)  # a subclass may do something else
        if kind is nn.Linear:
            return self._linear([module], values)[0]
        if isinstance(module, nn.Sequential) and kind is nn.Sequential:
            for part in module:
                values = self.evaluate(part, values)
            return values
        if kind in _ELEMENTWISE or (kind is nn.Dropout and not module.training):
            return Values(module(values.tree), values.is_stacked)
        if isinstance(module, nn.Flatten) and kind is nn.Flatten and module.start_dim >= 1 and module.end_dim == -1:
            return Values(values.tree.flatten(module.start_dim + values.is_stacked), values.is_stacked)
        if is_composed(module):
            composed: Any = module
            return composed.compose(self.evaluate, values)
        return self._under_vmap(module, values)

    def _each(self, modules: nn.ModuleDict, values: Any) -> dict[str, Any]:
        parts = list(modules.values())
        if len(parts) > 1 and self._are_one_product(parts, values):
            return dict(zip(modules.keys(), self._linear(parts, values), strict=True))
        return {name: self.evaluate(part, values) for name, part in modules.items()}

    def _are_one_product(self, parts: list[nn.Module], values: Any) -> bool:
        """Return whether these are linear layers of one kind: of stacked parameters, all with a bias or none."""
        if not (isinstance(values, Values) and isinstance(values.tree, Tensor)):
            return False
        if any(type(part) is not nn.Linear or _is_altered(part) for part in parts):
            return False
        names = [set(self._trainable.get(part, ())) for part in parts]
        return all(
            own >= {"weight"}
            and (part.bias is None or "bias" in own)
            and (part.bias is None) == (parts[0].bias is None)
            for part, own in zip(parts, names, strict=True)
        )

    def _linear(self, layers: list[Any], values: Values) -> list[Values]:
        """Return what linear layers make of the same values, in one product; several have stacked parameters."""
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        own = self._trainable.get(layers[0], ())
        if "weight" not in own:
            (weight,), (bias,) = weights, biases
            if bias is None or "bias" not in own:
                return [Values(functional.linear(values.tree, weight, bias), values.is_stacked)]
            outputs = _stacked(Values(functional.linear(values.tree, weight), values.is_stacked), self._size).tree
            return [Values(outputs + bias.view(self._size, *[1] * (outputs.dim() - 2), -1), True)]

        inputs = _stacked(values, self._size).tree
        samples = inputs.unsqueeze(1) if inputs.dim() == 2 else inputs.flatten(1, -2)
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)
        if biases[0] is None:
            products = torch.bmm(samples, weight.mT)
        else:
            bias = biases[0] if len(biases) == 1 else torch.cat(biases, dim=1)
            products = torch.baddbmm(bias.unsqueeze(-2), samples, weight.mT)  # a frozen bias is of one dimension
        products = products.view(*inputs.shape[:-1], products.shape[-1])
        if len(weights) == 1:
            return [Values(products, True)]
        parts = torch.split(products, [weight.shape[1] for weight in weights], dim=-1)
        return [Values(part.contiguous(), True) for part in parts]  # losses may take views of them

    def _under_vmap(self, module: nn.Module, values: Any) -> Values:
        """Return what copies of ``module`` return, each called with its own slices."""
        # All of the network: a module may read parameters of another.
        places = [(part, name) for part, names in self._trainable.items() for name in names]
        rows: list[Any] = [part._parameters[name] for part, name in places]
        values = values if isinstance(values, Values) else self._all_stacked(values)

        def one(rows: list[Tensor], inputs: Any) -> Any:
            with _installed(places, rows):
                return module(inputs)

        dims = (0, pytree.tree_map(_dimension if values.is_stacked else _none, values.tree))
        outputs = torch.vmap(one, in_dims=dims, randomness="different")(rows, values.tree)
        if self._size > 1 and all(leaf.stride(0) == 0 for leaf in pytree.tree_leaves(outputs)):
            # Nothing in it differs among the copies, as in a frozen encoder: it was evaluated once.
            return Values(pytree.tree_map(lambda leaf: leaf[0], outputs), False)
        return Values(outputs, True)

    def _all_stacked(self, values: Any) -> Values:
        tree = pytree.tree_map(
            lambda value: _stacked(value, self._size).tree, values, is_leaf=lambda value: isinstance(value, Values)
        )
        return Values(tree, True)


@contextmanager
def _installed(places: list[tuple[nn.Module, str]], values: list[Tensor]) -> Iterator[None]:
    before = [module._parameters[name] for module, name in places]
    for (module, name), value in zip(places, values, strict=True):
        module._parameters[name] = value  # type: ignore[assignment]  # as in torch.func
    try:
        yield
    finally:
        for (module, name), parameter in zip(places, before, strict=True):
            module._parameters[name] = parameter


def _stacked(values: Values, size: int) -> Values:
    """Return ``values`` with a leading dimension ``P``, as a view."""
    if values.is_stacked:
        return values
    return Values(pytree.tree_map_only(Tensor, lambda tensor: tensor.expand(size, *tensor.shape), values.tree), True)


def _is_altered(module: nn.Module) -> bool:
    """Return whether more happens in a call than the ``forward`` of its class."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    hooked = any(getattr(module, name, None) for name in _HOOKS) or _is_any_call_hooked()
    return compiled or hooked or "forward" in module.__dict__


def _is_any_call_hooked() -> bool:
    return any(getattr(torch_modules, f"_global{name}") for name in _HOOKS)


def _dimension(leaf: Any) -> int | None:
    return 0 if isinstance(leaf, Tensor) else None


def _none(leaf: Any) -> None:
    return None
