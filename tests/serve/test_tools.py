"""Calls of tools: read back from a model's words, whole or in pieces, and forced by a grammar."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.serve.protocol import Function
from farthing.serve.tools import DEEPSEEK_V3, DEEPSEEK_V31, HERMES, LLAMA, MISTRAL, Calls, Form, form_of, told

WEATHER = Function(
    name="weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
ARGUMENTS = {"city": "Oslo"}
WRITTEN = {
    "hermes": (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'),
    "llama": (LLAMA, '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}'),
    "llama, bare": (LLAMA, '{"name": "weather", "parameters": {"city": "Oslo"}}'),
    "mistral": (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]'),
    "v3": (
        DEEPSEEK_V3,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    "v3.1": (
        DEEPSEEK_V31,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Oslo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
}


def read(form: Form, pieces: Sequence[str]) -> tuple[str, list[tuple[str, dict[str, object]]]]:
    calls = Calls(form)
    found = [part for piece in pieces for part in calls.push(piece)] + calls.flush()
    text = "".join(part for part in found if isinstance(part, str))
    return text, [(part[0], json.loads(part[1])) for part in found if not isinstance(part, str)]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_is_read_whole_and_letter_by_letter(name: str) -> None:
    form, text = WRITTEN[name]
    for pieces in ([text], list(text)):
        assert read(form, pieces) == ("", [("weather", ARGUMENTS)])


@given(st.lists(st.integers(1, 9), max_size=40), st.sampled_from(sorted(WRITTEN)))
def test_where_the_pieces_end_changes_nothing(cuts: list[int], name: str) -> None:
    form, text = WRITTEN[name]
    if name == "llama, bare":
        return  # told apart from text only at the end
    text, pieces, at = f"Let me see. {text}", [], 0
    for cut in cuts:
        pieces.append(text[at : at + cut])
        at += cut
    assert read(form, [*pieces, text[at:]]) == ("Let me see. ", [("weather", ARGUMENTS)])


def test_several_calls() -> None:
    one = WRITTEN["hermes"][1]
    assert read(HERMES, [f"{one}\n{one}"]) == ("", [("weather", ARGUMENTS)] * 2)


@pytest.mark.parametrize(
    "text",
    [
        "no call at all",
        "a < b and <tool",
        "<tool_call>\nnot JSON\n</tool_call>",
        "<tool_call>\n{\"name\": 3}\n</tool_call>",
        "<tool_call>\n" + "[" * 10_000 + "\n</tool_call>",
    ],
)  # fmt: skip
def test_what_is_no_call_stays_text(text: str) -> None:
    said, calls = read(HERMES, list(text))
    assert not calls
    assert said.replace("\n", "") == text.replace("\n", "")


def test_the_last_mark_may_be_missing() -> None:
    text = WRITTEN["hermes"][1].removesuffix("\n</tool_call>")
    assert read(HERMES, [text]) == ("", [("weather", ARGUMENTS)])


def test_arguments_written_as_a_string() -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}\n</tool_call>'
    assert read(HERMES, [text])[1] == [("weather", ARGUMENTS)]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>' }}", HERMES),
        ("nothing", HERMES),
        ("<|python_tag|>", LLAMA),
        ("[TOOL_CALLS]", MISTRAL),
        ("<｜tool▁call▁begin｜>function ```json", DEEPSEEK_V3),
        ("<｜tool▁call▁begin｜>", DEEPSEEK_V31),
    ],
)
def test_a_template_says_its_form(template: str, form: Form) -> None:
    assert form_of(template) is form


def test_a_model_is_told_names_and_schemas() -> None:
    said = told([WEATHER])
    assert '"weather"' in said
    assert '"city"' in said
