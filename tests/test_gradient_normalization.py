from __future__ import annotations

import pytest
import torch

from mtl_lightning.gradient_normalization import GradientNormalization


def test_the_parts_of_the_gradient_are_as_long_as_the_preferences() -> None:
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(4, 3, 50, generator=generator) * torch.tensor([[1e2], [1.0], [1e3]])
    preferences = torch.rand(4, 3, generator=generator).softmax(dim=-1)
    weights = GradientNormalization(xi=1e-9).weights(jacobian @ jacobian.mT, torch.ones(4, 3), preferences)
    torch.testing.assert_close((weights.unsqueeze(-1) * jacobian).norm(dim=-1), preferences)


def test_the_units_of_the_losses_do_not_matter() -> None:
    jacobian = torch.randn(2, 9)
    units, preference = torch.tensor([[1e-3], [1e3]]), torch.tensor([0.3, 0.7])
    rule = GradientNormalization(xi=1e-12)
    plain = rule.weights(jacobian @ jacobian.mT, torch.ones(2), preference) @ jacobian
    scaled = units * jacobian
    torch.testing.assert_close(rule.weights(scaled @ scaled.mT, torch.ones(2), preference) @ scaled, plain)


def test_a_gradient_of_zero_has_a_finite_weight() -> None:
    weights = GradientNormalization(xi=0.1).weights(torch.zeros(2, 2), torch.ones(2), torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(weights, torch.tensor([3.0, 7.0]))


@pytest.mark.parametrize("xi", [0.0, -1.0, float("inf")])
def test_it_refuses_xi(xi: float) -> None:
    with pytest.raises(ValueError, match="`xi` should be positive and finite"):
        GradientNormalization(xi)
