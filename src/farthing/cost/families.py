"""Differences between families of open models that matter in counting parameters and FLOPs.

Read off the models of the `transformers` library, release 5.23; the tests build each family there and compare
the number of parameters, which must agree to the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from farthing.base.errors import UserError

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
    head_bias: Flag = False
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
    attention: Literal["", "mla", "dsa", "moa", "gated"] = ""
    """Grouped queries; multi-head latent attention; that with DeepSeek's sparse indexer; JetMoE's mixture of attention
    heads; or Qwen3-Next's gated attention, between layers of gated DeltaNet."""
    experts: Literal["", "deepseek", "qwen", "llama4", "all"] = ""
    """Which layers are mixtures: those after `first_k_dense_replace`; by `decoder_sparse_step`; `moe_layers`, or one
    of each `interleave_moe_layer_step`; all."""
    expert_size: str = "moe_intermediate_size"
    """The key of an expert's f."""
    dense_size: str = "intermediate_size"
    """The key of f in layers that are no mixtures."""
    shared: int = 0
    """Shared experts if the config does not say."""
    oss: bool = False
    """gpt-oss's additions: a sink for each head, biases in the router and in experts."""
    window: int | None = None
    """The window of sliding attention if the config does not say."""
    window_where: Literal[
        "", "all", "if_used", "qwen", "chunks", "but_last_of_2", "but_last_of_4", "but_last_of_6"
    ] = ""
    """Layers that slide, where `layer_types` does not say: none, all, all if `use_sliding_window`, from
    `max_window_layers` on if so, or all but the last of every so many. `chunks`: those with rotation, of
    `no_rope_layers`, see only their chunk of the sequence (Llama 4)."""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """Sizes that published configs leave out."""


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
    "deepseek_v32": replace(_DEEPSEEK, attention="dsa"),
    "dots1": Family(experts="deepseek", qkv_bias=_BIAS, o_bias=_BIAS, qk_norm="head"),
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
        defaults={"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4},
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
    "granitemoe": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, experts="all", expert_size="intermediate_size"
    ),
    "jetmoe": Family(attention="moa", experts="all", expert_size="intermediate_size", tied=True),
    "llama4": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, experts="llama4", expert_size="intermediate_size",
        dense_size="intermediate_size_mlp", shared=1, head_size=128, window=8192, window_where="chunks",
    ),
    "minimax_m2": Family(
        qk_norm="all", head_size=128, experts="all", expert_size="intermediate_size"
    ),
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
    "phimoe": Family(
        norm=2, qkv_bias=_BIAS, o_bias=_BIAS, head_bias=("lm_head_bias", False), experts="all",
        expert_size="intermediate_size", window_where="all",
    ),
    "qwen2_moe": Family(qkv_bias=("qkv_bias", True), experts="qwen", window_where="qwen"),
    "qwen3_moe": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, qk_norm="head",
        experts="qwen", window_where="if_used",
    ),
    "qwen3_next": Family(
        qkv_bias=_BIAS, o_bias=_BIAS, qk_norm="head", head_size=256, attention="gated", experts="qwen"
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

# Text models that go by a name of their own inside a model of images, and the family that they are.
TEXT_MODELS = {
    "glm4v_moe_text": "glm4_moe",
    "llama4_text": "llama4",
    "ministral3": "mistral",
    "qwen2_vl": "qwen2",  # an older config keeps the text model's sizes beside the image model's
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}

# Why a family that is no decoder of attention is not counted; the hint that an error gives.
_RECURRENT = "it keeps a recurrent state; of that kind qwen3_next is counted"
_ENCODER = "it is an encoder, and only decoders are counted"
_BOTH = "it has an encoder beside its decoder, and only decoders alone are counted"
_SENSES = "it is a model of images or sound, and only decoders of text are counted"
OTHER_KINDS = {
    name: reason
    for reason, names in (
        (
            _RECURRENT,
            "bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 minimax "
            "nemotron_h olmo_hybrid recurrent_gemma rwkv xlstm zamba zamba2",
        ),
        (
            _ENCODER,
            "albert bert camembert convbert deberta deberta-v2 distilbert electra ernie esm eurobert longformer "
            "modernbert mpnet nomic_bert rembert roberta roformer xlm-roberta",
        ),
        (_BOTH, "bart blenderbot fsmt led longt5 m2m_100 marian mbart mt5 nllb-moe pegasus switch_transformers "
                "t5 t5gemma udop umt5"),
        (_SENSES, "beit clip convnext deit dinov2 dinov3_vit hubert mllama molmo2 resnet sam segformer siglip "
                  "swin vit wav2vec2 whisper"),
    )
    for name in names.split()
}  # fmt: skip
_NESTED = ("text_config", "llm_config", "language_config")


def text_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's config inside that of a model of images and text; the config itself if it nests none.

    Whether the embedding is shared is the outer config's to say, if it does.
    """
    inner = next(
        (config[key] for key in _NESTED if isinstance(config.get(key), Mapping) and config[key]), None
    )
    if inner is None:
        return config
    tied = config.get("tie_word_embeddings")
    return inner if tied is None else {**inner, "tie_word_embeddings": tied}


def family_of(config: Mapping[str, Any]) -> str:
    """The name in `FAMILIES` of the config's model_type. Raises UserError if there is none."""
    given = config.get("model_type")
    name = TEXT_MODELS.get(given, given) if isinstance(given, str) else ""
    if name in FAMILIES:
        return name
    meant = next((known for known in FAMILIES if _is_slip(name, known)), None)
    hint = OTHER_KINDS.get(name) or (f"did you mean {meant}?" if meant else "")
    raise UserError(
        f"cannot count a model of type {given!r}: {hint + ' ' if hint.endswith('?') else hint + '. ' if hint else ''}"
        f"The types known are {', '.join(FAMILIES)}"
    )


def _is_slip(given: str, known: str) -> bool:
    """Whether a name is another in other case or dashes, or lacks or doubles one letter inside a word.

    Nothing looser: the nearest spelling of one family is often another kind of network, as llama is of mamba.
    """
    a, b = ("".join(char for char in name.lower() if char.isalnum()) for name in (given, known))
    short, long = sorted((a, b), key=len)
    inside = range(len(long) - 1) if len(long) == len(short) + 1 > 4 else ()
    return a == b or any(
        long[max(0, i - 1) : i + 2].isalpha() and long[:i] + long[i + 1 :] == short for i in inside
    )
