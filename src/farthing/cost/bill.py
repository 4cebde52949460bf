"""The bill: a ledger's summary as a table that reads like a receipt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farthing.base.figures import (
    COMPUTE,
    DOLLARS,
    ENERGY,
    MISSING,
    column,
    duration,
    hourly,
    letters,
    money,
    percent,
)
from farthing.base.terminal import console
from farthing.cost.flops import CONVENTION
from farthing.cost.ledger import LOST, Row, Summary

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table


WIDEST = 100  # characters; a wider table is hard to read across
_GAP = 3  # between columns
_OMITTED = (4, 3, 2, 1)  # columns left out one by one where there is no room: energy, compute, tokens, time


@dataclass(frozen=True)
class Bill:
    """A bill as a table of text that rich prints in the width there is."""

    title: str
    headings: list[str]
    """Above all columns but the first."""
    rows: list[list[str]]
    total: list[str]
    notes: list[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="italic")
        kept = self._columns(options.max_width)
        yield self._table(options.max_width, kept)
        lost = [heading for place, heading in enumerate(self.headings, 1) if place not in kept]
        missing = [f"left out, as there is no room here: {', '.join(lost)}"] if lost else []
        for note in [*self.notes, *missing]:
            yield Text(note, style="dim italic")

    def _table(self, width: int, kept: Sequence[int]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE,
            show_edge=False,
            pad_edge=False,
            width=min(width, max(WIDEST, self._widest(kept))),
        )
        table.add_column("", overflow="fold")
        for place in kept:
            table.add_column(self.headings[place - 1], justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(row[place]) for place in (0, *kept)))
        table.add_section()
        table.add_row(*(Text(self.total[place]) for place in (0, *kept)), style="bold")
        return table

    def _columns(self, width: int) -> list[int]:
        """The columns there is room for, after the first, whose names may be wrapped but not cut."""
        kept = list(range(1, len(self.headings) + 1))
        for place in _OMITTED:
            if self._least(kept) > width:
                kept.remove(place)
        return kept

    def _least(self, kept: Sequence[int]) -> int:
        words = (word for row in self._lines() for word in row[0].split())
        return max(map(len, words), default=0) + self._numbers(kept)

    def _widest(self, kept: Sequence[int]) -> int:
        return max(len(row[0]) for row in self._lines()) + self._numbers(kept)

    def _numbers(self, kept: Sequence[int]) -> int:
        return sum(_GAP + max(len(row[place]) for row in self._lines()) for place in kept)

    def _lines(self) -> list[list[str]]:
        return [["", *self.headings], *self.rows, self.total]


def bill_table(
    summary: Summary,
    title: str = "",
    rows: Sequence[tuple[str, Row]] | None = None,
    bought: Sequence[tuple[str, float]] = (),
    notes: Sequence[str] = (),
) -> Bill:
    """The bill: a row per activity, a total, and footnotes on rate and source.

    `rows` (name, row) replace the activities, `bought` (name, dollars) are added to the metered costs, `notes` follow
    the footnotes.
    """
    usd = summary.total.usd + sum(cost for _, cost in bought)
    compute = column(summary.total.flops, COMPUTE, digits=4)
    energy = column(summary.total.joules, ENERGY, digits=4)
    cost_of = column(usd, DOLLARS, least=2)
    if rows is None:
        rows = [(_name(row, summary), row) for row in summary.by_activity()]

    def cells(row: Row, name: str, tokens: str) -> list[str]:
        return [name, duration(row.seconds), tokens, compute(row.flops), energy(row.joules), cost_of(row.usd)]

    estimated = " (est.)" if summary.total.joules_are == "estimated" else ""
    # Input and output are added: both passed through the model.
    shown = [cells(row, name, tokens(row)) for name, row in rows]
    shown += [[name, MISSING, MISSING, MISSING, MISSING, cost_of(cost)] for name, cost in bought]
    # No token total: the same tokens are generated and then trained on.
    total = [*cells(summary.total, "total", "")[:-1], cost_of(usd)]
    headings = ["time", "tokens", compute.unit, energy.unit + estimated, "$"]
    return Bill(title, headings, shown, total, [*foot(summary), *notes])


def bill_text(
    summary: Summary,
    title: str = "",
    width: int = 100,
    rows: Sequence[tuple[str, Row]] | None = None,
    bought: Sequence[tuple[str, float]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The bill as plain text, at most `width` characters wide."""
    out = io.StringIO()
    plain = console(file=out, width=width, color_system=None, force_terminal=False)
    plain.print(bill_table(summary, title, rows, bought, notes))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def foot(summary: Summary) -> list[str]:
    """Footnotes: rates and their sources, the kind of energy, coverage, the convention."""
    lines = []
    for rate in summary.rates:
        each = f" each for {rate.devices}x" if rate.devices > 1 else " for"
        lines.append(f"{hourly(rate.usd)}{each} {rate.device} ({rate.source})")
    if summary.total.usd_paid:
        lines.append(
            f"{money(summary.total.usd_paid)} of it was paid to judges' servers, by the recipe's prices"
        )
    if summary.wall_seconds:
        wall = duration(summary.wall_seconds)
        lines.append(f"{percent(summary.covered)} of {wall} on the clock is in this bill")
    if summary.rows:
        lines.append(f"energy {summary.total.joules_are}; {CONVENTION}")
    return lines


def tokens(row: Row) -> str:
    tokens = row.tokens_in + row.tokens_out
    return letters(tokens) if tokens else MISSING


def _name(row: Row, summary: Summary) -> str:
    if row.activity != LOST:
        return row.activity
    times = {1: "once", 2: "twice"}.get(summary.interruptions, f"{summary.interruptions} times")
    return f"failed or interrupted {times}" if summary.failed else f"interrupted {times}"
