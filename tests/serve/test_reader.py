"""Reading a sample's tokens: stops, thinking and calls, wherever the tokens end."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.data.tokenizer import Tokenizer
from farthing.serve.reader import Read, Reader
from farthing.serve.tools import HERMES


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


def read(reader: Reader, ids: list[int], each: int = 1) -> Read:
    known = [reader.push(ids[at : at + each]) for at in range(0, len(ids), each)] + [reader.finish()]
    return Read(
        "".join(one.thinking for one in known),
        "".join(one.text for one in known),
        tuple(call for one in known for call in one.calls),
    )


@pytest.mark.parametrize("each", [1, 3, 1000])
def test_plain_text(tokenizer: Tokenizer, each: int) -> None:
    text = "Grüße, 世界! 🙂 and <b>so</b> on.\n"
    assert read(Reader(tokenizer), tokenizer.raw_encode(text), each) == Read(text=text)


@pytest.mark.parametrize("each", [1, 4, 1000])
def test_thinking_is_told_apart_and_counted(tokenizer: Tokenizer, each: int) -> None:
    ids = tokenizer.raw_encode("<think>two and two</think>\n\nFour.")
    reader = Reader(tokenizer)
    assert read(reader, ids, each) == Read("two and two", "Four.")
    marked = len(tokenizer.raw_encode("<think>two and two</think>"))
    assert len(tokenizer.raw_encode("two and two")) <= reader.thought <= marked


def test_a_thought_that_the_template_opened(tokenizer: Tokenizer) -> None:
    ids = tokenizer.raw_encode("two and two</think>Four.")
    assert read(Reader(tokenizer, opened=True), ids) == Read("two and two", "Four.")


def test_a_thought_without_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.raw_encode("on and on")
    reader = Reader(tokenizer, opened=True)
    assert read(reader, ids) == Read("on and on")
    assert reader.thought == len(ids)


def test_what_is_not_split_stays_together(tokenizer: Tokenizer) -> None:
    text = "<think>a</think> b"
    assert read(Reader(tokenizer, splits=False), tokenizer.raw_encode(text)) == Read(text=text)


@given(st.text("ab\n STOP", max_size=30), st.integers(1, 5))
def test_nothing_of_a_stop_or_after_it_is_shown(tokenizer: Tokenizer, text: str, each: int) -> None:
    ids = tokenizer.raw_encode(text)
    whole = tokenizer.decode(ids)
    shown = read(Reader(tokenizer, ["STOP", "\n\n"], splits=False), ids, each).text
    ends = [at for stop in ("STOP", "\n\n") if (at := whole.find(stop)) >= 0]
    assert shown == whole[: min(ends, default=len(whole))]


def test_calls(tokenizer: Tokenizer) -> None:
    ids = tokenizer.raw_encode('Wait.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>')
    found = read(Reader(tokenizer, form=HERMES), ids)
    assert found.text.strip() == "Wait."
    ((name, arguments),) = found.calls
    assert (name, json.loads(arguments)) == ("f", {"x": 1})


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.raw_encode("done"), *tokenizer.stop_ids]
    assert read(Reader(tokenizer), ids) == Read(text="done")
