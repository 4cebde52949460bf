"""Rows of a table, whatever it is written in: JSON lines, JSON, CSV, parquet, a folder of them, or a hub's dataset.

A row comes out as plain JSON-like values. What has no place in JSON, such as the bytes of a picture, is left out of its
row, and the column is named once.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.limits import named
from farthing.base.schema import given
from farthing.data.text import Problems, hub_name, hub_rows, is_unicode, json_rows, kind_of

KINDS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
FORMS = f"a file ({', '.join(KINDS)}), a folder of such files, or hf:owner/name[/config][@revision][:split]"
Row = dict[str, Any]

_MOST_JSON = 10**9  # bytes of a .json file, which is read whole
_LONGEST_FIELD = 10**7  # characters in a field of a .csv
_BATCH = 256  # rows of a parquet file held at once
_DEEPEST = 50  # levels of lists and tables in a value


def files(source: str) -> list[tuple[Path, str]]:
    """Every file of a local source, with the name it goes by in messages; a folder's in order of name.

    Raises:
        UserError: for a path that does not exist, or holds nothing that is read here.
    """
    path = named(source)
    if path.is_file():
        if not path.name.endswith(KINDS):
            raise UserError(f"{source} is of no kind Farthing reads rows from; give {FORMS}")
        return [(path, path.name)]
    if not path.is_dir():
        raise UserError(f"{source} does not exist; give {FORMS}")
    inside = [(found, found.relative_to(path)) for found in sorted(path.rglob("*"))]
    found = [
        (file, f"{path.name}/{name.as_posix()}")
        for file, name in inside
        if file.is_file() and file.name.endswith(KINDS) and not any(part[0] == "." for part in name.parts)
    ]
    # beside tables of another kind, .json files describe them (dataset_infos.json)
    tables = [(file, name) for file, name in found if file.suffix != ".json"] or found
    if not tables:
        raise UserError(f"{source} holds no file with rows; put {', '.join(KINDS)} files in it")
    return tables


def check_source(source: str) -> None:
    """Refuse a source that cannot exist: without reading it, and for the hub by its form alone. Raises UserError."""
    if source.startswith("hf:"):
        hub_name(source)
    else:
        files(source)


def rows(source: str, problems: Problems, ignored: set[str]) -> Iterator[tuple[Row, str]]:
    """The rows of a source in order, each with its place, as in "questions.csv:12" (rows count from 1).

    Args:
        problems: gets what is no row.
        ignored: takes the columns that hold what JSON cannot.

    Raises:
        UserError: as `files`, and for a file or dataset that cannot be read at all.
    """
    found = hub_rows(source) if source.startswith("hf:") else _local(source, problems, ignored)
    for row, place in found:
        if not isinstance(row, dict):
            problems.broken(place, f"the row is {kind_of(row)} where a table of columns belongs")
            continue
        plain: Row = {}
        for column, value in row.items():
            try:
                plain[str(column)] = _plain(value, _DEEPEST)
            except TypeError:
                ignored.add(str(column))
        yield plain, place


def _local(source: str, problems: Problems, ignored: set[str]) -> Iterator[tuple[Any, str]]:
    for path, name in files(source):
        try:
            if path.suffix == ".parquet":
                yield from _parquet(path, name, problems, ignored)
            elif path.suffix in (".csv", ".tsv"):
                yield from _csv(path, name, problems)
            elif path.suffix == ".json":
                yield from _json(path, name, problems)
            else:
                yield from json_rows(path, name, problems)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}); give a readable file"
            ) from None


def _json(path: Path, name: str, problems: Problems) -> Iterator[tuple[Any, str]]:
    """A list of objects, {"data": [...]}, or JSON lines under the wrong name."""
    if path.stat().st_size > _MOST_JSON:
        raise UserError(
            f"{path} is larger than 1 GB, and JSON is read whole; write it as .jsonl, a row a line"
        )
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; write it as UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from json_rows(path, name, problems)
            return
        raise UserError(f"{path} is not JSON ({error.msg}, line {error.lineno}); mend it") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{path} is not JSON ({error}); mend it") from None
    listed = value.get("data") if isinstance(value, dict) and isinstance(value.get("data"), list) else value
    if not isinstance(listed, list):
        has = (
            f" (it has the keys {', '.join(map(given, list(value)[:8]))})" if isinstance(value, dict) else ""
        )
        raise UserError(f'{path} holds no list of rows{has}; write [{{…}}, …] or {{"data": [{{…}}, …]}}')
    yield from ((row, f"{name}:{number}") for number, row in enumerate(listed, 1))


def _csv(path: Path, name: str, problems: Problems) -> Iterator[tuple[Any, str]]:
    """The first line names the columns. A .csv may be written with semicolons, as spreadsheets in Europe do."""
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        mark = "\t" if path.suffix == ".tsv" else ";" if first.count(";") > first.count(",") else ","
        file.seek(0)
        lines = csv.reader(file, delimiter=mark)
        number = 0
        try:
            header = next(lines, [])
            if not all(header) or len(set(header)) != len(header) or not is_unicode("".join(header)):
                raise UserError(f"{path}: its first line must name every column, each once")
            for number, fields in enumerate(lines, 1):
                place = f"{name}:{number}"
                if not fields:
                    continue
                if len(fields) != len(header):
                    problems.broken(place, f"the row has {len(fields)} values for {len(header)} columns")
                elif not is_unicode("".join(fields)):
                    problems.broken(place, "the row is not UTF-8")
                else:
                    yield dict(zip(header, fields, strict=True)), place
        except csv.Error as error:
            problems.broken(f"{name}:{number + 1}", f"the file cannot be read any further ({error})")


def _parquet(path: Path, name: str, problems: Problems, ignored: set[str]) -> Iterator[tuple[Any, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(f"{path} needs pyarrow to be read; pip install 'farthing[data]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
            ignored.update(set(file.schema_arrow.names) - set(columns))
            for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
                for at in range(batch.num_rows):
                    number += 1
                    try:
                        row = {field: batch.column(field)[at].as_py() for field in columns}
                    except (UnicodeDecodeError, ValueError, OverflowError) as error:
                        problems.broken(f"{name}:{number}", f"the row cannot be read ({error})")
                        continue
                    yield row, f"{name}:{number}"
    except (pyarrow.ArrowException, OSError) as error:
        what = " ".join(str(error).split())
        problems.broken(f"{name}:{number + 1}", f"the parquet file is damaged ({what})")


def _holds_bytes(kind: Any) -> bool:
    """Whether a column's type has bytes anywhere in it, as that of a picture has."""
    import pyarrow.types as types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    inner = [kind.field(at).type for at in range(kind.num_fields)] if kind.num_fields else []
    return any(map(_holds_bytes, inner))


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
