"""Guides: grammars after thinking, budgets of thinking, calls of tools; followed by a model that takes any token."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farthing.data.tokenizer import Tokenizer
from farthing.serve.errors import ApiError
from farthing.serve.guide import Grammars, Guide
from farthing.serve.protocol import Function, ResponseFormat
from farthing.serve.tools import DEEPSEEK_V31, HERMES, LLAMA, Form

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size)


def allowed(words: np.ndarray, vocabulary: int) -> list[int]:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:vocabulary]
    return np.flatnonzero(bits).tolist()


def follow(
    guide: Guide, tokenizer: Tokenizer, free: Callable[[int], int], seed: int = 0, most: int = 400
) -> list[int]:
    """Tokens of a model that takes any allowed one, and `free(number)` where all are."""
    draw, ids = random.Random(seed), list[int]()
    while len(ids) < most and not guide.done:
        words = guide.mask()
        choices = None if words is None else allowed(words, tokenizer.vocab_size)
        token = free(len(ids)) if choices is None else draw.choice(choices)
        if token in tokenizer.stop_ids:
            break
        guide.take(token)
        ids.append(token)
    return ids


def never(number: int) -> int:
    raise AssertionError("no token was to be free")


@pytest.mark.parametrize("seed", range(5))
def test_json_by_a_schema(tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    guide = Guide(tokenizer, tokenizer.vocab_size, grammar=grammars.of_schema(SCHEMA, "x"))
    found = json.loads(tokenizer.decode(follow(guide, tokenizer, never, seed)))
    assert set(found) == {"n", "ok"}
    assert 0 <= found["n"] <= 99


@pytest.mark.parametrize("seed", range(5))
def test_a_regular_expression(tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    import re

    regex = r"(north|south) [0-9]{2,4} km"
    form = ResponseFormat.model_validate({"type": "regex", "regex": regex})
    guide = Guide(tokenizer, tokenizer.vocab_size, grammar=grammars.of_format(form))
    assert re.fullmatch(regex, tokenizer.decode(follow(guide, tokenizer, never, seed)))


def test_each_sample_follows_from_the_start(tokenizer: Tokenizer, grammars: Grammars) -> None:
    grammar = grammars.of_schema(SCHEMA, "x")
    for seed in range(2):
        guide = Guide(tokenizer, tokenizer.vocab_size, grammar=grammar)
        json.loads(tokenizer.decode(follow(guide, tokenizer, never, seed)))


def test_the_schema_binds_only_after_the_thinking(tokenizer: Tokenizer, grammars: Grammars) -> None:
    thought = tokenizer.raw_encode("so many things to consider</think>")
    guide = Guide(tokenizer, tokenizer.vocab_size, opened=True, grammar=grammars.of_schema(SCHEMA, "x"))
    text = tokenizer.decode(follow(guide, tokenizer, thought.__getitem__))
    before, mark, after = text.partition("</think>")
    assert (before, mark) == ("so many things to consider", "</think>")
    assert set(json.loads(after)) == {"n", "ok"}


def test_a_model_may_think_first_of_its_own_accord(tokenizer: Tokenizer, grammars: Grammars) -> None:
    thinks = tokenizer.raw_encode("<repo_name>")[0]  # stands for a vocabulary's <think>
    guide = Guide(tokenizer, tokenizer.vocab_size, thinks=thinks, grammar=grammars.of_schema(SCHEMA, "x"))
    words = guide.mask()
    assert words is not None
    choices = allowed(words, tokenizer.vocab_size)
    assert thinks in choices
    assert len(choices) > 1
    guide.take(thinks)
    assert guide.mask() is None  # a thought is free
    for token in tokenizer.raw_encode("well</think>"):
        guide.take(token)
    words = guide.mask()
    assert words is not None
    assert thinks not in allowed(words, tokenizer.vocab_size)
    json.loads(tokenizer.decode(follow(guide, tokenizer, never)))


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_closes_the_thought(tokenizer: Tokenizer, budget: int) -> None:
    word = tokenizer.raw_encode(" and")[0]
    guide = Guide(tokenizer, tokenizer.vocab_size, opened=True, budget=budget)
    text = tokenizer.decode(follow(guide, tokenizer, lambda _: word, most=budget + 20))
    thought, mark, after = text.partition("\n</think>\n\n")
    assert mark
    assert thought == " and" * budget
    assert set(after.split()) <= {"and"}  # free again


def test_a_thought_within_its_budget_is_left_alone(tokenizer: Tokenizer) -> None:
    ids = tokenizer.raw_encode("short</think> and then")
    guide = Guide(tokenizer, tokenizer.vocab_size, opened=True, budget=50)
    assert follow(guide, tokenizer, ids.__getitem__, most=len(ids)) == ids


TOOLS = [Function(name="weather", parameters=SCHEMA), Function(name="time")]


@pytest.mark.parametrize("form", [HERMES, LLAMA, DEEPSEEK_V31], ids=["hermes", "llama", "deepseek"])
@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_must_be_made(tokenizer: Tokenizer, grammars: Grammars, form: Form, seed: int) -> None:
    grammar = grammars.compiled(form.grammar(TOOLS[:1], {}, opening=True), "tools")
    guide = Guide(tokenizer, tokenizer.vocab_size, grammar=grammar)
    text = tokenizer.decode(follow(guide, tokenizer, never, seed))
    body = text.removeprefix(form.around[0] + form.open).removesuffix(form.close)
    call = form.read(body)
    assert call is not None
    assert call[0] == "weather"
    assert set(json.loads(call[1])) == {"n", "ok"}


def test_a_call_that_may_be_made_is_bound_once_it_begins(tokenizer: Tokenizer, grammars: Grammars) -> None:
    grammar = grammars.compiled(HERMES.grammar(TOOLS, {}, opening=False), "tools")
    guide = Guide(tokenizer, tokenizer.vocab_size, call=(HERMES.open, grammar))
    free = tokenizer.raw_encode("Let me look.\n<tool_call>")
    for token in free:
        assert guide.mask() is None
        guide.take(token)
    found = list[int]()
    while (words := guide.mask()) is not None:
        token = random.Random(len(found)).choice(allowed(words, tokenizer.vocab_size))
        guide.take(token)
        found.append(token)
    assert HERMES.read(tokenizer.decode(found).removesuffix("</tool_call>")) is not None
    assert not guide.done  # there may be another


@pytest.mark.parametrize(
    "given",
    [
        {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
        {"type": "no such type"},
        {"type": "string", "pattern": "("},
        {"enum": []},
    ],
)
def test_a_schema_that_cannot_be_followed(grammars: Grammars, given: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="response_format"):
        grammars.of_schema(given, "response_format")


def test_a_regular_expression_that_is_none(grammars: Grammars) -> None:
    with pytest.raises(ApiError, match="regex"):
        grammars.of_regex("(", "regex")


def test_a_grammar_that_is_too_long(grammars: Grammars) -> None:
    with pytest.raises(ApiError, match="longer than"):
        grammars.of_regex("a" * 300_000, "regex")


def test_a_grammar_that_fails_on_the_way_says_so(tokenizer: Tokenizer, grammars: Grammars) -> None:
    guide = Guide(tokenizer, tokenizer.vocab_size, grammar=grammars.of_regex("a+b", "regex"))
    guide.mask()
    guide.take(tokenizer.raw_encode("?")[0])  # what the mask forbids; a lexer out of room ends the same way
    assert guide.done
    assert guide.failed
