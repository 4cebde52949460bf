import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.cost.flops import (
    Flops,
    backward_flops,
    causal_pairs,
    decode_flops,
    flops,
    flops_per_token,
    forward_flops,
    mtp_flops,
    parameters,
)

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip
LLAMA_3_1_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
LLAMA_3_1_405B = LLAMA_3_1_8B | {
    "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128
}  # fmt: skip
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True
}  # fmt: skip
# the config.json files of deepseek-ai's repositories
V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "num_nextn_predict_layers": 1,
}  # fmt: skip
V2 = V3 | {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "num_hidden_layers": 60, "n_shared_experts": 2, "n_routed_experts": 160,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1, "num_nextn_predict_layers": None,
}  # fmt: skip
V2_LITE = V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "q_lora_rank": None, "n_routed_experts": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "length", "causal", "full"),
    [
        (V3, 4096, 250.45, 281.15),  # DeepSeek's own rate implies 249.7 and 280.2 (arXiv:2505.09343 table 4)
        (V2, 4096, 155.3, 185.5),
        (LLAMA_3_1_8B, 8192, 51.47, 57.91),
        (LLAMA_3_1_405B, 8192, 2524, 2625),
        (LLAMA_3_1_405B, 131072, 4046, 5669),
        (LLAMA_3_2_1B, 8192, 9.026, 10.64),
    ],
    ids=["V3", "V2", "8B", "405B", "405B@131K", "1B"],
)
def test_published_models_in_gflop_a_token(config, length, causal, full):
    counted = flops_per_token(config, length, mtp=False)
    assert counted.model == pytest.approx(causal * 1e9, rel=5e-4)
    assert counted.model_full == pytest.approx(full * 1e9, rel=5e-4)


def test_multi_token_prediction_adds_a_twenty_fifth_to_v3():
    assert flops_per_token(V3, 4096).model == pytest.approx(260.6e9, rel=5e-4)
    assert flops_per_token(V3, 4096, mtp=False).mtp == 0
    assert flops_per_token(V2, 4096).mtp == 0


def test_parameters_of_published_models():
    v3, v2_lite = parameters(V3), parameters(V2_LITE)
    assert v3.total == pytest.approx(671.03e9, rel=1e-5)
    assert v3.active == pytest.approx(37.55e9, rel=1e-4)
    assert v3.active - v3.embedding == pytest.approx(36.63e9, rel=2e-4)
    assert v3.active - v3.embedding - v3.head == pytest.approx(35.70e9, rel=1e-4)
    assert v3.mtp > 11e9  # the Hub's 14B holds a second copy of embedding and head
    assert v2_lite.total == pytest.approx(15.71e9, rel=3e-4)
    assert v2_lite.active == pytest.approx(2.66e9, rel=1e-3)
    assert parameters(LLAMA_3_1_8B).total == parameters(LLAMA_3_1_8B).active == 8_030_261_248
    assert parameters(LLAMA_3_2_1B).total == 1_235_814_400
    assert parameters(LLAMA_3_2_1B).head == 0


@pytest.mark.parametrize("config", [TINY, V3, V2_LITE], ids=["llama", "V3", "V2-Lite"])
def test_the_vector_and_the_ledgers_number_agree(config):
    lengths = [5, 64, 1, 30]
    tokens, pairs = sum(lengths), sum(map(causal_pairs, lengths))
    vector = flops(config, lengths, "forward", mtp=False)
    assert vector.model == forward_flops(config, tokens, pairs, tokens)
    assert flops(config, lengths, "backward", mtp=False).model == backward_flops(
        config, tokens, pairs, tokens
    )
    assert flops(config, lengths, "forward").mtp == mtp_flops(
        config, tokens, pairs, tokens * bool(config.get("num_nextn_predict_layers"))
    )
    assert flops(config, lengths).model == 3 * flops(config, lengths, "forward").model


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_packed_documents_cost_what_they_cost_apart(lengths):
    apart = sum((flops(TINY, n) for n in lengths), Flops())
    assert flops(TINY, lengths) == apart
    assert flops(TINY, sum(lengths)).attention_causal >= apart.attention_causal


@given(length=st.integers(1, 200), window=st.integers(1, 250))
def test_a_window_counts_the_cells_of_its_mask(length, window):
    sliding = TINY | {"model_type": "mistral", "sliding_window": window}
    cells = sum(i - j < window for i in range(length) for j in range(i + 1))
    assert flops(sliding, length, "forward").attention_causal == forward_flops(TINY, 0, cells, 0)
    full = length * min(length, window)
    assert flops(sliding, length, "forward").attention_full == forward_flops(TINY, 0, full, 0)


def test_windows_of_some_layers():
    gemma = TINY | {"model_type": "gemma2", "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4}
    assert [layer.window for layer in _layers(gemma)] == [8, None, 8, None]
    named = gemma | {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}
    assert [layer.window for layer in _layers(named)] == [None, None, None, 8]
    qwen = TINY | {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1}
    assert [layer.window for layer in _layers(qwen)] == [None] * 3
    assert [layer.window for layer in _layers(qwen | {"use_sliding_window": True})] == [None, 8, 8]


def _layers(config):
    from farthing.cost.shapes import shapes

    return shapes(config).layers


@given(prompt=st.integers(1, 64), generated=st.integers(1, 64))
def test_decoding_token_by_token_costs_what_one_pass_costs(prompt, generated):
    whole = forward_flops(TINY, prompt + generated, causal_pairs(prompt + generated), 1 + generated)
    steps = forward_flops(TINY, prompt, causal_pairs(prompt), 1)
    steps += sum(decode_flops(TINY, prompt + i).model for i in range(generated))
    assert steps == whole


def test_decoding_on_latents_is_dearer_a_pair_and_equal_in_the_projections():
    step, one = decode_flops(V3, 4095), flops(V3, 1, "forward", mtp=False)
    assert step.linear == one.linear
    # 2 h (2 * 512 + 64) FLOPs a pair against 2 h (192 + 128)
    assert step.attention_causal == pytest.approx(4096 * one.attention_causal * 1088 / 320)
    assert step.model == forward_flops(V3, 1, 4096, 1, absorbed=True)


def test_recomputation_is_beside_the_model_flops():
    plain, full = flops(V3, 4096), flops(V3, 4096, recompute="full")
    assert plain.recompute == 0
    assert full.model == plain.model
    assert full.hardware == plain.model + full.recompute
    head = 2 * 4096 * 7168 * 129280
    assert full.recompute == plain.model / 3 - 2 * head  # the layers once more, neither of the two heads
    selective = flops(V3, 4096, recompute="selective").recompute
    assert selective == 2 * 4096 * 62 * 128 * (1536 * 192 + 512 * 256)
    assert flops(TINY, 64, recompute="selective").recompute == 0  # norms and products of elements alone
    assert flops(V3, 64, "forward", recompute="full").recompute == 0


def test_alternate_computes_every_second_product_again():
    plain = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
    }  # fmt: skip
    keys, result, up = 64 * 32, 64 * 64, 64 * 160  # of q, k, v, o, gate, up and down
    assert flops(plain, 10, recompute="alternate").recompute == 2 * 10 * 3 * (keys + result + up)
    experts = 8 * 3 * 7168 * 2048  # of V3's 58 sparse layers, besides
    assert flops(V3, 10, recompute="alternate").recompute > 2 * 10 * 58 * experts


def test_vectors_add_and_scale():
    one = flops(V3, 128, recompute="full") + Flops(optimizer=7.0)
    double = one + one
    assert double == 2 * one
    assert double.hardware == pytest.approx(2 * one.hardware)
    assert math.isclose((one * 0.5).model_full, one.model_full / 2)


@given(new=st.integers(0, 300), prefix=st.integers(0, 300), cut=st.integers(0, 300))
def test_pairs_count_every_cell_of_the_mask_and_add_up(new, prefix, cut):
    assert causal_pairs(new, prefix) == sum(prefix + i + 1 for i in range(new))
    cut = min(cut, new)
    assert causal_pairs(cut, prefix) + causal_pairs(new - cut, prefix + cut) == causal_pairs(new, prefix)


def test_negative_counts_are_refused():
    for wrong in (
        lambda: forward_flops(TINY, -1, 0, 0),
        lambda: mtp_flops(V3, 0, -1, 0),
        lambda: flops(TINY, [3, -3]),
        lambda: decode_flops(TINY, -1),
        lambda: causal_pairs(1, -1),
    ):
        with pytest.raises(ValueError, match="negative"):
            wrong()


def test_a_config_that_cannot_be_counted_is_named():
    with pytest.raises(UserError, match="intermediate_size: None"):
        forward_flops(TINY | {"intermediate_size": None}, 1, 1, 1)
