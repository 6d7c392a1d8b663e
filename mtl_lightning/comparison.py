"""How methods are compared over seeds: intervals, ranks, and a table that reads the same in text and in a browser.

References:
    - Student: The Probable Error of a Mean. Biometrika 6(1), 1908.
    - Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya: Multi-Task Learning as a Bargaining Game (2022),
      arXiv:2202.01017, for the mean rank over the metrics of all tasks.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy import stats
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its confidence interval.

    Attributes:
        mean: The mean.
        half_width: Half the width of the interval; NaN for a single value, which says nothing about the spread.
        count: The number of values.

    Example:
        >>> print(Interval(0.91234, 0.0123, 3), Interval(1234.5, math.nan, 1))
        0.912 ± 0.012 1234
    """

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        """Return the numbers as far as the interval supports them: two digits of its half width."""
        if not math.isfinite(self.mean):
            return "not finite"
        if self.half_width == 0 or not math.isfinite(self.half_width):
            is_count = self.mean.is_integer() and abs(self.mean) < 1e9
            mean = f"{self.mean:.0f}" if is_count else f"{self.mean:.{_decimals(self.mean, digits=4)}f}"
            return f"{mean} ± 0" if self.half_width == 0 else mean
        decimals = _decimals(self.half_width, digits=2)
        return f"{self.mean:.{decimals}f} ± {self.half_width:.{decimals}f}"


def confidence_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of ``values`` and the half width of its confidence interval by Student's t distribution.

    It holds for independent values of a normal distribution, such as those of runs with other seeds. If one of them is
    not finite, mean and half width are NaN.

    Args:
        values: At least one value.
        level: The probability that the interval covers the true mean, in ``(0, 1)``.

    Raises:
        ValueError: If there are no values, or ``level`` is out of range.

    Example:
        >>> print(confidence_interval([1.0, 2.0, 3.0]))
        2.0 ± 2.5
    """
    if not values:
        raise ValueError("`values` should hold at least one number. Found none.")
    if not 0 < level < 1:
        raise ValueError(f"`level` should be in (0, 1). Found {level}.")
    if not all(math.isfinite(value) for value in values):
        return Interval(math.nan, math.nan, len(values))
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, 1)
    quantile = float(stats.t.ppf((1 + level) / 2, df=len(values) - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)), len(values))


def mean_ranks(values: Tensor, higher_is_better: Sequence[bool]) -> Tensor:
    """Return the mean over ``K`` metrics of the rank of each of ``N`` methods, shape ``(..., N)``, float64.

    The best has rank 1; equal values share the mean of their ranks, and values that are not finite are last.

    Args:
        values: The metrics, shape ``(..., N, K)``.
        higher_is_better: For each metric whether more of it is better.

    Raises:
        ValueError: If the shapes do not fit, or there are no metrics.

    Example:
        >>> accuracy_and_loss = torch.tensor([[0.9, 0.3], [0.8, 0.3], [0.7, 0.1]])
        >>> mean_ranks(accuracy_and_loss, higher_is_better=[True, False])  # ranks 1 and 2.5, 2 and 2.5, 3 and 1
        tensor([1.7500, 2.2500, 2.0000], dtype=torch.float64)
    """
    if values.ndim < 2 or values.shape[-1] != len(higher_is_better) or not higher_is_better:
        raise ValueError(
            f"`values` should have shape (..., methods, {len(higher_is_better)}), one column per entry of "
            f"`higher_is_better`, of which there should be one at least. Found shape {tuple(values.shape)}."
        )
    signs = torch.tensor([-1.0 if higher else 1.0 for higher in higher_is_better], dtype=torch.float64)
    costs = values.detach().cpu().double()
    costs = torch.where(costs.isfinite(), costs * signs, torch.inf)
    return torch.from_numpy(stats.rankdata(costs.numpy(), axis=-2)).mean(dim=-1)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its heading, with the unit.
        higher_is_better: Whether larger means are better; ``None`` where neither is, and no cell is marked.
    """

    name: str
    higher_is_better: bool | None = None

    @property
    def heading(self) -> str:
        """The name with an arrow to where it is better."""
        return self.name if self.higher_is_better is None else f"{self.name} {'↑' if self.higher_is_better else '↓'}"


@dataclass(frozen=True)
class Row:
    """A row of a table: one method.

    Attributes:
        name: The method.
        cells: By the name of the column; those that are missing are empty.
        compared: Whether it takes part in the search for the best of each column.
    """

    name: str
    cells: Mapping[str, Interval | str]
    compared: bool = True


@dataclass(frozen=True)
class ComparisonTable:
    """A table of methods, in the order in which they are given; the best mean of each column is set in bold.

    Args:
        title: What is compared.
        columns: The columns.
        rows: The methods.
        notes: What has to be known to read it, one sentence or more each.

    Raises:
        ValueError: If two rows or two columns share a name, or a cell has no column.

    Example:
        >>> table = ComparisonTable(
        ...     "Digits",
        ...     [Column("accuracy", higher_is_better=True)],
        ...     [Row("MT2O", {"accuracy": Interval(0.9, 0.01, 3)}), Row("UW", {"accuracy": Interval(0.8, 0.02, 3)})],
        ... )
        >>> print(table.markdown())
        # Digits
        <BLANKLINE>
        | method | accuracy ↑ |
        |---|---|
        | MT2O | **0.900 ± 0.010** |
        | UW | 0.800 ± 0.020 |
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        for kind, names in (("row", [row.name for row in self.rows]), ("column", [c.name for c in self.columns])):
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"Each {kind} should have a name of its own. Found {repeated} more than once.")
        known = {column.name for column in self.columns}
        for row in self.rows:
            unknown = [name for name in row.cells if name not in known]
            if unknown:
                raise ValueError(f"The cells of {row.name!r} should be of {sorted(known)}. Found {unknown}.")

    def best(self, column: Column) -> set[str]:
        """Return the names of the rows with the best mean of a column; none if fewer than two can be compared."""
        if column.higher_is_better is None:
            return set()
        means = {
            row.name: cell.mean
            for row in self.rows
            if row.compared and isinstance(cell := row.cells.get(column.name), Interval) and math.isfinite(cell.mean)
        }
        if len(means) < 2:
            return set()
        top = (max if column.higher_is_better else min)(means.values())
        return {name for name, mean in means.items() if mean == top}

    def markdown(self) -> str:
        """Return the table in Markdown."""
        best = {column.name: self.best(column) for column in self.columns}
        lines = [f"# {_escaped(self.title)}", "", _line(map(_escaped, self._headings()))]
        lines.append("|---" * (len(self.columns) + 1) + "|")
        for row in self.rows:
            texts = [_escaped(_text(row.cells.get(column.name))) for column in self.columns]
            marked = [row.name in best[column.name] for column in self.columns]
            cells = [f"**{text}**" if mark else text for text, mark in zip(texts, marked, strict=True)]
            lines.append(_line([_escaped(row.name), *cells]))
        if self.notes:
            lines += ["", *(f"- {_escaped(note)}" for note in self.notes)]
        return "\n".join(lines)

    def html(self) -> str:
        """Return the table as a page of its own, without scripts and without references to other files."""
        best = {column.name: self.best(column) for column in self.columns}
        head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in self._headings())
        body = []
        for row in self.rows:
            cells = []
            for column in self.columns:
                mark = " class='best'" if row.name in best[column.name] else ""
                cells.append(f"<td{mark}>{html.escape(_text(row.cells.get(column.name)))}</td>")
            body.append(f"<tr><th scope='row'>{html.escape(row.name)}</th>{''.join(cells)}</tr>")
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return _PAGE.format(
            title=html.escape(self.title), head=head, body="\n".join(body), notes=f"<ul>{notes}</ul>" if notes else ""
        )

    def _headings(self) -> list[str]:
        return ["method", *(column.heading for column in self.columns)]


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2.5rem auto; max-width: 96rem; padding: 0 1.5rem; }}
h1 {{ font-size: 1.4rem; font-weight: 600; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }}
th:first-child {{ text-align: left; }}
thead th {{ border-bottom: 2px solid #888; font-weight: 600; }}
tbody th {{ font-weight: 500; }}
tbody tr:hover {{ background: #8881; }}
.best {{ font-weight: 700; }}
ul {{ color: #777; font-size: .9rem; max-width: 60rem; padding-left: 1.2rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="scroll">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
{notes}
</body>
</html>
"""


def _decimals(value: float, digits: int) -> int:
    """Return with how many decimals ``value`` has so many significant digits, none at least."""
    if value == 0:
        return digits - 1
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])  # after rounding: 0.0996 has two digits as 0.10
    return max(0, digits - 1 - exponent)


def _text(cell: Interval | str | None) -> str:
    return "—" if cell is None else str(cell)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Return ``text`` on one line, such that Markdown shows its characters."""
    return "".join(f"\\{character}" if character in "\\`*[]<>|" else character for character in " ".join(text.split()))
