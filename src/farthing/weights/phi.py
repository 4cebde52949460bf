"""Phi-3 and Phi-4's folder layout (`Phi3ForCausalLM`): Llama's network, with q, k, v in one tensor and
gate, up in another.

Phi-4-mini rotates three quarters of each head. Models whose context longrope extended are read up to the original
length, where its short factors hold.
"""

from __future__ import annotations

from typing import Any

from farthing.base.errors import UserError
from farthing.model import ModelConfig
from farthing.weights import llama
from farthing.weights.settings import Settings, rope_key
from farthing.weights.windows import windows_everywhere

MODEL_TYPES = ("phi3",)
DEFAULTS: dict[str, dict[str, Any]] = {
    "phi3": {
        **llama.SHARED_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
    }
}


def model_config(settings: Settings) -> ModelConfig:
    """The network a Phi-3 config.json describes.

    Raises:
        UserError: for a value that no network has, or a setting that is not built and would change the result.
    """
    settings.refuse_unbuilt()
    settings.whole("original_max_position_embeddings")
    name = rope_key(settings)
    rotation = settings.mapping(name)
    if (kind := rotation.get("rope_type") or rotation.get("type")) in ("su", "yarn"):  # its older names
        settings = settings.over(**{name: {**rotation, "rope_type": "longrope", "type": "longrope"}})
    elif kind not in (None, "default", "longrope"):
        raise UserError(
            f"config.json: {name} {kind!r} is not supported in a phi3; supported: default, longrope"
        )
    return ModelConfig(**llama.common_fields(settings.over(head_dim=None)), **windows_everywhere(settings))


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    table = llama.tensors(config)
    for i in range(config.num_layers):
        table[f"layers.{i}.attention.qkv.weight"] = [f"model.layers.{i}.self_attn.qkv_proj.weight"]
        table[f"layers.{i}.feedforward.gate_up.weight"] = [f"model.layers.{i}.mlp.gate_up_proj.weight"]
    return table


row_order = llama.row_order
