from __future__ import annotations

import warnings

import pytest
import torch

from mtl_lightning.modules.health import TaskHealth

NAN = torch.nan


def observe(health: TaskHealth, *batches: list[float], tasks: tuple[int, ...] = (0, 1)) -> None:
    for losses in batches:
        health.observe(tasks, torch.tensor(losses))
        health.finish_batch()


def test_failures_are_counted_in_a_row_and_in_all() -> None:
    health = TaskHealth(["a", "b"], max_nonfinite=10)
    with pytest.warns(UserWarning, match="'a' is not finite"):
        observe(health, [NAN, 1.0], [NAN, 1.0], [1.0, 1.0], [torch.inf, 1.0])
    assert health.in_a_row.tolist() == [1, 0]
    assert health.total.tolist() == [3, 0]


def test_tasks_that_are_not_observed_keep_their_count() -> None:
    health = TaskHealth(["a", "b"], max_nonfinite=10)
    with pytest.warns(UserWarning, match="not finite"):
        observe(health, [NAN, NAN], [1.0, NAN], tasks=(1,))
    observe(health, [1.0, 1.0], tasks=(0,))
    assert health.in_a_row.tolist() == [0, 2]


def test_what_is_counted_is_reported_one_batch_later() -> None:
    health = TaskHealth(["a", "b"], max_nonfinite=1)
    observe(health, [1.0, NAN])
    with pytest.raises(FloatingPointError, match=r"task 'b' should be finite. Found 1 in a row"):
        observe(health, [1.0, 1.0])


def test_messages_name_what_is_observed() -> None:
    health = TaskHealth(["a", "b"], max_nonfinite=2, observed="loss or gradient")
    with pytest.warns(UserWarning, match="The loss or gradient of task 'b' is not finite"):
        observe(health, [1.0, NAN], [1.0, NAN])
    with pytest.raises(FloatingPointError, match="The loss or gradient of task 'b' should be finite"):
        health.report()


def test_nothing_is_overlooked_at_the_end() -> None:
    health = TaskHealth(["a", "b"], max_nonfinite=2)
    with pytest.warns(UserWarning, match="'b' is not finite"):
        observe(health, [1.0, NAN], [1.0, NAN])
    with pytest.raises(FloatingPointError, match="Found 2 in a row"):
        health.report()


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_losses_that_are_not_positive_are_reported_once(value: float) -> None:
    health = TaskHealth(["a", "b"], max_nonfinite=2)
    with pytest.warns(UserWarning, match="'a' is zero or negative"):
        observe(health, [value, 1.0], [value, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(health, [value, 1.0])


def test_the_counts_are_state() -> None:
    health, other = (TaskHealth(["a", "b"], max_nonfinite=3) for _ in range(2))
    with pytest.warns(UserWarning, match="not finite"):
        observe(health, [1.0, NAN], [1.0, NAN])
    other.load_state_dict(health.state_dict())
    observe(other, [1.0, NAN])
    with pytest.raises(FloatingPointError, match="Found 3 in a row"):
        other.report()
