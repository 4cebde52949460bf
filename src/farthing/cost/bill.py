"""The bill: a ledger's summary as a table that reads like a receipt."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from farthing.base.figures import MISSING, amount, duration, letters
from farthing.cost.flops import CONVENTION
from farthing.cost.ledger import LOST, Row, Summary

if TYPE_CHECKING:
    from rich.table import Table

_FLOP_UNITS = [(1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"), (1e18, "EFLOP")]
_ENERGY_UNITS = [(3.6, "mWh"), (3600.0, "Wh"), (3.6e6, "kWh"), (3.6e9, "MWh")]  # joules in each


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

    flop_scale, flop_unit = _unit(summary.total.flops, _FLOP_UNITS)
    energy_scale, energy_unit = _unit(summary.total.joules, _ENERGY_UNITS)
    usd = summary.total.usd + sum(cost for _, cost in bought)
    money = _decimals(usd, least=2)
    if rows is None:
        rows = [(_name(row, summary), row) for row in summary.by_activity()]

    def cells(row: Row, name: str, tokens: str, time: str) -> list[Text]:
        flops = amount(row.flops / flop_scale, _decimals(summary.total.flops / flop_scale, digits=4))
        joules = amount(row.joules / energy_scale, _decimals(summary.total.joules / energy_scale, digits=4))
        return [Text(cell) for cell in (name, time, tokens, flops, joules, amount(row.usd, money))]

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
    energy = f"{energy_unit} (est.)" if summary.total.joules_are == "estimated" else energy_unit
    for heading in ("time", "tokens", flop_unit, energy, "$"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows:
        # Input and output are added: both passed through the model.
        table.add_row(*cells(row, name, tokens(row), duration(row.seconds)))
    for name, cost in bought:
        table.add_row(*map(Text, (name, MISSING, MISSING, MISSING, MISSING, amount(cost, money))))
    table.add_section()
    # No total of the tokens: the same ones are generated and then trained on.
    total = cells(summary.total, "total", "", duration(summary.total.seconds))
    table.add_row(*total[:-1], Text(amount(usd, money)), style="bold")
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
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False)
    console.print(bill_table(summary, title, rows, bought, notes))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def foot(summary: Summary) -> list[str]:
    """Footnotes: rates and their sources, the kind of energy, coverage, the convention."""
    lines = []
    for rate in summary.rates:
        each = f" each for {rate.devices}x" if rate.devices > 1 else " for"
        lines.append(f"${rate.usd:.4g}/h{each} {rate.device} ({rate.source})")
    if summary.rows:
        wall = duration(summary.wall_seconds)
        lines.append(f"{summary.covered:.1%} of {wall} on the clock is in this bill")
        lines.append(f"energy {summary.total.joules_are}; {CONVENTION}")
    return lines


def tokens(row: Row) -> str:
    tokens = row.tokens_in + row.tokens_out
    return letters(tokens) if tokens else MISSING


def _decimals(total: float, digits: int = 3, least: int = 0) -> int:
    """Decimals that give a total so many significant digits, and at least `least`."""
    if total <= 0:
        return least
    return max(least, digits - 1 - math.floor(math.log10(total)))


def _unit(total: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit that fits at least once, else the smallest."""
    fitting = [unit for unit in units if total >= unit[0]]
    return fitting[-1] if fitting else units[0]


def _name(row: Row, summary: Summary) -> str:
    if row.activity != LOST:
        return row.activity
    times = {1: "once", 2: "twice"}.get(summary.interruptions, f"{summary.interruptions} times")
    return f"failed or interrupted {times}" if summary.failed else f"interrupted {times}"
