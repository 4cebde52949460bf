"""Tokenised documents in one flat file, written once and memory-mapped.

tokens.bin      every document's ids and a closing eos, end to end: uint16, or uint32 for a larger vocabulary
documents.bin   start of each document, and the end of the last: int64
index.json      counts, and hashes of the corpus's inputs
"""

from __future__ import annotations

import hashlib
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from farthing.base.errors import UserError
from farthing.base.files import new_folder, read_json, write_json
from farthing.data.text import Document

Encode = Callable[[list[str]], list[list[int]]]
_INDEX, _TOKENS, _DOCUMENTS = "index.json", "tokens.bin", "documents.bin"
_FORMAT = 1
_AT_ONCE = 1_000_000  # characters encoded at once


class Corpus:
    """A corpus on disk; made by `build` or `open`.

    tokens, documents: how many; every document's closing eos counts. bytes: of the documents' UTF-8 text.
    sha256: of the documents' text, whatever the tokenizer. starts: int64 [documents + 1]. bos: the mark every
    document begins with, or None.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.tokens = int(index["tokens"])
        self.documents = int(index["documents"])
        self.bytes = int(index["bytes"])
        self.sha256 = str(index["sha256"])
        self.tokenizer_sha256 = str(index["tokenizer_sha256"])
        self.eos = int(index["eos"])
        self.bos: int | None = index["bos"]
        mapped = np.memmap(folder / _TOKENS, dtype=index["dtype"], mode="r", shape=(self.tokens,))
        self.ids: np.ndarray = mapped.view(np.ndarray)  # a memmap's slices are several times slower to make
        self.starts = np.fromfile(folder / _DOCUMENTS, dtype=np.int64)

    @classmethod
    def build(
        cls,
        documents: Iterable[Document],
        encode: Encode,
        folder: Path,
        *,
        eos: int,
        vocab_size: int,
        bos: int | None = None,
        tokenizer_sha256: str = "",
    ) -> Corpus:
        """Encode documents into `folder`, which appears whole or not at all and replaces an older corpus.

        Args:
            encode: ids of each text, with the marks its tokenizer puts around one (`Tokenizer.text_encoder()`).
            eos: the id that closes a document, unless `encode` has put it there.
            vocab_size: number of ids; decides how wide they are stored.
            bos: the id `encode` begins a document with, if it does.

        Raises:
            UserError: when there is no document, no room on the disk, or `folder` is something else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / _INDEX).is_file() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not a corpus; choose another place for it")
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        starts, total_bytes, hashed = array("q", [0]), 0, hashlib.sha256()
        with_bos = bos is not None
        if folder.exists():
            shutil.rmtree(folder)
        with new_folder(folder) as partial:
            with (partial / _TOKENS).open("wb") as file:
                for texts in _batches(documents):
                    for text, ids in zip(texts, encode(texts), strict=True):
                        data = text.encode()
                        total_bytes += len(data)
                        hashed.update(len(data).to_bytes(8, "little") + data)
                        if not ids or ids[-1] != eos:
                            ids.append(eos)
                        assert max(ids) < vocab_size
                        with_bos = with_bos and ids[0] == bos
                        starts.append(starts[-1] + len(ids))
                        np.array(ids, dtype=dtype).tofile(file)
            if len(starts) == 1:
                raise UserError(
                    "the data has no documents; name files with at least one text that is not empty"
                )
            np.array(starts, dtype=np.int64).tofile(partial / _DOCUMENTS)
            index = {
                "format": _FORMAT,
                "documents": len(starts) - 1,
                "tokens": starts[-1],
                "bytes": total_bytes,
                "dtype": np.dtype(dtype).name,
                "eos": eos,
                "bos": bos if with_bos else None,
                "sha256": hashed.hexdigest(),
                "tokenizer_sha256": tokenizer_sha256,
            }
            write_json(partial / _INDEX, index)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Open a corpus. Raises UserError if it is missing or damaged."""
        folder = Path(folder)
        if not (folder / _INDEX).is_file():
            raise UserError(f"{folder} has no corpus; build it again")
        index = read_json(folder / _INDEX)
        try:
            right = (
                index["format"] == _FORMAT
                and index["dtype"] in ("uint16", "uint32")
                and _size(folder / _TOKENS) == index["tokens"] * np.dtype(index["dtype"]).itemsize
                and _size(folder / _DOCUMENTS) == 8 * (index["documents"] + 1)
                and index["documents"] > 0
            )
            corpus = cls(folder, index) if right else None
        except (KeyError, TypeError, ValueError):
            corpus = None
        if corpus is None or not _in_order(corpus.starts, corpus.tokens):
            raise UserError(f"the corpus in {folder} is damaged; delete it and run again")
        return corpus

    def document(self, number: int) -> np.ndarray:
        """Ids of one document, its closing eos included: a view of the file."""
        return self.ids[self.starts[number] : self.starts[number + 1]]


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Texts in batches of about a million characters, enough to keep every core of the tokenizer busy."""
    texts: list[str] = []
    held = 0
    for document in documents:
        texts.append(document.text)
        held += len(document.text)
        if held >= _AT_ONCE:
            yield texts
            texts, held = [], 0
    if texts:
        yield texts


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _in_order(starts: np.ndarray, tokens: int) -> bool:
    return bool(starts[0] == 0 and starts[-1] == tokens and (np.diff(starts) > 0).all())
