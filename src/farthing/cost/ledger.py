"""The ledger: read its lines and add them up.

One JSON object a line, one line a span of time; `meter.py` writes them. A line may be torn (the machine died while
writing it): reading skips and counts it, so one bad line never costs the others.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

ACTIVITIES = ("load", "compile", "generate", "train", "verify", "judge", "evaluate", "checkpoint", "idle")
_MOST = 1e40  # no meter books a larger amount, and its sums and products might not be finite
_LAST = 2.5e11  # unix seconds; the year 9892, after which no calendar has a date
_CLOCK_SECONDS = 1.0  # two clocks under continuous correction may differ by less
LOST = "lost"  # the summary's activity for lost work: interrupted, failed or repeated
_JOULES_ARE = ["measured", "estimated"]
STATUSES = ("ok", "failed", "interrupted")


class _Line(TypedDict):
    """The keys of every line."""

    stage: str
    activity: str
    started: float
    """Unix seconds."""
    seconds: float
    """Time of its own, without the spans inside it."""
    device: str
    devices: int
    tokens_in: int
    tokens_out: int
    flops: int
    """Model FLOPs, see `cost.flops`."""
    joules: float
    joules_are: Literal["measured", "estimated"]
    usd: float
    usd_rate: float
    """Dollars for one device-hour."""
    rate_source: str
    status: Literal["ok", "failed", "interrupted"]
    attempt: int
    """1 for the first start of a run, one more each time it is continued."""
    step: int | None


class Line(_Line, total=False):
    """One span: what was done, for how long, on what, and what it cost."""

    usd_paid: float
    """Only where others were paid, as a judge's server: the part of `usd` that no second of this machine cost."""

    clock_jump: float
    """Only where the wall clock was set during the span: seconds by which it ran ahead (above 0: set forward,
    or the machine slept) or back of the steady clock that `seconds` is from."""


@dataclass
class Row:
    """The sum of some lines. `activity` is one of ACTIVITIES, or LOST."""

    stage: str
    activity: str
    seconds: float = 0.0
    device_hours: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    flops: int = 0
    joules: float = 0.0
    joules_are: Literal["measured", "estimated"] = "measured"
    """Estimated as soon as any part of it is."""
    usd: float = 0.0
    usd_paid: float = 0.0
    """The part of `usd` that was paid to others, as a judge's server."""

    def add(self, other: Row) -> None:
        for name in _ADDED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.joules_are == "estimated":
            self.joules_are = "estimated"


_ADDED = [f.name for f in fields(Row) if f.name not in ("stage", "activity", "joules_are")]


@dataclass(frozen=True)
class Rate:
    """Hourly rate that a device was booked at, and its source."""

    device: str
    devices: int
    usd: float
    source: str


@dataclass(frozen=True)
class Summary:
    """A ledger added up. The rows add up to the total."""

    rows: list[Row]
    """By stage in the order they came, in a stage by activity; lost work is a row at its end."""
    total: Row
    wall_seconds: float
    covered: float
    """Share of the wall clock that the ledger accounts for; 0 for an empty ledger."""
    interruptions: int
    """Attempts that were interrupted, failed, or had work repeated."""
    failed: bool
    """True if a lost line failed rather than being interrupted."""
    rates: list[Rate] = field(default_factory=list)

    def by_activity(self) -> list[Row]:
        """The rows with the stages taken together."""
        merged: dict[str, Row] = {}
        for row in self.rows:
            merged.setdefault(row.activity, Row("", row.activity)).add(row)
        return sorted(merged.values(), key=_order)


def read(path: Path) -> tuple[list[Line], int]:
    """The ledger's valid lines, and the number skipped as empty, torn or not a ledger line.

    A ledger that does not exist is empty.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    pieces = content.split(b"\n")
    if not pieces[-1]:
        pieces.pop()  # what follows the last line's end
    lines = [line for piece in pieces if (line := parse(piece)) is not None]
    return lines, len(pieces) - len(lines)


def parse(text: bytes) -> Line | None:
    """One line of the ledger, or None if it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return value if is_line(value) else None


def is_line(value: Any) -> bool:
    """Whether a JSON value has every key of a line, of the right type, finite and not negative."""
    if not isinstance(value, dict) or not value.keys() >= Line.__required_keys__:
        return False
    texts = all(_is_text(value[key]) for key in ("stage", "device", "rate_source", "activity", "status"))
    amounts = all(_is_amount(value[key]) for key in ("started", "seconds", "joules", "usd", "usd_rate"))
    counts = all(_is_count(value[key]) for key in ("devices", "tokens_in", "tokens_out", "flops", "attempt"))
    return (
        texts
        and amounts
        and counts
        and value["started"] <= _LAST
        and value["activity"] in ACTIVITIES
        and value["status"] in STATUSES
        and value["joules_are"] in _JOULES_ARE
        and (value["step"] is None or _is_count(value["step"]))
        and _is_finite(value.get("clock_jump", 0.0))
        and _is_amount(value.get("usd_paid", 0.0))
    )


def last_attempt(lines: Iterable[Line]) -> int:
    """The number of the latest attempt in the ledger, 0 when it is empty."""
    return max((line["attempt"] for line in lines), default=0)


def summarise(lines: Sequence[Line], wall_seconds: float | None = None) -> Summary:
    """Add a ledger up by stage and activity, with lost work in rows of its own.

    Lost is a line that did not end well, and a line of an earlier attempt with a step that a later attempt
    did again: the later one resumed from a checkpoint before it. `wall_seconds` is the run's wall clock if
    the caller knows it; otherwise it is that of each attempt, first start to last end, without the gaps
    between attempts when nothing ran.
    """
    rows: dict[tuple[str, str], Row] = {}
    lost_attempts: set[int] = set()
    rates: dict[Rate, None] = {}
    total = Row("", "total")
    stages: dict[str, int] = {}
    failed = False
    for line, is_lost in zip(lines, lost(lines), strict=True):
        stages.setdefault(line["stage"], len(stages))
        if is_lost:
            lost_attempts.add(line["attempt"])
            failed = failed or line["status"] == "failed"
        key = (line["stage"], LOST if is_lost else line["activity"])
        cost = cost_of(line)
        rows.setdefault(key, Row(*key)).add(cost)
        total.add(cost)
        rates[Rate(line["device"], line["devices"], line["usd_rate"], line["rate_source"])] = None
    wall = _wall_seconds(lines) if wall_seconds is None else wall_seconds
    return Summary(
        rows=sorted(rows.values(), key=lambda row: (stages[row.stage], _order(row))),
        total=total,
        wall_seconds=wall,
        covered=total.seconds / wall if wall > 0 else 0.0,
        interruptions=len(lost_attempts),
        failed=failed,
        rates=list(rates),
    )


def merge(summaries: Sequence[Summary]) -> Summary:
    """Merge several runs: add up their rows, totals and wall clocks."""
    rows: dict[tuple[str, str], Row] = {}
    total = Row("", "total")
    for summary in summaries:
        total.add(summary.total)
        for row in summary.rows:
            key = (row.stage, row.activity)
            rows.setdefault(key, Row(*key)).add(row)
    wall = sum(summary.wall_seconds for summary in summaries)
    rates = {rate: None for summary in summaries for rate in summary.rates}
    return Summary(
        rows=list(rows.values()),
        total=total,
        wall_seconds=wall,
        covered=total.seconds / wall if wall > 0 else 0.0,
        interruptions=sum(summary.interruptions for summary in summaries),
        failed=any(summary.failed for summary in summaries),
        rates=list(rates),
    )


def lost(lines: Sequence[Line]) -> list[bool]:
    """For each line of one run's ledger, whether its work was lost; see `summarise`."""
    redone_from = _redone_from(lines)
    return [_is_lost(line, redone_from) for line in lines]


def clock_jumps(lines: Sequence[Line]) -> list[int]:
    """Positions of the lines that show that the wall clock was set during the run.

    Seconds come from a clock that cannot be set, so durations and costs are right; only the times of day are wrong.
    Such a line has a `clock_jump`, or starts before the line above it although the lines between do not fill that
    time, as they would if it were a span around them.
    """
    jumps = []
    for place, line in enumerate(lines):
        jumped = "clock_jump" in line
        if not jumped and place:
            before = lines[place - 1]
            back = before["started"] + before["seconds"] - line["started"]
            if back > _CLOCK_SECONDS and line["started"] < before["started"]:
                jumped = _booked_since(lines, place) < back / 2
        if jumped:
            jumps.append(place)
    return jumps


def _booked_since(lines: Sequence[Line], place: int) -> float:
    """Seconds of a line and of those above it that began no earlier, in its attempt."""
    last, seconds = lines[place], 0.0
    for index in range(place, -1, -1):
        line = lines[index]
        if line["attempt"] != last["attempt"] or line["started"] < last["started"]:
            break
        seconds += line["seconds"]
    return seconds


def cost_of(line: Line) -> Row:
    """A line as a row of its own."""
    return Row(
        stage=line["stage"],
        activity=line["activity"],
        seconds=line["seconds"],
        device_hours=line["seconds"] * line["devices"] / 3600,
        tokens_in=line["tokens_in"],
        tokens_out=line["tokens_out"],
        flops=line["flops"],
        joules=line["joules"],
        joules_are=line["joules_are"],
        usd=line["usd"],
        usd_paid=line.get("usd_paid", 0.0),
    )


def _redone_from(lines: Iterable[Line]) -> Mapping[tuple[str, int], int]:
    """For a stage and an attempt, the smallest step of that stage in any later attempt."""
    first: dict[str, dict[int, int]] = defaultdict(dict)
    for line in lines:
        if line["step"] is not None:
            steps = first[line["stage"]]
            steps[line["attempt"]] = min(line["step"], steps.get(line["attempt"], line["step"]))
    redone: dict[tuple[str, int], int] = {}
    for stage, steps in first.items():
        smallest: int | None = None
        for attempt in sorted(steps, reverse=True):
            if smallest is not None:
                redone[stage, attempt] = smallest
            smallest = steps[attempt] if smallest is None else min(smallest, steps[attempt])
    return redone


def _is_lost(line: Line, redone_from: Mapping[tuple[str, int], int]) -> bool:
    if line["status"] != "ok":
        return True
    resumed = redone_from.get((line["stage"], line["attempt"]))
    return resumed is not None and line["step"] is not None and line["step"] >= resumed


def _wall_seconds(lines: Iterable[Line]) -> float:
    attempts: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        attempts[line["attempt"]].append(line)
    wall = 0.0
    for own in attempts.values():
        start = min(line["started"] for line in own)
        end = max(line["started"] + line["seconds"] for line in own)
        # Lines do not record their end; a span with others inside ends later than started + seconds.
        wall += max(end - start, sum(line["seconds"] for line in own))
    return wall


def _order(row: Row) -> int:
    return ACTIVITIES.index(row.activity) if row.activity in ACTIVITIES else len(ACTIVITIES)


def _is_text(value: Any) -> bool:
    """Whether it is text that can be written: JSON can hold half a character."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= _MOST


def _is_amount(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_amount(value)
