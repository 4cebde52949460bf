"""Weights are bfloat16 in every folder, whatever they are computed in; and none is loaded that memory cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import farthing
from farthing.base.errors import UserError
from farthing.train.optim import MasterWeights, add_lora
from farthing.weights import decoders, load_decoder, save_decoder
from farthing.weights.check import Checked
from farthing.weights.folder import read_config

BF16, FP32 = torch.bfloat16, torch.float32


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_in_float32_the_values_are_those_of_bfloat16(tiny_model: Path) -> None:
    wide = load_decoder(tiny_model, FP32, stored=BF16)
    narrow = load_decoder(tiny_model, BF16)
    for one, two in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert one.dtype == FP32
        assert torch.equal(one, two.float())


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_trained_in_float32_is_what_is_saved(tiny_model: Path, tmp_path: Path, lora: bool) -> None:
    decoder = load_decoder(tiny_model, FP32, stored=BF16)
    if lora:
        add_lora(decoder, 4, 8.0, 0)
    before = decoder(torch.arange(9)[None]).detach()
    optimizer = MasterWeights(decoder, "adamw", 1e-2, (0.9, 0.95), 0.0)
    for step in range(2):
        decoder(torch.arange(9)[None] + step).square().mean().backward()
        optimizer.step(1e-2)
    for parameter in decoder.parameters():
        assert torch.equal(parameter, parameter.to(BF16).float())
    save_decoder(decoder, read_config(tiny_model), tmp_path / "model", tokenizer_from=tiny_model)
    assert {t.dtype for t in tensors(tmp_path / "model").values()} == {BF16}
    assert read_config(tmp_path / "model")["dtype"] == "bfloat16"
    again = load_decoder(tmp_path / "model", FP32, stored=BF16)
    expected, reloaded = (d(torch.arange(9)[None]).detach() for d in (decoder, again))
    assert float((expected - before).abs().max()) > 0.1
    # merging LoRA rounds once more
    torch.testing.assert_close(reloaded, expected, atol=0.05 if lora else 0, rtol=0)


def test_a_folder_loaded_and_saved_is_the_same(tiny_model: Path, tmp_path: Path) -> None:
    decoder = load_decoder(tiny_model, FP32, stored=BF16)
    save_decoder(decoder, read_config(tiny_model), tmp_path / "model", tokenizer_from=tiny_model)
    before, after = tensors(tiny_model), tensors(tmp_path / "model")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_routers_correction_stays_float32(small_deepseek: Callable[..., Any], tmp_path: Path) -> None:
    decoder, hf = small_deepseek()
    save_decoder(decoder, hf, tmp_path / "wide", tokenizer_from=None)
    loaded = load_decoder(tmp_path / "wide", FP32, stored=BF16)
    save_decoder(loaded, hf, tmp_path / "narrow", tokenizer_from=None)
    wide, narrow = tensors(tmp_path / "wide"), tensors(tmp_path / "narrow")
    corrections = [name for name in wide if name.endswith("e_score_correction_bias")]
    assert corrections
    for name, tensor in narrow.items():
        if name in corrections:
            assert torch.equal(tensor, wide[name])
        else:
            assert tensor.dtype == BF16


def test_a_public_load_keeps_the_dtype_it_is_told(tiny_model: Path, tmp_path: Path) -> None:
    for dtype, expected in (("auto", BF16), ("bfloat16", BF16), ("float32", FP32), (FP32, FP32)):
        model = farthing.load(tiny_model, dtype=dtype, device="cpu")
        model.save(tmp_path / "out")
        assert {t.dtype for t in tensors(tmp_path / "out").values()} == {expected}


@pytest.mark.parametrize(
    ("free", "dtype", "said"),
    [
        (500_000, FP32, r"take 0.0 GB on cpu in float32, .* it would fit with dtype: bfloat16"),
        (100, FP32, r"GB are free; a model of 1.2e-08 B parameters would fit"),
        (100, BF16, r"in bfloat16, 0.0 GB are free; a model of 2.5e-08 B parameters would fit"),
    ],
)
def test_a_model_too_large_is_refused_before_it_is_loaded(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, free: int, dtype: torch.dtype, said: str
) -> None:
    packed_everywhere = SimpleNamespace(status=lambda *_: SimpleNamespace(on=True))
    monkeypatch.setattr(decoders.packed, "KERNEL", packed_everywhere)
    monkeypatch.setattr(decoders, "free_memory", lambda _: free)
    monkeypatch.setattr(Checked, "values", lambda _: pytest.fail("a weight was read"))
    with pytest.raises(UserError, match=said):
        load_decoder(tiny_model, dtype)
