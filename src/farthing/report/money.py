"""The cost page of the report: where each cent went, plan beside actual, other prices and other hardware."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from farthing.base import figures
from farthing.base.errors import UserError
from farthing.cost import ledger, spend
from farthing.cost.bill import tokens
from farthing.cost.flops import CONVENTION
from farthing.cost.ledger import LOST, Row
from farthing.report import charts
from farthing.report.run import Json, mapping, number, text

SMALL = 0.005  # parts of less than this share of the money are one row together
MOST_OFFERS = 8


@dataclass(frozen=True)
class Cent:
    """A part of the money, largest first."""

    stage: str
    activity: str
    css: str
    usd: str
    share: str
    bar: Markup


@dataclass(frozen=True)
class Compared:
    """Planned, actual, and actual over planned."""

    name: str
    planned: str
    actual: str
    ratio: str


@dataclass(frozen=True)
class Offered:
    """The same bill at another provider."""

    device: str
    time: str
    usd: str
    range: str
    source: str


@dataclass(frozen=True)
class CostPage:
    """The contents of the section."""

    total: str
    cents: list[Cent]
    bought: list[tuple[str, str, str]]
    """Entries made by hand: (what, dollars, source)."""
    figures: list[tuple[str, str]]
    """(value, label)."""
    plan: list[Compared]
    prices: list[Offered]
    hardware: list[Offered]
    assumption: str
    notes: list[str]


def cost_page(run_dir: Path, results: Json) -> CostPage | None:
    """The page of a run directory; None while its ledger is empty or cannot be read."""
    try:
        booked = spend.read_run(run_dir)
    except UserError:
        return None
    if booked is None or not booked.lines:
        return None
    total = booked.summary.total
    usd = total.usd + booked.entered
    hardware = spend.other_hardware(booked.lines)
    return CostPage(
        total=figures.money(usd),
        cents=_cents(booked, usd),
        bought=[(f"{entry.kind}: {text(entry.what)}", figures.money(entry.cost), text(entry.source))
                for entry in booked.entries],
        figures=_figures(usd, total, spend.group([booked], "activity"), results),
        plan=_plan(booked, results),
        prices=[_offered(offer) for offer in spend.other_prices(booked.lines)],
        hardware=[_offered(offer) for offer in hardware[:MOST_OFFERS]],
        assumption=hardware[0].assumption if hardware else "",
        notes=[*map(text, booked.notes), *_served(booked)],
    )  # fmt: skip


def _served(booked: spend.Booked) -> list[str]:
    """What serving has cost since, in a sentence; none if the model was never served."""
    total = spend.serving([booked]).total
    if not total.seconds:
        return []
    return [
        f"Serving the model since then has cost {figures.money(total.usd)} in {figures.duration(total.seconds)}, which "
        "is not in this bill."
    ]


def _cents(booked: spend.Booked, usd: float) -> list[Cent]:
    """Cost by stage and activity, largest first."""
    rows = spend.group([booked], "stage", "activity")
    large = sorted(
        ((key, row.usd) for key, row in rows.items() if row.usd >= SMALL * usd > 0), key=lambda one: -one[1]
    )
    small = [row.usd for row in rows.values() if 0 < row.usd < SMALL * usd]
    cents = [
        _cent(STAGES.get(stage) or text(stage), activity, part, usd) for (stage, activity), part in large
    ]
    if small:
        cents.append(_cent("", figures.plural(len(small), "smaller part"), sum(small), usd))
    return cents


def _cent(stage: str, activity: str, part: float, usd: float) -> Cent:
    css = COLOURS.get(activity, "a8")
    name = "lost: failed, interrupted or done again" if activity == LOST else activity
    bar = charts.stacked(
        [charts.Segment(part / usd, css, name, "")], f"{name}: {figures.percent(part / usd)}."
    )
    return Cent(stage, name, css, figures.money(part), figures.percent(part / usd), bar)


def _figures(usd: float, total: Row, by: dict[tuple[str, ...], Row], results: Json) -> list[tuple[str, str]]:
    """Cost of one unit: a step, a token, a point."""
    shown = []
    gain = number(mapping(results.get("gain")).get("difference"))
    if gain and gain > 0 and usd:
        shown.append((figures.money(usd / (100 * gain)), "a point of accuracy gained"))
    written = by.get(("generate",))
    if written and written.tokens_out and written.usd:
        shown.append((figures.money(1e6 * written.usd / written.tokens_out), "a million tokens written"))
    trained = by.get(("train",))
    if trained and trained.tokens_in and trained.usd:
        shown.append((figures.money(1e6 * trained.usd / trained.tokens_in), "a million tokens trained on"))
    if total.flops and total.usd:
        shown.append((figures.money(1e18 * total.usd / total.flops), "an EFLOP of model work"))
    return shown


def _plan(booked: spend.Booked, results: Json) -> list[Compared]:
    """The plan in results.json beside what happened; empty without a plan."""
    plan = mapping(results.get("plan"))
    if not plan:
        return []
    total = booked.summary
    rows = []
    actual = {key: row.seconds for (key,), row in spend.group([booked], "activity").items()}
    for activity, planned in mapping(plan.get("by_activity")).items():
        rows.append(_compared(text(activity), number(planned), actual.get(activity, 0.0), figures.duration))
    rows.append(
        _compared("wall clock", number(plan.get("wall_seconds")), total.wall_seconds, figures.duration)
    )
    rows.append(_compared("dollars", number(plan.get("usd")), total.total.usd, figures.money))
    return [row for row in rows if row.planned != figures.MISSING]


def _compared(name: str, planned: float | None, actual: float, write: figures.Writer) -> Compared:
    ratio = f"{actual / planned:.2f}" if planned else figures.MISSING
    return Compared(name, write(planned), write(actual), ratio)


def _offered(offer: spend.Offer) -> Offered:
    span = "" if offer.low == offer.high else f"{figures.money(offer.low)} to {figures.money(offer.high)}"
    return Offered(
        text(offer.device),
        figures.duration(offer.seconds),
        figures.money(offer.usual),
        span,
        text(offer.source),
    )


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
    """The bill of a run."""

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

    The share accounted for is of the run's wall clock in `results`, if recorded.
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
    compute = figures.column(total.flops, figures.COMPUTE)
    energy = figures.column(total.joules, figures.ENERGY)
    cost = figures.column(total.usd, figures.DOLLARS, least=2)  # cents at least

    def entry(row: ledger.Row, name: str) -> Entry:
        return Entry(
            name, COLOURS.get(row.activity, ""), figures.duration(row.seconds), tokens(row),
            compute(row.flops), energy(row.joules), cost(row.usd),
        )  # fmt: skip

    stages: dict[str, ledger.Row] = {}
    for row in summary.rows:
        stages.setdefault(row.stage, ledger.Row(row.stage, "")).add(row)
    bar, bar_of = _bar(rows, total, summary)
    return Bill(
        entries=[entry(row, _name(row, summary)) for row in rows],
        # No token total: the same tokens are written and then trained on.
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
    """The rows as one bar, by cost, or by time if nothing cost anything."""
    of = "the cost" if total.usd else "the time"
    segments = []
    for row in rows:
        share = row.usd / total.usd if total.usd else row.seconds / total.seconds if total.seconds else 0.0
        segments.append(charts.Segment(share, COLOURS[row.activity], _name(row, summary), row.activity))
    said = ", ".join(f"{one.name} {figures.percent(one.share)}" for one in segments)
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
            f"{device}: {figures.hourly(rate.usd)}{' each' if rate.devices != 1 else ''}{source}."
        )
    if summary.total.usd_paid:
        paid = figures.money(summary.total.usd_paid)
        sentences.append(f"{paid} of the cost was paid to judges' servers, by the recipe's prices.")
    covered, wall = figures.percent(summary.covered), figures.duration(summary.wall_seconds)
    sentences.append(f"The ledger accounts for {covered} of the run's {wall} of wall clock.")
    if skipped:
        unread = figures.plural(skipped, "line")
        verb = "is" if skipped == 1 else "are"
        sentences.append(f"{unread} of the ledger could not be read and {verb} not in the bill.")
    return sentences
