"""YAML that a person may have written, and what only looks like it."""

import math
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.base.schema import dump_text, given, parse_text, parse_value


def said(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_text(text, "x.yaml")
    message = str(caught.value)
    assert message.startswith("x.yaml")
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("!!bool true", True), ("!!int 7", 7), ("!!float 1", 1.0), ("!!float .inf", math.inf), ("!!str 7", "7"),
        ("!!null ~", None), ("!!seq [1]", [1]), ("!!map {a: 1}", {"a": 1}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ("-.INF", -math.inf), ("1e400", math.inf), ("=", "="),
    ],
)  # fmt: skip
def test_plain_tags_and_words_are_read(text: str, value: Any) -> None:
    assert parse_text(text, "x.yaml") == value
    assert type(parse_text(text, "x.yaml")) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!bool abc", "line 1: true or false is wanted after !!bool, got 'abc'"),
        ("a: !!bool yes", "true or false"),
        ("a: !!bool", "true or false"),
        ("a: !!null abc", "got 'abc'"),
        ("a: !!int 1.5", "a whole number is wanted after !!int, got '1.5'"),
        ("a: !!int", "a whole number"),
        ("\na: !!float 0x", "line 2: a number is wanted"),
        ("a: !!float", "a number is wanted"),
        ("a: !!int [1]", "expected a scalar node"),
        ("a: !!timestamp x", "timestamp' is not allowed here"),
        ("a: !!timestamp 2024-02-30", "is not allowed here"),
        ("a: !!binary x", "is not allowed here"),
        ("!!set {a}", "is not allowed here"),
        ("!!omap [a: 1]", "is not allowed here"),
        ("!!merge a: {b: 1}", "is not allowed here"),
        ("!!python/name:os.system x", "is not allowed here"),
        ("!" + "x" * 100_000 + " 1", "is not allowed here"),
        ("? {a: 1}\n: 2", "a key is a list or a table"),
        ("? [a]\n: 2", "a key is a list or a table"),
        ('a: "\\ud800"', "half a character"),
        ('"\\udfff": 1', "half a character"),
        ('a: "\\UFFFFFFFF"', "not YAML"),
        ("a: " + "9" * 5000, "thousands of digits"),
        ("x" * 100 + ": 1\n" + "x" * 100 + ": 2", "duplicate key"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_sentence(text: str, message: str) -> None:
    assert message in said(text)


MANY = "more than 20,000 values"
DEEP = "nested too deeply"


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        pytest.param("- 1\n" * 200_000, MANY, id="items"),
        pytest.param("[" + "1," * 400_000 + "]", MANY, id="a flow of items"),
        pytest.param("".join(f"k{number}: 1\n" for number in range(90_000)), MANY, id="keys"),
        pytest.param("!!merge <<: {" * 300 + "}" * 300, "is not allowed", id="nested merges"),
        pytest.param("a: &a [1]\nb: &b [*a, *a]\n", "aliases", id="aliases"),
        pytest.param("[" * 900_000, DEEP, id="brackets"),
        pytest.param("{a: " * 200_000, DEEP, id="braces"),
        pytest.param("? " * 400_000, DEEP, id="questions"),
        pytest.param("".join(" " * depth + "a:\n" for depth in range(1300)), DEEP, id="indents"),
    ],
)
def test_a_bomb_is_refused_before_it_is_built(bomb: str, message: str) -> None:
    assert message in said(bomb)


def test_as_many_values_as_a_person_writes_are_read() -> None:
    assert len(parse_text("- 1\n" * 15_000, "x.yaml")) == 15_000


@pytest.mark.parametrize(
    "text", ["9" * 5000, "!!bool abc", "[!!bool abc]", "{a: !!timestamp x}", '"\\ud800"']
)
def test_a_value_of_the_command_line_is_as_strict(text: str) -> None:
    if text.startswith("!"):
        assert parse_value(text, "--set") == text, "outside brackets it is a word"
        return
    with pytest.raises(UserError) as caught:
        parse_value(text, "--set")
    assert str(caught.value).startswith("--set")


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, 1e300, -0.5, True, None, "true", ".inf", "1e400", "<<", "="]
)
def test_what_is_written_is_read_back(value: Any) -> None:
    back = parse_text(dump_text({"a": value}), "x.yaml")["a"]
    assert (back, type(back)) == (value, type(value))


def test_a_number_of_any_size_can_be_shown() -> None:
    assert given(10**400) == "a number of hundreds of digits"
    assert given(-(10**5000)) == "a number of hundreds of digits"
    assert given(12) == "12"
