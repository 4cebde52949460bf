"""The report's drawings as inline SVG: curves over steps, stacked bars, intervals on a line.

Each function returns `Markup`; every label passes through `Markup.format`, which escapes it. Colours and
type come from the page's style sheet by class name, so a drawing follows the page into the dark and onto
paper. Curves are drawn in a fixed box that scales; bars and intervals are laid out in percent of the
width, so their text keeps its size on a phone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from farthing.base import figures

Point = tuple[float, float]


class Box(NamedTuple):
    """A drawing's size and the edges of its plot, in SVG units of about a pixel on the page."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    def x(self, share: float) -> float:
        """Horizontal place of a share in [0, 1] of the plot's width."""
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, share: float) -> float:
        """Vertical place of a share in [0, 1] of the plot's height, counted from below."""
        return round(self.bottom - share * (self.bottom - self.top), 1)


CURVE = Box(360, 208, left=46, right=350, top=26, bottom=172)
FRONTIER = Box(680, 400, left=52, right=656, top=30, bottom=354)
MOST_DOTS = 800  # more raw points than this are thinned evenly; the line is always computed from all of them


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from at or below `low` to at or above `high`."""
    assert high > low
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """Smoothed values, and the window they are smoothed over: about an eighth of them, at most 81.

    Each is the height of a straight line fitted to those around it, which in the middle is their mean and at
    the ends follows the trend, kept within the values it is fitted to.
    """
    half = min(len(values) // 16, 40)
    fitted = []
    for index in range(len(values)):
        first = max(0, index - half)
        window = values[first : index + half + 1]
        middle, mean = (len(window) - 1) / 2, sum(window) / len(window)
        spread = sum((place - middle) ** 2 for place in range(len(window)))
        tilt = sum((place - middle) * value for place, value in enumerate(window)) / spread if spread else 0.0
        height = mean + tilt * (index - first - middle)
        fitted.append(min(max(height, min(window)), max(window)))
    return fitted, 2 * half + 1


@dataclass(frozen=True)
class Line:
    """One curve: its points, its class in the style sheet and, where there are several, its name."""

    points: list[Point]
    css: str = "main"
    name: str = ""


def curve(
    lines: Sequence[Line],
    label: str,
    describe: str,
    value_text: Callable[[float], str] = figures.short,
    logarithmic: bool = False,
    limit: tuple[float, str] | None = None,
    ceiling: float | None = None,
) -> Markup:
    """Curves over steps: raw points as dots, a smoothed line, labelled axes.

    `label` names the vertical axis, `describe` is the text for readers who cannot see it, `limit` is a dashed
    horizontal line with its name, `ceiling` the largest possible value. A linear axis always holds zero.
    A logarithmic axis draws exact zeros on its floor, whose tick then reads 0.
    """
    everything = [point for line in lines for point in line.points]
    assert everything, "a curve needs a point"
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    marks = [*ys, limit[0]] if limit else ys
    has_zero = logarithmic and min(marks) <= 0
    rows = _log_rows(marks) if logarithmic else _linear_rows(marks, ceiling)
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (xs[0] - 0.5, xs[0] + 0.5)

    def across(x: float) -> float:
        return CURVE.x((x - x_low) / (x_high - x_low))

    def up(y: float) -> float:
        place = math.log10(max(y, rows[0])) if logarithmic else y
        low, high = (math.log10(rows[0]), math.log10(rows[-1])) if logarithmic else (rows[0], rows[-1])
        return CURVE.y((place - low) / (high - low))

    parts = [
        Markup('<svg class="curve" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            CURVE.width, CURVE.height, describe
        ),
        Markup('<text class="axis" x="0" y="11">{}</text>').format(label),
    ]
    for index, row in enumerate(rows):
        text = (
            "0" if has_zero and index == 0 else figures.scientific(row, 1) if logarithmic else value_text(row)
        )
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(
                CURVE.left, CURVE.right, y=up(row)
            )
        )
        parts.append(
            Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(
                CURVE.left - 7, up(row) + 3.5, text
            )
        )
    whole = sorted({round(x) for x in ticks(x_low, x_high, 5) if x_low <= round(x) <= x_high})
    for x in whole:
        parts.append(
            Markup('<text class="tick middle" x="{}" y="{}">{:,}</text>').format(
                across(x), CURVE.bottom + 15, x
            )
        )
    parts.append(
        Markup('<text class="axis middle" x="{}" y="{}">step</text>').format(
            round((CURVE.left + CURVE.right) / 2, 1), CURVE.height - 4
        )
    )
    if limit:
        parts.append(
            Markup(
                '<line class="limit" x1="{}" x2="{}" y1="{y}" y2="{y}"/>'
                '<text class="tick end" x="{}" y="{}">{}</text>'
            ).format(
                CURVE.left,
                CURVE.right,
                CURVE.right,
                up(limit[0]) - 4,
                limit[1],
                y=up(limit[0]),
            )
        )
    for line in lines:
        parts.append(_draw(line, across, up))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _linear_rows(marks: list[float], ceiling: float | None) -> list[float]:
    low, high = min(0.0, *marks), max(0.0, *marks)
    if high == low:
        high = low + (ceiling or 1.0)
    rows = ticks(low, high)
    return [row for row in rows if ceiling is None or high > ceiling or row <= ceiling + 1e-9]


def _log_rows(marks: list[float]) -> list[float]:
    positive = [value for value in marks if value > 0] or [1e-9]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    low -= min(marks) <= 0  # a floor of its own for the zeros
    high = max(high, low + 1)
    stride = math.ceil((high - low) / 5)
    return [10.0**power for power in range(low, high + stride, stride)]


def _draw(line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> Markup:
    points = sorted(line.points)
    stride = math.ceil(len(points) / MOST_DOTS)
    dots = " ".join(f"M{across(x)} {up(y)}h0" for x, y in points[::stride])
    heights, _ = smooth([up(y) for _, y in points])  # as drawn, so that a logarithmic axis smooths ratios
    path = " ".join(f"{across(x)},{round(y, 1)}" for (x, _), y in zip(points, heights, strict=True))
    return Markup('<path class="dots {css}" d="{}"/><polyline class="line {css}" points="{}"/>').format(
        dots, path, css=line.css
    )


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar: its share of the whole in [0, 1], its class and what it says."""

    share: float
    css: str
    name: str
    text: str


def stacked(segments: Sequence[Segment], describe: str) -> Markup:
    """One horizontal bar of parts; parts too narrow for their text go without (a table repeats the numbers)."""
    parts = [Markup('<svg class="bar" role="img" aria-label="{}">').format(describe)]
    at = 0.0
    for segment in segments:
        if segment.share <= 0:
            continue
        parts.append(
            Markup(
                '<rect class="fill {}" x="{}%" width="{}%" height="100%"><title>{}: {}</title></rect>'
            ).format(
                segment.css, round(100 * at, 3), round(100 * segment.share, 3), segment.name, segment.text
            )
        )
        if segment.share >= 0.021 * (len(segment.text) + 2):  # about 6 px a letter on a bar of 290 px
            parts.append(
                Markup('<text class="on {}" x="{}%" y="50%" dy="0.36em">{}</text>').format(
                    segment.css, round(100 * (at + segment.share / 2), 3), segment.text
                )
            )
        at += segment.share
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


@dataclass(frozen=True)
class Estimate:
    """A share in [0, 1] with its 95% interval."""

    name: str
    value: float
    low: float
    high: float
    css: str


def intervals(rows: Sequence[Estimate], describe: str) -> Markup:
    """Estimates with their 95% intervals, one under the other on a common axis in percent."""
    assert rows, "nothing to draw"
    marks = [
        mark
        for mark in ticks(0.0, max(max(row.high, row.value, 0.05) for row in rows), 5)
        if mark <= 1.0 + 1e-9
    ]
    full = max(marks[-1], max(max(row.high, row.value) for row in rows))

    def across(share: float) -> float:
        return round(4 + 91 * share / full, 2)  # margins keep the outer labels inside

    height = 46 * len(rows) + 26
    parts = [
        Markup('<svg class="intervals" height="{}" role="img" aria-label="{}">').format(height, describe)
    ]
    for mark in marks:
        parts.append(
            Markup(
                '<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="{}"/>'
                '<text class="tick middle" x="{x}%" y="{}">{}</text>'
            ).format(height - 20, height - 5, figures.percent(mark, 0), x=across(mark))
        )
    for index, row in enumerate(rows):
        y = 46 * index + 32
        parts.append(
            Markup(
                '<line class="whisker {css}" x1="{}%" x2="{}%" y1="{y}" y2="{y}"/>'
                '<circle class="fill {css}" cx="{at}%" cy="{y}" r="5.5"/>'
                '<text class="name {}" x="{at}%" y="{}">{} {}</text>'
            ).format(
                across(row.low), across(row.high), _anchor(across(row.value)), y - 12, row.name,
                figures.percent(row.value), css=row.css, y=y, at=across(row.value),
            )
        )  # fmt: skip
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _anchor(percent: float) -> str:
    return "start" if percent < 20 else "end" if percent > 80 else "middle"


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
    """True for each (dollars, quality) that no other beats, being as good and as cheap and better in one. No quality at
    all is worth no money."""
    return [
        point[1] > 0 and not any(
            other[0] <= point[0] and other[1] >= point[1] and other != point for other in points
        )
        for point in points
    ]  # fmt: skip


def frontier(dots: Sequence[Dot]) -> Markup:
    """The drawing; dollars on a logarithmic axis."""
    assert dots, "nothing to draw"
    assert all(dot.usd > 0 for dot in dots), "a logarithmic axis has no zero"
    columns = _columns([dot.usd for dot in dots])
    rows = [row for row in ticks(0.0, max(max(dot.high for dot in dots), 0.05), 5) if row <= 1.0 + 1e-9]
    top = max(rows[-1], max(dot.high for dot in dots))

    def across(usd: float) -> float:
        low, high = math.log10(columns[0]), math.log10(columns[-1])
        return FRONTIER.x((math.log10(usd) - low) / (high - low))

    def up(share: float) -> float:
        return FRONTIER.y(share / top)

    said = "; ".join(f"{dot.name}: {figures.money(dot.usd)}, {figures.percent(dot.share)}" for dot in dots)
    parts = [
        Markup(
            '<svg class="frontier" viewBox="0 0 {} {}" role="img" aria-label="Cost and accuracy. {}">'
        ).format(FRONTIER.width, FRONTIER.height, said),
        Markup('<text class="axis" x="0" y="12">share of held-out questions right</text>'),
        Markup('<text class="axis middle" x="{}" y="{}">dollars, on a logarithmic scale</text>').format(
            (FRONTIER.left + FRONTIER.right) / 2, FRONTIER.height - 4
        ),
    ]
    for row in rows:
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text class="tick end" x="{}" y="{}">{}</text>'
            ).format(
                FRONTIER.left,
                FRONTIER.right,
                FRONTIER.left - 8,
                up(row) + 4,
                figures.percent(row, 0),
                y=up(row),
            )
        )
    for column in columns:
        parts.append(
            Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
                across(column), FRONTIER.bottom + 18, figures.money(column)
            )
        )
    stairs = _stairs(dots, across, up)
    if stairs:
        parts.append(Markup('<polyline class="stairs" points="{}"/>').format(stairs))
    # Labels stand to the right of their dots, those of the dots on the right to the left.
    sides = [across(dot.usd) > FRONTIER.width * 0.7 for dot in dots]
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


def _spread(heights: Sequence[float], sides: Sequence[bool], gap: float = 16.0) -> list[float]:
    """Heights moved down just enough that no two labels on the same side overlap."""
    placed = list(heights)
    last = {True: -math.inf, False: -math.inf}
    for place in sorted(range(len(heights)), key=lambda place: heights[place]):
        side = sides[place]
        last[side] = placed[place] = max(heights[place], last[side] + gap)
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
