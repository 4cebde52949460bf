"""GLM-4.5's folder layout (`Glm4MoeForCausalLM`): grouped-query attention with DeepSeek-V3's mixture of experts.

It is the stock family for that pair. Folders with `partial_rotary_factor` 1 are read and written, without prediction
modules; GLM's own models rotate half of each head.
"""

from __future__ import annotations

from typing import Any

from farthing.base.errors import UserError
from farthing.model import ModelConfig
from farthing.weights import llama
from farthing.weights.deepseek import feedforward, gate, rope_keys

MODEL_TYPES = ("glm4_moe",)


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """The network a GLM-4-MoE config.json describes.

    Raises:
        UserError: for a missing key, or an unsupported setting.
    """
    rope = hf.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.5)) != 1.0:
        raise UserError(
            "config.json: of glm4_moe only partial_rotary_factor 1.0 is supported, with whole heads rotated"
        )
    base = llama.model_config({**hf, "mlp_bias": False})
    if base.o_bias:
        base = ModelConfig(**{**base.__dict__, "o_bias": False})  # GLM has biases on q, k and v alone
    try:
        moe = gate({**hf, "topk_method": "noaux_tc"}, "sigmoid")
    except KeyError as error:
        raise UserError(f"config.json has no {error.args[0]!r}; download the model's folder again") from error
    return ModelConfig(**{**base.__dict__, "moe": moe, "qk_norm": bool(hf.get("use_qk_norm", False))})


def complete(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The config.json to write: it has no prediction modules, and says so. That heads are rotated whole is written
    where newer and where older readers look for it, for without it both rotate half."""
    whole = {"partial_rotary_factor": 1.0}
    rope = rope_keys(hf)
    rope["rope_parameters"] |= whole
    return {**hf, **rope, **whole, "num_nextn_predict_layers": 0}


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    table = {name: theirs for name, theirs in llama.tensors(config).items() if ".feedforward." not in name}
    for i in range(config.num_layers):
        table |= feedforward(config, i, f"layers.{i}", f"model.layers.{i}")
    return table
