"""Copies of a network evaluated in large products, beside the same networks one by one."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.nn import functional

from mtl_lightning import stacked_layers
from mtl_lightning.networks import MLP, LeNetEncoder, MultiHeadNetwork
from mtl_lightning.population import Population, UnsupportedByVmapError
from mtl_lightning.stacked_layers import is_composed

SIZE = 4


class _Scaled(nn.Module):
    """A layer of the user's own, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


class _TwoPaths(nn.Module):
    """Returns a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        return {"first": self.layer(inputs), "rest": (inputs.sum(dim=-1),)}


class _Joined(nn.Module):
    def forward(self, structure: dict[str, Any]) -> Tensor:
        joined: Tensor = structure["first"] + structure["rest"][0].unsqueeze(-1)
        return joined


class _Heads(nn.ModuleDict):
    """Does more than to call its modules."""

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {name: 3 * head(inputs) for name, head in self.items()}


class _Borrower(nn.Module):
    """Reads a parameter of a module that is not its own."""

    def __init__(self, owner: nn.Linear) -> None:
        super().__init__()
        self.owner = [owner]

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.owner[0].weight.t())


def _tied_decoder() -> nn.Module:
    encoder = nn.Linear(6, 4)
    return nn.Sequential(encoder, _Borrower(encoder), nn.Linear(6, 2))


class _Pair(nn.Module):
    """Hands on more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Any:
        return self.layer(inputs), None, inputs.shape


class _First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, pair: Any) -> Tensor:
        outputs: Tensor = self.layer(pair[0])
        return outputs


class _Composer(nn.Module):
    """Has a method of that name for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.compose(inputs)

    def compose(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        return outputs


class _Tower(nn.Module):
    """Says itself what it is composed of."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.above(self.below(inputs))
        return outputs

    def compose(self, call: Any, inputs: Any) -> Any:
        return call(self.above, call(self.below, inputs))


class _OwnForward(MLP):
    """Inherits how it is composed, and does something else."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * 2


def _frozen(module: Any, *names: str) -> Any:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def _tied() -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    layers[2].weight = layers[0].weight
    return layers


def _heads(**heads: nn.Module) -> nn.Module:
    return MultiHeadNetwork(MLP(6, [5, 4]), heads)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 3),
    "without bias": lambda: nn.Linear(6, 3, bias=False),
    "frozen weight": lambda: nn.Sequential(nn.Linear(6, 5), _frozen(nn.Linear(5, 3), "weight")),
    "frozen bias": lambda: nn.Sequential(nn.Linear(6, 5), _frozen(nn.Linear(5, 3), "bias")),
    "frozen layer": lambda: nn.Sequential(_frozen(nn.Linear(6, 5), "weight", "bias"), nn.ReLU(), nn.Linear(5, 3)),
    "frozen first weight": lambda: nn.Sequential(_frozen(nn.Linear(6, 5), "weight"), nn.ReLU(), nn.Linear(5, 3)),
    "last layers frozen": lambda: nn.Sequential(nn.Linear(6, 5), _frozen(nn.Linear(5, 3), "weight", "bias"), nn.Tanh()),
    "activations": lambda: nn.Sequential(
        *(part for kind in stacked_layers._ELEMENTWISE for part in (nn.Linear(6, 6), kind()))
    ),
    "in-place activation": lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)),
    "flatten": lambda: nn.Sequential(nn.Linear(6, 6), nn.Flatten(), nn.Linear(6, 2)),
    "mlp": lambda: MLP(6, [5, 4], 3),
    "heads": lambda: _heads(a=nn.Linear(4, 1), b=nn.Linear(4, 3), c=nn.Linear(4, 2)),
    "heads without bias": lambda: _heads(a=nn.Linear(4, 1, bias=False), b=nn.Linear(4, 3, bias=False)),
    "some heads without bias": lambda: _heads(a=nn.Linear(4, 1, bias=False), b=nn.Linear(4, 3)),
    "one head": lambda: _heads(a=nn.Linear(4, 1)),
    "a head of layers": lambda: _heads(a=nn.Linear(4, 1), b=nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 1))),
    "a frozen head": lambda: _heads(a=nn.Linear(4, 1), b=_frozen(nn.Linear(4, 2), "weight", "bias")),
    "a head with a frozen weight": lambda: _heads(a=nn.Linear(4, 1), b=_frozen(nn.Linear(4, 2), "weight")),
    "heads with a frozen bias": lambda: _heads(a=_frozen(nn.Linear(4, 1), "bias"), b=_frozen(nn.Linear(4, 2), "bias")),
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)),
    "own layer": lambda: nn.Sequential(_Scaled(), nn.Linear(6, 6), _Scaled(), nn.Linear(6, 2)),
    "structure": lambda: nn.Sequential(nn.Linear(6, 6), _TwoPaths(), _Joined(), nn.Linear(3, 2)),
    "tower": lambda: nn.Sequential(_Tower(), nn.ReLU()),
    "own forward": lambda: _OwnForward(6, [5]),
    "tied": _tied,
    "tied decoder": _tied_decoder,
    "dict of heads with own forward": lambda: nn.Sequential(nn.Linear(6, 4), _Heads({"a": nn.Linear(4, 1)})),
    "more than tensors between parts": lambda: nn.Sequential(_Pair(), _First()),
    "more than tensors behind an encoder": lambda: MultiHeadNetwork(_Pair(), {"a": _First(), "b": _First()}),
    "another compose": _Composer,
    "frozen parts": lambda: nn.Sequential(
        _frozen(_Scaled(), "scale"), nn.LayerNorm(6, elementwise_affine=False), nn.Softmax(-1), nn.Linear(6, 2)
    ),
    "nothing trained before the heads": lambda: MultiHeadNetwork(
        _frozen(MLP(6, [4]), "layers.1.weight", "layers.1.bias"), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 2)}
    ),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 2))),
    "an encoder with own forward": lambda: MultiHeadNetwork(_OwnForward(6, [4]), {"a": nn.Linear(4, 1)}),
}
networks = pytest.mark.parametrize("kind", list(NETWORKS))


def _population(make: Callable[[], nn.Module]) -> tuple[Population, list[nn.Module]]:
    torch.manual_seed(0)
    network = make()
    population = Population(network, SIZE, backend="vmap")
    with torch.no_grad():
        population.theta.add_(torch.randn_like(population.theta).mul_(0.1))
    return population, [population.member(index) for index in range(SIZE)]


def _total(outputs: Any, _: Any) -> Tensor:
    leaves = outputs.values() if isinstance(outputs, dict) else [outputs]
    return torch.stack([leaf.square().mean() for leaf in leaves])


def _leaves(outputs: Any) -> dict[str, Tensor]:
    return outputs if isinstance(outputs, dict) else {"": outputs}


@networks
@pytest.mark.parametrize("shape", [(7, 6), (1, 6)])
@pytest.mark.parametrize("per_subproblem", [False, True])
def test_outputs_and_gradients_equal_those_of_separate_networks(
    kind: str, shape: tuple[int, ...], per_subproblem: bool
) -> None:
    population, members = _population(NETWORKS[kind])
    inputs = torch.randn(SIZE, *shape) if per_subproblem else torch.randn(shape)
    own = list(inputs) if per_subproblem else [inputs] * SIZE
    found = population.evaluate(lambda outputs, _: outputs, inputs, None, per_subproblem)
    for name, leaf in _leaves(found).items():
        expected = [_leaves(member(mine))[name] for member, mine in zip(members, own, strict=True)]
        torch.testing.assert_close(leaf, torch.stack(expected))
    for chunk in population.chunks():
        chunk.evaluate(_total, inputs, None, per_subproblem).sum().backward()
    assert population.theta.grad is not None
    for row, (member, mine) in enumerate(zip(members, own, strict=True)):
        torch.autograd.backward(_total(member(mine), None).sum())
        pieces = population._pieces(population.theta.grad[row : row + 1])
        for name, piece in zip(population.parameter_names, pieces, strict=True):
            expected_gradient = member.get_parameter(name).grad
            torch.testing.assert_close(piece[0], expected_gradient)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_linear_layers_take_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    population, members = _population(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    inputs = torch.randn(shape)
    torch.testing.assert_close(population(inputs), torch.stack([member(inputs) for member in members]))


def test_an_encoder_that_vmap_evaluates_has_heads_of_one_product() -> None:
    make = partial(
        lambda: MultiHeadNetwork(
            LeNetEncoder(image_size=16, kernel_sizes=(5, 3), out_features=4),
            {"a": nn.Linear(4, 1), "b": nn.Linear(4, 3)},
        )
    )
    population, members = _population(make)
    images = torch.randn(3, 1, 16, 16)
    found = population(images)
    for name in ("a", "b"):
        torch.testing.assert_close(found[name], torch.stack([member(images)[name] for member in members]))


class _Rows(nn.Module):
    """Notes how many elements it sees, without a batch of copies."""

    seen = 0

    def forward(self, inputs: Tensor) -> Tensor:
        _Rows.seen = get_unwrapped(inputs).numel() if is_batchedtensor(inputs) else inputs.numel()
        return inputs + 1


def test_what_is_frozen_is_evaluated_once() -> None:
    population, _ = _population(lambda: nn.Sequential(nn.Softmax(-1), _Rows(), _Rows(), nn.Linear(6, 2)))
    population(torch.randn(7, 6))
    assert _Rows.seen == 7 * 6


def test_an_error_of_the_inputs_is_that_of_the_network() -> None:
    population, members = _population(NETWORKS["mlp"])
    with pytest.raises(UnsupportedByVmapError, match=r"Size mismatch|mat1 and mat2|size") as error:
        population(torch.randn(7, 5))
    assert error.value.__cause__ is not None
    inputs = torch.randn(7, 6)
    torch.testing.assert_close(population(inputs), torch.stack([member(inputs) for member in members]))


class _Count:
    """Counts calls of a function of torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.calls = 0
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)


def test_heads_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    population, _ = _population(NETWORKS["heads"])
    products, vmaps = _Count(monkeypatch, torch, "baddbmm"), _Count(monkeypatch, torch, "vmap")
    population(torch.randn(7, 6))
    assert (products.calls, vmaps.calls) == (3, 0)  # two layers, and all heads


def test_what_is_not_known_goes_under_vmap_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    population, _ = _population(NETWORKS["own layer"])
    products, vmaps = _Count(monkeypatch, torch, "baddbmm"), _Count(monkeypatch, torch, "vmap")
    population(torch.randn(7, 6))
    assert (products.calls, vmaps.calls) == (2, 2)


def test_a_network_with_buffers_goes_under_vmap_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    population, _ = _population(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    products, vmaps = _Count(monkeypatch, torch, "baddbmm"), _Count(monkeypatch, torch, "vmap")
    population(torch.randn(7, 6))
    assert (products.calls, vmaps.calls) == (0, 1)


def test_losses_may_take_views_of_predictions() -> None:
    population, members = _population(NETWORKS["heads"])
    inputs = torch.randn(7, 6)

    def flat(outputs: dict[str, Tensor], _: Any) -> Tensor:
        return torch.stack([output.view(-1).sum() for output in outputs.values()])

    found = population.evaluate(flat, inputs, None)
    torch.testing.assert_close(found, torch.stack([flat(member(inputs), None) for member in members]))


def test_hooks_of_layers_are_called() -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    population = Population(network, SIZE, backend="vmap")
    population.network.get_submodule("2").register_forward_hook(lambda module, args, output: 2 * output)
    inputs = torch.randn(5, 6)
    torch.testing.assert_close(population(inputs), 2 * torch.stack([network(inputs)] * SIZE))


def test_hooks_of_all_layers_are_called() -> None:
    population, _ = _population(NETWORKS["mlp"])
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: names.append(type(module)))
    try:
        population.evaluate(lambda outputs, _: outputs, torch.randn(5, 6), None)
    finally:
        handle.remove()
    assert names.count(nn.Linear) == 3


def test_a_replaced_forward_is_called() -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    population = Population(network, SIZE, backend="vmap")
    layer: Any = population.network.get_submodule("1")
    layer.forward = lambda inputs: functional.linear(inputs, layer.weight, layer.bias).exp()
    inputs = torch.randn(5, 6)
    torch.testing.assert_close(population(inputs), torch.stack([network(inputs).exp()] * SIZE))


def test_dropout_on_shared_inputs_differs_between_subproblems() -> None:
    population = Population(nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1)), 3, backend="vmap")
    outputs = population(torch.ones(1, 64))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("kind", ["mlp", "heads", "own layer"])
def test_half_precision_equals_that_of_separate_networks(kind: str) -> None:
    population, members = _population(NETWORKS[kind])
    inputs = torch.randn(7, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _leaves(population(inputs))
        expected = [_leaves(member(inputs)) for member in members]
    for name, leaf in found.items():
        separate = torch.stack([outputs[name] for outputs in expected])
        assert leaf.dtype == separate.dtype
        torch.testing.assert_close(leaf, separate, rtol=2e-2, atol=2e-2)


def test_an_error_leaves_the_population_as_it_was() -> None:
    population, _ = _population(NETWORKS["own layer"])
    inputs = torch.randn(7, 6)
    expected = population(inputs)
    with pytest.raises(RuntimeError):
        population(torch.randn(7, 5))
    assert torch.equal(population(inputs), expected)
    assert {name for name, _ in population.named_parameters()} == {"theta"}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), True),
        (nn.Sequential(), True),
        (MLP(2, [2]), True),
        (_Tower(), True),
        (_OwnForward(2, [2]), False),
        (LeNetEncoder(), False),
        (type("Wider", (_Tower,), {})(), True),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), False),
    ],
)
def test_what_is_composed(module: nn.Module, expected: bool) -> None:
    assert is_composed(module) is expected


def test_a_copy_evaluates_its_own_parameters() -> None:
    population, _ = _population(NETWORKS["heads"])
    inputs = torch.randn(7, 6)
    expected = population(inputs)
    twin = copy.deepcopy(population)
    with torch.no_grad():
        population.theta.zero_()
    for name, leaf in twin(inputs).items():
        assert torch.equal(leaf, expected[name])
