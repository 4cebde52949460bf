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
from farthing.data.overlap import HeldOut
from farthing.data.text import Document, documents
from farthing.recipe import Asks, Source
from farthing.stages.at import Say
from farthing.stages.pieces import Pieces
from farthing.tasks.check import check_solvable
from farthing.tasks.item import Item
from farthing.tasks.mixture import Mixture
from farthing.tasks.solutions import solution_conversation, solution_text

LESSONS = "lessons-{}.jsonl"
LEFT_OUT = Path("data") / "left-out.txt"
"""Lists the rows that cannot be used, in the stage's folder, if there are more than a few."""
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
            _write_lessons(source, path, seed, held_out, asks)
            pieces.record(path)
        paths.append((source, str(path)))
    return paths


def _write_lessons(source: Source, path: Path, seed: int, held_out: HeldOut, asks: Asks | None) -> None:
    assert source.tasks is not None
    assert source.items is not None
    check_solvable(source.tasks)
    stage = 1 if asks is None else 2
    # examples before a question are for models that have not learnt yet
    tasks = {name: task.model_copy(update={"shots": task.shots or 0}) for name, task in source.tasks.items()}
    stream = Mixture(tasks, seed + stage * _SEEDS).stream(exclude=held_out)
    lines: list[str] = []
    taught: set[str] = set()  # rows of data, which come again in the next epoch
    cursor = 0
    while len(lines) < source.items:
        items, cursor = stream.take(cursor, min(source.items - len(lines), _AT_ONCE))
        new = [item for item in items if item.metadata["scorer"] != "rewards" or item.question not in taught]
        taught.update(item.question for item in new if item.metadata["scorer"] == "rewards")
        solved = [json.dumps(lesson) + "\n" for item in new if (lesson := _lesson(item, asks))]
        if not solved:
            named = ", ".join(source.tasks)
            raise UserError(
                f"data: {named} has {len(lines):,} questions with worked solutions, and items asks for "
                f"{source.items:,}; ask for fewer"
                if taught
                else f"data: hardly any question of {named} can be solved; widen the config"
            )
        lines += solved
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, "".join(lines))


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
    """Whether a document belongs to the validation share. Decided by its text, so that no copy of it trains."""
    return int.from_bytes(_digest(text)[:8], "big") < share * 2**64


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def training_documents(
    paths: Sequence[tuple[Source, str]],
    share: float,
    policy: str,
    say: Say,
    excluded: frozenset[bytes] = frozenset(),
) -> Iterator[Document]:
    """Every document to train on, as often as its source's weight says.

    Args:
        share: of the documents, kept for validation.
        excluded: digests (`validation_digests`) of further documents kept for validation.
    """
    for document, times in _all(paths, policy, say):
        if not is_validation(document.text, share) and _digest(document.text) not in excluded:
            for _ in range(times):
                yield document


def validation_digests(validation: float | str, field: str | None, policy: str) -> frozenset[bytes]:
    """Digests of the documents in a validation path, so that none of them trains though a source holds it too."""
    if not isinstance(validation, str):
        return frozenset()
    source = Source(path=validation, field=field)
    return frozenset(_digest(d.text) for d in training_documents([(source, validation)], 0.0, policy, silent))


def validation_documents(
    paths: Sequence[tuple[Source, str]], share: float, policy: str, say: Say
) -> Iterator[Document]:
    """Every document kept for validation, once."""
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
            yield document, copies(number, source.weight)


def silent(_: str) -> None:
    """Ignore a sentence: for a second pass over data whose faults were reported."""
