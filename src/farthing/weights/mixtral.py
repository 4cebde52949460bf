"""Mixtral's folder layout (`MixtralForCausalLM`): Mistral's attention, and experts of which each token takes two."""

from __future__ import annotations

from typing import Any

from farthing.model import ModelConfig, Moe
from farthing.weights import llama
from farthing.weights.settings import Settings
from farthing.weights.windows import windows_everywhere

MODEL_TYPES = ("mixtral",)
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        **llama.SHARED_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "num_experts_per_tok": 2,
    }
}


def model_config(settings: Settings) -> ModelConfig:
    """The network a Mixtral config.json describes: softmax over all experts, then the chosen ones' gates sum to 1.

    Raises:
        UserError: for a value that no network has, or a setting that is not built and would change the result.
    """
    settings.refuse_unbuilt("num_local_experts")
    moe = Moe(
        experts=settings.whole("num_local_experts"),
        top_k=settings.whole("num_experts_per_tok"),
        expert_size=settings.whole("intermediate_size"),
        shared=0,
        scoring="softmax",
        normalise=True,
        bias=False,
    )
    return ModelConfig(**llama.common_fields(settings), **windows_everywhere(settings), moe=moe)


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    assert config.moe is not None
    table = {name: theirs for name, theirs in llama.tensors(config).items() if ".feedforward." not in name}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.feedforward", f"model.layers.{i}.block_sparse_moe"
        each = range(config.moe.experts)
        table[f"{ours}.router.weight"] = [f"{theirs}.gate.weight"]
        table[f"{ours}.experts.gate_up"] = [
            f"{theirs}.experts.{e}.{half}.weight" for e in each for half in ("w1", "w3")
        ]
        table[f"{ours}.experts.down"] = [f"{theirs}.experts.{e}.w2.weight" for e in each]
    return table
