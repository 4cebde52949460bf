"""The tokenizer a .gguf carries, against llama.cpp's reading of the same file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from farthing.base.errors import UserError
from farthing.weights.gguf_tokenizer import RULES, build_tokenizer, stop_ids, write_tokenizer

Write = Callable[..., Path]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def metadata(keys: dict[str, Any]) -> dict[str, Any]:
    return {"general.architecture": "llama", "llama.context_length": 128} | {
        f"tokenizer.{name}": value for name, value in keys.items()
    }


def llama_cpp(path: Path) -> Callable[[str], list[int]]:
    library = pytest.importorskip("llama_cpp")
    model = library.Llama(str(path), vocab_only=True, verbose=False)
    return lambda text: model.tokenize(text.encode(), add_bos=False, special=True)


@pytest.fixture(scope="module")
def joining(strings: list[str]) -> dict[str, Any]:
    """A byte-level vocabulary learned with no cutting at all: only the cutting keeps pieces apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(strings * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "ggml.model": "gpt2", "ggml.tokens": tokens, "ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "ggml.bos_token_id": 0, "ggml.eos_token_id": 2,
    }  # fmt: skip


@pytest.mark.parametrize("pre", RULES)
def test_every_way_of_cutting_is_llama_cpps(
    pre: str, joining: dict[str, Any], strings: list[str], write_gguf: Write, tiny: SimpleNamespace
) -> None:
    keys = joining | {"ggml.pre": pre}
    path = write_gguf(tokenizer=keys, tensors={}, keys=tiny.keys | {"vocab_size": len(keys["ggml.tokens"])})
    theirs = llama_cpp(path)
    ours, _ = build_tokenizer(metadata(keys))
    for text in strings:
        assert ours.encode(text).ids == theirs(text), text


def test_the_ways_of_cutting_differ(joining: dict[str, Any], strings: list[str]) -> None:
    """The comparison above could not tell them apart otherwise."""
    ids = {
        pre: [build_tokenizer(metadata(joining | {"ggml.pre": pre}))[0].encode(s).ids for s in strings]
        for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
    }
    assert len({json.dumps(value) for value in ids.values()}) == 5


def test_the_real_tokenizer_is_llama_cpps(smollm2: Path, smollm2_gguf: Path, strings: list[str]) -> None:
    ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    theirs = llama_cpp(smollm2_gguf)
    for text in strings:
        assert ours.encode(text).ids == theirs(text), text
    assert len(ours.encode("1234567").tokens) == 7, "digits stand alone"
    assert ours.encode("<|im_start|>user<|im_end|>").ids[::2] == [1, 2]


@pytest.fixture(scope="module")
def pieces(strings: list[str]) -> dict[str, Any]:
    """A vocabulary of Llama 2's kind: spaces as ▁, a score a piece, and a token for every byte."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False)
    texts = [re.sub("[日本😀]", "", text).replace(" ", "▁") for text in strings]  # left for the bytes
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    learned = [left + right for left, right in model["merges"]]
    letters = sorted(set(model["vocab"]) - set(learned))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *learned, *letters]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(learned) + len(letters))
    scores = [0.0] * 259 + [-float(i) for i in range(len(learned) + len(letters))]
    unique = list(dict.fromkeys(tokens))
    kept = [tokens.index(token) for token in unique]
    return {
        "ggml.model": "llama", "ggml.tokens": unique, "ggml.token_type": [types[i] for i in kept],
        "ggml.scores": [scores[i] for i in kept],
        "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_llama_cpps(
    prefix: bool, pieces: dict[str, Any], strings: list[str], write_gguf: Write, tiny: SimpleNamespace
) -> None:
    keys = pieces | {"ggml.add_space_prefix": prefix}
    path = write_gguf(tokenizer=keys, tensors={}, keys=tiny.keys | {"vocab_size": len(keys["ggml.tokens"])})
    theirs = llama_cpp(path)
    ours, add_bos = build_tokenizer(metadata(keys))
    assert add_bos
    for text in [*strings, "a</s> b<s>c"]:
        assert ours.encode(text).ids == theirs(text), text
        if "</s>" not in text:
            assert ours.decode(ours.encode(text).ids) == text


def test_what_is_written(pieces: dict[str, Any], tmp_path: Path) -> None:
    keys = metadata(pieces | {"ggml.eot_token_id": 300, "chat_template": "{{ messages }}"})
    write_tokenizer(keys, tmp_path)
    written = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.encode("hi").ids[0] == 1
    assert written.encode("hi", add_special_tokens=False).ids[0] != 1
    assert written.encode("hi", "hi").ids.count(1) == 2
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert config["chat_template"] == "{{ messages }}"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 300]


def test_several_chat_templates(pieces: dict[str, Any], tmp_path: Path) -> None:
    several = {"chat_template": "plain", "chat_templates": ["tools"], "chat_template.tools": "with tools"}
    write_tokenizer(metadata(pieces | several), tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    assert written == [{"name": "default", "template": "plain"}, {"name": "tools", "template": "with tools"}]


def test_the_files_own_word_on_marks_wins(pieces: dict[str, Any], tmp_path: Path) -> None:
    write_tokenizer(metadata(pieces | {"ggml.add_bos_token": False, "ggml.add_eos_token": True}), tmp_path)
    written = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.encode("hi").ids[-1] == 2
    assert written.encode("hi").ids[0] != 1


def test_fillers_stay_out_and_user_defined_tokens_stay_whole(joining: dict[str, Any]) -> None:
    tokens = [*joining["ggml.tokens"], "<think>", "[PAD1]", "[PAD2]"]
    types = [*joining["ggml.token_type"], 4, 5, 5]
    keys = joining | {"ggml.pre": "qwen2", "ggml.tokens": tokens, "ggml.token_type": types}
    tokenizer, _ = build_tokenizer(metadata(keys))
    assert tokenizer.get_vocab_size() == len(tokens) - 2
    think = tokenizer.token_to_id("<think>")
    assert think == len(tokens) - 3
    assert tokenizer.encode("a<think>b").ids[1] == think
    assert "<think>" in tokenizer.decode([think]), "user-defined tokens are text, not marks"


def test_stop_ids(joining: dict[str, Any]) -> None:
    assert stop_ids(metadata(joining)) == [2, 0]
    assert stop_ids(metadata(joining | {"ggml.eos_token_id": 99_999})) == [0]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ggml.pre": "martian"}, "martian"),
        ({"ggml.pre": None}, "None"),
        ({"ggml.model": "bert"}, "bert"),
        ({"ggml.tokens": []}, "no tokenizer"),
        ({"ggml.tokens": None}, "no tokenizer"),
        ({"ggml.tokens": 7}, "ggml.tokens"),
        ({"ggml.tokens": [1, 2, 3]}, "ggml.tokens"),
        ({"ggml.tokens": "abc"}, "ggml.tokens"),
        ({"ggml.token_type": [3.5]}, "token_type"),
        ({"ggml.token_type": [3]}, "and 1 of tokenizer.ggml.token_type"),
        ({"ggml.token_type": 3}, "token_type"),
        ({"ggml.merges": [1]}, "merges"),
        ({"ggml.merges": ["a"]}, "damaged"),
        ({"ggml.scores": ["x"]}, "scores"),
        ({"ggml.eos_token_id": "2"}, "eos_token_id"),
        ({"ggml.bos_token_id": True}, "bos_token_id"),
        ({"ggml.add_bos_token": 1}, "add_bos_token"),
        ({"chat_template": 3}, "chat_template"),
        ({"chat_templates": "tools"}, "chat_templates"),
        ({"chat_templates": ["tools"], "chat_template.tools": [1]}, "chat_template.tools"),
        ({"ggml.merges": ["never seen"]}, "damaged"),
        ({"ggml.model": "llama"}, "no scores"),
    ],
)
def test_refusals(changed: dict[str, Any], named: str, joining: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        write_tokenizer(metadata(joining | {"ggml.pre": "gpt-2"} | changed), tmp_path)
