"""Families that add names or experts to Llama's network: logits, gradients and saved folders against transformers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, Phi3Config, Qwen3MoeConfig

from farthing.base.errors import UserError
from farthing.engine import Engine, Request, Sampling
from farthing.weights import decoder_config

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 12}
CONFIGS: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(**SMALL, **EXPERTS, norm_topk_prob=True),
    "qwen3_moe, gates as they are": Qwen3MoeConfig(
        **SMALL, **EXPERTS, norm_topk_prob=False, attention_bias=True
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2),
    "phi3": Phi3Config(**SMALL),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_is_transformers_own(
    name: str, pair_of: Callable[..., SimpleNamespace], same: SimpleNamespace
) -> None:
    pair = pair_of(CONFIGS[name])
    same.logits(pair)
    same.gradients(pair, "padded")
    same.saved(pair)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_says_what_the_network_says(name: str, pair_of: Callable[..., SimpleNamespace]) -> None:
    pair = pair_of(CONFIGS[name])
    engine = Engine(pair.ours, frozenset(), max_batch=2, cache_tokens=512)
    ids = list(range(1, 20))
    [[sample]] = engine.generate([Request(ids, Sampling(max_new_tokens=12, temperature=0))])
    for token in sample.ids:
        with torch.no_grad():
            assert token == int(pair.ours(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"model_type": "qwen3_moe", **EXPERTS, "decoder_sparse_step": 2},
            "decoder_sparse_step 2 is not supported",
        ),
        (
            {"model_type": "qwen3_moe", **EXPERTS, "mlp_only_layers": [0]},
            r"mlp_only_layers is \[0\], which changes",
        ),
        ({"model_type": "mixtral"}, "has no 'num_local_experts'"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope"}},
            "rope_type 'longrope' is not supported",
        ),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.75},
            "only partial_rotary_factor 1.0 is supported",
        ),
    ],
)
def test_what_is_not_built_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        decoder_config({**SMALL, **changed})
