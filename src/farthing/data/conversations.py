"""Conversations to tokens with loss masks, and a lint for chat templates.

Only the assistant's words are learnt, with the token that ends its turn. They are located by rendering the
conversation up to each answer, which works with any chat template.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from farthing.base.errors import UserError
from farthing.base.schema import given
from farthing.data.packing import NO_LOSS, PackedBatch, ragged_batch, shuffled
from farthing.data.template import Unrenderable
from farthing.data.text import Policy, Problems, is_unicode, records
from farthing.data.tokenizer import Message, Tokenizer

ROLES = ("system", "user", "assistant")
MOST_UNRENDERABLE = 3  # conversations on which a template may go beyond its limits, at five seconds each


@dataclass(frozen=True)
class Example:
    """A conversation as tokens: ids int32 [N]; loss bool [N], true for tokens that are learnt."""

    ids: np.ndarray
    loss: np.ndarray


def conversations(
    source: str, *, field: str = "messages", policy: Policy = "stop", on_problem: Callable[[str], None]
) -> Iterator[list[Message]]:
    """The conversations of a source (as `text.documents` takes them, without .txt): lists of {"role", "content"}.

    A conversation is an optional system message, then user and assistant in turn, the assistant last. Anything else
    is a broken row: reported under `skip`, raised as UserError with file and line under `stop`.
    """
    for messages, _ in placed_conversations(source, field, Problems(policy, on_problem)):
        yield messages


def placed_conversations(source: str, field: str, problems: Problems) -> Iterator[tuple[list[Message], str]]:
    """`conversations`, each with its place, as in "chats.jsonl:12"."""
    if source.endswith(".txt"):
        raise UserError(f"{source} is plain text; conversations come as .jsonl or .parquet with {field!r}")
    for row, place in records(source, field, problems):
        messages = row[field]
        if mistake := _mistake(messages):
            problems.broken(place, mistake)
            continue
        yield [{"role": m["role"], "content": m["content"]} for m in messages], place


def _mistake(messages: Any) -> str | None:
    """The fault in the shape of a conversation, or None."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "the messages are not a list of {role, content}"
    for number, message in enumerate(messages, 1):
        if message.get("role") not in ROLES:
            return f"message {number} is by {given(message.get('role'))}; there are {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"the content of message {number} is not text"
        if not is_unicode(message["content"]):
            return f"the content of message {number} holds half a character (a lone surrogate)"
    turns = [message["role"] for message in messages]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    if not turns or turns[-1] != "assistant":
        return "the conversation does not end with the assistant's answer"
    wanted = ["user", "assistant"] * (len(turns) // 2)
    if turns != wanted:
        return "user and assistant do not take turns"
    if not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
        return "an answer is empty"
    return None


def encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation by the chat template, and whether each is learnt.

    Learnt is what the assistant says up to and with the token on which generation stops. For each answer the
    conversation before it is rendered with the assistant's turn opened, which is what the model will be asked to go on
    from; what follows in the whole conversation is learnt, up to the first stop token. Where a template opens the turn
    with more than the answer has (a forced `<think>`), learning starts where the two part.

    Raises:
        UserError: when a message holds a control token, or the template rewrites earlier turns so that an answer
            cannot be found in the whole.
    """
    for number, message in enumerate(messages, 1):
        found = tokenizer.special_ids.intersection(tokenizer.raw_encode(message["content"]))
        if found:
            raise UserError(
                f"message {number} holds a control token of the tokenizer (id {min(found)}), which would end or fake a "
                "turn; take it out"
            )
    whole = tokenizer.render(messages, add_generation_prompt=False)
    ids, offsets = tokenizer.offset_encode(whole)
    learnt = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _answer_start(tokenizer, messages[:index], whole)
        limit = _answer_limit(tokenizer, messages, index, whole)
        for token in range(bisect_left(offsets, start, key=lambda offset: offset[0]), len(ids)):
            if (
                offsets[token][1] > start
            ):  # else white space of the prompt, whose offsets some tokenizers trim
                if offsets[token][0] >= limit:
                    break
                learnt[token] = True
                if ids[token] in tokenizer.stop_ids:
                    break
    return ids, learnt


def _answer_start(tokenizer: Tokenizer, before: Sequence[Message], whole: str) -> int:
    """Position in the whole conversation at which the answer to `before` begins."""
    opened = tokenizer.render(before, add_generation_prompt=True)
    if whole.startswith(opened):
        return len(opened)
    common = _common_prefix(opened, whole)
    if common < _common_prefix(tokenizer.render(before, add_generation_prompt=False), opened):
        raise UserError(
            f"the chat template of {tokenizer.folder} rewrites earlier turns, so what the assistant says cannot be "
            "told apart; use conversations of one answer or another template"
        )
    return common


def _answer_limit(tokenizer: Tokenizer, messages: Sequence[Message], index: int, whole: str) -> int:
    """Limit of an answer and its end: the position at which the next turn begins."""
    if index + 1 == len(messages):
        return len(whole)
    upto = tokenizer.render(messages[: index + 1], add_generation_prompt=False)
    if whole.startswith(upto):
        return len(upto)
    # The answer renders differently once it is no longer the last: the next turn marks its end.
    asked = tokenizer.render(messages[: index + 2], add_generation_prompt=False)
    common = _common_prefix(asked, whole)
    found = whole.rfind(messages[index + 1]["content"].strip(), 0, common)
    return found if found >= 0 else common


def _common_prefix(one: str, other: str) -> int:
    """Length of the common prefix of two texts, in characters."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def examples(
    tokenizer: Tokenizer,
    placed: Iterable[tuple[Sequence[Message], str]],
    length: int,
    problems: Problems,
) -> list[Example]:
    """Conversations as tokens; one longer than `length` is left out and reported.

    Cutting it would teach answers without an end. Raises UserError as `encode` does (with the place, under `stop`),
    when the template goes beyond its limits again and again, and when nothing is left.
    """
    made = []
    unrenderable = 0
    for tried, (messages, place) in enumerate(placed, 1):
        try:
            ids, loss = encode(tokenizer, messages)
        except Unrenderable as error:
            unrenderable += 1
            if unrenderable == MOST_UNRENDERABLE:
                raise UserError(
                    f"{place}: {error} (it is the fault of the template, not of the rows: so it was with "
                    f"{unrenderable} of {tried:,} conversations)"
                ) from None
            problems.broken(place, str(error))
            continue
        except UserError as error:
            problems.broken(place, str(error))
            continue
        if len(ids) > length:
            problems.leave_out(place, f"{len(ids):,} tokens are more than a row's {length:,}")
            continue
        made.append(Example(np.array(ids, dtype=np.int32), np.array(loss)))
    if not made:
        why = (
            f"all {problems.left_out:,} were left out, first {problems.first}"
            if problems.first
            else "there is none"
        )
        raise UserError(f"no conversation is left to train on: {why}")
    return made


class ConversationPacker:
    """The endless stream of rows of whole conversations, several per row, without splits or padding.

    A row holds at most `length` tokens. Rows are filled best-fit, the longest conversations first (Ding et al.,
    arXiv:2404.10830), so every epoch has the same number of rows; which conversations share one and the rows' order
    are drawn anew. Used like `packing.Packer`; its cursor counts every row as `length` tokens.
    """

    def __init__(self, made: Sequence[Example], length: int, seed: int) -> None:
        assert made
        assert max(len(example.ids) for example in made) <= length
        self.examples = list(made)
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._rows: list[list[int]] = []
        self._open(0)
        self.rows_per_epoch = len(self._rows)

    def batch(self, cursor: int, rows: int) -> tuple[PackedBatch, int]:
        """The next `rows` rows from `cursor`, and the cursor after them."""
        assert cursor >= 0
        assert cursor % self.length == 0
        assert rows > 0
        first = cursor // self.length
        chosen = [self._row(number) for number in range(first, first + rows)]
        return ragged_batch(chosen, self.length), cursor + rows * self.length

    def epoch(self, cursor: int) -> int:
        """The epoch (from 0) that the row at `cursor` belongs to."""
        return cursor // self.length // self.rows_per_epoch

    def _row(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        epoch, place = divmod(number, self.rows_per_epoch)
        if epoch != self._epoch:
            self._open(epoch)
        return [_with_targets(self.examples[index]) for index in self._rows[place]]

    def _open(self, epoch: int) -> None:
        order = shuffled(len(self.examples), self.seed, epoch)
        rows = best_fit(((len(self.examples[i].ids), int(i)) for i in order), self.length)
        # `order` also decides the order of rows: by the position of their first conversation in it
        place = np.argsort(order)
        self._rows = sorted(rows, key=lambda row: int(min(place[row])))
        self._epoch = epoch


def _with_targets(example: Example) -> tuple[np.ndarray, np.ndarray]:
    targets = np.where(example.loss, example.ids, NO_LOSS)
    return example.ids, np.append(targets[1:], NO_LOSS)


def best_fit(sized: Iterable[tuple[int, int]], length: int) -> list[list[int]]:
    """Pack (size, name) into rows of at most `length`: the largest first, each where the least room remains."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (left, row), ascending
    for size, name in sorted(sized, key=lambda pair: -pair[0]):
        at = bisect_left(room, (size, -1))
        if at == len(room):
            rows.append([])
            left, row = length, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(name)
        if left > size:
            insort(room, (left - size, row))
    return rows


# ---------------------------------------------------------------- lint


def lint_template(tokenizer: Tokenizer) -> list[str]:
    """Faults of a tokenizer's chat template for training, one sentence each; empty if there are none."""
    if not tokenizer.has_template:
        return [f"{tokenizer.folder} has no chat template; add one to its tokenizer_config.json"]
    one = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "first answer"}]
    thought = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "<think>earlier thought</think>\n\nfirst answer"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "<think>later thought</think>\n\nsecond answer"},
    ]
    try:
        problems = [_stop_has_loss(tokenizer, one), *_prompt_is_prefix(tokenizer, one)]
        problems += [_stop_has_loss(tokenizer, thought), _thinking_survives(tokenizer, thought)]
    except UserError as error:
        return [str(error)]
    return list(dict.fromkeys(problem for problem in problems if problem))


def _stop_has_loss(tokenizer: Tokenizer, messages: list[Message]) -> str | None:
    ids, learnt = encode(tokenizer, messages)
    answers = sum(message["role"] == "assistant" for message in messages)
    taught = sum(on and i in tokenizer.stop_ids for i, on in zip(ids, learnt, strict=True))
    if taught < answers:
        return (
            "no stop token has loss at the end of an answer, so the model would never learn to stop; have the template "
            "write eos_token after every answer"
        )
    return None


def _thinking_survives(tokenizer: Tokenizer, messages: list[Message]) -> str | None:
    text = tokenizer.render(messages, add_generation_prompt=False)
    if "<think>" in text and "earlier thought" in text:
        return None
    return (
        "what stands in <think> in an earlier answer does not survive a second turn, so it would not be learnt; have "
        "the template write every answer as it is"
    )


def _prompt_is_prefix(tokenizer: Tokenizer, messages: list[Message]) -> Iterator[str]:
    opened = tokenizer.render(messages[:1], add_generation_prompt=True)
    whole = tokenizer.render(messages, add_generation_prompt=False)
    prompt, ids = tokenizer.raw_encode(opened), tokenizer.raw_encode(whole)
    if ids[: len(prompt)] != prompt:
        yield (
            "the opened assistant's turn is not the beginning of the whole conversation, so the model would be asked "
            "what it never saw; have the template open the turn with the same text as before an answer"
        )
