from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mtl_lightning.affinity import Attribution, ProximalAffinity

NAN, INF = math.nan, math.inf

attributions = pytest.mark.parametrize("attribution", get_args(Attribution))


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _close(found: Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, _float64(expected), rtol=0.0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# References, in plain Python.


@dataclass
class _Reference:
    """Average and counts; the table of increments is in ``_reference_update``."""

    num_tasks: int
    decay: float
    average: list[list[float]] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.average = [[0.0] * self.num_tasks for _ in range(self.num_tasks)]
        self.counts = [[0] * self.num_tasks for _ in range(self.num_tasks)]

    def matrix(self, bias_correction: bool) -> list[list[float]]:
        tasks = range(self.num_tasks)
        if not bias_correction:
            return self.average
        return [
            [
                self.average[s][k] / (1.0 - (1.0 - self.decay) ** self.counts[s][k]) if self.counts[s][k] else 0.0
                for k in tasks
            ]
            for s in tasks
        ]


def _reference_update(
    state: _Reference, group: Sequence[int], before: Sequence[float], after: Sequence[float], published: bool = False
) -> None:
    def counts(task: int) -> bool:
        return all(math.isfinite(losses[task]) and losses[task] > 0.0 for losses in (before, after))

    def gain(task: int) -> float:
        return (1.0 - after[task] / before[task]) / len(group)

    for source in group:
        for target in range(state.num_tasks):
            if not counts(target):
                continue
            if target in group:
                if not counts(source):
                    continue
                if target == source:
                    if gain(source) < 0.0:
                        continue
                    increment = gain(source)
                elif gain(source) * gain(target) >= 0.0:
                    increment = gain(target)
                else:
                    increment = -max(gain(source), gain(target))
            else:
                if not published and not counts(source):
                    continue
                increment = gain(target)
            old = state.average[source][target]
            state.average[source][target] = (1.0 - state.decay) * old + state.decay * increment
            state.counts[source][target] += 1


@dataclass
class _Official:
    """``form_task_affinity`` of the official code, without its tensors.

    https://github.com/wooseong97/sel-update-mtl/blob/53a8ba2342e052c34781cd359b81cc7abad8a97e/sel-update-mtl/utils/train_utils.py#L203-L247
    """

    num_tasks: int
    decay: float

    def __post_init__(self) -> None:
        self.average = [[0.0] * self.num_tasks for _ in range(self.num_tasks)]
        self.previous = [-1.0] * self.num_tasks

    def update(self, group: Sequence[int], losses: list[float]) -> None:
        for s in group:
            for t in range(self.num_tasks):
                if self.previous[t] <= 0:
                    continue
                gain_t = (1 - losses[t] / self.previous[t]) / len(group)
                if t in group:
                    if self.previous[s] <= 0:
                        continue
                    gain_s = (1 - losses[s] / self.previous[s]) / len(group)
                    if t == s:
                        if gain_t >= 0:
                            self._average(gain_t, s, t)
                    elif gain_t * gain_s >= 0:
                        self._average(gain_t, s, t)
                    else:
                        self._average(-max(gain_t, gain_s), s, t)
                else:
                    self._average(gain_t, s, t)
        self.previous = losses

    def _average(self, gain: float, s: int, t: int) -> None:
        self.average[s][t] = (1 - self.decay) * self.average[s][t] + self.decay * gain

    def batch(
        self,
        order: Sequence[Sequence[int]],
        losses_at: Callable[[], list[float]],
        step: Callable[[Sequence[int]], None],
    ) -> None:
        """Follow one batch of the loop, lines 127 to 151: losses, step, then an update with the losses before it."""
        self.previous = [-1.0] * self.num_tasks
        for group in [*order, *order] if len(order) == 1 else order:
            losses = losses_at()
            step(group)
            self.update(group, losses)


@dataclass
class _Toy:
    """``L_k = (c_k s + a_k - y_k)^2 / 2`` with a shared scalar ``s`` and heads ``a_k``, under SGD."""

    s: float = 0.0
    a: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    labelled: tuple[bool, ...] = (True, True, True)
    c: tuple[float, ...] = (1.0, 2.0, -2.0)
    y: tuple[float, ...] = (1.0, 1.0, 2.0)
    lr: float = 0.1

    def _residuals(self) -> list[float]:
        terms = zip(self.c, self.a, self.y, self.labelled, strict=True)
        return [c * self.s + a - y if labelled else 0.0 for c, a, y, labelled in terms]

    def losses(self) -> list[float]:
        return [0.5 * residual**2 for residual in self._residuals()]

    def step(self, group: Sequence[int]) -> None:
        residuals = self._residuals()
        self.s -= self.lr * sum(self.c[k] * residuals[k] for k in group)
        for k in group:
            self.a[k] -= self.lr * residuals[k]


def _train(
    affinity: ProximalAffinity,
    order: Sequence[Sequence[int]],
    losses_at: Callable[[], list[float]],
    step: Callable[[Sequence[int]], None],
    measure_last: bool = False,
) -> None:
    """One batch of the loop that the library prescribes; the calls do not depend on the attribution."""
    order = [*order, *order] if len(order) == 1 else order
    before = None
    for position, group in enumerate(order):
        losses = _float64(losses_at())
        if before is not None:
            affinity.update(order[position - 1], before, losses, next_group=group)
        before = losses
        step(group)
    if measure_last and before is not None:
        affinity.update(order[-1], before, _float64(losses_at()))


def _random_losses(rng: random.Random, num_tasks: int) -> list[float]:
    odd = [NAN, 0.0, -0.0, -1.0, INF, -INF]
    return [rng.choice(odd) if rng.random() < 0.1 else 10.0 ** rng.uniform(-3.0, 3.0) for _ in range(num_tasks)]


def _random_partition(rng: random.Random, num_tasks: int) -> list[list[int]]:
    labels = [rng.randrange(num_tasks) for _ in range(num_tasks)]
    groups = [[k for k in range(num_tasks) if labels[k] == label] for label in set(labels)]
    rng.shuffle(groups)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms. Tasks count from zero.

FIRST_STEPS = {  # the losses after it, and the affinity B
    (0,): ([0.32, 0.32, 2.42], [0.36, 0.36, -0.21]),
    (1,): ([0.32, 0.125, 2.88], [0.36, 0.75, -0.44]),
    (2,): ([0.98, 1.62, 0.5], [-0.96, -2.24, 0.75]),
    (0, 1): ([0.18, 0.045, 3.38], [0.64, 0.91, -0.69]),
    (0, 2): ([0.72, 1.28, 0.72], [-0.44, -1.56, 0.64]),
    (1, 2): ([0.72, 0.845, 0.98], [-0.44, -0.69, 0.51]),
    (0, 1, 2): ([0.5, 0.605, 1.28], [0.0, -0.21, 0.36]),
}
INCREMENTS: dict[tuple[int, ...], list[list[float | None]]] = {  # rows of the group; None is no update
    (0, 1): [[0.32, 0.455, -0.345], [0.32, 0.455, -0.345]],
    (0, 2): [[None, -0.78, -0.32], [-0.32, -0.78, 0.32]],
    (1, 2): [[-0.22, None, -0.255], [-0.22, -0.255, 0.255]],
    (0, 1, 2): [[0.0, -0.07, 0.12], [0.0, None, -0.12], [0.0, -0.12, 0.12]],
}
FROM = [0.5, 0.5, 2.0]


@pytest.mark.parametrize("group", FIRST_STEPS)
def test_a_first_step_has_the_closed_form(group: tuple[int, ...]) -> None:
    toy = _Toy()
    affinity = ProximalAffinity(3)
    before = _float64(toy.losses())
    toy.step(group)
    affinity.update(group, before, _float64(toy.losses()))
    losses, gains = FIRST_STEPS[group]
    _close(_float64(toy.losses()), losses)
    outside = [k for k in range(3) if k not in group]
    for source in group:  # what is not subject to the rules inside a group
        _close(affinity.matrix[source, outside] * len(group), [gains[k] for k in outside])
    if len(group) == 1:
        _close(affinity.matrix[group[0]], gains)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("group", INCREMENTS)
def test_increments_inside_a_group_have_the_closed_form(group: tuple[int, ...], bias_correction: bool) -> None:
    affinity = ProximalAffinity(3, decay=1e-3, bias_correction=bias_correction)
    affinity.update(group, _float64(FROM), _float64(FIRST_STEPS[group][0]))
    expected = [[0.0] * 3 for _ in range(3)]
    counts = [[0] * 3 for _ in range(3)]
    for source, row in zip(group, INCREMENTS[group], strict=True):
        expected[source] = [(value or 0.0) * (1.0 if bias_correction else 1e-3) for value in row]
        counts[source] = [int(value is not None) for value in row]
    _close(affinity.matrix, expected)
    assert affinity.counts.tolist() == counts


def test_single_tasks_give_the_matrix_of_affinities() -> None:
    affinity = ProximalAffinity(3)
    for task in range(3):
        affinity.update([task], _float64(FROM), _float64(FIRST_STEPS[(task,)][0]))
    _close(affinity.matrix, [FIRST_STEPS[(task,)][1] for task in range(3)])


@pytest.mark.parametrize(
    ("order", "gains"),
    [
        (([0], [1], [2]), [[0.36, 0.36, -0.21], [0.36, 0.75, -0.312066116], [-2.19515625, -11.3904, 0.75]]),
        (([0, 1], [2]), [None, None, [-2.484444444, -18.951111111, 0.75]]),
        (([2], [0, 1]), [[0.705306122 / 2, 0.881358025 / 2, -1.5]] * 2 + [[-0.96, -2.24, 0.75]]),
        (([0, 2], [1]), [None, [0.462222222, 0.75, -1.351111111], None]),
    ],
)
def test_a_batch_of_steps_has_the_closed_form(order: list[list[int]], gains: list[list[float] | None]) -> None:
    toy = _Toy()
    affinity = ProximalAffinity(3, decay=1.0)
    _train(affinity, order, toy.losses, toy.step, measure_last=True)
    for source, row in enumerate(gains):
        if row is not None:
            _close(affinity.matrix[source], row)


def test_without_a_measurement_after_it_the_last_step_leaves_no_trace() -> None:
    toy = _Toy()
    affinity = ProximalAffinity(3, decay=1.0)
    _train(affinity, [[0], [1], [2]], toy.losses, toy.step)
    _close(affinity.matrix, [[0.36, 0.36, -0.21], [0.36, 0.75, -0.312066116], [0.0, 0.0, 0.0]])


ADAM_FIRST_STEPS = {
    (0,): [0.36, 0.36, -0.21],
    (1,): [0.19, 0.51, -0.21],
    (2,): [-0.21, -0.44, 0.2775],
    (0, 1): [0.36, 0.51, -0.21],
    (0, 2): [0.0, -0.44, 0.2775],
}


@pytest.mark.parametrize("group", ADAM_FIRST_STEPS)
def test_a_first_step_of_adam_has_the_closed_form(group: tuple[int, ...]) -> None:
    c, y = _float64([1.0, 2.0, -2.0]), _float64([1.0, 1.0, 2.0])
    s, a = _float64(0.0).requires_grad_(), [_float64(0.0).requires_grad_() for _ in range(3)]
    adam = torch.optim.Adam([s, *a], lr=0.1)

    def losses() -> Tensor:
        return 0.5 * (c * s + torch.stack(a) - y).square()

    affinity = ProximalAffinity(3, decay=1.0)
    before = losses()
    before[list(group)].sum().backward()  # type: ignore[no-untyped-call]
    adam.step()
    after = losses()
    affinity.update(group, before, after)
    gains = ADAM_FIRST_STEPS[group]
    _close(1.0 - after.detach() / before.detach(), gains, tolerance=1e-6)
    outside = [k for k in range(3) if k not in group]
    for source in group:
        _close(affinity.matrix[source, outside] * len(group), [gains[k] for k in outside], tolerance=1e-6)
    assert not affinity.matrix.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# The published attribution.


@pytest.mark.parametrize("measure_last", [False, True])
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (([0], [1], [2]), [[0.0, 0.0, 0.0], [0.36, 0.36, -0.21], [0.36, 0.75, 0.0]]),
        (([0, 1], [2]), [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.64, 0.91, 0.0]]),
        (([2], [0, 1]), [[0.0, -1.12, 0.375], [-0.48, 0.0, 0.375], [0.0, 0.0, 0.0]]),
        (([1], [0, 2]), [[0.18, 0.375, -0.18], [0.0, 0.0, 0.0], [-0.18, 0.375, 0.0]]),
        (([0, 1, 2],), [[0.0, -0.07, 0.12], [0.0, 0.0, -0.12], [0.0, -0.12, 0.12]]),
    ],
)
def test_the_published_attribution_has_the_closed_form(
    order: list[list[int]], expected: list[list[float]], measure_last: bool
) -> None:
    toy = _Toy()
    if len(order) == 1:  # rounding noise in the exact zero would change the case
        losses = iter([FROM, *([FIRST_STEPS[(0, 1, 2)][0]] * 2)])
        affinity = ProximalAffinity(3, decay=1.0, attribution="published")
        _train(affinity, order, lambda: next(losses), toy.step, measure_last=measure_last)
    else:
        affinity = ProximalAffinity(3, decay=1.0, attribution="published")
        _train(affinity, order, toy.losses, toy.step, measure_last=measure_last)
    _close(affinity.matrix, expected)


@pytest.mark.parametrize("measure_last", [False, True])
def test_the_published_attribution_equals_the_official_loop(measure_last: bool) -> None:
    rng = random.Random(0)
    affinity = ProximalAffinity(3, decay=0.1, attribution="published", bias_correction=False)
    official = _Official(3, 0.1)
    for _ in range(300):
        order = _random_partition(rng, 3)
        shared, heads = rng.uniform(-1.0, 1.0), [rng.uniform(-1.0, 1.0) for _ in range(3)]
        labelled = tuple(rng.random() < 0.8 for _ in range(3))  # the loss of a task without labels is zero
        ours, theirs = (_Toy(shared, [*heads], labelled) for _ in range(2))
        _train(affinity, order, ours.losses, ours.step, measure_last=measure_last)
        official.batch(order, theirs.losses, theirs.step)
        torch.testing.assert_close(affinity.matrix, _float64(official.average), rtol=1e-12, atol=1e-12)


def test_single_tasks_in_random_order_are_credited_with_the_effect_of_the_others() -> None:
    true = [[0.2, 0.09, -0.09], [0.12, 0.2, -0.11], [-0.1, -0.05, 0.3]]
    correct = ProximalAffinity(3, decay=0.002)
    published = ProximalAffinity(3, decay=0.002, attribution="published")
    for order in itertools.chain.from_iterable(itertools.repeat(list(itertools.permutations(range(3))), 200)):
        for position, task in enumerate(order):
            after = 1.0 - _float64(true[task])
            follows = [order[position + 1]] if position < 2 else None
            for affinity in (correct, published):
                affinity.update([task], torch.ones(3), after, next_group=follows)
    _close(correct.matrix, true)
    for i, k in itertools.permutations(range(3), 2):
        others = sum(true[j][k] for j in range(3) if j != i) / 2
        assert published.matrix[i, k].item() == pytest.approx(others, abs=2e-3)


def test_the_published_attribution_measures_nothing_after_the_last_step() -> None:
    affinity = ProximalAffinity(2, attribution="published")
    affinity.update([0], torch.ones(2), torch.full((2,), 0.5))
    assert not affinity.counts.any()


def test_the_next_group_is_of_no_concern_to_the_correct_attribution() -> None:
    affinities = [ProximalAffinity(2), ProximalAffinity(2)]
    affinities[0].update([0], torch.ones(2), torch.full((2,), 0.5))
    affinities[1].update([0], torch.ones(2), torch.full((2,), 0.5), next_group=[1])
    assert torch.equal(affinities[0].matrix, affinities[1].matrix)


# ---------------------------------------------------------------------------------------------------------------------
# The increments and the average.


@attributions
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize(("num_tasks", "decay"), [(1, 0.1), (2, 0.3), (5, 0.05), (11, 1e-3), (4, 1.0)])
def test_random_updates_equal_the_reference(
    num_tasks: int, decay: float, bias_correction: bool, attribution: Attribution
) -> None:
    rng = random.Random(num_tasks)
    affinity = ProximalAffinity(num_tasks, decay, attribution, bias_correction)
    state = _Reference(num_tasks, decay)
    published = attribution == "published"
    for _ in range(300):
        group = rng.sample(range(num_tasks), rng.randint(1, num_tasks))
        before, after = _random_losses(rng, num_tasks), _random_losses(rng, num_tasks)
        if rng.random() < 0.2:
            after = before  # gains of exactly zero
        stepped = [0] if published else group
        affinity.update(stepped, _float64(before), _float64(after), next_group=group)
        _reference_update(state, group, before, after, published)
        assert affinity.counts.tolist() == state.counts
    torch.testing.assert_close(affinity.matrix, _float64(state.matrix(bias_correction)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("loss", [NAN, 0.0, -1.0, INF, -INF])
def test_a_loss_that_does_not_count_leaves_its_task_out(loss: float, moment: str) -> None:
    affinity = ProximalAffinity(4, decay=0.5)
    affinity.update([0, 1, 2], torch.ones(4), torch.full((4,), 0.5))
    old, counts = affinity.matrix, affinity.counts.clone()
    losses = {"before": torch.ones(4), "after": torch.full((4,), 0.25)}
    losses[moment][1] = loss
    affinity.update([0, 1], losses["before"], losses["after"])
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[0, [0, 2, 3]] = False
    assert torch.equal(affinity.matrix[kept], old[kept])
    assert torch.equal(affinity.counts, counts + (~kept))
    assert affinity.matrix.isfinite().all()
    assert (affinity.matrix[~kept] != old[~kept]).all()


def test_only_the_published_attribution_credits_a_task_without_a_loss() -> None:
    before, after = torch.tensor([NAN, 1.0, 1.0]), torch.tensor([NAN, 0.5, 0.5])
    correct, published = ProximalAffinity(3), ProximalAffinity(3, attribution="published")
    for affinity in (correct, published):
        affinity.update([0, 1], before, after, next_group=[0, 1])
    assert correct.counts.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert published.counts.tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(("before", "after"), [(1e-300, 1e300), (5e-324, 1.0), (1e300, 1e-300)])
def test_extreme_ratios_stay_finite(before: float, after: float) -> None:
    affinity = ProximalAffinity(2)
    affinity.update([0, 1], _float64([before, 1.0]), _float64([after, 1.1]))
    assert affinity.average.isfinite().all()
    assert affinity.matrix.isfinite().all()


def test_the_signs_of_tiny_gains_are_told_apart() -> None:
    affinity = ProximalAffinity(2, decay=1.0)
    tiny = 2.0**-52  # below it a gain in float64 is exactly zero
    affinity.update([0, 1], torch.ones(2), _float64([1.0 + tiny, 1.0 - tiny]))
    assert affinity.matrix.tolist() == [[0.0, -tiny / 2], [-tiny / 2, tiny / 2]]
    assert affinity.counts.tolist() == [[0, 1], [1, 1]]


@attributions
def test_permuted_tasks_permute_the_matrix(attribution: Attribution) -> None:
    rng = random.Random(1)
    order = [3, 0, 4, 1, 2]
    plain, permuted = (ProximalAffinity(5, 0.1, attribution) for _ in range(2))
    for _ in range(100):
        group = rng.sample(range(5), rng.randint(1, 5))
        before, after = _float64(_random_losses(rng, 5)), _float64(_random_losses(rng, 5))
        plain.update(group, before, after, next_group=group)
        moved = [order.index(task) for task in group]
        permuted.update(moved, before[order], after[order], next_group=moved)
    torch.testing.assert_close(permuted.matrix, plain.matrix[order][:, order], rtol=1e-14, atol=0.0)
    assert torch.equal(permuted.counts, plain.counts[order][:, order])


def test_the_order_within_a_group_does_not_matter() -> None:
    one, other = ProximalAffinity(3), ProximalAffinity(3)
    one.update([0, 2, 1], torch.ones(3), torch.tensor([0.5, 1.5, 0.1]))
    other.update((2, 1, 0), torch.ones(3), torch.tensor([0.5, 1.5, 0.1]))
    assert torch.equal(one.matrix, other.matrix)


def test_scaled_losses_leave_the_affinity_unchanged() -> None:
    scales = _float64([1.0, 2.0**20, 2.0**-20])
    one, other = ProximalAffinity(3), ProximalAffinity(3)
    before, after = _float64(FROM), _float64(FIRST_STEPS[(0, 2)][0])
    one.update([0, 2], before, after)
    other.update([0, 2], scales * before, scales * after)
    assert torch.equal(one.matrix, other.matrix)


def test_equal_losses_give_exactly_zero() -> None:
    affinity = ProximalAffinity(3, decay=0.1)
    losses = torch.tensor([0.1, 0.7, 1e-30])
    for _ in range(10):
        affinity.update([0, 1], losses, losses.clone())
    assert not affinity.matrix.any()
    assert affinity.counts[0].tolist() == [10, 10, 10]


@pytest.mark.parametrize(("decay", "half_life", "weight"), [(1e-3, 693, 0.0952), (1e-4, 6931, 0.00995)])
def test_the_average_has_the_half_life_of_its_decay(decay: float, half_life: int, weight: float) -> None:
    affinity = ProximalAffinity(1, decay, bias_correction=False)
    before, after = torch.ones(1), torch.full((1,), 0.5)  # a gain of one half
    for number in range(half_life):
        if number == 100:
            assert affinity.matrix.item() == pytest.approx(0.5 * weight, rel=1e-3)
            assert affinity.matrix.item() == pytest.approx(0.5 * (1.0 - (1.0 - decay) ** 100), rel=1e-10)
        affinity.update([0], before, after)
    assert affinity.matrix.item() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("decay", [1.0, 0.5, 1e-3, 1e-10])
def test_bias_correction_makes_a_weighted_mean(decay: float) -> None:
    affinity = ProximalAffinity(1, decay)
    gains = [0.5, 0.25, 0.75, 0.125]
    for gain in gains:
        affinity.update([0], torch.ones(1), torch.tensor([1.0 - gain]))
    weights = [(1.0 - decay) ** (len(gains) - 1 - number) for number in range(len(gains))]
    expected = sum(w * g for w, g in zip(weights, gains, strict=True)) / sum(weights)
    assert affinity.matrix.item() == pytest.approx(expected, rel=1e-12)


def test_bias_correction_makes_up_for_unequal_counts() -> None:
    corrected, plain = (ProximalAffinity(2, bias_correction=correction) for correction in (True, False))
    for number in range(100):
        group = [0] if number % 10 == 0 else [1]
        for affinity in (corrected, plain):
            affinity.update(group, torch.ones(2), torch.full((2,), 0.5))
    _close(corrected.matrix, [[0.5, 0.5], [0.5, 0.5]])
    assert plain.matrix[1, 0] > 8 * plain.matrix[0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The relation to look-ahead affinity: two quadratics in shared parameters and a head each.


@dataclass
class _Quadratics:
    lr: float

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.maps = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
        self.targets = torch.randn(2, 4, generator=generator, dtype=torch.float64)
        self.shared = torch.randn(3, generator=generator, dtype=torch.float64)
        self.heads = torch.randn(2, 4, generator=generator, dtype=torch.float64)

    def losses(self, shared: Tensor, heads: Tensor) -> Tensor:
        return 0.5 * ((self.maps @ shared) + heads - self.targets).square().sum(dim=1)

    def gradients(self, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        shared, heads = self.shared.clone().requires_grad_(), self.heads.clone().requires_grad_()
        total = self.losses(shared, heads)[list(group)].sum()
        gradients = torch.autograd.grad(total, [shared, heads])
        return gradients[0], gradients[1]

    def measured(self, group: Sequence[int]) -> ProximalAffinity:
        affinity = ProximalAffinity(2, decay=1.0)
        by_shared, by_heads = self.gradients(group)
        before = self.losses(self.shared, self.heads)
        after = self.losses(self.shared - self.lr * by_shared, self.heads - self.lr * by_heads)
        affinity.update(group, before, after)
        return affinity


@pytest.mark.parametrize("source", [0, 1])
def test_a_single_task_has_exactly_its_look_ahead_affinity_to_another(source: int) -> None:
    problem = _Quadratics(lr=0.01)
    matrix = problem.measured([source]).matrix
    by_shared, _ = problem.gradients([source])
    moved = problem.losses(problem.shared - problem.lr * by_shared, problem.heads)
    look_ahead = 1.0 - moved / problem.losses(problem.shared, problem.heads)
    assert matrix[source, 1 - source] == look_ahead[1 - source]
    assert matrix[source, source] > look_ahead[source]  # by the gain of its head


@pytest.mark.parametrize("group", [[0], [1], [0, 1]])
def test_the_affinity_is_first_order_in_the_step(group: list[int]) -> None:
    problem = _Quadratics(lr=1e-6)
    matrix = problem.measured(group).matrix
    losses = problem.losses(problem.shared, problem.heads)
    gradients = [problem.gradients([task]) for task in range(2)]
    gains = [
        problem.lr
        / losses[k].item()
        * (
            sum((gradients[i][0] @ gradients[k][0]).item() for i in group)
            + (gradients[k][1].square().sum().item() if k in group else 0.0)
        )
        / len(group)
        for k in range(2)
    ]
    assert len(group) == 1 or min(gains) > 0.0  # no conflict inside, so that the increments are the gains
    for source in group:
        assert matrix[source].tolist() == pytest.approx(gains, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# State, dtypes, devices.


def _random_run(rng: random.Random, affinity: ProximalAffinity, updates: int) -> None:
    for _ in range(updates):
        group = rng.sample(range(affinity.num_tasks), rng.randint(1, affinity.num_tasks))
        before, after = (torch.tensor(_random_losses(rng, affinity.num_tasks)) for _ in range(2))
        affinity.update(group, before, after, next_group=group)


@attributions
def test_a_saved_run_continues_as_if_uninterrupted(attribution: Attribution) -> None:
    whole, first, second = (ProximalAffinity(4, 0.05, attribution) for _ in range(3))
    rng = random.Random(2)
    _random_run(rng, whole, 60)
    rng = random.Random(2)
    _random_run(rng, first, 30)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    _random_run(rng, second, 30)
    assert torch.equal(second.matrix, whole.matrix)
    assert torch.equal(second.counts, whole.counts)


def test_reset_forgets_everything() -> None:
    affinity = ProximalAffinity(3, 0.1)
    _random_run(random.Random(3), affinity, 20)
    assert affinity.counts.any()
    affinity.reset()
    assert not affinity.matrix.any()
    assert not affinity.counts.any()


@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_matrix_is_a_copy(bias_correction: bool) -> None:
    affinity = ProximalAffinity(2, bias_correction=bias_correction)
    affinity.matrix.fill_(1.0)
    assert not affinity.average.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_losses_are_taken_in_double(dtype: torch.dtype) -> None:
    affinity, exact = ProximalAffinity(3), ProximalAffinity(3)
    before, after = torch.tensor(FROM, dtype=dtype), torch.tensor([0.7, 1.3, 0.3], dtype=dtype)
    affinity.update([0, 1], before, after)
    exact.update([0, 1], before.double(), after.double())
    assert affinity.matrix.dtype == torch.float64
    assert torch.equal(affinity.matrix, exact.matrix)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.float, torch.nn.Module.bfloat16])
def test_casting_a_model_keeps_the_average_in_double(cast: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    affinity = ProximalAffinity(3, 0.1)
    _random_run(random.Random(4), affinity, 20)
    matrix = affinity.matrix
    cast(torch.nn.Sequential(torch.nn.Linear(1, 1), affinity))
    assert affinity.average.dtype == torch.float64
    assert "average" in affinity.state_dict()
    assert torch.equal(affinity.matrix, matrix)


@attributions
def test_nothing_is_read_from_the_device(attribution: Attribution) -> None:
    # Tensors on the meta device have no values: any attempt to read one raises an error.
    affinity = ProximalAffinity(3, attribution=attribution).to("meta")
    losses = torch.ones(3, device="meta")
    affinity.update([0, 2], losses, losses, next_group=[1])
    affinity.reset()
    assert affinity.matrix.shape == (3, 3)
    assert affinity.to_empty(device="cpu").average.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_update_on_a_gpu_does_not_wait_for_it() -> None:
    on_cpu, on_gpu = ProximalAffinity(3), ProximalAffinity(3).cuda()
    before, after = torch.tensor(FROM), torch.tensor([0.7, NAN, 0.3])
    losses = before.cuda(), after.cuda()
    on_cpu.update([0, 1], before, after)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu.update([0, 1], *losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(on_gpu.matrix.cpu(), on_cpu.matrix)


def test_losses_with_a_graph_leave_none_in_the_state() -> None:
    affinity = ProximalAffinity(2)
    affinity.update([0], torch.ones(2, requires_grad=True) * 2, torch.ones(2, requires_grad=True) * 1)
    assert not affinity.average.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Errors.


@pytest.mark.parametrize("decay", [0.0, -0.1, 1.5, NAN])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"`decay`.* should lie in \(0, 1\]\. Found"):
        ProximalAffinity(2, decay=decay)


def test_an_unknown_attribution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`attribution` should be one of .*'published'.*Found 'official'"):
        ProximalAffinity(2, attribution="official")  # type: ignore[arg-type]


def test_no_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`num_tasks` should be at least 1\. Found 0"):
        ProximalAffinity(0)


@attributions
@pytest.mark.parametrize("name", ["group", "next_group"])
@pytest.mark.parametrize(
    ("group", "message"),
    [
        ([], "should name at least one task. Found none"),
        ([1, 1], "should name each task once. Found \\[1, 1\\]"),
        ([0, 3], "should name tasks from 0 to 2. Found \\[0, 3\\]"),
        ([-1], "should name tasks from 0 to 2. Found \\[-1\\]"),
    ],
)
def test_a_wrong_group_is_refused(group: list[int], message: str, name: str, attribution: Attribution) -> None:
    affinity = ProximalAffinity(3, attribution=attribution)
    groups = {"group": [0], "next_group": [1], name: group}
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        affinity.update(groups["group"], torch.ones(3), torch.ones(3), next_group=groups["next_group"])


@pytest.mark.parametrize("name", ["before", "after"])
@pytest.mark.parametrize("shape", [(), (2,), (3, 1), (1, 3)])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...], name: str) -> None:
    losses = {"before": torch.ones(3), "after": torch.ones(3), name: torch.ones(shape)}
    with pytest.raises(ValueError, match=rf"`{name}` should have shape \(3,\), one loss per task\. Found \("):
        ProximalAffinity(3).update([0], losses["before"], losses["after"])


def test_its_arguments_are_shown() -> None:
    assert repr(ProximalAffinity(2)) == (
        "ProximalAffinity(num_tasks=2, decay=0.001, attribution='stepping_group', bias_correction=True)"
    )
