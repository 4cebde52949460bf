"""Differences between families of open models that matter in counting parameters and FLOPs.

Read off the models of the `transformers` library, release 5.23; the tests build each family there and compare
the number of parameters, which must agree to the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Flag = bool | tuple[str, bool]  # a fact of the family, or (key of the config that decides, its default)


@dataclass(frozen=True)
class Family:
    """Facts that a family fixes and its config does not state. The defaults are Llama's."""

    matrices: int = 3
    """Of a feed-forward block: 3 gated (SwiGLU), 2 plain."""
    norm: int = 1
    """Parameters of a norm for each channel: 1 RMSNorm or LayerNorm without bias, 2 LayerNorm, 0 none."""
    norms: int = 2
    """Norms of a layer."""
    qkv_bias: Flag = False
    o_bias: Flag = False
    mlp_bias: Flag = False
    head_bias: bool = False
    qk_norm: Literal["", "head", "all"] = ""
    """Norms of queries and keys: one of head size each, or one over all heads each."""
    qk_norm_if: str = ""
    """The key that switches them on, where there is one."""
    tied: bool = False
    """Default for sharing the embedding's matrix with the head, if the config does not say."""
    positions: int | None = None
    """Rows that a learned table of positions has beyond the longest context; None without such a table."""
    embedding_norm: bool = False
    head_size: int | None = None
    """The default of head_dim where it is not d / h."""
    wide: int | None = None
    """f / d where the config leaves f out."""
    kv: Literal["", "falcon", "bigcode"] = ""
    """The family's own rule for the number of key/value heads; else the config's, or h."""
    attention: Literal["", "mla", "moa"] = ""
    """Grouped queries, multi-head latent attention, or JetMoE's mixture of attention heads."""
    experts: Literal["", "deepseek", "qwen", "all"] = ""
    """Which layers are mixtures: those after `first_k_dense_replace`; by `decoder_sparse_step`; all."""
    expert_size: str = "moe_intermediate_size"
    """The key of an expert's f."""
    oss: bool = False
    """gpt-oss's additions: a sink for each head, biases in the router and in experts."""
    window: int | None = None
    """The window of sliding attention if the config does not say."""
    window_where: Literal["", "all", "if_used", "qwen", "but_last_of_2", "but_last_of_4", "but_last_of_6"] = (
        ""
    )
    """Layers that slide, where `layer_types` does not say: none, all, all if `use_sliding_window`, from
    `max_window_layers` on if so, or all but the last of every so many."""


_BIAS = ("attention_bias", False)  # the usual key
_LLAMA = Family(qkv_bias=_BIAS, o_bias=_BIAS, mlp_bias=("mlp_bias", False))
_DEEPSEEK = Family(attention="mla", experts="deepseek", o_bias=_BIAS)

FAMILIES: dict[str, Family] = {
    # run by farthing.model
    "llama": _LLAMA,
    "mistral": Family(window=4096, window_where="all"),
    "qwen2": Family(qkv_bias=True, window_where="qwen"),
    "qwen3": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, qk_norm="head", head_size=128,
        window_where="qwen",
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,  # DeepSeek-V3's network under a name of its own
    "glm4_moe": Family(
        experts="deepseek", qkv_bias=_BIAS, qk_norm="head", qk_norm_if="use_qk_norm"
    ),
    "gpt_oss": Family(
        qkv_bias=("attention_bias", True), o_bias=("attention_bias", True), head_size=64, experts="all",
        expert_size="intermediate_size", oss=True, window=128, window_where="but_last_of_2",
    ),
    # plans only
    "apertus": Family(
        matrices=2, qkv_bias=_BIAS, o_bias=_BIAS, qk_norm="head"
    ),
    "bloom": Family(
        matrices=2, norm=2, qkv_bias=True, o_bias=True, mlp_bias=True, tied=True, embedding_norm=True, wide=4
    ),
    "dbrx": Family(experts="all", expert_size="ffn_hidden_size"),
    "falcon": Family(
        matrices=2, norm=2, qkv_bias=("bias", False), o_bias=("bias", False), mlp_bias=("bias", False),
        tied=True, wide=4, kv="falcon",
    ),
    "gemma": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, tied=True, head_size=256
    ),
    "gemma2": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, tied=True, head_size=256,
        norms=4, window=4096, window_where="but_last_of_2",
    ),
    "gemma3_text": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, tied=True, head_size=256,
        norms=4, qk_norm="head", window=4096, window_where="but_last_of_6",
    ),
    "gpt2": Family(
        matrices=2, norm=2, qkv_bias=True, o_bias=True, mlp_bias=True, tied=True, positions=0, wide=4
    ),
    "gpt_bigcode": Family(
        matrices=2, norm=2, qkv_bias=True, o_bias=True, mlp_bias=True, tied=True, positions=0, wide=4,
        kv="bigcode",
    ),
    "gpt_neox": Family(
        matrices=2, norm=2, qkv_bias=("attention_bias", True), o_bias=("attention_bias", True), mlp_bias=True
    ),
    "gptj": Family(matrices=2, norm=2, norms=1, mlp_bias=True, head_bias=True, wide=4),
    "granite": _LLAMA,  # its multipliers are numbers, not parameters
    "jetmoe": Family(attention="moa", experts="all", expert_size="intermediate_size", tied=True),
    "mixtral": Family(experts="all", expert_size="intermediate_size", window_where="all"),
    "mpt": Family(matrices=2, tied=True, wide=4),
    "nemotron": Family(
        matrices=2, norm=2, qkv_bias=_BIAS, o_bias=_BIAS,
        mlp_bias=("mlp_bias", False),
    ),
    "olmo": Family(norm=0, qkv_bias=_BIAS, o_bias=_BIAS),
    "olmo2": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, qk_norm="all"
    ),
    "olmo3": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, qk_norm="all", window=4096,
        window_where="but_last_of_4",
    ),
    "olmoe": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, qk_norm="all", experts="all",
        expert_size="intermediate_size",
    ),
    "opt": Family(
        matrices=2, norm=2, qkv_bias=("enable_bias", True), o_bias=("enable_bias", True),
        mlp_bias=("enable_bias", True), tied=True, positions=2,
    ),
    "phi": Family(
        matrices=2, norm=2, norms=1, qkv_bias=True, o_bias=True, mlp_bias=True, head_bias=True,
        qk_norm="head", qk_norm_if="qk_layernorm",
    ),
    "phi3": Family(window_where="all"),
    "qwen2_moe": Family(qkv_bias=("qkv_bias", True), experts="qwen", window_where="qwen"),
    "qwen3_moe": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, qk_norm="head",
        experts="qwen", window_where="if_used",
    ),
    "smollm3": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, mlp_bias=("mlp_bias", False),
        tied=True, window_where="qwen",
    ),
    "stablelm": Family(
        norm=2, qkv_bias=("use_qkv_bias", False), qk_norm="all", qk_norm_if="qk_layernorm"
    ),
    "starcoder2": Family(
        matrices=2, norm=2, qkv_bias=("use_bias", True), o_bias=("use_bias", True),
        mlp_bias=("use_bias", True), tied=True, window_where="all",
    ),
}  # fmt: skip
