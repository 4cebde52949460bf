"""Qwen2, Qwen2.5 and Qwen3's folder layout: Llama's names, with biases on q, k, v (2, 2.5) or norms on q and k (3)."""

from __future__ import annotations

from typing import Any

from farthing.base.errors import UserError
from farthing.model import ModelConfig
from farthing.weights.llama import common_fields, tensors

MODEL_TYPES = ("qwen2", "qwen3")

__all__ = ["MODEL_TYPES", "model_config", "tensors"]


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """The network a Qwen config.json describes.

    Raises:
        UserError: for sliding windows and activations that are not built.
    """
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported; only silu is")
    if hf.get("use_sliding_window", False):
        raise UserError("config.json: use_sliding_window is not supported; use a model without it")
    fields = common_fields(hf)
    if hf["model_type"] == "qwen2":
        return ModelConfig(**fields, qkv_bias=True)
    # Qwen3 states its head width apart from the model width; without the key transformers assumes 128.
    fields["head_dim"] = hf.get("head_dim") or 128
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(**fields, qkv_bias=bias, o_bias=bias, qk_norm=True)
