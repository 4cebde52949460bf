"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE's folder layout: Llama's names, with biases on q, k, v (2, 2.5) or norms on q
and k (3), and experts instead of the feed-forward half (3-MoE)."""

from __future__ import annotations

from typing import Any

from farthing.base.errors import UserError
from farthing.model import ModelConfig, Moe
from farthing.weights import llama
from farthing.weights.deepseek import feedforward
from farthing.weights.llama import SHARED_DEFAULTS, common_fields
from farthing.weights.settings import Settings
from farthing.weights.windows import windows_by_layer, windows_everywhere

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe")
_DEFAULTS: dict[str, Any] = {
    **SHARED_DEFAULTS,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS = {
    "qwen2": _DEFAULTS,
    "qwen3": {**_DEFAULTS, "head_dim": 128},
    "qwen3_moe": {
        **{key: value for key, value in _DEFAULTS.items() if key != "max_window_layers"},
        "num_key_value_heads": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
    },
}


def model_config(settings: Settings) -> ModelConfig:
    """The network a Qwen config.json describes.

    Raises:
        UserError: for a value that no network has, or a setting that is not built and would change the result.
    """
    mixed = settings["model_type"] == "qwen3_moe"
    settings.refuse_unbuilt(*(("num_experts", "num_local_experts") if mixed else ()))
    slides = settings.flag("use_sliding_window")
    if mixed:
        windows = windows_everywhere(settings, slides)
    else:
        # without a window no layer slides, wherever max_window_layers would let it begin
        slides = slides and settings.whole_or("sliding_window", 0) > 0
        first = settings.whole("max_window_layers", least=0)
        windows = windows_by_layer(settings, lambda layer: slides and layer >= first, slides)
    if settings["model_type"] == "qwen2":
        return ModelConfig(**common_fields(settings), **windows, qkv_bias=True)
    bias = settings.flag("attention_bias")
    if not mixed:
        settings.whole("head_dim")  # null is a mistake here, though not in other families
    moe = _mixture(settings) if mixed else None
    return ModelConfig(
        **common_fields(settings), **windows, qkv_bias=bias, o_bias=bias, qk_norm="head", moe=moe
    )


def _mixture(settings: Settings) -> Moe:
    if settings.whole("decoder_sparse_step") != 1:
        raise UserError(
            f"config.json: decoder_sparse_step {settings['decoder_sparse_step']} is not supported; only 1 is, with "
            "experts in every layer"
        )
    return Moe(
        experts=settings.whole("num_local_experts" if "num_local_experts" in settings else "num_experts"),
        top_k=settings.whole("num_experts_per_tok"),
        expert_size=settings.whole("moe_intermediate_size"),
        shared=0,
        scoring="softmax",
        normalise=settings.flag("norm_topk_prob"),
        bias=False,
    )


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    if config.moe is None:
        return llama.tensors(config)
    table = {name: theirs for name, theirs in llama.tensors(config).items() if ".feedforward." not in name}
    for i in range(config.num_layers):
        table |= feedforward(config, i, f"layers.{i}", f"model.layers.{i}")
    return table
