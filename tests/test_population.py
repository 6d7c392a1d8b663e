import copy
import gc
import io
import logging
import re
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from mtl_lightning.networks import MLP, ConvEncoder, LeNetEncoder, MultiHeadNetwork, VisionTransformerEncoder
from mtl_lightning.population import Population, UnsupportedByVmapError, UserInputError
from mtl_lightning.preferences import simplex_lattice

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SIZE = 4
PREFERENCES = simplex_lattice(num_tasks=2, num_divisions=SIZE - 1)

backends = pytest.mark.parametrize("backend", ["vmap", "loop"])
networks = pytest.mark.parametrize("kind", ["mlp", "lenet", "batch_norm", "vit"])
optimizers = pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(partial(SGD, lr=0.05), id="SGD"),
        pytest.param(partial(SGD, lr=0.05, momentum=0.9), id="momentum"),
        pytest.param(partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1), id="nesterov-decay"),
        pytest.param(partial(Adam, lr=1e-2), id="Adam"),
        pytest.param(partial(Adam, lr=1e-2, amsgrad=True), id="amsgrad"),
        pytest.param(partial(AdamW, lr=1e-2, weight_decay=0.1), id="AdamW"),
    ],
)


def _network(kind: str) -> nn.Module:
    encoder: nn.Module
    if kind == "mlp":
        encoder, width = MLP(18, (7,)), 7
    elif kind == "lenet":
        encoder, width = LeNetEncoder(in_channels=2, image_size=16, kernel_sizes=(5, 3), out_features=9), 9
    elif kind == "batch_norm":
        encoder, width = ConvEncoder((3, 5), in_channels=2), 5
    else:
        encoder, width = VisionTransformerEncoder(16, 8, in_channels=2, width=6, depth=2, num_heads=2), 6
    return MultiHeadNetwork(encoder, {"left": nn.Linear(width, 3), "right": nn.Linear(width, 2)})


def _batch(kind: str, size: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    image = {"mlp": (2, 3, 3), "batch_norm": (2, 6, 6)}.get(kind, (2, 16, 16))
    return torch.randn(size, *image), {"left": torch.randn(size, 3), "right": torch.randn(size, 2)}


def _losses(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    return torch.stack([(outputs[task] - target).square().mean() for task, target in targets.items()])


def _backward(population: Population, inputs: Any, targets: Any) -> None:
    for chunk in population.chunks():
        losses = chunk.evaluate(_losses, inputs, targets)
        (losses * PREFERENCES[chunk.members]).sum().backward()


def _separate(network: nn.Module, spread: float = 0.3, size: int = SIZE) -> list[nn.Module]:
    """Return ``P`` different networks, made without a population."""
    copies = [copy.deepcopy(network) for _ in range(size)]
    for other in copies:
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.data.add_(spread * torch.randn_like(parameter))
    return copies


def _slots(population: Population, network: nn.Module) -> Iterator[tuple[str, slice]]:
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (part,) = population.columns([name])
            yield name, part


def _population(separate: Sequence[nn.Module], backend: str, chunk_size: int | None = None) -> Population:
    """Return a population whose rows are the given networks."""
    population = Population(separate[0], len(separate), backend=backend, chunk_size=chunk_size)  # type: ignore[arg-type]
    for row, network in enumerate(separate):
        for name, part in _slots(population, network):
            population.theta.data[row, part] = network.get_parameter(name).detach().flatten()
    return population


def _reference_backward(separate: Sequence[nn.Module], inputs: Tensor, targets: dict[str, Tensor]) -> None:
    for network, preference in zip(separate, PREFERENCES, strict=True):
        (_losses(network(inputs), targets) * preference).sum().backward()


def _padding(population: Population) -> Tensor:
    """Return which columns of ``theta`` belong to no parameter, shape ``(D,)``."""
    mask = torch.ones(population.theta.shape[1], dtype=torch.bool)
    for name in population.parameter_names:
        for part in population.columns([name]):
            mask[part] = False
    return mask


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4, bias=False)
        self.extract = nn.Linear(3, 4)
        self.extract.weight = self.embed.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(self.extract(inputs).tanh(), self.embed.weight.t())


class _Normalizer(nn.Module):
    """Rebinds a buffer that the graph needs, as running normalisations do."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.linear(inputs) * self.scale
        self.scale = 0.5 * self.scale + outputs.detach().abs().mean(dim=0)
        return outputs


class _Counter(nn.Module):
    steps: Tensor
    total: Tensor

    def __init__(self, rebind: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.rebind = rebind
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("total", torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs)
        if self.rebind:
            self.steps = self.steps + 1
            self.total = self.total + outputs.detach().sum(dim=0)
        else:
            self.steps += 1
            self.total += outputs.detach().sum(dim=0)
        return outputs


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.lstm(inputs)
        return self.head(states[:, -1])


class _Masked(nn.Module):
    """Causal attention weights from a buffer that holds minus infinity."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.linear(inputs).unsqueeze(-2) + self.mask).softmax(dim=-1)


def _sum(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().sum()


def _plain_sum(outputs: Tensor, _: Any) -> Tensor:
    return outputs.sum()


# -------------------------------------------------------------------------------------------------- numbers


@backends
@networks
def test_outputs_equal_those_of_separate_networks(kind: str, backend: str) -> None:
    separate = _separate(_network(kind))
    inputs, _ = _batch(kind)
    outputs = _population(separate, backend)(inputs)
    for row, network in enumerate(separate):
        for task, expected in network(inputs).items():
            torch.testing.assert_close(outputs[task][row], expected, rtol=1e-5, atol=1e-5)


@backends
@networks
def test_gradients_equal_those_of_separate_networks(kind: str, backend: str) -> None:
    separate = _separate(_network(kind))
    population = _population(separate, backend)
    batch = _batch(kind)
    _backward(population, *batch)
    _reference_backward(separate, *batch)
    assert population.theta.grad is not None
    for row, network in enumerate(separate):
        for name, part in _slots(population, network):
            expected = network.get_parameter(name).grad
            assert expected is not None
            actual = population.theta.grad[row, part].view_as(expected)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))


@networks
def test_loop_gradients_equal_those_of_separate_networks_bit_for_bit(kind: str) -> None:
    separate = _separate(_network(kind))
    population = _population(separate, "loop")
    batch = _batch(kind)
    _backward(population, *batch)
    _reference_backward(separate, *batch)
    assert population.theta.grad is not None
    for row, network in enumerate(separate):
        for name, part in _slots(population, network):
            expected = network.get_parameter(name).grad
            assert expected is not None
            assert torch.equal(population.theta.grad[row, part].view_as(expected), expected), name


@networks
def test_gradients_through_evaluate_equal_those_of_chunks(kind: str) -> None:
    separate = _separate(_network(kind))
    inputs, targets = _batch(kind)
    whole, parts = _population(separate, "loop"), _population(separate, "loop")
    (whole.evaluate(_losses, inputs, targets) * PREFERENCES).sum().backward()
    _backward(parts, inputs, targets)
    torch.testing.assert_close(whole.theta.grad, parts.theta.grad, rtol=1e-5, atol=1e-6)


@optimizers
@networks
def test_loop_trains_as_separate_runs_do_bit_for_bit(kind: str, optimizer: OptimizerFactory) -> None:
    network = _network(kind)
    separate = [copy.deepcopy(network) for _ in range(SIZE)]
    population = Population(network, SIZE, backend="loop")
    ours = optimizer([population.theta])
    theirs = [optimizer(other.parameters()) for other in separate]
    for _ in range(3):
        batch = _batch(kind)
        ours.zero_grad()
        _backward(population, *batch)
        ours.step()
        for one in theirs:
            one.zero_grad()
        _reference_backward(separate, *batch)
        for one in theirs:
            one.step()
    for row, other in enumerate(separate):
        trained = population.member(row).state_dict()
        for name, expected in other.state_dict().items():
            assert torch.equal(trained[name], expected), name


@networks
def test_vmap_trains_as_separate_runs_do(kind: str) -> None:
    network = _network(kind)
    separate = [copy.deepcopy(network) for _ in range(SIZE)]
    population = Population(network, SIZE, backend="vmap")
    ours = SGD([population.theta], lr=0.05, momentum=0.9)
    theirs = [SGD(other.parameters(), lr=0.05, momentum=0.9) for other in separate]
    for _ in range(3):
        batch = _batch(kind)
        for one in (ours, *theirs):
            one.zero_grad()
        _backward(population, *batch)
        _reference_backward(separate, *batch)
        for one in (ours, *theirs):
            one.step()
    for row, other in enumerate(separate):
        trained = population.member(row).state_dict()
        for name, expected in other.state_dict().items():
            torch.testing.assert_close(trained[name], expected, rtol=1e-4, atol=1e-5)


@optimizers
def test_optimizer_on_theta_equals_separate_optimizers_bit_for_bit(optimizer: OptimizerFactory) -> None:
    separate = _separate(_network("mlp"))
    population = _population(separate, "loop")
    ours = optimizer([population.theta])
    theirs = [optimizer(network.parameters()) for network in separate]
    for _ in range(5):
        population.theta.grad = torch.zeros_like(population.theta)
        for row, network in enumerate(separate):
            for name, part in _slots(population, network):
                parameter = network.get_parameter(name)
                parameter.grad = torch.randn_like(parameter) * 10 ** (3 * torch.rand(()) - 2)
                population.theta.grad[row, part] = parameter.grad.flatten()
        for one in (ours, *theirs):
            one.step()
    for row, network in enumerate(separate):
        for name, part in _slots(population, network):
            assert torch.equal(population.theta.detach()[row, part], network.get_parameter(name).flatten()), name


@optimizers
@backends
def test_padding_stays_zero(backend: str, optimizer: OptimizerFactory) -> None:
    population = _population(_separate(_network("lenet")), backend)
    step = optimizer([population.theta])
    for _ in range(3):
        step.zero_grad()
        _backward(population, *_batch("lenet"))
        step.step()
    padding = _padding(population)
    assert padding.any()
    assert population.theta.grad is not None
    assert not population.theta[:, padding].any()
    assert not population.theta.grad[:, padding].any()


def test_rows_and_parameters_start_at_multiples_of_64_bytes() -> None:
    population = Population(_network("lenet"), 3)
    starts = [part.start for name in population.parameter_names for part in population.columns([name])]
    rows = [row.data_ptr() for row in population.theta]
    assert all(start * 4 % 64 == 0 for start in starts)
    assert all(row % 64 == 0 for row in rows)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_chunk_size_does_not_change_gradients(chunk_size: int) -> None:
    separate = _separate(_network("batch_norm"), size=7)
    inputs, targets = _batch("batch_norm")
    whole, chunked = _population(separate, "vmap"), _population(separate, "vmap", chunk_size)
    for population in (whole, chunked):
        for chunk in population.chunks():
            chunk.evaluate(_losses, inputs, targets).sum().backward()
    torch.testing.assert_close(chunked.theta.grad, whole.theta.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk_size", "expected"), [(None, [7]), (3, [3, 3, 1]), (1, [1] * 7), (8, [7])])
def test_chunks_cover_the_subproblems_in_parts_of_chunk_size(chunk_size: int | None, expected: list[int]) -> None:
    population = Population(nn.Linear(2, 1), 7, backend="vmap", chunk_size=chunk_size)
    members = [list(range(7))[chunk.members] for chunk in population.chunks()]
    assert [len(part) for part in members] == expected
    assert [index for part in members for index in part] == list(range(7))


def test_chunk_size_updates_the_buffers_of_every_chunk() -> None:
    separate = _separate(_network("batch_norm"), size=5)
    population = _population(separate, "vmap", chunk_size=2)
    inputs, targets = _batch("batch_norm")
    for chunk in population.chunks():
        chunk.evaluate(_losses, inputs, targets)
    for row, network in enumerate(separate):
        network(inputs)
        torch.testing.assert_close(dict(population.member(row).named_buffers()), dict(network.named_buffers()))


@backends
def test_chunks_add_to_the_gradient(backend: str) -> None:
    population = _population(_separate(_network("mlp")), backend)
    inputs, targets = _batch("mlp")
    _backward(population, inputs, targets)
    assert population.theta.grad is not None
    once = population.theta.grad.clone()
    _backward(population, inputs, targets)
    torch.testing.assert_close(population.theta.grad, 2 * once)


@backends
def test_chunks_keep_the_gradient_tensor(backend: str) -> None:
    population = _population(_separate(_network("mlp")), backend)
    gradient = torch.zeros_like(population.theta)
    population.theta.grad = gradient
    _backward(population, *_batch("mlp"))
    assert population.theta.grad is gradient
    assert gradient.any()


# -------------------------------------------------------------------------------------------- per subproblem


@backends
@networks
def test_per_subproblem_equals_slicing_by_hand(kind: str, backend: str) -> None:
    separate = _separate(_network(kind))
    population = _population(separate, backend)
    batches = [_batch(kind) for _ in separate]
    inputs = torch.stack([one for one, _ in batches])
    targets = {task: torch.stack([each[task] for _, each in batches]) for task in ("left", "right")}
    losses = population.evaluate(_losses, inputs, targets, per_subproblem=True)
    expected = torch.stack([_losses(network(*b[:1]), b[1]) for network, b in zip(separate, batches, strict=True)])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "chunk_size"), [("loop", None), ("vmap", None), ("vmap", 3)])
def test_per_subproblem_gradients_equal_slicing_by_hand(backend: str, chunk_size: int | None) -> None:
    separate = _separate(_network("mlp"))
    population = _population(separate, backend, chunk_size)
    inputs, targets = torch.randn(SIZE, 5, 18), {"left": torch.randn(SIZE, 5, 3)}
    for chunk in population.chunks():
        chunk.evaluate(_losses, inputs, targets, per_subproblem=True).sum().backward()
    assert population.theta.grad is not None
    for row, network in enumerate(separate):
        torch.autograd.backward(_losses(network(inputs[row]), {"left": targets["left"][row]}).sum())
        for name, part in _slots(population, network):
            expected = network.get_parameter(name).grad
            actual = population.theta.grad[row, part]
            torch.testing.assert_close(actual, torch.zeros_like(actual) if expected is None else expected.flatten())


@backends
def test_per_subproblem_works_without_targets(backend: str) -> None:
    separate = [nn.Linear(3, 2) for _ in range(3)]
    inputs = torch.randn(3, 5, 3)
    outputs = _population(separate, backend).evaluate(_sum, inputs, None, per_subproblem=True)
    expected = torch.stack([network(one).square().sum() for network, one in zip(separate, inputs, strict=True)])
    torch.testing.assert_close(outputs, expected)


@backends
def test_chunks_per_subproblem_work_without_targets(backend: str) -> None:
    separate = [nn.Linear(3, 2) for _ in range(3)]
    inputs = torch.randn(3, 5, 3)
    chunks = _population(separate, backend).chunks()
    outputs = torch.cat([chunk.evaluate(_sum, inputs, None, per_subproblem=True) for chunk in chunks])
    expected = torch.stack([network(one).square().sum() for network, one in zip(separate, inputs, strict=True)])
    torch.testing.assert_close(outputs, expected)


@backends
def test_structured_inputs_and_results(backend: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return self.linear(inputs["first"]) - self.linear(inputs["second"])

    separate = [Pair() for _ in range(3)]
    inputs = {"first": torch.randn(4, 3), "second": torch.randn(4, 3)}
    results = _population(separate, backend).evaluate(lambda out, _: {"out": out, "norm": (out.norm(),)}, inputs, None)
    torch.testing.assert_close(results["out"], torch.stack([network(inputs) for network in separate]))
    torch.testing.assert_close(results["norm"][0], torch.stack([network(inputs).norm() for network in separate]))


# ---------------------------------------------------------------------------------------------------- buffers


@backends
def test_batch_norm_statistics_equal_those_of_separate_networks(backend: str) -> None:
    separate = _separate(_network("batch_norm"))
    population = _population(separate, backend)
    for _ in range(2):
        inputs, _ = _batch("batch_norm")
        population(inputs)
        for network in separate:
            network(inputs)
    for row, network in enumerate(separate):
        buffers = dict(population.member(row).named_buffers())
        torch.testing.assert_close(buffers, dict(network.named_buffers()), rtol=1e-5, atol=1e-5)


@backends
def test_batches_are_counted(backend: str) -> None:
    population = Population(_network("batch_norm"), 3, backend=backend)  # type: ignore[arg-type]
    for _ in range(4):
        population(_batch("batch_norm")[0])
    counts = [b for name, b in population.member(1).named_buffers() if name.endswith("num_batches_tracked")]
    assert [count.item() for count in counts] == [4] * 4
    assert all(count.shape == () and count.dtype == torch.long for count in counts)


@backends
def test_statistics_are_used_and_left_alone_in_eval_mode(backend: str) -> None:
    separate = _separate(_network("batch_norm"))
    population = _population(separate, backend)
    inputs, _ = _batch("batch_norm")
    population(inputs)
    population.eval()
    before = {name: buffer.clone() for name, buffer in population.named_buffers()}
    outputs = population(inputs)
    for row, network in enumerate(separate):
        network(inputs)
        torch.testing.assert_close(outputs["left"][row], network.eval()(inputs)["left"], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(buffer, before[name]) for name, buffer in population.named_buffers())


@pytest.mark.parametrize("rebind", [True, False])
@backends
def test_updated_buffers_are_kept(backend: str, rebind: bool) -> None:
    separate = [_Counter(rebind) for _ in range(3)]
    population = _population(separate, backend)
    for _ in range(3):
        inputs = torch.randn(4, 3)
        population(inputs)
        for network in separate:
            network(inputs)
    for row, network in enumerate(separate):
        torch.testing.assert_close(dict(population.member(row).named_buffers()), dict(network.named_buffers()))


@backends
def test_a_rebound_buffer_that_the_graph_needs_does_not_break_the_backward_pass(backend: str) -> None:
    separate = [_Normalizer() for _ in range(3)]
    population = _population(separate, backend)
    for _ in range(2):
        inputs = torch.randn(4, 3)
        population.zero_grad()
        for chunk in population.chunks():
            chunk.evaluate(_sum, inputs, None).sum().backward()
        for network in separate:
            network.zero_grad()
            network(inputs).square().sum().backward()
    assert population.theta.grad is not None
    for row, network in enumerate(separate):
        for name, part in _slots(population, network):
            expected = network.get_parameter(name).grad
            assert expected is not None
            torch.testing.assert_close(population.theta.grad[row, part].view_as(expected), expected)


@backends
def test_all_subproblems_in_one_graph_may_update_buffers(backend: str) -> None:
    separate = [_Normalizer() for _ in range(3)]
    population = _population(separate, backend)
    inputs = torch.randn(4, 3)
    population.evaluate(_sum, inputs, None).sum().backward()
    assert population.theta.grad is not None
    for row, network in enumerate(separate):
        network(inputs).square().sum().backward()
        for name, part in _slots(population, network):
            expected = network.get_parameter(name).grad
            assert expected is not None
            torch.testing.assert_close(population.theta.grad[row, part].view_as(expected), expected)


@backends
def test_a_buffer_filled_in_the_first_forward_pass(backend: str) -> None:
    class Cached(nn.Module):
        scale: Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("scale", None, persistent=False)

        def forward(self, inputs: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = torch.tensor([1.0, 2.0])
            return self.linear(inputs) * self.scale

    separate = [Cached() for _ in range(2)]
    population = _population(separate, backend)
    inputs = torch.randn(4, 3)
    for _ in range(2):
        torch.testing.assert_close(population(inputs), torch.stack([network(inputs) for network in separate]))


@backends
def test_buffers_keep_no_graph(backend: str) -> None:
    class Leaky(nn.Module):
        last: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("last", torch.zeros(2))

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.linear(inputs)
            self.last = outputs.mean(dim=0)
            return outputs

    population = Population(Leaky(), 2, backend=backend)  # type: ignore[arg-type]
    population(torch.ones(4, 3))
    assert not any(buffer.requires_grad for buffer in population.buffers())


@backends
def test_an_error_inside_the_network_leaves_the_population_as_it_was(backend: str) -> None:
    population = _population(_separate(_network("batch_norm")), backend)
    inputs, _ = _batch("batch_norm")
    population.eval()
    expected = population(inputs)["left"]
    with pytest.raises(RuntimeError):
        population(torch.zeros(2, 7, 6, 6))
    assert torch.equal(population(inputs)["left"], expected)
    assert {name for name, _ in population.named_parameters()} == {"theta"}


class _Shared(nn.Module):
    """Two modules hold one buffer: one updates it, the other reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.writer, self.reader = nn.Linear(3, 3), nn.Linear(3, 2)
        level = torch.zeros(())
        self.writer.register_buffer("level", level)
        self.reader.register_buffer("level", level)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.writer(inputs)
        self.writer.get_buffer("level").add_(hidden.detach().sum())
        outputs: Tensor = self.reader(hidden)
        return outputs + self.reader.get_buffer("level")


@backends
def test_a_buffer_of_two_modules_stays_shared(backend: str) -> None:
    separate = [_Shared() for _ in range(3)]
    population = _population(separate, backend)
    inputs = torch.randn(4, 3)
    torch.testing.assert_close(population(inputs), torch.stack([network(inputs) for network in separate]))


# ----------------------------------------------------------------------------------------------------- random


@backends
def test_dropout_differs_between_subproblems(backend: str) -> None:
    population = Population(nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5)), 3, backend=backend)  # type: ignore[arg-type]
    kept = population(torch.ones(1, 3)) != 0
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


@backends
def test_dropout_differs_between_calls(backend: str) -> None:
    population = Population(nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5)), 2, backend=backend)  # type: ignore[arg-type]
    inputs = torch.ones(1, 3)
    assert not torch.equal(population(inputs) != 0, population(inputs) != 0)


@backends
def test_eval_mode_is_deterministic(backend: str) -> None:
    population = Population(nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5)), 2, backend=backend)  # type: ignore[arg-type]
    population.eval()
    inputs = torch.ones(1, 3)
    assert torch.equal(population(inputs), population(inputs))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_reaches_the_structure_and_its_members(training: bool) -> None:
    population = Population(_network("batch_norm"), 2).train(not training).train(training)
    assert all(module.training is training for module in population.modules())
    assert all(module.training is training for module in population.member(0).modules())


# ---------------------------------------------------------------------------------------------- frozen, tied


def _partly_frozen() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    network[0].requires_grad_(False)
    network[2].bias.requires_grad_(False)
    return network


def test_frozen_parameters_are_held_once() -> None:
    network = _partly_frozen()
    state = Population(network, 5).state_dict()
    held = {key: value.numel() for key, value in state.items() if key != "theta"}
    assert held == {
        "network.0.weight": 24,
        "network.0.bias": 8,
        "network.2.bias": 2,
        "network.1.running_mean": 40,
        "network.1.running_var": 40,
        "network.1.num_batches_tracked": 5,
    }


def test_theta_holds_trainable_parameters_only() -> None:
    population = Population(_partly_frozen(), 5)
    assert population.parameter_names == ("1.weight", "1.bias", "2.weight")
    assert population.num_parameters == 32
    assert (~_padding(population)).sum() == 32


@backends
def test_frozen_parameters_are_used_and_get_no_gradient(backend: str) -> None:
    separate = _separate(_partly_frozen(), size=3)
    population = _population(separate, backend)
    inputs = torch.randn(6, 3)
    for chunk in population.chunks():
        chunk.evaluate(_sum, inputs, None).sum().backward()
    assert all(p.grad is None for name, p in population.named_parameters() if name != "theta")
    for row, network in enumerate(separate):
        network(inputs).square().sum().backward()
        assert population.theta.grad is not None
        for name, part in _slots(population, network):
            expected = network.get_parameter(name).grad
            assert expected is not None
            torch.testing.assert_close(population.theta.grad[row, part].view_as(expected), expected)


def test_tied_parameters_are_held_once() -> None:
    population = Population(_Tied(), 3)
    assert population.parameter_names == ("embed.weight", "extract.bias")
    assert population.num_parameters == 16


@backends
def test_gradients_of_tied_parameters_equal_those_of_separate_networks(backend: str) -> None:
    separate = _separate(_Tied(), size=3)
    population = _population(separate, backend)
    inputs = torch.randn(5, 3)
    for chunk in population.chunks():
        chunk.evaluate(_sum, inputs, None).sum().backward()
    assert population.theta.grad is not None
    for row, network in enumerate(separate):
        network(inputs).square().sum().backward()
        for name, part in _slots(population, network):
            expected = network.get_parameter(name).grad
            assert expected is not None
            torch.testing.assert_close(population.theta.grad[row, part].view_as(expected), expected)


def test_tied_parameters_stay_tied_in_a_member() -> None:
    member = Population(_Tied(), 3).member(1)
    assert isinstance(member, _Tied)
    assert member.embed.weight is member.extract.weight


@backends
def test_a_module_used_twice(backend: str) -> None:
    shared = nn.Linear(3, 3)
    separate = _separate(nn.Sequential(shared, nn.BatchNorm1d(3), shared), size=3)
    inputs = torch.randn(5, 3)
    outputs = _population(separate, backend)(inputs)
    torch.testing.assert_close(outputs, torch.stack([network(inputs) for network in separate]))


# ---------------------------------------------------------------------------------------------------- members


def _all_kinds() -> list[Any]:
    kinds = [pytest.param(partial(_network, kind), id=kind) for kind in ("mlp", "lenet", "batch_norm", "vit")]
    return [*kinds, pytest.param(_partly_frozen, id="frozen"), pytest.param(_Tied, id="tied")]


@pytest.mark.parametrize("make", _all_kinds())
def test_a_member_has_the_state_of_its_network_in_the_same_order(make: Callable[[], nn.Module]) -> None:
    separate = _separate(make())
    population = _population(separate, "loop")
    for row, network in enumerate(separate):
        state = population.member(row).state_dict()
        assert list(state) == list(network.state_dict())
        assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("make", _all_kinds())
def test_a_member_has_the_parameters_of_its_network_in_the_same_order(make: Callable[[], nn.Module]) -> None:
    network = make()
    member = Population(network, 2).member(1)
    described = [(name, p.shape, p.requires_grad, type(p)) for name, p in member.named_parameters()]
    assert described == [(name, p.shape, p.requires_grad, type(p)) for name, p in network.named_parameters()]


def test_a_member_is_independent_memory() -> None:
    population = _population(_separate(_partly_frozen(), size=3), "loop")
    before = {name: value.clone() for name, value in population.state_dict().items()}
    for value in population.member(1).state_dict().values():
        value.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in population.state_dict().items())


@networks
def test_a_member_gives_the_outputs_of_its_row(kind: str) -> None:
    population = _population(_separate(_network(kind)), "loop").eval()
    inputs, _ = _batch(kind)
    outputs = population(inputs)
    for row in range(SIZE):
        for task, output in population.member(row)(inputs).items():
            assert torch.equal(output, outputs[task][row])


def test_a_member_can_be_trained() -> None:
    member = Population(_network("mlp"), 2).member(0)
    inputs, targets = _batch("mlp")
    torch.autograd.backward(_losses(member(inputs), targets).sum())
    assert all(p.is_leaf and p.grad is not None for p in member.parameters())


@pytest.mark.parametrize("index", [3, -4])
def test_a_member_that_does_not_exist(index: int) -> None:
    with pytest.raises(IndexError, match=r"`index` should lie in \[0, 3\)"):
        Population(nn.Linear(2, 1), 3).member(index)


def test_a_negative_index_counts_from_the_end() -> None:
    separate = [nn.Linear(2, 1) for _ in range(3)]
    assert torch.equal(_population(separate, "loop").member(-1).get_parameter("weight"), separate[2].weight)


def test_a_recurrent_member_gives_the_outputs_of_its_row() -> None:
    separate = [_Recurrent() for _ in range(3)]
    population = _population(separate, "loop")
    inputs = torch.randn(2, 5, 3)
    for row, network in enumerate(separate):
        torch.testing.assert_close(population.member(row)(inputs), network(inputs))


@pytest.mark.parametrize("grad", [True, False])
def test_a_recurrent_member_after_a_forward_pass(grad: bool) -> None:
    separate = [_Recurrent() for _ in range(3)]
    population = _population(separate, "loop")
    inputs = torch.randn(2, 5, 3)
    with torch.set_grad_enabled(grad):
        population(inputs)
    for row, network in enumerate(separate):
        torch.testing.assert_close(population.member(row)(inputs), network(inputs))


def test_recurrent_gradients_equal_those_of_separate_networks() -> None:
    separate = [_Recurrent() for _ in range(3)]
    population = _population(separate, "loop")
    inputs = torch.randn(2, 5, 3)
    for _ in range(2):
        population.theta.grad = None
        for chunk in population.chunks():
            chunk.evaluate(_sum, inputs, None).sum().backward()
    assert population.theta.grad is not None
    for row, network in enumerate(separate):
        network(inputs).square().sum().backward()
        for name, part in _slots(population, network):
            expected = network.get_parameter(name).grad
            assert expected is not None
            torch.testing.assert_close(population.theta.grad[row, part].view_as(expected), expected)


def _reparametrized() -> nn.Module:
    weight_norm, spectral_norm = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
    return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), spectral_norm(nn.Linear(4, 2)))


def test_reparametrized_networks_train_as_separate_ones() -> None:
    separate = _separate(_reparametrized(), size=3)
    population = _population(separate, "loop")  # torch has no batching rules for spectral norm
    inputs = torch.randn(5, 3)
    for chunk in population.chunks():
        chunk.evaluate(_sum, inputs, None).sum().backward()
    assert population.theta.grad is not None
    for row, network in enumerate(separate):
        network(inputs).square().sum().backward()
        for name, part in _slots(population, network):
            expected = network.get_parameter(name).grad
            assert expected is not None
            torch.testing.assert_close(population.theta.grad[row, part].view_as(expected), expected)


def test_a_reparametrized_member_gives_the_outputs_of_its_row() -> None:
    separate = _separate(_reparametrized(), size=3)
    population = _population(separate, "loop").eval()
    inputs = torch.randn(5, 3)
    outputs = population(inputs)
    for row, network in enumerate(separate):
        torch.testing.assert_close(population.member(row)(inputs), outputs[row])
        torch.testing.assert_close(network.eval()(inputs), outputs[row])


# ------------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("make", [*_all_kinds(), pytest.param(_Recurrent, id="lstm")])
def test_deepcopy_after_training_is_independent_and_equal(make: Callable[[], nn.Module]) -> None:
    population = _population(_separate(make(), size=2), "loop").eval()
    shape = (2, 5, 3) if make is _Recurrent else (5, 3)
    inputs = torch.randn(shape) if not isinstance(make, partial) else _batch(make.args[0])[0]

    def first(outputs: Any, _: Any) -> Tensor:
        return outputs if isinstance(outputs, Tensor) else outputs["left"]

    for chunk in population.chunks():
        chunk.evaluate(first, inputs, None).sum().backward()
    expected = population.evaluate(first, inputs, None).detach()
    twin = copy.deepcopy(population)
    population.theta.data.zero_()
    for buffer in population.buffers():
        buffer.zero_()
    assert torch.equal(twin.evaluate(first, inputs, None), expected)


@networks
def test_state_round_trip(kind: str) -> None:
    population = _population(_separate(_network(kind)), "loop")
    inputs, _ = _batch(kind)
    population(inputs)
    buffer = io.BytesIO()
    torch.save(population.state_dict(), buffer)
    buffer.seek(0)
    other = Population(_network(kind), SIZE, backend="loop")
    other.load_state_dict(torch.load(buffer, weights_only=True))
    expected = population.eval()(inputs)
    outputs = other.eval()(inputs)
    assert all(torch.equal(outputs[task], expected[task]) for task in expected)


def test_only_theta_the_frozen_and_the_buffers_are_in_the_state() -> None:
    keys = set(Population(_network("mlp"), 2).state_dict())
    assert keys == {"theta"}


@backends
def test_double_precision(backend: str) -> None:
    separate = [network.double() for network in _separate(_network("batch_norm"))]
    inputs, _ = _batch("batch_norm")
    population = Population(_network("batch_norm"), SIZE, backend=backend).to(torch.float64)  # type: ignore[arg-type]
    for row, network in enumerate(separate):
        for name, part in _slots(population, network):
            population.theta.data[row, part] = network.get_parameter(name).detach().flatten()
    outputs = population(inputs.double())["left"]
    assert outputs.dtype == torch.float64
    expected = torch.stack([network(inputs.double())["left"] for network in separate])
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    buffers = dict(population.member(0).named_buffers())
    torch.testing.assert_close(buffers, dict(separate[0].named_buffers()), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- init


def test_a_common_start_is_the_network() -> None:
    network = _network("batch_norm")
    population = Population(network, 3)
    for row in range(3):
        state = population.member(row).state_dict()
        assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("init", ["common", "independent"])
def test_the_network_object_stays_as_it_is(init: Any) -> None:
    network = _network("batch_norm")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    identities = [id(parameter) for parameter in network.parameters()]
    population = Population(network, 3, init=init, backend="loop")
    _backward_once(population, *_batch("batch_norm"))
    population.theta.data.add_(1.0)
    assert [id(parameter) for parameter in network.parameters()] == identities
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def _backward_once(population: Population, inputs: Tensor, targets: dict[str, Tensor]) -> None:
    for chunk in population.chunks():
        chunk.evaluate(_losses, inputs, targets).sum().backward()


@networks
def test_independent_starts_differ(kind: str) -> None:
    network = _network(kind)
    population = Population(network, 3, init="independent")
    first, second = population.member(0), population.member(1)
    for name, parameter in first.named_parameters():
        if name.endswith("weight") and "norm" not in name:
            assert not torch.equal(parameter, second.get_parameter(name)), name
            assert not torch.equal(parameter, network.get_parameter(name)), name


def test_independent_starts_repeat_with_the_seed() -> None:
    network = _network("vit")
    torch.manual_seed(5)
    first = Population(network, 3, init="independent")
    torch.manual_seed(5)
    assert torch.equal(first.theta, Population(network, 3, init="independent").theta)


def test_an_independent_start_draws_what_reset_parameters_draws() -> None:
    network = nn.Linear(3, 2)
    torch.manual_seed(5)
    population = Population(network, 3, init="independent")
    torch.manual_seed(5)
    for row in range(3):
        network.reset_parameters()
        assert torch.equal(population.member(row).get_parameter("weight"), network.weight)


def test_an_independent_start_names_the_parameters_it_cannot_reach() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.ones(2))
            self.offset = nn.Parameter(torch.ones(2), requires_grad=False)

    with pytest.raises(ValueError, match=r"Found none for scale\. "):
        Population(Raw(), 2, init="independent")


def test_an_independent_start_leaves_frozen_modules_alone() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    network(torch.randn(16, 3) * 3 + 2)  # a pretrained, frozen body with statistics of its own
    network[0].requires_grad_(False)
    network[1].requires_grad_(False)
    expected = dict(network[:2].state_dict())
    member = Population(network, 2, init="independent").member(1)
    state = member.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


# ---------------------------------------------------------------------------------------------------- backend


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_a_given_backend_is_not_changed(backend: Any) -> None:
    population = Population(nn.Linear(3, 2), 3, backend=backend)
    assert population.choose_backend(_sum, torch.ones(2, 3), None) == backend
    assert population.active_backend == backend


def test_auto_uses_the_loop_until_it_has_chosen() -> None:
    assert Population(nn.Linear(3, 2), 3).active_backend == "loop"


def test_the_choice_is_active() -> None:
    population = Population(nn.Linear(3, 2), 3)
    chosen = population.choose_backend(_sum, torch.ones(2, 3), None)
    assert chosen in ("vmap", "loop")
    assert population.active_backend == chosen


def test_the_choice_is_told_with_times_and_memory(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(nn.Linear(3, 40, bias=False), nn.Tanh(), nn.Linear(40, 2, bias=False))
    population = Population(network, 6)
    with caplog.at_level(logging.INFO, logger="mtl_lightning.backends"):
        chosen = population.choose_backend(_plain_sum, torch.randn(1000, 3), None)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"Backend {chosen!r} for 6 subproblems")
    # What the graph keeps is the output of the hyperbolic tangent: of one subproblem, and of six.
    kept = 1000 * 40 * 4 / 2**20
    found = re.findall(r"ms with a graph of ([\d.]+) MiB", line)
    assert found == [f"{kept:.1f}", f"{6 * kept:.1f}"]


def test_the_choice_is_made_among_compiled_ones() -> None:
    population = Population(nn.Linear(3, 2), 3, compiler=partial(torch.compile, backend="aot_eager"))
    assert population.choose_backend(_sum, torch.randn(6, 3), None) in ("vmap", "loop")


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_gradients_of_several_passes_add_up(backend: Any) -> None:
    population = Population(_network("mlp"), SIZE, backend=backend)
    inputs, targets = _batch("mlp")
    _backward(population, inputs, targets)
    assert population.theta.grad is not None
    once = population.theta.grad.clone()
    _backward(population, inputs, targets)
    torch.testing.assert_close(population.theta.grad, 2 * once)
    for chunk in population.chunks():
        chunk.evaluate(_losses, inputs, targets).sum().backward(retain_graph=True)
        (2 * chunk.evaluate(_losses, inputs, targets)).sum().backward()
    expected = population.theta.grad - 2 * once
    population.theta.grad = None
    for chunk in population.chunks():
        (3 * chunk.evaluate(_losses, inputs, targets)).sum().backward()
    torch.testing.assert_close(population.theta.grad, expected)


class _HalfUsed(nn.Module):
    """Uses its second layer for positive inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = self.first(inputs["first"])
        return outputs + self.second(inputs["second"]) if "second" in inputs else outputs


@pytest.mark.parametrize(("backend", "chunk_size"), [("vmap", None), ("vmap", 3), ("loop", None)])
def test_a_new_gradient_holds_nothing_of_the_last_one(backend: Any, chunk_size: int | None) -> None:
    population = Population(_HalfUsed(), SIZE, backend=backend, chunk_size=chunk_size)
    inputs = {"first": torch.randn(5, 3), "second": torch.randn(5, 3)}
    for _ in population.chunks():  # nobody asks for gradients
        pass
    assert population.theta.grad is not None
    assert not population.theta.grad.any()
    for chunk in population.chunks():
        chunk.evaluate(_sum, inputs, None).sum().backward()
    assert population.theta.grad[:, population.columns(["second.weight"])[0]].all()
    population.theta.grad = None
    for chunk in population.chunks():
        chunk.evaluate(_sum, {"first": inputs["first"]}, None).sum().backward()
    twin = Population(population.member(0), SIZE, backend=backend)
    for chunk in twin.chunks():
        chunk.evaluate(_sum, {"first": inputs["first"]}, None).sum().backward()
    assert population.theta.grad is not None
    assert twin.theta.grad is not None
    torch.testing.assert_close(population.theta.grad, twin.theta.grad)
    assert not population.theta.grad[:, population.columns(["second.*"])[0]].any()


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_a_loop_that_is_left_in_its_last_round_leaves_nothing_old(backend: Any) -> None:
    population = Population(_HalfUsed(), SIZE, backend=backend)
    inputs = {"first": torch.randn(5, 3), "second": torch.randn(5, 3)}
    for chunk in population.chunks():
        chunk.evaluate(_sum, inputs, None).sum().backward()
    population.theta.grad = None
    for chunk in population.chunks():
        chunk.evaluate(_sum, {"first": inputs["first"]}, None).sum().backward()
        if chunk.members.stop == SIZE:
            break
    assert population.theta.grad is not None
    assert population.theta.grad[:, population.columns(["first.weight"])[0]].all()
    assert not population.theta.grad[:, population.columns(["second.*"])[0]].any()


@pytest.mark.parametrize(("backend", "chunk_size"), [("vmap", 2), ("loop", None)])
def test_a_loop_over_chunks_that_is_left_early_leaves_zeros(backend: Any, chunk_size: int | None) -> None:
    population = Population(nn.Linear(3, 2), SIZE, backend=backend, chunk_size=chunk_size)
    inputs = torch.randn(5, 3)
    for chunk in population.chunks():
        chunk.evaluate(_sum, inputs, None).sum().backward()
    population.theta.grad = None
    for chunk in population.chunks():
        chunk.evaluate(_sum, inputs, None).sum().backward()
        break
    assert population.theta.grad is not None
    assert population.theta.grad[: chunk.members.stop].any()
    assert not population.theta.grad[chunk.members.stop :].any()


def test_choosing_within_a_step_leaves_its_gradient() -> None:
    population = _choosing()
    inputs = torch.randn(6, 3)
    for chunk in population.chunks():
        chunk.evaluate(_sum, inputs, None).sum().backward()
    gradient = population.theta.grad
    assert gradient is not None
    expected = gradient.clone()
    population.choose_backend(_sum, inputs, None)
    assert population.theta.grad is gradient
    assert torch.equal(gradient, expected)


def test_one_subproblem_uses_the_loop() -> None:
    population = Population(nn.Linear(3, 2), 1)
    assert population.choose_backend(_sum, torch.ones(2, 3), None) == "loop"


def _choosing() -> Population:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), _Normalizer4(), nn.Linear(4, 2))
    return Population(network, 3)


class _Normalizer4(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + inputs.detach().mean(dim=0)
        return inputs + 1


def test_choosing_leaves_an_absent_gradient_absent() -> None:
    population = _choosing()
    population.choose_backend(_sum, torch.randn(6, 3), None)
    assert population.theta.grad is None


def test_choosing_leaves_the_gradient() -> None:
    population = _choosing()
    gradient = torch.randn_like(population.theta)
    population.theta.grad = gradient
    expected = gradient.clone()
    population.choose_backend(_sum, torch.randn(6, 3), None)
    assert population.theta.grad is gradient
    assert torch.equal(gradient, expected)


def test_choosing_leaves_the_state() -> None:
    population = _choosing()
    expected = {name: value.clone() for name, value in population.state_dict().items()}
    population.choose_backend(_sum, torch.randn(6, 3), None)
    assert all(torch.equal(value, expected[name]) for name, value in population.state_dict().items())


def test_choosing_leaves_the_random_state() -> None:
    population = _choosing()
    inputs = torch.randn(6, 3)
    before = torch.get_rng_state()
    population.choose_backend(_sum, inputs, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_choosing_works_where_gradients_are_off() -> None:
    population = _choosing()
    with torch.no_grad():
        assert population.choose_backend(_sum, torch.randn(6, 3), None) in ("loop", "vmap")


class _Telling(nn.Module):
    """A linear layer that first tells whether it is evaluated for several subproblems at once."""

    def __init__(self, tell: Callable[[bool], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.tell = tell

    def forward(self, inputs: Tensor) -> Tensor:
        self.tell(torch._C._functorch.is_batchedtensor(self.linear.weight))
        outputs: Tensor = self.linear(inputs)
        return outputs


def test_choosing_takes_a_few_passes() -> None:
    calls: list[bool] = []
    Population(_Telling(calls.append), 25).choose_backend(_sum, torch.randn(6, 3), None)
    assert 1 <= calls.count(True) <= 4  # all at once
    assert 1 <= calls.count(False) <= 5  # one of 25


def test_an_error_while_choosing_leaves_the_backend() -> None:
    def fail(at_once: bool) -> None:
        if at_once:
            raise KeyError("a mistake")

    population = Population(_Telling(fail), 3)
    with pytest.raises(KeyError):
        population.choose_backend(_sum, torch.randn(6, 3), None)
    assert population.active_backend == "loop"
    assert population.theta.grad is None


def test_choosing_per_subproblem() -> None:
    population = _choosing()
    assert population.choose_backend(_sum, torch.randn(3, 6, 3), None, per_subproblem=True) in ("loop", "vmap")


def test_a_network_that_vmap_cannot_run_falls_to_the_loop_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    population = Population(_Recurrent(), 3)
    with caplog.at_level(logging.WARNING, logger="mtl_lightning.backends"):
        chosen = population.choose_backend(_sum, torch.randn(2, 5, 3), None)
    assert chosen == "loop"
    assert [record.getMessage().startswith("vmap cannot run this network") for record in caplog.records] == [True]
    assert "\n" not in caplog.text.strip()


def test_a_network_that_vmap_cannot_run_is_named_under_vmap() -> None:
    population = Population(_Recurrent(), 3, backend="vmap")
    with pytest.raises(UnsupportedByVmapError, match="Use `backend='loop'`"):
        population(torch.randn(2, 5, 3))


def test_a_failure_under_vmap_leaves_buffers_as_they_were_when_choosing() -> None:
    class Late(nn.Module):
        """Updates a buffer in place before it does what vmap cannot."""

        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            self.steps += 1
            outputs: Tensor = self.linear(inputs)
            return outputs * outputs.sum().item()

    population = Population(Late(), 3)
    assert population.choose_backend(_sum, torch.ones(2, 3), None) == "loop"
    assert [population.member(row).get_buffer("steps").item() for row in range(3)] == [0, 0, 0]


def test_memory_that_suffices_for_the_loop_only_is_enough() -> None:
    def run_out(at_once: bool) -> None:
        if at_once:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert Population(_Telling(run_out), 3).choose_backend(_sum, torch.ones(2, 3), None) == "loop"


@pytest.mark.parametrize("backend", ["vmap", "loop", "auto"])
def test_an_error_of_the_user_is_not_blamed_on_vmap(backend: Any) -> None:
    def function(outputs: Any, targets: Any) -> Tensor:
        raise UserInputError("The network should return a dict.")

    population = Population(nn.Linear(3, 2), 3, backend=backend)
    with pytest.raises(UserInputError, match=r"^The network should return a dict\.$"):
        population.evaluate(function, torch.ones(2, 3), None)


def test_an_error_of_the_user_is_not_hidden_by_the_choice() -> None:
    def function(outputs: Any, targets: Any) -> Tensor:
        raise UserInputError("The network should return a dict.")

    with pytest.raises(UserInputError):
        Population(nn.Linear(3, 2), 3).choose_backend(function, torch.ones(2, 3), None)


# ---------------------------------------------------------------------------------------------- rows: clipping


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e3])
def test_clipping_equals_that_of_separate_networks(max_norm: float) -> None:
    separate = _separate(_network("lenet"))
    population = _population(separate, "loop")
    batch = _batch("lenet")
    _backward(population, *batch)
    _reference_backward(separate, *batch)
    norms = population.clip_grad_norm_(max_norm)
    expected = torch.stack([nn.utils.clip_grad_norm_(network.parameters(), max_norm) for network in separate])
    torch.testing.assert_close(norms, expected)
    assert population.theta.grad is not None
    for row, network in enumerate(separate):
        for name, part in _slots(population, network):
            gradient = network.get_parameter(name).grad
            assert gradient is not None
            torch.testing.assert_close(population.theta.grad[row, part].view_as(gradient), gradient)


def test_clipping_keeps_an_infinite_gradient_in_its_row() -> None:
    population = Population(nn.Linear(3, 2), 3)
    population.theta.grad = torch.ones_like(population.theta)
    population.theta.grad[1, 0] = torch.inf
    population.clip_grad_norm_(1.0)
    torch.testing.assert_close(population.theta.grad[[0, 2]].norm(dim=1), torch.ones(2), rtol=1e-4, atol=0)


def test_clipping_without_gradients() -> None:
    assert torch.equal(Population(nn.Linear(3, 2), 3).clip_grad_norm_(1.0), torch.zeros(3))


# ------------------------------------------------------------------------------------------------------- compiled


class _Counting:
    """Compiles without generating code, and counts graphs and their runs."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend=self._compile)

    def _compile(self, graph: Any, examples: Any) -> Callable[..., Any]:
        self.graphs += 1
        compiled = lookup_backend("aot_eager")(graph, examples)

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return compiled(*arguments)

        return run


@pytest.mark.parametrize(("kind", "per_subproblem"), [("mlp", True), ("batch_norm", False)])
@pytest.mark.parametrize(("backend", "runs"), [("vmap", 3), ("loop", 3 * SIZE)])
def test_compiled_and_plain_are_the_same(kind: str, backend: str, runs: int, per_subproblem: bool) -> None:
    torch._dynamo.reset()
    network, compiler = _network(kind), _Counting()
    plain = Population(network, SIZE, backend=backend)  # type: ignore[arg-type]
    compiled = Population(network, SIZE, backend=backend, compiler=compiler)  # type: ignore[arg-type]
    plain.theta.data.add_(0.1 * torch.randn_like(plain.theta))
    compiled.theta.data.copy_(plain.theta)
    for _ in range(3):
        inputs, targets = _batch(kind)
        if per_subproblem:
            inputs = torch.stack([inputs + index for index in range(SIZE)])
            targets = {task: target.expand(SIZE, *target.shape) for task, target in targets.items()}
        for population in (plain, compiled):
            for chunk in population.chunks():
                chunk.evaluate(_losses, inputs, targets, per_subproblem).sum().backward()
    assert compiler.graphs == 1  # one for all subproblems
    assert compiler.runs == runs
    torch.testing.assert_close(compiled.theta.grad, plain.theta.grad)
    for found, expected in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_copy_of_a_compiled_population_is_compiled_anew() -> None:
    population = Population(_network("mlp"), SIZE, backend="loop", compiler=_Counting())
    inputs, _ = _batch("mlp")
    before = population(inputs)["left"].detach()
    other = copy.deepcopy(population)
    other.theta.data.zero_()
    assert not other(inputs)["left"].any()
    assert torch.equal(population(inputs)["left"], before)


def test_a_compiled_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"should be a plain module.*compiler=torch\.compile"):
        Population(torch.compile(_network("mlp")), SIZE)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- rows: columns


def _with_statistics() -> Population:
    population = _population(_separate(_network("batch_norm")), "loop")
    for _ in range(3):
        population(_batch("batch_norm")[0])
    return population


def test_columns_of_all_parameters() -> None:
    population = Population(_network("lenet"), 2)
    assert population.columns() == [slice(0, population.theta.shape[1])]


def test_columns_follow_the_patterns() -> None:
    network = _network("mlp")
    population = _population(_separate(network), "loop")
    parts = population.columns(["heads.left.*", "encoder.layers.1.bias"])
    values = torch.cat([population.theta.detach()[2, part] for part in parts])
    member = dict(population.member(2).named_parameters())
    names = ["encoder.layers.1.bias", "heads.left.weight", "heads.left.bias"]
    assert len(parts) == 1  # they follow one another
    assert torch.equal(values[values != 0], torch.cat([member[name].detach().flatten() for name in names]))
    assert len(population.columns(["encoder.layers.1.weight", "heads.right.*"])) == 2


def test_columns_that_match_two_patterns_are_returned_once() -> None:
    population = Population(_network("mlp"), 2)
    assert population.columns(["encoder.*", "*"]) == population.columns(["*"])


def test_a_pattern_may_match_buffers_only() -> None:
    assert Population(_network("batch_norm"), 2).columns(["*.running_mean"]) == []


@pytest.mark.parametrize("patterns", [["enc"], ["encoder.*", "nothing.*"], ["ENCODER.*"]])
def test_a_pattern_that_matches_nothing(patterns: Sequence[str]) -> None:
    with pytest.raises(ValueError, match=f"Found '{patterns[-1].replace('.*', '')}"):
        Population(_network("mlp"), 2).columns(patterns)


# ------------------------------------------------------------------------------------------------ rows: select


@pytest.mark.parametrize("rows", [[2, 0], [0, 0, 1, 1, 2, 2, 3, 3], [3, 2, 1, 0], [1]])
def test_select_keeps_the_rows_in_their_order(rows: list[int]) -> None:
    population = _with_statistics()
    before = [population.member(row).state_dict() for row in range(SIZE)]
    population.select_(rows)
    assert population.size == len(rows)
    for place, row in enumerate(rows):
        for name, value in population.member(place).state_dict().items():
            assert torch.equal(value, before[row][name])


def test_select_keeps_the_parameter_object() -> None:
    population = _with_statistics()
    theta = population.theta
    population.select_([0, 0, 1])
    assert population.theta is theta
    assert [name for name, _ in population.named_parameters()] == ["theta"]


def test_select_copies_rows_that_are_named_twice() -> None:
    population = _with_statistics()
    population.select_([1, 1])
    population.theta.data[0] = 7.0
    for buffer in population.buffers():
        buffer[0] = 7
    assert not any((value == 7).all() for value in population.member(1).state_dict().values())


@backends
def test_training_goes_on_after_select(backend: str) -> None:
    separate = _separate(_network("batch_norm"))
    population = _population(separate, backend)
    batch = _batch("batch_norm")
    _backward(population, *batch)
    population.select_([0, 0, 1, 3, 3])
    assert population.theta.grad is None
    _backward_once(population, *batch)
    assert population.theta.grad is not None
    assert population.theta.grad.shape == (5, population.theta.shape[1])
    torch.testing.assert_close(population.theta.grad[0], population.theta.grad[1])
    assert not torch.equal(population.theta.grad[1], population.theta.grad[2])


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "`size` should be at least 1. Found 0."),
        ({"chunk_size": 0}, "`chunk_size` should be at least 1, or None. Found 0."),
        ({"init": "random"}, "`init` should be 'common' or 'independent'. Found 'random'."),
        ({"backend": "stack"}, "`backend` should be 'vmap', 'loop' or 'auto'. Found 'stack'."),
        ({"network": nn.ReLU()}, "`network` should have a trainable parameter."),
        ({"network": nn.Linear(1, 1).requires_grad_(False)}, "`network` should have a trainable parameter."),
    ],
)
def test_values_out_of_range(arguments: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {"network": nn.Linear(1, 1), "size": 2}
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Population(**(valid | arguments))


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double()), "torch.float32, torch.float64"),
        (nn.Linear(1, 1, dtype=torch.complex64), "torch.complex64"),
    ],
)
def test_parameters_of_unsuitable_types(network: nn.Module, found: str) -> None:
    with pytest.raises(TypeError, match=f"one floating-point dtype. Found {found}"):
        Population(network, 2)


def test_frozen_parameters_may_have_another_dtype() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2).half().requires_grad_(False))
    assert Population(network, 2).member(0)[1].weight.dtype == torch.float16  # type: ignore[index]


def test_the_description_names_size_parameters_and_backend() -> None:
    assert Population(nn.Linear(3, 2), 4, backend="vmap").extra_repr() == "size=4, num_parameters=8, backend='vmap'"


# ------------------------------------------------------------------------------------------ what is kept between steps


@pytest.mark.parametrize(("backend", "chunk_size"), [("vmap", None), ("vmap", 2), ("loop", None)])
def test_chunks_are_made_once(backend: Any, chunk_size: int | None) -> None:
    population = Population(_network("mlp"), SIZE, backend=backend, chunk_size=chunk_size)
    first = list(population.chunks())
    population.theta.grad = None
    assert all(old is new for old, new in zip(first, population.chunks(), strict=True))


@backends
@pytest.mark.parametrize("change", ["values", "memory", "gradient", "size", "dtype", "chunk_size"])
def test_chunks_follow_the_parameters(backend: Any, change: str) -> None:
    population = Population(_network("mlp"), SIZE, backend=backend)
    inputs, targets = _batch("mlp")
    for chunk in population.chunks():
        chunk.evaluate(_losses, inputs, targets).sum().backward()
    if change == "values":
        with torch.no_grad():
            population.theta.mul_(2.0)
    elif change == "memory":
        population.theta.data = population.theta.data * 2.0
    elif change == "gradient":
        population.theta.grad = torch.zeros_like(population.theta)
    elif change == "size":
        population.select_([2, 0])
    elif change == "dtype":
        population.double()
        inputs, targets = inputs.double(), {name: target.double() for name, target in targets.items()}
    else:
        population.chunk_size = 3
    if change != "gradient":
        population.theta.grad = None
    for chunk in population.chunks():
        chunk.evaluate(_losses, inputs, targets).sum().backward()
    assert population.theta.grad is not None
    for row in range(population.size):
        member = population.member(row)
        torch.autograd.backward(_losses(member(inputs), targets).sum())
        for name, part in _slots(population, member):
            expected = member.get_parameter(name).grad
            assert expected is not None
            torch.testing.assert_close(population.theta.grad[row, part].view_as(expected), expected)


def test_nothing_of_the_old_parameters_is_kept_where_they_go_elsewhere() -> None:
    population = Population(_network("mlp"), SIZE, backend="loop")
    inputs, targets = _batch("mlp")
    for chunk in population.chunks():
        chunk.evaluate(_losses, inputs, targets).sum().backward()
    del chunk
    population.theta.grad = None
    old = weakref.ref(population.theta.data.untyped_storage())
    memory = [
        weakref.ref(value) for made in population._chunks_of(population._memory_of_gradient()) for value in made._values
    ]
    population.double()
    gc.collect()
    assert old() is None
    assert all(value() is None for value in memory)


def test_chunks_made_in_inference_mode_are_not_trained() -> None:
    population = Population(_network("mlp"), SIZE, backend="vmap")
    inputs, targets = _batch("mlp")
    with torch.inference_mode():
        list(population.chunks())
        population.theta.grad = None
    for chunk in population.chunks():
        chunk.evaluate(_losses, inputs, targets).sum().backward()
    assert population.theta.grad is not None
    assert population.theta.grad.any()


def test_a_compiled_population_takes_both_shared_and_separate_batches() -> None:
    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        return function  # what is compiled is called with other arguments than those of the first time

    population = Population(_network("mlp"), SIZE, backend="vmap", compiler=compiler)
    inputs, _ = _batch("mlp")
    shared = population(inputs)["left"]
    separate = population.evaluate(lambda outputs, _: outputs, inputs.expand(SIZE, *inputs.shape), None, True)["left"]
    torch.testing.assert_close(separate, shared)
    torch.testing.assert_close(population(inputs)["left"], shared)


def test_a_population_that_is_not_needed_any_more_is_freed_at_once() -> None:
    population = Population(_network("mlp"), SIZE, backend="vmap")
    inputs, targets = _batch("mlp")
    for chunk in population.chunks():
        chunk.evaluate(_losses, inputs, targets).sum().backward()
    theta = weakref.ref(population.theta)
    gc.collect()
    gc.disable()
    try:
        del chunk, population
        assert theta() is None
    finally:
        gc.enable()


def test_warming_up_does_not_count_when_the_backend_is_chosen() -> None:
    warm: list[bool] = []

    def wait(at_once: bool) -> None:
        """Take as long for several subproblems as for one, and far longer the first time."""
        time.sleep(0.1 if at_once and not warm else 0.01)
        warm.extend([True] * at_once)

    population = Population(_Telling(wait), 20, chunk_size=5)
    assert population.choose_backend(_sum, torch.ones(2, 3), None) == "vmap"


def test_compiling_does_not_count_when_the_backend_is_chosen() -> None:
    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        calls: list[Any] = []

        def compiled(*args: Any) -> Any:
            if not calls:
                time.sleep(0.7)
            calls.append(args)
            return function(*args)

        return compiled

    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    population = Population(network, 32, backend="auto", compiler=compiler)
    chosen = population.choose_backend(lambda outputs, _: outputs.sum(), torch.randn(4, 4), None)
    assert chosen == "vmap"  # twenty layers in one pass beside 32 times twenty
