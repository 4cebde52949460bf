"""What a source of text, conversations or questions holds, and what would be learnt of it."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from farthing.base.errors import UserError
from farthing.data.left_out import MARK, reason
from farthing.data.masking import pieces, render, tokens
from farthing.data.messages import Conversation, Passage, Unusable
from farthing.data.shapes import Found, placed_conversations
from farthing.data.text import Problems, documents
from farthing.data.tokenizer import Tokenizer
from farthing.recipe.source import Shape

SHOWN = 3  # rows
Pieces = list[tuple[str, bool]]


@dataclass
class Shown:
    """A row as it would be learnt: texts in pieces, each learnt or not."""

    place: str
    texts: list[Pieces]


@dataclass
class Looked:
    """What was found."""

    source: str
    length: int
    unit: str
    """Of lengths: tokens, or characters without a model."""
    rows: int = 0
    """Read, usable or not."""
    found: Found = field(default_factory=Found)
    shown: list[Shown] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Of every text that would be learnt from."""
    learnt: int = 0
    """Of their tokens or characters."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that would be left out, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """The sentence about the first row of each reason."""

    @property
    def over(self) -> int:
        """Texts longer than a row, which would be left out."""
        return sum(length > self.length for length in self.lengths)

    def data(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "source": self.source,
            "rows": self.rows,
            "shapes": dict(self.found.shapes),
            "columns": dict(self.found.columns),
            "unit": self.unit,
            "examples": len(self.lengths),
            "median": statistics.median(self.lengths) if self.lengths else None,
            "longest": max(self.lengths, default=None),
            "length": self.length,
            "over_length": self.over if self.unit == "tokens" else None,
            "learnt_share": self.learnt / sum(self.lengths) if self.lengths else None,
            "left_out": [
                {"reason": why, "rows": number, "first": self.first[why]}
                for why, number in self.left_out.most_common()
            ],
            "not_used": dict(self.found.notes),
            "columns_not_used": dict(self.found.unused),
            "shown": [
                {
                    "place": row.place,
                    "texts": [[{"text": t, "learnt": on} for t, on in one] for one in row.texts],
                }
                for row in self.shown
            ],
        }


def look(
    source: str,
    tokenizer: Tokenizer | None,
    *,
    length: int = 1024,
    rows: int | None = None,
    field: str | None = None,
    shape: str | None = None,
) -> Looked:
    """Read a source as fine-tuning would, with `policy: skip`.

    Args:
        tokenizer: of the model that would learn; None counts characters, and writes turns out without a template.
        length: tokens in a row.
        rows: the most to read.

    Raises:
        UserError: for a source that cannot be read, and a shape that there is not.
    """
    if shape is not None and shape not in get_args(Shape):
        raise UserError(f"there is no shape {shape!r}; there are {', '.join(get_args(Shape))}")
    looked = Looked(source, length, "tokens" if tokenizer else "characters")

    def report(sentence: str) -> None:
        if sentence.endswith(MARK):
            why = reason(sentence)
            looked.left_out[why] += 1
            looked.first.setdefault(why, sentence.removesuffix(MARK))
        else:
            looked.found.notes[sentence] += 1

    problems = Problems("skip", report)
    read = _read(source, problems, field, shape, looked.found)
    for learnable, place in itertools.islice(read, rows):
        try:
            texts = _texts(tokenizer, learnable)
        except Unusable as error:
            problems.leave_out(place, str(error))
            continue
        looked.rows += 1
        looked.lengths += [size for _, size, _ in texts]
        looked.learnt += sum(learnt for _, _, learnt in texts)
        if len(looked.shown) < SHOWN:
            looked.shown.append(Shown(place, [made() for made, _, _ in texts]))
    looked.rows += looked.left_out.total()
    return looked


def _read(
    source: str, problems: Problems, field: str | None, shape: str | None, found: Found
) -> Iterator[tuple[Conversation | Passage, str]]:
    if not source.endswith(".txt"):
        yield from placed_conversations(source, problems, field=field, shape=shape, found=found)
        return
    for document in documents(source, policy="skip", on_problem=problems.say):
        found.shapes["text"] += 1
        found.columns["text"] += 1
        yield Passage(((document.text, True),)), document.place


def _texts(
    tokenizer: Tokenizer | None, learnable: Conversation | Passage
) -> Sequence[tuple[Callable[[], Pieces], int, int]]:
    """For each text that is learnt: a function that cuts it in pieces, its length, and how much of it is learnt."""
    if tokenizer is None:
        parts = _written_out(learnable)
        return [
            (lambda: parts, sum(len(text) for text, _ in parts), sum(len(text) for text, on in parts if on))
        ]
    found = []
    for rendered in render(tokenizer, learnable):
        example = tokens(tokenizer, rendered)
        cut = functools.partial(pieces, tokenizer, rendered)
        found.append((cut, len(example.ids), int(example.loss.sum())))
    return found


def _written_out(learnable: Conversation | Passage) -> Pieces:
    """A conversation without a template: who says what."""
    if isinstance(learnable, Passage):
        return list(learnable.pieces)
    parts: Pieces = []
    for message, on in zip(learnable.messages, learnable.learnt, strict=True):
        parts.append((f"{message['role']}: ", False))
        if thought := message.get("reasoning_content"):
            parts += [(f"<think>{thought}</think> ", on)]
        calls = [
            f"{call['function']['name']}({call['function']['arguments']})"
            for call in message.get("tool_calls", ())
        ]
        parts += [(" ".join([*filter(None, [message["content"]]), *calls]), on), ("\n", False)]
    return parts
