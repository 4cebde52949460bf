"""Numbers as people write them: 8.2 min, 31.2%, $0.013, 1.5B, +17.4 points. The one place that formats them.

Every function takes a number and returns text; None and numbers that are not finite become an en dash, so a hole in a
file shows as a hole. Negative numbers carry a true minus sign.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from farthing.base.errors import UserError

Writer = Callable[[float | None], str]

MISSING = "–"
MINUS = "−"


def significant(value: float, digits: int = 2) -> str:
    """`value` with `digits` significant digits, in plain notation (never 1e-05), whole numbers kept whole."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    rounded = round(value, digits - 1 - exponent)
    exponent = math.floor(math.log10(abs(rounded)))  # 0.996 rounds up to 1.0
    decimals = max(0, digits - 1 - exponent)
    return f"{rounded:,.{decimals}f}".replace("-", MINUS)


def short(value: float | None) -> str:
    """A number for an axis or a table: at most three significant digits, a power of ten if very small."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return scientific(value)
    if abs(value) >= 1e4:
        return letters(float(f"{value:.3g}"))
    text = significant(value, 3)
    return text.rstrip("0").rstrip(".") if "." in text else text


def scientific(value: float | None, digits: int = 2) -> str:
    """2.4×10⁻⁶: for log-probability differences and learning rates."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = mantissa.replace("-", MINUS)
    return f"10{power}" if mantissa in ("1", "1.0") else f"{mantissa}×10{power}"


def duration(seconds: float | None) -> str:
    """0.4 s, 42 s, 8.2 min, 118 min, 3 h 12 min, 2 d 5 h; a dash for no time at all."""
    if seconds is None or not math.isfinite(seconds) or seconds <= 0:
        return MISSING
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s" if round(seconds, 1) > 0 else "<0.1 s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if round(minutes, 1) < 10:
        return f"{minutes:.1f} min"
    if round(minutes) < 120:
        return f"{minutes:.0f} min"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def percent(share: float | None, decimals: int = 1) -> str:
    """A share in [0, 1] as 31.2%."""
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{100 * share:.{decimals}f}%".replace("-", MINUS)


def points(difference: float | None, sign: bool = True) -> str:
    """A difference of shares in percentage points: +17.4, −2.0; an exact or rounded zero has no sign."""
    if difference is None or not math.isfinite(difference):
        return MISSING
    text = f"{100 * abs(difference):.1f}"
    if float(text) == 0:
        return "0.0"
    return (MINUS if difference < 0 else "+" if sign else "") + text


def interval(pair: tuple[float, float] | None, as_points: bool = False) -> str:
    """A 95% interval as '27.2% to 35.5%', or in points as '13.1 to 21.6'."""
    if pair is None:
        return MISSING
    low, high = pair
    if as_points:
        return f"{points(low, sign=False)} to {points(high, sign=False)}"
    return f"{percent(low)} to {percent(high)}"


def money(usd: float | None) -> str:
    """$1,234, $9.44, $0.013, $0.00042: a small sum keeps two significant digits and never shows as zero."""
    if usd is None or not math.isfinite(usd):
        return MISSING
    if usd < 0:
        return MINUS + money(-usd)
    if usd == 0:
        return "$0"
    if usd < 1e-6:
        return "under $0.000001"
    if usd < 0.995:
        return f"${significant(usd)}"
    return f"${usd:,.2f}" if usd < 1000 else f"${usd:,.0f}"


def bits(value: float | None) -> str:
    """Bits per byte: 1.234."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.3f}".replace("-", MINUS)


def count(value: float | None) -> str:
    """A number of questions or tries, whole: 4,210."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}".replace("-", MINUS)


def hourly(usd: float | None) -> str:
    """A rate in dollars an hour: $0.08/h, $2.95/h, $0.0042/h."""
    if usd is None or not math.isfinite(usd):
        return MISSING
    whole_cents = math.isclose(usd, round(usd, 2))
    return f"${usd:,.2f}/h" if whole_cents or usd >= 100 else f"${usd:.4g}/h"


def bytes_(value: float | None) -> str:
    """A size in bytes: 950 bytes, 12.3 kB, 192 MB, 6.53 GB."""
    if value is None or not math.isfinite(value):
        return MISSING
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} bytes"


COMPUTE = [(1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")]
ENERGY = [(3.6e9, "MWh"), (3.6e6, "kWh"), (3600.0, "Wh"), (3.6, "mWh")]  # in joules
DOLLARS = [(1.0, "$")]


@dataclass(frozen=True)
class Column:
    """Writes the amounts of one column of a table in one unit and with the same decimals, so they line up."""

    size: float
    unit: str
    decimals: int

    def __call__(self, value: float) -> str:
        return amount(value / self.size, self.decimals)


def column(total: float, units: list[tuple[float, str]], digits: int = 3, least: int = 0) -> Column:
    """The unit and decimals (`least` at least) in which a column's total has so many significant digits."""
    size, unit = next((one for one in units if abs(total) >= one[0]), units[-1])
    decimals = digits - 1 - math.floor(math.log10(abs(total) / size)) if total else 0
    return Column(size, unit, max(least, decimals))


def energy(joules: float) -> str:
    """Joules as 1.30 kWh, 3.88 Wh or 12.0 mWh."""
    unit = column(joules, ENERGY)
    return f"{unit(joules)} {unit.unit}"


def plural(number: int, noun: str) -> str:
    """1 question, 200 questions."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def letters(value: float | None, digits: int = 4) -> str:
    """Parameters, tokens and other large counts, rounded to so many digits: 950, 12.3K, 134.5M, 14.8T."""
    if value is None or not math.isfinite(value):
        return MISSING
    for unit, size in reversed(_UNITS.items()):
        if size > 1 and abs(value) >= (1 - 0.5 * 10**-digits) * size:
            return f"{_to(value / size, digits)}{unit}".replace("-", MINUS)
    return _to(value, digits).replace("-", MINUS)


def _to(value: float, digits: int) -> str:
    """A number below 10,000 with so many digits that are not zero: 1.5, 150."""
    return f"{float(f'{value:.{digits}g}'):.4g}"


def amount(value: float, decimals: int) -> str:
    """A number with so many decimals; one too small for them is not shown as zero."""
    if value <= 0:
        return MISSING
    shown = f"{value:.{decimals}f}"  # rounds a tie to the even digit: 0.5 to 0
    return shown if float(shown) > 0 else f"<{10.0**-decimals:.{decimals}f}"


_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


class Range(NamedTuple):
    """Low, likely and high."""

    low: float
    likely: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(*(value * factor for value in self))

    def as_json(self) -> dict[str, float]:
        return self._asdict()


def parse_amount(text: str | float, what: str, example: str = "14.8T, 300B or 1.5e13") -> float:
    """Parse a number as people write it: "14.8T", "300B", "1.5e13", 12000000. Raises UserError that names `what` and
    gives an example."""
    if isinstance(text, str):
        said = re.fullmatch(r"\s*([-+]?\d[\d_,]*\.?\d*(?:e[+-]?\d+)?)\s*([KMBT]?)\s*", text, re.IGNORECASE)
        if said is None:
            raise UserError(f"{what}: {text!r} is not an amount; write it as {example}")
        value = float(said[1].replace("_", "").replace(",", "")) * _UNITS[said[2].upper()]
    else:
        value = float(text)
    if not 0 < value < 1e30:
        raise UserError(f"{what}: {text} must be above 0 and below 1e30")
    return value


def exact(value: float) -> str:
    """2,788,000 or 14.8T: every digit up to a hundred million, letters beyond."""
    if value >= 1e8:
        return letters(value)
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.4g}"


def range_text(values: Range, write: Callable[[float], str] = lambda value: significant(value, 3)) -> str:
    """The likely value, and the low and high one in brackets."""
    return f"{write(values.likely)}  ({write(values.low)} to {write(values.high)})"
