"""The templates that ship with Farthing, trained with and asked with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farthing.data.chat_templates import template_text
from farthing.data.masking import encode
from farthing.recipe.types import TEMPLATES

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}]
TALK: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be kind."},
    {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "one", "reasoning_content": "easy"},
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "two"},
]
WITH_TOOL = [
    *TALK,
    {"role": "user", "content": "3?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "three"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_one_text_with_every_answer(
    name: str, chat: SimpleNamespace, tmp_path: Path
) -> None:
    tokenizer = chat.tokenizer(tmp_path, None, eos="</s>")
    with_template = tokenizer.with_template(template_text(name, tokenizer))
    [example] = encode(with_template, chat.conversation(TALK))
    ids = [int(token) for token, on in zip(example.ids, example.loss, strict=True) if on]
    stop, gap = ("<|im_end|>", "") if name == "chatml" else ("</s>", " ")
    learnt = tokenizer._tokens.decode(ids, skip_special_tokens=False)
    assert learnt == f"{gap}<think>\neasy\n</think>\n\none{stop}{gap}two{stop}"


def test_chatml_shows_tools_calls_and_results(chat: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = chat.tokenizer(tmp_path, None)
    tokenizer = tokenizer.with_template(template_text("chatml", tokenizer))
    [example] = encode(tokenizer, chat.conversation(WITH_TOOL, tools=TOOLS))
    text = tokenizer._tokens.decode(example.ids.tolist(), skip_special_tokens=False)
    assert text.count('"name": "add"') == 2
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>' in text
    assert "<|im_start|>user\n<tool_response>3</tool_response><|im_end|>" in text


def test_chatml_is_what_the_models_that_have_it_write(smollm2: Path) -> None:
    from farthing.data.tokenizer import Tokenizer

    theirs = Tokenizer(smollm2)
    ours = theirs.with_template(template_text("chatml", theirs))
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1?"}]
    assert ours.render(asked) == theirs.render(asked)
    assert ours.stop_ids == theirs.stop_ids


def test_a_mark_that_begins_texts_begins_conversations(chat: SimpleNamespace, tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = chat.tokenizer(tmp_path, None, eos="</s>")
    begin = tokenizer.bos_id
    tokenizer._tokens.post_processor = processors.TemplateProcessing(
        single="<b> $A", special_tokens=[("<b>", begin)]
    )
    tokenizer = tokenizer.with_template(template_text("plain", tokenizer))
    assert tokenizer.chat_ids([{"role": "user", "content": "1?"}]).count(begin) == 1
