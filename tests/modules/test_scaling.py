from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mtl_lightning.modules.scaling import ScaledSteps, gradient_scale


class _Plugin:
    """Steps as Lightning's precision plugin does: the scaler is updated with every step."""

    def __init__(self, **arguments: Any) -> None:
        self.scaler: Any = torch.amp.GradScaler("cpu", **arguments)
        self.parameter = nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.SGD([self.parameter], lr=1.0)

    def step(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def take(self, steps: ScaledSteps, gradients: list[float | None]) -> list[bool]:
        """Take the steps of one batch; a gradient of ``None`` is one that there is not."""
        taken = []
        for place, gradient in enumerate(gradients):
            self.optimizer.zero_grad()
            if gradient is not None:
                self.scaler.scale(self.parameter * gradient).backward()
            taken.append(steps.take(self, self.optimizer, self.step, is_last=place == len(gradients) - 1))
        return taken


INF = float("inf")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_scale_grows_with_batches_and_not_with_steps(count: int) -> None:
    steps, plugin = ScaledSteps(), _Plugin(init_scale=4.0, growth_interval=3)
    scales = []
    for _ in range(6):
        assert plugin.take(steps, [1.0] * count) == [True] * count
        scales.append(plugin.scaler.get_scale())
    assert scales == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0]
    assert plugin.parameter == -6.0 * count  # at any scale


@pytest.mark.parametrize("gradients", [[INF, 1.0], [1.0, INF], [INF, INF, INF], [1.0, INF, 1.0, INF], [INF, None]])
def test_the_scale_is_lowered_once_whichever_steps_are_skipped(gradients: list[float | None]) -> None:
    steps, plugin = ScaledSteps(), _Plugin(init_scale=4.0, growth_interval=2)
    plugin.take(steps, [1.0, 1.0])
    taken = plugin.take(steps, gradients)
    assert taken == [gradient != INF for gradient in gradients]
    assert plugin.scaler.state_dict()["scale"] == 2.0
    assert plugin.scaler.state_dict()["_growth_tracker"] == 0
    assert plugin.parameter == -2.0 - gradients.count(1.0)
    assert steps.skipped == gradients.count(INF)
    plugin.take(steps, [1.0])
    plugin.take(steps, [1.0])
    assert plugin.scaler.get_scale() == 4.0


@pytest.mark.parametrize("gradients", [[None, 1.0], [1.0, None], [None, 1.0, None]])
def test_a_step_without_any_gradient_is_taken(gradients: list[float | None]) -> None:
    steps, plugin = ScaledSteps(), _Plugin(init_scale=4.0, growth_interval=1)
    assert all(plugin.take(steps, gradients))
    assert plugin.scaler.get_scale() == 8.0
    assert plugin.parameter == -1.0


def test_a_batch_without_any_gradient_leaves_the_scale() -> None:
    steps, plugin = ScaledSteps(), _Plugin(init_scale=4.0, growth_interval=1)
    assert all(plugin.take(steps, [None, None]))
    assert plugin.scaler.get_scale() == 4.0


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", enabled=False)])
def test_without_a_scaler_every_step_is_taken(scaler: Any) -> None:
    steps, plugin = ScaledSteps(), _Plugin()
    plugin.scaler = scaler
    plugin.parameter.grad = torch.tensor(torch.inf)
    assert steps.take(plugin, plugin.optimizer, plugin.optimizer.step, is_last=True)
    assert steps.skipped == 0
    assert gradient_scale(plugin) == 1.0


def test_gradients_are_scaled_until_the_plugin_undoes_it() -> None:
    plugin = _Plugin(init_scale=4.0)
    assert gradient_scale(plugin) == 4.0
    assert gradient_scale(plugin, plugin.optimizer) == 1.0
    assert gradient_scale(plugin, torch.optim.Adam([plugin.parameter], fused=True)) == 4.0
