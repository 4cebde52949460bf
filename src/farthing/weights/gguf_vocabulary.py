"""A folder's tokenizer as the metadata of a .gguf: the way back from `gguf_tokenizer`.

llama.cpp cuts text by rules it knows by name, so a byte-level tokenizer can be exported when its rules are in
`gguf_tokenizer.RULES`. Anything else is refused: under another name the same text would become other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from farthing.errors import UserError
from farthing.weights.folder import read_config, read_json, require_tokenizer
from farthing.weights.gguf_tokenizer import RULES

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's token types


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys of a .gguf for the tokenizer of a model folder.

    Ids up to `vocab_size` that the tokenizer does not use are filled with unused tokens.

    Raises:
        UserError: when there is no tokenizer.json, its kind or its way of cutting text has no name in llama.cpp, or it
            has more tokens than the model.
    """
    require_tokenizer(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json; save its tokenizer with transformers' save_pretrained first"
        )
    data = read_json(folder / "tokenizer.json")
    settings = (
        read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    )
    try:
        model, added = data["model"], data.get("added_tokens") or []
        vocabulary = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
        kind, merges = model.get("type", "BPE"), model["merges"]
        special = {token["content"]: bool(token["special"]) for token in added}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / 'tokenizer.json'} is not a BPE tokenizer ({error}); a .gguf needs one"
        ) from None
    if kind != "BPE" or model.get("byte_fallback"):
        raise UserError(
            f"{folder / 'tokenizer.json'} is not a byte-level BPE; export its .gguf with llama.cpp's own converter"
        )
    if max(vocabulary.values(), default=0) >= vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has ids up to {max(vocabulary.values())}, its model {vocab_size}; "
            "take the tokenizer that belongs to it"
        )
    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [_UNUSED] * vocab_size
    for token, number in vocabulary.items():
        tokens[number] = token
        types[number] = {None: _NORMAL, True: _CONTROL, False: _USER_DEFINED}[special.get(token)]
    keys: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": _name(folder, data, settings.get("llama_cpp_pre")),
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        **_marks(folder, vocabulary, settings),
    }
    if (template := _template(folder, settings)) is not None:
        keys["chat_template"] = template
    return {f"tokenizer.{name}": value for name, value in keys.items()}


def _name(folder: Path, data: dict[str, Any], given: Any) -> str:
    """llama.cpp's name for this tokenizer's rules; `given` is the one its folder claims, checked where it can be."""
    whole_words = bool(data["model"].get("ignore_merges"))
    cutting = _cutting(data.get("pre_tokenizer"))
    if cutting is not None:
        fitting = [
            name
            for name, rules in RULES.items()
            if (rules.split, rules.single_digits, rules.whole_words) == (*cutting, whole_words)
        ]
        if fitting:
            return str(given) if given in fitting else fitting[0]
    if isinstance(given, str) and given not in RULES:
        return given  # what the folder's author knows of llama.cpp and we do not
    raise UserError(
        f"{folder / 'tokenizer.json'} cuts text in a way that llama.cpp has no name for; retrain the tokenizer with "
        f"the rules of one that it knows ({', '.join(RULES)})"
    )


def _cutting(pre_tokenizer: Any) -> tuple[tuple[str, ...], bool] | None:
    """(patterns, single digits) of a tokenizer.json's pre-tokenizer, or None for one of another make."""
    patterns: list[str] = []
    digits = False
    steps = list(_steps(pre_tokenizer))
    for step in steps[:-1]:
        pattern = step.get("pattern")
        if step.get("type") == "Digits" and step.get("individual_digits") and not patterns:
            digits = True
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


def _steps(pre_tokenizer: Any) -> Iterator[dict[str, Any]]:
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        for step in pre_tokenizer.get("pretokenizers") or []:
            yield from _steps(step)
    elif isinstance(pre_tokenizer, dict):
        yield pre_tokenizer


def _marks(folder: Path, vocabulary: dict[str, int], settings: dict[str, Any]) -> dict[str, Any]:
    """Which ids begin a text, end it and fill it up, and whether the tokenizer adds the first two by itself."""
    from tokenizers import Tokenizer

    def named(key: str) -> int | None:
        token = settings.get(f"{key}_token")
        return vocabulary.get(token.get("content", "") if isinstance(token, dict) else token or "")

    config = read_config(folder)
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    # The tokenizer's own end first: it is what a chat template writes after each answer.
    ends = list(dict.fromkeys(i for i in [named("eos"), *stops] if isinstance(i, int)))
    begin = named("bos") if named("bos") is not None else config.get("bos_token_id")
    found = {"bos": begin, **dict(zip(("eos", "eot", "eom"), ends, strict=False))}
    found |= {"unknown": named("unk"), "padding": named("pad")}
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
    return {
        **{f"ggml.{key}_token_id": number for key, number in found.items() if number is not None},
        "ggml.add_bos_token": begin is not None and ids[:1] == [begin],
        "ggml.add_eos_token": bool(ends) and ids[-1:] == ends[:1],
    }


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
