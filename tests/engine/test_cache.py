"""The cache of latent attention: its size, and decoding through it equals full forward passes."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from farthing.engine import Engine, Request, Sampling
from farthing.engine.cache import Decode, PagedCache, Prefill
from farthing.model import Decoder, Segments

Deepseek = Callable[..., tuple[Decoder, dict[str, Any]]]


def greedy(decoder: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy decoding in the expanded form, recomputing the whole sequence for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_takes_one_latent_and_one_rotated_key_per_layer(
    small_deepseek: Deepseek, dtype: torch.dtype
) -> None:
    config = small_deepseek(num_nextn_predict_layers=2)[0].config
    size = torch.empty(0, dtype=dtype).element_size()
    device = torch.device("cpu")
    assert PagedCache(config, 4, 8, dtype, device).bytes_per_token == 3 * (32 + 8) * size
    assert PagedCache(config, 4, 8, dtype, device, modules=2).bytes_per_token == 5 * (32 + 8) * size
    cache = PagedCache(config, 4, 8, dtype, device, routing=True)
    assert cache.routes is not None
    assert cache.routes.shape == (4, 8, 2, 3)  # pages, tokens, layers with experts, experts per token


@torch.no_grad()
@pytest.mark.parametrize("q_lora_rank", [24, None])
@pytest.mark.parametrize("max_batch", [1, 4])
def test_greedy_equals_the_expanded_form_over_whole_sequences(
    small_deepseek: Deepseek, max_batch: int, q_lora_rank: int | None
) -> None:
    decoder, _ = small_deepseek(q_lora_rank=q_lora_rank)
    draw = torch.Generator().manual_seed(2)
    shared = torch.randint(0, 304, (9,), generator=draw).tolist()
    prompts = [torch.randint(0, 304, (n,), generator=draw).tolist() for n in (1, 3, 4, 5, 8, 13)]
    prompts += [[*shared, 1, 2], [*shared, 3], shared[:8]]
    news = [9, 1, 4, 5, 9, 3, 6, 7, 5]
    expected = [greedy(decoder, prompt, new) for prompt, new in zip(prompts, news, strict=True)]
    engine = Engine(decoder, max_batch=max_batch, cache_tokens=160, page_size=4)
    requests = [
        Request(prompt, Sampling(max_new_tokens=new, temperature=0))
        for prompt, new in zip(prompts, news, strict=True)
    ]
    for _ in range(2):  # the second time, every prompt's full pages are cached
        computed = engine.work.computed_tokens
        assert [samples[0].ids for samples in engine.generate(requests)] == expected
    assert engine.work.computed_tokens - computed < computed
    assert engine.cache.available == len(engine.cache.users)


@torch.no_grad()
@pytest.mark.parametrize("form", ["mla", "gqa"])
def test_several_new_tokens_attend_causally(small_deepseek: Deepseek, form: str) -> None:
    """Three tokens at once, in sequences of different lengths, against one pass over everything."""
    from dataclasses import replace

    decoder, _ = small_deepseek()
    if form == "gqa":
        decoder = Decoder(replace(decoder.config, mla=None, head_dim=16, num_kv_heads=2)).eval()
        decoder.init_weights(seed=5, std=0.15)
    cache = PagedCache(decoder.config, 12, 4, torch.float32, torch.device("cpu"))
    lengths, tables = [6, 1, 9], [[3, 0, 7], [5, 8], [1, 11, 2]]
    rows = [torch.randint(0, 304, (n + 3,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    prefill = Prefill(cache, tables, [(0, n) for n in lengths])
    decoder.hidden(
        torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)]), prefill.positions, prefill
    )
    attend = Decode(cache, tables, [range(n, n + 3) for n in lengths])
    got = decoder.hidden(torch.cat([row[-3:] for row in rows]), attend.positions, attend)
    whole = Segments([(len(row), ()) for row in rows])
    expected = decoder.hidden(torch.cat(rows), whole.positions(), whole)
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    wanted = torch.cat([expected[end - 3 : end] for end in ends.tolist()])
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)
    assert attend.pairs == sum(n + 1 + n + 2 + n + 3 for n in lengths)
