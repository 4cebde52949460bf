"""A model folder's tokenizer as the `tokenizer.*` keys of a .gguf.

Of the rules around a vocabulary a .gguf holds only a name. What llama.cpp would do otherwise than the folder, or not at
all, is refused: a model that reads other ids than it was trained on still answers, only worse.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.weights.chat_template import DEFAULT, read_templates
from farthing.weights.folder import read_config, require_tokenizer
from farthing.weights.gguf_tokenizer import CONTROL, NORMAL, RULES, UNUSED, USER_DEFINED
from farthing.weights.tokenizer import FolderTokenizer, read_optional, read_tokenizer

_DIGIT, _DIGITS = r"\p{N}", re.compile(r"\d\d")
_COMPOSES = (
    "differs: this tokenizer composes characters before it splits text (NFC), llama.cpp does not; a letter and its "
    "accent written as two characters get other tokens there"
)


def tokenizer_metadata(folder: Path, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """The `tokenizer.*` keys of a .gguf for the tokenizer of a model folder, and what differs in llama.cpp.

    Ids up to `vocab_size` that the tokenizer does not use are filled with unused tokens.

    Raises:
        UserError: when there is no tokenizer, it is neither a byte-level BPE nor one of SentencePiece's, it does
            something to text that has no name in llama.cpp, or it has more tokens than the model.
    """
    require_tokenizer(folder)
    read = read_tokenizer(folder)
    if read.tokens.encode_special_tokens:
        raise _unknown(folder, "split_special_tokens true")
    data = json.loads(read.tokens.to_str())
    _check_model(folder, data["model"])
    vocabulary = read.tokens.get_vocab()
    _check_vocabulary(folder, vocabulary, vocab_size)
    added = data["added_tokens"]
    _check_added(folder, added)
    model = data["model"]
    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    special = {token["content"]: bool(token["special"]) for token in added}
    for token, number in vocabulary.items():
        tokens[number] = token
        types[number] = {None: NORMAL, True: CONTROL, False: USER_DEFINED}[special.get(token)]
    if model.get("byte_fallback"):
        from farthing.weights.gguf_pieces import piece_keys, piece_types

        scores, prefix, notes = piece_keys(folder, data, vocabulary)
        for number, kind in piece_types(vocabulary, special, model.get("unk_token")).items():
            types[number] = kind
        rules: dict[str, Any] = {
            "ggml.model": "llama",
            "ggml.pre": "default",
            "ggml.scores": [scores.get(number, 0.0) for number in range(vocab_size)],
            "ggml.add_space_prefix": prefix,
        }
    else:
        name = _name(folder, data, read.settings.get("llama_cpp_pre"))
        notes = _check_around(folder, data, name)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        rules = {"ggml.model": "gpt2", "ggml.pre": name, "ggml.merges": merges}
    keys = {
        **rules,
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        **_marks(folder, read, vocab_size),
        **_templates(folder, read.settings),
    }
    return {f"tokenizer.{name}": value for name, value in keys.items()}, notes


# ---------------------------------------------------------------- what llama.cpp can do


def _check_model(folder: Path, model: dict[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise UserError(
            f"the tokenizer of {folder} is neither a byte-level BPE nor one of SentencePiece's with tokens for bytes, "
            f"but a {model.get('type')}; a .gguf of it is not supported"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(folder, f"a BPE with {key} {model[key]!r}")
    if model.get("unk_token") and not model.get("byte_fallback") and not _bytes() <= set(model["vocab"]):
        raise _unknown(folder, f"bytes that become {model['unk_token']!r}")


def _bytes() -> set[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _check_vocabulary(folder: Path, vocabulary: dict[str, int], vocab_size: int) -> None:
    highest = max(vocabulary.values(), default=0)
    if highest >= vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has ids up to {highest}, its model {vocab_size}; take the tokenizer that belongs "
            "to it"
        )
    (number, count) = Counter(vocabulary.values()).most_common(1)[0] if vocabulary else (0, 1)
    if count > 1:
        shared = sorted(token for token, its in vocabulary.items() if its == number)
        raise UserError(f"{folder}: the tokens {shared[0]!r} and {shared[1]!r} have one id, {number}; in a .gguf each "
                        "has its own")  # fmt: skip


def _check_added(folder: Path, added: list[dict[str, Any]]) -> None:
    for token in added:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise _unknown(folder, f"the token {token['content']!r} with {flag}")


def _check_around(folder: Path, data: dict[str, Any], name: str) -> list[str]:
    """What happens to a text before it is split and to ids when they are joined; returns what differs."""
    notes = []
    kinds = [step.get("type") for step in _steps(data.get("normalizer"), "normalizers")]
    if kinds == ["NFC"] and name in RULES and RULES[name].nfc:
        notes = [_COMPOSES]
    elif kinds:
        raise _unknown(folder, f"a normalizer ({', '.join(map(str, kinds))})")
    kinds = [step.get("type") for step in _steps(data.get("decoder"), "decoders")]
    if kinds != ["ByteLevel"]:
        raise _unknown(folder, f"a decoder ({', '.join(map(str, kinds)) or 'none'}) other than ByteLevel")
    return notes


def _unknown(folder: Path, what: str) -> UserError:
    return UserError(
        f"the tokenizer of {folder} has {what}, which llama.cpp does not know; train the model with one that has not"
    )


def _name(folder: Path, data: dict[str, Any], given: Any) -> str:
    """llama.cpp's name for this tokenizer's rules; `given` is the one its folder claims, checked where it can be."""
    whole_words = bool(data["model"].get("ignore_merges"))
    cutting = _cutting(data.get("pre_tokenizer"))
    if cutting is not None:
        same = [cutting]
        if cutting[0][-1:] == (_DIGIT,) and not any(
            _DIGITS.search(token) for token in data["model"]["vocab"]
        ):
            same.append(((*cutting[0][:-1], _DIGIT + "+"), cutting[1]))  # no two digits are ever one token
        fitting = [
            name
            for name, rules in RULES.items()
            if (rules.split, rules.single_digits) in same and rules.whole_words == whole_words
        ]
        if fitting:
            return str(given) if given in fitting else fitting[0]
    if isinstance(given, str) and given not in RULES:
        return given  # what the folder's author knows of llama.cpp and we do not
    raise UserError(
        f"the tokenizer of {folder} cuts text in a way that llama.cpp has no name for; retrain the tokenizer with the "
        f"rules of one that it knows ({', '.join(RULES)})"
    )


def _cutting(pre_tokenizer: Any) -> tuple[tuple[str, ...], bool] | None:
    """(patterns, single digits) of a tokenizer.json's pre-tokenizer, or None for one of another make."""
    patterns: list[str] = []
    digits = False
    steps = list(_steps(pre_tokenizer, "pretokenizers"))
    for step in steps[:-1]:
        pattern = step.get("pattern")
        if step.get("type") == "Digits" and step.get("individual_digits") and not patterns:
            digits = True
        elif step.get("type") == "Digits" and step.get("individual_digits") and step is steps[-2]:
            patterns.append(_DIGIT)
        elif (
            step.get("type") == "Split"
            and isinstance(pattern, dict)
            and isinstance(pattern.get("Regex"), str)
            and step.get("behavior") == "Isolated"
            and not step.get("invert")
        ):
            patterns.append(pattern["Regex"])
        else:
            return None
    last = steps[-1] if steps else {}
    is_plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if not is_plain or bool(last.get("use_regex", True)) == bool(patterns):
        return None
    return tuple(patterns), digits


def _steps(stage: Any, several: str) -> Iterator[dict[str, Any]]:
    """The single steps of a normalizer, pre-tokenizer or decoder, which may be sequences of sequences."""
    if isinstance(stage, dict) and stage.get("type") == "Sequence":
        for step in stage.get(several) or []:
            yield from _steps(step, several)
    elif isinstance(stage, dict):
        yield stage


# ---------------------------------------------------------------- marks and templates


def _marks(folder: Path, read: FolderTokenizer, vocab_size: int) -> dict[str, Any]:
    """Which ids begin a text, end it and fill it up, and whether the tokenizer adds the first two by itself."""
    ids = {
        name: read.tokens.token_to_id(read.marks.get(f"{name}_token", ""))
        for name in ("bos", "eos", "unk", "pad")
    }
    config = read_config(folder)
    generation = read_optional(folder / "generation_config.json")
    stops = _ids(generation.get("eos_token_id", config.get("eos_token_id")), "eos", folder, vocab_size)
    begins = _ids(config.get("bos_token_id"), "bos", folder, vocab_size)
    # The tokenizer's own end first: it is what a chat template writes after each answer.
    ends = list(dict.fromkeys(i for i in [ids["eos"], *stops] if i is not None))
    begin = ids["bos"] if ids["bos"] is not None else next(iter(begins), None)
    found = {"bos": begin, **dict(zip(("eos", "eot", "eom"), ends, strict=False))}
    found |= {"unknown": ids["unk"], "padding": ids["pad"]}
    before, after = _around(read, folder)
    if (before and before != [begin]) or (after and after != ends[:1]):
        raise _unknown(folder, f"marks around a text ({before + after}) other than its bos and eos")
    return {
        **{f"ggml.{key}_token_id": number for key, number in found.items() if number is not None},
        "ggml.add_bos_token": bool(before),
        "ggml.add_eos_token": bool(after),
    }


def _around(read: FolderTokenizer, folder: Path) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text."""
    inner = read.tokens.encode("a", add_special_tokens=False).ids
    whole = read.tokens.encode("a").ids
    at = next((n for n in range(len(whole)) if whole[n : n + len(inner)] == inner), None) if inner else 0
    if at is None:
        raise _unknown(folder, "a post-processor that changes the text's own tokens")
    return whole[:at], whole[at + len(inner) :]


def _ids(given: Any, name: str, folder: Path, vocab_size: int) -> list[int]:
    """The ids of a config's `NAME_token_id`: a number, several, or none."""
    numbers = given if isinstance(given, list) else [] if given is None else [given]
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocab_size:
            raise UserError(
                f"{folder}: {name}_token_id is {number!r}, but the model's ids are 0 to {vocab_size - 1}"
            )
    return numbers


def _templates(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    templates = read_templates(folder, settings)
    others = [name for name in templates if name != DEFAULT]
    keys: dict[str, Any] = {f"chat_template.{name}": templates[name] for name in others}
    if others:
        keys["chat_templates"] = others
    if DEFAULT in templates:
        keys["chat_template"] = templates[DEFAULT]
    return keys
