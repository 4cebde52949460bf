"""Rows that cannot be used: counted, three of them shown, and all of them listed in a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Self, TextIO

from farthing.base.figures import plural
from farthing.base.files import write_json
from farthing.base.terminal import one_line

LEFT_OUT = Path("data") / "left-out.txt"
"""Where a stage lists the rows that it cannot use, in its folder."""
EXAMPLES = 3  # sentences said as they are; more are counted and listed in the file
KINDS = 4  # reasons named with their counts
MARK = "; left out"  # ends a sentence about a row that is not used; other sentences are notes
_DETAILS = re.compile(r"\s*\([^()]*\)")
_NUMBERS = re.compile(r"\d[\d,.]*")


class LeftOut:
    """Takes one sentence for each row, as `text.Problems` reports them. Use as a context manager: its end says what
    there is to say, also when it ends in an error.

    Args:
        file: lists every sentence if there are more than three; left alone otherwise. A .json beside it counts by
            reason. None lists them nowhere.
        say: called with each line.
        only_after_errors: says nothing when all went well, because another pass over the same rows follows.
    """

    def __init__(
        self, file: Path | None, say: Callable[[str], None], only_after_errors: bool = False
    ) -> None:
        self.file, self._say, self._only_after_errors = file, say, only_after_errors
        self._first: list[str] = []
        self._rows: Counter[str] = Counter()
        self._notes = 0
        self._last = ""
        self._open: TextIO | None = None

    def __enter__(self) -> Self:
        return self

    def __call__(self, sentence: str) -> None:
        """Take a sentence; one that repeats the last, as for a row that is used several times, counts once."""
        sentence = one_line(sentence)
        if sentence == self._last:
            return
        self._last = sentence
        if sentence.endswith(MARK):
            self._rows[reason(sentence)] += 1
        else:
            self._notes += 1
        if len(self._first) < EXAMPLES:
            self._first.append(sentence)
        elif self.file is not None and not self._only_after_errors:
            self._write(self.file, sentence)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._open is not None and self.file is not None:
            self._open.close()
            _partial(self.file).replace(self.file)
        if self._rows and self.file is not None and not self._only_after_errors:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(counts(self.file), dict(self._rows.most_common()))
        if error is not None or not self._only_after_errors:
            for line in self.lines():
                self._say(line)

    def lines(self) -> list[str]:
        """What there is to say: up to three sentences, or a count with three of them."""
        rows, told = sum(self._rows.values()), len(self._first)
        if rows + self._notes <= told:
            return self._first
        most = [f"{number:,}: {kind}" for kind, number in self._rows.most_common(KINDS)]
        if rest := rows - sum(number for _, number in self._rows.most_common(KINDS)):
            most.append(f"{rest:,} for other reasons")
        said = [f"{plural(rows, 'row')} left out ({'; '.join(most)})"] if rows else []
        said += [plural(self._notes, "note") + " on the data"] if self._notes else []
        where = f"; all are listed in {self.file}" if self._open is not None else ""
        return [", ".join(said) + where, *(f"  {sentence}" for sentence in self._first)]

    def _write(self, file: Path, sentence: str) -> None:
        if self._open is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._open = _partial(file).open("w", encoding="utf-8", errors="backslashreplace")
            self._open.writelines(f"{line}\n" for line in self._first)
        self._open.write(f"{sentence}\n")


def counts(file: Path) -> Path:
    """The file that counts what `file` lists."""
    return file.with_suffix(".json")


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def reason(sentence: str) -> str:
    """What a sentence about a row has in common with others of its kind: no place, no details, no numbers."""
    what = sentence.removesuffix(MARK)
    what = what.partition(": ")[2] or what
    return _NUMBERS.sub("N", _DETAILS.sub("", what))
