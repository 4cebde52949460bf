"""Block-scaled FP8: what it loses, every shape and order on disk, other readers of the layout, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from farthing.base.errors import UserError
from farthing.base.files import write_json
from farthing.weights.fp8 import (
    BLOCK,
    QUANTIZATION_CONFIG,
    SCALE,
    Weights,
    dequantise,
    is_quantised,
    quantise,
)

SIZES = st.integers(1, 300)


def draw(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def folder_of(path: Path, *shards: dict[str, Tensor], quantization: Any = QUANTIZATION_CONFIG) -> Path:
    """A folder of these shards, with a config of no particular family."""
    path.mkdir(exist_ok=True)
    names: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / file)
        names |= dict.fromkeys(shard, file)
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    write_json(path / "config.json", {} if quantization is None else {"quantization_config": quantization})
    return path


def said(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the numbers ----


@given(SIZES, SIZES, st.floats(-30, 30))
def test_each_weight_comes_back_within_half_a_step(rows: int, columns: int, exponent: float) -> None:
    weight = draw(rows, columns) * 10**exponent
    stored, scale = quantise(weight)
    assert stored.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    back = dequantise(stored, scale)
    # Three bits of mantissa: a relative error of 2^-4; below the smallest normal, 2^-6, a step is 2^-9.
    own_scale = torch.stack([scale[r // 128, torch.arange(columns) // 128] for r in range(rows)])
    allowed = torch.maximum(weight.abs() * 2**-4, own_scale * 2**-10)
    assert ((back - weight).abs() <= allowed * 1.001).all()


def test_a_block_has_a_scale_of_its_own() -> None:
    weight = torch.ones(256, 130)
    weight[128:] = 1e-6
    weight[:, 128:] *= 1e3
    back = dequantise(*quantise(weight))
    torch.testing.assert_close(back, weight, rtol=1e-6, atol=0)


@given(st.integers(0, 5))
def test_what_was_dequantised_is_quantised_to_the_same(seed: int) -> None:
    once = dequantise(*quantise(draw(200, 150, seed)))
    torch.testing.assert_close(dequantise(*quantise(once)), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e-44, 3e38])
def test_the_ends_of_the_range(value: float) -> None:
    back = dequantise(*quantise(torch.full((3, 3), value)))
    torch.testing.assert_close(back, torch.full((3, 3), value), rtol=1e-6, atol=1e-40)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    weight = draw(4, 4)
    weight[2, 1] = value
    assert "layers.0.q" in said(lambda: quantise(weight, "layers.0.q"))


def test_torch_reads_the_layout_as_we_do(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

    weight = draw(300, 200)
    stored, scale = quantise(weight)
    folder = folder_of(tmp_path / "m", {"a.weight": stored, "a.weight" + SCALE: scale})
    theirs = {"a.weight": torch.empty(300, 200, dtype=torch.float32)}
    load(theirs, storage_reader=QuantizedHuggingFaceStorageReader(str(folder), target_dtype=torch.float32))
    assert torch.equal(theirs["a.weight"], dequantise(stored, scale))


# ---- which tensors ----


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.3.mlp.experts.7.down_proj.weight", True),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", True),
        ("model.layers.3.mlp.gate_proj.weight", True),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.block_sparse_moe.gate.weight", False),
        ("model.layers.61.eh_proj.weight", False),
        ("model.layers.61.shared_head.head.weight", False),
        ("model.layers.61.embed_tokens.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_the_linear_layers_are_quantised_and_the_delicate_ones_not(name: str, stored: bool) -> None:
    assert is_quantised(name, (8, 8)) == stored
    assert not is_quantised(name, (8,))


# ---- folders ----


def test_weights_and_scales_in_any_shards_and_order(tmp_path: Path) -> None:
    a, b = quantise(draw(130, 10)), quantise(draw(5, 140, 1))
    plain = draw(3, 3, 2).bfloat16()
    first = {"b.weight" + SCALE: b[1], "a.weight": a[0], "norm.weight": plain}
    folder = folder_of(tmp_path / "m", first, {"b.weight": b[0], "a.weight" + SCALE: a[1]})
    read = dict(Weights(folder))
    assert read.keys() == {"a.weight", "b.weight", "norm.weight"}
    assert torch.equal(read["a.weight"], dequantise(*a))
    assert torch.equal(read["b.weight"], dequantise(*b))
    assert torch.equal(read["norm.weight"], plain)
    weights = Weights(folder)
    assert len(weights) == 3
    assert weights.shape("a.weight") == (130, 10)
    assert "a.weight" in weights
    assert "a.weight" + SCALE not in weights


def test_a_plain_folder_is_read_as_it_is(tmp_path: Path) -> None:
    half = draw(3, 3).half()
    folder = folder_of(tmp_path / "m", {"a.weight": half}, quantization=None)
    assert torch.equal(dict(Weights(folder))["a.weight"], half)


def test_other_block_sizes_are_read(tmp_path: Path) -> None:
    stored = torch.ones(6, 6).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    folder = folder_of(
        tmp_path / "m",
        {"a.weight": stored, "a.weight" + SCALE: scale},
        quantization=QUANTIZATION_CONFIG | {"weight_block_size": [4, 4]},
    )
    expected = torch.tensor([[1.0] * 4 + [2.0] * 2] * 4 + [[3.0] * 4 + [4.0] * 2] * 2)
    assert torch.equal(Weights(folder)["a.weight"], expected)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 2), (2,), (2, 2, 1)])
def test_scales_of_the_wrong_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    stored, _ = quantise(draw(200, 200))
    folder = folder_of(tmp_path / "m", {"a.weight": stored, "a.weight" + SCALE: torch.ones(shape)})
    message = said(lambda: dict(Weights(folder)))
    assert f"a.weight{SCALE}" in message
    assert str(shape) in message
    assert "(2, 2)" in message


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_no_scales(scale: float, tmp_path: Path) -> None:
    stored, _ = quantise(draw(8, 8))
    folder = folder_of(tmp_path / "m", {"a.weight": stored, "a.weight" + SCALE: torch.full((1, 1), scale)})
    assert "not a positive number" in said(lambda: dict(Weights(folder)))


def test_halves_of_a_pair(tmp_path: Path) -> None:
    stored, scale = quantise(draw(*BLOCK))
    alone = folder_of(tmp_path / "a", {"a.weight": stored})
    assert "a.weight is FP8 without" in said(lambda: dict(Weights(alone)))
    alone = folder_of(tmp_path / "b", {"a.weight" + SCALE: scale})
    assert "has no weight to scale" in said(lambda: Weights(alone))
    flat = folder_of(tmp_path / "c", {"a.weight": stored[0].contiguous(), "a.weight" + SCALE: scale})
    assert "only matrices" in said(lambda: dict(Weights(flat)))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        "fp8",
    ],
)
def test_quantisation_of_another_kind(quantization: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {"a.weight": draw(2, 2)}, quantization=quantization)
    assert "quantization_config" in said(lambda: Weights(folder))
