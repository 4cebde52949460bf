"""A tokenizer from text: byte-level BPE (Sennrich et al., arXiv:1508.07909; over bytes as in GPT-2).

Text is split as by llama.cpp's `smollm`: every digit by itself, then GPT-2's words. The splitting of numbers matters
for arithmetic (Singh and Strouse, arXiv:2402.14903), single digits are easiest for a small model, and a .gguf of the
model can name the rule. Nothing is normalised, so every UTF-8 text survives unchanged.

The marks and the chat format are DeepSeek's (DeepSeek-V3), so tools that know that format by its name read ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from farthing.base.errors import UserError
from farthing.base.files import write_json

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT)  # ids 0 to 4; 0 and 1 are DeepSeek's bos and eos too
THINK = ("<think>", "</think>")  # ordinary tokens: readers see them
LLAMA_CPP_PRE = "smollm"
MOST = 1_000_000  # entries of a vocabulary; the trainer takes memory for each, used or not

# DeepSeek's format, except that the assistant's thinking in earlier turns stays.
CHAT_TEMPLATE = f"""\
{{{{- bos_token }}}}
{{%- for message in messages %}}
    {{%- if message.role == 'system' %}}
        {{{{- message.content + '\\n\\n' }}}}
    {{%- elif message.role == 'user' %}}
        {{{{- '{USER}' + message.content }}}}
    {{%- elif message.role == 'assistant' %}}
        {{{{- '{ASSISTANT}' + message.content + '{EOS}' }}}}
    {{%- else %}}
        {{{{- raise_exception('a message is by system, user or assistant, not ' + message.role) }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
    {{{{- '{ASSISTANT}' }}}}
{{%- endif %}}
"""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: Path, *, special: Sequence[str] = SPECIAL
) -> None:
    """Write tokenizer.json, tokenizer_config.json (marks, chat template) and generation_config.json to `folder`.

    The same texts in the same order give the same files.

    Args:
        vocab_size: number of ids, marks and bytes included: exactly that many.
        special: the marks, `SPECIAL` first; add `fim.FIM` for fill-in-the-middle.

    Raises:
        UserError: if `vocab_size` leaves no room for words, or exceeds the words of the texts.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    assert tuple(special[: len(SPECIAL)]) == SPECIAL
    least = 256 + len(special) + len(THINK)
    if vocab_size < least:
        raise UserError(f"vocab_size {vocab_size} is too small: bytes and marks alone are {least}; raise it")
    if vocab_size > MOST:
        raise UserError(f"vocab_size {vocab_size:,} is more than any text fills; give at most {MOST:,}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK),
        special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_marks(texts, (*special, *THINK)), trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in THINK])
    if (most := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(
            f"vocab_size {vocab_size} exceeds the words of the text; give more text or at most {most}"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "llama_cpp_pre": LLAMA_CPP_PRE,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    ids = {name: special.index(mark) for name, mark in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
    write_json(folder / "generation_config.json", {f"{name}_token_id": i for name, i in ids.items()})


def _without_marks(texts: Iterable[str], marks: Sequence[str]) -> Iterator[str]:
    """The texts in pieces between marks, so no merges are spent on single tokens."""
    cut = re.compile("|".join(map(re.escape, marks)))
    for text in texts:
        yield from filter(None, cut.split(text))
