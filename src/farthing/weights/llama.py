"""Llama's folder layout (`LlamaForCausalLM`): Llama 2 and 3.x, Yi, SmolLM2, and Mistral.

A layout answers two questions: which `ModelConfig` does a config.json mean, and which tensors on disk make up each
parameter of the `Decoder` (several where ours is fused, in the order of its rows). `DEFAULTS` are the values that
transformers takes for keys that a config.json leaves out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from farthing.base.errors import UserError
from farthing.model import ModelConfig, Rope
from farthing.weights.settings import Settings, rope_settings, yarn_scales
from farthing.weights.windows import refuse_windows, windows_everywhere

MODEL_TYPES = ("llama", "mistral")
SHARED_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**SHARED_DEFAULTS, "max_position_embeddings": 2048, "mlp_bias": False},
    "mistral": {
        **SHARED_DEFAULTS,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}

_NORMS = {
    "before": {"attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"},
    "after": {
        "attention_out_norm": "post_attention_layernorm",
        "feedforward_out_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "feedforward_norm": "pre_feedforward_layernorm",
        "feedforward_out_norm": "post_feedforward_layernorm",
    },
}


def model_config(settings: Settings) -> ModelConfig:
    """The network a Llama-like config.json describes. Mistral has no biases, whatever its config says.

    Raises:
        UserError: for a value that no network has, or a setting that is not built and would change the result.
    """
    settings.refuse_unbuilt()
    llama = settings["model_type"] == "llama"
    bias = llama and settings.flag("attention_bias")
    mlp_bias = llama and settings.flag("mlp_bias")
    fields = common_fields(settings)
    if llama and fields["hidden_size"] % fields["num_heads"]:
        raise UserError(
            f"config.json: num_attention_heads ({fields['num_heads']}) does not divide hidden_size "
            f"({fields['hidden_size']}), which transformers refuses in a llama"
        )
    if llama:
        refuse_windows(settings)
    else:
        fields |= windows_everywhere(settings)
    return ModelConfig(**fields, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def common_fields(settings: Settings) -> dict[str, Any]:
    """The fields that every family of this shape writes under the same keys.

    Raises:
        UserError: when a key is missing or holds no possible value.
    """
    settings.choice("hidden_act", "silu", "swish")
    heads, hidden = settings.whole("num_attention_heads"), settings.whole("hidden_size")
    head_dim = settings.whole_or("head_dim", max(1, hidden // heads))
    rotary = rope(settings, head_dim)
    return {
        "vocab_size": settings.whole("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": settings.whole("intermediate_size"),
        "num_layers": settings.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": settings.whole_or("num_key_value_heads", heads),
        "head_dim": head_dim,
        "rms_eps": settings.number("rms_norm_eps"),
        "rope": rotary,
        "max_positions": positions(settings, rotary),
        "tied_head": settings.flag("tie_word_embeddings"),
    }


def positions(settings: Settings, rotary: Rope) -> int:
    """The longest context that is computed as transformers computes it.

    YaRN reaches `factor` times the original positions, which Qwen's documentation sets without raising
    `max_position_embeddings`. Longrope has two sets of speeds, and transformers changes from one to the other in the
    middle of an answer: only contexts of the original length are well defined.

    Raises:
        UserError: for a value that is no length.
    """
    longest = settings.whole("max_position_embeddings")
    if rotary.kind == "yarn":
        longest = max(longest, int(rotary.factor * rotary.original_max_positions))
    return min(longest, rotary.original_max_positions) if rotary.kind == "longrope" else longest


def rope(settings: Settings, head_dim: int) -> Rope:
    """Rotary settings, for heads of a width.

    Raises:
        UserError: for an unsupported scaling, or one that lacks what transformers wants of it.
    """
    kind, found = rope_settings(settings)
    theta, share = found.number("rope_theta", above=1.0), found.number_or("partial_rotary_factor", 1.0)
    rotated = int(head_dim * share)
    if share > 1 or (share < 1 and (rotated < 2 or rotated % 2)):
        raise UserError(
            f"config.json: partial_rotary_factor {share:g} rotates {rotated} of a head's {head_dim} elements; it "
            "must be an even number of them"
        )
    if kind == "default":
        return Rope(theta=theta, share=share)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=found.number("factor"), share=share)
    original = found.whole("original_max_position_embeddings")
    if kind == "llama3":
        low, high = found.number("low_freq_factor"), found.number("high_freq_factor")
        if high <= low:
            raise UserError(
                f"config.json: high_freq_factor ({high:g}) of llama3 rope scaling must exceed low_freq_factor ({low:g})"
            )
        return Rope(
            theta=theta,
            kind=kind,
            factor=found.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_positions=original,
            share=share,
        )
    stated = found.get("factor") if kind == "longrope" or "factor" in found else found.number("factor")
    ratio = settings.whole("max_position_embeddings") / original
    factor = ratio if stated is None else found.number("factor")
    if kind == "longrope":
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
        found.numbers("long_factor", rotated // 2)
        return Rope(
            theta=theta,
            kind=kind,
            original_max_positions=original,
            divisors=found.numbers("short_factor", rotated // 2),
            share=share,
            table_scale=found.number_or("attention_factor", usual),
        )
    fast, slow = found.number_or("beta_fast", 32.0), found.number_or("beta_slow", 1.0)
    if fast < slow:
        raise UserError(
            f"config.json: beta_fast ({fast:g}) of yarn rope scaling must not be below beta_slow ({slow:g})"
        )
    table_scale, score_scale = yarn_scales(found, factor)
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_positions=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=found.flag("truncate") if "truncate" in found else True,
        table_scale=table_scale,
        score_scale=score_scale if settings.get("kv_lora_rank") else 1.0,
        share=share,
    )


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    table = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not config.tied_head:
        table["head.weight"] = ["lm_head.weight"]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for norm, name in _NORMS[config.norms].items():
            table[f"{ours}.{norm}.weight"] = [f"{theirs}.{name}.weight"]
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


def row_order(config: ModelConfig, theirs: str) -> Tensor | None:
    """For each row of a tensor here, its row on disk, where a part of each head rotates: on disk that comes first, here
    its halves begin the halves of the head. None if the order is the same."""
    head, rotated = config.head_dim, int(config.head_dim * config.rope.share)
    kind = theirs.rpartition(".")[0].rpartition(".")[2]
    rotating = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "q_norm": 1, "k_norm": 1}
    rotating["qkv_proj"] = config.num_heads + config.num_kv_heads
    if rotated == head or kind not in rotating:
        return None
    still = torch.arange(rotated, head).chunk(2)
    turning = torch.arange(rotated).chunk(2)
    order = torch.cat([turning[0], still[0], turning[1], still[1]])
    rows = (torch.arange(rotating[kind])[:, None] * head + order).flatten()
    if kind == "qkv_proj":
        rows = torch.cat([rows, torch.arange(len(rows), len(rows) + config.num_kv_heads * head)])
    return rows
