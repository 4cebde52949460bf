"""A study's curves as SVG: bits per byte over FLOPs or seconds, a line for each variant's mean.

The drawing carries its own colours, since it stands in the report's page as well as alone, as a file. Only the last
tenfold of the axis is drawn: before it, every curve is as steep as the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from farthing.report.charts import ticks
from farthing.report.study_text import NAMES, OPTIMIZERS, amount

WIDTH, HEIGHT = 680, 400
LEFT, RIGHT, TOP, BOTTOM = 52, 178, 30, 46
_STYLE = Markup(
    "<style>"
    ".study{--a:#211e1a;--b:#96471a;--c:#44678a;--d:#2d6a4f;--i:#675f54;--g:#dcd4c5;background:#fbf9f4;"
    "font:13px Georgia,serif}"
    "@media(prefers-color-scheme:dark){.study{--a:#ebe5d9;--b:#e2986a;--c:#86a9c6;--d:#74bd98;--i:#a69d8e;"
    "--g:#3a352d;background:#181613}}"
    ".study text{fill:var(--i)}.study .middle{text-anchor:middle}.study .end{text-anchor:end}"
    ".study line{stroke:var(--g)}.study .v{fill:none;stroke-width:1.8}"
    ".study .adamw{stroke-dasharray:5 4}"
    ".study .f0{stroke:var(--a)}.study .f1{stroke:var(--b)}.study .f2{stroke:var(--c)}.study .f3{stroke:var(--d)}"
    "</style>"
)


def drawing(found: Mapping[str, Any], axis: str) -> Markup:
    """The mean curves of every variant over an axis of study.json, which is logarithmic."""
    xs: Sequence[float] = found["equal"][axis]["curves"]["x"]
    lines = [(line, line["bits"]) for line in found["equal"][axis]["curves"]["lines"]]
    every = [bits for _, some in lines for bits in some]
    low, high = min(every), max(every)
    rows = ticks(low, high if high > low else low + 0.01, 5)
    span = math.log(xs[-1] / xs[0])

    def across(x: float) -> float:
        return round(LEFT + math.log(x / xs[0]) / span * (WIDTH - LEFT - RIGHT), 1)

    def up(bits: float) -> float:
        return round(HEIGHT - BOTTOM - (bits - rows[0]) / (rows[-1] - rows[0]) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" class="study" viewBox="0 0 {} {}" role="img" aria-label="{}">'
        ).format(WIDTH, HEIGHT, _described(found, axis)),
        _STYLE,
        Markup('<text x="0" y="14">bits per byte of text kept apart</text>'),
        Markup('<text class="middle" x="{}" y="{}">{} of training, on a logarithmic scale</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, NAMES[axis]
        ),
    ]
    for row in rows:
        parts.append(
            Markup(
                '<line x1="{}" x2="{}" y1="{y}" y2="{y}"/><text class="end" x="{}" y="{}">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, LEFT - 7, up(row) + 4, f"{row:.3g}", y=up(row))
        )
    for share in (0.1, 0.2, 0.5, 1.0):
        x = share * xs[-1]
        parts.append(
            Markup('<text class="middle" x="{}" y="{}">{}</text>').format(
                across(x), HEIGHT - BOTTOM + 18, amount(axis, x)
            )
        )
    parts += _curves(lines, xs, across, up)
    return Markup("").join([*parts, Markup("</svg>")])


def _curves(
    lines: Sequence[tuple[Mapping[str, Any], Sequence[float]]],
    xs: Sequence[float],
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> list[Markup]:
    """The lines, and beside them a key in the order in which they end."""
    families = list(dict.fromkeys(line["family"] for line, _ in lines))
    parts = []
    ranked = sorted(lines, key=lambda one: -one[1][-1])
    for place, (line, bits) in enumerate(ranked):
        css = f"v f{families.index(line['family'])} {line['optimizer']}"
        points = " ".join(f"{across(x)},{up(y)}" for x, y in zip(xs, bits, strict=True))
        y = TOP + 10 + 20 * place
        parts.append(
            Markup(
                '<polyline class="{css}" points="{}"/><path class="{css}" d="M{} {}h22"/><text x="{}" y="{}">{}</text>'
            ).format(
                points,
                WIDTH - RIGHT + 8,
                y - 4,
                WIDTH - RIGHT + 34,
                y,
                f"{line['family']}, {OPTIMIZERS[line['optimizer']]}",
                css=css,
            )
        )
    return parts


def _described(found: Mapping[str, Any], axis: str) -> str:
    """For who cannot see it."""
    ends = [
        f"{row['family']} with {OPTIMIZERS[row['optimizer']]} {row['mean']:.3f}"
        for row in found["equal"][axis]["rows"]
    ]
    at = amount(axis, found["equal"][axis]["amount"])
    return f"Bits per byte over {NAMES[axis]}. At {at}: {'; '.join(ends)}."
