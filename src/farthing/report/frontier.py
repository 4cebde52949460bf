"""Cost against quality as an inline drawing: a dot and its 95% interval for each run, and the best for the money.

As in `charts`: labels are escaped, colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from farthing.report import charts, humane

WIDTH, HEIGHT = 680, 400
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 30, 46


@dataclass(frozen=True)
class Dot:
    """A run: what it cost, the share it gets right with its interval, and whether nothing beats it."""

    name: str
    usd: float
    share: float
    low: float
    high: float
    best: bool


def best_for_the_money(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (dollars, quality), whether no other is at least as good for no more money, and better in one."""
    return [
        not any(
            other[0] <= point[0] and other[1] >= point[1] and other != point for other in points
        )
        for point in points
    ]  # fmt: skip


def frontier(dots: Sequence[Dot]) -> Markup:
    """The drawing; dollars on a logarithmic axis."""
    assert dots, "nothing to draw"
    assert all(dot.usd > 0 for dot in dots), "a logarithmic axis has no zero"
    columns = _columns([dot.usd for dot in dots])
    rows = [
        row for row in charts.ticks(0.0, max(max(dot.high for dot in dots), 0.05), 5) if row <= 1.0 + 1e-9
    ]
    top = max(rows[-1], max(dot.high for dot in dots))

    def across(usd: float) -> float:
        low, high = math.log10(columns[0]), math.log10(columns[-1])
        return round(LEFT + (math.log10(usd) - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def up(share: float) -> float:
        return round(HEIGHT - BOTTOM - share / top * (HEIGHT - TOP - BOTTOM), 1)

    said = "; ".join(f"{dot.name}: {humane.money(dot.usd)}, {humane.percent(dot.share)}" for dot in dots)
    parts = [
        Markup(
            '<svg class="frontier" viewBox="0 0 {} {}" role="img" aria-label="Cost and accuracy. {}">'
        ).format(WIDTH, HEIGHT, said),
        Markup('<text class="axis" x="0" y="12">share of held-out questions right</text>'),
        Markup('<text class="axis middle" x="{}" y="{}">dollars, on a logarithmic scale</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4
        ),
    ]
    for row in rows:
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text class="tick end" x="{}" y="{}">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, LEFT - 8, up(row) + 4, humane.percent(row, 0), y=up(row))
        )
    for column in columns:
        parts.append(
            Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
                across(column), HEIGHT - BOTTOM + 18, humane.money(column)
            )
        )
    stairs = _stairs(dots, across, up)
    if stairs:
        parts.append(Markup('<polyline class="stairs" points="{}"/>').format(stairs))
    # Labels stand to the right of their dots, those of the dots on the right to the left.
    sides = [across(dot.usd) > WIDTH * 0.7 for dot in dots]
    labels = _spread([up(dot.share) + 4 for dot in dots], sides)
    for dot, left, y in zip(dots, sides, labels, strict=True):
        css, x = ("after" if dot.best else "before"), across(dot.usd)
        parts.append(
            Markup(
                '<line class="whisker {css}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>'
                '<circle class="fill {css}" cx="{x}" cy="{}" r="5.5"/>'
                '<text class="name {}" x="{}" y="{}">{}</text>'
            ).format(
                up(dot.low), up(dot.high), up(dot.share), "end" if left else "start",
                x - 12 if left else x + 12, y, dot.name, css=css, x=x,
            )
        )  # fmt: skip
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _columns(amounts: Sequence[float]) -> list[float]:
    """Round amounts (1, 2 or 5 times a power of ten, else powers) around the amounts, about seven at most."""
    low, high = min(amounts), max(amounts)
    if high / low < 1.5:  # one dot, or several in one place, stand in the middle
        low, high = low / 1.5, high * 1.5
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        marks = [factor * 10.0**power for power in powers for factor in factors]
        first = max(place for place, mark in enumerate(marks) if mark <= low)
        last = min(place for place, mark in enumerate(marks) if mark >= high)
        marks = marks[first : last + 1]
        if len(marks) <= 7:
            break
    stride = math.ceil((len(marks) - 1) / 6)
    extra = -(len(marks) - 1) % stride
    return [*marks, *(marks[-1] * 10.0 ** (step + 1) for step in range(extra))][::stride]


def _spread(heights: Sequence[float], sides: Sequence[bool], apart: float = 16.0) -> list[float]:
    """The heights moved down just so far that no two labels on the same side overlap."""
    placed = list(heights)
    last = {True: -math.inf, False: -math.inf}
    for place in sorted(range(len(heights)), key=lambda place: heights[place]):
        side = sides[place]
        last[side] = placed[place] = max(heights[place], last[side] + apart)
    return [round(height, 1) for height in placed]


def _stairs(dots: Sequence[Dot], across: Callable[[float], float], up: Callable[[float], float]) -> str:
    """The frontier: flat until the next better run, then up to it."""
    best = sorted((dot for dot in dots if dot.best), key=lambda dot: dot.usd)
    points: list[str] = []
    for before, after in zip([None, *best], best, strict=False):
        if before is not None:
            points.append(f"{across(after.usd)},{up(before.share)}")
        points.append(f"{across(after.usd)},{up(after.share)}")
    return " ".join(points) if len(best) > 1 else ""
