"""The tokenizer of a model folder, with every token that any of its files names.

tokenizer.json alone is not all: tokenizer_config.json, special_tokens_map.json and added_tokens.json may add tokens and
say which are special. They are joined in the order in which transformers joins them; the tests hold the two together.
Where an id that is written down is not the one a token would get, the folder is refused: the model was trained on one
of the two, and the files do not say which.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.base.errors import UserError
from farthing.base.files import read_json, write_json
from farthing.weights.chat_template import FILE, FOLDER, as_setting, read_templates

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

SETTINGS, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
OLDER = ("tokenizer.model", "tiktoken.model", "vocab.json")  # what a tokenizer can be converted from
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_HALF = re.compile("[\ud800-\udfff]")  # a lone surrogate, which is half a character
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class FolderTokenizer:
    """A folder's tokenizer: the `tokens` themselves, the `marks` (bos_token, eos_token …) as text, the `settings` of
    tokenizer_config.json, and the number that all ids are below."""

    tokens: Tokenizer
    marks: dict[str, str]
    settings: dict[str, Any]
    vocab_size: int


def read_tokenizer(folder: Path) -> FolderTokenizer:
    """The folder's tokenizer, complete. Without tokenizer.json it is converted from what is there.

    Raises:
        UserError: when there is none or a damaged one, when its files give a token two ids, or ids that the vocabulary
            of config.json does not have.
    """
    from farthing.weights.old_tokenizers import convert

    settings = read_optional(folder / SETTINGS)
    path = folder / "tokenizer.json"
    tokens, defaults = (_read(path), {}) if path.is_file() else convert(folder, settings)
    tokens.no_truncation()  # a length limit saved from training would cut prompts silently
    tokens.no_padding()
    tokens.encode_special_tokens = settings.get("split_special_tokens") is True
    vocab_size = read_optional(folder / "config.json").get("vocab_size")
    size = vocab_size if isinstance(vocab_size, int) and not isinstance(vocab_size, bool) else None
    marks = defaults | _complete(tokens, folder, settings, size)
    return FolderTokenizer(tokens, marks, settings, _checked_size(tokens, folder, size))


def finish_copy(source: Path, target: Path) -> None:
    """Write into `target`, a copy of a folder's tokenizer files, what readers of model folders expect there.

    A tokenizer of another kind is converted, so that it needs no code of its own; chat templates in a folder of their
    own become settings, since a model folder that is written has no folders inside; `auto_map` names programs, which
    are not copied. Raises UserError as `read_tokenizer` does.
    """
    is_old = not (source / "tokenizer.json").is_file() and any((source / name).is_file() for name in OLDER)
    settings = read_optional(source / SETTINGS)
    if not is_old and not (source / FOLDER).is_dir() and "auto_map" not in settings:
        return
    changed = {key: value for key, value in settings.items() if key != "auto_map"}
    if is_old:
        read = read_tokenizer(source)
        (target / "tokenizer.json").write_text(read.tokens.to_str(), encoding="utf-8")
        changed = changed | read.marks | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if (source / FOLDER).is_dir():
        changed["chat_template"] = as_setting(read_templates(source, settings))
        (target / FILE).unlink(missing_ok=True)
    write_json(target / SETTINGS, changed)


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object of a folder, empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


# ---------------------------------------------------------------- tokenizer.json


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        with _no_panic():
            tokens = Tokenizer.from_str(text)
        declared = {entry["id"]: entry["content"] for entry in _added_entries(text)}
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer ({_line(error)}); download it again") from None
    for number, content in declared.items():  # the library numbers them as it likes
        _same_id(tokens, content, number, path)
    return tokens


@contextmanager
def _no_panic() -> Iterator[None]:
    """Turn a panic of the Rust library, which is no Exception and writes to stderr, into a silent ValueError."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise ValueError(str(error)) from None
        raise
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _added_entries(text: str) -> list[dict[str, Any]]:
    """`added_tokens` of a tokenizer.json, if possible without parsing its vocabulary."""
    at = text.find('"added_tokens"')
    colon = text.find(":", at)
    if at >= 0 and not text[at + len('"added_tokens"') : colon].strip():
        start = colon + 1 + len(text[colon + 1 :]) - len(text[colon + 1 :].lstrip())
        entries, _ = json.JSONDecoder().raw_decode(text, start)
        if isinstance(entries, list):
            return entries
    return json.loads(text).get("added_tokens") or []


def _same_id(tokens: Tokenizer, content: str, number: int, path: Path) -> None:
    if (actual := tokens.token_to_id(content)) != number:
        raise UserError(
            f"{path} gives {content!r} the id {number}, but it is the tokenizer's {actual}; take all files of the "
            "tokenizer from one model"
        )


# ---------------------------------------------------------------- tokens that other files name


def _complete(tokens: Tokenizer, folder: Path, settings: dict[str, Any], size: int | None) -> dict[str, str]:
    """Add to `tokens` what the folder's other files name; returns the marks."""
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings = dict(settings)  # the key's older name, which goes before the map's
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens") or []
    if "added_tokens_decoder" in settings:
        names, source = settings, folder / SETTINGS
        listed = _decoder(settings["added_tokens_decoder"], source)
    else:
        names, source = _joined(settings, folder / MAP), folder / ADDED
        listed = _listed(names, source) | tokens.get_added_tokens_decoder()
    marks = _marks(names, folder)
    special = set(marks.values())
    for _, token in sorted(listed.items()):
        token.special = token.special or token.content in special
        tokens.add_tokens([token])
    for number, token in listed.items():
        _same_id(tokens, token.content, number, source)
    there = {token.content for token in tokens.get_added_tokens_decoder().values()}
    for token in _unlisted(names, marks, folder):
        if token.content not in there:
            _add(tokens, token, folder, size)
    for token in tokens.get_added_tokens_decoder().values():
        if token.content in special and not token.special:
            token.special = True
            tokens.add_tokens([token])
    return marks


def _decoder(given: Any, path: Path) -> dict[int, AddedToken]:
    if not isinstance(given, dict) or not all(str(key).isascii() and str(key).isdigit() for key in given):
        raise UserError(f"{path}: added_tokens_decoder must map ids to tokens; download it again")
    return {int(key): _token(value, path, "added_tokens_decoder") for key, value in given.items()}


def _joined(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings, with what an older folder keeps in special_tokens_map.json going before them."""
    older = read_optional(path)
    extra, more = settings.get("extra_special_tokens"), older.get("extra_special_tokens")
    if isinstance(extra, list) and isinstance(more, list):
        older["extra_special_tokens"] = [*extra, *more]
    return settings | older


def _listed(names: dict[str, Any], path: Path) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json, which holds content -> id; special are those that have a name."""
    from tokenizers import AddedToken

    named = {_content(names.get(name)) for name in _NAMES} | {
        _content(token) for token in _extra(names, path)
    }
    listed = {}
    for content, number in read_optional(path).items():
        if not isinstance(number, int) or isinstance(number, bool) or not _content(content):
            raise UserError(f"{path} must map tokens to ids; download it again")
        special = content in named
        listed[number] = AddedToken(content, normalized=not special, special=special)
    return listed


def _marks(names: dict[str, Any], folder: Path) -> dict[str, str]:
    """Name -> text of bos_token, eos_token and the like, a model's own names included, in the order of their ids where
    they have none yet."""
    given = {name: names[name] for name in (*_NAMES, *names) if name in names and name.endswith("_token")}
    more = names.get("extra_special_tokens")
    given |= more if isinstance(more, dict) else {}
    marks = {}
    for name, value in given.items():
        content = _content(value)
        if content:
            marks[name] = content
        elif name in _NAMES and value not in (None, ""):
            raise UserError(f"{folder}: {name} of the tokenizer must be text, not {value!r}")
    return marks


def _unlisted(names: dict[str, Any], marks: Mapping[str, str], folder: Path) -> Iterator[AddedToken]:
    """Tokens that have a name but may have no entry with an id."""
    from tokenizers import AddedToken

    for name, content in marks.items():
        value = names.get(name)
        given = value if isinstance(value, dict) else {}
        token = _token(value, folder, name) if given else AddedToken(content)
        flags = {flag: getattr(token, flag) for flag in _FLAGS[:4] if flag in given}
        yield AddedToken(content, **flags, special=True)
    for value in _extra(names, folder):
        yield _token(value, folder, "extra_special_tokens")


def _extra(names: dict[str, Any], folder: Path) -> list[Any]:
    """Special tokens without a name of their own, under the key's newer name or its older one."""
    given = names.get("extra_special_tokens")
    if given is None or isinstance(given, dict):  # an object's have names
        given = names.get("additional_special_tokens") or []
    if not isinstance(given, list):
        raise UserError(f"{folder}: extra_special_tokens of the tokenizer must be a list, not {given!r}")
    return given


def _add(tokens: Tokenizer, token: AddedToken, folder: Path, size: int | None) -> None:
    """Add a token without an id: the next free one, as long as the model has it."""
    known = tokens.token_to_id(token.content) is not None
    if not known and size is not None and tokens.get_vocab_size() >= size:
        return  # the model has no room for it and never saw it; its text stays text
    taken = set() if known else set(tokens.get_vocab().values())
    tokens.add_tokens([token])
    if tokens.token_to_id(token.content) in taken:
        raise UserError(
            f"{folder}: {token.content!r} has no id of its own, for the vocabulary has gaps; list its id under "
            f"added_tokens_decoder of {SETTINGS}"
        )


def _token(value: Any, path: Path, key: str) -> AddedToken:
    from tokenizers import AddedToken

    content = _content(value)
    if not content:
        raise UserError(f"{path}: {key} must hold tokens, not {value!r}; download it again")
    flags = {} if isinstance(value, str) else {flag: value[flag] for flag in _FLAGS if flag in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise UserError(f"{path}: {key} must say true or false of {content!r}, not {value!r}")
    return AddedToken(content, **({"special": True} if isinstance(value, str) else flags))


def _content(value: Any) -> str | None:
    """The text of a token that is written as text or as an object."""
    content = value.get("content") if isinstance(value, dict) else value
    whole = isinstance(content, str) and not _HALF.search(content)
    return content if whole else None


# ---------------------------------------------------------------- ids


def _checked_size(tokens: Tokenizer, folder: Path, size: int | None) -> int:
    """One more than the highest id. Raises UserError for ids beyond the model's `size` entries, and for marks around a
    text that are no tokens."""
    try:
        with _no_panic():
            around = tokens.encode("").ids
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: the tokenizer is damaged ({_line(error)}); download it again") from None
    strange = [number for number in around if tokens.id_to_token(number) is None]
    if strange:
        raise UserError(
            f"{folder}: the tokenizer puts the id {strange[0]} around a text, which it does not have"
        )
    content, highest = max(tokens.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if size is not None and highest >= size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {highest} ({content!r}), but the model has {size} entries; put the "
            "model's own tokenizer in its folder"
        )
    return highest + 1


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
