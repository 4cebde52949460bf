"""What is learnt of a conversation, under templates that treat reasoning, tools and ends of turns in many ways."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.data.bpe import SPECIAL
from farthing.data.masking import encode
from farthing.data.messages import Conversation, Passage, Unusable
from farthing.data.tokenizer import Message, Tokenizer

IM_END = "<|im_end|>"
THOUGHTS = [
    {"role": "user", "content": "1?"},
    {"role": "assistant", "reasoning_content": "x", "content": "one"},
    {"role": "user", "content": "2?"},
    {"role": "assistant", "reasoning_content": "y", "content": "two"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
WITH_TOOL = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "it is 3"},
    {"role": "assistant", "content": "three"},
]


def shown(tokenizer: Tokenizer, learnable: Conversation | Passage) -> list[tuple[str, list[str]]]:
    """Each text, and the runs of tokens in it that are learnt."""
    found = []
    for example in encode(tokenizer, learnable):
        runs: list[list[int]] = [[]]
        for token, on in zip(example.ids.tolist(), example.loss.tolist(), strict=True):
            if on:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])

        def text(ids: list[int]) -> str:
            return tokenizer._tokens.decode(ids, skip_special_tokens=False)

        found.append((text(example.ids.tolist()), [text(run) for run in runs if run]))
    return found


def learnt(tokenizer: Tokenizer, learnable: Conversation | Passage) -> list[list[str]]:
    return [runs for _, runs in shown(tokenizer, learnable)]


@pytest.fixture
def masks(chat: SimpleNamespace, tmp_path: Path) -> Any:
    """`learnt` of messages under the template of this name."""

    def of(template: str, messages: list[Message], **keys: Any) -> list[list[str]]:
        return learnt(chat.tokenizer(tmp_path / template, template), chat.conversation(messages, **keys))

    return of


WORDS = st.text(st.characters(categories=["L", "N", "P"]), min_size=1).map(
    lambda text: text.replace("<", "(")
)


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("name", ["ours", "chatml", "default system", "marked"])
def test_the_answers_and_their_ends_are_learnt_and_nothing_else(
    name: str, trims: bool, chat: SimpleNamespace, tmp_path: Path
) -> None:
    tokenizer = chat.tokenizer(tmp_path, name, trims=trims)
    stop = SPECIAL[1] if name == "ours" else IM_END

    @given(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, min_size=3, max_size=3), st.booleans())
    def check(asked: list[str], answers: list[str], system: bool) -> None:
        messages = chat.turns(*(text for pair in zip(asked, answers, strict=False) for text in pair))
        if system:
            messages = [{"role": "system", "content": asked[0]}, *messages]
        assert learnt(tokenizer, chat.conversation(messages)) == [[a + stop for a in answers[: len(asked)]]]

    check()


@pytest.mark.parametrize(
    "name", ["ours", "chatml", "drops earlier", "forces", "thinks if asked", "no end", "marked"]
)
def test_what_is_learnt_follows_what_is_asked(name: str, chat: SimpleNamespace, tmp_path: Path) -> None:
    """Every learnt answer stands behind just what `render` gives for the conversation before it."""
    tokenizer = chat.tokenizer(tmp_path, name)
    inline = chat.turns("1?", "<think>\nx\n</think>\n\none", "2?", "<think>\ny\n</think>\n\ntwo")
    for messages, also in ((THOUGHTS, inline), (chat.turns("a", "b", "c", "d"),) * 2):
        asked = [
            tokenizer.render(spelt[:at], **variables)
            for spelt in (messages, also)
            for at in (1, 3)
            for variables in ({}, {"thinking": True})
        ]
        for text, runs in shown(tokenizer, chat.conversation(messages)):
            at = 0
            for run in runs:
                at = text.index(run, at)
                assert text[:at] in asked
                at += len(run)


def test_an_answer_like_the_question_or_with_white_space_is_told_apart(
    chat: SimpleNamespace, tmp_path: Path
) -> None:
    tokenizer = chat.tokenizer(tmp_path, "chatml", trims=True)
    messages = chat.turns("same", "same", "same", "  same\n", "\n", "\n\nsame")
    assert learnt(tokenizer, chat.conversation(messages)) == [
        ["same" + IM_END, "  same\n" + IM_END, "\n\nsame" + IM_END]
    ]


def test_a_template_that_trims_and_one_without_a_generation_prompt(masks: Any, chat: SimpleNamespace) -> None:
    assert masks("inst", chat.turns(" a ", " b ", "c", "d")) == [[" b</s>", " d</s>"]]


# ---- reasoning ----


def test_reasoning_is_learnt_where_the_template_leaves_it(masks: Any) -> None:
    written = [f"<think>\n{r}\n</think>\n\n{a}" for r, a in (("x", "one"), ("y", "two"))]
    assert masks("ours", THOUGHTS) == [[text + SPECIAL[1] for text in written]]
    assert masks("chatml", THOUGHTS) == [[text + IM_END for text in written]]
    assert masks("no end", THOUGHTS) == [
        ["\n<think>x</think>\none<user>"],
        ["\n<think>y</think>\ntwo<user>"],
    ]


def test_an_answer_whose_reasoning_is_taken_out_later_has_a_text_of_its_own(masks: Any) -> None:
    assert masks("drops earlier", THOUGHTS) == [
        ["<think>\nx\n</think>\n\none" + IM_END],
        ["<think>\ny\n</think>\n\ntwo" + IM_END],
    ]


def test_reasoning_goes_into_the_thought_that_a_template_opens(masks: Any, chat: SimpleNamespace) -> None:
    assert masks("forces", THOUGHTS) == [["x\n</think>\n\none</s>"], ["y\n</think>\n\ntwo</s>"]]
    assert masks("forces", chat.turns("1?", "one")) == [["\n</think>\n\none</s>"]]
    assert masks("thinks if asked", THOUGHTS) == [["x</think>one</s>"], ["y</think>two</s>"]]
    assert masks("thinks if asked", chat.turns("1?", "one", "2?", "two")) == [["one</s>", "two</s>"]]


def test_inline_reasoning_is_the_same_as_a_field(masks: Any, chat: SimpleNamespace) -> None:
    inline = chat.turns("1?", "<think>\nx\n</think>\n\none", "2?", "<think>\ny\n</think>\n\ntwo")
    for template in ("ours", "chatml", "drops earlier", "forces", "thinks if asked", "no end"):
        assert masks(template, inline) == masks(template, THOUGHTS), template


# ---- the ends of turns ----


def test_the_token_that_begins_the_next_turn_ends_this_one(masks: Any, chat: SimpleNamespace) -> None:
    assert masks("no end", chat.turns("1?", "one", "2?", "two")) == [
        ["\n<think></think>\none<user>", "\n<think></think>\ntwo<user>"]
    ]
    [[call, answer]] = masks("no end", WITH_TOOL)
    assert call.endswith("</tool_call><seen>")
    assert answer.endswith("three<user>")


def test_white_space_before_the_mark_that_ends_a_turn_is_learnt_once(
    chat: SimpleNamespace, tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else 'user' }}>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    tokenizer = chat.tokenizer(tmp_path, template, stops=("<user>",))
    messages = chat.turns("1?", "one\n\n", "2?", "two ")
    assert learnt(tokenizer, chat.conversation(messages)) == [["\none\n\n<user>", "\ntwo <user>"]]


def test_a_token_that_ends_the_whole_conversation_is_no_part_of_it(
    chat: SimpleNamespace, tmp_path: Path
) -> None:
    """Phi-3 writes its end-of-text token behind a conversation that is not to go on."""
    phi = chat.templates["chatml"].replace("{% endif %}", "{% else %}</s>{% endif %}")
    tokenizer = chat.tokenizer(tmp_path, phi, eos="</s>", stops=(IM_END,))
    turns = chat.conversation(chat.turns("1?", "one", "2?", "two"))
    assert learnt(tokenizer, turns) == [[f"one{IM_END}", f"two{IM_END}"]]


# ---- tools ----


def test_calls_are_learnt_and_what_tools_say_is_not(masks: Any) -> None:
    texts = masks("drops earlier", WITH_TOOL, tools=TOOLS)
    call = '<tool_call>add {"a": 1, "b": "two"}</tool_call>' + IM_END
    assert [run for runs in texts for run in runs] == [
        "<think>\n\n</think>\n\n" + call,
        "<think>\n\n</think>\n\nthree" + IM_END,
    ]
    assert masks("forces", WITH_TOOL) == [
        ['\n</think>\n\nadd {"a": 1, "b": "two"}</s>'],
        ["\n</think>\n\nthree</s>"],
    ]


@pytest.mark.parametrize(
    ("template", "messages", "tools", "what"),
    [
        ("chatml", WITH_TOOL, None, "leaves out a tool call of message 2"),
        ("chatml", WITH_TOOL[:1] + WITH_TOOL[-1:], TOOLS, "does not show the tools"),
        ("marked", [WITH_TOOL[0], WITH_TOOL[1], WITH_TOOL[3]], None, "leaves out a tool call of message 2"),
        ("thinks if asked", [{"role": "system", "content": "Be kind."}, *THOUGHTS], None, 
         r"leaves out message 1 \(by system\)"),
    ],
)  # fmt: skip
def test_nothing_that_a_template_leaves_out_is_dropped_in_silence(
    template: str, messages: list[Message], tools: Any, what: str, masks: Any
) -> None:
    with pytest.raises(Unusable, match=what):
        masks(template, messages, tools=tools)


def test_reasoning_that_only_some_turns_have_a_place_for_is_refused(
    masks: Any, chat: SimpleNamespace, tmp_path: Path
) -> None:
    """A template that opens a thought, but not after a tool, and takes reasoning out of every answer."""
    thought = [WITH_TOOL[0], WITH_TOOL[1] | {"reasoning_content": "x"}, WITH_TOOL[2],
               WITH_TOOL[3] | {"reasoning_content": "y"}]  # fmt: skip
    assert masks("drops earlier", thought)[0][0].startswith("<think>\nx\n</think>")
    after_tool = (
        "{% if add_generation_prompt %}{{ '<bot>' if messages[-1].role == 'tool' "
        "else '<bot><think>\n' }}{% endif %}"
    )
    template = chat.templates["forces"].partition("{% if add_generation_prompt")[0] + after_tool
    with pytest.raises(Unusable, match="leaves out the reasoning of message 4"):
        encode(chat.tokenizer(tmp_path, template, eos="</s>"), chat.conversation(thought))


def test_a_template_that_writes_a_turn_twice_is_refused(chat: SimpleNamespace, tmp_path: Path) -> None:
    twice = chat.templates["chatml"].replace(
        "<|im_end|>\n{% endfor %}", "<|im_end|>\nand again<|im_end|>{% endfor %}"
    )
    assert twice != chat.templates["chatml"]
    with pytest.raises(Unusable, match="goes on after the end of message 2"):
        encode(chat.tokenizer(tmp_path, twice), chat.conversation(chat.turns("1?", "one")))


def test_a_developer_is_the_system_unless_the_template_knows_one(masks: Any, chat: SimpleNamespace) -> None:
    messages = [{"role": "developer", "content": "Be kind."}, *chat.turns("a", "b")]
    assert masks("ours", messages) == [["b" + SPECIAL[1]]]


# ---- what is not to be learnt ----


@pytest.mark.parametrize("key", ["weight", "train", "training"])
def test_a_message_that_is_not_to_be_learnt_is_not(key: str, masks: Any, chat: SimpleNamespace) -> None:
    messages = chat.turns("1?", "one", "2?", "two", "3?", "three")
    messages[1][key] = False if key != "weight" else 0
    messages[5][key] = False if key != "weight" else 0
    assert masks("chatml", messages) == [["two" + IM_END]]
    assert masks("drops earlier", messages) == [["<think>\n\n</think>\n\ntwo" + IM_END]]


def test_generation_marks_decide_within_an_answer(chat: SimpleNamespace, tmp_path: Path) -> None:
    marked = chat.templates["marked"].replace("{% generation %}", "A:{% generation %}")
    tokenizer = chat.tokenizer(tmp_path, marked)
    assert learnt(tokenizer, chat.conversation(chat.turns("1?", "one", "2?", "two"))) == [
        ["one" + IM_END, "two" + IM_END]
    ]
    none = chat.templates["marked"].replace("{% if m.role == 'assistant' %}", "{% if m.role == 'none' %}")
    with pytest.raises(Unusable, match="generation marks leave out the answer of message 2"):
        learnt(chat.tokenizer(tmp_path / "none", none), chat.conversation(chat.turns("1?", "one")))


# ---- templates that cannot be trained with ----


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}",
            "no token that stops",
        ),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "never saw"),
        ("{{ raise_exception('no') }}", "cannot render this conversation: no"),
        (None, "has no chat template, as base models have none; give one with chat_template"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused_by_the_turn_that_shows_it(
    template: str | None, what: str, chat: SimpleNamespace, tmp_path: Path
) -> None:
    tokenizer = chat.tokenizer(tmp_path, template, eos="</s>")
    with pytest.raises(Unusable, match=what):
        encode(tokenizer, chat.conversation(chat.turns("1?", "one")))


def test_single_turns_train_where_longer_ones_cannot(chat: SimpleNamespace, tmp_path: Path) -> None:
    """The opened turn of a later question says how many there were; that of the first says nothing."""
    rewrites = (
        "{% if messages | length > 3 and not add_generation_prompt %}long{% endif %}"
        + chat.templates["chatml"]
    )
    tokenizer = chat.tokenizer(tmp_path, rewrites)
    assert learnt(tokenizer, chat.conversation(chat.turns("1?", "one"))) == [["one" + IM_END]]
    with pytest.raises(Unusable, match="answer of message 4"):
        encode(tokenizer, chat.conversation(chat.turns("1?", "one", "2?", "two")))


def test_a_control_token_is_refused_wherever_it_stands(chat: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = chat.tokenizer(tmp_path, "drops earlier")
    with pytest.raises(Unusable, match="message 1 holds a control token of the tokenizer"):
        encode(tokenizer, chat.conversation(chat.turns("hi<|im_end|>", "no")))
    thought = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "reasoning": "<user>", "content": "one"},
    ]
    with pytest.raises(Unusable, match="message 2 holds a control token"):
        encode(tokenizer, chat.conversation(thought))
    tools = [{"type": "function", "function": {"name": "a", "description": "</s>"}}]
    with pytest.raises(Unusable, match="the list of tools holds a control token"):
        encode(tokenizer, chat.conversation(chat.turns("1?", "one"), tools=tools))


# ---- plain text ----


def test_a_continuation_begins_with_the_white_space_before_it(chat: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = chat.tokenizer(tmp_path, None, eos="</s>")
    assert learnt(tokenizer, Passage((("The sky is", False), (" blue.", True)))) == [[" blue.</s>"]]
    assert learnt(tokenizer, Passage((("all of it", True),))) == [["all of it</s>"]]
    assert learnt(tokenizer, Passage((("a", True), ("b", False), ("c</s>", True)))) == [["a", "c</s>"]]


def test_a_token_across_a_boundary_belongs_to_what_it_ends_in(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    for prompt, completion in (("The sky is", " blue"), ("The sky is ", "blue")):
        [example] = encode(tokenizer, Passage(((prompt, False), (completion, True))))
        assert example.ids.tolist()[:-1] == tokenizer.encode("The sky is blue")
        assert tokenizer.decode(example.ids[example.loss]) == " blue"
