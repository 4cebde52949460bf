"""Rows of data as questions: read once, each question kept once, in the order of a hash of its words.

That order does not depend on the file's: a shuffled file gives the same questions in the same order, and in one that
has grown the old ones keep theirs. The rows lie in a temporary file; a million of them take some 120 MB of memory while
they are read, and 35 afterwards.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from farthing.base.errors import UserError
from farthing.base.figures import plural
from farthing.data.left_out import LeftOut
from farthing.data.rows import Row, rows
from farthing.data.text import Problems, files, pinned_revision
from farthing.data.words import question_key
from farthing.recipe import Gold
from farthing.tasks.columns import Asked, Unusable, reading

MOST = 10_000_000  # rows of a source
SAMPLE = 100  # rows by which columns are found
_KEPT = 64  # tables kept for the next that asks; a run makes its mixtures several times


@dataclass(frozen=True)
class Columns:
    """What is asked for by name; None is found by the names in use."""

    question: str | None = None
    answer: Gold | None = None
    choices: str | None = None
    needs_answer: bool = True


class Table:
    """The questions of a source; made by `table`."""

    def __init__(
        self, source: str, columns: Columns, prepare: Callable[[Row], Row] | None, where: str
    ) -> None:
        self.source = source
        self.said: list[str] = []
        """What there is to say about rows and columns that are not used."""
        self._prepare = prepare
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the table)
        self._starts = array("q", [0])
        keys = array("Q")
        self._digest = hashlib.sha256()
        ignored: set[str] = set()
        with LeftOut(None, self.said.append) as left_out:
            problems = Problems("skip", left_out)
            found = self._rows(rows(source, problems, ignored), problems)
            first = list(itertools.islice(found, SAMPLE))
            if not first:
                raise UserError(f"{where}: {source} has no rows{_because(problems)}; give a file that has")
            self.reading = reading(
                columns.question, columns.answer, columns.choices, [row for row, _ in first], where,
                columns.needs_answer,
            )  # fmt: skip
            repeated = self._fill(itertools.chain(first, found), keys, problems)
        unusable = problems.left_out - repeated
        if unusable > len(keys):
            raise UserError(
                f"{where}: {unusable:,} of the {unusable + len(keys):,} rows of {source} cannot be used"
                f"{_because(problems)}; name other columns, or mend the rows"
            )
        lost = sorted(ignored)
        if lost:
            shown = ", ".join(lost)
            self.said.append(
                f"{source}: {plural(len(lost), 'column')} without text or numbers ignored: {shown}"
            )
        self.said = [f"{where}: {line}" if not line.startswith("  ") else line for line in self.said]
        self._file.flush()
        self.order = array("q", sorted(range(len(keys)), key=keys.__getitem__))
        """Numbers of the rows, by the hash of what they ask."""

    def __len__(self) -> int:
        return len(self.order)

    @property
    def sha256(self) -> str:
        """Digest of the rows that are used."""
        return self._digest.hexdigest()

    def row(self, number: int) -> Row:
        """A row by its number in the file, counted among those that are used."""
        return self.placed(number)[1]

    def placed(self, number: int) -> tuple[str, Row]:
        """Where a row stands, as in "questions.jsonl:12", and the row."""
        start, end = self._starts[number], self._starts[number + 1]
        place, row = json.loads(os.pread(self._file.fileno(), end - start, start))
        return place, row

    def asked(self, number: int) -> Asked:
        """A row's question and answer."""
        return self.reading.read(self.row(number))

    def _rows(self, found: Iterator[tuple[Row, str]], problems: Problems) -> Iterator[tuple[Row, str]]:
        for row, place in found:
            try:
                yield self._prepare(row) if self._prepare else row, place
            except Unusable as why:
                problems.broken(place, str(why))

    def _fill(self, found: Iterator[tuple[Row, str]], keys: array[int], problems: Problems) -> int:
        """Keep the rows; returns how many asked what an earlier one asks."""
        seen: set[int] = set()
        repeated = 0
        for row, place in found:
            try:
                key = key_of(self.reading.read(row).question)
            except Unusable as why:
                problems.broken(place, str(why))
                continue
            if key in seen:
                repeated += 1
                problems.leave_out(place, "asks what an earlier row asks")
                continue
            if len(keys) == MOST:
                raise UserError(f"{self.source} has more than {MOST:,} rows; give a part of it")
            seen.add(key)
            keys.append(key)
            self._digest.update(json.dumps(row).encode())
            line = json.dumps([place, row]).encode()
            self._file.write(line)
            self._starts.append(self._starts[-1] + len(line))
        return repeated


def key_of(question: str) -> int:
    """A hash of a question by which tables are ordered; the same for questions with the same `question_key`."""
    return int.from_bytes(hashlib.sha256(question_key(question).encode()).digest()[:8], "big")


_TABLES: OrderedDict[Any, Table] = OrderedDict()


def table(source: str, columns: Columns, where: str, prepare: Callable[[Row], Row] | None = None) -> Table:
    """The table of a source, read once as long as its files do not change.

    Args:
        prepare: makes a row from another, before anything is read from it.
        where: what the sentences about mistakes begin with.

    Raises:
        UserError: for a source that cannot be read, a column that is missing, and rows of which more than half cannot
            be used.
    """
    stamp: Any
    if source.startswith("hf:"):
        stamp = pinned_revision(source)
    else:
        stats = [(str(path), path.stat()) for path, _ in files(source)]
        stamp = tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
    key = (source, stamp, repr(columns), prepare)
    if key not in _TABLES:
        _TABLES[key] = Table(source, columns, prepare, where)
        while len(_TABLES) > _KEPT:
            _TABLES.popitem(last=False)
    _TABLES.move_to_end(key)
    return _TABLES[key]


def sample(source: str, prepare: Callable[[Row], Row] | None = None) -> list[Row]:
    """The first rows of a local source, without the others. Raises UserError where it has none."""
    problems = Problems("skip", lambda _: None)
    found: list[Row] = []
    for row, _ in itertools.islice(rows(source, problems, set()), SAMPLE):
        try:
            found.append(prepare(row) if prepare else row)
        except Unusable:
            continue
    if not found:
        raise UserError(f"{source} has no rows{_because(problems)}; give a file that has")
    return found


def _because(problems: Problems) -> str:
    return f" ({problems.first})" if problems.first else ""
