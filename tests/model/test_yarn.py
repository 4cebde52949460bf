"""YaRN: frequencies equal to transformers, and m squared on DeepSeek's scores."""

import math

import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from farthing.model import Decoder, Mla, ModelConfig, Rope
from farthing.model.rotary import frequencies, tables
from farthing.weights import decoder_config, load_decoder

MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": None,
}
PLAIN = {"model_type": "deepseek_v3", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
         "num_hidden_layers": 1, "num_attention_heads": 2, **MLA}  # fmt: skip
DEEPSEEK = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}
SCALES = st.sampled_from([None, 0.0, 0.5, 0.707, 1.0])


@given(
    half=st.integers(1, 64),
    theta=st.sampled_from([1e4, 5e4, 1e6]),
    factor=st.floats(1.0, 64.0),
    original=st.integers(64, 8192),
    betas=st.sampled_from([(32.0, 1.0), (16.0, 2.0), (4.0, 0.5)]),
    mscale=SCALES,
    all_dim=SCALES,
)
def test_frequencies_and_scales_equal_transformers(half, theta, factor, original, betas, mscale, all_dim):
    settings = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "beta_fast": betas[0],
                "beta_slow": betas[1], "original_max_position_embeddings": original}  # fmt: skip
    settings |= {k: v for k, v in (("mscale", mscale), ("mscale_all_dim", all_dim)) if v is not None}
    theirs = DeepseekV3Config(qk_rope_head_dim=2 * half, rope_parameters=dict(settings))
    expected, table_scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, None)
    rope = decoder_config({**PLAIN, "qk_rope_head_dim": 2 * half, "rope_parameters": settings}).rope
    torch.testing.assert_close(frequencies(rope, 2 * half), expected)
    assert rope.table_scale == pytest.approx(table_scale)


@given(factor=st.floats(1.5, 64.0), half=st.integers(4, 64))
def test_fast_pairs_are_kept_and_slow_ones_scaled(factor, half):
    rope = Rope(kind="yarn", factor=factor, original_max_positions=4096)
    plain, got = frequencies(Rope(), 2 * half), frequencies(rope, 2 * half)
    turns = 4096 * plain / (2 * math.pi)
    assume((turns < 0.5).any())
    # the ramp ends at whole pairs, so pairs next to its ends may lie on either side
    fast, slow = turns > 32 * 1e4 ** (1 / half), turns < 1e4 ** (-1 / half)
    assert fast.any()
    torch.testing.assert_close(got[fast], plain[fast])
    torch.testing.assert_close(got[slow], plain[slow] / factor)
    assert (got <= plain * 1.000001).all()
    assert (got >= plain / factor * 0.999999).all()


def test_factor_1_is_the_plain_embedding():
    assert torch.equal(frequencies(Rope(kind="yarn", factor=1.0), 64), frequencies(Rope(), 64))


@pytest.mark.parametrize(
    ("model", "mscale", "expected"), [("V3", 1.0, 1.3689**2), ("V2-Lite", 0.707, 1.2608**2)]
)
def test_the_scores_of_deepseeks_models_are_sharpened_by_m_squared(model, mscale, expected):
    """m = 0.1 * mscale_all_dim * ln 40 + 1; cosines and sines are unscaled (arXiv:2405.04434 sec. 3.1.4)."""
    scales = {"mscale": mscale, "mscale_all_dim": mscale}
    rope = decoder_config({**PLAIN, "qk_rope_head_dim": 64, "rope_parameters": DEEPSEEK | scales}).rope
    assert rope.score_scale == pytest.approx(expected, abs=2e-4)
    assert rope.table_scale == 1.0


def test_the_factor_scales_the_scores_and_leaves_the_first_position():
    """In an engine that omits the factor, the first token agrees and all later ones drift."""
    mla = Mla(None, kv_lora_rank=12, nope_dim=6, rope_dim=4, v_dim=5)
    outs = []
    for scale in (1.0, 1.874):
        settings = ModelConfig(97, 24, 40, 1, 3, 3, 10, mla=mla, rope=Rope(score_scale=scale))
        decoder = Decoder(settings)
        decoder.init_weights(seed=0, std=0.5)
        outs.append(decoder(torch.arange(12)[None])[0])
        if scale != 1.0:  # equivalent to larger queries
            rows = decoder.layers[0].attention.qkv_a
            with torch.no_grad():
                rows.weight[: rows.parts[0]] *= scale
            decoder.layers[0].attention.score_scale = 1.0
            torch.testing.assert_close(decoder(torch.arange(12)[None])[0], outs[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outs[1][0], outs[0][0])
    assert ((outs[1] - outs[0]).abs().amax(-1)[1:] > 1e-3).all()


def test_the_table_scale_multiplies_cosine_and_sine():
    plain, scaled = tables(Rope(), 8, 20), tables(Rope(table_scale=1.25), 8, 20)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, one * 1.25)


def test_llama_with_yarn_equals_transformers(tmp_path):
    """Without latents there is no m squared; only the tables are scaled."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 32},
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.2)
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path, torch.float32)
    assert ours.config.rope.score_scale == 1.0
    assert ours.config.rope.table_scale == pytest.approx(0.1 * math.log(8) + 1)
    ids = torch.randint(0, 97, (2, 90))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
