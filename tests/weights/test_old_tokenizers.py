"""Tokenizers of other kinds, against the libraries they were made for, and transformers' reading of the same folder."""

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.data.tokenizer import Tokenizer
from farthing.weights.folder import copy_tokenizer
from farthing.weights.old_tokenizers import KIMI, LLAMA3

Make = Callable[..., Path]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEXTS = [
    "hello world, this is a test of the tokenizer", "The quick brown fox jumps over the lazy dog 1234",
    "naïve café  two  spaces", "don't we've I'LL HTTPServer",
]  # fmt: skip


@pytest.fixture
def spm(tmp_path: Path) -> Make:
    """A function that writes a folder with a SentencePiece model, Llama 2's kind unless asked otherwise."""
    library = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")

    def make(family: str = "llama", settings: dict[str, Any] | None = None, **training: Any) -> Path:
        asked = {
            "vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False,
            "character_coverage": 1.0, "normalization_rule_name": "identity", "split_digits": True,
            "remove_extra_whitespaces": False, "minloglevel": 3,
        }  # fmt: skip
        out = io.BytesIO()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 50), model_writer=out, **(asked | training)
        )
        (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA if settings is None else settings))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 500}))
        return tmp_path

    return make


def reference(folder: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def plain(strings: list[str]) -> list[str]:
    """Texts without special tokens, and without a space at their beginning."""
    return [text for text in strings if "<" not in text and not text[:1].isspace()]


KINDS: dict[str, dict[str, Any]] = {
    "Llama 2's": {},
    "unigram": {"model_type": "unigram"},
    "without bytes": {"byte_fallback": False},
    "without a space before the first word": {"add_dummy_prefix": False},
    "normalized": {"normalization_rule_name": "nmt_nfkc"},
    "normalized, spaces joined": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": True},
    "lower case, no prefix, spaces joined": {
        "normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": True, "add_dummy_prefix": False
    },
    "SentencePiece's own defaults": {
        "model_type": "unigram", "byte_fallback": False, "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True, "split_digits": False,
    },
    "with symbols": {"user_defined_symbols": ["[u]", "[/u]"], "control_symbols": ["[c]"]},
    "Gemma's order": {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False},
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_model_is_read_as_sentencepiece_reads_it(
    kind: str, family: str, spm: Make, strings: list[str]
) -> None:
    folder = spm(family, **KINDS[kind])
    ours, theirs = Tokenizer(folder), reference(folder)
    assert len(ours) == theirs.get_piece_size()
    for text in [*plain(strings), "a [u]b[/u] c"]:
        if theirs.normalize(text)[:2] in ("▁", "▁▁"):  # nothing but white space is left, or it stands first
            continue
        ids = ours.raw_encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids).replace(" \u2047 ", "")
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize(
    "marks", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_a_llama_folder_is_read_as_transformers_reads_it(
    legacy: bool | None, marks: dict[str, bool], spm: Make, strings: list[str]
) -> None:
    from transformers import AutoTokenizer

    more = marks if legacy is None else {**marks, "legacy": legacy}
    folder = spm(settings=LLAMA | more, user_defined_symbols=["[u]"], control_symbols=["[c]"])
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs)
    for text in [*strings, "<s>[INST] hi [/INST] there</s>", "a[u] b [c]c", "<s> <s>x"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_tokens_beside_the_model(spm: Make) -> None:
    folder = spm()
    size = reference(folder).get_piece_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size, "<|user|>": size + 1}))
    ours = Tokenizer(folder)
    assert ours.raw_encode("<|user|>") == [size + 1]
    assert len(ours) == size + 2


def test_what_reads_a_model_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    for missing in ("sentencepiece", "google.protobuf"):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(UserError, match=r"pip install 'farthing\[sentencepiece\]'") as caught:
            Tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\x00" * 100, b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"]
)
def test_a_damaged_model(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="cannot be converted") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_conversion_that_is_not_exact(spm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from farthing.weights import old_tokenizers

    folder = spm()
    monkeypatch.setattr(old_tokenizers, "_TRIALS", ("<s>",))  # plain text to SentencePiece
    with pytest.raises(UserError, match="converted exactly: '<s>'"):
        Tokenizer(folder)
    monkeypatch.undo()
    with pytest.raises(UserError, match="of its own"):
        Tokenizer(spm(treat_whitespace_as_suffix=True))


# ---------------------------------------------------------------- tiktoken

RANKS = [bytes([byte]) for byte in range(256)]
MOONSHOT = {
    "tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]",
    "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
    "additional_special_tokens": ["<|im_end|>", "<|im_user|>"],
}  # fmt: skip


@pytest.fixture(scope="session")
def ranks(strings: list[str]) -> list[bytes]:
    """Bytes and what is most often side by side in the texts, learnt with nothing that cuts them."""
    from tokenizers import Tokenizer as Tokens
    from tokenizers import models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = Tokens(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokens.train_from_iterator([*strings, *["日本語 中文 the The don't DON'T 'Llama 12345"] * 9], trainer)
    spelt = {text: byte for byte, text in bytes_to_unicode().items()}
    learnt = ("".join(merge) for merge in json.loads(tokens.to_str())["model"]["merges"])
    return list(dict.fromkeys([*RANKS, *(bytes(map(spelt.__getitem__, text)) for text in learnt)]))


@pytest.fixture
def tik(tmp_path: Path, ranks: list[bytes]) -> Make:
    """A function that writes a folder with a tiktoken file, Moonlight's layout unless asked otherwise."""

    def make(
        settings: dict[str, Any] | None = None,
        file: str = "tiktoken.model",
        family: str = "deepseek_v3",
        size: int = 2000,
    ) -> Path:
        lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
        (tmp_path / file).write_bytes(b"".join(lines))
        base = len(ranks)
        names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 9: "[PAD]"}
        listed = {str(base + at): {"content": name, "special": True} for at, name in names.items()}
        given = MOONSHOT | {"added_tokens_decoder": listed} if settings is None else settings
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": size}))
        return tmp_path

    return make


def test_moonlights_layout_is_read_as_tiktoken_reads_it(
    tik: Make, ranks: list[bytes], strings: list[str]
) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    base = len(ranks)
    names = {
        base: "[BOS]",
        base + 1: "[EOS]",
        base + 2: "<|im_end|>",
        base + 3: "<|im_user|>",
        base + 9: "[PAD]",
    }
    special = {names.get(i, f"<|reserved_token_{i}|>"): i for i in range(base, base + 258)}
    numbers = {token: rank for rank, token in enumerate(ranks)}
    theirs = tiktoken.Encoding("moonlight", pat_str=KIMI, mergeable_ranks=numbers, special_tokens=special)
    ours = Tokenizer(tik())
    assert (len(ours), ours.bos_id, ours.eos_id, ours.pad_id) == (base + 258, base, base + 1, base + 9)
    more = [
        "<|im_user|>hi<|im_end|>[EOS]",
        f"<|reserved_token_{base + 200}|>x",
        "HELLO'LL Hello'll 中文abc中文 ÀÉ",
    ]
    for text in [*strings, *more]:
        ids = ours.raw_encode(text)
        assert ids == theirs.encode(text, allowed_special="all"), text
        assert ours.encode(text) == ids, "no mark is added"
    for text in plain(strings):
        assert ours.decode(ours.raw_encode(text)) == text
    assert ours.special_ids == set(special.values())


def test_reserved_tokens_the_model_has_no_room_for(tik: Make, ranks: list[bytes]) -> None:
    """Moonlight's own: 163,842 ids in the tokenizer's program, 163,840 rows in the embedding."""
    ours = Tokenizer(tik(size=len(ranks) + 256))
    assert ours.vocab_size == len(ranks) + 256
    assert ours.raw_encode("a") == [ord("a")]


@pytest.mark.parametrize("file", ["tokenizer.model", "tiktoken.model"])
def test_llama_3s_layout_is_read_as_transformers_reads_it(
    file: str, tik: Make, ranks: list[bytes], strings: list[str]
) -> None:
    pytest.importorskip("tiktoken")
    from transformers import PreTrainedTokenizerFast

    base = len(ranks)
    listed = {str(base + at): {"content": f"<|{at}|>", "special": True} for at in (0, 1, 5)}
    settings = {"bos_token": "<|0|>", "eos_token": "<|1|>", "added_tokens_decoder": listed}
    folder = tik({"tokenizer_class": "PreTrainedTokenizerFast", **settings}, file, family="llama")
    ours, theirs = Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(ours) == len(theirs) == base + 6
    for text in [*strings, "<|0|>a<|5|> <|2|>"]:
        assert ours.raw_encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert LLAMA3 != KIMI


def test_code_of_its_own_is_not_run(tik: Make) -> None:
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_martian.Tokenizer", None]}}
    with pytest.raises(UserError, match="tokenization_martian"):
        Tokenizer(tik(settings))


@pytest.mark.parametrize(
    "lines",
    [
        [b"not base64! 0"], [b"YQ== x 1"], [b"YQ=="], [b"YQ== -1"], [b"YQ== 0", b"YQ== 1"], [b"YQ== 5"], [b""],
        [b"YQ== 0", b"Yg== 0"], [b"\xff\xfe 0"], [b"YQ== 99999999999999999999"], [b" 0"],
    ],
)  # fmt: skip
def test_a_damaged_tiktoken_file(lines: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"tiktoken\.model is") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", ["spm", "tik", "merges"])
def test_a_copy_needs_no_conversion(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, strings: list[str]
) -> None:
    from transformers import AutoTokenizer

    if kind == "merges":
        folder = tmp_path
        (folder / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "h": 1, "i": 2, "hi": 3}))
        (folder / "merges.txt").write_text("#version: 0.2\nh i\n")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    else:
        folder = request.getfixturevalue(kind)()
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_tokenizer(folder, copy)
    (copy / "config.json").write_text('{"model_type": "llama", "vocab_size": 2000}')
    for name in ("tokenizer.model", "tiktoken.model", "vocab.json"):
        (copy / name).unlink(missing_ok=True)
    before, after, theirs = Tokenizer(folder), Tokenizer(copy), AutoTokenizer.from_pretrained(copy)
    for text in strings:
        assert before.encode(text) == after.encode(text) == theirs.encode(text)
    assert (before.bos_id, before.eos_id, before.special_ids) == (
        after.bos_id,
        after.eos_id,
        after.special_ids,
    )
    assert theirs.eos_token_id == after.eos_id


def test_a_copy_names_no_program(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder, copy = tmp_path / "own", tmp_path / "copy"
    folder.mkdir()
    copy.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    settings = {"eos_token": "<|end|>", "auto_map": {"AutoTokenizer": ["tokenization_own.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    copy_tokenizer(folder, copy)
    assert json.loads((copy / "tokenizer_config.json").read_text()) == {"eos_token": "<|end|>"}
    assert (copy / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
