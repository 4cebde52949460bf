"""What the first stages learn from: the recipe's sources of text and conversations, and worked solutions.

Worked solutions are written to the stage's folder like any other file, one JSON object a line with its `question`:
so one can read what a model was taught, and know what it must not be asked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from farthing.base.errors import UserError
from farthing.data.text import Document, documents
from farthing.recipe import Asks, Source
from farthing.tasks.item import Item
from farthing.tasks.mixture import Mixture
from farthing.tasks.worked import WORKED, conversation, text

LESSONS = "lessons-{}.jsonl"
_AT_ONCE = 1000  # questions
_SEEDS = 2**32  # a recipe's seeds lie below it, so that no two stages draw the same questions

Say = Callable[[str], None]


def source_paths(
    sources: Sequence[Source], folder: Path, seed: int, held_out: set[str], asks: Asks | None = None
) -> list[tuple[Source, str]]:
    """Each source with the path it is read from; worked solutions are made first, into `folder`.

    Args:
        held_out: normalised texts of questions that must not appear.
        asks: how questions are asked and answered, for conversations in `messages`; without it worked solutions are
            plain text in `text`.

    Raises:
        UserError: for a task that has no worked solutions or too few questions.
    """
    paths = []
    for number, source in enumerate(sources, 1):
        if source.path is not None:
            paths.append((source, source.path))
            continue
        path = folder / LESSONS.format(number)
        if not path.exists():
            _write_lessons(source, path, seed, held_out, asks)
        paths.append((source, str(path)))
    return paths


def _write_lessons(source: Source, path: Path, seed: int, held_out: set[str], asks: Asks | None) -> None:
    assert source.tasks is not None
    assert source.items is not None
    for name in source.tasks:
        if name not in WORKED:
            raise UserError(f"data: {name} has no worked solutions; those that have are {', '.join(WORKED)}")
    stage = 1 if asks is None else 2
    stream = Mixture(source.tasks, seed + stage * _SEEDS).stream(exclude=held_out)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        cursor, left = 0, source.items
        while left:
            items, cursor = stream.take(cursor, min(left, _AT_ONCE))
            lessons = [lesson for item in items if (lesson := _lesson(item, asks))]
            if not lessons:
                raise UserError(
                    f"data: hardly any question of {', '.join(source.tasks)} can be worked; widen the config"
                )
            left -= len(lessons)
            file.writelines(json.dumps(lesson) + "\n" for lesson in lessons)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _lesson(item: Item, asks: Asks | None) -> dict[str, object] | None:
    """A line of the file; a few questions have no solution that ends in their answer."""
    if asks is None:
        written = text(item)
        return {"question": item.question, "text": written} if written else None
    messages = conversation(item, asks.answer, asks.prompt, asks.system)
    return {"question": item.question, "messages": messages} if messages else None


def taken(number: int, weight: float) -> int:
    """How often document `number` (from 0) is taken when each is taken `weight` times on average."""
    return int((number + 1) * weight) - int(number * weight)


def is_validation(text: str, share: float) -> bool:
    """Whether a document is kept for validation: by its text, so that a copy of it never trains."""
    return int.from_bytes(_digest(text)[:8], "big") < share * 2**64


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def training_documents(
    paths: Sequence[tuple[Source, str]],
    share: float,
    policy: str,
    say: Say,
    apart: frozenset[bytes] = frozenset(),
) -> Iterator[Document]:
    """Every document to train on, as often as its source's weight says; none of those `apart`, as `kept_apart` has
    them."""
    for document, times in _all(paths, policy, say):
        if not is_validation(document.text, share) and _digest(document.text) not in apart:
            for _ in range(times):
                yield document


def kept_apart(validation: float | str, field: str | None, policy: str) -> frozenset[bytes]:
    """What tells the documents of a validation path, so that none of them trains though a source holds it too."""
    if not isinstance(validation, str):
        return frozenset()
    source = Source(path=validation, field=field)
    return frozenset(_digest(d.text) for d in training_documents([(source, validation)], 0.0, policy, quiet))


def validation_documents(
    paths: Sequence[tuple[Source, str]], share: float, policy: str, say: Say
) -> Iterator[Document]:
    """Every document that is kept apart, once."""
    seen: set[bytes] = set()
    for document, _ in _all(paths, policy, say):
        if is_validation(document.text, share):
            key = _digest(document.text)
            if key not in seen:
                seen.add(key)
                yield document


def _all(paths: Sequence[tuple[Source, str]], policy: str, say: Say) -> Iterator[tuple[Document, int]]:
    for source, path in paths:
        found = documents(path, field=source.field or "text", policy=policy, on_problem=say)  # type: ignore[arg-type]
        for number, document in enumerate(found):
            yield document, taken(number, source.weight)


def quiet(_: str) -> None:
    """For a second pass over data whose faults have been told."""
