"""The engine against plain forward passes: caching, sharing and scheduling must not change its output."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.engine import Engine, Request, Sampling
from farthing.model import Decoder, ModelConfig

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    tied_head=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def decoder():
    model = Decoder(CONFIG)
    model.init_weights(seed=5, std=0.3)
    return model.eval()


def greedy(decoder, ids, count):
    """Greedy decoding that recomputes the whole sequence for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def score(decoder, prompt, completion, temperature=1.0):
    logits = decoder(torch.tensor([[*prompt, *completion]]))[0] / temperature
    logprobs = logits.log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(completion)]


@torch.no_grad()
@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_greedy_equals_plain_decoding_in_a_mixed_batch(decoder, max_batch):
    torch.manual_seed(0)
    shared = torch.randint(0, 61, (9,)).tolist()
    prompts = [torch.randint(0, 61, (n,)).tolist() for n in (1, 4, 5, 17, 30)] + [
        [*shared, 1, 2],
        [*shared, 3],
    ]
    engine = Engine(decoder, max_batch=max_batch, cache_tokens=400, page_size=4)
    news = [3, 12, 1, 7, 20, 9, 9]
    requests = [
        Request(p, Sampling(max_new_tokens=n, temperature=0)) for p, n in zip(prompts, news, strict=True)
    ]
    for _ in range(2):  # the second time, every prompt is cached
        for prompt, new, (sample,) in zip(prompts, news, engine.generate(requests), strict=True):
            assert sample.ids == greedy(decoder, prompt, new)
            torch.testing.assert_close(sample.logprobs, score(decoder, prompt, sample.ids), atol=1e-4, rtol=0)
    assert engine.cache.available == len(engine.cache.users)


@torch.no_grad()
def test_samples_do_not_depend_on_the_batch_they_ran_in(decoder):
    prompt = list(range(10))
    sampling = Sampling(max_new_tokens=15, temperature=1.3, seed=4)
    together = Engine(decoder, max_batch=8, page_size=4).generate([Request(prompt, sampling, samples=6)])[0]
    narrow = Engine(decoder, max_batch=2, page_size=4).generate([Request(prompt, sampling, samples=6)])[0]
    alone = [
        Engine(decoder, max_batch=1, page_size=4).generate([Request(prompt, sampling, first_sample=i)])[0][0]
        for i in range(6)
    ]
    assert [s.ids for s in together] == [s.ids for s in narrow] == [s.ids for s in alone]
    assert len({tuple(s.ids) for s in together}) > 1
    for sample in together:
        torch.testing.assert_close(
            sample.logprobs, score(decoder, prompt, sample.ids, 1.3), atol=1e-4, rtol=0
        )


def test_prompt_is_computed_once_for_its_samples(decoder):
    engine = Engine(decoder, max_batch=8, page_size=4)
    engine.generate([Request(list(range(20)), Sampling(max_new_tokens=1), samples=8)])
    assert engine.work.computed_tokens == 20
    assert engine.work.prompt_tokens == 160
    engine.generate([Request([*range(20), 7], Sampling(max_new_tokens=1))])
    assert engine.work.computed_tokens == 21


@torch.no_grad()
def test_new_weights_are_used_after_take_weights(decoder):
    changed = Decoder(CONFIG)
    changed.init_weights(seed=5, std=0.3)
    engine = Engine(changed, page_size=4)
    request = Request(list(range(12)), Sampling(max_new_tokens=6, temperature=0))
    before = engine.generate([request])[0][0].ids
    assert before == greedy(changed, request.ids, 6)
    for parameter in changed.parameters():
        if parameter.dim() == 2:
            parameter.add_(torch.randn_like(parameter) * 0.5)
    engine.take_weights(changed, 1)
    after = engine.generate([request])[0][0].ids
    assert after == greedy(changed, request.ids, 6)
    assert after != before


@torch.no_grad()
def test_bfloat16_repacks_after_an_update(decoder):
    model = Decoder(CONFIG).to(torch.bfloat16)
    model.init_weights(seed=5, std=0.3)
    ids = torch.arange(8)[None]
    model(ids)
    model.layers[0].feedforward.down.weight.mul_(-3)
    fresh = Decoder(CONFIG).to(torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids), fresh(ids), atol=0, rtol=0)


def test_stop_ids_stop_strings_and_streaming(decoder):
    request = Request([3, 1, 4], Sampling(max_new_tokens=30, temperature=1.0, seed=9))
    engine = Engine(decoder, decode=lambda ids: "".join(chr(65 + i) for i in ids))
    ids = engine.generate([request])[0][0].ids
    stop = Sampling(max_new_tokens=30, temperature=1.0, seed=9, stop_ids=frozenset([ids[10]]))
    sample = engine.generate([Request([3, 1, 4], stop)])[0][0]
    cut = ids.index(ids[10]) + 1
    assert sample.ids == ids[:cut]
    assert sample.finish_reason == "stop"
    text = "".join(chr(65 + i) for i in ids[4:6])
    strings = Sampling(max_new_tokens=30, temperature=1.0, seed=9, stop=(text,))
    assert len(engine.generate([Request([3, 1, 4], strings)])[0][0].ids) <= 6
    streamed = list(engine.stream(request))
    assert [token for piece in streamed for token in piece] == ids
    assert len(streamed) == 30
    half = engine.stream(request)
    next(half)
    half.close()
    assert engine.cache.available == len(engine.cache.users)


def test_a_prompt_that_cannot_fit_is_refused(decoder):
    engine = Engine(decoder, cache_tokens=32)
    with pytest.raises(UserError, match="the cache holds 32"):
        engine.generate([Request(list(range(30)), Sampling(max_new_tokens=10))])
    with pytest.raises(UserError, match="empty"):
        engine.generate([Request([], Sampling())])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=6))
def test_pages_are_never_lost(decoder, shapes):
    engine = Engine(decoder, max_batch=5, cache_tokens=64, page_size=4)
    requests = [
        Request([7] * length, Sampling(max_new_tokens=new, stop_ids=frozenset(range(9))), samples=count)
        for length, new, count in shapes
    ]
    results = engine.generate(requests)
    assert [len(r) for r in results] == [count for _, _, count in shapes]
    assert engine.cache.available == len(engine.cache.users)
    assert all(users == 0 for users in engine.cache.users)


def test_an_interrupted_prefill_releases_its_pages(decoder, monkeypatch):
    engine = Engine(decoder, cache_tokens=64, page_size=4)
    request = Request(list(range(20)), Sampling(max_new_tokens=4), samples=3)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.scheduler, "prefill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([request])
    monkeypatch.undo()
    assert engine.cache.available == len(engine.cache.users)
    assert len(engine.generate([request])[0]) == 3


@torch.no_grad()
def test_a_request_without_room_waits_for_an_open_stream(decoder):
    request = Request(list(range(10)), Sampling(max_new_tokens=20, temperature=0))
    expected = greedy(decoder, request.ids, 20)
    engine = Engine(decoder, cache_tokens=32, page_size=4)  # room for one of them
    stream = engine.stream(request)
    streamed = list(next(stream))
    assert engine.generate([request])[0][0].ids == expected
    assert streamed + [token for piece in stream for token in piece] == expected  # it continued meanwhile
    assert engine.cache.available == len(engine.cache.users)


@torch.no_grad()
def test_requests_come_and_go_while_others_run(decoder):
    engine = Engine(decoder, max_batch=3, cache_tokens=200, page_size=4)
    scheduler = engine.scheduler
    wanted = [([1, 2, 3], 9), ([4] * 12, 5), ([5, 6], 14), ([1, 2, 3, 4, 5], 7), ([9], 3)]
    jobs, finished = [], []
    for number, (prompt, new) in enumerate(wanted):
        jobs.append(engine.add(Request(prompt, Sampling(max_new_tokens=new, temperature=0))))
        for _ in range(number):
            finished += scheduler.step()
    scheduler.cancel(jobs[2])
    while scheduler.waiting or scheduler.running:
        finished += scheduler.step()
    for job, (prompt, new) in zip(jobs, wanted, strict=True):
        assert job.done == (job is not jobs[2])
        count = len(job.samples[0].ids)
        assert job.samples[0].ids == greedy(decoder, prompt, count)[:count]
        assert count == new or job is jobs[2]
    assert {id(s.job) for s in finished} == {id(job) for job in jobs if job is not jobs[2]}
    assert engine.cache.available == len(engine.cache.users)
    assert scheduler.step() == []  # nothing to do


def test_work_is_reported_once(decoder):
    engine = Engine(decoder, page_size=4)
    engine.generate([Request([1, 2, 3], Sampling(max_new_tokens=4))])
    work = engine.done()
    assert (work.prompt_tokens, work.new_tokens) == (3, 4)
    assert engine.done().new_tokens == 0


def test_too_many_positions_are_refused(decoder):
    engine = Engine(decoder, cache_tokens=8192)
    with pytest.raises(UserError, match="the model supports 2048"):
        engine.generate([Request([1] * 2040, Sampling(max_new_tokens=9))])


def test_a_stop_string_may_take_several_tokens_per_letter(decoder):
    """With a token per byte, 12 letters of 3 bytes take 36 tokens, all of which must be decoded to find them."""
    engine = Engine(decoder, decode=lambda ids: "日" * (len(ids) // 3))
    sampling = Sampling(max_new_tokens=50, stop=("日" * 12,))
    [[sample]] = engine.generate([Request([3, 1, 4], sampling)])
    assert sample.finish_reason == "stop"
    assert len(sample.ids) == 36


def test_a_model_that_has_generated_can_be_copied(decoder):
    model = Decoder(CONFIG).to(torch.bfloat16)
    model.init_weights(seed=5, std=0.3)
    with torch.no_grad():
        before = model(torch.arange(8)[None])
        again = copy.deepcopy(model)(torch.arange(8)[None])
    torch.testing.assert_close(again, before, atol=0, rtol=0)


@pytest.mark.parametrize("page_size", [4, 16])  # torch's path, and the compiled one
def test_sampling_settings_reach_every_token(decoder, page_size):
    request = Request([3, 1, 4], Sampling(max_new_tokens=12, temperature=0))
    engine = Engine(decoder, stop_ids=frozenset(range(61)), page_size=page_size)

    def ids(**settings):
        sampling = Sampling(max_new_tokens=12, temperature=0, ignore_eos=True, **settings)
        [[sample]] = engine.generate([Request([3, 1, 4], sampling)])
        assert len(sample.top) == (12 if settings.get("top_logprobs") else 0)
        torch.testing.assert_close(
            sample.logprobs, score(decoder, request.ids, sample.ids), atol=1e-4, rtol=0
        )
        for token, logprob, top in zip(sample.ids, sample.logprobs, sample.top, strict=False):
            assert top[0] == (token, pytest.approx(logprob, abs=1e-5))
        return sample.ids

    with torch.no_grad():
        assert len(engine.generate([request])[0][0].ids) == 1  # stops at once
        plain = ids()
        assert plain == ids(top_logprobs=3) == greedy(decoder, request.ids, 12)
        assert ids(logit_bias=((17, 100.0),)) == [17] * 12
        assert len(set(ids(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=9.0))) > len(
            set(plain)
        )
    with pytest.raises(UserError, match="logit_bias has the token 61; the model's are 0 to 60"):
        ids(logit_bias=((61, 1.0),))
