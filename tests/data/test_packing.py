"""Rows cut from an endless stream: every token in its place, whatever the step's size."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farthing.data.corpus import Corpus
from farthing.data.packing import NO_LOSS, Marks, PackedBatch, Packer, validation_batches
from farthing.data.text import Document

BOS, EOS, BEGIN, HOLE, END = 256, 257, 258, 259, 260
MARKS = Marks(BEGIN, HOLE, END, BOS)


def make(folder: Path, sizes: list[int], bos: int | None = BOS) -> Corpus:
    """Documents of `sizes` bytes; no two tokens of the corpus's first 250 bytes are the same."""
    letters = iter(range(10**6))
    texts = ["".join(chr(next(letters) % 128) for _ in range(size)) for size in sizes]
    front = [] if bos is None else [bos]
    return Corpus.build(
        [Document(text, f"a:{n}") for n, text in enumerate(texts)],
        lambda batch: [[*front, *text.encode()] for text in batch],
        folder,
        eos=EOS,
        bos=bos,
        vocab_size=261,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make(tmp_path_factory.mktemp("corpus"), [3, 1, 40, 7, 2, 11, 5, 5, 23])


def packer(corpus: Corpus, length: int, across: bool, fim: float, seed: int = 5) -> Packer:
    return Packer(corpus, length, seed, cross_document=across, fim_rate=fim, marks=MARKS)


def joined(batches: list[PackedBatch]) -> tuple[list[int], list[int], list[int], list[int], list[bool]]:
    """What batches hold together; of document numbers, where they change."""
    return (
        [i for batch in batches for i in batch.ids_N.tolist()],
        [i for batch in batches for i in batch.targets_N.tolist()],
        [n for batch in batches for n in batch.segments],
        [n for batch in batches for n in batch.row_lengths],
        [new for batch in batches for new in [True, *(batch.documents_N.diff() != 0).tolist()]],
    )


def stream(corpus: Corpus, seed: int, epochs: int, fim: float) -> list[int]:
    one = packer(corpus, 2, True, fim, seed)
    ids: list[int] = []
    cursor = 0
    while one.epoch(cursor) < epochs:
        batch, cursor = one.batch(cursor, 1)
        ids += batch.ids_N.tolist()
    return ids


@given(
    across=st.booleans(), fim=st.sampled_from([0.0, 0.5, 1.0]), length=st.integers(2, 60),
    cursor=st.integers(0, 900), rows=st.lists(st.integers(1, 5), min_size=1, max_size=5),
)  # fmt: skip
def test_rows_are_the_same_however_many_are_asked_for_at_once(
    corpus: Corpus, across: bool, fim: float, length: int, cursor: int, rows: list[int]
) -> None:
    whole, end = packer(corpus, length, across, fim).batch(cursor, sum(rows))
    assert end == cursor + sum(rows) * length
    parts, place = [], cursor
    for number in rows:
        fresh = packer(corpus, length, across, fim)  # as a process that was started again would
        part, place = fresh.batch(place, number)
        parts.append(part)
    assert place == end
    assert joined(parts) == joined([whole])
    cuts = np.cumsum([0, *rows])
    shards = [whole.slice_rows(int(a), int(b)) for a, b in itertools.pairwise(cuts)]
    assert joined(shards) == joined([whole])


@given(across=st.booleans(), length=st.integers(2, 60), cursor=st.integers(0, 500), rows=st.integers(1, 6))
def test_a_batch_says_what_follows_what(
    corpus: Corpus, across: bool, length: int, cursor: int, rows: int
) -> None:
    batch, _ = packer(corpus, length, across, 0.0).batch(cursor, rows)
    ids, targets = batch.ids_N.tolist(), batch.targets_N.tolist()
    assert batch.ids_N.dtype == batch.targets_N.dtype == batch.documents_N.dtype == torch.int64
    assert len(ids) == len(targets) == len(batch.documents_N) == sum(batch.segments) == rows * length
    assert (batch.rows, batch.row_lengths) == (rows, [length] * rows)
    segment_ends = set(np.cumsum(batch.segments).tolist())
    for place, (token, target) in enumerate(zip(ids, targets, strict=True), 1):
        row_ends, document_ends = place % length == 0, token == EOS
        assert (target == NO_LOSS) == (row_ends or (document_ends and not across))
        assert target in (NO_LOSS, *ids[place : place + 1])
        assert (place in segment_ends) == (row_ends or (document_ends and not across))
        if place < len(ids):
            new = bool(batch.documents_N[place] != batch.documents_N[place - 1])
            assert new == (row_ends or document_ends)
    assert batch.loss_tokens == sum(target != NO_LOSS for target in targets)


@given(seed=st.integers(-5, 2**70), epochs=st.integers(1, 3))
def test_an_epoch_shows_every_document_once_in_an_order_of_its_own(
    corpus: Corpus, seed: int, epochs: int
) -> None:
    ids = stream(corpus, seed, epochs, 0.0)[: epochs * corpus.tokens]
    documents = sorted(corpus.document(n).tolist() for n in range(corpus.documents))
    for epoch in range(epochs):
        part = ids[epoch * corpus.tokens : (epoch + 1) * corpus.tokens]
        ends = [n + 1 for n, i in enumerate(part) if i == EOS]
        assert sorted(part[a:b] for a, b in zip([0, *ends], ends, strict=False)) == documents


def test_orders_differ_between_epochs_and_between_seeds(corpus: Corpus) -> None:
    two = stream(corpus, 0, 2, 0.0)
    first, second = two[: corpus.tokens], two[corpus.tokens : 2 * corpus.tokens]
    assert first != second
    assert first != stream(corpus, 1, 1, 0.0)[: corpus.tokens]
    assert first == stream(corpus, 0, 1, 0.0)[: corpus.tokens]
    assert first != corpus.ids.tolist()


def test_the_order_is_pinned(tmp_path: Path) -> None:
    """A run continued by a later version must read on where it stopped."""
    ids = stream(make(tmp_path / "c", [1] * 8), 3, 1, 0.0)
    assert [i for i in ids if i < BOS] == [6, 1, 5, 2, 7, 4, 3, 0]


def test_a_far_cursor_is_reached_at_once_and_going_back_works(corpus: Corpus) -> None:
    one = packer(corpus, 32, False, 0.0)
    far, _ = one.batch(corpus.tokens * 1000 + 7, 2)
    assert one.epoch(corpus.tokens * 1000) == 1000
    back, _ = one.batch(7, 2)
    assert joined([back]) == joined([packer(corpus, 32, False, 0.0).batch(7, 2)[0]])
    assert joined([far]) == joined([packer(corpus, 32, False, 0.0).batch(corpus.tokens * 1000 + 7, 2)[0]])


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_documents_with_the_middle_last_hold_the_same_text(corpus: Corpus, rate: float) -> None:
    ids = stream(corpus, 1, 4, rate)
    originals = {tuple(corpus.document(n).tolist()) for n in range(corpus.documents)}
    ends = [n + 1 for n, i in enumerate(ids) if i == EOS]
    shown = changed = 0
    for a, b in zip([0, *ends], ends, strict=False):
        document = ids[a:b]
        shown += 1
        if BEGIN in document:
            changed += 1
            assert document[:2] == [BOS, BEGIN]
            hole, end = document.index(HOLE), document.index(END)
            prefix, suffix, middle = document[2:hole], document[hole + 1 : end], document[end + 1 : -1]
            document = [BOS, *prefix, *middle, *suffix, EOS]
        assert tuple(document) in originals
    assert changed == shown if rate == 1.0 else 0.2 * shown < changed < 0.8 * shown


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8), length=st.integers(2, 30),
    tokens=st.integers(1, 99), bos=st.sampled_from([BOS, None]),
)  # fmt: skip
def test_validation_scores_every_byte_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, tokens: int, bos: int | None
) -> None:
    corpus = make(tmp_path_factory.mktemp("c"), sizes, bos)
    scored: list[int] = []
    for batch in validation_batches(corpus, length, tokens):
        ids, targets = batch.ids_N.tolist(), batch.targets_N.tolist()
        assert max(batch.segments) <= length
        assert sum(batch.segments) == len(ids) < tokens + length
        scored += [target for target in targets if target != NO_LOSS]
        place = 0
        for size in batch.segments:
            assert targets[place : place + size] == [*ids[place + 1 : place + size], NO_LOSS]
            place += size
    assert scored == [i for i in corpus.ids.tolist() if i < BOS]
    assert len(scored) == corpus.bytes
