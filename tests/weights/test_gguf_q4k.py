"""Q4_K: gguf's own dequantiser reads what is written, within the format's bounds and nearer than Q4_0."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from farthing.weights.folder import read_config, read_tensors
from farthing.weights.gguf_q4k import BYTES, SUPER, quantise_q4_k
from farthing.weights.gguf_read import import_gguf
from farthing.weights.gguf_write import export_gguf

Q4_K, Q4_0 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q4_0


def back(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    written = quantise_q4_k(rows)
    assert written.shape == (len(rows), rows.shape[1] // SUPER * BYTES)
    found: np.ndarray[Any, Any] = dequantize(written, Q4_K)
    return found


def error(rows: np.ndarray[Any, Any], read: np.ndarray[Any, Any]) -> float:
    """The error's size as a share of the weights' own."""
    return float(np.sqrt(np.square(read - rows).mean() / np.square(rows).mean()))


def draw(name: str) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(0)
    shape = (64, 768)
    rows = {
        "normal": random.normal(size=shape), "laplace": random.laplace(size=shape),
        "heavy tails": random.standard_t(3, size=shape), "small": random.normal(size=shape) * 1e-3,
        "large": random.normal(size=shape) * 1e4, "negative": -1 - random.random(shape),
        "one block larger": random.normal(size=shape) * np.where(np.arange(768) // 32 == 5, 4, 1),
    }[name]  # fmt: skip
    return rows.astype(np.float32)


@pytest.mark.parametrize(
    "name", ["normal", "laplace", "heavy tails", "small", "large", "negative", "one block larger"]
)
def test_nearer_than_q4_0(name: str) -> None:
    rows = draw(name)
    assert error(rows, back(rows)) < 0.95 * error(rows, dequantize(quantize(rows, Q4_0), Q4_0))


def test_a_normal_matrix_by_the_figure_in_the_docs() -> None:
    assert error(draw("normal"), back(draw("normal"))) == pytest.approx(0.073, abs=0.001)


def test_what_the_format_can_say_comes_back() -> None:
    """Numbers that are steps of one scale and one minimum: found again to the rounding of two float16."""
    random = np.random.default_rng(1)
    q = random.integers(0, 16, (6, 8, 32))
    q[..., 0], q[..., 1] = 0, 15
    scales, minimums = random.integers(20, 64, (6, 8, 1)), random.integers(10, 64, (6, 8, 1))
    scales[:, 3], minimums[:, 5] = 63, 63
    rows = (0.25 * scales * q - 0.5 * minimums).astype(np.float32).reshape(6, 256)
    assert np.abs(back(rows) - rows).max() < 2e-3 * np.abs(rows).max()


def test_zeros_and_one_number() -> None:
    zeros = np.zeros((2, 512), dtype=np.float32)
    assert np.array_equal(back(zeros), zeros)
    for number in (-3.0, 1e-30, 5.0, 60_000.0):
        rows = np.full((2, 256), number, dtype=np.float32)
        assert np.allclose(back(rows), rows, rtol=2e-3, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, (2, 256), elements=st.floats(-65_504, 65_504, width=32)))
def test_no_weight_is_further_off_than_its_block_is_wide(rows: np.ndarray[Any, Any]) -> None:
    """A step is a 15th of a block's range; six-bit scales and minimums add a 63rd of the largest block's."""
    read = back(rows)
    assert np.isfinite(read).all()
    blocks = rows.reshape(2, 8, 32)
    span = np.maximum(blocks.max(axis=2), 0) - np.minimum(blocks.min(axis=2), 0)
    bound = span / 10 + 2 * span.max(axis=1, keepdims=True) / 63 + 1e-5
    assert (np.abs(read.reshape(2, 8, 32) - blocks) <= bound[..., None]).all()


@pytest.mark.parametrize("size", [1e-4, 1e-5, 1e-6, 1e-7, 1e-9])
def test_what_no_step_can_say_is_zero_rather_than_something_larger(size: float) -> None:
    small = np.random.default_rng(0).normal(size=(16, SUPER)).astype(np.float32) * np.float32(size)
    beside = small.copy()
    beside[:, 32] = 5  # one weight of another size, in the second sub-block
    for rows in (small, beside):
        blocks = rows.reshape(-1, 32)
        off = np.square(back(rows).reshape(-1, 32) - blocks).sum(axis=1)
        assert (off <= 1.5 * np.square(blocks).sum(axis=1)).all()


def test_pieces_make_no_difference() -> None:
    rows = draw("normal").reshape(192, 256)
    alone = [quantise_q4_k(row[None]) for row in rows]
    assert np.array_equal(np.concatenate(alone), quantise_q4_k(np.tile(rows, (3, 1)))[192:384])


def test_through_our_import(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder("llama", hidden_size=256, head_dim=64, intermediate_size=512)
    assert export_gguf(folder, tmp_path / "m.gguf", "q4_k") == []
    again = dict(read_tensors(import_gguf(tmp_path / "m.gguf", tmp_path / "again")))
    for name, tensor in read_tensors(folder):
        apart = (again[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert apart < (0.09 if tensor.dim() > 1 else 0.005), name


def test_smollm2(smollm2: Path) -> None:
    """Weights of a trained model; these came from Q4_1, which a Q4_0 keeps worse still."""
    rows = [
        tensor.float().numpy() for name, tensor in read_tensors(smollm2) if name.endswith("down_proj.weight")
    ]
    assert len(rows) == read_config(smollm2)["num_hidden_layers"]
    for matrix in rows[::10]:
        assert error(matrix, back(matrix)) < error(matrix, dequantize(quantize(matrix, Q4_0), Q4_0))
