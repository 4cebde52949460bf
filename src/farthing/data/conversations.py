"""Conversations as examples, and rows of whole examples."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np

from farthing.base.errors import UserError
from farthing.data.masking import Example, encode
from farthing.data.messages import Conversation, Passage, Unusable
from farthing.data.packing import NO_LOSS, PackedBatch, ragged_batch, shuffled
from farthing.data.template import Unrenderable
from farthing.data.text import Problems
from farthing.data.tokenizer import Tokenizer

MOST_UNRENDERABLE = 3  # conversations on which a template may go beyond its limits, at five seconds each


def examples(
    tokenizer: Tokenizer,
    placed: Iterable[tuple[Conversation | Passage, str]],
    length: int,
    problems: Problems,
) -> list[Example]:
    """Conversations as tokens; a text longer than `length` is left out and reported.

    Cutting it would teach answers without an end. A conversation that cannot be encoded is a broken row.

    Raises:
        UserError: for a broken row (with its place) under `stop`, when the template goes beyond its limits again and
            again, and when nothing is left.
    """
    made = []
    unrenderable = 0
    for tried, (conversation, place) in enumerate(placed, 1):
        try:
            found = encode(tokenizer, conversation)
        except Unrenderable as error:
            unrenderable += 1
            if unrenderable == MOST_UNRENDERABLE:
                raise UserError(
                    f"{place}: {error} (it is the fault of the template, not of the rows: so it was with "
                    f"{unrenderable} of {tried:,} conversations)"
                ) from None
            problems.broken(place, str(error))
            continue
        except Unusable as error:
            problems.broken(place, str(error))
            continue
        for example in found:
            if len(example.ids) > length:
                problems.leave_out(place, f"{len(example.ids):,} tokens are more than a row's {length:,}")
            else:
                made.append(example)
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
