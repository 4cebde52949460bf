"""Expanding blocks: as gguf's own dequantiser and torch's rounding do, to the bit, on any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from farthing.base.errors import UserError
from farthing.weights import gguf_expand
from farthing.weights.gguf_expand import expander, rounded
from farthing.weights.gguf_file import Tensor

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def test_rounding_is_torchs() -> None:
    generator = np.random.default_rng(0)
    some = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = (some & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    edges = np.array([0, 0x80000000, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00008000], np.uint32)
    wide = np.concatenate([some, ties, edges]).view(np.float32)
    wide = wide[~np.isnan(wide)]
    expected = torch.from_numpy(wide).bfloat16()
    assert torch.equal(torch.from_numpy(rounded(wide)).view(torch.bfloat16), expected)
    assert len(wide) > 300_000


def test_what_is_no_number_stays_none() -> None:
    words = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x3F800000], np.uint32)
    found = torch.from_numpy(rounded(words.view(np.float32))).view(torch.bfloat16)
    assert found.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("chunk", [1, 200, 1 << 18])
def test_tensors_are_expanded_as_gguf_does(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_expand, "_CHUNK", chunk)
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(1).normal(size=(3, 7, 64)).astype(np.float32)
    stored = quantize(values, kind)
    expected = torch.from_numpy(np.array(dequantize(stored, kind))).bfloat16()
    with expander() as expand:
        bits = expand.bfloat16(Tensor("x", kind, values.shape, stored))
        row = expand.bfloat16(Tensor("y", kind, (64,), stored[1, 2]))
    assert bits.shape == values.shape
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), expected)
    assert torch.equal(torch.from_numpy(row).view(torch.bfloat16), expected[1, 2])


def test_a_type_that_gguf_does_not_expand_is_named() -> None:
    kind = GGMLQuantizationType.Q8_1
    rows = np.zeros((2, GGML_QUANT_SIZES[kind][1]), np.uint8)
    with expander() as expand, pytest.raises(UserError, match="its tensor x is of the type Q8_1"):
        expand.bfloat16(Tensor("x", kind, (2, 32), rows))
