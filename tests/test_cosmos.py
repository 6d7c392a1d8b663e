from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl_lightning.cosmos import COSMOS
from mtl_lightning.scalarization import Linear


def _reference_cosmos(losses: Tensor, preference: Tensor, penalty: float) -> float:
    """Ruchte and Grabocka (2021), the objective of one batch, number by number."""
    rows = list(zip(losses.tolist(), preference.tolist(), strict=True))
    dot = sum(f * w for f, w in rows)
    lengths = sum(f * f for f, _ in rows) ** 0.5 * sum(w * w for _, w in rows) ** 0.5
    return dot - penalty * dot / lengths


def _cases() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(4, 5, 3, generator=generator, dtype=torch.float64) * 3
    return losses, torch.rand(4, 5, 3, generator=generator, dtype=torch.float64).softmax(dim=-1)


@pytest.mark.parametrize("penalty", [0.5, 2.0, 8.0])
def test_it_is_the_sum_less_the_cosine(penalty: float) -> None:
    losses, preferences = _cases()
    found = COSMOS(penalty)(losses, preferences)
    assert found.shape == (4, 5)
    for index in ((0, 0), (3, 4)):
        assert float(found[index]) == pytest.approx(_reference_cosmos(losses[index], preferences[index], penalty))


def test_without_penalty_it_is_linear() -> None:
    assert torch.equal(COSMOS(0.0)(*_cases()), Linear()(*_cases()))


def test_the_order_of_the_tasks_does_not_matter() -> None:
    losses, preferences = _cases()
    order = [2, 0, 1]
    torch.testing.assert_close(COSMOS()(losses[..., order], preferences[..., order]), COSMOS()(losses, preferences))


def test_on_the_ray_the_penalty_has_no_slope() -> None:
    preference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    losses = (4 * preference).requires_grad_()
    (slopes,) = torch.autograd.grad(COSMOS(5.0)(losses, preference), losses)
    torch.testing.assert_close(slopes, preference)


def test_off_the_ray_the_penalty_turns_the_losses_to_it_at_equal_length() -> None:
    preference = torch.tensor([0.2, 0.8], dtype=torch.float64)
    losses = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(COSMOS(1.0)(losses, preference) - Linear()(losses, preference), losses)
    torch.testing.assert_close(slopes @ losses, torch.zeros((), dtype=torch.float64))
    assert slopes[0] > 0 > slopes[1]  # descent lowers the first, which is too large


@pytest.mark.parametrize(("losses", "preference"), [([0.0, 0.0], [0.5, 0.5]), ([1.0, 2.0], [0.0, 0.0])])
def test_zeros_give_no_nan(losses: list[float], preference: list[float]) -> None:
    leaf = torch.tensor(losses, requires_grad=True)
    value = COSMOS()(leaf, torch.tensor(preference))
    (slopes,) = torch.autograd.grad(value, leaf)
    assert float(value.detach()) == 0.0
    assert slopes.isfinite().all()


def test_missing_tasks_take_no_part() -> None:
    losses, preferences = _cases()
    found = COSMOS()(losses[..., [0, 2]], preferences[..., [0, 2]], tasks=[0, 2])
    assert float(found[1, 1]) == pytest.approx(
        _reference_cosmos(losses[1, 1, [0, 2]], preferences[1, 1, [0, 2]], penalty=2.0)
    )


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), float("inf")])
def test_it_refuses_a_penalty(penalty: float) -> None:
    with pytest.raises(ValueError, match="`penalty` should be finite and not negative"):
        COSMOS(penalty)


def test_it_refuses_shapes() -> None:
    with pytest.raises(ValueError, match="one column per task"):
        COSMOS()(torch.ones(2), torch.ones(3))
