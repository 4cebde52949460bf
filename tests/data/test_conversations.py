"""Rows of whole examples, and examples from conversations."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.data.bpe import SPECIAL
from farthing.data.conversations import ConversationPacker, best_fit, examples
from farthing.data.masking import Example, encode
from farthing.data.packing import NO_LOSS
from farthing.data.text import Problems


def test_examples_fit_in_a_row_and_the_rest_is_reported(chat: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer, conversation, turns = chat.tokenizer(tmp_path, "ours"), chat.conversation, chat.turns
    said: list[str] = []
    texts = [("a", "b"), ("a", "b" * 50), (SPECIAL[3], "b")]
    placed = [(conversation(turns(*pair)), f"x:{number}") for number, pair in enumerate(texts, 1)]
    made = examples(tokenizer, placed, 20, Problems("skip", said.append))
    [wanted] = encode(tokenizer, placed[0][0])
    assert [example.ids.tolist() for example in made] == [wanted.ids.tolist()]
    assert said[0] == "x:2: 55 tokens are more than a row's 20; left out"
    assert said[1].startswith("x:3: message 1 holds a control token")
    with pytest.raises(UserError, match=r"^x:3: message 1 holds a control token"):
        examples(tokenizer, placed, 20, Problems("stop", said.append))
    with pytest.raises(
        UserError,
        match=r"no conversation is left to train on: all 1 were left out, first x:2: 55 tokens are more",
    ):
        examples(tokenizer, placed[1:2], 20, Problems("stop", said.append))


# ---- packing ----


@given(st.lists(st.integers(1, 20), max_size=30))
def test_best_fit_keeps_everything_and_wastes_less_than_half(sizes: list[int]) -> None:
    rows = best_fit([(size, n) for n, size in enumerate(sizes)], 20)
    assert sorted(n for row in rows for n in row) == list(range(len(sizes)))
    held = [sum(sizes[n] for n in row) for row in rows]
    assert all(total <= 20 for total in held)
    assert all(a + b > 20 for n, a in enumerate(held) for b in held[:n]), "two rows that would fit in one"


def of_sizes(sizes: list[int]) -> list[Example]:
    ends = np.cumsum([0, *sizes])
    return [
        Example(np.arange(a, b, dtype=np.int32), np.arange(a, b) >= a + (b - a) // 2)
        for a, b in itertools.pairwise(ends)
    ]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(0, 9), st.integers(1, 7))
def test_an_epoch_shows_every_conversation_whole_and_once(sizes: list[int], seed: int, rows: int) -> None:
    made = of_sizes(sizes)
    packer = ConversationPacker(made, 20, seed)
    for epoch in range(2):
        cursor = epoch * packer.rows_per_epoch * 20
        whole, end = packer.batch(cursor, packer.rows_per_epoch)
        assert (packer.epoch(cursor), packer.epoch(end - 1), packer.epoch(end)) == (epoch, epoch, epoch + 1)
        texts = [ids.tolist() for ids in whole.ids_N.split(whole.segments)]
        assert sorted(texts) == [example.ids.tolist() for example in made]
        assert max(whole.row_lengths) <= 20
        for text, targets in zip(texts, whole.targets_N.split(whole.segments), strict=True):
            half = max(text[0] + 1, text[0] + len(text) // 2)  # the first token cannot be a target
            assert [target for target in targets.tolist() if target != NO_LOSS] == [
                t for t in text if t >= half
            ]
        parts, place = [], cursor
        while place < end:
            count = min(rows, (end - place) // 20)
            part, place = ConversationPacker(made, 20, seed).batch(place, count)
            parts += [ids.tolist() for ids in part.ids_N.split(part.segments)]
        assert parts == texts


def test_epochs_are_in_different_orders() -> None:
    packer = ConversationPacker(of_sizes([5] * 40), 20, 0)
    first, cursor = packer.batch(0, packer.rows_per_epoch)
    second, _ = packer.batch(cursor, packer.rows_per_epoch)
    assert first.ids_N.tolist() != second.ids_N.tolist()


def test_a_template_beyond_its_limits_ends_the_pass_after_a_few_rows(
    chat: SimpleNamespace, tmp_path: Path
) -> None:
    """Each such row costs seconds, and the rows are not at fault."""
    writes = "{% if 'loop' in messages[0].content %}{{ 'a' * (messages | length * 10**9) }}{% endif %}"
    tokenizer = chat.tokenizer(tmp_path, writes + chat.templates["chatml"])
    asked = ["fine", *[f"loop {n}" for n in range(50)]]
    placed = [
        (chat.conversation(chat.turns(text, "b")), f"chats.jsonl:{number}")
        for number, text in enumerate(asked, 1)
    ]
    said: list[str] = []
    with pytest.raises(UserError) as caught:
        examples(tokenizer, placed, 200, Problems("skip", said.append))
    message = str(caught.value)
    assert message.startswith(f"chats.jsonl:4: the chat template of {tmp_path} cannot be rendered: ")
    assert message.endswith("so it was with 3 of 4 conversations)")
    assert "\n" not in message
    assert len(said) == 2
    assert len(examples(tokenizer, placed[:3], 200, Problems("skip", said.append))) == 1, "two may be chance"
