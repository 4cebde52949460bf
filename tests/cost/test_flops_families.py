"""FLOPs of layers that do not attend to all before them: chunks, windows, a sparse indexer, a recurrent state."""

import pytest

from farthing.cost.flops import decode_flops, flops, forward_flops, mtp_flops
from farthing.cost.memory import cache_bytes_per_token, memory, state_bytes
from farthing.cost.shapes import shapes
from tests.cost.test_shapes import DELTA, INDEXED, LATENT, MIXED, QWEN_MOE

LLAMA4 = {"model_type": "llama4", **MIXED, "intermediate_size_mlp": 80, "attention_chunk_size": 8}
GPT_OSS = {"model_type": "gpt_oss", **MIXED, "sliding_window": 5}
V32 = {"model_type": "deepseek_v32", **LATENT, **INDEXED}
NEXT = {"model_type": "qwen3_next", **QWEN_MOE, **DELTA, "head_dim": 16}
LENGTHS = (1, 7, 8, 9, 16, 29)
PAIR = 2 * 4 * (16 + 16)  # four heads of 16: a score and a weighted value


def _seen(n, sees):
    """Pairs of a mask written out."""
    return sum(1 for query in range(n) for key in range(query + 1) if sees(query, key))


@pytest.mark.parametrize("n", LENGTHS)
def test_chunks_end_attention(n):
    chunked, whole = _seen(n, lambda query, key: query // 8 == key // 8), _seen(n, lambda query, key: True)
    head = LLAMA4 | {"head_dim": 16}
    assert flops(head, n, "forward").attention_causal == PAIR * (3 * chunked + whole)
    assert flops(head, n, "forward").attention_full == PAIR * n * (3 * min(n, 8) + n)


@pytest.mark.parametrize("n", LENGTHS)
def test_every_second_layer_of_gpt_oss_slides(n):
    slid, whole = _seen(n, lambda query, key: query - key < 5), _seen(n, lambda query, key: True)
    assert flops(GPT_OSS | {"head_dim": 16}, n, "forward").attention_causal == PAIR * 2 * (slid + whole)


@pytest.mark.parametrize("n", LENGTHS)
def test_an_indexer_scores_every_pair_and_attention_takes_those_chosen(n):
    chosen, scored = sum(min(16, token + 1) for token in range(n)), _seen(n, lambda query, key: True)
    pair, score = 2 * 4 * (16 + 8 + 12), 3 * (2 * 12 + 2)
    work = flops(V32 | {"num_nextn_predict_layers": 0}, n, "forward")
    assert work.attention_causal == 4 * (chosen * pair + scored * score)
    latent = V32 | {"model_type": "deepseek_v3"}
    projections = 2 * n * 4 * (32 * 3 * 12 + 64 * 12 + 64 * 3)
    assert work.linear - flops(latent, n, "forward", mtp=False).linear == projections


@pytest.mark.parametrize("n", LENGTHS)
def test_a_recurrent_state_costs_every_token_the_same(n):
    state, convolution = 3 * 2 * 4 * 12 * 8, 2 * 3 * (2 * 2 * 12 + 4 * 8)
    work = flops(NEXT, n, "forward")
    whole = _seen(n, lambda query, key: True)
    assert work.attention_causal == 3 * n * (state + convolution) + PAIR * whole
    assert work.attention_full == 3 * n * (state + convolution) + PAIR * n * n


@pytest.mark.parametrize(
    "config", [LLAMA4, GPT_OSS, NEXT, V32 | {"index_topk": 10**6}], ids=lambda c: c["model_type"]
)
def test_reading_is_writing_token_by_token(config):
    n = 21
    read, written = flops(config, n, "forward", mtp=False), [decode_flops(config, i) for i in range(n)]
    assert read.linear == sum(work.linear for work in written)
    if not shapes(config).mla:  # decoding latent attention stays in the latent space
        assert read.attention_causal == sum(work.attention_causal for work in written)


@pytest.mark.parametrize("config", [NEXT, V32 | {"index_topk": 10**6}], ids=lambda c: c["model_type"])
def test_the_ledger_counts_as_the_plan(config):
    n = 21
    pairs = n * (n + 1) // 2
    counted = forward_flops(config, n, pairs, n) + mtp_flops(config, n, pairs, n) * bool(
        shapes(config).mtp_depth
    )
    assert counted == flops(config, n, "forward").model


def test_a_recurrent_state_is_held_once_a_sequence():
    assert state_bytes(NEXT) == 3 * 4 * 12 * 8 * 4
    assert state_bytes(GPT_OSS) == 0
    served = memory(NEXT, kind="serve", micro_tokens=64, seq_len=64, cache_tokens=5 * 64)
    assert served.cache == 5 * (64 * cache_bytes_per_token(NEXT) + state_bytes(NEXT))


def test_a_cache_holds_what_layers_read_again():
    assert cache_bytes_per_token(NEXT) == 1 * 2 * 2 * 16 * 2  # one layer in four attends
    assert cache_bytes_per_token(V32) == 4 * (24 + 8 + 12) * 2  # latent, rotated key, the indexer's key
    assert cache_bytes_per_token(LLAMA4 | {"head_dim": 16}) == 4 * 2 * 2 * 16 * 2
    assert cache_bytes_per_token(GPT_OSS | {"head_dim": 16}) == 4 * 2 * 2 * 16 * 2
