"""What a population needs to know of its optimiser: whether it treats every element by itself, and reads parameters.

The subproblems of a population are the rows of one matrix. An optimiser is right for them only if the step of an
element depends on the history of that element alone. Norms over a tensor (LAMB, LARS), factored moments (Adafactor),
matrix functions (Muon, Shampoo) and line searches (LBFGS) couple the rows. Where a step does not read the parameters,
these may be mixed in place before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_WITHOUT_PARAMETERS = frozenset(
    (
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    )
)


def check_elementwise(
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer], device: torch.device | str = "cpu"
) -> None:
    """Raise an error unless the optimiser that the factory makes is element-wise.

    It is tried, not looked up: a few steps on a small matrix must equal those on its rows held as separate tensors.

    Args:
        optimizer: The factory, from parameters to an optimiser.
        device: Where to try it; some options (``capturable``) exist on GPUs only.

    Raises:
        ValueError: If the steps differ, or the optimiser cannot step without a closure.
    """
    generator = torch.Generator().manual_seed(0)
    # In double precision, so that small steps show.
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64).to(device)
    scale = torch.tensor([[1e-2], [1.0], [1e2]], dtype=torch.float64)
    # The scales swap between steps, so that coupled moments show as well as coupled gradients.
    noise = torch.randn(4, 3, 4, generator=generator, dtype=torch.float64)
    gradients = [scale.roll(step, dims=0) * noise[step] for step in range(4)]
    gradients = [gradient.to(device) for gradient in gradients]
    together = _trajectory(optimizer, start, gradients) - start
    # An optimiser for each row: some couple all of their parameters.
    rows = [_trajectory(optimizer, row, [gradient[i] for gradient in gradients]) for i, row in enumerate(start)]
    apart = torch.stack(rows) - start
    if not torch.allclose(together, apart, rtol=1e-5, atol=1e-8 * float(apart.abs().max())):
        raise ValueError(
            "The optimiser of a population should be element-wise, as SGD, Adam and AdamW are: all subproblems are "
            "rows of one matrix. Found one whose step of a row depends on the other rows "
            f"({_name(optimizer)}). Use an element-wise optimiser, or train the subproblems in separate runs."
        )


def ignores_parameters(optimizer: Optimizer) -> bool:
    """Return whether what a step adds to the parameters is known not to depend on them, but on the gradients so far.

    So it is for the element-wise optimisers of torch without weight decay, and without hooks, which may do anything. It
    may change with the hyper-parameters.

    Example:
        >>> import torch
        >>> parameters = [torch.nn.Parameter(torch.zeros(2, 3))]
        >>> ignores_parameters(torch.optim.Adam(parameters)), ignores_parameters(torch.optim.AdamW(parameters))
        (True, False)
    """
    if type(optimizer) not in _WITHOUT_PARAMETERS:
        return False
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    return not any(group.get("weight_decay") for group in optimizer.param_groups)  # Rprop has none


def _trajectory(
    factory: Callable[[Iterable[nn.Parameter]], Optimizer], start: Tensor, gradients: list[Tensor]
) -> Tensor:
    parameter = nn.Parameter(start.clone())
    try:
        optimizer = factory([parameter])
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "The optimiser of a population should step on tensors of any shape, without a closure. Found "
            f"{_name(factory)}, which failed with: {error}"
        ) from error
    return parameter.detach()


def _name(factory: Callable[[Iterable[nn.Parameter]], Optimizer]) -> str:
    try:
        return type(factory([nn.Parameter(torch.zeros(1, 1))])).__name__
    except (TypeError, ValueError, RuntimeError):
        inner = getattr(factory, "func", factory)
        return getattr(inner, "__name__", type(inner).__name__)
