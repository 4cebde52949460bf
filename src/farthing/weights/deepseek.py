"""DeepSeek's folder layout (`DeepseekV3ForCausalLM`, `DeepseekV2ForCausalLM`): V2, V2-Lite, V3, R1, Moonlight.

On disk every expert is a tensor of its own, the rotated rows are neighbouring pairs (here they are two halves, which
rotates faster; `row_order` translates), and a prediction module is a layer after the last one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farthing.base.errors import UserError
from farthing.model import Mla, ModelConfig, Moe
from farthing.weights.llama import SHARED_DEFAULTS, common_fields
from farthing.weights.settings import Settings, rope_key
from farthing.weights.windows import refuse_windows

MODEL_TYPES = ("deepseek_v3", "deepseek_v2")
_DEFAULTS: dict[str, Any] = {
    **SHARED_DEFAULTS,
    "q_lora_rank": 1536,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
DEFAULTS = {
    "deepseek_v3": {
        **_DEFAULTS,
        "max_position_embeddings": 4096,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "deepseek_v2": {
        **_DEFAULTS,
        "max_position_embeddings": 2048,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "n_group": None,
        "topk_group": None,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "topk_method": "greedy",
        "scoring_func": "softmax",
    },
}
_BUILT = ("n_routed_experts", "num_experts", "num_local_experts")


def model_config(settings: Settings) -> ModelConfig:
    """The network a DeepSeek config.json describes.

    Raises:
        UserError: for a value that no network has, or a setting that is not built and would change the result.
    """
    version3 = settings["model_type"] == "deepseek_v3"
    settings.refuse_unbuilt(*_BUILT)
    refuse_windows(settings)
    settings.whole_or("head_dim", 1)
    if settings.flag("attention_bias") or ("mlp_bias" in settings and settings.flag("mlp_bias")):
        key = "attention_bias" if settings["attention_bias"] else "mlp_bias"
        raise UserError(
            f"config.json: {key} is not supported in latent attention, nor does vLLM serve it; merge or drop "
            "the biases first"
        )
    if not settings.flag("rope_interleave"):
        raise UserError(
            "config.json: rope_interleave false is read by no other engine; permute the rotated rows first"
        )
    if settings.whole("moe_layer_freq") != 1:
        raise UserError(
            f"config.json: moe_layer_freq {settings['moe_layer_freq']!r} is not supported; only 1 is"
        )
    if not version3 and settings.flag("norm_topk_prob"):
        raise UserError(
            "config.json: norm_topk_prob true is ignored by transformers in deepseek_v2 and obeyed by others; set it "
            "to false, or write the model as deepseek_v3"
        )
    heads = settings.whole("num_attention_heads")
    mla = Mla(
        q_lora_rank=None if settings["q_lora_rank"] is None else settings.whole("q_lora_rank"),
        kv_lora_rank=settings.whole("kv_lora_rank"),
        nope_dim=settings.whole("qk_nope_head_dim"),
        rope_dim=settings.whole("qk_rope_head_dim"),
        v_dim=settings.whole("v_head_dim"),
    )
    if settings.whole_or("num_key_value_heads", heads) != heads:
        raise UserError(
            f"config.json: num_key_value_heads ({settings['num_key_value_heads']}) must equal num_attention_heads "
            f"({heads}) in latent attention"
        )
    # num_nextn_predict_layers is DeepSeek's key, num_mtp_layers transformers' own; without either there is no module
    key = "num_nextn_predict_layers" if "num_nextn_predict_layers" in settings else "num_mtp_layers"
    depth = settings.whole_or(key, 0, least=0) if version3 else 0
    if version3 and settings.get("head_dim", mla.rope_dim) != mla.rope_dim:
        raise UserError(
            f"config.json: head_dim ({settings['head_dim']!r}) must equal qk_rope_head_dim ({mla.rope_dim}), or be "
            "left out: transformers rotates that many elements in a deepseek_v3"
        )
    fields = common_fields(settings.over(head_dim=mla.qk_dim))
    moe = gate(settings) if settings.whole_or("n_routed_experts", 0, least=0) else None
    return ModelConfig(**fields, mla=mla, moe=moe, mtp_depth=depth)


def gate(settings: Settings) -> Moe:
    """The mixture of experts under DeepSeek's keys.

    Raises:
        UserError: for a value that no network has, or an unknown way to choose experts.
    """
    # each family has one function of scores in transformers, whatever the config says
    scoring = settings.choice(
        "scoring_func", "softmax" if settings["model_type"] == "deepseek_v2" else "sigmoid"
    )
    method = settings.choice("topk_method", "noaux_tc", "group_limited_greedy", "greedy")
    grouped = method != "greedy"
    return Moe(
        experts=settings.whole("n_routed_experts"),
        top_k=settings.whole("num_experts_per_tok"),
        expert_size=settings.whole("moe_intermediate_size"),
        shared=settings.whole_or("n_shared_experts", 0, least=0),
        groups=settings.whole_or("n_group", 1) if grouped else 1,
        top_groups=settings.whole_or("topk_group", 1) if grouped else 1,
        scoring=scoring,
        normalise=settings.flag("norm_topk_prob"),
        scale=settings.number("routed_scaling_factor"),
        bias=method == "noaux_tc",
        first_dense=settings.whole_or("first_k_dense_replace", 0, least=0),
    )


def complete(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The config.json to write: with the keys that vLLM and llama.cpp read and transformers leaves out, rotary settings
    in both spellings, and the prediction modules that are there."""
    out = dict(hf)
    out["num_key_value_heads"] = config.num_heads
    if config.moe:
        out["scoring_func"] = config.moe.scoring
        limited = "group_limited_greedy" if config.moe.groups > 1 else "greedy"
        out["topk_method"] = "noaux_tc" if config.moe.bias else limited
        out["moe_layer_freq"] = 1
    if out["model_type"] == "deepseek_v3":
        out["num_nextn_predict_layers"] = config.mtp_depth
        out.pop("num_mtp_layers", None)
    return out | rope_keys(hf)


def rope_keys(hf: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings in both spellings: what transformers 5 reads, and what was read before it."""
    settings = dict(hf.get(rope_key(hf)) or {})
    kind = settings.pop("rope_type", None) or settings.pop("type", None) or "default"
    settings.pop("type", None)
    theta = settings.pop("rope_theta", hf.get("rope_theta", 10_000.0))
    return {
        "rope_theta": theta,
        "rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings},
        "rope_scaling": None if kind == "default" else {"type": kind, "rope_type": kind, **settings},
    }


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    table = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not config.tied_head:
        table["head.weight"] = ["lm_head.weight"]
    for i in range(config.num_layers):
        table |= _layer(config, i, f"layers.{i}", f"model.layers.{i}")
    for depth in range(config.mtp_depth):
        number = config.num_layers + depth
        ours, theirs = f"mtp.{depth}", f"model.layers.{number}"
        table[f"{ours}.embedding_norm.weight"] = [f"{theirs}.enorm.weight"]
        table[f"{ours}.hidden_norm.weight"] = [f"{theirs}.hnorm.weight"]
        table[f"{ours}.join.weight"] = [f"{theirs}.eh_proj.weight"]
        table[f"{ours}.norm.weight"] = [f"{theirs}.shared_head.norm.weight"]
        table |= _layer(config, number, f"{ours}.layer", theirs)
    return table


def _layer(config: ModelConfig, number: int, ours: str, theirs: str) -> dict[str, list[str]]:
    assert config.mla is not None
    attention = f"{theirs}.self_attn"
    first = "q_a_proj" if config.mla.q_lora_rank else "q_proj"
    table = {
        f"{ours}.attention_norm.weight": [f"{theirs}.input_layernorm.weight"],
        f"{ours}.feedforward_norm.weight": [f"{theirs}.post_attention_layernorm.weight"],
        f"{ours}.attention.qkv_a.weight": [
            f"{attention}.{first}.weight",
            f"{attention}.kv_a_proj_with_mqa.weight",
        ],
        f"{ours}.attention.kv_norm.weight": [f"{attention}.kv_a_layernorm.weight"],
        f"{ours}.attention.kv_b.weight": [f"{attention}.kv_b_proj.weight"],
        f"{ours}.attention.o.weight": [f"{attention}.o_proj.weight"],
    }
    if config.mla.q_lora_rank:
        table[f"{ours}.attention.q_norm.weight"] = [f"{attention}.q_a_layernorm.weight"]
        table[f"{ours}.attention.q_b.weight"] = [f"{attention}.q_b_proj.weight"]
    return table | feedforward(config, number, ours, theirs)


def feedforward(config: ModelConfig, number: int, ours: str, theirs: str) -> dict[str, list[str]]:
    """A layer's dense or mixed feed-forward half; other families write a mixture of experts the same way."""
    ours, theirs = f"{ours}.feedforward", f"{theirs}.mlp"
    moe = config.moe
    if moe is None or not config.is_moe(number):
        return _swiglu(ours, theirs)
    table = {
        f"{ours}.router.weight": [f"{theirs}.gate.weight"],
        f"{ours}.experts.gate_up": [
            f"{theirs}.experts.{e}.{half}_proj.weight" for e in range(moe.experts) for half in ("gate", "up")
        ],
        f"{ours}.experts.down": [f"{theirs}.experts.{e}.down_proj.weight" for e in range(moe.experts)],
    }
    if moe.bias:
        table[f"{ours}.router.bias"] = [f"{theirs}.gate.e_score_correction_bias"]
    return table | (_swiglu(f"{ours}.shared", f"{theirs}.shared_experts") if moe.shared else {})


def _swiglu(ours: str, theirs: str) -> dict[str, list[str]]:
    return {
        f"{ours}.gate_up.weight": [f"{theirs}.{half}_proj.weight" for half in ("gate", "up")],
        f"{ours}.down.weight": [f"{theirs}.down_proj.weight"],
    }


def copies(config: ModelConfig) -> dict[str, str]:
    """Tensors on disk that repeat another one: each prediction module carries the embedding and the head."""
    head = "model.embed_tokens.weight" if config.tied_head else "lm_head.weight"
    out = {}
    for depth in range(config.mtp_depth):
        theirs = f"model.layers.{config.num_layers + depth}"
        out[f"{theirs}.embed_tokens.weight"] = "model.embed_tokens.weight"
        out[f"{theirs}.shared_head.head.weight"] = head
    return out


def row_order(config: ModelConfig, theirs: str) -> Tensor | None:
    """For each row of a tensor here, its row on disk; None if the order is the same."""
    mla = config.mla
    assert mla is not None
    halves = torch.arange(mla.rope_dim).view(-1, 2).t().flatten()
    if theirs.endswith("kv_a_proj_with_mqa.weight"):
        return torch.cat([torch.arange(mla.kv_lora_rank), mla.kv_lora_rank + halves])
    if theirs.endswith(("q_proj.weight", "q_b_proj.weight")):
        head = torch.cat([torch.arange(mla.nope_dim), mla.nope_dim + halves])
        return (torch.arange(config.num_heads)[:, None] * mla.qk_dim + head).flatten()
    return None
