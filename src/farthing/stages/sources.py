"""The data of a stage: the recipe's sources of text and conversations, and worked solutions.

Worked solutions are written to the stage's folder, one JSON object a line with its `question`, so that anyone can read
what a model was taught, and evaluation knows what not to ask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from farthing.base.errors import UserError
from farthing.base.files import write
from farthing.data.copies import NearCopies
from farthing.data.left_out import MARK
from farthing.data.overlap import HeldOut
from farthing.data.text import Document, documents
from farthing.recipe import Asks, Source
from farthing.stages.at import Say
from farthing.stages.pieces import Pieces
from farthing.tasks.check import NO_SOLUTIONS, check_solvable
from farthing.tasks.item import Item
from farthing.tasks.mixture import Mixture
from farthing.tasks.solutions import solution_conversation, solution_text

LESSONS = "lessons-{}.jsonl"
_AT_ONCE = 1000  # questions
_SEEDS = 2**32  # a recipe's seeds lie below it, so that no two stages draw the same questions


def source_paths(
    sources: Sequence[Source], pieces: Pieces, seed: int, held_out: HeldOut, asks: Asks | None = None
) -> list[tuple[Source, str]]:
    """Each source with the path to read; worked solutions are first written into the stage's data folder.

    Args:
        held_out: questions that must not appear.
        asks: how questions are asked and answered, for conversations in `messages`; without it worked solutions are
            plain text in `text`.

    Raises:
        UserError: for a task without worked solutions, or with too few questions.
    """
    paths = []
    for number, source in enumerate(sources, 1):
        if source.path is not None:
            paths.append((source, source.path))
            continue
        path = pieces.folder / "data" / LESSONS.format(number)
        if not pieces.has(path):
            _write_lessons(source, path, seed, held_out, asks, pieces.say)
            pieces.record(path)
        paths.append((source, str(path)))
    return paths


def _write_lessons(
    source: Source, path: Path, seed: int, held_out: HeldOut, asks: Asks | None, say: Say
) -> None:
    assert source.tasks is not None
    assert source.items is not None
    check_solvable(source.tasks)
    stage = 1 if asks is None else 2
    # examples before a question are for models that have not learnt yet
    tasks = {name: task.model_copy(update={"shots": task.shots or 0}) for name, task in source.tasks.items()}
    mixture = Mixture(tasks, seed + stage * _SEEDS)
    stream, patience = mixture.stream(exclude=held_out), max(_AT_ONCE, 2 * mixture.epoch)
    lines: list[str] = []
    taught: set[str] = set()  # rows of data, which come again in the next epoch
    cursor, last = 0, 0
    while len(lines) < source.items and cursor - last < patience:
        items, cursor = stream.take(cursor, min(source.items, _AT_ONCE))
        for item in items:
            is_new = item.metadata["scorer"] != "rewards" or item.question not in taught
            if is_new and (lesson := _lesson(item, asks)):
                lines.append(json.dumps(lesson) + "\n")
                taught |= {item.question} if item.metadata["scorer"] == "rewards" else set()
                last = cursor
    named = ", ".join(source.tasks)
    if not lines:
        raise UserError(
            NO_SOLUTIONS.format(named)
            if mixture.data_tasks
            else f"data: hardly any question of {named} can be solved; widen the config"
        )
    if len(lines) < source.items:
        say(
            f"data: {named} has {len(lines):,} worked solutions, and items asks for {source.items:,}: all are taught"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, "".join(lines[: source.items]))


def _lesson(item: Item, asks: Asks | None) -> dict[str, object] | None:
    """A line of the file; None for the few questions without a solution that ends in their answer."""
    if asks is None:
        solution = solution_text(item)
        return {"question": item.question, "text": solution} if solution else None
    messages = solution_conversation(item, asks.answer, asks.prompt, asks.system)
    return {"question": item.question, "messages": messages} if messages else None


def copies(number: int, weight: float) -> int:
    """Copies of document `number` (from 0) when each is taken `weight` times on average."""
    return int((number + 1) * weight) - int(number * weight)


def is_validation(text: str, share: float) -> bool:
    """Whether a document belongs to the validation share. Decided by its text, or by what a conversation asks, so that
    no copy of it trains."""
    return int.from_bytes(_digest(text)[:8], "big") < share * 2**64


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def training_documents(
    paths: Sequence[tuple[Source, str]],
    share: float,
    policy: str,
    say: Say,
    held_out: HeldOut,
    validation: NearCopies,
) -> Iterator[Document]:
    """Every document to train on, as often as its source's weight says.

    Worked solutions are not looked at again: their questions are not held out, and one of another question is no copy,
    however alike they are.

    Args:
        share: of the documents, kept for validation.
        held_out: questions; a document that holds one is left out.
        validation: the documents kept for validation; one that nearly equals any of them is left out.
    """
    for source, path in paths:
        for number, document in enumerate(_of(source, path, policy, say)):
            if is_validation(document.text, share):
                continue
            if source.path is not None and (why := _repeats(document.text, held_out, validation)):
                say(f"{document.place}: {why}{MARK}")
                continue
            for _ in range(copies(number, source.weight)):
                yield document


def _repeats(text: str, held_out: HeldOut, validation: NearCopies) -> str | None:
    """What a document repeats that must not be trained on, in a sentence; None if nothing."""
    if found := held_out.match(text):
        return found.sentence
    return "it is a validation document, or nearly" if validation.holds(text) else None


def all_documents(path: str, field: str | None, policy: str, say: Say) -> Iterator[Document]:
    """Every document of a path, once."""
    return _of(Source(path=path, field=field), path, policy, say)


def validation_documents(
    paths: Sequence[tuple[Source, str]], share: float, policy: str, say: Say
) -> Iterator[Document]:
    """Every document kept for validation, once."""
    seen: set[bytes] = set()
    for document in (found for source, path in paths for found in _of(source, path, policy, say)):
        if is_validation(document.text, share):
            key = _digest(document.text)
            if key not in seen:
                seen.add(key)
                yield document


def _of(source: Source, path: str, policy: str, say: Say) -> Iterator[Document]:
    return documents(path, field=source.field or "text", policy=policy, on_problem=say)  # type: ignore[arg-type]


def silent(_: str) -> None:
    """Ignore a sentence: for a second pass over data whose faults were reported."""
