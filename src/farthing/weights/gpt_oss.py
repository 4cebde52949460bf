"""gpt-oss's folder layout (`GptOssForCausalLM`, arXiv:2508.10925): every other layer slides, each head has a sink, and
experts have biases and bounded inner products. OpenAI's own folders, whose experts are in MXFP4 (`weights.mxfp4`), are
read as bfloat16, and what is written is bfloat16.
"""

from __future__ import annotations

from typing import Any

from farthing.base.errors import UserError
from farthing.model import ModelConfig, Moe
from farthing.model.moe import BoundedExperts
from farthing.weights import llama
from farthing.weights.settings import Settings
from farthing.weights.windows import windows_by_layer

MODEL_TYPES = ("gpt_oss",)
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        **llama.SHARED_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "attention_bias": True,
        "swiglu_alpha": BoundedExperts.ALPHA,
        "swiglu_limit": 7.0,
    }
}


def model_config(settings: Settings) -> ModelConfig:
    """The network a gpt-oss config.json describes.

    Raises:
        UserError: for a value that no network has, or a setting that is not built and would change the result.
    """
    settings.refuse_unbuilt("num_local_experts", "swiglu_limit")
    if settings.number("swiglu_alpha") != BoundedExperts.ALPHA:
        raise UserError(
            f"config.json: swiglu_alpha {settings['swiglu_alpha']} is not supported; only {BoundedExperts.ALPHA} is"
        )
    if settings["rope_parameters"] is None:  # means the default, as for a missing key
        settings = settings.over(rope_parameters=DEFAULTS["gpt_oss"]["rope_parameters"])
    fields, bias = llama.common_fields(settings), settings.flag("attention_bias")
    moe = Moe(
        experts=settings.whole("num_local_experts"),
        top_k=settings.whole("num_experts_per_tok"),
        expert_size=fields["intermediate_size"],
        shared=0,
        scoring="softmax",  # over the chosen ones alone, which is the same as over all and normalised
        normalise=True,
        bias=False,
        router_bias=True,
        limit=settings.number("swiglu_limit"),
    )
    windows = windows_by_layer(settings, lambda layer: layer % 2 == 0)
    return ModelConfig(**fields, **windows, qkv_bias=bias, o_bias=bias, sinks=True, moe=moe)


def tensors(config: ModelConfig) -> dict[str, list[str]]:
    """For every parameter of the decoder, the tensors on disk that it joins, in the order of its rows."""
    table = {name: theirs for name, theirs in llama.tensors(config).items() if ".feedforward." not in name}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table[f"{ours}.attention.sinks"] = [f"{theirs}.self_attn.sinks"]
        table[f"{ours}.feedforward.router.weight"] = [f"{theirs}.mlp.router.weight"]
        table[f"{ours}.feedforward.router.logit_bias"] = [f"{theirs}.mlp.router.bias"]
        for name in ("gate_up", "down"):
            table[f"{ours}.feedforward.experts.{name}"] = [f"{theirs}.mlp.experts.{name}_proj"]
            table[f"{ours}.feedforward.experts.{name}_bias"] = [f"{theirs}.mlp.experts.{name}_proj_bias"]
    return table
