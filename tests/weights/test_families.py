"""Families that add names or experts to Llama's network: logits, gradients and saved folders against transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from farthing.base.errors import UserError
from farthing.cost.flops import flops, forward_flops
from farthing.cost.shapes import shapes
from farthing.engine import Engine, Request, Sampling
from farthing.model import Rope, Segments
from farthing.train.losses import token_logprobs
from farthing.weights import decoder_config

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 12}
HALVES = {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1}
DEEP = {**SMALL, "num_hidden_layers": 3}
CONFIGS: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(**SMALL, **EXPERTS, norm_topk_prob=True),
    "qwen3_moe, gates as they are": Qwen3MoeConfig(
        **SMALL, **EXPERTS, norm_topk_prob=False, attention_bias=True
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2),
    "phi3": Phi3Config(**SMALL),
    "phi3, three quarters of a head": Phi3Config(
        **HALVES, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75},
    ),
    "phi3, longrope": Phi3Config(
        **HALVES, original_max_position_embeddings=128,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        },
    ),
    "phi3, sliding": Phi3Config(**SMALL, sliding_window=11),
    "mistral, sliding": MistralConfig(**SMALL, sliding_window=11),
    "mixtral, sliding": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=11),
    "qwen2, sliding": Qwen2Config(
        **SMALL, sliding_window=11, use_sliding_window=True, max_window_layers=1
    ),
    "qwen3, sliding": Qwen3Config(
        **SMALL, sliding_window=11, use_sliding_window=True, head_dim=12,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3_moe, sliding": Qwen3MoeConfig(**SMALL, **EXPERTS, sliding_window=11, use_sliding_window=True),
    "gemma2": Gemma2Config(
        **DEEP, head_dim=12, query_pre_attn_scalar=20, sliding_window=11, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": Gemma3TextConfig(
        **DEEP, head_dim=12, query_pre_attn_scalar=20, sliding_window=11,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gpt_oss": GptOssConfig(
        **DEEP, head_dim=12, num_local_experts=6, num_experts_per_tok=3, sliding_window=11, swiglu_limit=0.5,
        rope_parameters={
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 500.0,
            "truncate": False,
        },
    ),
    "olmo2": Olmo2Config(**SMALL),
    "olmo3": Olmo3Config(
        **{**SMALL, "num_hidden_layers": 4}, sliding_window=11,
        rope_parameters={
            "full_attention": {
                "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 500.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_is_transformers_own(
    name: str, pair_of: Callable[..., SimpleNamespace], same: SimpleNamespace
) -> None:
    pair = pair_of(CONFIGS[name])
    same.logits(pair)
    same.gradients(pair, "padded")
    same.saved(pair)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_says_what_transformers_says(name: str, pair_of: Callable[..., SimpleNamespace]) -> None:
    """Greedy answers through the paged cache, to prompts longer than any window and a new one after a cached one."""
    pair = pair_of(CONFIGS[name])
    engine = Engine(pair.ours, frozenset(), max_batch=3, cache_tokens=512, page_size=4)
    long = list(range(1, 40))
    prompts = [long, long[:5], [*long[:24], 9, 8, 7]]
    requests = [Request(ids, Sampling(max_new_tokens=20, temperature=0)) for ids in prompts]
    for _ in range(2):  # the second time the prompts' pages are cached
        answers = [sample.ids for [sample] in engine.generate(requests)]
        assert answers == [greedy(pair.theirs, ids, 20) for ids in prompts]


def greedy(theirs: Any, ids: list[int], new: int) -> list[int]:
    ids = list(ids)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(theirs(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-new:]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_trainer_scores_what_the_sampler_said(name: str, pair_of: Callable[..., SimpleNamespace]) -> None:
    """Samples that share a prompt, drawn through the cache and scored in one pass over the prompt and all of them."""
    ours = pair_of(CONFIGS[name]).ours
    engine = Engine(ours, frozenset(), max_batch=3, cache_tokens=512, page_size=4)
    prompt = list(range(1, 30))
    [samples] = engine.generate([Request(prompt, Sampling(max_new_tokens=18, seed=5), samples=3)])
    batch = Segments([(len(prompt), [len(sample.ids) for sample in samples])])
    ids = torch.tensor([*prompt, *(token for sample in samples for token in sample.ids)])
    with torch.no_grad():
        hidden = ours.hidden(ids, batch.positions(), batch)
    start = len(prompt)
    for sample in samples:
        rows = [len(prompt) - 1, *range(start, start + len(sample.ids) - 1)]
        scored = token_logprobs(
            hidden[rows], ours.head.weight, torch.tensor(sample.ids), softcap=ours.config.logit_softcap
        )
        torch.testing.assert_close(scored, torch.tensor(sample.logprobs), atol=2e-4, rtol=0)
        start += len(sample.ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_counting_sees_the_same_windows(name: str) -> None:
    hf = CONFIGS[name].to_dict()
    config = decoder_config(hf)
    assert Counter(layer.window for layer in shapes(hf).layers) == config.windows
    lengths = [30, 7]
    pairs = Segments([(length, ()) for length in lengths]).pairs(config.windows)
    counted = flops(hf, lengths, "forward")
    assert forward_flops(hf, sum(lengths), pairs, sum(lengths)) == counted.model


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
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 4}},
            "has no 'rope_scaling.short_factor'",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su", "long_factor": [1.0] * 3}},
            r"long_factor is \[1.0, 1.0, 1.0\]; it must be a list of 4 numbers above 0",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling 'linear' is not supported in a phi3",
        ),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.4},
            "rotates 3 of a head's 8 elements; it must be an even number",
        ),
        (
            {"model_type": "qwen3", "head_dim": 8, "partial_rotary_factor": 0.5},
            "only partial_rotary_factor 1.0 is supported in this family",
        ),
        ({"model_type": "gpt_oss", "swiglu_alpha": 1.5}, "swiglu_alpha 1.5 is not supported"),
        (
            {"model_type": "gemma3_text", "head_dim": 8, "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0, which changes",
        ),
        (
            {"model_type": "olmo3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "must be a mapping of full_attention and sliding_attention",
        ),
    ],
)
def test_what_is_not_built_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        decoder_config({**SMALL, **changed})


def test_older_rotary_keys_mean_the_same() -> None:
    """Gemma 3 and OLMo 3 as they were published, and as transformers 5 writes them."""
    gemma = {**DEEP, "model_type": "gemma3_text", "head_dim": 8}
    older = {
        "rope_theta": 5e5,
        "rope_local_base_freq": 300.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    newer = Gemma3TextConfig(**DEEP, head_dim=8, **older).to_dict()["rope_parameters"]
    assert newer["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    assert decoder_config({**gemma, **older}) == decoder_config({**gemma, "rope_parameters": newer})
    olmo = {**DEEP, "model_type": "olmo3"}
    scaling = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.2,
    }
    newer = Olmo3Config(**DEEP, rope_scaling=scaling).to_dict()["rope_parameters"]
    config = decoder_config({**olmo, "rope_scaling": scaling})
    assert config == decoder_config({**olmo, "rope_parameters": newer})
    assert (config.rope.kind, config.rope.table_scale) == ("yarn", 1.2)
    assert config.local_rope == Rope(theta=500_000.0)
