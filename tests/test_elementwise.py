import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from mtl_lightning.elementwise import check_elementwise, ignores_parameters


class _Plain(Optimizer):
    """Gradient descent, with a hook for what couples elements."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            scale = self.scale(parameter, parameters)
            parameter.add_(parameter.grad * scale, alpha=-self.param_groups[0]["lr"])

    def scale(self, parameter: nn.Parameter, parameters: list[nn.Parameter]) -> torch.Tensor:
        return torch.ones(())


class TrustRatio(_Plain):
    """The layer-wise learning rate of LARS."""

    def scale(self, parameter: nn.Parameter, parameters: list[nn.Parameter]) -> torch.Tensor:
        assert parameter.grad is not None
        return parameter.norm() / parameter.grad.norm()


class GlobalNorm(_Plain):
    """One norm over all parameters, as in optimisers that clip by themselves or that estimate their step size."""

    def scale(self, parameter: nn.Parameter, parameters: list[nn.Parameter]) -> torch.Tensor:
        return 1 / torch.stack([other.grad.norm() for other in parameters if other.grad is not None]).norm()


class LateCoupling(_Plain):
    """Couples elements through the moments only: the gradients of the first step do not show it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            moment = self.state[parameter].setdefault("moment", torch.ones(()))
            parameter.add_(parameter.grad / moment, alpha=-self.param_groups[0]["lr"])
            self.state[parameter]["moment"] = 0.5 * moment + parameter.grad.norm()


def _optim(name: str, **options: Any) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    return partial(getattr(torch.optim, name), **options)


ELEMENTWISE = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-2}),
    ("SGD", {"lr": 1e-6}),
    ("SGD", {"lr": 0.1, "foreach": True}),
    ("SGD", {"lr": 0.1, "fused": True}),
    ("Adam", {}),
    ("Adam", {"lr": 1.0, "weight_decay": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"foreach": True}),
    ("Adam", {"fused": True}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 2e-5}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Adagrad", {}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("Adamax", {}),
    ("Adadelta", {}),
    ("ASGD", {}),
    ("Rprop", {}),
]


@pytest.mark.parametrize(("name", "options"), ELEMENTWISE)
def test_an_element_wise_optimizer_is_accepted(name: str, options: dict[str, Any]) -> None:
    check_elementwise(_optim(name, **options))


def test_a_class_without_options_is_accepted() -> None:
    check_elementwise(torch.optim.Adam)


COUPLED: list[Any] = [
    pytest.param(TrustRatio, id="TrustRatio"),
    pytest.param(partial(TrustRatio, lr=1e-6), id="TrustRatio-small-steps"),
    pytest.param(LateCoupling, id="LateCoupling"),
    pytest.param(partial(LateCoupling, lr=1e-6), id="LateCoupling-small-steps"),
    pytest.param(GlobalNorm, id="GlobalNorm"),
]
COUPLED += [
    pytest.param(_optim(name, **options), id=f"{name}-{index}")
    for index, (name, options) in enumerate(
        [("LBFGS", {}), ("Adafactor", {}), ("Adafactor", {"lr": 1e-6}), ("Muon", {}), ("SparseAdam", {})]
    )
    if hasattr(torch.optim, name)
]


@pytest.mark.parametrize("optimizer", COUPLED)
def test_an_optimizer_that_couples_rows_is_refused(optimizer: Any) -> None:
    with pytest.raises(ValueError, match="The optimiser of a population should"):
        check_elementwise(optimizer)


@pytest.mark.parametrize("optimizer", [TrustRatio, partial(TrustRatio, lr=0.1), lambda params: TrustRatio(params)])
def test_the_message_names_the_optimizer(optimizer: Any) -> None:
    with pytest.raises(ValueError, match="TrustRatio"):
        check_elementwise(optimizer)


def test_the_message_names_an_optimizer_that_cannot_step() -> None:
    with pytest.raises(ValueError, match="Found LBFGS, which failed with: "):
        check_elementwise(torch.optim.LBFGS)


def test_a_factory_that_fails_is_reported_with_its_reason() -> None:
    with pytest.raises(ValueError, match="Found SGD, which failed with: Invalid learning rate"):
        check_elementwise(partial(torch.optim.SGD, lr=-1.0))


def test_the_check_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    check_elementwise(torch.optim.Adam)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_check_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        check_elementwise(torch.optim.Adam)


def test_every_optimizer_of_torch_is_decided_upon() -> None:
    """A new optimiser of torch has to enter one of the lists above."""
    known = {name for name, _ in ELEMENTWISE} | {"LBFGS", "Adafactor", "Muon", "SparseAdam", "Optimizer"}
    classes = {name for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    assert classes <= known


def _increments(make: Callable[[Iterable[nn.Parameter]], Optimizer], start: torch.Tensor) -> torch.Tensor:
    """Return what each of some steps adds to parameters that are put back to ``start`` before it."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(start.clone())
    optimizer, added = make([parameter]), []
    for _ in range(5):
        parameter.data.copy_(start)
        parameter.grad = torch.randn(start.shape, generator=generator, dtype=start.dtype)
        optimizer.step()
        added.append(parameter.detach() - start)
    return torch.stack(added)


@pytest.mark.parametrize(
    "make",
    [
        _optim("SGD", lr=0.1),
        _optim("SGD", lr=0.1, momentum=0.9, nesterov=True),
        _optim("SGD", lr=0.1, maximize=True),
        _optim("Adam", lr=0.1),
        _optim("Adam", lr=0.1, amsgrad=True),
        _optim("Adam", lr=0.1, fused=True),
        _optim("AdamW", lr=0.1, weight_decay=0.0),
        _optim("Adamax", lr=0.1),
        _optim("NAdam", lr=0.1),
        _optim("RAdam", lr=0.1),
        _optim("RMSprop", lr=0.1, momentum=0.5, centered=True),
        _optim("Rprop", lr=0.1),
        _optim("Adagrad", lr=0.1, lr_decay=0.1),
        _optim("Adadelta", lr=0.1),
    ],
    ids=lambda make: f"{make.func.__name__}({', '.join(make.keywords)})",
)
def test_what_an_optimiser_adds_does_not_depend_on_the_parameters(
    make: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> None:
    assert ignores_parameters(make([nn.Parameter(torch.zeros(1))]))
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    torch.testing.assert_close(_increments(make, zeros), _increments(make, torch.randn_like(zeros)))


@pytest.mark.parametrize(
    "make",
    [_optim("AdamW", lr=0.1), _optim("SGD", lr=0.1, weight_decay=0.1), _optim("ASGD", lr=0.1), _Plain, TrustRatio],
)
def test_of_others_it_is_not_said(make: Callable[[Iterable[nn.Parameter]], Optimizer]) -> None:
    assert not ignores_parameters(make([nn.Parameter(torch.zeros(1))]))


def test_weight_decay_that_comes_later_is_seen() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert ignores_parameters(optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    assert not ignores_parameters(optimizer)


@pytest.mark.parametrize("hook", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_may_do_anything(hook: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    handle = getattr(optimizer, hook)(lambda *_: None)
    assert not ignores_parameters(optimizer)
    handle.remove()
    assert ignores_parameters(optimizer)
