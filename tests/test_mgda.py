from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl_lightning.mgda import MGDA
from mtl_lightning.min_norm import min_norm_weights


def _weights(gramian: Tensor) -> Tensor:
    return MGDA().weights(gramian, torch.ones(gramian.shape[:-1]), torch.ones(gramian.shape[:-1]))


@pytest.mark.parametrize("num_tasks", [2, 3, 7])
def test_the_conditions_of_the_shortest_vector_hold(num_tasks: int) -> None:
    torch.manual_seed(0)
    jacobian = torch.randn(20, num_tasks, 10, dtype=torch.float64) + 0.5
    gramian = jacobian @ jacobian.mT
    weights = _weights(gramian)
    products = torch.einsum("pst,pt->ps", gramian, weights)
    squared = (weights * products).sum(dim=1, keepdim=True)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(20, dtype=torch.float64))
    assert (weights >= 0).all()
    assert (products >= squared - 1e-9).all()  # no loss rises, and each falls at least as fast as the vector is long
    torch.testing.assert_close(torch.where(weights > 1e-9, products, squared), squared.expand_as(products))


def test_two_tasks_have_a_closed_form() -> None:
    torch.manual_seed(0)
    jacobian = torch.randn(50, 2, 3, dtype=torch.float64)
    first, second = jacobian.unbind(dim=1)
    apart = (first - second).square().sum(dim=1)
    share = (((second - first) * second).sum(dim=1) / apart).clamp(0, 1)
    torch.testing.assert_close(_weights(jacobian @ jacobian.mT), torch.stack([share, 1 - share], dim=1))


def test_descent_ends_where_no_loss_can_fall_and_passes_over_none_on_the_way() -> None:
    torch.manual_seed(0)
    centres = torch.eye(3, dtype=torch.float64)
    x = 2 * torch.randn(8, 3, dtype=torch.float64)
    losses = (x.unsqueeze(1) - centres).square().sum(dim=-1)
    for _ in range(200):
        jacobian = 2 * (x.unsqueeze(1) - centres)
        x = x - 0.05 * torch.einsum("pt,ptd->pd", _weights(jacobian @ jacobian.mT), jacobian)
        previous, losses = losses, (x.unsqueeze(1) - centres).square().sum(dim=-1)
        assert (losses <= previous + 1e-12).all()
    # The Pareto set is the triangle of the three centres.
    torch.testing.assert_close(x.sum(dim=1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-3)
    assert (x >= -1e-3).all()
    jacobian = 2 * (x.unsqueeze(1) - centres)
    gramian = jacobian @ jacobian.mT
    weights = min_norm_weights(gramian)
    assert torch.einsum("pt,pts,ps->p", weights, gramian, weights).abs().max() < 1e-5


def test_where_it_ends_is_up_to_the_start_and_not_to_the_preference() -> None:
    gramian, losses = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([1.0, 2.0])
    found = [MGDA().weights(gramian, losses, torch.tensor(preference)) for preference in ([0.1, 0.9], [0.9, 0.1])]
    assert torch.equal(found[0], found[1])
