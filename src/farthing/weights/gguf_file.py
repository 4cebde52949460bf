"""The structure of a .gguf file: metadata, and tensors as views of the mapped file.

Every length is checked against the file before anything is read, so a damaged or hostile file ends in one line. Tensors
lie one after the other, each at a multiple of the alignment with zeros between, and the file ends with the last: a file
of any other shape was cut, joined or shifted. (The format: ggml's docs/gguf.md.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from farthing.base.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

Metadata = dict[str, Any]
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
# format of each scalar type of a metadata value, by its number in the file
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TEXTS = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")
_LISTS = {
    "tokenizer.ggml.tokens": str, "tokenizer.ggml.merges": str, "tokenizer.ggml.token_type": int,
    "tokenizer.ggml.scores": float,
}  # fmt: skip
_PER_TOKEN = ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")
_COUNT = "split.count"


@dataclass(frozen=True)
class Tensor:
    """One tensor: its name, type, shape [rows, …, columns], and its bytes as the file stores them.

    `rows` is [rows, …, bytes or numbers of a row], what gguf's `dequantize` expands.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    rows: np.ndarray[Any, Any]


@dataclass(frozen=True)
class GgufFile:
    """A .gguf's metadata by key, and its tensors by name in the order of the file."""

    metadata: Metadata
    tensors: dict[str, Tensor]


class _Damaged(ValueError):
    """A message that ends "it is not a complete .gguf file (…)"."""


def open_gguf(path: Path) -> GgufFile:
    """Read a file's header; tensors are mapped and not yet read.

    Raises:
        UserError: for a file that is damaged, a part of several, or of a kind that this reader does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the path of a .gguf file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; download it again")
    data = np.memmap(path, mode="c")  # copy-on-write, so that PyTorch accepts the arrays without a warning
    try:
        found = _Reader(data).file()
    except _Damaged as error:
        raise UserError(f"{path} is not a complete .gguf file ({error}); download it again") from None
    if found.metadata.get(_COUNT, 0) > 1:
        raise UserError(f"{path} is one part of several; join them with `llama-gguf-split --merge` first")
    return found


class _Reader:
    def __init__(self, data: np.memmap[Any, Any]) -> None:
        self._size, self._at = len(data), 0
        self._bytes = data.data
        self._array: np.ndarray[Any, Any] = np.asarray(data)

    def file(self) -> GgufFile:
        if bytes(self._take(4, "the first bytes")) != _MAGIC:
            raise _Damaged("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            big = version & 0xFFFF == 0
            raise _Damaged("it is big-endian" if big else f"it is of version {version}, read are 2 and 3")
        tensors, keys = self._number("Q"), self._number("Q")
        metadata: Metadata = {}
        for _ in range(keys):
            key = self._string()
            if key in metadata:
                raise _Damaged(f"it sets {key!r} twice")
            metadata[key] = self._value(self._number("I"))
        _check_types(metadata)
        infos = [self._info() for _ in range(tensors)]
        return GgufFile(metadata, self._tensors(infos, metadata.get("general.alignment", _ALIGNMENT)))

    def _take(self, count: int, what: str) -> memoryview:
        if count > self._size - self._at:
            raise _Damaged(f"it ends within {what}")
        start, self._at = self._at, self._at + count
        return self._bytes[start : self._at]

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize(form), "a number"))[0]

    def _string(self) -> str:
        return self._text(self._take(self._number("Q"), "a string"))

    @staticmethod
    def _text(raw: memoryview) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise _Damaged("a string in it is not UTF-8") from None

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _Damaged(f"a value in it is of the unknown type {kind}")
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            return self._strings(count)
        if kind not in _SCALARS:
            raise _Damaged(f"an array in it is of the type {kind}, which is not supported")
        form = np.dtype(_SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self._take(form.itemsize * count, "an array"), form).tolist()

    def _strings(self, count: int) -> list[str]:
        """A list of strings; this loop is most of the time that a vocabulary takes."""
        if count > (self._size - self._at) // 8:
            raise _Damaged("it ends within a list of strings")
        length, raw, at, size = struct.Struct("<Q").unpack_from, self._bytes, self._at, self._size
        found = []
        for _ in range(count):
            if at + 8 > size:
                raise _Damaged("it ends within a list of strings")
            end = at + 8 + length(raw, at)[0]
            if end > size:
                raise _Damaged("it ends within a list of strings")
            found.append(self._text(raw[at + 8 : end]))
            at = end
        self._at = at
        return found

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, type and offset from the first tensor."""
        name, dimensions = self._string(), self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _Damaged(f"its tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _tensors(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, Tensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if alignment <= 0 or alignment & (alignment - 1):
            raise _Damaged(f"its alignment is {alignment}, not a power of two")
        begin = math.ceil(self._at / alignment) * alignment
        end = 0
        found: dict[str, Tensor] = {}
        for name, shape, number, offset in infos:
            if name in found:
                raise _Damaged(f"it holds two tensors {name!r}")
            try:
                kind = GGMLQuantizationType(number)
                block, block_bytes = GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                raise _Damaged(f"its tensor {name!r} is of the unknown type {number}") from None
            if min(shape) < 1 or shape[-1] % block:
                raise _Damaged(f"its tensor {name!r} has the impossible shape {shape}")
            start = math.ceil(end / alignment) * alignment
            if offset != start:
                raise _Damaged(
                    f"its tensor {name!r} begins at {offset:,}, and the one before ends at {end:,}"
                )
            self._pad(begin + end if found else self._at, begin + start)
            row_bytes = shape[-1] // block * block_bytes
            end = start + math.prod(shape[:-1]) * row_bytes
            if begin + end > self._size:
                raise _Damaged(f"it ends within its tensor {name!r}")
            raw = self._array[begin + start : begin + end].view(_NUMPY.get(kind.name, np.dtype("u1")))
            found[name] = Tensor(name, kind, shape, raw.reshape(*shape[:-1], -1))
        if self._size > begin + math.ceil(end / alignment) * alignment:
            raise _Damaged(f"{self._size - begin - end:,} bytes follow its last tensor")
        self._pad(begin + end, self._size)
        return found

    def _pad(self, start: int, end: int) -> None:
        """Refuse padding that is not zeros: it would be the end of a tensor that was shifted."""
        if any(self._bytes[start:end]):
            raise _Damaged(f"its padding at byte {start:,} is not empty")


_NUMPY: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip


def _check_types(metadata: Metadata) -> None:
    """Refuse values that are not of the type that every reader of these keys expects."""

    def refuse(key: str, wanted: str) -> None:
        raise _Damaged(f"its {key} is {str(metadata[key])[:60]!r}, not {wanted}")

    def whole(value: object) -> bool:
        return type(value) is int

    checks: list[tuple[Callable[[str], bool], Callable[[object], bool], str]] = [
        (lambda key: key in _TEXTS or key == "general.license", lambda v: isinstance(v, str), "a text"),
        (lambda key: key.endswith("_token_id") or key == _COUNT, whole, "a whole number"),
        (lambda key: key == "general.alignment", whole, "a whole number"),
        (lambda key: ".ggml.add_" in key, lambda v: isinstance(v, bool), "true or false"),
    ]
    for key, value in metadata.items():
        for applies, right, wanted in checks:
            if applies(key) and not right(value):
                refuse(key, wanted)
        if (item := _LISTS.get(key)) is not None and not (
            isinstance(value, list) and set(map(type, value)) <= {item}
        ):
            refuse(key, "a list of " + {str: "texts", int: "whole numbers", float: "numbers"}[item])
    tokens = metadata.get("tokenizer.ggml.tokens")
    for key in _PER_TOKEN:
        if tokens is not None and key in metadata and len(metadata[key]) != len(tokens):
            raise _Damaged(f"its {key} has {len(metadata[key])} entries for {len(tokens)} tokens")
