"""Qwen2, Qwen2.5 and Qwen3's folder layout: Llama's names, with biases on q, k, v (2, 2.5) or norms on q and k (3)."""

from __future__ import annotations

from typing import Any

from farthing.model import ModelConfig
from farthing.weights.llama import SHARED_DEFAULTS, common_fields, tensors
from farthing.weights.settings import Settings

MODEL_TYPES = ("qwen2", "qwen3")
_DEFAULTS: dict[str, Any] = {
    **SHARED_DEFAULTS,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS = {"qwen2": _DEFAULTS, "qwen3": {**_DEFAULTS, "head_dim": 128}}

__all__ = ["DEFAULTS", "MODEL_TYPES", "model_config", "tensors"]


def model_config(settings: Settings) -> ModelConfig:
    """The network a Qwen config.json describes.

    Raises:
        UserError: for a value that no network has, or a setting that is not built and would change the result.
    """
    settings.refuse_unbuilt()
    settings.flag("use_sliding_window")
    if settings["model_type"] == "qwen2":
        return ModelConfig(**common_fields(settings), qkv_bias=True)
    bias = settings.flag("attention_bias")
    settings.whole("head_dim")  # null is a mistake here, though not in other families
    return ModelConfig(**common_fields(settings), qkv_bias=bias, o_bias=bias, qk_norm=True)
