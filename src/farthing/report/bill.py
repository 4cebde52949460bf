"""The bill: the ledger added up, as a table whose columns line up and as a bar."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from farthing.cost import ledger
from farthing.cost.bill import tokens
from farthing.cost.flops import CONVENTION
from farthing.report import charts, humane
from farthing.report.gather import Json, number, text

STAGES = {"00-base": "before training", "99-final": "after training"}
COLOURS = {activity: f"a{index}" for index, activity in enumerate(ledger.ACTIVITIES, start=1)} | {
    ledger.LOST: "lost"
}


@dataclass(frozen=True)
class Entry:
    """A row of the bill, its amounts as text."""

    name: str
    css: str
    time: str
    tokens: str
    compute: str
    energy: str
    cost: str


@dataclass(frozen=True)
class Bill:
    """What the run cost."""

    entries: list[Entry]
    total: Entry
    stages: list[Entry]  # the same total by stage; empty when there is only one
    seconds: float
    usd: float
    joules: float
    joules_are: str  # measured, estimated, or estimated in part
    bar: Markup
    bar_of: str
    compute_unit: str
    energy_unit: str
    sentences: list[str]


def bill(run_dir: Path, results: Json) -> Bill | None:
    """The bill of a run directory; None while its ledger is empty.

    The share of wall clock accounted for is of the run's own clock in `results` where that is there.
    """
    try:
        lines, skipped = ledger.read(run_dir / "ledger.jsonl")
    except OSError:
        return None
    if not lines:
        return None
    summary = ledger.summarise(lines, number(results.get("wall_seconds")))
    if summary.covered > 1.005 or not summary.covered:  # a clock from before the run was continued
        summary = ledger.summarise(lines)
    total, rows = summary.total, summary.by_activity()
    joules_are = _joules_are(lines)
    compute = humane.column(total.flops, humane.COMPUTE)
    energy = humane.column(total.joules, humane.ENERGY)
    cost = humane.column(total.usd, humane.DOLLARS, least=2)  # cents at least

    def entry(row: ledger.Row, name: str) -> Entry:
        return Entry(
            name, COLOURS.get(row.activity, ""), humane.duration(row.seconds), tokens(row),
            compute(row.flops), energy(row.joules), cost(row.usd),
        )  # fmt: skip

    stages: dict[str, ledger.Row] = {}
    for row in summary.rows:
        stages.setdefault(row.stage, ledger.Row(row.stage, "")).add(row)
    bar, bar_of = _bar(rows, total, summary)
    return Bill(
        entries=[entry(row, _name(row, summary)) for row in rows],
        # No total of the tokens: the same ones are written and then trained on.
        total=dataclasses.replace(entry(total, "total"), tokens=""),
        stages=[entry(row, STAGES.get(stage) or text(stage)) for stage, row in stages.items()]
        if len(stages) > 1
        else [],
        seconds=total.seconds,
        usd=total.usd,
        joules=total.joules,
        joules_are=joules_are,
        bar=bar,
        bar_of=bar_of,
        compute_unit=compute.unit,
        energy_unit=energy.unit,
        sentences=_sentences(summary, skipped, joules_are),
    )


def _name(row: ledger.Row, summary: ledger.Summary) -> str:
    if row.activity != ledger.LOST:
        return row.activity
    times = {1: "once", 2: "twice"}.get(summary.interruptions, f"{summary.interruptions} times")
    return f"lost, {'failed or ' if summary.failed else ''}interrupted {times}"


def _joules_are(lines: list[ledger.Line]) -> str:
    kinds = {line["joules_are"] for line in lines if line["joules"]}
    return "estimated in part" if len(kinds) > 1 else next(iter(kinds), "estimated")


def _bar(rows: list[ledger.Row], total: ledger.Row, summary: ledger.Summary) -> tuple[Markup, str]:
    """The rows as one bar: of the money, or of the time where nothing cost any."""
    of = "the cost" if total.usd else "the time"
    segments = []
    for row in rows:
        share = row.usd / total.usd if total.usd else row.seconds / total.seconds if total.seconds else 0.0
        segments.append(charts.Segment(share, COLOURS[row.activity], _name(row, summary), row.activity))
    said = ", ".join(f"{one.name} {humane.percent(one.share)}" for one in segments)
    return charts.stacked(segments, f"Shares of {of}: {said}."), of


ENERGY_IS = {
    "measured": "Energy was measured by the hardware's own counters.",
    "estimated": "Energy is estimated from the hardware's rated power, not measured.",
    "estimated in part": "Energy was in part measured by the hardware's own counters, in part estimated.",
}


def _sentences(summary: ledger.Summary, skipped: int, joules_are: str) -> list[str]:
    sentences = [
        f"Tokens are those read and those written. Compute is {CONVENTION}.",
        ENERGY_IS[joules_are],
    ]
    for rate in summary.rates:
        device = f"{rate.devices} × {text(rate.device)}" if rate.devices != 1 else text(rate.device)
        source = f" ({text(rate.source)})" if rate.source else ""
        sentences.append(
            f"{device}: {humane.money(rate.usd)} an hour{' each' if rate.devices != 1 else ''}{source}."
        )
    covered, wall = humane.percent(summary.covered), humane.duration(summary.wall_seconds)
    sentences.append(f"The ledger accounts for {covered} of the run's {wall} of wall clock.")
    if skipped:
        unread = humane.plural(skipped, "line")
        verb = "is" if skipped == 1 else "are"
        sentences.append(f"{unread} of the ledger could not be read and {verb} not in the bill.")
    return sentences
