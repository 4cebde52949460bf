"""Documents from files and from the hub, one at a time; broken ones are reported by file and line.

A source is a .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet or .txt file, a folder of them, or a dataset on the hub
(`hf:owner/name`, streamed). Only the current row is in memory; a .txt file is one document.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from farthing.base.errors import UserError
from farthing.base.files import strange
from farthing.base.limits import named
from farthing.base.schema import given

Policy = Literal["skip", "stop"]
TABLES = (".json", ".csv", ".tsv")
"""Kinds that a folder often has beside its data, so a folder of other kinds is read without them."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", *TABLES)
_HUB = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<second>[\w.-]+)(?=:))?(?::(?P<split>[\w.]+))?"
)
_BATCH = 256  # rows of a parquet file held at once


@dataclass(frozen=True)
class Document:
    """A text and where it came from, as in "books.jsonl:12" (rows count from 1)."""

    text: str
    place: str


class Problems:
    """Policy for broken rows: report and go on (`skip`), or raise (`stop`)."""

    def __init__(self, policy: Policy, on_problem: Callable[[str], None]) -> None:
        if policy not in ("skip", "stop"):
            raise UserError(f"policy: there is no {policy!r}; choose skip or stop")
        self.policy = policy
        self.say = on_problem
        self.left_out = 0
        """Rows that cannot be used, so far."""
        self.first = ""
        """The sentence about the first of them."""
        self._other_ends: set[str] = set()

    def broken(self, place: str, what: str) -> None:
        """Report what cannot be used. Raises UserError under the policy `stop`."""
        if self.policy == "stop":
            raise UserError(f"{place}: {what}; fix it, or leave such rows out with policy: skip")
        self.leave_out(place, what)

    def leave_out(self, place: str, what: str) -> None:
        """Report what is not used, under either policy."""
        self.left_out += 1
        self.first = self.first or f"{place}: {what}"
        self.say(f"{place}: {what}; left out")

    def other_line_ends(self, place: str) -> None:
        r"""Report line ends other than \n, once per file."""
        file = place.rpartition(":")[0]
        if file not in self._other_ends:
            self._other_ends.add(file)
            self.say(f"{place}: has line ends other than \\n; in this file they are read as \\n")


def documents(
    source: str, *, field: str = "text", policy: Policy = "stop", on_problem: Callable[[str], None]
) -> Iterator[Document]:
    r"""The documents of a source, in order (a folder's files by name), line ends normalised to \n.

    A row that is no JSON object, a field that is missing or no text, an empty document and invalid UTF-8 are
    broken rows: `on_problem` gets one sentence each under `skip`, and `stop` raises at the first. Line ends
    other than \n are no error: they are reported once a file.

    Args:
        field: the row's key that holds the text.

    Raises:
        UserError: for a source that does not exist or holds no file of a known kind, and for a broken row
            under the policy `stop`; names file and line.
    """
    problems = Problems(policy, on_problem)
    for row, place in records(source, field, problems):
        text = row[field]
        if not isinstance(text, str):
            problems.broken(place, f"its {field!r} is {_kind(text)} where a text belongs")
            continue
        if not text.strip():
            problems.broken(place, "the document is empty")
            continue
        if not is_unicode(text):
            problems.broken(place, "its text holds half a character (a lone surrogate)")
            continue
        if "\r" in text:
            problems.other_line_ends(place)
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        yield Document(text, place)


def records(source: str, field: str | None, problems: Problems) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a source that have `field`, each with its place; a .txt file is one row, `{field: text}`.

    Args:
        field: a key or column that rows must have; None takes all rows, with all they hold.

    Raises UserError as `documents` does.
    """
    if source.startswith("hf:"):
        yield from _with_field(_hub_rows(source), field, problems)
        return
    for path, name in files(source):
        kind = next(suffix for suffix in SUFFIXES if path.name.endswith(suffix))
        try:
            if kind == ".txt":
                yield from _text_file(path, name, field or "text", problems)
            elif kind == ".parquet":
                yield from _parquet_rows(path, name, field, problems)
            elif kind == ".json":
                yield from _with_field(_json_file(path, name, problems), field, problems)
            elif kind in (".csv", ".tsv"):
                yield from _with_field(_csv_rows(path, name, problems), field, problems)
            else:
                yield from _with_field(_json_rows(path, name, problems), field, problems)
        except PermissionError:
            raise UserError(f"{path} is not readable; change its permissions") from None


def columns(source: str) -> list[str]:
    """The columns of a source's first row, to see what it holds; plain text has `text`.

    Raises UserError as `documents` does, and when there is no row.
    """
    if not source.startswith("hf:") and files(source)[0][0].name.endswith(".txt"):
        return ["text"]
    row, _ = next(records(source, None, Problems("stop", lambda _: None)), (None, source))
    if row is None:
        raise UserError(f"{source}: there is no row; give a file that has some")
    return list(row)


def files(source: str) -> list[tuple[Path, str]]:
    """Every file of a source, with the name it goes by in messages."""
    path = named(source)
    if what := strange(path):
        raise UserError(f"{source} is {what}; give a file, a folder of files or hf:owner/name")
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{source} is of no kind Farthing reads; give one of {', '.join(SUFFIXES)}")
        return [(path, path.name)]
    if not path.is_dir():
        raise UserError(f"{source} does not exist; give a file, a folder of files or hf:owner/name")
    inside = [(found, found.relative_to(path)) for found in sorted(path.rglob("*"))]
    listed = [
        (found, f"{path.name}/{name.as_posix()}")
        for found, name in inside
        if found.is_file() and found.name.endswith(SUFFIXES) and not any(p[0] == "." for p in name.parts)
    ]
    if any(not found.name.endswith(TABLES) for found, _ in listed):
        listed = [(found, name) for found, name in listed if not found.name.endswith(TABLES)]
    if not listed:
        raise UserError(f"{source} holds no file that Farthing reads; put {', '.join(SUFFIXES)} files in it")
    return listed


def _with_field(
    rows: Iterable[tuple[Any, str]], field: str | None, problems: Problems
) -> Iterator[tuple[dict[str, Any], str]]:
    for row, place in rows:
        if not isinstance(row, dict):
            problems.broken(place, f"the row is {_kind(row)} where a JSON object belongs")
        elif field is not None and field not in row:
            has = ", ".join(map(given, list(row)[:8])) + (", …" if len(row) > 8 else "")
            problems.broken(place, f"the row has no {field!r} (it has {has or 'nothing'})")
        else:
            yield row, place


def _json_rows(path: Path, name: str, problems: Problems) -> Iterator[tuple[Any, str]]:
    number = 0
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        # newline="" also ends a line at a lone \r, which inside a JSON text could only stand escaped
        with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(file, 1):
                place = f"{name}:{number}"
                if line.endswith(("\r\n", "\r")):
                    problems.other_line_ends(place)
                if not line.strip():
                    continue
                row = _parsed(line, place, problems)
                if row is _UNREADABLE:
                    continue
                yield row, place
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problems.broken(f"{name}:{number + 1}", f"the file cannot be decompressed any further ({error})")


_UNREADABLE = object()


def _parsed(line: str, place: str, problems: Problems) -> Any:
    """The JSON value of a line, or `_UNREADABLE` if it is none, which is reported."""
    if not is_unicode(line):
        problems.broken(place, "the line is not UTF-8")
        return _UNREADABLE
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        problems.broken(place, f"the line is not JSON ({error.msg} at character {error.pos + 1})")
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        problems.broken(place, f"the line is not JSON ({error})")
    return _UNREADABLE


def _json_file(path: Path, name: str, problems: Problems) -> Iterator[tuple[Any, str]]:
    """The rows of a .json file: a list of them, an object with one such list or with a list for each column, one
    object, or an object a line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        problems.broken(f"{name}:1", "the file is not UTF-8")
        return
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise UserError(f"{path} is not JSON ({error.msg} in line {error.lineno})") from None
        yield from _json_rows(path, name, problems)  # several values: an object a line
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    lists = [part for part in value.values() if _is_table(part)] if isinstance(value, dict) else []
    if isinstance(value, dict) and (columns := _columns(value)):
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    elif len(lists) == 1 and not _is_row(value):
        value = lists[0]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield row, f"{name}:{number}"


def _columns(value: dict[str, Any]) -> list[list[Any]]:
    """The columns of a table written by column, as lists or as pandas writes them ({"0": …, "1": …}); none if an object
    is no such table. A conversation, whose lists are all of objects, is a row."""
    columns = [
        list(part.values())
        if isinstance(part, dict) and list(part) == [str(n) for n in range(len(part))]
        else part
        for part in value.values()
    ]
    if not all(isinstance(column, list) and column for column in columns) or all(map(_is_table, columns)):
        return []
    return columns if len(set(map(len, columns))) == 1 else []


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_row(value: dict[str, Any]) -> bool:
    """Whether an object with one list of objects is a row itself: a conversation, whose turns say who speaks."""
    turns = next(part for part in value.values() if _is_table(part))
    return all({"role", "from"} & turn.keys() for turn in turns)


def _csv_rows(path: Path, name: str, problems: Problems) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a table with a header; a cell may hold line ends, and its place is the row's last line."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        file.seek(0)
        comma = max(
            ",;", key=lambda mark: _fields(first, mark)
        )  # half of Europe's spreadsheets write semicolons
        rows = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else comma, strict=True)
        header: list[str] | None = None
        while True:
            try:
                cells = next(rows, None)
            except csv.Error as error:
                problems.broken(f"{name}:{rows.line_num}", f"the row cannot be read ({error})")
                continue
            if cells is None:
                return
            place = f"{name}:{rows.line_num}"
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise UserError(f"{place}: two columns have the same name; rename one in the header")
            elif not cells:
                continue  # an empty line
            elif len(cells) != len(header):
                problems.broken(place, f"the row has {len(cells)} cells where the header has {len(header)}")
            elif not all(map(is_unicode, cells)):
                problems.broken(place, "the row is not UTF-8")
            else:
                yield dict(zip(header, cells, strict=True)), place


def _fields(line: str, mark: str) -> int:
    """Cells of a header with this mark between them; 0 if it cannot be read."""
    try:
        return len(next(csv.reader([line], delimiter=mark), []))
    except csv.Error:
        return 0


def _text_file(path: Path, name: str, field: str, problems: Problems) -> Iterator[tuple[dict[str, Any], str]]:
    data = path.read_bytes()
    try:
        yield {field: data.decode("utf-8-sig")}, f"{name}:1"
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", data[: error.start])) + 1
        problems.broken(f"{name}:{line}", "the line is not UTF-8")


def _parquet_rows(
    path: Path, name: str, field: str | None, problems: Problems
) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(f"{path} needs pyarrow to be read; pip install 'farthing[data]'") from None

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field is not None and field not in file.schema_arrow.names:
                has = ", ".join(map(repr, file.schema_arrow.names)) or "nothing"
                problems.broken(f"{name}:1", f"the file has no column {field!r} (it has {has})")
                return
            columns = None if field is None else [field]
            for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
                for at in range(batch.num_rows):
                    number += 1
                    try:
                        row = {
                            key: _without_gaps(column[at].as_py())
                            for key, column in zip(batch.schema.names, batch.columns, strict=True)
                        }
                    except UnicodeDecodeError:
                        problems.broken(f"{name}:{number}", "the text is not UTF-8")
                        continue
                    yield row, f"{name}:{number}"
    except (pyarrow.ArrowException, OSError) as error:
        what = " ".join(str(error).split())
        problems.broken(f"{name}:{number + 1}", f"the parquet file is damaged ({what})")


@dataclass(frozen=True)
class HubName:
    """A dataset on the hub, as `hf:owner/name[/config][@revision][:split]` or `hf:owner/name:config:split` names it."""

    name: str
    config: str | None
    revision: str | None
    split: str


def hub_name(source: str) -> HubName:
    """The parts of a hub source; the split is `train` unless named. Raises UserError if it names no dataset."""
    match = _HUB.fullmatch(source)
    if match is None or (match["config"] and match["second"]):
        raise UserError(f"{source} names no dataset; write hf:owner/name, hf:owner/name/config or …:split")
    config = match["config"] or match["second"]
    return HubName(match["name"], config, match["revision"], match["split"] or "train")


_pins: list[Callable[[str], str | None]] = []


@contextmanager
def pinned(revision: Callable[[str], str | None]) -> Iterator[None]:
    """While it lasts, a dataset of the hub is read at the revision that this gives its source, if it gives one."""
    _pins.append(revision)
    try:
        yield
    finally:
        _pins.pop()


def pinned_revision(source: str) -> str | None:
    """The revision at which a dataset of the hub is read; None for whatever is there."""
    return (_pins[-1](source) if _pins else None) or hub_name(source).revision


def said_by_hub(source: str) -> tuple[str | None, str | None]:
    """Revision and licence of a dataset on the hub; None where it cannot be asked, or does not say."""
    from huggingface_hub import HfApi

    name = hub_name(source)
    try:
        info = HfApi().dataset_info(name.name, revision=name.revision, timeout=10)
    except Exception:  # offline, or the library's errors, which share no base
        return name.revision, None
    licence = getattr(info.card_data, "license", None)
    return info.sha, ", ".join(licence) if isinstance(licence, list) else licence


def _hub_rows(source: str) -> Iterator[tuple[Any, str]]:
    """The rows of a dataset on the hub, streamed. Pictures, sounds and films stay the bytes they are."""
    name = hub_name(source)
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"{source} needs datasets to be read; pip install 'farthing[data]'") from None
    try:
        rows = datasets.load_dataset(
            name.name, name.config, split=name.split, revision=pinned_revision(source), streaming=True
        )
        rows = rows.decode(False) if rows.features else rows  # JSON files have none
        for number, row in enumerate(rows, 1):
            yield {key: _without_gaps(value) for key, value in row.items()}, f"{source}:{number}"
    except Exception as error:  # the library raises what its file systems and formats raise
        what = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source} cannot be read from the hub ({what}); check the name, or give a local file"
        ) from error


def _without_gaps(value: Any) -> Any:
    """A column's value without the keys that its objects lack: in a table all of them have every key, null or not."""
    if isinstance(value, dict):
        return {key: _without_gaps(part) for key, part in value.items() if part is not None}
    return [_without_gaps(part) for part in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text. Lone surrogates, which also stand for undecodable bytes, cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
