"""The cost page of the report: where each cent went, plan beside actual, other prices and other hardware."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from farthing.cost import elsewhere, spend
from farthing.cost.ledger import LOST, Row
from farthing.errors import UserError
from farthing.report import charts, humane
from farthing.report.bill import COLOURS, STAGES
from farthing.report.gather import Json, mapping, number, text

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
    """What was planned, what it was, and how many times the plan."""

    name: str
    planned: str
    actual: str
    ratio: str


@dataclass(frozen=True)
class Offered:
    """The bill elsewhere."""

    device: str
    time: str
    usd: str
    range: str
    source: str


@dataclass(frozen=True)
class CostPage:
    """Everything the section shows."""

    total: str
    cents: list[Cent]
    bought: list[tuple[str, str, str]]
    """What was entered by hand: (what, dollars, source)."""
    figures: list[tuple[str, str]]
    """(value, what it is)."""
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
    hardware = elsewhere.other_hardware(booked.lines)
    return CostPage(
        total=humane.money(usd),
        cents=_cents(booked, usd),
        bought=[(f"{entry.kind}: {text(entry.what)}", humane.money(entry.cost), text(entry.source))
                for entry in booked.entries],
        figures=_figures(usd, total, spend.group([booked], "activity"), results),
        plan=_plan(booked, results),
        prices=[_offered(offer) for offer in elsewhere.other_prices(booked.lines)],
        hardware=[_offered(offer) for offer in hardware[:MOST_OFFERS]],
        assumption=hardware[0].assumption if hardware else "",
        notes=[text(note) for note in booked.notes],
    )  # fmt: skip


def _cents(booked: spend.Booked, usd: float) -> list[Cent]:
    """Stage by stage and activity by activity, the largest first."""
    rows = spend.group([booked], "stage", "activity")
    large = sorted(
        ((key, row.usd) for key, row in rows.items() if row.usd >= SMALL * usd > 0), key=lambda one: -one[1]
    )
    small = [row.usd for row in rows.values() if 0 < row.usd < SMALL * usd]
    cents = [
        _cent(STAGES.get(stage) or text(stage), activity, part, usd) for (stage, activity), part in large
    ]
    if small:
        cents.append(_cent("", humane.plural(len(small), "smaller part"), sum(small), usd))
    return cents


def _cent(stage: str, activity: str, part: float, usd: float) -> Cent:
    css = COLOURS.get(activity, "a8")
    name = "lost: failed, interrupted or done again" if activity == LOST else activity
    bar = charts.stacked(
        [charts.Segment(part / usd, css, name, "")], f"{name}: {humane.percent(part / usd)}."
    )
    return Cent(stage, name, css, humane.money(part), humane.percent(part / usd), bar)


def _figures(usd: float, total: Row, by: dict[tuple[str, ...], Row], results: Json) -> list[tuple[str, str]]:
    """What a unit of this and that cost."""
    figures = []
    gain = number(mapping(results.get("gain")).get("difference"))
    if gain and gain > 0 and usd:
        figures.append((humane.money(usd / (100 * gain)), "a point of accuracy gained"))
    written = by.get(("generate",))
    if written and written.tokens_out and written.usd:
        figures.append((humane.money(1e6 * written.usd / written.tokens_out), "a million tokens written"))
    trained = by.get(("train",))
    if trained and trained.tokens_in and trained.usd:
        figures.append((humane.money(1e6 * trained.usd / trained.tokens_in), "a million tokens trained on"))
    if total.flops and total.usd:
        figures.append((humane.money(1e18 * total.usd / total.flops), "an EFLOP of model work"))
    return figures


def _plan(booked: spend.Booked, results: Json) -> list[Compared]:
    """The plan in results.json beside what happened; empty without a plan."""
    plan = mapping(results.get("plan"))
    if not plan:
        return []
    total = booked.summary
    rows = []
    actual = {key: row.seconds for (key,), row in spend.group([booked], "activity").items()}
    for activity, planned in mapping(plan.get("by_activity")).items():
        rows.append(_compared(text(activity), number(planned), actual.get(activity, 0.0), humane.duration))
    rows.append(
        _compared("wall clock", number(plan.get("wall_seconds")), total.wall_seconds, humane.duration)
    )
    rows.append(_compared("dollars", number(plan.get("usd")), total.total.usd, humane.money))
    return [row for row in rows if row.planned != humane.MISSING]


def _compared(name: str, planned: float | None, actual: float, write: humane.Writer) -> Compared:
    ratio = f"{actual / planned:.2f}" if planned else humane.MISSING
    return Compared(name, write(planned), write(actual), ratio)


def _offered(offer: elsewhere.Offer) -> Offered:
    span = "" if offer.low == offer.high else f"{humane.money(offer.low)} to {humane.money(offer.high)}"
    return Offered(
        text(offer.device),
        humane.duration(offer.seconds),
        humane.money(offer.usual),
        span,
        text(offer.source),
    )
