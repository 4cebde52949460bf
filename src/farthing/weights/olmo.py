"""OLMo 2 and OLMo 3's folder layout (`Olmo2ForCausalLM`, `Olmo3ForCausalLM`): Llama's names, with norms after each half
of a layer, and over all heads of q and k at once (arXiv:2501.00656 section 2). In OLMo 3, three layers of four slide,
and only the others stretch their positions."""

from __future__ import annotations

from typing import Any

from farthing.base.errors import UserError
from farthing.model import ModelConfig
from farthing.weights import llama
from farthing.weights.settings import Settings, rope_by_kind
from farthing.weights.windows import refuse_windows, windows_by_layer

MODEL_TYPES = ("olmo2", "olmo3")
_THETA = 500_000.0  # of OLMo 3
_DEFAULTS: dict[str, Any] = {**llama.SHARED_DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
DEFAULTS = {
    "olmo2": _DEFAULTS,
    "olmo3": {**_DEFAULTS, "rope_theta": _THETA, "sliding_window": 4096},
}


def model_config(settings: Settings) -> ModelConfig:
    """The network an OLMo config.json describes.

    Raises:
        UserError: for a value that no network has, or a setting that is not built and would change the result.
    """
    settings.refuse_unbuilt()
    more: dict[str, Any] = {}
    if settings["model_type"] == "olmo3":
        more = windows_by_layer(settings, lambda layer: (layer + 1) % 4 > 0)
        # transformers gives rope_theta to the full layers only
        more["local_rope"] = llama.rope(rope_by_kind(settings, "sliding_attention", _THETA, local=True), 2)
        settings = rope_by_kind(settings, "full_attention", settings.number("rope_theta", above=1.0))
    else:
        refuse_windows(settings)
    if "head_dim" in settings:
        settings.whole("head_dim")
    fields, bias = llama.common_fields(settings), settings.flag("attention_bias")
    if fields["hidden_size"] % fields["num_heads"]:
        raise UserError(
            f"config.json: num_attention_heads ({fields['num_heads']}) does not divide hidden_size "
            f"({fields['hidden_size']}), which transformers refuses in a {settings['model_type']}"
        )
    return ModelConfig(**fields, **more, qkv_bias=bias, o_bias=bias, qk_norm="all", norms="after")


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    return llama.tensors(config)
