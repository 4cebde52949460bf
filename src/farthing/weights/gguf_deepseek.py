"""DeepSeek's models in a .gguf (`deepseek2`), out and in: the absorbed form of latent attention, and stacked experts.

Going in, what llama.cpp computes decides: a file without a way to score experts is DeepSeek-V2 (softmax), one with
sigmoid scores and their correction is V3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from farthing.model import ModelConfig

_SOFTMAX, _SIGMOID = 1, 2  # llama.cpp's numbers
NUMBERS = {
    "attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
    "leading_dense_block_count", "expert_count", "expert_used_count", "expert_shared_count",
    "expert_feed_forward_length", "expert_group_count", "expert_group_used_count", "expert_weights_scale",
    "expert_gating_func", "rope.scaling.yarn_log_multiplier",
}  # fmt: skip
MAY_BE_ZERO = {"attention.q_lora_rank", "leading_dense_block_count"}


@dataclass(frozen=True)
class Planned:
    """A tensor of the .gguf: its shape, and the folder's tensors it is stacked from, each turned by `turn`."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shape: tuple[int, ...]
    turn: Callable[[Tensor], Tensor] | None = None


def latent_sizes(config: ModelConfig) -> dict[str, Any]:
    """Keys of `deepseek2` alone; empty for another architecture.

    Raises:
        UserError: for a setting that llama.cpp cannot express.
    """
    mla, moe = config.mla, config.moe
    if mla is None:
        return {}
    if moe is None or moe.shared < 1:
        raise UserError(
            "config.json: llama.cpp's deepseek2 needs routed and shared experts, and this model lacks them"
        )
    if moe.groups > 1 and not moe.bias:
        raise UserError(
            "config.json: llama.cpp ranks groups of experts by their best two, this model by the best one; a .gguf "
            "of it would choose other experts"
        )
    return {
        # always written: llama.cpp requires it unless it knows the model
        "attention.q_lora_rank": mla.q_lora_rank or 0,
        "attention.kv_lora_rank": mla.kv_lora_rank,
        "attention.key_length_mla": mla.qk_dim,
        "attention.value_length_mla": mla.v_dim,
        "leading_dense_block_count": moe.first_dense,
        "expert_count": moe.experts,
        "expert_used_count": moe.top_k,
        "expert_shared_count": moe.shared,
        "expert_feed_forward_length": moe.expert_size,
        "expert_group_count": moe.groups,
        "expert_group_used_count": moe.top_groups,
        "expert_weights_scale": moe.scale,
        "expert_weights_norm": moe.normalise,
        "expert_gating_func": {"softmax": 1, "sigmoid": 2}[moe.scoring],
    }


def latent_tensors(config: ModelConfig) -> Iterator[Planned]:
    """DeepSeek's tensors: kv_b split in two for absorbed attention, each layer's experts stacked."""
    mla, moe, width = config.mla, config.moe, config.hidden_size
    assert mla is not None
    assert moe is not None
    heads, rank = config.num_heads, mla.kv_lora_rank

    def same(name: str, source: str, *shape: int) -> Planned:
        return Planned(name, shape, (source,), shape)

    def swiglu(block: str, layer: str, suffix: str, inner: int, experts: int = 0) -> Iterator[Planned]:
        for part in ("gate", "up", "down"):
            shape = (width, inner) if part == "down" else (inner, width)
            sources = [f"{layer}.{part}_proj.weight"]
            if experts:
                sources = [f"{layer}.{number}.{part}_proj.weight" for number in range(experts)]
            whole = (experts, *shape) if experts else shape
            yield Planned(f"{block}.ffn_{part}{suffix}.weight", whole, tuple(sources), shape)

    def keys(kv_b: Tensor) -> Tensor:  # [H * (P + E), L] -> [H, L, P]: a head's key projection, transposed
        return kv_b.view(heads, -1, rank)[:, : mla.nope_dim].transpose(1, 2)

    def values(kv_b: Tensor) -> Tensor:  # [H * (P + E), L] -> [H, E, L]
        return kv_b.view(heads, -1, rank)[:, mla.nope_dim :]

    yield same("token_embd.weight", "model.embed_tokens.weight", config.vocab_size, width)
    yield same("output_norm.weight", "model.norm.weight", width)
    if not config.tied_head:
        yield same("output.weight", "lm_head.weight", config.vocab_size, width)
    for number in range(config.num_layers):
        block, layer = f"blk.{number}", f"model.layers.{number}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        yield same(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight", width)
        queries = heads * mla.qk_dim
        if mla.q_lora_rank:
            yield same(f"{block}.attn_q_a.weight", f"{attention}.q_a_proj.weight", mla.q_lora_rank, width)
            yield same(f"{block}.attn_q_a_norm.weight", f"{attention}.q_a_layernorm.weight", mla.q_lora_rank)
            yield same(f"{block}.attn_q_b.weight", f"{attention}.q_b_proj.weight", queries, mla.q_lora_rank)
        else:
            yield same(f"{block}.attn_q.weight", f"{attention}.q_proj.weight", queries, width)
        latent = f"{attention}.kv_a_proj_with_mqa.weight"
        yield same(f"{block}.attn_kv_a_mqa.weight", latent, mla.cache_dim, width)
        yield same(f"{block}.attn_kv_a_norm.weight", f"{attention}.kv_a_layernorm.weight", rank)
        up, up_shape = (f"{attention}.kv_b_proj.weight",), (heads * (mla.nope_dim + mla.v_dim), rank)
        yield Planned(f"{block}.attn_k_b.weight", (heads, rank, mla.nope_dim), up, up_shape, keys)
        yield Planned(f"{block}.attn_v_b.weight", (heads, mla.v_dim, rank), up, up_shape, values)
        yield same(f"{block}.attn_output.weight", f"{attention}.o_proj.weight", width, heads * mla.v_dim)
        yield same(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", width)
        if not config.is_moe(number):
            yield from swiglu(block, mlp, "", config.intermediate_size)
            continue
        yield same(f"{block}.ffn_gate_inp.weight", f"{mlp}.gate.weight", moe.experts, width)
        if moe.bias:
            yield same(f"{block}.exp_probs_b.bias", f"{mlp}.gate.e_score_correction_bias", moe.experts)
        yield from swiglu(block, f"{mlp}.experts", "_exps", moe.expert_size, moe.experts)
        yield from swiglu(block, f"{mlp}.shared_experts", "_shexp", moe.shared * moe.expert_size)


# ---- into a folder ----


def latent_config(given: Mapping[str, Any], names: Mapping[str, object]) -> dict[str, Any]:
    """What a DeepSeek config.json has beyond the Llama family's keys.

    Args:
        given: the file's keys without the architecture's name.
        names: of the file's tensors.

    Raises:
        UserError: for a file that is neither V2 nor V3, or lacks a size.
    """

    def size(*keys: str) -> int:
        for key in keys:
            if key in given:
                return int(given[key])
        raise UserError(f"its metadata lacks deepseek2.{keys[0]}; convert the model again")

    gating, groups = given.get("expert_gating_func", _SOFTMAX), int(given.get("expert_group_count", 1))
    corrected = any(name.endswith("exp_probs_b.bias") for name in names)
    if (
        gating not in (_SOFTMAX, _SIGMOID)
        or corrected != (gating == _SIGMOID)
        or (gating == _SOFTMAX and groups > 1)
    ):
        raise UserError(
            "it chooses its experts neither as DeepSeek-V2-Lite (softmax, one group) nor as V3 (sigmoid with a "
            "correction)"
        )
    version3 = gating == _SIGMOID
    rotary = size("rope.dimension_count")
    return {
        "architectures": ["DeepseekV3ForCausalLM" if version3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if version3 else "deepseek_v2",
        "num_key_value_heads": size("attention.head_count"),
        "q_lora_rank": int(given.get("attention.q_lora_rank", 0)) or None,
        "kv_lora_rank": size("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": size("attention.key_length_mla", "attention.key_length") - rotary,
        "v_head_dim": size("attention.value_length_mla", "attention.value_length"),
        "n_routed_experts": size("expert_count"),
        "n_shared_experts": size("expert_shared_count"),
        "num_experts_per_tok": size("expert_used_count"),
        "moe_intermediate_size": size("expert_feed_forward_length"),
        "first_k_dense_replace": size("leading_dense_block_count"),
        "n_group": groups,
        "topk_group": int(given.get("expert_group_used_count", 1)),
        "norm_topk_prob": bool(given.get("expert_weights_norm", False)),
        "routed_scaling_factor": float(given.get("expert_weights_scale", 1.0)),
        "scoring_func": "sigmoid" if version3 else "softmax",
        "topk_method": "noaux_tc" if version3 else "greedy",
        "moe_layer_freq": 1,
        **({"num_nextn_predict_layers": 0} if version3 else {}),
    }


def unstacked(
    config: ModelConfig, whole: Callable[[str], Tensor], part: Callable[[str, int], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the folder, one at a time.

    Args:
        whole: a tensor of the file by name, expanded.
        part: one of the matrices stacked in it, by its number.
    """
    import torch

    for planned in latent_tensors(config):
        if planned.turn is not None:
            if planned.name.endswith("attn_k_b.weight"):
                keys = whole(planned.name).transpose(1, 2)  # [H, L, P] -> [H, P, L]
                values = whole(planned.name.replace("attn_k_b", "attn_v_b"))  # [H, E, L]
                yield planned.sources[0], torch.cat([keys, values], dim=1).flatten(0, 1)
        elif len(planned.sources) == 1 and planned.shape == planned.source_shape:
            yield planned.sources[0], whole(planned.name)
        else:
            for number, source in enumerate(planned.sources):
                yield source, part(planned.name, number)
