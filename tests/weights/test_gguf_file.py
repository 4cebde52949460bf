"""The structure of a .gguf: as gguf's own reader reads it, and every file of another shape refused in one line."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.weights.gguf_file import open_gguf
from farthing.weights.gguf_read import import_gguf


def write(path: Path, change: Callable[[GGUFWriter], None] = lambda _: None) -> Path:
    """A file with a value of every kind and tensors of several types; `change` adds to its metadata."""
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_int8("a.i8", -3)
    writer.add_uint64("a.u64", 2**40)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve ▁ 🙂")
    writer.add_array("a.texts", ["", "ab", "▁c"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 1.5])
    change(writer)
    rng = np.random.default_rng(1)
    values = rng.standard_normal((6, 64)).astype(np.float32)
    writer.add_tensor("plain", values)
    writer.add_tensor("half", values.astype(np.float16)[:3])
    writer.add_tensor(
        "quantised",
        quantize(values, GGMLQuantizationType.Q8_0),
        raw_dtype=GGMLQuantizationType.Q8_0,
    )
    writer.add_tensor("vector", rng.standard_normal(5).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


def said(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.removeprefix(str(path))) < 200
    return message


def test_a_file_is_read_as_ggufs_own_reader_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    ours, theirs = open_gguf(path), GGUFReader(path)
    expected = {
        name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")
    }
    assert ours.metadata == expected
    assert len(expected) > 10
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert mine.kind == tensor.tensor_type
        np.testing.assert_array_equal(mine.rows, tensor.data)


@given(st.data())
def test_a_file_cut_short_stretched_or_shifted_is_refused(
    whole: bytes, tmp_path_factory: Any, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("changed") / "m.gguf"
    at = data.draw(st.integers(0, len(whole) - 33), "at")  # the last bytes may be padding
    how = data.draw(st.sampled_from(["cut", "insert", "append"]), "how")
    piece = data.draw(st.binary(min_size=1, max_size=40), "piece")
    changed = {
        "cut": whole[:at],
        "insert": whole[:at] + piece + whole[at:],
        "append": whole + piece + bytes(32),
    }[how]
    path.write_bytes(changed)
    if how == "insert" and not any(piece) and not any(whole[at:]):
        return  # more of the padding that was there
    said(path)


def test_the_reported_changes_of_structure(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole + bytes(5000))
    assert "bytes follow its last tensor" in said(path)
    begin = whole.index(b"vector")
    path.write_bytes(whole[:begin] + bytes(7) + whole[begin:])
    assert "not a complete .gguf file" in said(path)
    offset = begin + len("vector") + 4 + 8 + 4  # past dimensions, shape and type
    for bit in range(40):
        one = bytearray(whole)
        one[offset + bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(one))
        assert "its tensor 'vector' begins at" in said(path)
    path.write_bytes(b"")
    assert "is empty" in said(path)


@pytest.mark.parametrize("kind", [8, 4, 9])
def test_a_length_beyond_the_file_is_refused_before_anything_is_allocated(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, kind, 2**60)
    path.write_bytes(head)
    assert "not a complete .gguf file" in said(path)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 2**62, 0))
    assert "it ends within a number" in said(path)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**62))
    assert "it ends within a number" in said(path)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda w: w.add_uint32("tokenizer.ggml.model", 3), "its tokenizer.ggml.model is '3', not a text"),
        (lambda w: w.add_array("tokenizer.chat_template", ["x"]), "its tokenizer.chat_template is"),
        (lambda w: w.add_string("tokenizer.ggml.eos_token_id", "2"), "its tokenizer.ggml.eos_token_id is '2'"),
        (lambda w: w.add_float32("tokenizer.ggml.bos_token_id", 1.5), "not a whole number"),
        (lambda w: w.add_string("tokenizer.ggml.add_bos_token", "yes"), "not true or false"),
        (lambda w: w.add_array("tokenizer.ggml.tokens", [1, 2]), "not a list of texts"),
        (lambda w: w.add_array("tokenizer.ggml.scores", ["a"]), "not a list of numbers"),
        (lambda w: w.add_string("split.count", "many"), "its split.count is 'many'"),
        (lambda w: w.add_string("general.license", "mit") or w.add_uint32("split.count", 4), "one part of several"),
    ],
)  # fmt: skip
def test_metadata_of_the_wrong_type(change: Callable[[GGUFWriter], None], wrong: str, tmp_path: Path) -> None:
    assert wrong in said(write(tmp_path / "m.gguf", change))


def test_lists_that_belong_to_the_tokens_are_as_long(tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        writer.add_array("tokenizer.ggml.token_type", [1, 1, 1])

    assert "token_type has 3 entries for 2 tokens" in said(write(tmp_path / "m.gguf", change))


def test_an_importer_leaves_nothing_of_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"m\.gguf: "):
        import_gguf(write(tmp_path / "m.gguf"), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
