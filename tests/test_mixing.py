"""The exchange and the product of a transfer, in one process; for several see tests/strategies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtl_lightning import mixing
from mtl_lightning.mixing import Mixing
from mtl_lightning.networks import MLP, ConvEncoder, MultiHeadNetwork
from mtl_lightning.population import Population
from mtl_lightning.population_shards import Shards

SIZE = 4
ALL_HEALTHY = torch.ones(SIZE, dtype=torch.bool)
EVERYONE = torch.ones(SIZE, SIZE, dtype=torch.bool)
all_givers = pytest.mark.parametrize("givers", [None, EVERYONE], ids=["product", "sum"])


def _network(kind: str) -> nn.Module:
    encoder, width = (MLP(18, (7,)), 7) if kind == "mlp" else (ConvEncoder((3, 5), in_channels=2), 5)
    return MultiHeadNetwork(encoder, {"left": nn.Linear(width, 3), "right": nn.Linear(width, 2)})


def _inputs() -> Tensor:
    return torch.randn(5, 2, 6, 6)


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


def _population(separate: Sequence[nn.Module]) -> Population:
    """Return a population whose rows are the given networks."""
    population = Population(separate[0], len(separate), backend="loop")
    for row, network in enumerate(separate):
        for name, part in _slots(population, network):
            population.theta.data[row, part] = network.get_parameter(name).detach().flatten()
    return population


class _Masked(nn.Module):
    """Causal attention weights from a buffer that holds minus infinity."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.linear(inputs).unsqueeze(-2) + self.mask).softmax(dim=-1)


def _transfer(
    population: Population,
    matrix: Tensor,
    healthy: Tensor = ALL_HEALTHY,
    givers: Tensor | None = None,
    patterns: Sequence[str] | None = None,
) -> Tensor:
    """Return ``(M - I) theta``, zero where nothing is mixed, and see that both ways of adding it agree."""
    mixing = Mixing(population, Shards(population.size), givers, patterns)
    before = population.theta.detach().clone()
    step = mixing.step(mixing.receive(), matrix, healthy).clone()
    whole, start = torch.zeros_like(before), 0
    for part in population.columns(patterns):
        width = part.stop - part.start
        whole[:, part] = step[:, start : start + width]
        start += width
    assert step.shape[1] == start
    mixing.add(step)
    torch.testing.assert_close(population.theta.detach(), before + whole, rtol=0, atol=0, equal_nan=True)
    after = population.theta.detach().clone()
    population.theta.data.copy_(before)
    mixing.mix(mixing.receive(), matrix, healthy)
    torch.testing.assert_close(population.theta.detach(), after, rtol=0, atol=0, equal_nan=True)
    population.theta.data.copy_(before)
    return whole


def _mix_buffers(
    population: Population,
    matrix: Tensor,
    healthy: Tensor = ALL_HEALTHY,
    givers: Tensor | None = None,
    patterns: Sequence[str] | None = None,
) -> None:
    Mixing(population, Shards(population.size), givers, patterns).mix_buffers(matrix, healthy)


def _mixing(size: int) -> Tensor:
    return torch.rand(size, size).softmax(dim=1)


def _reference_transfer(theta: Tensor, matrix: Tensor) -> Tensor:
    step = torch.zeros_like(theta)
    for i in range(len(theta)):
        for j in range(len(theta)):
            step[i] += (matrix[i, j] - (1.0 if i == j else 0.0)) * theta[j]
    return step


@all_givers
def test_the_transfer_step_is_the_matrix_less_the_identity_times_theta(givers: Tensor | None) -> None:
    population = _population(_separate(_network("mlp")))
    matrix = _mixing(SIZE)
    step = _transfer(population, matrix, givers=givers)
    torch.testing.assert_close(step, _reference_transfer(population.theta.detach(), matrix))


@all_givers
def test_the_transfer_step_leaves_theta_alone(givers: Tensor | None) -> None:
    population = _population(_separate(_network("mlp")))
    before = population.theta.detach().clone()
    mixing = Mixing(population, Shards(population.size), givers)
    mixing.step(mixing.receive(), _mixing(SIZE), ALL_HEALTHY)
    assert torch.equal(population.theta, before)


@pytest.mark.parametrize("sick", [None, 1])
@pytest.mark.parametrize("patterns", [None, ["encoder.*", "heads.right.weight"], ["heads.*"]])
@all_givers
def test_parameters_mixed_part_by_part_are_those_mixed_at_once(
    givers: Tensor | None, patterns: Sequence[str] | None, sick: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, healthy = _mixing(SIZE), ALL_HEALTHY
    separate = _separate(_network("mlp"))
    if sick is not None:
        healthy = torch.arange(SIZE) != sick
        matrix = torch.where(healthy, matrix, 0.0)
    found = []
    for columns in (10**6, 37):
        population = _population(separate)
        if sick is not None:
            population.theta.data[sick] = torch.nan
        monkeypatch.setattr(mixing, "_COLUMNS_AT_ONCE", columns)
        before = population.theta.detach().clone()
        expected = before + _transfer(population, matrix, healthy, givers, patterns)
        one = Mixing(population, Shards(SIZE), givers, patterns)
        one.mix(one.receive(), matrix, healthy)
        torch.testing.assert_close(population.theta.detach(), expected, rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(population.theta[0], before[0])
        found.append(population.theta.detach())
    # With givers the sum has an order; of a product with all of them it is the library's, and may depend on the width.
    tolerance: dict[str, Any] = {} if givers is None else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(*found, equal_nan=True, **tolerance)


@all_givers
def test_the_identity_transfers_nothing(givers: Tensor | None) -> None:
    population = _population(_separate(_network("mlp")))
    assert not _transfer(population, torch.eye(SIZE), givers=givers).any()


@all_givers
def test_the_filter_keeps_other_parameters_at_zero(givers: Tensor | None) -> None:
    network = _network("mlp")
    population = _population(_separate(network))
    matrix = _mixing(SIZE)
    expected = _reference_transfer(population.theta.detach(), matrix)
    for name, part in _slots(population, network):
        if not name.startswith("encoder."):
            expected[:, part] = 0.0
    step = _transfer(population, matrix, givers=givers, patterns=["encoder.*"])
    torch.testing.assert_close(step, expected)
    assert step.any()


@pytest.mark.parametrize("patterns", [None, ["encoder.*"]])
@all_givers
def test_an_unhealthy_row_does_not_spread(patterns: Sequence[str] | None, givers: Tensor | None) -> None:
    population = _population(_separate(_network("mlp")))
    healthy = torch.tensor([True, False, True, True])
    matrix = _mixing(SIZE).masked_fill(~healthy, 0.0)
    matrix[1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    matrix = matrix / matrix.sum(dim=1, keepdim=True)
    expected = _transfer(population, matrix, givers=givers, patterns=patterns)
    population.theta.data[1] = torch.nan
    population.theta.data[1, 0] = torch.inf
    step = _transfer(population, matrix, healthy, givers, patterns)
    torch.testing.assert_close(step[healthy], expected[healthy])
    assert not step[1].any()


@all_givers
def test_mixing_equal_subproblems_many_times_changes_nothing(givers: Tensor | None) -> None:
    population = Population(nn.Linear(3, 2), 3)
    before = population.theta.detach().clone()
    matrix = torch.full((3, 3), 1.80155e-5)  # one minus twice this rounds by nearly half a unit in the last place
    matrix.fill_diagonal_(0.0)
    matrix += torch.diag(1.0 - matrix.sum(dim=1))
    healthy = torch.ones(3, dtype=torch.bool)
    mine = None if givers is None else givers[:3, :3]
    one = Mixing(population, Shards(3), mine)
    for _ in range(10_000):
        one.mix(one.receive(), matrix, healthy)
    torch.testing.assert_close(population.theta.detach(), before, rtol=1e-5, atol=0)


def _with_statistics() -> Population:
    population = _population(_separate(_network("batch_norm")))
    for _ in range(3):
        population(_inputs())
    return population


@all_givers
def test_mixing_buffers_mixes_the_floating_point_ones(givers: Tensor | None) -> None:
    population = _with_statistics()
    matrix = _mixing(SIZE)
    before = [dict(population.member(row).named_buffers()) for row in range(SIZE)]
    _mix_buffers(population, matrix, givers=givers)
    for i in range(SIZE):
        for name, buffer in population.member(i).named_buffers():
            if buffer.is_floating_point():
                expected = sum(matrix[i, j] * before[j][name] for j in range(SIZE))
                torch.testing.assert_close(buffer, expected)
            else:
                assert torch.equal(buffer, before[i][name])


@all_givers
def test_mixing_buffers_with_a_filter_leaves_others_alone(givers: Tensor | None) -> None:
    population = _with_statistics()
    before = {name: buffer.clone() for name, buffer in population.network.named_buffers()}
    _mix_buffers(population, _mixing(SIZE), givers=givers, patterns=["encoder.blocks.1.*var"])
    changed = {name for name, buffer in population.network.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"encoder.blocks.1.norm1.running_var", "encoder.blocks.1.norm2.running_var"}


@all_givers
def test_mixing_buffers_does_not_spread_an_unhealthy_row(givers: Tensor | None) -> None:
    population = _with_statistics()
    healthy = torch.tensor([True, False, True, True])
    matrix = _mixing(SIZE).masked_fill(~healthy, 0.0)
    matrix[1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    matrix = matrix / matrix.sum(dim=1, keepdim=True)
    for buffer in population.buffers():
        if buffer.is_floating_point():
            buffer[1] = torch.nan
    _mix_buffers(population, matrix, healthy, givers)
    for row in (0, 2, 3):
        assert all(buffer.isfinite().all() for buffer in population.member(row).buffers())


@all_givers
def test_mixing_buffers_keeps_infinite_constants(givers: Tensor | None) -> None:
    population = Population(_Masked(), SIZE)
    _mix_buffers(population, _mixing(SIZE), givers=givers)
    assert torch.equal(population.member(0).get_buffer("mask"), _Masked().mask)


@all_givers
def test_mixing_buffers_accepts_empty_ones(givers: Tensor | None) -> None:
    network = nn.Linear(3, 2)
    network.register_buffer("queue", torch.empty(0, 3))
    population = Population(network, SIZE)
    _mix_buffers(population, _mixing(SIZE), givers=givers)
    assert population.member(0).get_buffer("queue").shape == (0, 3)


@all_givers
def test_equal_subproblems_and_a_zero_gradient_stay_where_they_are(givers: Tensor | None) -> None:
    population = Population(nn.Linear(3, 2), SIZE)
    assert _transfer(population, _mixing(SIZE), givers=givers).abs().max() < 1e-6


def test_the_sum_over_givers_is_the_product_with_a_sparse_matrix() -> None:
    population = _population(_separate(_network("mlp")))
    givers = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    received = torch.where(givers, 0.3 * torch.rand(SIZE, SIZE), 0.0)
    matrix = received + torch.diag(1.0 - received.sum(dim=1))
    step = _transfer(population, matrix, givers=givers)
    torch.testing.assert_close(step, _reference_transfer(population.theta.detach(), matrix))
    assert not step[3].any()


def test_no_parameter_matches_a_pattern_of_buffers() -> None:
    population = _with_statistics()
    step = _transfer(population, _mixing(SIZE), patterns=["*.running_mean"])
    assert step.shape == population.theta.shape
    assert not step.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("patterns", [None, ["*.bias"], ["encoder.layers.1.bias"]])
@pytest.mark.parametrize("sick", [None, 1])
@pytest.mark.parametrize("size", [2, 5, 8, 25])
def test_the_product_and_the_sums_one_by_one_are_equal_bit_for_bit(
    size: int,
    sick: int | None,
    patterns: Sequence[str] | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A process with one subproblem sums, one with several multiplies: else results would depend on their number.
    population = _population(_separate(_network("mlp"), size=size)).to(dtype)
    places = torch.arange(size)
    givers = (places[:, None] - places).abs() <= 2
    matrix = torch.rand(size, size) * givers
    matrix /= matrix.sum(dim=1, keepdim=True)
    healthy = torch.ones(size, dtype=torch.bool)
    if sick is not None:
        population.theta.data[sick], healthy[sick] = torch.nan, False
        matrix[:, sick] = 0.0
    steps = []
    for many in (64, 0):
        monkeypatch.setattr(mixing, "_MANY_ROWS", many)
        one = Mixing(population, Shards(size), givers, patterns)
        steps.append(one.step(one.receive(), matrix, healthy).clone())
    assert torch.equal(*steps)
    assert steps[0].any()
    assert torch.isfinite(steps[0]).all()


def test_steps_use_the_same_memory_again_and_buffers_use_other() -> None:
    population = _population(_separate(_network("batch_norm")))
    one = Mixing(population, Shards(SIZE), EVERYONE)
    matrix = torch.full((SIZE, SIZE), 1 / SIZE)
    first = one.step(one.receive(), matrix, ALL_HEALTHY)
    kept = first.clone()
    one.mix_buffers(matrix, ALL_HEALTHY)
    assert torch.equal(first, kept)
    assert one.step(one.receive(), matrix, ALL_HEALTHY).data_ptr() == first.data_ptr()


def test_mixing_in_place_needs_the_memory_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Remembers the largest tensor that is no view of the parameters."""

        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != theta.untyped_storage().data_ptr():
                self.size = max(self.size, result.numel())
            return result

    monkeypatch.setattr(mixing, "_COLUMNS_AT_ONCE", 16)
    population = _population(_separate(_network("mlp")))
    theta = population.theta.detach()
    one = Mixing(population, Shards(SIZE), EVERYONE)
    one.mix(one.receive(), _mixing(SIZE), ALL_HEALTHY)  # tries out what is equal
    with Largest() as largest:  # type: ignore[no-untyped-call]
        one.mix(one.receive(), _mixing(SIZE), ALL_HEALTHY)
    assert SIZE * SIZE <= largest.size <= SIZE * 32 < theta.numel()


@pytest.mark.parametrize("sick", [False, True])
def test_a_process_without_subproblems_mixes_nothing(sick: bool) -> None:
    population = _population(_separate(_network("mlp"), size=2))
    shards = Shards(2)
    shards.blocks, shards.rank = [range(1), range(1, 2), range(2, 2)], 2  # the third of three processes
    other = Mixing(population, shards, torch.ones(2, 2, dtype=torch.bool))
    rows = population.theta.detach()[: len(other.exchange.held)]
    healthy = torch.tensor([not sick, True])
    assert other.step(rows, torch.eye(2), healthy).shape == (0, rows.shape[1])
