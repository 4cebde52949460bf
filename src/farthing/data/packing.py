"""Tokenised documents on disk, and rows of tokens cut from them in an order that a number of tokens names.

A corpus is documents laid end to end, each closed by eos. Training reads it as one endless stream: epoch after
epoch, each in its own order, cut in rows of equal length. The position in that stream is just the number of tokens
consumed, so a run continues from its cursor to the bit, whatever the number of rows per step.

Shapes: N tokens of a batch, rows one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from farthing.base.errors import UserError
from farthing.data.corpus import Corpus
from farthing.data.tokenizer import Tokenizer

NO_LOSS = -100
_ORDER, _CHOSEN, _CUTS = 0, 1, 2  # purposes of random numbers


@dataclass(frozen=True)
class PackedBatch:
    """Rows of tokens and what each is to predict.

    ids_N: int64. targets_N: the next token of each, int64, or -100 where there is no loss (the end of a row, and of a
    document whose end the next cannot be predicted from). documents_N: int64, which piece of a document a token
    belongs to; a new number where a document or a row begins, so that predictions further ahead (MTP) stop there.
    segments: lengths of what attends to itself only, in order; they add up to N. row_lengths: tokens of each row, at
    most `length`.
    """

    ids_N: Tensor
    targets_N: Tensor
    documents_N: Tensor
    segments: list[int]
    row_lengths: list[int]
    length: int

    @property
    def rows(self) -> int:
        """Number of rows in the batch."""
        return len(self.row_lengths)

    @property
    def loss_tokens(self) -> int:
        """Number of tokens with a target."""
        return int((self.targets_N != NO_LOSS).sum())

    def slice_rows(self, start: int, stop: int) -> PackedBatch:
        """Rows `start` to `stop` (exclusive): a process's shard, or what fits in memory at once."""
        ends = np.cumsum([0, *self.row_lengths])
        low, high = int(ends[start]), int(ends[stop])
        segment_ends = np.cumsum([0, *self.segments])
        first, last = np.searchsorted(segment_ends, [low, high])
        return PackedBatch(
            self.ids_N[low:high],
            self.targets_N[low:high],
            self.documents_N[low:high],
            self.segments[first:last],
            self.row_lengths[start:stop],
            self.length,
        )


@dataclass
class _Epoch:
    """One pass over the corpus: the order of its documents and where each ends in the stream."""

    number: int
    order_D: np.ndarray
    chosen_D: np.ndarray | None  # by document: whether it is shown with its middle last
    ends_D: np.ndarray  # by place in the order
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = int(self.ends_D[-1])


class Packer:
    """The endless stream of a corpus in rows of `length` tokens.

    Args:
        cross_document: whether a token attends to earlier documents of its row (as in DeepSeek-V3's pretraining,
            arXiv:2412.19437, section 4.1); else every piece of a document is a segment of its own.
        fim_rate: share of documents shown as prefix, suffix, middle; needs `marks`.
    """

    def __init__(
        self,
        corpus: Corpus,
        length: int,
        seed: int,
        *,
        cross_document: bool,
        fim_rate: float = 0.0,
        marks: Marks | None = None,
    ) -> None:
        assert length > 1
        assert 0 <= fim_rate <= 1
        assert marks is not None or fim_rate == 0
        self.corpus = corpus
        self.length = length
        self.seed = seed
        self.cross_document = cross_document
        self.fim_rate = fim_rate
        self.marks = marks
        self._epoch: _Epoch | None = None
        self._starts = [0]  # by epoch: where it starts in the stream

    def batch(self, cursor: int, rows: int) -> tuple[PackedBatch, int]:
        """The `rows` rows from token `cursor` of the stream on, and the cursor after them."""
        assert cursor >= 0
        assert rows > 0
        ids, ends = self._read(cursor, rows * self.length)
        return self._packed(ids, ends, rows), cursor + rows * self.length

    def epoch(self, cursor: int) -> int:
        """The epoch (from 0) that the token at `cursor` belongs to."""
        return self._at(cursor).number

    def _packed(self, ids_N: np.ndarray, ends: np.ndarray, rows: int) -> PackedBatch:
        """`ends`: places (exclusive) where documents end."""
        row_ends = np.arange(1, rows + 1) * self.length
        cuts = np.union1d(ends, row_ends)  # where pieces end
        targets_N = np.append(ids_N[1:], NO_LOSS)
        targets_N[(row_ends if self.cross_document else cuts) - 1] = NO_LOSS
        pieces = np.diff(cuts, prepend=0)
        return PackedBatch(
            torch.from_numpy(ids_N),
            torch.from_numpy(targets_N),
            torch.from_numpy(np.repeat(np.arange(len(pieces)), pieces)),
            [self.length] * rows if self.cross_document else pieces.tolist(),
            [self.length] * rows,
            self.length,
        )

    def _read(self, cursor: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens of the stream, int64, and the places (exclusive) where documents end among them."""
        parts: list[np.ndarray] = []
        ends: list[int] = []
        have = 0
        while have < count:
            epoch = self._at(cursor + have)
            offset = cursor + have - self._starts[epoch.number]
            for place in range(int(np.searchsorted(epoch.ends_D, offset, side="right")), len(epoch.ends_D)):
                ids = self._document(epoch, int(epoch.order_D[place]))
                begun = offset - (int(epoch.ends_D[place]) - len(ids))
                part = ids[begun : begun + count - have]
                parts.append(part)
                have += len(part)
                offset += len(part)
                if begun + len(part) == len(ids):
                    ends.append(have)
                if have == count:
                    break
        return np.concatenate(parts).astype(np.int64, copy=False), np.array(ends, dtype=np.int64)

    def _document(self, epoch: _Epoch, number: int) -> np.ndarray:
        ids = self.corpus.document(number)
        if epoch.chosen_D is None or not epoch.chosen_D[number]:
            return ids
        assert self.marks is not None
        first, second = _draw(self.seed, epoch.number, _CUTS, 2, number)
        return fill_in_the_middle(ids, self.marks, (int(first), int(second)))

    def _at(self, cursor: int) -> _Epoch:
        """The epoch of the token at `cursor`; the latest one is cached."""
        epoch = self._epoch
        if epoch is None or cursor < self._starts[epoch.number]:
            known = int(np.searchsorted(self._starts, cursor, side="right")) - 1
            epoch = self._open(known)
        while cursor >= self._starts[epoch.number] + epoch.tokens:
            if self.fim_rate == 0:  # all epochs are equally long: go straight there
                number = cursor // epoch.tokens
                self._starts += [n * epoch.tokens for n in range(len(self._starts), number + 1)]
                epoch = self._open(number)
                continue
            if len(self._starts) == epoch.number + 1:
                self._starts.append(self._starts[epoch.number] + epoch.tokens)
            epoch = self._open(epoch.number + 1)
        self._epoch = epoch
        return epoch

    def _open(self, number: int) -> _Epoch:
        count = self.corpus.documents
        order_D = np.argsort(_draw(self.seed, number, _ORDER, count), kind="stable")
        lengths_D = np.diff(self.corpus.starts)
        chosen_D = None
        if self.fim_rate > 0:
            chosen_D = _draw(self.seed, number, _CHOSEN, count) / 2.0**64 < self.fim_rate
            lengths_D = lengths_D + EXTRA * chosen_D
        return _Epoch(number, order_D, chosen_D, np.cumsum(lengths_D[order_D]))


def validation_batches(corpus: Corpus, length: int, tokens: int) -> Iterator[PackedBatch]:
    """One pass over the corpus, in order, in batches of about `tokens` tokens, so that every byte is scored once.

    Bits per byte are the nats of all targets / (ln 2 x `corpus.bytes`). Each document stands alone: it is cut in
    pieces of at most `length` tokens, and a piece begins with the last token of the one before as its only context. So
    the first tokens of a piece are predicted from little, which makes the figure for a short `length` a little too
    high. A document that does not begin with a beginning mark gets eos in front, as what separates it
    from an earlier one. The closing eos is not text and has no target.
    """
    pieces: list[np.ndarray] = []
    held = 0
    for number in range(corpus.documents):
        ids = corpus.document(number)[:-1].astype(np.int64)
        if corpus.bos is None:
            ids = np.concatenate([[corpus.eos], ids])
        for start in range(0, len(ids) - 1, length - 1):
            pieces.append(ids[start : start + length])
            held += len(pieces[-1])
            if held >= tokens:
                yield ragged_batch(_next_tokens(pieces), length)
                pieces, held = [], 0
    if pieces:
        yield ragged_batch(_next_tokens(pieces), length)


def _next_tokens(pieces: list[np.ndarray]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    return [[(ids, np.append(ids[1:], NO_LOSS))] for ids in pieces]


def ragged_batch(rows: list[list[tuple[np.ndarray, np.ndarray]]], length: int) -> PackedBatch:
    """A batch of rows of whole texts, each (ids, targets) and a segment of its own, without padding."""
    texts = [text for row in rows for text in row]
    segments = [len(ids) for ids, _ in texts]
    return PackedBatch(
        torch.from_numpy(np.concatenate([ids for ids, _ in texts]).astype(np.int64, copy=False)),
        torch.from_numpy(np.concatenate([targets for _, targets in texts]).astype(np.int64, copy=False)),
        torch.from_numpy(np.repeat(np.arange(len(segments)), segments)),
        segments,
        [sum(len(ids) for ids, _ in row) for row in rows],
        length,
    )


def _draw(seed: int, epoch: int, purpose: int, count: int, number: int = 0) -> np.ndarray:
    """`count` numbers from 0 to 2**64 - 1. The raw stream of Philox is the same in every version of numpy."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)  # a list of such numbers would become floats
    counter = np.array([0, number, purpose, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """0 to `count` - 1 in the order of an epoch, [count] int64."""
    return np.argsort(_draw(seed, epoch, _ORDER, count), kind="stable")


FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


_KNOWN = (
    FIM,
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


EXTRA = len(FIM)  # tokens that a document gains


@dataclass(frozen=True)
class Marks:
    """Ids of the three marks, and of the beginning mark that stays in front (None where texts have none)."""

    begin: int
    hole: int
    end: int
    bos: int | None = None


def fim_marks(tokenizer: Tokenizer) -> Marks:
    """The tokenizer's marks for fill-in-the-middle. Raises UserError when it has none."""
    for names in _KNOWN:
        ids = [tokenizer.raw_encode(name) for name in names]
        if all(len(found) == 1 and found[0] in tokenizer.special_ids for found in ids):
            begin, hole, end = (found[0] for found in ids)
            return Marks(begin, hole, end, tokenizer.bos_id)
    raise UserError(
        f"fim_rate: the tokenizer of {tokenizer.folder} has no fill-in-the-middle tokens; set fim_rate to 0, or "
        "let the stage train a tokenizer"
    )


def fill_in_the_middle(ids_N: np.ndarray, marks: Marks, draw: tuple[int, int]) -> np.ndarray:
    """One document, [N] with its closing eos, rearranged: [N + 3].

    Args:
        draw: two numbers drawn evenly from 0 to 2**64 - 1; they place the two cuts, which may coincide.
    """
    front = 1 if marks.bos is not None and ids_N[0] == marks.bos else 0
    body, eos = ids_N[front:-1], ids_N[-1:]
    first, second = sorted(number * (len(body) + 1) >> 64 for number in draw)
    parts = (
        ids_N[:front],
        [marks.begin], body[:first],
        [marks.hole], body[second:],
        [marks.end], body[first:second],
        eos,
    )  # fmt: skip
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
