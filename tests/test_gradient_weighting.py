from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl_lightning.exact_pareto import EPO
from mtl_lightning.gradient_weighting import GradientWeighting
from mtl_lightning.mgda import MGDA
from mtl_lightning.pareto_mtl import ParetoMTL

RULES: dict[str, GradientWeighting] = {
    "mgda": MGDA(),
    "epo": EPO(),
    "pareto_mtl": ParetoMTL(initial_steps=0),
    "pareto_mtl_initial": ParetoMTL(initial_steps=1),
}


def statistics(size: int, num_tasks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return Gramians of random gradients, random losses, and preferences that are spread, in double precision."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(size, num_tasks, 8, generator=generator, dtype=torch.float64)
    losses = 0.1 + torch.rand(size, num_tasks, generator=generator, dtype=torch.float64)
    preferences = 0.1 + torch.rand(size, num_tasks, generator=generator, dtype=torch.float64)
    return jacobian @ jacobian.mT, losses, preferences / preferences.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", RULES)
def test_tasks_in_another_order_get_the_same_weights(name: str, num_tasks: int) -> None:
    gramian, losses, preferences = statistics(6, num_tasks)
    order = torch.randperm(num_tasks)
    straight = RULES[name].weights(gramian, losses, preferences)
    permuted = RULES[name].weights(gramian[:, order][:, :, order], losses[:, order], preferences[:, order])
    torch.testing.assert_close(permuted, straight[:, order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_subproblems_in_another_order_get_the_same_weights(name: str) -> None:
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    gramian, losses, preferences = statistics(6, 3)
    straight = RULES[name].weights(gramian, losses, preferences)
    permuted = RULES[name].weights(gramian[order], losses[order], preferences[order])
    torch.testing.assert_close(permuted, straight[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
@pytest.mark.parametrize("name", RULES)
def test_the_unit_of_the_losses_does_not_matter(name: str, factor: float) -> None:
    gramian, losses, preferences = statistics(6, 3)
    expected = RULES[name].weights(gramian, losses, preferences)
    found = RULES[name].weights(factor**2 * gramian, factor * losses, preferences)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_the_scale_of_the_gradients_alone_does_not_matter(name: str) -> None:
    gramian, losses, preferences = statistics(6, 3)  # as under a gradient scaler
    found = RULES[name].weights(2.0**32 * gramian, losses, preferences)
    torch.testing.assert_close(found, RULES[name].weights(gramian, losses, preferences), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_dtype_is_kept_and_single_precision_changes_little(name: str, dtype: torch.dtype) -> None:
    gramian, losses, preferences = statistics(6, 3)
    weights = RULES[name].weights(gramian.to(dtype), losses.to(dtype), preferences.to(dtype))
    assert weights.dtype == dtype
    expected = RULES[name].weights(gramian, losses, preferences)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", RULES)
def test_gradients_of_zero_give_finite_weights(name: str) -> None:
    gramian, losses, preferences = statistics(4, 3)
    gramian[1, 0] = gramian[1, :, 0] = 0.0
    gramian[2] = 0.0
    losses[3] = 0.0
    weights = RULES[name].weights(gramian, losses, preferences)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.abs().sum(dim=1), torch.ones(4, dtype=weights.dtype))


@pytest.mark.parametrize("name", RULES)
def test_a_single_task_has_all_the_weight(name: str) -> None:
    # A preference of zero is one that was left over when tasks without labels were taken out.
    weights = RULES[name].weights(torch.ones(2, 1, 1), torch.ones(2, 1), torch.tensor([[0.5], [0.0]]))
    assert torch.equal(weights, torch.ones(2, 1))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ({"gramian": torch.ones(2, 3, 2)}, r"`gramian` should have shape \(..., T, T\). Found shape \(2, 3, 2\)"),
        ({"losses": torch.ones(2, 3)}, r"`losses` should have shape \(2, 2\).*Found shape \(2, 3\)"),
        ({"preferences": torch.ones(2)}, r"`preferences` should have shape \(2, 2\).*Found shape \(2,\)"),
        ({"gramian": torch.full((2, 2, 2), torch.nan)}, "`gramian` should be finite"),
        ({"losses": torch.full((2, 2), torch.inf)}, "`losses` should be finite"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, broken: dict[str, Tensor], match: str) -> None:
    given = {"gramian": torch.eye(2).expand(2, 2, 2), "losses": torch.ones(2, 2), "preferences": torch.ones(2, 2) / 2}
    given |= broken
    with pytest.raises(ValueError, match=match):
        RULES[name].weights(given["gramian"], given["losses"], given["preferences"])


def test_a_rule_without_weights_is_named() -> None:
    class Unfinished(GradientWeighting):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished should implement `weights`"):
        Unfinished().weights(torch.eye(2), torch.ones(2), torch.ones(2))
