"""The cost of several runs: their ledgers added up, and what was bought besides.

The honest price of a model includes the attempts that failed and what no clock sees: answers bought from an
API, data, storage, people. Those are entered by hand in `entries.jsonl`, one JSON object a line, each with
its source.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from farthing.base.errors import UserError
from farthing.base.figures import amount, hourly
from farthing.base.files import append_lines
from farthing.base.schema import Strict, checked, parse_value, read_yaml
from farthing.cost import devices, ledger
from farthing.cost.devices import Device, Price, peak
from farthing.cost.fields import MOST, Date, NotNegative, Positive, Text
from farthing.cost.ledger import Line, Row, Summary

ENTRIES = "entries.jsonl"
SERVING = "serving.jsonl"  # in a run's folder: what serving its model has cost


class Entry(Strict):
    """Something paid for that no span could measure."""

    kind: Literal["teacher", "data", "storage", "staff", "other"]
    what: Text
    source: Text
    """The source: an invoice, a price list with its date, or a guess marked as such."""
    date: Date
    usd: Positive | None = None
    tokens_in: NotNegative = 0.0
    tokens_out: NotNegative = 0.0
    usd_per_million_in: NotNegative = 0.0
    usd_per_million_out: NotNegative = 0.0
    gigabytes: NotNegative = 0.0
    months: NotNegative = 0.0
    usd_per_gb_month: NotNegative = 0.0

    @model_validator(mode="after")
    def _priced_once(self) -> Self:
        amounts = (self.tokens_cost > 0) + (self.storage_cost > 0) + (self.usd is not None)
        if amounts != 1:
            raise ValueError(
                "give usd, or tokens with usd_per_million_in and usd_per_million_out, "
                "or gigabytes, months and usd_per_gb_month, and only one of them"
            )
        return self

    @property
    def tokens_cost(self) -> float:
        return (self.tokens_in * self.usd_per_million_in + self.tokens_out * self.usd_per_million_out) / 1e6

    @property
    def storage_cost(self) -> float:
        return self.gigabytes * self.months * self.usd_per_gb_month

    @property
    def cost(self) -> float:
        """Dollars."""
        return self.usd if self.usd is not None else self.tokens_cost + self.storage_cost


@dataclass(frozen=True)
class Booked:
    """One run's ledger, and what was entered by hand beside it."""

    name: str
    lines: list[Line]
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Caveats for a reader of the sum: skipped lines, a clock that was set, spans left open."""
    served: list[Line] = field(default_factory=list)
    """What serving the run's model has cost since: no part of what the run has cost."""

    @property
    def summary(self) -> Summary:
        return ledger.summarise(self.lines)

    @property
    def entered(self) -> float:
        """Dollars of the entries."""
        return sum(entry.cost for entry in self.entries)


def read_run(run_dir: Path) -> Booked | None:
    """The ledger of a run directory (or a ledger itself); None where there is none.

    Nothing in it is changed: spans that a dead process left open are told of, and booked when the run is
    continued.
    """
    path = run_dir if run_dir.suffix == ".jsonl" else run_dir / "ledger.jsonl"
    folder = path.parent
    if not path.is_file():
        return None
    try:
        lines, skipped = ledger.read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    entries, bad = _read_entries(folder / ENTRIES)
    served, unread = _read_served(folder / SERVING, path)
    notes = []
    if skipped:
        notes.append(f"{_lines(skipped)} of {path.name} skipped: empty, torn or not a ledger's")
    if bad:
        notes.append(f"{_lines(bad)} of {ENTRIES} skipped: torn, or not an entry")
    if unread:
        notes.append(f"{_lines(unread)} of {SERVING} skipped: empty, torn or not a ledger's")
    if jumps := ledger.clock_jumps(lines):
        where = ", ".join(str(place + 1) for place in jumps[:5]) + (", …" if len(jumps) > 5 else "")
        notes.append(
            f"the wall clock was set while the run went on (line {where}); durations are from a clock that "
            "cannot be set, so no cost is wrong, but a day may be"
        )
    if seconds := _open_seconds(path.with_name(f"{path.stem}.open.json")):
        notes.append(
            f"{amount(seconds, 0)} s are open: the run goes on, or was killed; they are booked when it continues"
        )
    return Booked(str(run_dir) if run_dir.name else run_dir.resolve().name, lines, entries, notes, served)


def _read_served(path: Path, ledger_path: Path) -> tuple[list[Line], int]:
    """The books of serving beside a run's ledger, and the number of lines skipped."""
    if path == ledger_path:  # asked for as a ledger of its own
        return [], 0
    try:
        return ledger.read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def with_rates(booked: Sequence[Booked], rates: Rates) -> list[Booked]:
    """The same runs at other rates. Raises UserError for a rate of a device that none of them ran on."""
    devices = {line["device"] for run in booked for line in (*run.lines, *run.served)}
    for name in rates:
        if devices and not any(applies(name, device) for device in devices):
            ran = ", ".join(sorted(devices))
            raise UserError(f"no run here used {name}: a rate applies to what was used ({ran})")
    return [
        replace(run, lines=reprice(run.lines, rates), served=reprice(run.served, rates)) for run in booked
    ]


# ---- entries made by hand ----


def add_entry(run_dir: Path, data: Any) -> Entry:
    """Append an entry to a run's `entries.jsonl` and flush it to disk; its date defaults to today.

    Raises UserError when the data is no entry or the directory is no run's.
    """
    if not (run_dir / "ledger.jsonl").is_file():
        raise UserError(f"{run_dir} has no ledger to add to; give a run directory")
    if isinstance(data, dict):
        data = {"date": time.strftime("%Y-%m-%d"), **data}
    entry = checked(Entry, data, "--add")
    append_lines(run_dir / ENTRIES, [entry.model_dump(exclude_defaults=True)])
    return entry


def _read_entries(path: Path) -> tuple[list[Entry], int]:
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [], 0
    entries, bad = [], 0
    for text in texts:
        try:
            entries.append(checked(Entry, json.loads(text), ENTRIES))
        except (ValueError, RecursionError):  # a UserError is a ValueError
            bad += 1
    return entries, bad


def _open_seconds(path: Path) -> float:
    """Seconds of the spans that a heartbeat left open; 0 where none are."""
    try:
        lines = json.loads(path.read_bytes())["lines"]
        return sum(line["seconds"] for line in lines if ledger.is_line(line))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0.0


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"


# ---- adding up ----


def serving(booked: Sequence[Booked]) -> Summary:
    """What serving the models of all runs has cost; nothing runs between two servers, so no wall clock is covered."""
    return ledger.merge([ledger.summarise(run.served, wall_seconds=0.0) for run in booked])


_Key = Callable[[str, Line, bool], str]
_KEYS: Mapping[str, _Key] = {
    "activity": lambda run, line, lost: ledger.LOST if lost else line["activity"],
    "stage": lambda run, line, lost: line["stage"],
    "day": lambda run, line, lost: time.strftime("%Y-%m-%d", time.gmtime(line["started"])),
    "run": lambda run, line, lost: run,
    "device": lambda run, line, lost: line["device"],
}
KEYS = tuple(_KEYS)


def group(booked: Sequence[Booked], *by: str) -> dict[tuple[str, ...], Row]:
    """The lines of all runs added up by one or several of `KEYS`, in the order they come; days sorted.

    A day is that on which a line started, in UTC. Work that was thrown away is the activity `lost`.
    """
    rows: dict[tuple[str, ...], Row] = {}
    for run in booked:
        for line, lost in zip(run.lines, ledger.lost(run.lines), strict=True):
            key = tuple(_KEYS[name](run.name, line, lost) for name in by)
            rows.setdefault(key, Row("", key[-1])).add(ledger.cost_of(line))
    if by == ("activity",):
        order = (*ledger.ACTIVITIES, ledger.LOST)
        return dict(sorted(rows.items(), key=lambda item: order.index(item[0][0])))
    return dict(sorted(rows.items())) if by[0] == "day" else rows


def as_json(booked: Sequence[Booked]) -> dict[str, Any]:
    """Everything `farthing ledger` knows, as plain data; amounts in seconds, device-hours, joules, dollars."""
    total, served = ledger.merge([run.summary for run in booked]), serving(booked)
    entered = sum(run.entered for run in booked)
    return {
        "runs": [
            {
                "run": run.name,
                "lines": len(run.lines),
                "usd": run.summary.total.usd + run.entered,
                "wall_seconds": run.summary.wall_seconds,
                "covered": run.summary.covered,
                "attempts": ledger.last_attempt(run.lines),
                "interruptions": run.summary.interruptions,
                "usd_serving": sum(line["usd"] for line in run.served),
                "entries": [
                    {**entry.model_dump(exclude_defaults=True), "usd": entry.cost} for entry in run.entries
                ],
                "notes": run.notes,
            }
            for run in booked
        ],
        "by": {name: {key: amounts(row) for (key,), row in group(booked, name).items()} for name in KEYS},
        "total": amounts(total.total),
        "wall_seconds": total.wall_seconds,
        "covered": total.covered,
        "usd_measured": total.total.usd,
        "usd_entered": entered,
        "usd": total.total.usd + entered,
        "rates": [asdict(rate) for rate in total.rates],
        "serving": {
            **amounts(served.total),
            "by_activity": {row.activity: amounts(row) for row in served.by_activity()},
            "rates": [asdict(rate) for rate in served.rates],
        },
    }


def as_csv(booked: Sequence[Booked]) -> str:
    """A row for each run, day, stage, activity and device, and one for each entry, with a header."""
    names = ("run", "day", "stage", "activity", "device")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = list(amounts(Row("", "")))
    writer.writerow([*names, *columns, "source"])
    for key, row in group(booked, *names).items():
        writer.writerow([*(_cell(part) for part in key), *amounts(row).values(), ""])
    for run in booked:
        for entry in run.entries:
            bought = {"usd": entry.cost, "tokens_in": entry.tokens_in, "tokens_out": entry.tokens_out}
            cells = [bought.get(column) or "" for column in columns]
            key = (run.name, entry.date, "entered", entry.kind, entry.what)
            writer.writerow([*(_cell(part) for part in key), *cells, _cell(entry.source)])
    return out.getvalue()


def amounts(row: Row) -> dict[str, Any]:
    """The amounts of a row, without its keys."""
    return {name: value for name, value in asdict(row).items() if name not in ("stage", "activity")}


def _cell(text: str) -> str:
    """Text escaped so that a spreadsheet does not read it as a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


JOULES_PER_KWH = 3.6e6


class Owned(Strict):
    """A device that is yours: straight-line depreciation over the hours it works, and its electricity."""

    price: Positive
    """Dollars paid for one device, with its share of the machine around it."""
    years: Positive
    """Years until it is worth nothing."""
    hours_per_year: Annotated[float, Field(gt=0, le=8784)]
    """Hours of use; fewer hours make each dearer."""
    electricity: NotNegative
    """Dollars a kWh."""

    @property
    def wear(self) -> float:
        """Dollars of depreciation an hour: price / (years * hours_per_year)."""
        return self.price / (self.years * self.hours_per_year)

    def __str__(self) -> str:
        return (
            f"own hardware: ${self.price:g} over {self.years:g} years of {self.hours_per_year:g} h, "
            f"and electricity at ${self.electricity:g}/kWh"
        )


Rates = Mapping[str, float | Owned]


class _File(Strict):
    rates: dict[str, Positive | Owned]


def read_rates(path: Path, more: Sequence[str] = ()) -> dict[str, float | Owned]:
    """The rates in a YAML file. Raises UserError for a file that cannot be read and for a wrong key in it."""
    data = read_yaml(path)
    if isinstance(data, dict) and "stages" in data and "rates" in data:
        data = {"rates": data["rates"]}  # a recipe
    rates = dict(checked(_File, data, str(path)).rates)
    for name in rates:
        devices.find(name)
    return rates


def parse_prices(given: Iterable[str]) -> dict[str, float | Owned]:
    """`--price h100=2.5`: dollars an hour by device. Raises UserError for anything else."""
    prices: dict[str, float | Owned] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        usd = parse_value(value, "--price") if equals else None
        if not name or isinstance(usd, bool) or not isinstance(usd, int | float):
            raise UserError(f"--price {text}: write it as DEVICE=DOLLARS an hour, for example h100=2.50")
        if not 0 < usd <= MOST:
            raise UserError(f"--price {text}: an hour's price has to be a number above 0")
        devices.find(name)
        prices[name.strip()] = float(usd)
    return prices


def reprice(lines: Sequence[Line], rates: Rates) -> list[Line]:
    """The same lines at other rates; a line on a device that `rates` does not name stays as it is.

    An owned device costs its wear by the hour, and its electricity by the joules in the line. Those of a GPU
    line hold the host's processor too; see `cost.energy` for what is covered.
    """
    found = {device: _rate(device, rates) for device in {line["device"] for line in lines}}
    return [line if (rate := found[line["device"]]) is None else _priced(line, *rate) for line in lines]


def applies(key: str, device: str) -> bool:
    """True if a rate's key names a ledger line's device."""
    return devices.means(key, devices.named(device))


def _rate(name: str, rates: Rates) -> tuple[float | Owned, str] | None:
    """The most specific rate that names a device of the ledger."""
    fitting = [key for key in rates if applies(key, name)]
    if not fitting:
        return None
    rate = rates[max(fitting, key=len)]
    return rate, str(rate) if isinstance(rate, Owned) else "another rate, given by you"


def _priced(line: Line, rate: float | Owned, source: str) -> Line:
    hours = line["seconds"] * line["devices"] / 3600
    if isinstance(rate, Owned):
        electricity = line["joules"] / JOULES_PER_KWH * rate.electricity
        usd, hourly = hours * rate.wear + electricity, rate.wear
    else:
        usd, hourly = hours * rate, rate
    return {**line, "usd": usd + line.get("usd_paid", 0.0), "usd_rate": hourly, "rate_source": source}


SAME_SHARE = "An estimate, if each device reached the same share of its 16-bit peak"


AT_LEAST = "A lower bound, at the speed of the largest matrix products, which a small model does not reach"


@dataclass(frozen=True)
class Offer:
    """Cost of the run at another price."""

    device: str
    seconds: float
    low: float
    usual: float
    high: float
    source: str
    """Of the usual price."""
    assumption: str
    """Empty where nothing is assumed: the same device at another price."""


def other_prices(lines: Sequence[Line]) -> list[Offer]:
    """The lines on the devices they ran on, at every other price the catalogue has for those."""
    offers = []
    for name in dict.fromkeys(line["device"] for line in lines):
        own = [line for line in lines if line["device"] == name]
        device_hours = sum(line["seconds"] * line["devices"] for line in own) / 3600
        booked = {line["usd_rate"] for line in own}
        for price in devices.named(name).prices:
            if price.usd not in booked:
                usd = device_hours * price.usd + sum(line.get("usd_paid", 0.0) for line in own)
                seconds = sum(line["seconds"] for line in own)
                offers.append(Offer(name, seconds, usd, usd, usd, _said(price), ""))
    return offers


def other_hardware(lines: Sequence[Line]) -> list[Offer]:
    """The whole ledger on each other device of the catalogue that can be rented, cheapest first.

    Device for device: a run on 8 is put on 8. Empty for a ledger that did no work that was counted.
    """
    if not any(line["flops"] for line in lines):
        return []
    ran_on = {line["device"] for line in lines}
    own = {name: peak(devices.named(name)) for name in ran_on}
    known = all(own.values())
    offers = []
    for device in devices.catalogue():
        prices = [price for price in device.prices if "assum" not in price.kind]
        if device.kind != "gpu" or not prices or device.name in ran_on or not _speed(device):
            continue
        seconds, device_hours = 0.0, 0.0
        for line in lines:
            took = line["seconds"]
            if line["flops"] and known:
                took *= own[line["device"]] / peak(device)
            elif line["flops"]:
                took = line["flops"] / line["devices"] / _speed(device)
            seconds += took
            device_hours += took * line["devices"] / 3600
        paid = sum(line.get("usd_paid", 0.0) for line in lines)
        usd = [device_hours * price.usd + paid for price in prices]
        assumption = SAME_SHARE if known else AT_LEAST
        offers.append(Offer(device.name, seconds, min(usd), usd[0], max(usd), _said(prices[0]), assumption))
    return sorted(offers, key=lambda offer: offer.usual)


def _speed(device: Device) -> float:
    """FLOP/s of the best 16-bit product measured on the device, else its peak."""
    return device.measured_flops.get("bfloat16") or peak(device)


def _said(price: Price) -> str:
    return f"{hourly(price.usd)}, {price}"
