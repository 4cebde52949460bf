"""Convert a .gguf's tokenizer to tokenizer.json and tokenizer_config.json.

A .gguf holds the vocabulary, but of the rules that cut text up before merging only their name
(`tokenizer.ggml.pre`). The table below gives each name its rules, as the models' own tokenizer.json have
them; the tests compare every entry with llama.cpp. Other names are refused: guessed rules give plausible text and ids
that the model was never trained on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.base.errors import UserError
from farthing.base.files import write_json
from farthing.weights.chat_template import DEFAULT, as_setting

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import PreTokenizer

Metadata = dict[str, Any]
_LISTS: dict[str, Any] = {"tokens": str, "token_type": int, "scores": (int, float), "merges": str}

# llama.cpp's token types (tokenizer.ggml.token_type)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACE}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS_AND_SPACE}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r'[!"#$%&'
    r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Letters with a case, as the Unicode of DeepSeek's first tokenizers knew them
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫ"
    "ᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹ"
    "ℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥\u0800-一가-\ud7ff]+"
_DEEPSEEK_LLM = ("[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+")
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rules:
    """Pre-tokenizer of a byte-level vocabulary: splits by each pattern of `split` in turn, or by GPT-2's."""

    split: tuple[str, ...] = ()
    single_digits: bool = False
    whole_words: bool = False  # a word that is a token is taken whole, without merging
    add_bos: bool = False  # unless the file says otherwise
    nfc: bool = False


_LLAMA3_RULES = Rules((_LLAMA3,), whole_words=True, add_bos=True)
_QWEN2_RULES = Rules((_QWEN2,), nfc=True)
RULES = {
    "gpt-2": Rules(),
    "smollm": Rules(single_digits=True),
    "starcoder": Rules(single_digits=True),
    "llama-bpe": _LLAMA3_RULES,
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
    "falcon3": _LLAMA3_RULES,
    "smaug-bpe": Rules((_LLAMA3,)),
    "qwen2": _QWEN2_RULES,
    "deepseek-r1-qwen": _QWEN2_RULES,
    "deepseek-llm": Rules(_DEEPSEEK_LLM, add_bos=True),
    "deepseek-coder": Rules(_DEEPSEEK_CODER, add_bos=True),
    "deepseek-v3": Rules(_DEEPSEEK3, add_bos=True),
    "tekken": Rules((_TEKKEN,), whole_words=True, add_bos=True),
}


def write_tokenizer(metadata: Metadata, folder: Path) -> None:
    """Write the tokenizer, its chat template and generation_config.json from a .gguf's metadata into
    `folder`.

    Raises UserError for an unknown kind of tokenizer or pre-tokenizer.
    """
    check_tokenizer(metadata)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokenizer, add_bos = build_tokenizer(metadata)
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    bos, eos = token_id(metadata, "bos"), token_id(metadata, "eos")
    first = tokens[bos] if add_bos and bos is not None else None
    add_marks(tokenizer, first, tokens[eos] if add_eos and eos is not None else None)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    config["model_max_length"] = metadata[f"{metadata['general.architecture']}.context_length"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (number := token_id(metadata, key)) is not None:
            config[f"{name}_token"] = tokens[number]
    if templates := _templates(metadata):
        config["chat_template"] = templates.get(DEFAULT) if len(templates) == 1 else as_setting(templates)
    write_json(folder / "tokenizer_config.json", config)

    generation: dict[str, Any] = {"bos_token_id": bos, "eos_token_id": stop_ids(metadata)}
    generation["pad_token_id"] = token_id(metadata, "padding")
    write_json(
        folder / "generation_config.json", {k: v for k, v in generation.items() if v not in (None, [])}
    )


def check_tokenizer(metadata: Metadata) -> None:
    """Raise UserError unless the metadata hold a tokenizer whose parts are of the right types and lengths."""
    if not metadata.get("tokenizer.ggml.tokens"):
        raise UserError("the .gguf carries no tokenizer; convert the model again with its vocabulary")
    for key, kind in _LISTS.items():
        value = metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not (
            isinstance(value, list) and all(issubclass(found, kind) for found in set(map(type, value)))
        ):
            raise _damaged(f"ggml.{key}")
        count = len(metadata["tokenizer.ggml.tokens"])  # the first of the lists, and so checked
        if value and key in ("token_type", "scores") and len(value) != count:
            raise UserError(
                f"the .gguf has {count} tokens and {len(value)} of tokenizer.ggml.{key}; download it again"
            )
    for key, value in metadata.items():
        is_id = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        is_flag = key.startswith("tokenizer.ggml.add_")
        if (is_id and (not isinstance(value, int) or isinstance(value, bool))) or (
            is_flag and not isinstance(value, bool)
        ):
            raise _damaged(key.removeprefix("tokenizer."))


def _damaged(key: str) -> UserError:
    return UserError(f"the .gguf's tokenizer.{key} is of a wrong type; download it again")


def _templates(metadata: Metadata) -> dict[str, str]:
    """Name -> text of the chat templates: the default one, and those that a list names."""
    names = metadata.get("tokenizer.chat_templates") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _damaged("chat_templates")
    keys = {DEFAULT: "chat_template", **{name: f"chat_template.{name}" for name in names}}
    found = {name: metadata.get(f"tokenizer.{key}") for name, key in keys.items()}
    for name, text in found.items():
        if not isinstance(text, str | None):
            raise _damaged(keys[name])
    return {name: text for name, text in found.items() if text}


def token_id(metadata: Metadata, name: str) -> int | None:
    """The id of a named token (bos, eos, eot, unknown, padding …); None if the file does not name it."""
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    return number if isinstance(number, int) and 0 <= number < len(tokens) else None


def stop_ids(metadata: Metadata) -> list[int]:
    """Ids that end an answer: end of sequence, of turn and of message, and the mark between documents."""
    check_tokenizer(metadata)
    named = [token_id(metadata, name) for name in ("eos", "eot", "eom")]
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type") or []
    between = [i for i, kind in enumerate(types) if kind == CONTROL and tokens[i] == "<|endoftext|>"]
    return list(dict.fromkeys(i for i in named + between if i is not None))


def build_tokenizer(metadata: Metadata) -> tuple["Tokenizer", bool]:
    """The tokenizer without beginning and end marks, and whether text gets a beginning mark. Raises
    UserError.
    """
    from tokenizers import AddedToken

    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(metadata)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(metadata)
    else:
        raise UserError(f"the .gguf's tokenizer is of the kind {kind!r}; Farthing reads gpt2 and llama")
    types = metadata.get("tokenizer.ggml.token_type") or []
    for token, special_kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=False):
        if special_kind in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif special_kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return tokenizer, bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))


def _vocabulary(metadata: Metadata) -> dict[str, int]:
    """Token -> id, without the filler at the end that only rounds the table's size up."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    end = len(tokens)
    while end and types[end - 1] == UNUSED:
        end -= 1
    return {token: number for number, token in enumerate(tokens[:end])}


def _byte_level(metadata: Metadata) -> tuple["Tokenizer", bool]:
    from tokenizers import Tokenizer, decoders, normalizers

    name = metadata.get("tokenizer.ggml.pre")
    rules = RULES.get(str(name))
    if rules is None:
        raise UserError(
            f"the .gguf's pre-tokenizer is {name!r}, which Farthing does not know "
            f"(it knows {', '.join(RULES)}); use the model's Hugging Face folder instead"
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or []]
    tokenizer = Tokenizer(_bpe(_vocabulary(metadata), pairs, ignore_merges=rules.whole_words))
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _cutter(rules)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rules.add_bos


def _bpe(vocabulary: dict[str, int], merges: list[Any], **options: Any) -> "BPE":
    from tokenizers.models import BPE

    try:
        return BPE(vocabulary, merges, **options)
    except Exception as error:  # the library raises bare Exception: a merge of tokens that are not there
        raise UserError(f"the .gguf's vocabulary is damaged ({error}); download it again") from None


def _cutter(rules: Rules) -> "PreTokenizer":
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    steps: list[PreTokenizer] = []
    if rules.single_digits:
        steps.append(Digits(individual_digits=True))
    steps += [Split(Regex(pattern), behavior="isolated") for pattern in rules.split]
    steps.append(ByteLevel(add_prefix_space=False, use_regex=not rules.split))
    return Sequence(steps)


def _sentencepiece(metadata: Metadata) -> tuple["Tokenizer", bool]:
    """Llama 2's kind: spaces are written as ▁, unknown characters as bytes, and the merges follow from the
    scores.
    """
    from tokenizers import Tokenizer

    vocabulary = _vocabulary(metadata)
    unknown = token_id(metadata, "unknown")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(vocabulary)
    met = {
        token: number
        for token, number in vocabulary.items()
        if types[number] not in (UNKNOWN, CONTROL, USER_DEFINED) or may_meet(token)
    }
    model = _bpe(
        vocabulary,
        list(merges(met, metadata.get("tokenizer.ggml.scores") or [])),
        unk_token=metadata["tokenizer.ggml.tokens"][unknown] if unknown is not None else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    put_spaces(tokenizer, bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    return tokenizer, True


def put_spaces(tokenizer: "Tokenizer", prefix: bool) -> None:
    """Have spaces written as ▁ and back, with one before the first word if `prefix`."""
    from tokenizers import decoders, normalizers

    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def byte_tokens() -> list[str]:
    """The tokens that stand for bytes where a character has none."""
    return [f"<0x{byte:02X}>" for byte in range(256)]


def may_meet(token: str) -> bool:
    """Whether merges can come upon a token that is taken out of a text before: spaces become ▁ only afterwards."""
    return "▁" in token


def merges(vocabulary: dict[str, int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """Every way to join two tokens into a third, best score first.

    SentencePiece joins the neighbours whose union scores highest (Kudo and Richardson, arXiv:1808.06226),
    which is what a list of merges in order of score does.
    """
    if len(scores) < len(vocabulary):
        raise UserError("the .gguf's tokenizer has no scores; convert the model again with its vocabulary")
    found = []
    for token, number in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[number], left, right, token[:cut], token[cut:]))
    found.sort()
    return ((left, right) for *_, left, right in found)


def add_marks(tokenizer: "Tokenizer", bos: str | None, eos: str | None) -> None:
    """Have the tokenizer put these tokens before and behind a text that is encoded."""
    from tokenizers.processors import TemplateProcessing

    before = [] if bos is None else [bos]
    after = [] if eos is None else [eos]
    if before or after:
        second = [f"{mark}:1" for mark in (*before, "$B", *after)]
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *second],
            special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in dict.fromkeys(before + after)],
        )
