"""Gemma 2 and Gemma 3's folder layout (`Gemma2ForCausalLM`, `Gemma3ForCausalLM`): norms on both sides of each half of a
layer, whose gains are stored less one, scaled embeddings, GELU, and layers with a window between full ones
(arXiv:2408.00118, arXiv:2503.19786). Gemma 2 bounds its scores and logits, Gemma 3 norms queries and keys."""

from __future__ import annotations

from typing import Any

from farthing.base.errors import UserError
from farthing.model import ModelConfig
from farthing.weights import llama
from farthing.weights.settings import Settings, rope_by_kind
from farthing.weights.windows import windows_by_layer

MODEL_TYPES = ("gemma2", "gemma3_text")
_DEFAULTS: dict[str, Any] = {
    **llama.SHARED_DEFAULTS,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
DEFAULTS = {
    "gemma2": {
        **_DEFAULTS,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {
        **_DEFAULTS,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
}
_BUILT = {
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    # transformers bounds a Gemma 3's scores in one of its ways of computing attention and not in the others
    "gemma3_text": ("final_logit_softcapping", "query_pre_attn_scalar"),
}


def model_config(settings: Settings) -> ModelConfig:
    """The network a Gemma config.json describes.

    Raises:
        UserError: for a value that no network has, or a setting that is not built and would change the result.
    """
    third = settings["model_type"] == "gemma3_text"
    settings.refuse_unbuilt(*_BUILT[settings["model_type"]])
    settings.choice("hidden_activation", "gelu_pytorch_tanh")
    every = settings.whole("sliding_window_pattern") if third else 2
    head = settings.whole("head_dim")
    windows = windows_by_layer(settings, lambda layer: (layer + 1) % every > 0)
    local = None
    if third:
        local_theta = settings.number("rope_local_base_freq", above=1.0)
        local = llama.rope(rope_by_kind(settings, "sliding_attention", local_theta, local=True), head)
        settings = rope_by_kind(settings, "full_attention", settings.number("rope_theta", above=1.0))
    fields = llama.common_fields(settings.over(hidden_act="silu"))  # hidden_activation is read instead
    bias, hidden = settings.flag("attention_bias"), fields["hidden_size"]
    if hidden % fields["num_heads"]:
        raise UserError(
            f"config.json: num_attention_heads ({fields['num_heads']}) does not divide hidden_size ({hidden}), which "
            f"transformers refuses in a {settings['model_type']}"
        )
    return ModelConfig(
        **fields,
        **windows,
        local_rope=local,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head" if third else "",
        query_scale=(head / settings.whole("query_pre_attn_scalar")) ** 0.5,
        softcap=_cap(settings, "attn_logit_softcapping"),
        logit_softcap=_cap(settings, "final_logit_softcapping"),
        norms="both",
        centred_norms=True,
        activation="gelu",
        embed_scale=hidden**0.5,
    )


def _cap(settings: Settings, key: str) -> float | None:
    return None if settings.get(key) is None else settings.number(key)


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    return llama.tensors(config)
