"""GLM-4.5's folder layout (`Glm4MoeForCausalLM`): grouped-query attention with DeepSeek-V3's mixture of experts.

It is the stock family for that pair, and read and written without prediction modules. GLM's own models rotate half of
each head.
"""

from __future__ import annotations

from typing import Any

from farthing.model import ModelConfig
from farthing.weights import llama
from farthing.weights.deepseek import feedforward, gate, rope_keys
from farthing.weights.settings import Settings
from farthing.weights.windows import refuse_windows

MODEL_TYPES = ("glm4_moe",)
DEFAULTS = {
    "glm4_moe": {
        **llama.SHARED_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
    }
}
_BUILT = ("n_routed_experts", "num_experts", "num_local_experts", "use_qk_norm")


def model_config(settings: Settings) -> ModelConfig:
    """The network a GLM-4-MoE config.json describes. Biases are on q, k and v alone.

    Raises:
        UserError: for a value that no network has, or a setting that is not built and would change the result.
    """
    settings.refuse_unbuilt(*_BUILT)
    refuse_windows(settings)
    return ModelConfig(
        **llama.common_fields(settings),
        qkv_bias=settings.flag("attention_bias"),
        moe=gate(settings.over(topk_method="noaux_tc")),
        qk_norm="head" if settings.flag("use_qk_norm") else "",
    )


def complete(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The config.json to write: it has no prediction modules, and says so. What share of each head rotates is written
    where newer and where older readers look for it, for without it both rotate half."""
    share = {"partial_rotary_factor": config.rope.share}
    rope = rope_keys(hf)
    rope["rope_parameters"] |= share
    return {**hf, **rope, **share, "num_nextn_predict_layers": 0}


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    table = {name: theirs for name, theirs in llama.tensors(config).items() if ".feedforward." not in name}
    for i in range(config.num_layers):
        table |= feedforward(config, i, f"layers.{i}", f"model.layers.{i}")
    return table


row_order = llama.row_order
