"""Compared learning curves in words, tables and drawings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from farthing.base import figures
from farthing.base.figures import bits
from farthing.report.charts import ticks

Json = Mapping[str, Any]

NAMES = {"flops": "FLOPs", "seconds": "seconds", "dollars": "dollars", "tokens": "tokens"}
VERDICTS = {
    "better": "Better than {}",
    "worse": "Worse than {}",
    "unclear": "Not clearly different from {}",
    "one seed": "Compared with {} on one seed only, so nothing is certain",
    "unpaired": "No seed in common with {}, so nothing is certain",
}
WIDTH, HEIGHT = 680, 400
LEFT, RIGHT, TOP, BOTTOM = 52, 178, 30, 46
_KEY = 21  # characters of a name that fit beside the drawing
_COLOURS = ("#211e1a", "#96471a", "#44678a", "#2d6a4f", "#7a4a86", "#8a7a2c")  # readable on the page's paper


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the row."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def amount(axis: str, value: float) -> str:
    """An amount on an axis, with its unit."""
    if axis == "flops":
        unit = figures.column(value, figures.COMPUTE)
        return f"{figures.significant(value / unit.size, 3)} {unit.unit}"
    if axis == "seconds":
        return f"{figures.significant(value, 3)} s" if value < 120 else figures.duration(value)
    return figures.money(value) if axis == "dollars" else f"{figures.short(value)} tokens"


def findings(found: Json) -> list[str]:
    """The findings, one sentence each."""
    sentences = [_finding(found, axis) for axis in found["equal"]]
    missing = [name for axis, name in NAMES.items() if axis not in found["equal"]]
    if missing:
        sentences.append(
            f"The curves have no {' and no '.join(missing)} in common, so none is compared; validate more often."
        )
    disturbed = [run["name"] for variant in found["variants"] for run in variant["runs"] if run["disturbed"]]
    if disturbed:
        sentences.append(
            f"Something else used the machine during {', '.join(disturbed)}: its seconds and dollars are too high."
        )
    sentences.append(
        "A verdict holds if the 95% interval of the paired differences over seeds leaves out zero; with a dozen "
        "comparisons, chance alone may make one look clear."
    )
    return sentences


def _finding(found: Json, axis: str) -> str:
    data, baseline = found["equal"][axis], found["baseline"]
    best = min(data["rows"], key=lambda row: row["mean"])
    sentence = (
        f"At equal {NAMES[axis]} ({amount(axis, data['amount'])}), {best['name']} is lowest with "
        f"{bits(best['mean'])} bits per byte."
    )
    for verdict, words in VERDICTS.items():
        rows = [row for row in data["rows"] if row.get("verdict") == verdict]
        if rows:
            listed = ", ".join(f"{row['name']} ({_signed(row['difference'])})" for row in rows)
            sentence += f" {words.format(baseline)}: {listed}."
    return sentence


def tables(found: Json) -> list[Table]:
    """The variants, the verdicts on all axes, and each axis in full."""
    return [_variants(found), _verdicts(found), *(_equal(found, axis) for axis in found["equal"])]


def _variants(found: Json) -> Table:
    rows = [
        [
            variant["name"],
            str(len(variant["runs"])),
            figures.count(variant["active"]),
            figures.count(variant["parameters"]),
            amount("flops", variant["flops_per_token"]),
            figures.count(variant["tokens_per_second"]),
            _bounds(variant["tokens_per_second_ci95"], figures.count),
        ]
        for variant in found["variants"]
    ]
    head = ["", "seeds", "active parameters", "parameters", "a token", "tokens/s", "95% interval"]
    return Table("What was trained", head, rows)


def _verdicts(found: Json) -> Table:
    equal = found["equal"]
    names = [row["name"] for data in equal.values() for row in data["rows"] if "verdict" in row]
    rows = []
    for name in dict.fromkeys(names):
        cells = [next(row for row in data["rows"] if row["name"] == name) for data in equal.values()]
        rows.append([name, *(f"{cell['verdict']} ({_signed(cell['difference'])})" for cell in cells)])
    head = ["", *(f"at equal {NAMES[axis]}" for axis in equal)]
    return Table(f"Against {found['baseline']}, in bits per byte", head, rows)


def _equal(found: Json, axis: str) -> Table:
    data, baseline = found["equal"][axis], found["baseline"]
    rows = [
        [
            row["name"],
            bits(row["mean"]),
            _bounds(row["ci95"], bits),
            _signed(row["difference"]) if "difference" in row else "",
            _bounds(row["difference_ci95"], _signed) if "difference" in row else "",
            row.get("verdict", "baseline"),
            f"{row['cost_ratio']:.2f}" if "cost_ratio" in row else "1",
            _crossing(row, axis),
        ]
        for row in data["rows"]
    ]
    head = ["", "bits per byte", "95% interval", f"minus {baseline}", "95% interval, paired", "verdict"]
    head += [f"{NAMES[axis]} to the same loss, {baseline} = 1", "mean curves last cross"]
    return Table(f"At equal {NAMES[axis]}: {amount(axis, data['amount'])}", head, rows)


def _crossing(row: Json, axis: str) -> str:
    if not row.get("crossings"):
        return "never" if "crossings" in row else ""
    last = row["crossings"][-1]
    return f"at {amount(axis, last['amount'])}, then {'ahead' if last['ahead_after'] else 'behind'}"


def markdown(found: Json) -> str:
    """The findings and the tables as Markdown."""
    parts = ["\n".join(f"- {sentence}" for sentence in findings(found))]
    for table in tables(found):
        rows = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append(f"**{table.caption}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def drawing(found: Json, axis: str) -> Markup:
    """The mean curve of every variant over an axis on a logarithmic scale, as an SVG that also stands alone."""
    data = found["equal"][axis]
    xs: Sequence[float] = data["curves"]["x"]
    lines: Mapping[str, Sequence[float]] = data["curves"]["bits"]
    every = [bits for line in lines.values() for bits in line]
    low, high = min(every), max(every)
    rows = ticks(low, high if high > low else low + 0.01, 5)
    span = math.log(xs[-1] / xs[0])

    def across(x: float) -> float:
        return round(LEFT + math.log(x / xs[0]) / span * (WIDTH - LEFT - RIGHT), 1)

    def up(bits: float) -> float:
        return round(HEIGHT - BOTTOM - (bits - rows[0]) / (rows[-1] - rows[0]) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}" '
            'font-family="Georgia,serif" font-size="13" fill="#675f54">'
        ).format(WIDTH, HEIGHT, _described(found, axis)),
        Markup('<rect width="100%" height="100%" fill="#fbf9f4"/>'),
        Markup('<text x="0" y="14">bits per byte of validation text</text>'),
        Markup('<text text-anchor="middle" x="{}" y="{}">{} of training, logarithmic</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, NAMES[axis]
        ),
    ]
    for row in rows:
        parts.append(
            Markup(
                '<line stroke="#dcd4c5" x1="{}" x2="{}" y1="{y}" y2="{y}"/>'
                '<text text-anchor="end" x="{}" y="{}">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, LEFT - 7, up(row) + 4, f"{row:.3g}", y=up(row))
        )
    for share in (0.1, 0.2, 0.5, 1.0):
        x = share * xs[-1]
        if x >= 0.999 * xs[0]:
            parts.append(
                Markup('<text text-anchor="middle" x="{}" y="{}">{}</text>').format(
                    across(max(x, xs[0])), HEIGHT - BOTTOM + 18, amount(axis, x)
                )
            )
    return Markup("").join([*parts, *_curves(lines, xs, across, up), Markup("</svg>")])


def _curves(
    lines: Mapping[str, Sequence[float]],
    xs: Sequence[float],
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> list[Markup]:
    """The lines, and a key beside them in the order in which they end."""
    names = list(lines)
    parts = []
    for place, name in enumerate(sorted(lines, key=lambda name: -lines[name][-1])):
        turn, colour = divmod(names.index(name), len(_COLOURS))
        points = " ".join(f"{across(x)},{up(y)}" for x, y in zip(xs, lines[name], strict=True))
        y = TOP + 10 + 20 * place
        style = Markup('fill="none" stroke-width="1.8" stroke="{}" stroke-dasharray="{}"').format(
            _COLOURS[colour], ("none", "5 4", "1 3")[turn % 3]
        )
        parts.append(
            Markup('<polyline {} points="{}"/><path {} d="M{} {}h22"/><text x="{}" y="{}">{}</text>').format(
                style, points, style, WIDTH - RIGHT + 8, y - 4, WIDTH - RIGHT + 34, y, _short(name)
            )
        )
    return parts


def _short(name: str) -> str:
    """A name that fits: its end, where long names differ."""
    return name if len(name) <= _KEY else f"…{name[1 - _KEY :]}"


def _described(found: Json, axis: str) -> str:
    """The drawing in words, for readers who cannot see it."""
    data = found["equal"][axis]
    ends = "; ".join(f"{row['name']} {row['mean']:.3f}" for row in data["rows"])
    return f"Bits per byte over {NAMES[axis]}. At {amount(axis, data['amount'])}: {ends}."


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", figures.MINUS)


def _bounds(pair: Sequence[float] | None, write: Callable[[float], str]) -> str:
    return f"{write(pair[0])} to {write(pair[1])}" if pair else figures.MISSING
