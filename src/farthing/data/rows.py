"""Rows of a table as plain JSON-like values, for questions.

What has no place in JSON, such as the bytes of a picture, is left out of its row, and the column is named once.
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterator
from typing import Any

from farthing.data.text import SUFFIXES, Problems, files, hub_name, is_unicode, records

FORMS = (
    f"a file ({', '.join(SUFFIXES)}), a folder of such files, or hf:owner/name[/config][@revision][:split]"
)
Row = dict[str, Any]

_DEEPEST = 50  # levels of lists and tables in a value


def check_source(source: str) -> None:
    """Refuse a source that cannot exist: without reading it, and for the hub by its form alone. Raises UserError."""
    if source.startswith("hf:"):
        hub_name(source)
    else:
        files(source)


def rows(source: str, problems: Problems, ignored: set[str]) -> Iterator[tuple[Row, str]]:
    """The rows of a source in order, each with its place, as in "questions.csv:12".

    Args:
        problems: gets what is no row.
        ignored: takes the columns that hold what JSON cannot.

    Raises:
        UserError: as `records`.
    """
    for row, place in records(source, None, problems):
        plain: Row = {}
        for column, value in row.items():
            try:
                plain[str(column)] = _plain(value, _DEEPEST)
            except TypeError:
                ignored.add(str(column))
        yield plain, place


def _plain(value: Any, levels: int) -> Any:
    """A value as JSON has them; NaN is null. Raises TypeError for what JSON has no form for, and half a character."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        if not is_unicode(value):
            raise TypeError
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if levels and isinstance(value, list | tuple):
        return [_plain(item, levels - 1) for item in value]
    if levels and isinstance(value, dict):
        if not all(isinstance(key, str) and is_unicode(key) for key in value):
            raise TypeError
        return {key: _plain(item, levels - 1) for key, item in value.items()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy's
        return _plain(value.tolist(), levels)
    raise TypeError
