"""gpt-oss's folders in MXFP4: what they mean, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from farthing.base.errors import UserError
from farthing.weights import load_decoder, save_decoder
from farthing.weights.folder import SINGLE, read_config
from farthing.weights.mxfp4 import dequantise

CONFIG = GptOssConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
    max_position_embeddings=64, pad_token_id=None,
)  # fmt: skip


def packed(experts: int, outputs: int, blocks: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (experts, outputs, blocks, 16), dtype=torch.uint8, generator=draw)
    return codes, torch.randint(118, 126, (experts, outputs, blocks), dtype=torch.uint8, generator=draw)


@pytest.fixture
def folder(tmp_path: Path, pair_of: Callable[..., SimpleNamespace]) -> Path:
    """A folder whose experts are packed, as OpenAI's are."""
    source = pair_of(CONFIG).folder
    tensors = load_file(source / SINGLE)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed(experts, outputs, inputs // 32)
    target = tmp_path / "packed"
    target.mkdir()
    save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    config = read_config(source) | {"quantization_config": {"quant_method": "mxfp4"}}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_numbers_are_transformers_own() -> None:
    blocks, scales = packed(3, 10, 2)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(dequantise(blocks, scales), expected)


def test_a_packed_folder_is_read_and_written_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    stored = load_file(folder / SINGLE)
    ours = load_decoder(folder, torch.float32)
    name = "model.layers.1.mlp.experts.down_proj"
    expected = dequantise(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    assert torch.equal(ours.state_dict()["layers.1.feedforward.experts.down"], expected.float())
    assert ours(torch.arange(20)[None]).isfinite().all()
    saved = save_decoder(ours.bfloat16(), read_config(folder), tmp_path / "saved", None)
    assert "quantization_config" not in read_config(saved)
    assert torch.equal(load_file(saved / SINGLE)[name], expected)


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_damage_is_named(folder: Path, part: str) -> None:
    tensors = load_file(folder / SINGLE)
    name = f"model.layers.0.mlp.experts.down_proj_{part}"
    tensors[name] = tensors[name][:, :, :, :8] if part == "blocks" else tensors.pop(name)[:, :, :1]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SINGLE)
    with pytest.raises(UserError, match="are no MXFP4 weight"):
        load_decoder(folder)
    del tensors[name]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SINGLE)
    with pytest.raises(UserError, match=r"down_proj_scales (is missing|holds U8 numbers)"):
        load_decoder(folder)
