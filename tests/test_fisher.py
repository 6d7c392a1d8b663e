import pytest
import torch
from torch import Tensor, nn

from mtl_lightning.fisher import root_fisher_gramian


def _reference_root_fisher_gramian(gradients: list[list[Tensor]]) -> Tensor:
    roots = torch.stack([torch.cat([gradient.flatten() for gradient in row]).square().sqrt() for row in gradients])
    return roots @ roots.T


def test_equals_the_gramian_of_all_gradients_at_once() -> None:
    gradients = [[torch.randn(3, 4).double(), torch.randn(5).double()] for _ in range(4)]
    torch.testing.assert_close(root_fisher_gramian(gradients), _reference_root_fisher_gramian(gradients))


def test_signs_do_not_count() -> None:
    gradients = [[torch.randn(6)] for _ in range(3)]
    turned = [[gradient * torch.randn(6).sign() for gradient in row] for row in gradients]
    torch.testing.assert_close(root_fisher_gramian(turned), root_fisher_gramian(gradients))


def test_none_stands_for_zeros() -> None:
    first, second = torch.randn(2, 2), torch.randn(3)
    sparse = root_fisher_gramian([[first, None], [None, second], [first, second], [None, None]])
    zeros = [[first, torch.zeros(3)], [torch.zeros(2, 2), second], [first, second], [torch.zeros(2, 2), torch.zeros(3)]]
    torch.testing.assert_close(sparse, root_fisher_gramian(zeros))


def test_the_linear_closed_form() -> None:
    # The loss c_i <w, x> has the gradient c_i x, so that the entry is |c_i| |c_j| <x, x>.
    weight, x, scales = torch.zeros(2, requires_grad=True), torch.tensor([3.0, 4.0]), (1.0, -2.0, 0.5)
    gradients = [torch.autograd.grad(scale * (weight * x).sum(), [weight]) for scale in scales]
    absolute = torch.tensor(scales).abs()
    torch.testing.assert_close(root_fisher_gramian(gradients), 25.0 * absolute[:, None] * absolute)


def test_takes_the_gradients_of_a_network() -> None:
    encoder, heads = nn.Linear(4, 3), [nn.Linear(3, 1) for _ in range(2)]
    features = encoder(torch.randn(5, 4))
    unused = nn.Linear(2, 2).weight
    gradients = [
        torch.autograd.grad(
            head(features).square().mean(), [*encoder.parameters(), unused], retain_graph=True, allow_unused=True
        )
        for head in heads
    ]
    gramian = root_fisher_gramian(gradients)
    norms = [sum(g.square().sum() for g in row if g is not None) for row in gradients]
    torch.testing.assert_close(gramian.diagonal(), torch.stack([torch.as_tensor(norm) for norm in norms]))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_is_in_single_precision_at_least(dtype: torch.dtype, expected: torch.dtype) -> None:
    gramian = root_fisher_gramian([[torch.full((3000,), 0.1, dtype=dtype)]])
    assert gramian.dtype == expected
    assert gramian.item() == pytest.approx(30.0, rel=1e-2)  # bfloat16 would stop at a fraction of it


def test_without_any_gradient_is_zero() -> None:
    assert torch.equal(root_fisher_gramian([[None], [None]]), torch.zeros(2, 2))


@pytest.mark.parametrize("gradients", [[], [[torch.zeros(1)], []]])
def test_wants_as_many_gradients_for_each_task(gradients: list[list[Tensor | None]]) -> None:
    with pytest.raises(ValueError, match="`gradients` should hold as many gradients for each task"):
        root_fisher_gramian(gradients)
