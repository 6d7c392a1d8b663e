from collections.abc import Callable
from copy import deepcopy
from math import inf, log, nan
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from mtl_lightning.losses import (
    BalancedBCELoss,
    CosineNormalLoss,
    L1NormalLoss,
    MaskedCrossEntropyLoss,
    MaskedL1Loss,
    MaskedMSELoss,
    valid_elements,
    valid_normals,
)
from mtl_lightning.task import Task

Pair = tuple[Tensor, Tensor]


def _classes() -> Pair:
    target = torch.randint(0, 5, (6, 4, 3))
    target[torch.rand(6, 4, 3) < 0.3] = -1
    return torch.randn(6, 5, 4, 3), target


def _values() -> Pair:
    target = torch.randn(6, 2, 4, 3)
    target[torch.rand(6, 2, 4, 3) < 0.2] = nan
    target[torch.rand(6, 2, 4, 3) < 0.2] = 0.0
    return torch.randn(6, 2, 4, 3), target


def _normals() -> Pair:
    target = 0.3 * torch.randn(6, 3, 4, 3)
    missing = torch.rand(6, 1, 4, 3)
    target = target.masked_fill(missing < 0.2, nan).masked_fill(missing > 0.8, 0.0).masked_fill(missing > 0.9, 255.0)
    return torch.randn(6, 3, 4, 3), target


def _edges() -> Pair:
    target = (torch.rand(6, 1, 4, 3) < 0.3).float()
    target[torch.rand(6, 1, 4, 3) < 0.2] = nan
    target[torch.rand(6, 1, 4, 3) < 0.2] = 255.0
    return torch.randn(6, 1, 4, 3), target


# The loss, data with missing labels, and the value of a missing label.
CASES: dict[str, tuple[Any, Callable[[], Pair], float]] = {
    "cross_entropy": (MaskedCrossEntropyLoss(ignore_index=-1), _classes, -1),
    "smoothed_cross_entropy": (MaskedCrossEntropyLoss(ignore_index=-1, label_smoothing=0.2), _classes, -1),
    "weighted_cross_entropy": (MaskedCrossEntropyLoss(ignore_index=-1, weight=[1, 2, 0.5, 1, 3]), _classes, -1),
    "l1": (MaskedL1Loss(ignore_value=0.0), _values, 0.0),
    "l1_nan": (MaskedL1Loss(), _values, nan),
    "mse": (MaskedMSELoss(ignore_value=0.0), _values, 0.0),
    "cosine": (CosineNormalLoss(ignore_value=255), _normals, 255),
    "cosine_zero": (CosineNormalLoss(ignore_value=255), _normals, 0.0),
    "l1_normal": (L1NormalLoss(ignore_value=255), _normals, nan),
    "bce": (BalancedBCELoss(ignore_value=255), _edges, 255),
    "balanced_bce": (BalancedBCELoss(positive_weight=None, ignore_value=255), _edges, 255),
}
MEANS = sorted(set(CASES) - {"weighted_cross_entropy", "balanced_bce"})


def _per_element(name: str, preds: Tensor, target: Tensor) -> Tensor:
    """Values of the valid elements, selected by index and computed in float64."""
    preds, target = preds.double(), target if name.endswith("entropy") else target.double()
    if name.endswith("entropy"):
        keep = target != -1
        smoothing = 0.2 if name.startswith("smoothed") else 0.0
        logits = preds.movedim(1, -1)[keep]
        goal = F.one_hot(target[keep], 5) * (1 - smoothing) + smoothing / 5
        return -(goal * logits.log_softmax(dim=-1)).sum(dim=-1)
    if "cosine" in name or name == "l1_normal":
        preds, target = preds.movedim(1, -1), target.movedim(1, -1)
        keep = ~target.isnan().any(-1) & ~(target == 0).all(-1) & ~(target == 255).all(-1)
        preds, target = preds[keep], target[keep]
        preds, target = preds / preds.norm(dim=-1, keepdim=True), target / target.norm(dim=-1, keepdim=True)
        return 1 - (preds * target).sum(-1) if "cosine" in name else (preds - target).abs().sum(-1)
    ignored = {"l1": 0.0, "mse": 0.0, "bce": 255.0}.get(name, nan)
    keep = ~target.isnan() & (target != ignored)
    preds, target = preds[keep], target[keep]
    if name == "bce":
        probability = preds.sigmoid()
        return -0.95 * target * probability.log() - 0.05 * (1 - target) * (1 - probability).log()
    return (preds - target).abs() if name.startswith("l1") else (preds - target) ** 2


@pytest.mark.parametrize("name", MEANS)
def test_it_is_the_mean_over_the_valid_elements(name: str) -> None:
    loss, data, _ = CASES[name]
    preds, target = data()
    torch.testing.assert_close(
        loss(preds, target), _per_element(name, preds, target).mean().float(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", MEANS)
def test_the_number_of_valid_elements_is_the_denominator(name: str) -> None:
    loss, data, _ = CASES[name]
    preds, target = data()
    assert loss.valid(target).dtype is torch.bool
    assert loss.valid(target).sum() == len(_per_element(name, preds, target))


@pytest.mark.parametrize("name", MEANS)
def test_means_of_batches_weighted_by_their_labels_are_the_mean_of_the_whole(name: str) -> None:
    loss, data, _ = CASES[name]
    task = Task("task", loss)
    preds, target = data()
    total, count = torch.zeros(()), torch.zeros(())
    for part in (slice(0, 1), slice(1, 2), slice(2, 6)):
        labels = task.num_labels(target[part])
        total, count = total + labels * loss(preds[part], target[part]), count + labels
    torch.testing.assert_close(total / count, loss(preds, target))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("junk", [0.0, nan, inf, -inf])
def test_without_valid_elements_value_and_gradients_are_zero(name: str, junk: float) -> None:
    loss, data, missing = CASES[name]
    preds, target = data()
    preds = torch.full_like(preds, junk).requires_grad_()
    value = loss(preds, torch.full_like(target, missing))
    value.backward()
    assert value == 0.0
    assert preds.grad is not None
    assert torch.equal(preds.grad, torch.zeros_like(preds))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("junk", [nan, inf, -inf])
def test_what_missing_elements_hold_changes_nothing(name: str, junk: float) -> None:
    loss, data, _ = CASES[name]
    preds, target = data()
    valid = loss.valid(target)
    valid = (valid if valid.ndim == preds.ndim else valid.unsqueeze(1)).expand_as(preds)
    clean = torch.where(valid, preds, 0.0).requires_grad_()
    dirty = torch.where(valid, preds, junk).requires_grad_()
    values = [loss(clean, target), loss(dirty, target)]
    gradients = [torch.autograd.grad(value, leaf)[0] for value, leaf in zip(values, (clean, dirty), strict=True)]
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert gradients[0][valid].abs().sum() > 0
    assert gradients[0][~valid].abs().sum() == 0


@pytest.mark.parametrize("loss", [CosineNormalLoss(), L1NormalLoss(), MaskedL1Loss()])
def test_one_component_that_is_nan_makes_no_gradient_nan(loss: nn.Module) -> None:
    preds = torch.randn(2, 3, 4, requires_grad=True)
    target = torch.randn(2, 3, 4)
    target[0, 1, 2] = nan
    loss(preds, target).backward()
    assert preds.grad is not None
    assert preds.grad.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_with_differences(name: str) -> None:
    loss, data, _ = CASES[name]
    preds, target = data()
    preds = preds.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda leaf: loss(leaf, target), (preds,))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    loss, data, _ = CASES[name]
    preds, target = data()
    preds = preds.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(preds, target)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value, loss(preds.float(), target))


def test_sums_do_not_overflow_in_half_precision() -> None:
    preds = torch.full((1000,), 300.0, dtype=torch.float16)
    assert MaskedMSELoss()(preds, torch.zeros(1000, dtype=torch.float16)) == 90_000.0


@pytest.mark.parametrize("name", CASES)
def test_vmap_over_models_equals_a_loop(name: str) -> None:
    loss, data, _ = CASES[name]
    _, target = data()
    preds = torch.randn(3, *data()[0].shape)
    stacked = torch.vmap(loss, in_dims=(0, None))(preds, target)
    torch.testing.assert_close(stacked, torch.stack([loss(one, target) for one in preds]))


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_values(name: str) -> None:
    loss, data, _ = CASES[name]
    preds, target = (tensor.to("meta") for tensor in data())  # without values, reading one is an error
    assert deepcopy(loss).to("meta")(preds, target).shape == ()


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_cross_entropy_equals_that_of_torch(weight: Tensor | None, label_smoothing: float) -> None:
    preds, target = _classes()
    settings: dict[str, Any] = {"ignore_index": -1, "weight": weight, "label_smoothing": label_smoothing}
    expected = nn.CrossEntropyLoss(**settings)(preds, target)
    torch.testing.assert_close(MaskedCrossEntropyLoss(**settings)(preds, target), expected)


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 1.0, 3.0]])
def test_deterministic_cross_entropy_is_the_same(weight: list[float] | None) -> None:
    loss = MaskedCrossEntropyLoss(ignore_index=-1, weight=weight)
    preds, target = _classes()
    expected = loss(preds, target)
    torch.use_deterministic_algorithms(True)
    try:
        found = loss(preds, target)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_cross_entropy_takes_any_integers(dtype: torch.dtype) -> None:
    target = torch.tensor([0, 2, 100, 1], dtype=dtype)
    preds = torch.randn(4, 3)
    expected = F.cross_entropy(preds[[0, 1, 3]], torch.tensor([0, 2, 1]))
    torch.testing.assert_close(MaskedCrossEntropyLoss(ignore_index=100)(preds, target), expected)


def test_a_negative_index_does_not_wrap_around_in_unsigned_targets() -> None:
    target = torch.tensor([255, 156], dtype=torch.uint8)
    assert MaskedCrossEntropyLoss(ignore_index=-1).valid(target).all()
    assert MaskedCrossEntropyLoss(ignore_index=-100).valid(target).all()


@pytest.mark.parametrize("index", [-100, 5])
def test_an_index_that_is_no_class_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        MaskedCrossEntropyLoss(ignore_index=-1)(torch.randn(2, 5), torch.tensor([0, index]))


def test_class_weights_divide_by_their_sum() -> None:
    loss = MaskedCrossEntropyLoss(weight=[1.0, 3.0])
    preds = torch.tensor([[0.0, 0.0], [log(3), 0.0]])
    expected = (1 * log(2) + 3 * log(4)) / (1 + 3)
    assert loss(preds, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_class_weights_move_and_convert_with_the_module() -> None:
    loss = MaskedCrossEntropyLoss(weight=[1.0, 2.0])
    assert loss.to(torch.float16).weight is not None
    assert loss(torch.randn(3, 2, dtype=torch.float16), torch.tensor([0, 1, 1])).dtype is torch.float32


def test_the_weight_given_stays_the_callers() -> None:
    weight = torch.ones(2)
    loss = MaskedCrossEntropyLoss(weight=weight)
    weight.zero_()
    assert loss.weight is not None
    assert loss.weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("angle", "cosine", "absolute"),
    [(0.0, 0.0, 0.0), (90.0, 1.0, 2.0), (180.0, 2.0, 2.0), (60.0, 0.5, 0.5 + 0.75**0.5)],
)
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e4])
def test_normal_losses_in_closed_form(angle: float, cosine: float, absolute: float, length: float) -> None:
    turned = torch.tensor(angle).deg2rad()
    preds = length * torch.stack([turned.cos(), turned.sin(), torch.zeros(())]).reshape(1, 3, 1)
    target = torch.tensor([0.5, 0.0, 0.0]).reshape(1, 3, 1)  # shortened, as by resizing
    assert CosineNormalLoss()(preds, target).item() == pytest.approx(cosine, abs=1e-5)
    assert L1NormalLoss()(preds, target).item() == pytest.approx(absolute, abs=1e-5)


@pytest.mark.parametrize("loss", [CosineNormalLoss(), L1NormalLoss()])
def test_the_prediction_zero_has_value_one_and_a_finite_gradient(loss: nn.Module) -> None:
    preds = torch.zeros(1, 3, 2, requires_grad=True)
    value = loss(preds, torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]))
    value.backward()
    assert value == 1.0
    assert preds.grad is not None
    assert preds.grad.isfinite().all()


def test_a_normal_whose_components_cancel_is_a_label() -> None:
    target = torch.tensor([[0.6, -0.6, 0.0], [0.0, 0.0, 0.0], [nan, 0.0, 1.0]])
    assert valid_normals(target).tolist() == [True, False, False]


def test_a_normal_is_ignored_by_all_of_its_components() -> None:
    target = torch.tensor([[0.0, 0.0, -1.0], [-1.0, -1.0, -1.0]])
    assert valid_normals(target, ignore_value=-1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("ignore_value", [255, 0])
def test_elements_are_ignored_in_any_dtype(dtype: torch.dtype, ignore_value: float) -> None:
    target = torch.tensor([255, 0, 1], dtype=dtype)
    assert valid_elements(target, ignore_value).tolist() == [ignore_value != 255, ignore_value != 0, True]


def test_a_negative_value_does_not_wrap_around_in_unsigned_targets() -> None:
    assert valid_elements(torch.tensor([255], dtype=torch.uint8), ignore_value=-1).all()


def test_balanced_bce_at_one_half_is_half_the_plain_one() -> None:
    preds, target = torch.randn(20), torch.rand(20)
    expected = 0.5 * F.binary_cross_entropy_with_logits(preds, target)
    torch.testing.assert_close(BalancedBCELoss(positive_weight=0.5)(preds, target), expected)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_balanced_bce_stays_finite_at_large_logits(logit: float) -> None:
    value = BalancedBCELoss(positive_weight=0.95)(torch.tensor([logit]), torch.tensor([1.0]))
    assert value.item() == pytest.approx(0.95e4 if logit < 0 else 0.0)


def test_the_weight_of_positives_may_be_the_share_of_negatives() -> None:
    preds, target = torch.randn(50), (torch.rand(50) < 0.2).float()
    share = 1 - target.mean().item()
    fixed = BalancedBCELoss(positive_weight=share)(preds, target)
    target = torch.cat([target, torch.tensor([nan] * 30)])
    balanced = BalancedBCELoss(positive_weight=None)(torch.cat([preds, torch.zeros(30)]), target)
    torch.testing.assert_close(balanced, fixed)


def test_labels_may_be_bools_or_bytes() -> None:
    preds, target = torch.randn(9), torch.rand(9) < 0.5
    loss = BalancedBCELoss(ignore_value=255)
    assert loss(preds, target) == loss(preds, target.to(torch.uint8)) == loss(preds, target.float())


@pytest.mark.parametrize(
    "loss", [MaskedL1Loss(), MaskedMSELoss(), CosineNormalLoss(), L1NormalLoss(), BalancedBCELoss()]
)
@pytest.mark.parametrize("shapes", [((2, 1, 4, 4), (2, 4, 4)), ((2, 3, 4, 4), (2, 3, 2, 2)), ((2, 3), (2, 1))])
def test_other_shapes_are_refused(loss: nn.Module, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="should have the same shape"):
        loss(*map(torch.ones, shapes))


@pytest.mark.parametrize("shapes", [((2, 5, 4), (2, 5, 4)), ((2, 5, 4, 4), (2, 4)), ((2, 5, 4), (2, 3)), ((5,), (5,))])
def test_other_shapes_of_classes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"`preds` should have shape \(B, C, \.\.\.\)"):
        MaskedCrossEntropyLoss()(torch.ones(shapes[0]), torch.ones(shapes[1], dtype=torch.long))


def test_classes_as_floats_are_refused() -> None:
    with pytest.raises(TypeError, match=r"an integer tensor\. Found torch\.float32"):
        MaskedCrossEntropyLoss()(torch.ones(2, 5), torch.ones(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedL1Loss(ignore_value=nan), "`ignore_value` should be a number or None"),
        (lambda: BalancedBCELoss(positive_weight=1.0), "`positive_weight` should be between 0 and 1"),
        (lambda: BalancedBCELoss(positive_weight=0.0), "`positive_weight` should be between 0 and 1"),
        (lambda: MaskedCrossEntropyLoss(label_smoothing=1.5), "`label_smoothing` should be from 0 to 1"),
    ],
)
def test_unusable_settings_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class _Regression(LightningModule):
    """A map per task from one linear layer, in which every other batch has no label."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 1)
        self.losses = nn.ModuleList([MaskedL1Loss(), CosineNormalLoss(), BalancedBCELoss()])
        self.values: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        maps = self.layer(batch)
        target = torch.full_like(maps, nan) if batch_idx % 2 else torch.ones_like(maps)
        parts = [slice(0, 1), slice(1, 4), slice(4, 5)]
        losses = [loss(maps[:, part], target[:, part]) for loss, part in zip(self.losses, parts, strict=True)]
        total = torch.stack(losses).sum()
        self.values.append(total.item())
        return total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_survives_batches_without_labels(precision: Any) -> None:
    module = _Regression()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.rand(8, 3, 4, 4), batch_size=2))  # type: ignore[arg-type]
    assert module.values[1::2] == [0.0] * 6
    assert module.values[-2] < module.values[0]
