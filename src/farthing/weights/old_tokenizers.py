"""Tokenizers of other kinds than tokenizer.json, converted to what it holds.

A SentencePiece model is built anew from its pieces and scores and then compared with SentencePiece itself: transformers
forgets the space before the first word for some families, and the normalization for others. A tiktoken file holds ranks
only; the pattern that cuts text comes from the family.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.base.errors import UserError
from farthing.base.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TIKTOKEN, SENTENCEPIECE = "tiktoken.model", "tokenizer.model"
_RESERVED = 258  # ids that Moonshot's tokenizers keep for special tokens, behind the ranks
# Moonshot's pattern (Moonlight, Kimi-K2), and Llama 3's, which transformers takes for every other tiktoken file.
_MARKED = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_UPPER, _LOWER = rf"[\p{{Lu}}\p{{Lt}}{_MARKED}]", rf"[\p{{Ll}}{_MARKED}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?|{_REST}"
)
LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_REST}"
# What a conversion is tried on. No text begins with a space: there transformers' Llama tokenizers differ on purpose.
_TRIALS = (
    "Hello, world! 12345 3.14", "two  spaces, and   three", "a\tb\n\n\nc\r\nd", "naïve café cafe\u0301",
    "日本語 中文 한국어", "①②½Ⅷ ﬁ Ａ\u3000b\u00a0c", "👩 🎉 \x01\x7f", "HTTPServer x**2 /* y */", "ends in spaces  ",
    "עברית العربية हिन्दी",
)  # fmt: skip


def convert(folder: Path, settings: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a folder without tokenizer.json, and its marks where the file itself names them.

    Raises:
        UserError: when it cannot be read, what reads it is not installed, or the conversion is not exact.
    """
    if (folder / TIKTOKEN).is_file():
        return _from_tiktoken(folder / TIKTOKEN, settings)
    path = folder / SENTENCEPIECE
    if not path.is_file():
        return _by_transformers(folder)
    is_ranks = path.read_bytes()[:200].split(b"\n")[0].split(b" ")[-1].isdigit()
    return _from_tiktoken(path, settings) if is_ranks else _from_sentencepiece(path, settings)


def _by_transformers(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokens: Tokenizer = theirs.backend_tokenizer
    except Exception as error:  # the remedy is the same whatever goes wrong in a conversion
        raise UserError(
            f"{folder} has no tokenizer.json and its old tokenizer cannot be converted ({_line(error)}); save it with "
            "transformers' save_pretrained"
        ) from None
    marks = {name: getattr(theirs, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return tokens, {name: value for name, value in marks.items() if isinstance(value, str)}


# ---------------------------------------------------------------- SentencePiece


def _from_sentencepiece(path: Path, settings: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError:
        raise UserError(
            f"{path} is a SentencePiece model, without a tokenizer.json; pip install 'farthing[sentencepiece]'"
        ) from None
    try:
        data = path.read_bytes()
        proto = getattr(sentencepiece_model_pb2, "ModelProto").FromString(data)  # noqa: B009 - it has no types
        theirs = SentencePieceProcessor(model_proto=data)
        tokens = _rebuilt(proto, theirs.normalize("x\r\nx"), legacy=settings.get("legacy") is True)
        wrong = [text for text in _TRIALS if tokens.encode(text).ids != theirs.encode(text)]
    except Exception as error:  # protobuf's, SentencePiece's and the library's errors share no base
        raise UserError(f"{path} cannot be converted ({_line(error)}); download it again") from None
    if wrong:
        raise UserError(
            f"{path} cannot be converted exactly: {wrong[0]!r} would get other tokens than by SentencePiece; use a "
            "folder of this model with a tokenizer.json"
        )
    spec = proto.trainer_spec
    named = (
        ("bos", spec.bos_id, spec.bos_piece),
        ("eos", spec.eos_id, spec.eos_piece),
        ("unk", spec.unk_id, spec.unk_piece),
    )
    marks = {f"{name}_token": piece for name, number, piece in named if number >= 0}
    _add_marks(tokens, marks, settings)
    return tokens, marks


def _rebuilt(proto: Any, line_end: str, legacy: bool) -> Tokenizer:
    """The tokenizer of a SentencePiece model, marks left out.

    `line_end` is how the model normalizes "x\\r\\nx", which the `tokenizers` library takes for a single character.
    `legacy` puts the space before the first word also behind every special token, as transformers did of old.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

    if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise ValueError("it treats white space in a way of its own")
    tokens = Tokenizer(_model(proto))
    prefix = bool(proto.normalizer_spec.add_dummy_prefix)
    if steps := list(_normalizers(proto.normalizer_spec, line_end)):
        from tokenizers.normalizers import Sequence

        tokens.normalizer = Sequence(steps)
    scheme = ("always" if legacy else "first") if prefix else "never"
    tokens.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokens.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    kinds = proto.SentencePiece
    for piece in proto.pieces:
        if piece.type in (kinds.UNKNOWN, kinds.CONTROL):
            tokens.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False)])
        elif piece.type == kinds.USER_DEFINED:
            tokens.add_tokens([AddedToken(piece.piece, special=False, normalized=False)])
    return tokens


def _model(proto: Any) -> Any:
    from tokenizers.models import BPE, Unigram

    from farthing.weights.gguf_tokenizer import merges

    spec = proto.trainer_spec
    pieces, scores = [piece.piece for piece in proto.pieces], [piece.score for piece in proto.pieces]
    if spec.model_type == spec.UNIGRAM:
        return Unigram(list(zip(pieces, scores, strict=True)), spec.unk_id, spec.byte_fallback)
    if spec.model_type != spec.BPE:
        raise ValueError("it is neither a BPE nor a unigram model")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return BPE(
        vocabulary,
        list(merges(vocabulary, scores)),
        unk_token=pieces[spec.unk_id],
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _normalizers(spec: Any, line_end: str) -> Iterator[Any]:
    from tokenizers import Regex, normalizers

    if spec.precompiled_charsmap:
        inner = line_end.split("x")[1].replace("▁", " ")
        if not spec.remove_extra_whitespaces and inner != "\r\n":
            yield normalizers.Replace("\r\n", inner)
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(" {2,}"), " ")
        yield normalizers.Replace(Regex(r" \z"), "")
        if (
            not spec.add_dummy_prefix
        ):  # else a space at the beginning takes the place of the one that is put there
            yield normalizers.Replace(Regex(r"\A "), "")


def _add_marks(tokens: Tokenizer, marks: dict[str, str], settings: dict[str, Any]) -> None:
    """Put bos and eos around a text if tokenizer_config.json asks for it."""
    from farthing.weights.gguf_tokenizer import add_marks

    asked = {}
    for name in ("bos", "eos"):
        given = settings.get(f"{name}_token", marks.get(f"{name}_token"))
        content = given.get("content") if isinstance(given, dict) else given
        known = isinstance(content, str) and tokens.token_to_id(content) is not None
        asked[name] = content if known and settings.get(f"add_{name}_token") is True else None
    add_marks(tokens, asked["bos"], asked["eos"])


# ---------------------------------------------------------------- tiktoken


def _from_tiktoken(path: Path, settings: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """A byte-level BPE of the ranks: any two tokens whose union is one may merge, the lowest rank first."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks = _ranks(path)
    moonshot = _is_moonshot(path, settings)
    spelt = _spelling()
    text = {token: "".join(map(spelt.__getitem__, token)) for token in ranks}
    pairs = sorted(
        (rank, ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    merges = [(text[left], text[right]) for *_, left, right in pairs]
    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    tokens = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(KIMI if moonshot else LLAMA3), behavior="isolated")
    tokens.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokens.decoder = decoders.ByteLevel()
    special = _special(path.parent, settings, len(ranks), moonshot)
    tokens.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokens, {"bos_token": "[BOS]", "eos_token": "[EOS]"} if moonshot else {}


def _ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank; a line is the token in base64 and its rank, which is its id. Raises UserError."""
    try:
        lines = path.read_bytes().splitlines()
        pairs = [line.split() for line in lines if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a tiktoken file ({_line(error)}); download it again") from None
    if sorted(ranks.values()) != list(range(len(pairs))) or not ranks or b"" in ranks:
        raise UserError(f"{path} is damaged: its ranks are not 0 to {len(pairs) - 1}; download it again")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path} is damaged: not every byte has a token; download it again")
    return ranks


def _is_moonshot(path: Path, settings: dict[str, Any]) -> bool:
    """Whether the tokenizer is Moonshot's. Raises UserError for a folder with other code of its own."""
    code = json.dumps(settings.get("auto_map")).lower() if settings.get("auto_map") else ""
    if "moonshot" in code or "kimi" in code:
        return True
    if code:
        raise UserError(
            f"the tokenizer of {path.parent} is a program of its own ({code[:80]}), which is not run; save it as "
            "tokenizer.json first"
        )
    config = path.parent / "config.json"
    family = read_json(config).get("model_type") if config.is_file() else None
    return path.name == TIKTOKEN and family in ("deepseek_v3", "kimi_k2")


def _special(folder: Path, settings: dict[str, Any], base: int, moonshot: bool) -> list[str]:
    """The special tokens from the id `base` on: those that the settings list, and fillers between and behind them."""
    given = settings.get("added_tokens_decoder")
    entries = given if isinstance(given, dict) else {}
    listed = {
        int(key): entry["content"]
        for key, entry in entries.items()
        if str(key).isascii()
        and str(key).isdigit()
        and isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
    }
    config = folder / "config.json"
    vocab_size = read_json(config).get("vocab_size") if config.is_file() else None
    end = max([base, *(number + 1 for number in listed if number < base + 10_000)])
    if moonshot:
        end = max(end, min(base + _RESERVED, vocab_size if isinstance(vocab_size, int) else base + _RESERVED))
    return [listed.get(number, f"<|reserved_token_{number}|>") for number in range(base, end)]


def _spelling() -> dict[int, str]:
    """Byte -> the character that stands for it in a byte-level vocabulary: itself, or one from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in plain else next(others)) for byte in range(256)}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
