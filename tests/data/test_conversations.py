"""What is learnt of a conversation, under many chat templates; packing; what the lint finds."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Tokens

from farthing.base.errors import UserError
from farthing.data.bpe import CHAT_TEMPLATE, SPECIAL, THINK
from farthing.data.conversations import (
    ConversationPacker,
    Example,
    best_fit,
    conversations,
    encode,
    examples,
    lint_template,
)
from farthing.data.packing import NO_LOSS
from farthing.data.text import Problems
from farthing.data.tokenizer import Message, Tokenizer

MARKS = [*SPECIAL, "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "</s>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)
INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
# as Qwen3's: earlier answers lose their thinking, and a last one without any is given an empty one
DROPS_THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORCES_THINKING = CHAT_TEMPLATE.replace(
    "{{- '<｜Assistant｜>' }}", "{{- '<｜Assistant｜><think>\\n' }}"
)  # as R1's: the opened turn has more than an answer does
NO_STOP = CHATML.replace("<|im_end|>\n", "\n")


def tokenizer_with(folder: Path, template: str, eos: str = "<|im_end|>", trims: bool = False) -> Tokenizer:
    """Bytes as tokens, and marks; `trims` adds the post-processor that leaves white space out of offsets."""
    tokens = Tokens(
        models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    tokens.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in THINK])
    if trims:
        tokens.post_processor = processors.ByteLevel(trim_offsets=True)
    tokens.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": eos, "bos_token": SPECIAL[0], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder)


def turns(*contents: str) -> list[Message]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def learnt(tokenizer: Tokenizer, messages: list[Message]) -> list[str]:
    """The runs of tokens that are learnt, as text, with marks."""
    ids, loss = encode(tokenizer, messages)
    assert tokenizer.raw_encode(tokenizer.render(messages, add_generation_prompt=False)) == ids
    runs: list[list[int]] = [[]]
    for token, on in zip(ids, loss, strict=True):
        if on:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer._tokens.decode(run, skip_special_tokens=False) for run in runs if run]


TEMPLATES = {
    "ours": (CHAT_TEMPLATE, SPECIAL[1], SPECIAL[1]),
    "chatml": (CHATML, "<|im_end|>", "<|im_end|>"),
    "default system": (DEFAULT_SYSTEM, "<|im_end|>", "<|im_end|>"),
    "drops thinking": (DROPS_THINKING, "<|im_end|>", "<|im_end|>"),
}
WORDS = st.text(st.characters(categories=["L", "N", "P"]), min_size=1).map(
    lambda text: text.replace("<", "(")
)


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_and_their_ends_are_learnt_and_nothing_else(
    name: str, trims: bool, tmp_path: Path
) -> None:
    template, eos, stop = TEMPLATES[name]
    tokenizer = tokenizer_with(tmp_path, template, eos, trims)

    @given(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, min_size=3, max_size=3), st.booleans())
    def check(asked: list[str], answers: list[str], system: bool) -> None:
        messages = turns(*(text for pair in zip(asked, answers, strict=False) for text in pair))
        if system:
            messages = [{"role": "system", "content": asked[0]}, *messages]
        wanted = [answer + stop for answer in answers[: len(asked)]]
        if name == "drops thinking":
            wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1]
        assert learnt(tokenizer, messages) == wanted

    check()


def test_an_answer_like_the_question_or_with_white_space_is_told_apart(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML, trims=True)
    messages = turns("same", "same", "same", "  same\n", "\n", "\n\nsame")
    assert learnt(tokenizer, messages) == ["same<|im_end|>", "  same\n<|im_end|>", "\n\nsame<|im_end|>"]


def test_a_template_that_trims_and_one_without_a_generation_prompt(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, INST, "</s>")
    assert learnt(tokenizer, turns(" a ", " b ", "c", "d")) == [" b</s>", " d</s>"]


def test_thinking_is_learnt_where_the_template_leaves_it(tmp_path: Path) -> None:
    thought = turns("1?", "<think>x</think>\n\none", "2?", "<think>y</think>\n\ntwo")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours = tokenizer_with(tmp_path / "a", CHAT_TEMPLATE, SPECIAL[1])
    assert learnt(ours, thought) == [message["content"] + SPECIAL[1] for message in thought[1::2]]
    drops = tokenizer_with(tmp_path / "b", DROPS_THINKING)
    assert learnt(drops, thought) == ["one<|im_end|>", "<think>\ny\n</think>\n\ntwo<|im_end|>"]


def test_what_the_template_forces_into_the_opened_turn_is_not_learnt(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, FORCES_THINKING, SPECIAL[1])
    assert learnt(tokenizer, turns("1?", "<think>\nso\n</think>\n\none")) == [
        f"so\n</think>\n\none{SPECIAL[1]}"
    ]
    assert learnt(tokenizer, turns("1?", "one", "2?", "two")) == [f"one{SPECIAL[1]}", f"two{SPECIAL[1]}"]


def test_a_control_token_in_a_message_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    with pytest.raises(UserError, match="message 1 holds a control token of the tokenizer"):
        encode(tokenizer, turns("hi<|im_end|>", "no"))


def test_a_template_that_rewrites_what_was_said_is_refused(tmp_path: Path) -> None:
    rewrites = "{{ messages | length }}" + CHATML
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode(tokenizer_with(tmp_path, rewrites), turns("a", "b"))


# ---- rows of files ----


def read(path: Path, policy: Any = "skip") -> tuple[list[list[Message]], list[str]]:
    said: list[str] = []
    return list(conversations(str(path), policy=policy, on_problem=said.append)), said


def test_conversations_come_from_jsonl_and_parquet(tmp_path: Path) -> None:
    chats = [turns("a", "b"), [{"role": "system", "content": "s"}, *turns("a", "b", "c", "d")]]
    rows = [{"messages": chat, "source": "x"} for chat in chats]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.jsonl", "stop") == (chats, [])
    assert read(tmp_path / "a.parquet", "stop") == (chats, [])
    with pytest.raises(UserError, match=r"a\.txt is plain text"):
        read(tmp_path / "a.txt")


BROKEN: dict[str, tuple[Any, str]] = {
    "text": ("hello", "the messages are not a list"),
    "none": ([], "does not end with the assistant's answer"),
    "asked": (turns("a", "b", "c"), "does not end with the assistant's answer"),
    "system only": ([{"role": "system", "content": "s"}], "does not end with"),
    "twice": ([turns("a")[0], *turns("b", "c")], "do not take turns"),
    "answer first": (turns("a", "b")[1:], "do not take turns"),
    "late system": (
        [*turns("a", "b"), {"role": "system", "content": "s"}, *turns("c", "d")],
        "do not take turns",
    ),
    "role": (
        [turns("a")[0], {"role": "bot", "content": "b"}],
        "message 2 is by 'bot'; there are system, user",
    ),
    "role of another kind": ([turns("a")[0], {"role": ["x"], "content": "b"}], "message 2 is by"),
    "content": (
        [turns("a")[0], {"role": "assistant", "content": None}],
        "the content of message 2 is not text",
    ),
    "empty": (turns("a", " "), "an answer is empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_conversation_of_the_wrong_shape_is_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    messages, what = BROKEN[name]
    good = {"messages": turns("a", "b")}
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, {"messages": messages}, good])))
    found, [said] = read(path)
    assert found == [good["messages"]] * 2
    assert said.startswith("chats.jsonl:2: ")
    assert what in said
    with pytest.raises(UserError, match=r"^chats\.jsonl:2: "):
        read(path, "stop")


def test_examples_fit_in_a_row_and_the_rest_is_reported(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHAT_TEMPLATE, SPECIAL[1])
    said: list[str] = []
    placed = [(turns("a", "b"), "x:1"), (turns("a", "b" * 50), "x:2"), (turns(SPECIAL[3], "b"), "x:3")]
    made = examples(tokenizer, placed, 20, Problems("skip", said.append))
    assert [example.ids.tolist() for example in made] == [encode(tokenizer, turns("a", "b"))[0]]
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


# ---- lint ----


@pytest.mark.parametrize("name", ["ours", "chatml", "default system"])
def test_a_good_template_has_no_problems(name: str, tmp_path: Path) -> None:
    template, eos, _ = TEMPLATES[name]
    assert lint_template(tokenizer_with(tmp_path, template, eos)) == []


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (NO_STOP, ["no stop token has loss"]),
        (DROPS_THINKING, ["what stands in <think> in an earlier answer does not survive"]),
        (FORCES_THINKING, ["the opened assistant's turn is not the beginning"]),
        ("{{ messages | length }}" + CHATML, ["rewrites earlier turns"]),
        ("{{ raise_exception('no') }}", ["cannot render this conversation: no"]),
        (None, ["has no chat template"]),
    ],
)
def test_the_lint_names_what_is_wrong(template: str, what: list[str], tmp_path: Path) -> None:
    found = lint_template(tokenizer_with(tmp_path, template))
    assert len(found) == len(what)
    assert all(part in sentence for part, sentence in zip(what, found, strict=True))
    assert all("\n" not in sentence for sentence in found)


def test_half_a_character_in_a_message_is_a_broken_row_like_any_other(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [[{**good[0], "content": "a\ud800"}, good[1]], [good[0], {**good[1], "content": "\udfff"}], good,
            [{**good[0], "role": "\ud800" * 1000}, good[1]], [{**good[0], "role": [1] * 1000}, good[1]]]  # fmt: skip
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    said: list[str] = []
    assert list(conversations(str(path), policy="skip", on_problem=said.append)) == [good]
    assert (
        said[0]
        == "chats.jsonl:1: the content of message 1 holds half a character (a lone surrogate); left out"
    )
    assert [line.partition(": ")[0] for line in said] == [f"chats.jsonl:{number}" for number in (1, 2, 4, 5)]
    for line in said:
        line.encode()
        assert len(line) < 400
    with pytest.raises(UserError, match="half a character"):
        list(conversations(str(path), policy="stop", on_problem=said.append))


def test_a_template_beyond_its_limits_ends_the_pass_after_a_few_rows(tmp_path: Path) -> None:
    """Each such row costs seconds, and the rows are not at fault."""
    writes = (
        "{% if 'loop' in messages[0].content %}{{ 'a' * (messages | length * 10**9) }}{% endif %}" + CHATML
    )
    tokenizer = tokenizer_with(tmp_path, writes)
    asked = ["fine", *[f"loop {n}" for n in range(50)]]
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": "b"}] for a in asked]
    placed = [(chat, f"chats.jsonl:{number}") for number, chat in enumerate(chats, 1)]
    said: list[str] = []
    with pytest.raises(UserError) as caught:
        examples(tokenizer, placed, 200, Problems("skip", said.append))
    message = str(caught.value)
    assert message.startswith(f"chats.jsonl:4: the chat template of {tmp_path} cannot be rendered: ")
    assert message.endswith("so it was with 3 of 4 conversations)")
    assert "\n" not in message
    assert len(said) == 2
    assert len(examples(tokenizer, placed[:3], 200, Problems("skip", said.append))) == 1, "two may be chance"
