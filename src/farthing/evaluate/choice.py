"""Multiple choice by log-likelihood: the model says nothing, and the likeliest ending is its answer.

As lm-evaluation-harness scores it: `acc` takes the likeliest ending, `acc_norm` the one likeliest per character of its
text. A question has endings where its metadata has `likelihood`: {"context", "endings", "right"}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from farthing.data.tokenizer import Tokenizer
from farthing.engine import Model
from farthing.engine.sequence import Work
from farthing.evaluate.likelihood import likelihoods
from farthing.evaluate.score import Record
from farthing.tasks import Item


def has_endings(item: Item) -> bool:
    """Whether the likelihoods of a question's endings can be compared."""
    return "likelihood" in item.metadata


def choose(
    model: Model, numbered: Sequence[tuple[int, Item]], told: Callable[[float], None] | None = None
) -> tuple[list[Record], Work]:
    """The records of questions with endings, given with their numbers.

    Args:
        told: called now and then with the share that is done.
    """
    asked = [item.metadata["likelihood"] for _, item in numbered]
    pairs = [
        encoded_pair(model.tokenizer, each["context"], ending) for each in asked for ending in each["endings"]
    ]
    found, work = likelihoods(model.decoder, pairs, told and (lambda done, of: told(done / of)))
    records: list[Record] = []
    rest = iter(found)
    for (index, item), each in zip(numbered, asked, strict=True):
        endings: list[str] = each["endings"]
        logprobs = [next(rest).logprob for _ in endings]
        per_character = [
            logprob / max(1, len(ending.removeprefix(" ")))
            for logprob, ending in zip(logprobs, endings, strict=True)
        ]
        best, best_per_character = _argmax(logprobs), _argmax(per_character)
        records.append({
            "index": index,
            "task": item.task,
            "question": item.question,
            "gold": item.answer,
            "text": endings[best],
            "outcome": "right" if best == each["right"] else "wrong",
            "answer": endings[best].strip(),
            "tokens": 0,
            "right_per_character": best_per_character == each["right"],
            "logprobs": logprobs,
        })  # fmt: skip
    return records, work


def encoded_pair(tokenizer: Tokenizer, context: str, ending: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it, cut where the context's own ids end. Spaces at its end belong to the
    ending, whose first word they begin; where there is no context, the mark that begins a text stands for it."""
    bare = context.rstrip()
    if not bare:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        ids = tokenizer.raw_encode(context + ending)
        return ([start], ids) if start is not None and ids[:1] != [start] else (ids[:1], ids[1:])
    whole, before = tokenizer.encode(context + ending), tokenizer.encode(bare)
    return whole[: len(before)], whole[len(before) :]


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda place: values[place])
