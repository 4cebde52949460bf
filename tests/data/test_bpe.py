"""A tokenizer trained on text: exact, repeatable, and readable by other tools."""

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.data.bpe import ASSISTANT, BOS, EOS, PAD, SPECIAL, THINK, USER, train_tokenizer
from farthing.data.packing import FIM
from farthing.data.tokenizer import Tokenizer
from farthing.weights.gguf_tokenizer import build_tokenizer

TEXTS = [f"The sum of {a} and {b} is {a + b}. What is {b} times {a}?\n" for a in range(20) for b in range(20)]
TEXTS += ["the quick brown fox jumps over the lazy dog and doesn't look back", "naïve café 日本語"] * 3
SIZE = 320
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 17 + 25?"},
    {"role": "assistant", "content": "<think>17 + 25 = 42</think>\n\nThe answer is 42"},
    {"role": "user", "content": "And twice that?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(TEXTS, SIZE, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def test_it_has_exactly_the_ids_asked_for(folder: Path, tokenizer: Tokenizer) -> None:
    assert len(tokenizer) == SIZE
    assert [tokenizer.raw_encode(mark) for mark in SPECIAL] == [[0], [1], [2], [3], [4]]
    assert [tokenizer.raw_encode(mark) for mark in THINK] == [[SIZE - 2], [SIZE - 1]]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.stop_ids == {1}
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.raw_encode(text)) == text
    [ids] = tokenizer.text_encoder()([text])
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == text


def test_digits_stand_alone_and_words_do_not(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.raw_encode("x=12345.67")] == list("x=12345.67")
    assert len(tokenizer.raw_encode("The sum of")) == 3


def test_thinking_is_visible_and_marks_are_not(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.raw_encode(f"{BOS}<think>so</think>7{EOS}")) == "<think>so</think>7"


def test_a_mark_written_in_a_document_is_text(tokenizer: Tokenizer) -> None:
    [ids] = tokenizer.text_encoder()([f"a {EOS} b <think>"])
    assert ids.count(tokenizer.eos_id) == 0
    assert ids[-1] == SIZE - 2  # thinking stays one token
    assert tokenizer.decode(ids) == f"a {EOS} b <think>"
    assert tokenizer.raw_encode(EOS) == [tokenizer.eos_id], "the tokenizer itself is as it was"


def test_the_same_text_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(TEXTS), SIZE, tmp_path)
    names = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_no_merges_are_spent_on_marks(tmp_path: Path) -> None:
    train_tokenizer([f"{text}{EOS}<think>" for text in TEXTS], SIZE, tmp_path)
    assert (
        json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
        .keys()
        .isdisjoint({"think", "Ġthink", "<think", "end", "sentence"})
    )


def test_transformers_reads_it_the_same_way(folder: Path, tokenizer: Tokenizer, strings: list[str]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in strings:
        assert theirs(text).input_ids == tokenizer.encode(text)
    for messages in (CHAT, CHAT[1:3]):
        for opened in (True, False):
            rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
            assert rendered == tokenizer.render(messages, add_generation_prompt=opened)


def test_the_chat_format_is_deepseeks_and_keeps_earlier_thinking(tokenizer: Tokenizer) -> None:
    assert tokenizer.render(CHAT) == (
        f"{BOS}Be brief.\n\n{USER}What is 17 + 25?{ASSISTANT}<think>17 + 25 = 42</think>\n\nThe answer is 42{EOS}"
        f"{USER}And twice that?{ASSISTANT}"
    )
    with pytest.raises(UserError, match="by system, user or assistant, not tool"):
        tokenizer.render([{"role": "tool", "content": "4"}])


def test_llama_cpp_knows_its_rules_by_the_name_it_gives(
    folder: Path, tokenizer: Tokenizer, strings: list[str]
) -> None:
    """The tokenizer rebuilt from what a .gguf holds of it: vocabulary, merges and that name."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = model["vocab"] | {THINK[0]: SIZE - 2, THINK[1]: SIZE - 1}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    rebuilt, _ = build_tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": config["llama_cpp_pre"],
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if t in SPECIAL else 4 if t in THINK else 1 for t in tokens],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        }
    )
    for text in [*strings, tokenizer.render(CHAT)]:
        assert rebuilt.encode(text, add_special_tokens=False).ids == tokenizer.raw_encode(text)


def test_marks_for_fill_in_the_middle_come_when_asked(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, SIZE, tmp_path, special=(*SPECIAL, *FIM))
    tokenizer = Tokenizer(tmp_path)
    assert [tokenizer.raw_encode(mark) for mark in FIM] == [[5], [6], [7]]
    assert len(tokenizer) == SIZE
    assert tokenizer.raw_encode(PAD) == [2]


def test_a_vocabulary_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="vocab_size 200 is too small: bytes and marks alone are 263; raise it"
    ):
        train_tokenizer(TEXTS, 200, tmp_path)
    with pytest.raises(UserError, match=r"vocab_size 5000 exceeds .* at most (\d+)$") as raised:
        train_tokenizer(TEXTS, 5000, tmp_path)
    assert list(tmp_path.iterdir()) == []
    most = int(str(raised.value).split()[-1])
    train_tokenizer(TEXTS, most, tmp_path)
    assert len(Tokenizer(tmp_path)) == most


def test_a_vocabulary_beyond_any_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 1,000,000"):
        train_tokenizer(["text"], 10**10, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """The library's own way of saving raises a bare Exception, which nothing above could tell from a bug."""
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        train_tokenizer(["hello there world 12 the fox"] * 30, 275, tmp_path)
