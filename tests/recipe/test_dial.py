"""The dial: what a size or a depth comes to, and that it can be built."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.cost.flops import parameters
from farthing.model import Decoder
from farthing.recipe import Pretrain, validate
from farthing.recipe.dial import dial, training_flops
from farthing.weights import decoder_config

FAMILIES = ("deepseek", "moe", "llama")


def stage(**keys: Any) -> Pretrain:
    settings = {"kind": "pretrain", "data": ["x"], "vocab_size": 512} | keys
    if "depth" not in keys:
        settings.setdefault("size", "5M")
    made = validate({"name": "test", "stages": [settings]}).stages[0]
    assert isinstance(made, Pretrain)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["1M", "2M", "12M", "60M"])
def test_a_size_is_the_parameters_of_the_network_that_is_built(family: str, size: str) -> None:
    wanted = stage(family=family, size=size, mtp_depth=1 if family == "deepseek" else 0)
    config = dial(wanted, 512).config
    counted = parameters(config)
    assert wanted.size is not None
    assert abs(math.log(counted.total / wanted.size)) < math.log(1.35)
    with torch.device("meta"):
        decoder = Decoder(decoder_config(config))
    assert len(decoder.mtp) == wanted.mtp_depth
    # neither prediction modules nor routing biases, which no gradient moves, are counted
    built = sum(
        p.numel() for n, p in decoder.named_parameters() if "mtp." not in n and "router.bias" not in n
    )
    assert built == counted.total


@settings(max_examples=40)
@given(
    family=st.sampled_from(FAMILIES),
    size=st.integers(10**6, 10**11),
    vocab=st.sampled_from([300, 512, 1024]),
    length=st.sampled_from([64, 1024, 4096]),
)
def test_any_size_gives_a_sensible_run(family: str, size: int, vocab: int, length: int) -> None:
    made = dial(stage(family=family, size=size, length=length), vocab)
    config = made.config
    decoder_config(config)
    assert abs(math.log(parameters(config).total / size)) < math.log(1.35)
    assert 0.4 < config["hidden_size"] / config["num_hidden_layers"] / 64 < 2.5
    assert config["max_position_embeddings"] >= length
    assert made.batch_tokens % length == 0
    assert 0 < made.warmup <= max(1, math.ceil(made.steps / 20))
    assert 1e-5 < made.lr < 1e-1
    active = parameters(config).active
    assert made.tokens == pytest.approx(20 * active, rel=0.51 if made.steps < 3 else 0.2)


@pytest.mark.parametrize("depth", [2, 4, 8, 27])
def test_a_latent_takes_less_cache_than_the_keys_and_values_it_replaces(depth: int) -> None:
    deepseek = dial(stage(family="deepseek", depth=depth), 512).config
    llama = dial(stage(family="llama", depth=depth), 512).config
    assert deepseek["hidden_size"] == llama["hidden_size"] == 64 * depth
    replaced = 2 * llama["num_key_value_heads"] * llama["head_dim"]
    assert deepseek["kv_lora_rank"] + deepseek["qk_rope_head_dim"] < replaced


def test_rate_and_batch_follow_deepseeks_law() -> None:
    wanted = stage(family="llama", depth=4, tokens="10M", length=128)
    made = dial(wanted, 512)
    compute = training_flops(made.config, 128) * 10_000_000
    assert made.lr == pytest.approx(0.3118 * compute**-0.125)
    assert made.batch_tokens == pytest.approx(0.2920 * compute**0.3271, abs=64)


def test_every_value_can_be_overridden_and_the_rest_follows() -> None:
    made = dial(
        stage(
            depth=2, model={"hidden_size": 96, "num_experts_per_tok": 3, "n_routed_experts": 8}, lr=0.01,
            tokens=10_000, batch_tokens=1000, length=100, warmup=3,
        ), 512,
    )  # fmt: skip
    config = made.config
    assert (config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]) == (96, 3, 8)
    assert config["intermediate_size"] == 4 * config["moe_intermediate_size"]
    assert (made.lr, made.steps, made.batch_tokens, made.warmup) == (0.01, 10, 1000, 3)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"size": "1K"}, "size: the nearest deepseek model has"),
        ({"size": "100K", "family": "llama"}, "of them the embedding of 8,192 entries"),
        ({"model": {"hiden_size": 64}}, "model.hiden_size: a deepseek model has no such key to set; did you mean"),
        ({"model": {"n_routed_experts": 4}, "family": "llama"}, "model.n_routed_experts: a llama model has no"),
        ({"model": {"hidden_size": "wide"}}, "model.hidden_size: must be a whole number"),
        ({"model": {"model_type": "llama"}}, "model.model_type"),
        ({"model": {"hidden_size": None}}, "model.hidden_size: must be a whole number"),
        ({"model": {"hidden_size": True}}, "model.hidden_size: must be a whole number"),
        ({"model": {"num_hidden_layers": 10**9}}, "at most 1,000, not 1000000000"),
        ({"model": {"num_attention_heads": 10**400}}, "at most 10,000, not a number of hundreds"),
        ({"model": {"num_attention_heads": 0}}, "model.num_attention_heads: must be a whole number of at least 1"),
        ({"model": {"num_attention_heads": 2.5}}, "model.num_attention_heads: must be a whole number"),
        ({"model": {"rope_theta": -1.0}}, "model.rope_theta: must be a number above 0"),
        ({"model": {"rope_theta": 1e300}}, "model.rope_theta: must be a number above 0 and at most 1e30"),
        ({"model": {"tie_word_embeddings": "false"}}, "model.tie_word_embeddings: must be true or false"),
        ({"model": {"hidden_act": "gelu"}}, "model.hidden_act: must be 'silu', which is fixed"),
        ({"model": {"norm_topk_prob": False}}, "model.norm_topk_prob: is true in every deepseek model"),
        ({"model": {"num_nextn_predict_layers": 2}}, "model.num_nextn_predict_layers: is 0 in every"),
        ({"model": {"q_lora_rank": 0}}, "model.q_lora_rank: must be a whole number of at least 1"),
        ({"model": {"kv_lora_rank": 4096}}, "model.kv_lora_rank: a latent of 4096 and"),
        ({"length": 512, "model": {"max_position_embeddings": 256}}, "is more than max_position_embeddings (256)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        dial(stage(**keys), 8192)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
