"""What a study found, in words and tables: the same for study.md and for the report's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farthing.base import figures

Json = Mapping[str, Any]

_FLOPS = [(1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP")]
NAMES = {"flops": "FLOPs", "seconds": "seconds", "dollars": "dollars", "tokens": "tokens"}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
VERDICTS = {
    "better": "Better than {} with the same optimizer",
    "worse": "Worse than {} with the same optimizer",
    "unclear": "Not clearly different from {}",
    "one seed": "Less {}, in the one seed",
}


@dataclass(frozen=True)
class Table:
    """A table of text: its caption, its head and its rows; the first column names the row."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def amount(axis: str, value: float) -> str:
    """An amount on one of a study's axes, with its unit."""
    if axis == "flops":
        size, unit = next(one for one in _FLOPS if value >= one[0] or one[0] == 1.0)
        return f"{figures.significant(value / size, 3)} {unit}"
    if axis == "seconds":
        return f"{figures.significant(value, 3)} s" if value < 120 else figures.duration(value)
    return figures.money(value) if axis == "dollars" else f"{figures.short(value)} tokens"


def tables(found: Json) -> list[Table]:
    """The verdicts in short, the variants, what each reached at equal amounts, and the single trainings."""
    equal = [_equal(found, axis) for axis in found["equal"]]
    return [_verdicts(found), _variants(found), *equal, _runs(found)]


def findings(found: Json) -> list[str]:
    """What the numbers say, a sentence each: who is ahead at equal FLOPs, seconds, dollars and tokens, and how
    surely; what the intervals are of; and whether the machine was disturbed."""
    said = [_finding(found, axis) for axis in found["equal"]]
    if found["seeds"] == 1:
        said.append("There is one seed, so nothing is known of chance: no difference here is sure.")
    return said + _notes(found)


def headline(found: Json) -> str:
    """Who won, in a sentence: at equal seconds, which is at equal dollars."""
    best = min(found["equal"]["seconds"]["rows"], key=lambda row: row["mean"])
    return f"In the same time and for the same money, {name(best)} learnt most: {_bits(best['mean'])} bits per byte."


def markdown(found: Json) -> str:
    """study.md: what it says first, then the tables."""
    parts = ["\n".join(f"- {sentence}" for sentence in findings(found))]
    for table in tables(found):
        rows = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append(f"**{table.caption}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def name(row: Json) -> str:
    """A variant as the tables call it."""
    return f"{row['family']}, {OPTIMIZERS[row['optimizer']]}"


def _verdicts(found: Json) -> Table:
    rows = []
    for place, row in enumerate(found["equal"]["tokens"]["rows"]):
        if "verdict" in row:
            cells = [found["equal"][axis]["rows"][place] for axis in found["equal"]]
            rows.append([name(row), *(f"{c['verdict']} ({_signed(c['difference'])})" for c in cells)])
    head = ["", *(f"at equal {NAMES[axis]}" for axis in found["equal"])]
    return Table(f"Against {found['reference']} with the same optimizer, in bits per byte", head, rows)


def _variants(found: Json) -> Table:
    rows = [
        [
            name(v),
            f"{v['active']:,}",
            f"{v['parameters']:,}" + (f" + {v['parameters_mtp']:,}" if v["parameters_mtp"] else ""),
            f"{v['lr']:.2g}",
            amount("flops", v["flops_per_token"]),
            figures.count(v["tokens_per_second"]),
            _bounds(v["tokens_per_second_ci95"], figures.count),
            amount("flops", v["flops_per_second"]),
            f"{v['cache_bytes_per_token']:,}",
        ]
        for v in found["variants"]
    ]
    head = ["", "active", "in all", "learning rate", "a token", "tokens/s", "95% interval", "a second"]
    return Table("What was trained", [*head, "cache, bytes a token"], rows)


def _equal(found: Json, axis: str) -> Table:
    rows = [
        [
            name(row),
            _bits(row["mean"]),
            _bounds(row["ci95"], _bits),
            _signed(row["difference"]) if "difference" in row else "",
            _bounds(row["difference_ci95"], _signed) if "difference" in row else "",
            row.get("verdict", "reference"),
            f"{row['cost_ratio']:.2f}" if "cost_ratio" in row else "1",
            _crossing(row, axis),
        ]
        for row in found["equal"][axis]["rows"]
    ]
    reference = found["reference"]
    head = ["", "bits per byte", "95% interval", f"less {reference}", "95% interval, paired", "verdict"]
    return Table(
        f"At equal {NAMES[axis]}: {amount(axis, found['equal'][axis]['amount'])}",
        [*head, f"{NAMES[axis]} to the same loss, {reference} = 1", "mean curves last cross"],
        rows,
    )


def _runs(found: Json) -> Table:
    ends: dict[str, float] = {}
    for row in found["equal"]["tokens"]["rows"]:
        variant = next(v for v in found["variants"] if name(v) == name(row))
        ends |= {run["name"]: bits for run, bits in zip(variant["runs"], row["values"], strict=True)}
    rows = [
        [
            run["name"],
            _bits(ends[run["name"]]),
            figures.count(run["tokens_per_second"]),
            f"{run['cores_had']:.2f}",
            f"{run['load_average']:.2f}",
            "yes" if run["disturbed"] else "",
        ]
        for v in found["variants"]
        for run in v["runs"]
    ]
    head = ["", "bits per byte", "tokens/s", "cores it had", "load at its end", "disturbed"]
    return Table("Each training, at its last equal token", head, rows)


def _finding(found: Json, axis: str) -> str:
    data, reference = found["equal"][axis], found["reference"]
    best = min(data["rows"], key=lambda row: row["mean"])
    said = (
        f"At equal {NAMES[axis]} ({amount(axis, data['amount'])}) the lowest is {name(best)}, with "
        f"{_bits(best['mean'])} bits per byte."
    )
    for verdict, words in VERDICTS.items():
        rows = [row for row in data["rows"] if row.get("verdict") == verdict]
        if rows:
            told = ", ".join(f"{name(row)} ({_signed(row['difference'])})" for row in rows)
            said += f" {words.format(reference)}: {told}."
    return said


def _crossing(row: Json, axis: str) -> str:
    if not row.get("crossings"):
        return "never" if "crossings" in row else ""
    last = row["crossings"][-1]
    return f"at {amount(axis, last['amount'])}, then {'ahead' if last['ahead_after'] else 'behind'}"


def _notes(found: Json) -> list[str]:
    one = found["variants"][0]
    notes = [
        f"Each network has {figures.plural(one['layers'], 'layer')} of width {one['width']} and learnt for "
        f"{figures.plural(one['steps'], 'step')} of {one['batch_tokens']:,} tokens. Active parameters are those a "
        "token passes through, embedding and head apart; prediction modules, which only training needs, stand after "
        "the +.",
        "Curves are compared over the last tenfold of each amount; before it they are as steep as each other.",
        "FLOPs are the networks' own: what Muon computes to orthogonalise its updates is in the seconds alone.",
        f"Dollars are seconds at ${found['usd_per_hour']:g} an hour ({found['rate_source']}), the same device for all: "
        "so they order the variants as seconds do.",
        "Verdicts go by the 95% interval of the paired differences over seeds, one comparison at a time; among a "
        "dozen, chance alone may make one look clear.",
    ]
    disturbed = [run["name"] for v in found["variants"] for run in v["runs"] if run["disturbed"]]
    if disturbed:
        notes.append(
            f"Something else was using the machine during {', '.join(disturbed)}: its seconds and dollars are too high."
        )
    return notes


def _bits(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", figures.MINUS)


def _bounds(pair: Sequence[float] | None, write: Callable[[float], str]) -> str:
    return f"{write(pair[0])} to {write(pair[1])}" if pair else figures.MISSING
