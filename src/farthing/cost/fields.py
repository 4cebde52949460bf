"""Types of the keys in claims, rates and entries of a bill."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated

from pydantic import AfterValidator, Field

from farthing.base.schema import given

# No payment or count lies outside these, and no sum of values inside overflows.
LEAST, MOST = 1e-6, 1e40


def _in_reach(number: float) -> float:
    if 0 < number < LEAST or number > MOST:
        raise ValueError(f"must be between {LEAST:g} and {MOST:g}, got {number:g}")
    return number


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_in_reach)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_in_reach)]
Text = Annotated[str, Field(min_length=1)]


def _date(text: str) -> str:
    if not re.fullmatch(r"[0-9]{4}(-[0-9]{2}(-[0-9]{2})?)?", text) or not _exists(text):
        raise ValueError(f"must be a date such as 2026-11-23, 2026-11 or 2026, got {given(text)}")
    return text


def _exists(text: str) -> bool:
    """Whether the calendar has this day, month or year."""
    try:
        date.fromisoformat(text + "-01-01"[len(text) - 4 :] if len(text) < 10 else text)
    except ValueError:
        return False
    return True


Date = Annotated[str, AfterValidator(_date)]
