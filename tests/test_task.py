from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_lightning.losses import CosineNormalLoss, MaskedCrossEntropyLoss, MaskedL1Loss
from mtl_lightning.task import Task, check_tasks


def _loss(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean()


@pytest.mark.parametrize(
    ("loss", "target", "expected"),
    [
        # Class indices: the loss says which index is no label.
        (nn.CrossEntropyLoss(), torch.tensor([3, 1]), True),
        (nn.CrossEntropyLoss(), torch.tensor([-100, 1]), True),
        (nn.CrossEntropyLoss(), torch.tensor([-100, -100]), False),
        (nn.CrossEntropyLoss(), torch.full((2, 4, 4), -100), False),
        (nn.CrossEntropyLoss(ignore_index=255), torch.tensor([-100, 255]), True),
        (nn.CrossEntropyLoss(ignore_index=255), torch.tensor([255, 255]), False),
        (nn.CrossEntropyLoss(ignore_index=255), torch.tensor([255, 255], dtype=torch.uint8), False),
        (nn.CrossEntropyLoss(ignore_index=0), torch.tensor([0, 0]), False),
        (nn.CrossEntropyLoss(), torch.tensor([156, 156], dtype=torch.uint8), True),
        (nn.NLLLoss(ignore_index=-1), torch.tensor([-1, -1]), False),
        # Class probabilities: floats that equal the index are values.
        (nn.CrossEntropyLoss(ignore_index=0), torch.zeros(2, 3), True),
        # Real values: NaN is no label.
        (nn.MSELoss(), torch.tensor([1.0, 2.0]), True),
        (nn.MSELoss(), torch.tensor([float("nan"), 2.0]), True),
        (nn.MSELoss(), torch.tensor([float("nan"), float("nan")]), False),
        (nn.MSELoss(), torch.tensor([float("inf")]), True),
        (nn.MSELoss(), torch.tensor([-100.0, -100.0]), True),
        (nn.MSELoss(), torch.tensor([float("nan")], dtype=torch.float16), False),
        (_loss, torch.tensor([float("nan")]), False),
        # No `ignore_index`: all integers are labels.
        (nn.MSELoss(), torch.tensor([-100, -100]), True),
        (_loss, torch.tensor([0, 0]), True),
        (nn.BCEWithLogitsLoss(), torch.tensor([False, False]), True),
        # An empty batch has no label.
        (nn.MSELoss(), torch.empty(0), False),
        (nn.MSELoss(), torch.empty(0, dtype=torch.long), False),
        (nn.CrossEntropyLoss(), torch.empty(0, dtype=torch.long), False),
        # A scalar is one element.
        (nn.CrossEntropyLoss(), torch.tensor(-100), False),
        (nn.CrossEntropyLoss(), torch.tensor(3), True),
    ],
)
def test_labels_are_found(loss: Any, target: Tensor, expected: bool) -> None:
    found = Task("task", loss).num_labels(target) > 0
    assert (found.dtype, found.shape, found.item()) == (torch.bool, (), expected)


def test_a_task_without_labels_is_one_whose_mean_loss_is_not_finite() -> None:
    loss = nn.CrossEntropyLoss(ignore_index=7)
    for target in (torch.tensor([7, 7]), torch.tensor([7, 1])):
        has_loss = bool(loss(torch.zeros(2, 9), target).isfinite())
        assert bool(Task("task", loss).num_labels(target) > 0) is has_loss


@pytest.mark.parametrize(
    ("loss", "target", "expected"),
    [
        (MaskedL1Loss(ignore_value=0.0), torch.tensor([[1.0, 0.0], [float("nan"), 2.0]]), 2),
        (MaskedL1Loss(ignore_value=255), torch.tensor([255, 3, 0], dtype=torch.uint8), 2),
        (MaskedCrossEntropyLoss(ignore_index=255), torch.tensor([[255, 3, 0]], dtype=torch.uint8), 2),
        (CosineNormalLoss(), torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]]), 1),
        (CosineNormalLoss(), torch.full((2, 3, 4, 4), float("nan")), 0),
    ],
)
def test_the_loss_says_what_it_takes_the_mean_over(loss: Any, target: Tensor, expected: int) -> None:
    found = Task("task", loss).num_labels(target)
    assert (found.dtype, found.shape, found.item()) == (torch.int64, (), expected)


def test_an_attribute_that_is_no_method_is_left_alone() -> None:
    loss = nn.MSELoss()
    loss.valid = torch.ones(3)
    assert Task("task", loss).num_labels(torch.tensor([float("nan"), 1.0])) == 1


@pytest.mark.parametrize("name", ["left", "a-b", "depth_1", "größe", "0"])
def test_names_that_logged_values_can_carry(name: str) -> None:
    assert Task(name, nn.MSELoss()).name == name


@pytest.mark.parametrize("name", ["", "a/b", "/", "a.b", "a b", " ", "a\t", "a\n", None, 3, ["a"]])
def test_names_that_logged_values_cannot_carry(name: Any) -> None:
    with pytest.raises(ValueError, match="A task's `name` should be a non-empty string"):
        Task(name, nn.MSELoss())


def test_the_loss_has_to_be_callable() -> None:
    with pytest.raises(TypeError, match=r"The `loss` of task 'left' should be callable\. Found str"):
        Task("left", "mse")  # type: ignore[arg-type]


def test_a_task_keeps_what_it_was_given() -> None:
    loss = nn.MSELoss()
    task = Task("left", loss)
    assert (task.loss, task.metrics, repr(task)) == (loss, None, "Task('left', MSELoss())")


def _tasks(*names: str) -> list[Task]:
    return [Task(name, nn.MSELoss()) for name in names]


def test_tasks_are_returned_in_their_order() -> None:
    tasks = _tasks("b", "a", "c")
    assert check_tasks(tasks) == tuple(tasks)


def test_one_task_may_be_enough() -> None:
    assert len(check_tasks(_tasks("a"), minimum=1)) == 1


@pytest.mark.parametrize(
    ("tasks", "minimum", "message"),
    [
        ([], 2, "at least 2 tasks. Found 0"),
        (_tasks("a"), 2, "at least 2 tasks. Found 1"),
        (_tasks("a", "b"), 3, "at least 3 tasks. Found 2"),
        (_tasks("a", "b", "a"), 2, "unique. Found 'a' more than once"),
        (_tasks("a", "b", "b", "a"), 2, "unique. Found 'a', 'b' more than once"),
    ],
)
def test_tasks_that_cannot_be_trained_together(tasks: Sequence[Task], minimum: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tasks(tasks, minimum)


@pytest.mark.parametrize("tasks", [["left", "right"], [*_tasks("a"), nn.MSELoss()], "left"])
def test_tasks_of_another_kind(tasks: Any) -> None:
    with pytest.raises(TypeError, match=r"`tasks` should hold `Task` objects\. Found"):
        check_tasks(tasks)
