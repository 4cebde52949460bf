"""The shapes conversations come in: recognised, converted, and refused where there is nothing to learn."""

import json
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.data.messages import Conversation, Passage
from farthing.data.shapes import SHAPES, Found, placed_conversations
from farthing.data.text import Policy, Problems
from farthing.recipe.source import Shape

ASKED, SAID = {"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}
PAIR = [ASKED, SAID]


def read(
    rows: list[Any], folder: Path, policy: Policy = "skip", **how: Any
) -> tuple[list[Conversation | Passage], list[str], Found]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    found = Found()
    problems = Problems(policy, said.append)
    read = placed_conversations(str(folder / "rows.jsonl"), problems, found=found, **how)
    return [learnable for learnable, _ in read], said, found


def conversation(row: Any, folder: Path, **how: Any) -> Conversation:
    [made], said, _ = read([row], folder, **how)
    assert said == []
    assert isinstance(made, Conversation)
    return made


def why_not(row: Any, folder: Path, **how: Any) -> str:
    made, [said], _ = read([row], folder, **how)
    assert made == []
    return said.removeprefix("rows.jsonl:1: ").removesuffix("; left out")


def chatted(made: Conversation) -> list[str]:
    """Each message as "role: content", with a star if it is learnt."""
    return [
        f"{message['role']}{'*' if on else ''}: {message['content']}"
        for message, on in zip(made.messages, made.learnt, strict=True)
    ]


# ---- the formats of TRL's documentation ----

TRL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "conversational language modelling": ({"messages": PAIR}, ["user: Sky?", "assistant*: Blue."]),
    "prompt-completion": ({"prompt": "Sky? ", "completion": " Blue."}, ["user: Sky?", "assistant*: Blue."]),
    "conversational prompt-completion": (
        {"prompt": [ASKED], "completion": [SAID]}, ["user: Sky?", "assistant*: Blue."],
    ),
    "prompt with an earlier answer": (
        {"prompt": [*PAIR, ASKED], "completion": [SAID]},
        ["user: Sky?", "assistant: Blue.", "user: Sky?", "assistant*: Blue."],
    ),
    "preference": (
        {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}, ["user: Sky?", "assistant*: Blue."],
    ),
    "preference without a prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."}, ["user: The sky is", "assistant*: blue."],
    ),
    "conversational preference": (
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID | {"content": "Green."}]},
        ["user: Sky?", "assistant*: Blue."],
    ),
    "conversational preference without a prompt": (
        {"chosen": [*PAIR, *PAIR], "rejected": [*PAIR, ASKED, SAID | {"content": "Green."}]},
        ["user: Sky?", "assistant: Blue.", "user: Sky?", "assistant*: Blue."],
    ),
    "unpaired preference": (
        {"prompt": [ASKED], "completion": [SAID], "label": True}, ["user: Sky?", "assistant*: Blue."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRL)
def test_the_formats_of_trl_are_recognised(name: str, tmp_path: Path) -> None:
    row, wanted = TRL[name]
    assert chatted(conversation(row, tmp_path)) == wanted


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "Sky?"}, "it is a prompt without an answer; sft needs answers, grpo takes questions as tasks"),
        ({"prompt": [ASKED]}, "it is a prompt without an answer"),
        ({"prompt": "Sky?", "completion": "Green.", "label": False}, "its 'label' is false"),
        ({"prompt": "1+1", "completions": ["2"], "labels": [True]}, "it judges steps"),
        ({"prompt": "Sky?", "completion": " "}, "an answer is empty"),
        ({"note": "Sky?"}, "the row has no conversation that is recognised (it has 'note')"),
        ({"messages": PAIR, "chat_template_kwargs": {"messages": []}}, "sets messages, which the conversation itself"),
        ({"messages": PAIR, "chat_template_kwargs": "x"}, "its 'chat_template_kwargs' is not an object"),
        ({"messages": PAIR, "images": ["a.png"]}, "the row has a column 'images'; only text is read"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_says_why(row: dict[str, Any], what: str, tmp_path: Path) -> None:
    assert what in why_not(row, tmp_path)


def test_texts_are_kept_as_they_were_for_models_without_a_template(tmp_path: Path) -> None:
    assert conversation({"prompt": "The sky is", "completion": " blue."}, tmp_path).plain == Passage(
        (("The sky is", False), (" blue.", True))
    )
    [made], _, _ = read([{"text": "The sky is blue."}], tmp_path)
    assert made == Passage((("The sky is blue.", True),))
    row = {"prompt": "The sky is", "completion": " blue."}
    [made], _, _ = read([row], tmp_path, shape="continuation")
    assert made == Passage((("The sky is", False), (" blue.", True)))


# ---- other shapes ----

OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sharegpt": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                           {"from": "gpt", "value": "b"}]},
        ["system: s", "user: a", "assistant*: b"],
    ),
    "sharegpt with a column for the system": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        ["system: s", "user: a", "assistant*: b"],
    ),
    "json text": ({"messages": json.dumps(PAIR)}, ["user: Sky?", "assistant*: Blue."]),
    "alpaca": ({"instruction": "a", "input": "", "output": "b"}, ["user: a", "assistant*: b"]),
    "alpaca in full": (
        {"instruction": "a", "input": "i", "output": "b", "system": "s", "history": [["p", "q"]]},
        ["system: s", "user: p", "assistant*: q", "user: a\ni", "assistant*: b"],
    ),
    "dolly": (
        {"instruction": "a", "context": "c", "response": "b", "category": "x"}, ["user: a\nc", "assistant*: b"],
    ),
    "oasst": ({"INSTRUCTION": "a", "RESPONSE": "b"}, ["user: a", "assistant*: b"]),
    "question and answer": ({"question": "6*7?", "answer": 42}, ["user: 6*7?", "assistant*: 42"]),
    "context": (
        {"context": "c", "question": "a", "answer": "b"}, ["user: c\n\na", "assistant*: b"],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]},
        ["user: ab", "assistant*: c"],
    ),
    "weights": (
        {"messages": [ASKED, SAID | {"weight": 0}, ASKED, SAID | {"weight": 1}]},
        ["user: Sky?", "assistant: Blue.", "user: Sky?", "assistant*: Blue."],
    ),
    "train": (
        {"messages": [ASKED, SAID | {"train": False}, ASKED, SAID | {"training": True}]},
        ["user: Sky?", "assistant: Blue.", "user: Sky?", "assistant*: Blue."],
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "d"}, *PAIR]},
        ["developer: d", "user: Sky?", "assistant*: Blue."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_shapes_of_others_are_recognised(name: str, tmp_path: Path) -> None:
    row, wanted = OTHERS[name]
    assert chatted(conversation(row, tmp_path)) == wanted


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_whatever_its_name(key: str, tmp_path: Path) -> None:
    made = conversation({"messages": [ASKED, SAID | {key: "Hm."}]}, tmp_path)
    assert made.messages[1] == {"role": "assistant", "content": "Blue.", "reasoning_content": "Hm."}
    inline = conversation(
        {"messages": [ASKED, SAID | {"content": "<think>\nHm.\n</think>\n\nBlue."}]}, tmp_path
    )
    assert inline.messages[1] == made.messages[1] | {"inline": "<think>\nHm.\n</think>\n\nBlue."}


CALLED = {"type": "function", "function": {"name": "look", "arguments": {"up": True}}}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": None, "tool_calls": [CALLED]}, {"role": "tool", "content": "blue"}],
        [{"role": "assistant", "tool_calls": [{"name": "look", "arguments": '{"up": true}'}]},
         {"role": "tool", "content": "blue"}],
        [{"role": "assistant", "function_call": {"name": "look", "arguments": '{"up": true}'}},
         {"role": "function", "content": "blue"}],
        [{"from": "function_call", "value": '{"name": "look", "arguments": {"up": true}}'},
         {"from": "observation", "value": "blue"}],
    ],
)  # fmt: skip
def test_calls_and_their_results_are_kept_whatever_their_names(
    messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    tools = [{"name": "look", "parameters": {}}]
    for written in (tools, json.dumps(tools), [{"type": "function", "function": tools[0]}]):
        made = conversation({"messages": [ASKED, *messages, SAID], "tools": written}, tmp_path)
        assert made.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALLED]}
        assert made.messages[2] == {"role": "tool", "content": "blue"}
        assert made.learnt == [False, True, False, True]
        assert made.tools == [{"type": "function", "function": tools[0]}]


def test_segments_are_learnt_by_their_labels(tmp_path: Path) -> None:
    [made], _, _ = read(
        [{"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b"}]}], tmp_path
    )
    assert made == Passage((("a", False), ("b", True)))


BROKEN: dict[str, tuple[Any, str]] = {
    "text": ("hello", "the messages are not a list"),
    "none": ([], "does not end with the assistant's answer"),
    "asked": ([*PAIR, ASKED], "does not end with the assistant's answer"),
    "system only": ([{"role": "system", "content": "s"}], "does not end with"),
    "twice": ([ASKED, ASKED, SAID], "do not take turns"),
    "answer first": ([SAID], "do not take turns"),
    "late system": ([*PAIR, {"role": "system", "content": "s"}, *PAIR], "do not take turns"),
    "role": ([ASKED, {"role": "bot", "content": "b"}], "message 2 is by 'bot'; there are system, developer, user"),
    "role of another kind": ([ASKED, {"role": ["x"], "content": "b"}], "message 2 is by"),
    "content": ([ASKED, {"role": "assistant", "content": None}], "the content of message 2 is not text"),
    "empty": ([ASKED, SAID | {"content": " "}], "an answer is empty"),
    "image": (
        [ASKED | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAID],
        "message 1 holds 'image_url' beside text, which is not read",
    ),
    "half a weight": ([ASKED, SAID | {"weight": 0.5}], "message 2 has the weight 0.5"),
    "none weighed": ([ASKED, SAID | {"weight": 0}], "no answer is to be learnt"),
    "user to learn": ([ASKED | {"train": True}, SAID], "message 1 is to be learnt, but is by user"),
    "parts of a message": ([ASKED, SAID | {"train_detail": []}], "message 2 has a train_detail"),
    "arguments": (
        [ASKED, {"role": "assistant", "tool_calls": [{"name": "look", "arguments": "up"}]}, SAID],
        "the arguments of a tool call of message 2 are no object",
    ),
    "half a character": ([ASKED | {"content": "a\ud800"}, SAID], "the content of message 1 holds half a character"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_conversation_of_the_wrong_shape_is_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    messages, what = BROKEN[name]
    good = {"messages": PAIR}
    made, [said], _ = read([good, {"messages": messages}, good], tmp_path)
    assert len(made) == 2
    assert said.startswith("rows.jsonl:2: ")
    assert what in said
    said.encode()
    assert len(said) < 400
    with pytest.raises(UserError, match=r"^rows\.jsonl:2: "):
        read([good, {"messages": messages}], tmp_path, "stop")


# ---- what is found, and what is asked for ----


def test_rows_are_recognised_one_by_one_and_what_is_not_used_is_counted(tmp_path: Path) -> None:
    preference = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}
    noted = {"messages": [ASKED | {"mood": "good"}, SAID]}
    _, said, found = read([preference, preference, noted, {"prompt": "Sky?"}], tmp_path)
    assert found.shapes == {"preference": 2, "messages": 1, "prompt-only": 1}
    assert list(found.lines()) == [
        "the column 'rejected' is not learnt from; 'chosen' is (2 times)",
        "the key 'mood' of messages is not used",
    ]
    assert len(said) == 1


def test_columns_that_hold_something_and_are_not_used_are_named(tmp_path: Path) -> None:
    rows = [
        {"messages": PAIR, "weight": 0, "source": "x", "empty": "", "none": None, "list": []},
        {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green.", "source": "y", "system": "s"},
        {"prompt": "Sky?"},
    ]
    _, _, found = read(rows, tmp_path)
    assert found.unused == {"weight": 1, "source": 2}
    assert next(found.lines()) == "columns that are not used: source, weight"
    _, _, found = read([{"text": "a", **{f"c{number}": 1 for number in range(10)}}], tmp_path)
    assert next(found.lines()).endswith("c7 and 2 more")


@pytest.mark.parametrize("column", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_in_a_column_of_its_own_is_learnt(column: str, tmp_path: Path) -> None:
    for row in ({"question": "Sky?", "answer": "Blue."}, {"instruction": "Sky?", "output": "Blue."}):
        made = conversation(row | {column: "It scatters."}, tmp_path)
        assert made.messages[1] == SAID | {"reasoning_content": "It scatters."}
        assert made.plain is None  # a text has no place for it
        inline = {key: value.replace("Blue.", "<think>x</think>Blue.") for key, value in row.items()}
        assert conversation(inline | {column: "y"}, tmp_path).messages[1]["reasoning_content"] == "x"


@pytest.mark.parametrize("answer", ['{"colour": "blue"}', "[1, 2]", '[{"a": 1}]', "{}", "[]"])
def test_an_answer_may_be_json(answer: str, tmp_path: Path) -> None:
    assert (
        chatted(conversation({"prompt": "Sky?", "completion": answer}, tmp_path))[1]
        == f"assistant*: {answer}"
    )
    assert chatted(conversation({"prompt": answer, "completion": "b"}, tmp_path))[0] == f"user: {answer}"


def test_the_prompt_may_stand_in_the_chosen_messages_too(tmp_path: Path) -> None:
    row = {"prompt": "Sky?", "chosen": PAIR, "rejected": [ASKED, SAID | {"content": "Green."}]}
    assert chatted(conversation(row, tmp_path)) == ["user: Sky?", "assistant*: Blue."]
    system = {"role": "system", "content": "s"}
    again = row | {"prompt": [*PAIR, ASKED], "chosen": [system, *PAIR, *PAIR]}
    assert chatted(conversation(again, tmp_path)) == [
        "system: s", "user: Sky?", "assistant: Blue.", "user: Sky?", "assistant*: Blue.",
    ]  # fmt: skip


def test_a_solution_is_learnt_rather_than_its_answer(tmp_path: Path) -> None:
    [made], _, found = read([{"problem": "2+2?", "answer": "4", "solution": "It is 4."}], tmp_path)
    assert isinstance(made, Conversation)
    assert chatted(made)[1] == "assistant*: It is 4."
    assert found.unused == {"answer": 1}


def test_without_a_template_the_system_stands_before_the_question(tmp_path: Path) -> None:
    row = {"system": "Be kind.", "prompt": "Sky? ", "completion": "Blue."}
    plain = conversation(row, tmp_path).plain
    assert plain == Passage((("Be kind.\n", False), ("Sky? ", False), ("Blue.", True)))
    tools = [{"name": "look", "parameters": {}}]
    assert conversation(row | {"tools": tools}, tmp_path).plain is None


def test_a_source_may_name_a_column_and_a_shape(tmp_path: Path) -> None:
    assert chatted(conversation({"chat": PAIR, "system": "s"}, tmp_path, field="chat"))[0] == "system: s"
    assert why_not({"chat": PAIR}, tmp_path, field="talk") == "the row has no 'talk' (it has 'chat')"
    row = {"prompt": "a", "response": "b", "messages": PAIR}
    assert chatted(conversation(row, tmp_path, shape="prompt-completion")) == ["user: a", "assistant*: b"]
    assert why_not({"messages": PAIR}, tmp_path, shape="alpaca").startswith(
        "the row does not have the shape alpaca"
    )


def test_every_shape_that_can_be_learnt_can_be_asked_for() -> None:
    refused = {"stepwise supervision", "prompt-only"}
    assert set(get_args(Shape)) == {shape.name for shape in SHAPES} - refused


def test_parquet_columns_are_read_as_they_are_filled(tmp_path: Path) -> None:
    rows = [
        {"messages": [ASKED | {"weight": None}, SAID | {"weight": 0}, ASKED, SAID]},
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                      {"role": "tool", "content": "blue"}, SAID]},
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    problems = Problems("stop", lambda _: None)
    one, two = (made for made, _ in placed_conversations(str(tmp_path / "a.parquet"), problems))
    assert isinstance(one, Conversation)
    assert isinstance(two, Conversation)
    assert one.learnt == [False, False, False, True]
    assert two.messages[1]["tool_calls"] == [CALLED]


def test_plain_text_files_are_no_conversations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt is plain text"):
        list(placed_conversations("a.txt", Problems("skip", lambda _: None)))


# ---- rows of any kind ----

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=True) | st.sampled_from(
        ["", "a", "user", "assistant", "tool", '[{"role": "user"}]', "{", "<think>x</think>y", "\ud800", "text"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "function", "name",
                         "arguments", "weight", "train", "reasoning_content", "label", "id"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
COLUMNS = st.sampled_from([
    "messages", "conversations", "prompt", "completion", "chosen", "rejected", "instruction", "output", "input",
    "history",
    "system", "tools", "label", "labels", "completions", "text", "segments", "question", "answer", "context",
    "chat_template_kwargs", "images", "Prompt",
])  # fmt: skip


@settings(max_examples=400)
@given(st.dictionaries(COLUMNS, VALUES, max_size=5))
def test_a_row_of_any_kind_is_read_or_reported(row: dict[str, Any]) -> None:
    said: list[str] = []
    problems = Problems("skip", said.append)
    with patch("farthing.data.shapes.records", lambda *_: iter([(row, "rows.jsonl:1")])):
        made = [learnable for learnable, _ in placed_conversations("rows.jsonl", problems)]
    assert len(made) + len(said) == 1
    for sentence in said:
        sentence.encode()
        assert "\n" not in sentence
        assert len(sentence) < 500
    for learnable in made:
        assert learnable.asked
        for text in learnable.texts:
            text.encode()
