"""The drawing of growth.json: two panels of lines on logarithmic axes, as SVG that follows the page into the dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, TOP, BOTTOM = 760, 400, 40, 340
PANELS = {"batch": (50, 300), "context": (350, 600)}
LABELS = {"batch": "sequences at once", "context": "tokens of context"}
KEY = 618  # where the names are
_LEAST = 15.0  # between two names
_STYLE = (
    ".growth{--a:#96471a;--b:#44678a;--c:#675f54;--i:#675f54;--g:#dcd4c5;background:#fbf9f4;font:13px Georgia,serif}"
    "@media(prefers-color-scheme:dark){.growth{--a:#e2986a;--b:#86a9c6;--c:#a69d8e;--i:#a69d8e;--g:#3a352d;"
    "background:#181613}}.growth text{fill:var(--i)}.growth .middle{text-anchor:middle}.growth .end{text-anchor:end}"
    ".growth line{stroke:var(--g)}.growth polyline{fill:none;stroke-width:2}.growth circle{stroke-dasharray:none}"
    ".growth .farthing{stroke:var(--a);fill:var(--a)}.growth .llama{stroke:var(--b);fill:var(--b)}"
    ".growth .transformers{stroke:var(--c);fill:var(--c)}.growth polyline.line{fill:none}"
    ".growth .d1{stroke-dasharray:6 3}.growth .d2{stroke-dasharray:2 3}.growth .d3{stroke-dasharray:8 3 2 3}"
)


def drawn(found: dict[str, Any]) -> str:
    """The points of `growth.json` as a whole SVG file."""
    sides = list(
        dict.fromkeys(side for axis in PANELS for point in found[axis] for side in point["tokens_per_s"])
    )
    values = [speed for axis in PANELS for point in found[axis] for speed in point["tokens_per_s"].values()]
    rows = _rows(min(values), max(values))
    low, high = rows[0], rows[-1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="growth" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(_told(found))}"><style>{_STYLE}</style>',
        f'<text x="0" y="14">decoded tokens a second, {escape(found["model"])}, {found["threads"]} threads</text>',
    ]

    def up(speed: float) -> float:
        return round(BOTTOM - math.log(speed / low) / math.log(high / low) * (BOTTOM - TOP), 1)

    for axis, (left, right) in PANELS.items():
        points = found[axis]
        least, most = points[0]["at"], max(points[-1]["at"], points[0]["at"] + 1)

        def across(
            at: float, left: int = left, right: int = right, least: int = least, most: int = most
        ) -> float:
            return round(left + math.log(at / least) / math.log(most / least) * (right - left), 1)

        for row in rows:
            parts.append(f'<line x1="{left}" x2="{right}" y1="{up(row)}" y2="{up(row)}"/>')
            parts.append(f'<text class="end" x="{left - 6}" y="{up(row) + 4}">{row:,}</text>')
        for point in points:
            parts.append(
                f'<text class="middle" x="{across(point["at"])}" y="{BOTTOM + 18}">{point["at"]:,}</text>'
            )
        parts.append(f'<text class="middle" x="{(left + right) / 2}" y="{BOTTOM + 42}">{LABELS[axis]}</text>')
        for side in sides:
            line = [
                (across(p["at"]), up(p["tokens_per_s"][side])) for p in points if side in p["tokens_per_s"]
            ]
            css = _css(side, sides)
            path = " ".join(f"{x},{y}" for x, y in line)
            parts.append(f'<polyline class="line {css}" points="{path}"/>')
            parts += [f'<circle class="{css.split()[0]}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in line]
    last = {side: point[side] for point in [p["tokens_per_s"] for p in found["context"]] for side in point}
    order = sorted(last, key=lambda side: -last[side])
    for side, y in zip(order, _apart([up(last[side]) for side in order]), strict=True):
        css = _css(side, sides)
        parts.append(f'<polyline class="line {css}" points="{KEY},{y} {KEY + 20},{y}"/>')
        parts.append(f'<text x="{KEY + 25}" y="{y + 4}">{escape(side)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _told(found: dict[str, Any]) -> str:
    """For readers who cannot see it: the ends of each panel's lines."""
    said = []
    for axis in PANELS:
        for point in (found[axis][0], found[axis][-1]):
            speeds = ", ".join(f"{side} {speed:g}" for side, speed in point["tokens_per_s"].items())
            said.append(f"{axis} {point['at']}: {speeds}")
    return "Decoded tokens a second. " + "; ".join(said) + "."


def _rows(least: float, most: float) -> list[int]:
    """1, 2 and 5 times powers of ten that enclose the values, of 1 and more."""
    rows = [step * 10**power for power in range(math.ceil(math.log10(most)) + 1) for step in (1, 2, 5)]
    first = max(place for place, row in enumerate(rows) if row <= least)
    last = next(place for place, row in enumerate(rows) if row >= most)
    return rows[first : max(last, first + 1) + 1]


def _css(side: str, sides: Sequence[str]) -> str:
    """A colour for each program, and a dash for each of its precisions."""
    program = side.split()[0]
    dash = [one for one in sides if one.split()[0] == program].index(side)
    return f"{'llama' if program == 'llama.cpp' else program.lower()} d{dash}"


def _apart(heights: list[float]) -> list[float]:
    """The heights of names, from the top, moved down where they would touch."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + _LEAST) if placed else height)
    return placed
