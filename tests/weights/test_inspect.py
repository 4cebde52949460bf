"""What a folder is said to be: counted against its own tensors, and every bad folder in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.base.errors import UserError
from farthing.base.files import write_json
from farthing.engine.cache import PagedCache
from farthing.plans.inspect import inspect, inspection_text
from farthing.weights import load_decoder
from farthing.weights.folder import read_config, read_tensors

Make = Callable[..., Path]


def change(folder: Path, **changed: Any) -> Path:
    write_json(folder / "config.json", read_config(folder) | changed)
    return folder


def said(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3"])
def test_the_parameters_are_the_tensors(family: str, make_folder: Make) -> None:
    folder = make_folder(family)
    report = inspect(folder)["parameters"]
    sizes = {name: tensor.numel() for name, tensor in read_tensors(folder) if "correction_bias" not in name}
    copies = sum(
        n for name, n in sizes.items() if "layers.3" in name and ("embed" in name or "head.head" in name)
    )
    modules = sum(n for name, n in sizes.items() if "layers.3" in name) - copies
    assert report["prediction_modules"] == modules
    assert report["total"] == sum(sizes.values()) - modules - copies
    idle = sum(n for name, n in sizes.items() if ".experts." in name and "layers.3" not in name) * 5 // 8
    assert report["active"] == report["total"] - idle, "3 of 8 experts are active"
    assert (report["embedding"], report["head"]) == (336 * 64, 336 * 64)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_the_cache_is_the_engines(family: str, make_folder: Make) -> None:
    folder = make_folder(family)
    report = inspect(folder)["cache"]
    decoder = load_decoder(folder, torch.bfloat16)
    cache = PagedCache(decoder.config, 2, 4, torch.bfloat16, torch.device("cpu"))
    assert report["bytes_per_token"] == cache.bytes_per_token
    assert report["kind"] == ("latent" if family == "deepseek_v3" else "grouped queries")


def test_a_latent_is_held_against_grouped_queries(make_folder: Make) -> None:
    cache = inspect(make_folder())["cache"]
    assert cache["bytes_per_token"] == 3 * (32 + 16) * 2
    assert (cache["gqa_key_value_heads"], cache["gqa_bytes_per_token"]) == (1, 3 * (16 + 24) * 2)
    assert cache["ratio_to_gqa"] == 48 / 40
    assert cache["larger_than_gqa"]
    assert cache["refused"] is None
    text = inspection_text(inspect(make_folder(name="wide", kv_lora_rank=400)))
    assert "LARGER than" in text
    assert "training refuses it: kv_lora_rank 400" in text
    small = inspect(make_folder(name="small", kv_lora_rank=16, qk_rope_head_dim=8))
    assert not small["cache"]["larger_than_gqa"]


def test_the_text_matches_the_numbers(make_folder: Make) -> None:
    report = inspect(make_folder())
    text = inspection_text(report)
    assert "deepseek_v3, 3 layers" in text
    assert "288 bytes a token in bf16, latent" in text
    for trap in report["traps"]:
        assert trap["what"] in text
    assert [trap["number"] for trap in report["not_visible"]] == [11]
    assert "not visible in a folder:\n  11 " in text
    dense = inspect(make_folder("llama", name="plain"))
    assert dense["not_visible"] == []  # it has no router
    plain = inspection_text(dense)
    assert "not visible" not in plain
    assert "router" not in plain
    assert "falls into 0 of 15" in plain
    assert "2 key-value heads" in plain


def test_work_and_memory_are_consistent(make_folder: Make) -> None:
    report = inspect(make_folder())
    work, room = report["flops_per_token"], report["memory_bytes"]
    assert work["context"] == room["context"] == 256, "the model's own positions, below 4096"
    assert 0 < work["forward"] < work["train"]
    assert room["serve"]["total"] == sum(v for k, v in room["serve"].items() if k != "total")
    assert room["serve"]["total"] < room["train"]["total"]
    assert report["disk_bytes"] > report["parameters"]["total"] * 4


# ---- bad folders ----


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"n_group": 8, "topk_group": 4}, "n_group"),
        ({"n_group": 3}, "n_group (3) must divide"),
        ({"topk_group": 5}, "topk_group"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim"),
        ({"rope_interleave": False}, "trap 5"),
        ({"num_key_value_heads": 2}, "trap 7"),
        ({"attention_bias": True}, "trap 8"),
        ({"model_type": "mamba"}, "'mamba'"),
    ],
)
def test_a_network_that_cannot_be(changed: dict[str, Any], named: str, make_folder: Make) -> None:
    folder = change(make_folder(), **changed)
    message = said(lambda: inspect(folder))
    assert named in message
    assert str(folder) in message


def test_a_folder_that_is_damaged(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("llama")
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "model.safetensors is cut short" in said(lambda: inspect(folder))
    shard.unlink()
    assert "holds no model.safetensors" in said(lambda: inspect(folder))
    assert "is not a folder" in said(lambda: inspect(tmp_path / "nothing"))
