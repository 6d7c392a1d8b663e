from __future__ import annotations

import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from scipy import stats

from mtl_lightning.comparison import Column, ComparisonTable, Interval, Row, confidence_interval, mean_ranks


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.1, 0.2, 0.7], [-5.0, 1e6, 3.0]])
def test_the_interval_is_that_of_scipy(values: list[float], level: float) -> None:
    found = confidence_interval(values, level)
    low, high = stats.t.interval(level, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)
    assert found.count == len(values)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 4))
    found = [confidence_interval(row.tolist(), level=0.9) for row in draws]
    covered = np.mean([abs(interval.mean - 3.0) <= interval.half_width for interval in found])
    assert covered == pytest.approx(0.9, abs=4 * math.sqrt(0.9 * 0.1 / 4000))  # four standard errors


def test_one_value_has_no_spread_and_a_failed_one_no_mean() -> None:
    one = confidence_interval([0.5])
    assert one.mean == 0.5
    assert math.isnan(one.half_width)
    assert math.isnan(confidence_interval([0.5, math.inf]).mean)


def test_wrong_values_of_an_interval_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one number\. Found none"):
        confidence_interval([])
    with pytest.raises(ValueError, match=r"\(0, 1\). Found 95"):
        confidence_interval([1.0], level=95)


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.123456, 0.0123, 3), "0.123 ± 0.012"),
        (Interval(0.5, 0.0996, 3), "0.50 ± 0.10"),
        (Interval(123.456, 45.6, 3), "123 ± 46"),
        (Interval(1e-5, 2e-6, 3), "0.0000100 ± 0.0000020"),
        (Interval(752.0, 0.0, 2), "752 ± 0"),
        (Interval(0.25, 0.0, 2), "0.2500 ± 0"),
        (Interval(-3.14159, math.nan, 1), "-3.142"),
        (Interval(0.0, math.nan, 1), "0"),
        (Interval(math.nan, math.nan, 2), "not finite"),
    ],
)
def test_numbers_have_the_digits_that_the_interval_supports(interval: Interval, text: str) -> None:
    assert str(interval) == text


def _reference_ranks(values: np.ndarray, higher: list[bool]) -> np.ndarray:
    """Count for each entry who is strictly better, and half of those who are equal."""
    ranks = np.zeros(values.shape[0])
    for column, is_higher in zip(values.T, higher, strict=True):
        for index, value in enumerate(column):
            better = sum((other > value) if is_higher else (other < value) for other in column)
            ranks[index] += 1 + better + (sum(other == value for other in column) - 1) / 2
    return ranks / values.shape[1]


def test_mean_ranks_are_those_of_counting_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (5, 6, 3), generator=generator).double()
    higher = [True, False, True]
    found = mean_ranks(values, higher)
    assert found.shape == (5, 6)
    for of_seed, ranks in zip(values.numpy(), found, strict=True):
        np.testing.assert_allclose(ranks.numpy(), _reference_ranks(of_seed, higher))


def test_mean_ranks_follow_the_methods_and_ignore_the_units() -> None:
    values = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    higher = [True, False, False]
    order = torch.tensor([2, 0, 3, 1])
    found = mean_ranks(values, higher)
    assert torch.equal(mean_ranks(values[order], higher), found[order])
    assert torch.equal(mean_ranks(values * torch.tensor([1e6, 1e-3, 7.0]), higher), found)
    assert found.sum() == 1 + 2 + 3 + 4


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_last(bad: float, higher: bool) -> None:
    assert mean_ranks(torch.tensor([[bad], [1.0], [2.0]]), [higher])[0] == 3


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 0)])
def test_ranks_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Found shape"):
        mean_ranks(torch.zeros(shape), [True] * (0 if shape[-1] == 0 else 1))


def _table() -> ComparisonTable:
    return ComparisonTable(
        title="A <b> & | *c*",
        columns=[Column("loss/a|b", False), Column("accuracy", True), Column("seeds")],
        rows=[
            Row("alone", {"loss/a|b": Interval(0.1, 0.01, 3), "seeds": "3"}, compared=False),
            Row("<i>", {"loss/a|b": Interval(0.3, 0.01, 3), "accuracy": Interval(0.9, 0.01, 3), "seeds": "3"}),
            Row("two", {"loss/a|b": Interval(0.2, 0.02, 3), "accuracy": Interval(0.9, 0.02, 3), "seeds": "3"}),
            Row("failed", {"loss/a|b": Interval(math.nan, math.nan, 2), "seeds": "2 of 3"}),
        ],
        notes=["one & <two>"],
    )


def test_the_best_of_a_column_are_all_that_share_its_best_mean() -> None:
    table = _table()
    assert [table.best(column) for column in table.columns] == [{"two"}, {"<i>", "two"}, set()]


def test_one_method_alone_is_not_the_best() -> None:
    table = ComparisonTable("t", [Column("x", higher_is_better=True)], [Row("a", {"x": Interval(1.0, 0.1, 2)})])
    assert table.best(table.columns[0]) == set()


def test_markdown_keeps_the_order_marks_the_best_and_escapes() -> None:
    lines = _table().markdown().splitlines()
    assert lines[0] == r"# A \<b\> & \| \*c\*"
    assert lines[2] == r"| method | loss/a\|b ↓ | accuracy ↑ | seeds |"
    assert lines[3] == "|---|---|---|---|"
    assert lines[4:8] == [
        "| alone | 0.100 ± 0.010 | — | 3 |",
        r"| \<i\> | 0.300 ± 0.010 | **0.900 ± 0.010** | 3 |",
        "| two | **0.200 ± 0.020** | **0.900 ± 0.020** | 3 |",
        "| failed | not finite | — | 2 of 3 |",
    ]
    assert lines[-1] == r"- one & \<two\>"


class _Page(HTMLParser):
    """Reads the cells of a page; fails where a tag is not closed or something outside is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.best: list[str] = []
        self._is_best = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object", "a")
        assert not {"src", "href", "srcset", "action"} & {name for name, _ in attrs}
        if tag == "meta":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._is_best = ("class", "best") in attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert "url(" not in data
        assert "@import" not in data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
            if self._is_best:
                self.best.append(data)


def test_the_page_holds_the_same_table_and_refers_to_nothing() -> None:
    page = _Page()
    page.feed(_table().html())
    page.close()
    assert page.open == []
    assert page.rows == [
        ["method", "loss/a|b ↓", "accuracy ↑", "seeds"],
        ["alone", "0.100 ± 0.010", "—", "3"],
        ["<i>", "0.300 ± 0.010", "0.900 ± 0.010", "3"],
        ["two", "0.200 ± 0.020", "0.900 ± 0.020", "3"],
        ["failed", "not finite", "—", "2 of 3"],
    ]
    assert page.best == ["0.900 ± 0.010", "0.200 ± 0.020", "0.900 ± 0.020"]
    assert "http" not in _table().html()


def test_rows_columns_and_cells_have_to_fit() -> None:
    column = Column("x")
    with pytest.raises(ValueError, match=r"row should have a name of its own. Found \['a'\]"):
        ComparisonTable("t", [column], [Row("a", {}), Row("a", {})])
    with pytest.raises(ValueError, match=r"column should have a name of its own. Found \['x'\]"):
        ComparisonTable("t", [column, column], [])
    with pytest.raises(ValueError, match=r"should be of \['x'\]. Found \['y'\]"):
        ComparisonTable("t", [column], [Row("a", {"y": "1"})])
