"""Decoding by compiled kernels against plain forward passes of the same network, for every part a network can have."""

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.engine import Engine, Request, Sampling
from farthing.engine.cache import PagedCache
from farthing.engine.compiled import lacks
from farthing.engine.quantize import quantize_
from farthing.model import Decoder, Mla, ModelConfig, Moe, kernels
from farthing.model.config import Rope
from farthing.train.optim import add_lora

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8,
}  # fmt: skip
MLA = Mla(q_lora_rank=None, kv_lora_rank=24, nope_dim=12, rope_dim=8, v_dim=10)
MOE = Moe(experts=8, top_k=3, expert_size=20, shared=1, first_dense=1)
PARTS = {
    "plain": {},
    "tied head": {"tied_head": True},
    "one key head": {"num_kv_heads": 1},
    "five query heads share a key head": {"num_heads": 10, "head_dim": 16},
    "wide heads": {"head_dim": 80},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "norms of heads": {"qk_norm": "head"},
    "norms of all heads": {"qk_norm": "all", "norms": "after"},
    "norms before and after": {"norms": "both", "centred_norms": True, "activation": "gelu", "embed_scale": 5.66},
    "bounded scores": {"softcap": 2.0, "logit_softcap": 3.0, "query_scale": 0.7},
    "sinks": {"sinks": True},
    "windows": {"window": 5, "sliding": (0,)},
    "windows with their own rotation": {"window": 20, "sliding": (1,), "local_rope": Rope(theta=100.0)},
    "part of a head rotates": {"rope": Rope(share=0.5)},
    "yarn": {"rope": Rope(kind="yarn", factor=4.0, original_max_positions=32, table_scale=1.1)},
    "sizes of no whole tile": {"hidden_size": 40, "intermediate_size": 23, "vocab_size": 101, "head_dim": 10},
    "latents": {"mla": MLA},
    "latents, compressed queries": {"mla": dataclasses.replace(MLA, q_lora_rank=20)},
    "latents, yarn": {"mla": MLA, "rope": Rope(kind="yarn", factor=4.0, score_scale=1.3)},
    "experts": {"moe": MOE},
    "experts in groups": {"moe": dataclasses.replace(MOE, groups=4, top_groups=2)},
    "experts in groups, by the best": {"moe": dataclasses.replace(MOE, groups=4, top_groups=2, bias=False)},
    "experts by softmax": {"moe": Moe(8, 2, 20, shared=0, scoring="softmax", bias=False, scale=1.7)},
    "experts with their own bias": {"moe": dataclasses.replace(MOE, router_bias=True, normalise=False)},
    "DeepSeek": {"mla": MLA, "moe": MOE, "mtp_depth": 2},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def needs_kernels():
    if why := lacks(network("plain"), 16):
        pytest.skip(why)


@contextmanager
def plain_torch():
    """Engines made here have no compiled network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FARTHING_KERNELS", "reference")
        kernels.forget()
        yield
    kernels.forget()


def network(parts, dtype=torch.float32):
    """A random network; small parameters are random too, so that none is forgotten."""
    config = ModelConfig(**{**SIZES, **(PARTS[parts] if isinstance(parts, str) else parts)})
    decoder = Decoder(config)
    decoder.init_weights(seed=5, std=0.3)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return decoder.to(dtype).eval()


@torch.no_grad()
def score(decoder, prompt, completion, temperature=1.0):
    logits = decoder(torch.tensor([[*prompt, *completion]]))[0].float() / temperature
    logprobs = logits.log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(completion)]


def prompts_of(lengths, vocabulary=61):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def errors(decoder, engine, prompts, new=20, temperature=1.0):
    """The largest difference of a sampled token's log-probability from a plain forward pass."""
    sampling = Sampling(max_new_tokens=new, temperature=temperature, seed=3)
    groups = engine.generate([Request(prompt, sampling, samples=2) for prompt in prompts])
    apart = [
        abs(a - b)
        for prompt, samples in zip(prompts, groups, strict=True)
        for sample in samples
        for a, b in zip(sample.logprobs, score(decoder, prompt, sample.ids, temperature), strict=True)
    ]
    return float(np.max(apart))  # NaN if there is one


@pytest.mark.parametrize("parts", PARTS)
def test_every_part_of_a_network_gives_the_same_log_probabilities(parts):
    decoder = network(parts)
    engine = Engine(decoder, max_batch=7, cache_tokens=1024)
    assert engine.network is not None
    assert errors(decoder, engine, prompts_of((1, 5, 16, 31))) < 2e-5


@pytest.mark.parametrize("parts", ["plain", "windows", "latents"])
def test_a_long_context_in_spans_that_threads_share(parts):
    decoder = network({**PARTS[parts], "window": 700 if parts == "windows" else None})
    engine = Engine(decoder, max_batch=2, cache_tokens=4096)
    assert errors(decoder, engine, prompts_of((1500,)), new=50) < 5e-5


@pytest.mark.parametrize("parts", ["plain", "latents", "DeepSeek"])
def test_bfloat16_weights_and_cache_stay_within_bfloat16s_rounding(parts):
    decoder = network(parts, torch.bfloat16)
    exact = Decoder(decoder.config)
    exact.load_state_dict(decoder.state_dict())
    engine = Engine(decoder, max_batch=4, cache_tokens=512)
    assert engine.network is not None
    assert errors(exact.eval(), engine, prompts_of((7, 20))) < 0.25  # the prompt is read in bfloat16


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("parts", ["plain", "biases", "experts", "DeepSeek", "sizes of no whole tile"])
def test_quantized_weights_are_near(parts, quantize):
    decoder = network(parts)
    engine = Engine(decoder, max_batch=4, cache_tokens=512, quantize=quantize)
    prompts = prompts_of((7, 20))
    sampling = Sampling(max_new_tokens=12, seed=3)
    found = [samples[0] for samples in engine.generate([Request(p, sampling) for p in prompts])]
    apart = [
        abs(a - b)
        for prompt, sample in zip(prompts, found, strict=True)
        for a, b in zip(sample.logprobs, score(decoder, prompt, sample.ids), strict=True)
    ]
    limit = {"int8": 0.15, "int4": 1.0}[quantize]  # of random weights; experts may be chosen otherwise
    assert sorted(apart)[len(apart) // 2] < limit
    assert max(apart) > 1e-5  # or nothing was quantized


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("parts", ["sizes of no whole tile", "biases", "wide heads", "experts", "DeepSeek"])
def test_prompts_and_decoding_read_the_same_rounded_weights(parts, quantize, monkeypatch):
    def single(config, pages, page_size, dtype, *more, **settings):
        """A cache in float32, so that only weights can differ."""
        return PagedCache(config, pages, page_size, torch.float32, *more, **settings)

    monkeypatch.setattr("farthing.engine.engine.PagedCache", single)
    decoder = network(parts)
    quantize_(decoder, quantize)
    engine = Engine(decoder, max_batch=4, cache_tokens=512, quantize=quantize)
    prompts = prompts_of((1, 7), decoder.config.vocab_size)
    assert errors(decoder, engine, prompts) < 0.005  # a row is rounded to 16 bits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e8])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_that_cannot_be_rounded_are_refused(value, quantize):
    decoder = network("plain")
    with torch.no_grad():
        decoder.layers[1].feedforward.down.weight[3, 5] = value
    with pytest.raises(
        UserError, match=f"32 x 48 is not finite or too large for {quantize}; .*exact weights"
    ):
        quantize_(decoder, quantize)


def test_rows_that_operations_share_are_enough_for_each():
    """Experts' rows are as wide as a layer's, but there are more of them."""
    engine = Engine(network("plain"), max_batch=2, cache_tokens=64)
    few, many = (engine.network._build.scratch("rows", 64, rows) for rows in (None, 50))
    assert few.first(2, 64).shape == (2, 64)
    assert many.first(50, 64).shape == (50, 64)


@pytest.mark.parametrize("speculate", [1, 2])
def test_guesses_change_no_token(speculate):
    decoder = network("DeepSeek")
    prompts = prompts_of((3, 18))
    requests = [Request(p, Sampling(max_new_tokens=25, seed=2), samples=2) for p in prompts]
    plain = Engine(decoder, max_batch=4, cache_tokens=512).generate(requests)
    engine = Engine(decoder, max_batch=4, cache_tokens=512, speculate=speculate)
    guessed = engine.generate(requests)
    assert engine.network is not None
    assert sum(engine.work.guessed.values()) > 0
    assert [s.ids for group in guessed for s in group] == [s.ids for group in plain for s in group]


def test_the_experts_of_every_token_are_recorded():
    decoder = network("experts")
    request = Request(prompts_of((9,))[0], Sampling(max_new_tokens=15, seed=2))
    (sample,) = Engine(decoder, max_batch=2, cache_tokens=256, record_routing=True).generate([request])[0]
    with plain_torch():
        engine = Engine(decoder, max_batch=2, cache_tokens=256, record_routing=True)
        assert engine.network is None
        (plain,) = engine.generate([request])[0]
    assert sample.ids == plain.ids
    assert torch.equal(sample.routes.sort(-1).values, plain.routes.sort(-1).values)


def test_changed_weights_are_packed_again():
    decoder = network("biases")
    engine = Engine(decoder, max_batch=4, cache_tokens=512)
    prompts = prompts_of((7,))
    assert errors(decoder, engine, prompts) < 2e-5
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(0.8)
    engine.take_weights(decoder, 1)
    assert errors(decoder, engine, prompts) < 2e-5


def test_low_rank_updates_are_not_rounded_to_the_folders_dtype():
    decoder = network("plain", torch.bfloat16).float()
    decoder.stored = torch.bfloat16
    add_lora(decoder, rank=4, alpha=8.0, seed=0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("lora.up"):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    assert errors(decoder, Engine(decoder, max_batch=4, cache_tokens=512), prompts_of((7,))) < 2e-5


def test_weights_in_other_memory_are_read_from_there():
    decoder = network("plain")
    engine = Engine(decoder, max_batch=4, cache_tokens=512)
    prompts = prompts_of((7,))
    assert errors(decoder, engine, prompts) < 2e-5
    decoder.load_state_dict(
        {name: 0.8 * tensor for name, tensor in decoder.state_dict().items()}, assign=True
    )
    engine.take_weights(decoder, 1)
    assert errors(decoder, engine, prompts) < 2e-5
    decoder.bfloat16()
    with pytest.raises(UserError, match=r"another dtype.*new engine"):
        engine.generate([Request(prompts[0], Sampling())])


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_tokens_are_drawn_as_torch_draws_them(temperature):
    """Truncated rows, which torch draws, stand beside rows that the kernel draws."""
    decoder = network("plain")
    settings = [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}]
    requests = [
        Request(prompt, Sampling(max_new_tokens=30, temperature=temperature, seed=n, **more))
        for n, (prompt, more) in enumerate(zip(prompts_of((3, 4, 5, 6)), settings, strict=True))
    ]
    compiled = Engine(decoder, max_batch=4, cache_tokens=512).generate(requests)
    with plain_torch():
        plain = Engine(decoder, max_batch=4, cache_tokens=512).generate(requests)
    for (a,), (b,) in zip(compiled, plain, strict=True):
        assert a.ids == b.ids
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=5e-5, rtol=0)
        assert a.entropy == pytest.approx(b.entropy, abs=5e-5)


@pytest.mark.hypothesis
@settings(max_examples=40)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2), (9, 3), (14, 2)]),
    head_dim=st.sampled_from([2, 6, 8, 16, 20, 32, 48]),
    hidden=st.integers(3, 80).map(lambda n: 2 * n),
    inner=st.integers(1, 150),
    vocabulary=st.integers(2, 700),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
)
def test_any_shape(heads, head_dim, hidden, inner, vocabulary, lengths):
    sizes = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": head_dim, "hidden_size": hidden}
    decoder = network({**sizes, "intermediate_size": inner, "vocab_size": vocabulary, "num_layers": 1})
    engine = Engine(decoder, max_batch=2 * len(lengths), cache_tokens=2048)
    assert errors(decoder, engine, prompts_of(lengths, vocabulary), new=6) < 1e-4


def test_quantizing_without_kernels_is_refused():
    with (
        plain_torch(),
        pytest.raises(
            UserError, match=r"int4 needs compiled kernels, .*FARTHING_KERNELS=reference.*exact weights"
        ),
    ):
        Engine(network("plain"), quantize="int4")
