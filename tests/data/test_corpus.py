"""Documents tokenised to disk, read back, and refused when damaged."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.data.corpus import Corpus
from farthing.data.text import Document

EOS = 256


def by_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def build(texts: list[str], folder: Path, vocab_size: int = 257, **options: int) -> Corpus:
    placed = (Document(text, f"a.jsonl:{n}") for n, text in enumerate(texts, 1))
    return Corpus.build(placed, by_bytes, folder, eos=EOS, vocab_size=vocab_size, **options)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=6))
def test_every_document_comes_back_closed_by_eos(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    for corpus in (build(texts, folder), Corpus.open(folder)):
        assert [corpus.document(n).tolist() for n in range(corpus.documents)] == [
            [*text.encode(), EOS] for text in texts
        ]
        assert corpus.documents == len(texts)
        assert corpus.bytes == sum(len(text.encode()) for text in texts)
        assert corpus.tokens == corpus.bytes + len(texts)
        assert corpus.bos is None


def test_ids_are_stored_as_narrow_as_the_vocabulary_allows(tmp_path: Path) -> None:
    assert build(["a"], tmp_path / "narrow", 65_536).ids.dtype == np.uint16
    wide = Corpus.build(
        [Document("a", "x:1")],
        lambda texts: [[65_536] for _ in texts],
        tmp_path / "wide",
        eos=1,
        vocab_size=65_537,
    )
    assert wide.ids.dtype == np.uint32
    assert wide.ids.tolist() == [65_536, 1]


def test_marks_that_the_tokenizer_puts_are_not_repeated(tmp_path: Path) -> None:
    documents = [Document("a", "x:1"), Document("b", "x:2")]
    corpus = Corpus.build(
        documents, lambda texts: [[0, ord(t), 1] for t in texts], tmp_path / "c", eos=1, bos=0, vocab_size=300
    )
    assert corpus.ids.tolist() == [0, 97, 1, 0, 98, 1]
    assert corpus.bos == 0
    assert build(["a"], tmp_path / "d", bos=7).bos is None, "what its documents do not begin with is none"


def test_the_hash_is_of_the_text_alone(tmp_path: Path) -> None:
    def of(texts: list[str], name: str, vocab_size: int = 257) -> str:
        return build(texts, tmp_path / name, vocab_size).sha256

    one = of(["ab", "c"], "1")
    assert one == hashlib.sha256(b"\2" + bytes(7) + b"ab" + b"\1" + bytes(7) + b"c").hexdigest()
    assert one == of(["ab", "c"], "2", 70_000)
    assert one != of(["a", "bc"], "3")
    assert one != of(["c", "ab"], "4")


def test_a_corpus_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "corpus"
    build(["old"], folder)

    def cut_off() -> Iterator[Document]:
        yield Document("new", "a:1")
        raise UserError("a:2: broken")

    with pytest.raises(UserError, match="a:2: broken"):
        Corpus.build(cut_off(), by_bytes, folder, eos=EOS, vocab_size=257)
    assert list(folder.parent.iterdir()) == []
    assert build(["new", "er"], folder).documents == 2
    assert [path.name for path in folder.parent.iterdir()] == ["corpus"]


def test_no_documents_and_a_folder_that_is_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data has no documents"):
        build([], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="home exists and is not a corpus"):
        build(["a"], tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("damage", ["cut", "dtype", "starts", "index", "gone", "format"])
def test_a_damaged_corpus_is_refused(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    corpus = build(["one", "two"], folder)
    index = json.loads((folder / "index.json").read_text())
    if damage == "cut":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])
    elif damage == "dtype":
        (folder / "index.json").write_text(json.dumps(index | {"dtype": "object"}))
    elif damage == "starts":
        corpus.starts[[0, 2, 1]].tofile(folder / "documents.bin")
    elif damage == "index":
        (folder / "index.json").write_text(json.dumps({"format": 1}))
    elif damage == "gone":
        (folder / "documents.bin").unlink()
    else:
        (folder / "index.json").write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(UserError, match=r"the corpus in .* is damaged; delete it and run again"):
        Corpus.open(folder)


def test_what_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no corpus; build it again"):
        Corpus.open(tmp_path)
