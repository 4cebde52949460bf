"""Tokenizers of bytes with any chat template, and templates that behave as well-known ones do."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Tokens

from farthing.data.bpe import CHAT_TEMPLATE, SPECIAL, THINK
from farthing.data.messages import Conversation, read_messages
from farthing.data.tokenizer import Message, Tokenizer

MARKS = [*SPECIAL, "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "</s>", "<user>", "<bot>", "<seen>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
SPLIT = (
    "{% set said = m.content or '' %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}"
)
TEMPLATES = {
    "ours": CHAT_TEMPLATE,
    "chatml": CHATML,
    "default system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHATML,
    "inst": "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}",
    # as Qwen3's: earlier answers lose their reasoning, and a last one without any is given an empty one
    "drops earlier": LAST_USER + "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' %}" + SPLIT + "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n"
    "{{ thought }}\n</think>\n\n{% endif %}{{ said }}" + CALLS + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    # as DeepSeek-R1's: the opened turn begins a thought, and no answer keeps one; calls are text, with no content
    "forces": "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% elif m.role == 'tool' %}"
    "<seen>{{ m.content }}{% elif m.role == 'assistant' %}{% if m.tool_calls %}<bot>"
    "{% for c in m.tool_calls %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}</s>{% endif %}"
    "{% if m.content is not none %}<bot>{{ m.content.split('</think>')[-1] }}</s>{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<bot><think>\n{% endif %}",
    # as DeepSeek-V3.1's: thinking is a variable, and every answer in view stands behind a closed thought
    "thinks if asked": "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<bot></think>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{{ '<think>' if thinking else '</think>' }}{% endif %}",
    # as GLM-4.5's: no token ends a turn but the one that begins the next
    "no end": LAST_USER + "{% for m in messages %}{% if m.role == 'user' %}<user>\n{{ m.content }}"
    "{% elif m.role == 'tool' %}<seen>\n{{ m.content }}{% elif m.role == 'assistant' %}<bot>" + SPLIT
    + "{{ '\n<think>' }}{{ thought if loop.index0 > ns.last else '' }}</think>{% if said %}{{ '\n' + said }}{% endif %}"
    + CALLS
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}",
    "marked": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}  # fmt: skip
STOPS = {"ours": SPECIAL[1], "inst": "</s>", "forces": "</s>", "thinks if asked": "</s>", "no end": "</s>"}


def tokenizer_with(
    folder: Path,
    template: str | None,
    eos: str = "<|im_end|>",
    trims: bool = False,
    stops: tuple[str, ...] = (),
) -> Tokenizer:
    """Bytes as tokens, and marks.

    Args:
        template: the name of one, or its text.
        trims: adds the post-processor that leaves white space out of offsets.
        stops: more tokens on which generation stops.
    """
    tokens = Tokens(
        models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    tokens.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in THINK])
    if trims:
        tokens.post_processor = processors.ByteLevel(trim_offsets=True)
    folder.mkdir(exist_ok=True)
    tokens.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": STOPS.get(template or "", eos), "bos_token": SPECIAL[0]}
    if template is not None:
        settings["chat_template"] = TEMPLATES.get(template, template)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template == "no end":
        stops = ("<user>", "<seen>")
    ids = [tokens.token_to_id(mark) for mark in (settings["eos_token"], *stops)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return Tokenizer(folder)


def turns(*contents: str) -> list[Message]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def conversation(messages: list[Message], **keys: Any) -> Conversation:
    from collections import Counter

    return Conversation(*read_messages(messages, Counter()), **keys)


@pytest.fixture(scope="session")
def chat() -> SimpleNamespace:
    """`.tokenizer(folder, template, …)`, `.turns(…)`, `.conversation(messages, …)` and `.templates`."""
    make: Callable[..., Tokenizer] = tokenizer_with
    return SimpleNamespace(tokenizer=make, turns=turns, conversation=conversation, templates=TEMPLATES)
