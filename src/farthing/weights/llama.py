"""Llama's folder layout (`LlamaForCausalLM`): Llama 2 and 3.x, Yi, SmolLM2, and Mistral without a sliding window.

A layout answers two questions: which `ModelConfig` does a config.json mean, and which tensors on disk make up each
parameter of the `Decoder` (several where ours is fused, in the order of its rows).
"""

from __future__ import annotations

import math
from typing import Any

from farthing.base.errors import UserError
from farthing.model import ModelConfig, Rope
from farthing.model.rotary import KINDS

MODEL_TYPES = ("llama", "mistral")


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """The network a Llama-like config.json describes.

    Raises:
        UserError: for an unsupported setting that would change the result (sliding windows, other activations).
    """
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported; only silu is")
    if hf.get("sliding_window") and hf.get("use_sliding_window", True):
        raise UserError(
            "config.json: sliding_window attention is not supported; use a model that attends to its whole context"
        )
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(
        **common_fields(hf), qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False))
    )


def common_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields that every family of this shape writes under the same keys.

    Raises:
        UserError: when a key is missing.
    """
    try:
        heads = hf["num_attention_heads"]
        return {
            "vocab_size": hf["vocab_size"],
            "hidden_size": hf["hidden_size"],
            "intermediate_size": hf["intermediate_size"],
            "num_layers": hf["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": hf.get("num_key_value_heads") or heads,
            "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
            "rms_eps": hf.get("rms_norm_eps", 1e-6),
            "rope": rope(hf),
            "max_positions": hf.get("max_position_embeddings", 2048),
            "tied_head": bool(hf.get("tie_word_embeddings", False)),
        }
    except KeyError as error:
        raise UserError(f"config.json has no {error.args[0]!r}; download the model's folder again") from error


def rope(hf: dict[str, Any]) -> Rope:
    """Rotary settings, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4 and before).

    Raises:
        UserError: for an unsupported scaling.
    """
    new = hf.get("rope_parameters") or {}
    old = hf.get("rope_scaling") or {}
    settings = {"rope_theta": hf.get("rope_theta", 10_000.0), **old, **new}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in KINDS:
        raise UserError(
            f"config.json: rope scaling {kind!r} is not supported; supported are {', '.join(KINDS)}"
        )
    if settings.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not supported; only whole heads are rotated")
    factor = float(settings.get("factor", 1.0))
    table_scale, score_scale = _yarn_scales(settings, factor) if kind == "yarn" else (1.0, 1.0)
    return Rope(
        theta=float(settings["rope_theta"]),
        kind=kind,
        factor=factor,
        low_freq_factor=float(settings.get("low_freq_factor", 1.0)),
        high_freq_factor=float(settings.get("high_freq_factor", 4.0)),
        original_max_positions=int(settings.get("original_max_position_embeddings") or 8192),
        beta_fast=float(settings.get("beta_fast") or 32.0),
        beta_slow=float(settings.get("beta_slow") or 1.0),
        table_scale=table_scale,
        score_scale=score_scale if hf.get("kv_lora_rank") else 1.0,
    )


def _yarn_scales(settings: dict[str, Any], factor: float) -> tuple[float, float]:
    """YaRN's factor for the tables and, in DeepSeek's attention, for the scores (arXiv:2309.00071 eq. 15;
    DeepSeek-V2, arXiv:2405.04434 section 3.1.4)."""

    def m(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = settings.get("mscale"), settings.get("mscale_all_dim")
    given = settings.get("attention_factor")
    tables = float(given) if given else m(over) / m(under) if over and under else m(1.0)
    return tables, m(under) ** 2 if under else 1.0


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    table = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not config.tied_head:
        table["head.weight"] = ["lm_head.weight"]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table[f"{ours}.attention_norm.weight"] = [f"{theirs}.input_layernorm.weight"]
        table[f"{ours}.feedforward_norm.weight"] = [f"{theirs}.post_attention_layernorm.weight"]
        for leaf, wanted in (("weight", True), ("bias", config.qkv_bias)):
            if wanted:
                table[f"{ours}.attention.qkv.{leaf}"] = [f"{theirs}.self_attn.{p}_proj.{leaf}" for p in "qkv"]
        for leaf, wanted in (("weight", True), ("bias", config.o_bias)):
            if wanted:
                table[f"{ours}.attention.o.{leaf}"] = [f"{theirs}.self_attn.o_proj.{leaf}"]
        for leaf, wanted in (("weight", True), ("bias", config.mlp_bias)):
            if wanted:
                table[f"{ours}.feedforward.gate_up.{leaf}"] = [
                    f"{theirs}.mlp.{p}_proj.{leaf}" for p in ("gate", "up")
                ]
                table[f"{ours}.feedforward.down.{leaf}"] = [f"{theirs}.mlp.down_proj.{leaf}"]
        if config.qk_norm:
            table[f"{ours}.attention.q_norm.weight"] = [f"{theirs}.self_attn.q_norm.weight"]
            table[f"{ours}.attention.k_norm.weight"] = [f"{theirs}.self_attn.k_norm.weight"]
    return table
