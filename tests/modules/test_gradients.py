from __future__ import annotations

import torch
from torch import Tensor, nn

from mtl_lightning.modules.gradients import average_gradients, average_tensors


def test_a_gradient_that_a_rank_lacks_counts_as_zero_there_and_one_that_all_lack_stays_none() -> None:
    here, there, both, none = (nn.Parameter(torch.zeros(2)) for _ in range(4))
    here.grad, both.grad = torch.tensor([2.0, 4.0]), torch.tensor([6.0, 8.0])
    #                       which the other rank has, and its gradients
    other = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 10.0, 12.0, 14.0, 16.0, 0.0, 0.0])
    average_gradients([here, there, both, none], lambda flat: (flat + other) / 2)
    found = [parameter.grad.tolist() for parameter in (here, there, both) if parameter.grad is not None]
    assert found == [[1.0, 2.0], [5.0, 6.0], [10.0, 12.0]]
    assert none.grad is None


def test_there_is_one_reduction_per_dtype() -> None:
    dtypes = (torch.float32, torch.float64, torch.float32, torch.float64)
    parameters = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes]
    for value, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, value)
    seen: list[torch.dtype] = []

    def reduce(flat: Tensor) -> Tensor:
        seen.append(flat.dtype)
        return flat

    average_gradients(parameters, reduce)
    assert seen == [torch.float32, torch.float64]
    for value, parameter in enumerate(parameters):
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [value] * 3


def test_tensors_are_averaged_in_one_piece_per_dtype() -> None:
    tensors = [torch.full((2,), 1.0), torch.full((3, 1), 2.0, dtype=torch.float64), torch.full((1, 2), 3.0)]
    sizes: list[int] = []

    def reduce(flat: Tensor) -> Tensor:
        sizes.append(len(flat))
        return flat * 10

    average_tensors(tensors, reduce)
    assert sizes == [4, 3]
    assert [tensor.tolist() for tensor in tensors] == [[10.0, 10.0], [[20.0], [20.0], [20.0]], [[30.0, 30.0]]]


def test_parameters_are_averaged_as_they_are() -> None:
    parameter = nn.Parameter(torch.ones(2))
    average_tensors([parameter], lambda flat: flat * 2)
    assert parameter.tolist() == [2.0, 2.0]
    assert parameter.requires_grad
