"""What a .gguf says of a network, and which tensors it holds under which names: the Llama family and `deepseek2`.

llama.cpp runs DeepSeek's attention in its absorbed form only, as one key-value head over the latents. So the latents'
widths stand where a head's would, `kv_b` is split into a transposed key part and a value part, and each layer's experts
are stacked (llama.cpp, src/models/deepseek2.cpp).

Legend: H heads, P width of a key without position, E of a value, L of the latent, R of what is rotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from farthing.errors import UserError
from farthing.model import ModelConfig, Rope
from farthing.model.rotary import frequencies
from farthing.weights.gguf import tensor_table

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A tensor of the .gguf: its shape, and the folder's tensors it is stacked from, each turned by `turn`."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shape: tuple[int, ...]
    turn: Callable[[Tensor], Tensor] | None = None


# ---- sizes ----


def sizes(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The file's keys under the architecture's name.

    Raises:
        UserError: for a setting that llama.cpp has no word for.
    """
    if config.o_bias or config.mlp_bias or config.qkv_bias != (architecture == "qwen2"):
        raise UserError(f"config.json: the biases it asks for are not part of llama.cpp's {architecture}")
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": 1 if config.mla else config.num_kv_heads,
        "attention.key_length": config.mla.cache_dim if config.mla else config.head_dim,
        "attention.value_length": config.mla.kv_lora_rank if config.mla else config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_eps),
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": config.rope.theta,
    }
    return keys | _stretching(config) | _latent_sizes(config)


def _stretching(config: ModelConfig) -> dict[str, Any]:
    """How positions are stretched; llama3's way becomes a tensor instead (`rope_divisors`)."""
    rope = config.rope
    if rope.kind in ("default", "llama3"):
        return {}
    keys: dict[str, Any] = {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    if rope.kind == "linear":
        return keys
    keys |= {
        "rope.scaling.original_context_length": rope.original_max_positions,
        "rope.scaling.yarn_beta_fast": rope.beta_fast,
        "rope.scaling.yarn_beta_slow": rope.beta_slow,
    }
    # llama.cpp multiplies cosine and sine by m(1) where scores are left alone, and by 1 where they get m squared.
    log_factor = math.log(max(rope.factor, 1.0))
    if config.mla:
        usual = 1.0
        mscale = (math.sqrt(rope.score_scale) - 1) / (0.1 * log_factor) if log_factor else 1.0
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * mscale  # [llama.cpp#17945] a tenth of mscale_all_dim
    else:
        usual = 1 + 0.1 * log_factor
    if not math.isclose(rope.table_scale, usual, rel_tol=1e-6):
        raise UserError(
            f"config.json: yarn that multiplies the rotation by {rope.table_scale:.4g} cannot be said in a .gguf, "
            f"only {usual:.4g}; mscale and mscale_all_dim must be equal"
        )
    return keys


def _latent_sizes(config: ModelConfig) -> dict[str, Any]:
    """What only `deepseek2` has."""
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
        "attention.q_lora_rank": mla.q_lora_rank
        or 0,  # always said: llama.cpp asks for it unless it knows the model
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


def rope_divisors(config: ModelConfig) -> np.ndarray[Any, Any] | None:
    """What each frequency is divided by, [R/2] float32: how a .gguf says llama3's stretching."""
    if config.rope.kind != "llama3":
        return None
    plain = frequencies(Rope(theta=config.rope.theta), config.rotary_dim)
    divisors: np.ndarray[Any, Any] = (plain / frequencies(config.rope, config.rotary_dim)).numpy()
    return divisors.astype(np.float32)


# ---- tensors ----


def tensors(config: ModelConfig, architecture: str) -> list[Planned]:
    """The file's tensors in order, `rope_divisors` apart."""
    return list(_latent_tensors(config) if config.mla else _plain_tensors(config, architecture))


def _plain_tensors(config: ModelConfig, architecture: str) -> Iterator[Planned]:
    """The Llama family's tensors; llama.cpp's llama rotates neighbouring rows of q and k, the Qwens as we do."""
    fields = {
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim, "num_attention_heads": config.num_heads, "vocab_size": config.vocab_size,
        "num_key_value_heads": config.num_kv_heads, "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": config.tied_head,
    }  # fmt: skip
    for name, (source, shape) in tensor_table(fields, architecture).items():
        turn = None
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_heads if "attn_q" in name else config.num_kv_heads
            turn = _neighbours(heads)
        yield Planned(name, shape, (source,), shape, turn)


def _neighbours(heads: int) -> Callable[[Tensor], Tensor]:
    """Undoes `gguf.halves`: the rows of each head in the order 0, R/2, 1, R/2 + 1 and so on."""

    def turn(rows: Tensor) -> Tensor:
        per_head = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return per_head.transpose(1, 2).reshape(rows.shape)

    return turn


def _latent_tensors(config: ModelConfig) -> Iterator[Planned]:
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
