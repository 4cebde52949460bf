"""The bill: a ledger's summary as a table that reads like a receipt."""

from __future__ import annotations

import io
from collections.abc import Sequence
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
    percent,
)
from farthing.base.terminal import console
from farthing.cost.flops import CONVENTION
from farthing.cost.ledger import LOST, Row, Summary

if TYPE_CHECKING:
    from rich.table import Table


def bill_table(
    summary: Summary,
    title: str = "",
    rows: Sequence[tuple[str, Row]] | None = None,
    bought: Sequence[tuple[str, float]] = (),
    notes: Sequence[str] = (),
) -> Table:
    """The bill as a rich table: a row per activity, a total, and footnotes on rate and source.

    `rows` (name, row) replace the activities, `bought` (name, dollars) are added to the metered costs, `notes` follow
    the footnotes.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    usd = summary.total.usd + sum(cost for _, cost in bought)
    compute = column(summary.total.flops, COMPUTE, digits=4)
    energy = column(summary.total.joules, ENERGY, digits=4)
    money = column(usd, DOLLARS, least=2)
    if rows is None:
        rows = [(_name(row, summary), row) for row in summary.by_activity()]

    def cells(row: Row, name: str, tokens: str, time: str) -> list[Text]:
        amounts = (compute(row.flops), energy(row.joules), money(row.usd))
        return [Text(cell) for cell in (name, time, tokens, *amounts)]

    table = Table(
        box=box.SIMPLE,
        title=Text(title) if title else None,
        title_justify="left",
        caption=Text("\n".join([*foot(summary), *notes])),
        caption_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("")
    estimated = " (est.)" if summary.total.joules_are == "estimated" else ""
    for heading in ("time", "tokens", compute.unit, energy.unit + estimated, "$"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows:
        # Input and output are added: both passed through the model.
        table.add_row(*cells(row, name, tokens(row), duration(row.seconds)))
    for name, cost in bought:
        table.add_row(*map(Text, (name, MISSING, MISSING, MISSING, MISSING, money(cost))))
    table.add_section()
    # No token total: the same tokens are generated and then trained on.
    total = cells(summary.total, "total", "", duration(summary.total.seconds))
    table.add_row(*total[:-1], Text(money(usd)), style="bold")
    return table


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
    if summary.rows:
        wall = duration(summary.wall_seconds)
        lines.append(f"{percent(summary.covered)} of {wall} on the clock is in this bill")
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
