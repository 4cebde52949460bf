"""SentencePiece vocabularies in a .gguf: the same tokens in llama.cpp and through our importer, and refusals."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from farthing.base.errors import UserError
from farthing.base.files import read_json, write_json
from farthing.weights.gguf_pieces import EDGES
from farthing.weights.gguf_read import import_gguf
from farthing.weights.gguf_tokenizer import build_tokenizer, merges
from farthing.weights.gguf_vocabulary import tokenizer_metadata
from farthing.weights.gguf_write import export_gguf

Make = Callable[..., Path]
LEARNED = [
    "hello world, this is a test of the tokenizer", "The quick brown fox jumps over the lazy dog",
    "don't we've  two  spaces   and    four HTTPServer", "<table> <table><h1>",
]  # fmt: skip
VOCABULARY = 600


@pytest.fixture(scope="module")
def proto() -> Any:
    """A SentencePiece model of Llama 2's kind, with runs of spaces as symbols of the user's, as Gemma has them."""
    library = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    out = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(LEARNED * 50), model_writer=out, vocab_size=450, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=["<table>", "▁▁", "▁▁▁▁"], minloglevel=3,
    )  # fmt: skip
    return sentencepiece_model_pb2.ModelProto.FromString(out.getvalue())


@pytest.fixture
def write(proto: Any, tmp_path: Path) -> Make:
    """A function that writes a folder as transformers converts the model: `kind` is llama, gemma or metaspace."""

    def make(kind: str = "llama", **model: Any) -> Path:
        pieces = [piece.piece for piece in proto.pieces]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        pairs = list(merges(vocabulary, [piece.score for piece in proto.pieces]))
        options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True} | model
        tokens = Tokenizer(models.BPE(vocabulary, pairs, **options))
        spaces = normalizers.Replace(" ", "▁")
        back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind != "gemma":
            back.append(decoders.Strip(" ", 1, 0))
        if kind == "llama":
            tokens.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        elif kind == "gemma":
            tokens.normalizer = spaces
            tokens.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        else:
            tokens.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=kind, split=False)
        tokens.decoder = decoders.Sequence(back)
        tokens.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
        tokens.add_tokens([AddedToken("<table>", normalized=False)])
        tokens.add_special_tokens([AddedToken("[INST]", normalized=False)])
        tokens.save(str(tmp_path / "tokenizer.json"))
        marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        write_json(tmp_path / "tokenizer_config.json", marks)
        write_json(
            tmp_path / "config.json",
            {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY},
        )
        return tmp_path

    return make


def said(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(strings: list[str]) -> list[str]:
    return [*strings, *LEARNED, "a<s>b </s> c", "<table>x[INST] y", " leads", "   ", "a    b", "日本<0x0A>"]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_it_comes_back_equal(kind: str, write: Make, strings: list[str]) -> None:
    folder = write(kind)
    metadata, notes = tokenizer_metadata(folder, VOCABULARY)
    assert notes == []
    before, (after, _) = Tokenizer.from_file(str(folder / "tokenizer.json")), build_tokenizer(metadata)
    assert before.get_vocab() == after.get_vocab()
    assert {t.content: t.special for t in before.get_added_tokens_decoder().values()} == {
        t.content: t.special for t in after.get_added_tokens_decoder().values()
    }
    for text in texts(strings):
        ids = before.encode(text, add_special_tokens=False).ids
        assert ids == after.encode(text).ids, text
        assert before.decode(ids) == after.decode(ids), text


def test_what_is_written_is_written_again(write: Make, tmp_path: Path) -> None:
    """Our importer's tokenizer.json goes out and comes back to the letter."""
    metadata, _ = tokenizer_metadata(write(), VOCABULARY)
    first, _ = build_tokenizer(metadata)
    first.save(str(tmp_path / "tokenizer.json"))
    again, _ = tokenizer_metadata(tmp_path, VOCABULARY)
    assert build_tokenizer(again)[0].to_str() == first.to_str()
    assert again == metadata


def test_the_keys(write: Make, proto: Any) -> None:
    metadata = tokenizer_metadata(write(), VOCABULARY)[0]
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    kinds = [types[tokens.index(token)] for token in ("<unk>", "<s>", "<table>", "<0x0A>", "▁t", "[INST]")]
    assert kinds == [2, 3, 4, 6, 1, 3]
    assert (tokens[-1], types[-1]) == (f"[PAD{VOCABULARY - 1}]", 5)
    scores = metadata["tokenizer.ggml.scores"]
    assert len(scores) == len(tokens)
    made = [(p.score, scores[n]) for n, p in enumerate(proto.pieces) if p.type == 1 and len(p.piece) > 1]
    assert [theirs for theirs, _ in sorted(made)] == [
        theirs for theirs, _ in sorted(made, key=lambda m: m[1])
    ]
    ids = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")]
    assert ids == [1, 2, 0]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_llama_cpp_reads_the_same_tokens(
    kind: str, make_folder: Make, write: Make, tmp_path: Path, strings: list[str], llama_cpp: Any
) -> None:
    source = write(kind)
    folder = make_folder("llama", name="model", vocab_size=VOCABULARY)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    assert export_gguf(folder, tmp_path / "m.gguf") == []
    asked = texts(strings)
    [file] = llama_cpp([tmp_path / "m.gguf"], texts=asked)
    ours = Tokenizer.from_file(str(import_gguf(tmp_path / "m.gguf", tmp_path / "back") / "tokenizer.json"))
    for text, ids in zip(asked, file["texts"], strict=True):
        assert ours.encode(text, add_special_tokens=False).ids == ids, text


@pytest.mark.parametrize("kind", ["first", "always"])
def test_spaces_that_llama_cpp_puts_elsewhere_are_said(kind: str, write: Make, strings: list[str]) -> None:
    folder = write(kind)
    metadata, notes = tokenizer_metadata(folder, VOCABULARY)
    assert notes == [EDGES]
    before, (after, _) = Tokenizer.from_file(str(folder / "tokenizer.json")), build_tokenizer(metadata)
    differing = []
    for text in texts(strings):
        if before.encode(text, add_special_tokens=False).ids != after.encode(text).ids:
            differing.append(text)
    assert differing
    special = ("<s>", "</s>", "<table>", "[INST]")
    assert all(text[:1].isspace() or any(mark in text for mark in special) for text in differing)


def test_a_folder_with_a_tokenizer_model_only(proto: Any, write: Make, strings: list[str]) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = write()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    metadata, notes = tokenizer_metadata(folder, VOCABULARY)
    assert notes == [EDGES]
    after, _ = build_tokenizer(metadata)
    theirs = SentencePieceProcessor(model_proto=proto.SerializeToString())
    plain = [text for text in strings if "<" not in text]
    assert len(plain) > 20
    for text in [*plain, " leads", "the  two   spaces"]:
        assert after.encode(text).ids == theirs.encode(text), text


def change(folder: Path, changing: Callable[[dict[str, Any]], None]) -> Path:
    data = read_json(folder / "tokenizer.json")
    changing(data)
    write_json(folder / "tokenizer.json", data)
    return folder


def interleaved(pairs: list[list[str]]) -> list[list[str]]:
    """The second way to a token comes last, behind those to other tokens."""
    made = ["".join(pair) for pair in pairs]
    second = next(at for at, token in enumerate(made) if token in made[:at])
    return [*pairs[:second], *pairs[second + 1 :], pairs[second]]


@pytest.mark.parametrize(
    ("changing", "named"),
    [
        (lambda d: d["model"].update(ignore_merges=True), "taken whole"),
        (lambda d: d["model"].update(merges=interleaved(d["model"]["merges"])), "merges that do not follow"),
        (lambda d: d["model"].update(merges=d["model"]["merges"][:-1]), "merges that do not follow"),
        (lambda d: d["model"]["vocab"].update({"<0x41> ": d["model"]["vocab"].pop("<0x41>")}), "no token <0x41>"),
        (lambda d: d["added_tokens"][1].update(normalized=True), "'<s>', which is looked for in normalised"),
        (lambda d: d["normalizer"]["normalizers"].append({"type": "NFKC"}), "a normalizer (Prepend, Replace, NFKC)"),
        (lambda d: d["normalizer"]["normalizers"].pop(), "other than Llama 2's"),
        (lambda d: d["decoder"]["decoders"].pop(), "other than Llama 2's"),
        (lambda d: d.update(decoder=None), "decoder (none)"),
        (lambda d: d.update(pre_tokenizer={"type": "Digits", "individual_digits": True}), "pre-tokenizer (Digits)"),
        (lambda d: d["model"].update(dropout=0.1), "dropout"),
        (lambda d: d["added_tokens"][2].update(rstrip=True), "'</s>' with rstrip"),
    ],
)  # fmt: skip
def test_what_a_gguf_cannot_say(changing: Callable[[dict[str, Any]], None], named: str, write: Make) -> None:
    folder = change(write(), changing)
    assert named in said(lambda: tokenizer_metadata(folder, VOCABULARY))


def test_a_unigram_model(write: Make) -> None:
    folder = write()
    vocabulary = [(token, 0.0) for token in Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()]
    Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True)).save(str(folder / "tokenizer.json"))
    assert "but a Unigram" in said(lambda: tokenizer_metadata(folder, VOCABULARY))


def test_a_bytes_token_among_the_added_ones(write: Make) -> None:
    folder = write()
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens.add_tokens([AddedToken("<0x0A>", normalized=False)])
    tokens.save(str(folder / "tokenizer.json"))
    assert "the token of a byte" in said(lambda: tokenizer_metadata(folder, VOCABULARY))
    assert json.loads((folder / "tokenizer.json").read_text())
