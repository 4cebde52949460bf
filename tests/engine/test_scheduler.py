"""Requests that come and go: chunks, pages taken as samples grow, owners in turn. None of it may change an output."""

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.engine import Engine, Request, Sampling
from farthing.engine.sequence import Job
from farthing.model import Decoder, ModelConfig
from tests.engine.soundness import check_empty, check_sound

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    tied_head=True,
)  # fmt: skip


class Steps:
    """A constraint: each token lies a few above the last, modulo 32; done after `count`."""

    def __init__(self, count: int) -> None:
        self.count, self.last, self.taken = count, 0, list[int]()

    def mask(self) -> np.ndarray | None:
        words = np.zeros(10, np.uint32)  # as many as the largest vocabulary here takes
        for step in range(1, 6):
            words[0] |= np.uint32(1 << (self.last + step) % 32)
        return words.view(np.int32)

    def take(self, token: int) -> None:
        assert (token - self.last) % 32 in range(1, 6)
        self.last = token
        self.taken.append(token)

    @property
    def done(self) -> bool:
        return len(self.taken) >= self.count


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    model = Decoder(CONFIG)
    model.init_weights(seed=5, std=0.3)
    return model.eval()


@pytest.fixture(autouse=True)
def small_pieces() -> Iterator[None]:
    with mock.patch("farthing.engine.scheduler.PIECE", 2):
        yield


def serving(decoder: Decoder, **more: int) -> Engine:
    sizes = {"max_batch": 4, "cache_tokens": 80, "page_size": 4, "prefill_tokens": 6} | more
    return Engine(decoder, reserve=False, **sizes)  # type: ignore[arg-type]


def finish(engine: Engine) -> None:
    for _ in range(3000):
        engine.step()
        check_sound(engine)
        if not (engine.scheduler.running or engine.scheduler.waiting):
            return
    raise AssertionError("the engine does not come to an end")


def alone(decoder: Decoder, job: Job) -> list[list[int]]:
    request = job.request
    engine = Engine(decoder, max_batch=1, cache_tokens=400, page_size=4)
    return [sample.ids for sample in engine.generate([request])[0]]


BEGINNINGS = [[], [7] * 9, [7] * 9 + [3, 1, 4, 1], list(range(20, 33))]
requests = st.builds(
    lambda beginning, tail, samples, owner, new, temperature, penalty, constraint, scored, seed: Request(
        BEGINNINGS[beginning] + tail,
        Sampling(new, temperature, seed=seed, top_p=0.9, frequency_penalty=penalty),
        samples,
        owner=owner,
        score_prompt=scored,
        constrain=(lambda: Steps(constraint)) if constraint else None,
    ),
    st.integers(0, 3),
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from("abc"),
    st.integers(1, 25),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 1.5]),
    st.sampled_from([0, 0, 7]),
    st.booleans(),
    st.integers(0, 3),
)
events = st.lists(
    st.tuples(requests, st.integers(0, 12), st.sampled_from([False, False, True])), min_size=1, max_size=7
)


def check_events(decoder: Decoder, engine: Engine, given_: list[tuple[Request, int, bool]]) -> None:
    """Add requests with some steps after each, cancel some of them, and compare the rest with what each gets alone."""
    jobs, cancelled = [], []
    for request, steps, cancels in given_:
        jobs.append(engine.add(request))
        for _ in range(steps):
            engine.step()
            check_sound(engine)
        if cancels:
            cancelled.append(jobs[len(jobs) // 2])
            engine.cancel(cancelled[-1])
            check_sound(engine)
    finish(engine)
    check_empty(engine)
    for job in jobs:
        if job in cancelled:
            continue
        assert [sample.ids for sample in job.samples] == alone(decoder, job)
        assert job.done
        if job.request.score_prompt:
            ids = torch.tensor([list(job.request.ids)])
            with torch.no_grad():
                expected = decoder(ids)[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            assert job.prompt_logprobs[0] is None
            torch.testing.assert_close(
                torch.tensor(job.prompt_logprobs[1:]), expected, atol=1e-4, rtol=0, check_dtype=False
            )


@settings(max_examples=40, deadline=None)
@given(events)
def test_whatever_comes_and_goes_an_answer_is_the_one_given_alone(
    decoder: Decoder, given_: list[tuple[Request, int, bool]]
) -> None:
    check_events(decoder, serving(decoder), given_)


@settings(max_examples=15, deadline=None)
@given(events, st.integers(0, 2))
def test_so_it_is_with_latent_attention_experts_and_guesses(
    small_deepseek, given_: list[tuple[Request, int, bool]], speculate: int
) -> None:
    decoder, _ = small_deepseek(num_nextn_predict_layers=2)
    check_events(decoder, serving(decoder, speculate=speculate, record_routing=True), given_)


def test_samples_put_back_for_others_lose_nothing(decoder: Decoder) -> None:
    engine = serving(decoder, cache_tokens=48)
    jobs = [
        engine.add(Request([5, number], Sampling(30, seed=number), owner=owner))
        for number, owner in enumerate("aab")
    ]
    finish(engine)
    assert engine.scheduler.preemptions > 0
    assert [[s.ids for s in job.samples] for job in jobs] == [alone(decoder, job) for job in jobs]
    check_empty(engine)


def test_a_long_prompt_is_read_in_turns_with_decoding(decoder: Decoder) -> None:
    engine = serving(decoder, cache_tokens=400)
    stream = engine.add(Request([1, 2], Sampling(60, temperature=0)))
    engine.step()
    long = engine.add(Request(list(range(60)) * 2, Sampling(3, temperature=0)))
    lengths = []
    while not long.samples[0].ids:
        engine.step()
        lengths.append(len(stream.samples[0].ids))
    assert len(lengths) >= 2 * 120 // 6 - 1
    assert max(later - first for first, later in zip(lengths, lengths[2:], strict=False)) == 1
    assert min(later - first for first, later in zip(lengths, lengths[2:], strict=False)) == 1
    finish(engine)
    assert [s.ids for s in long.samples] == alone(decoder, long)


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one(decoder: Decoder) -> None:
    engine = serving(decoder, cache_tokens=400)
    long = engine.add(Request(list(range(60)) * 2, Sampling(3)))
    engine.step()
    short = engine.add(Request([9, 8, 7], Sampling(1)))
    for _ in range(3):
        engine.step()
    assert short.done
    assert not long.samples[0].ids


def test_owners_share_the_batch_evenly(decoder: Decoder) -> None:
    engine = serving(decoder, cache_tokens=600)
    greedy = [engine.add(Request([1, n], Sampling(40), owner="many")) for n in range(20)]
    for _ in range(12):
        engine.step()
    assert sum(s.owner == "many" for s in engine.scheduler.running) == 4
    other = [engine.add(Request([2, n], Sampling(10), owner="few")) for n in range(3)]
    for _ in range(60):
        engine.step()
    assert all(
        job.done for job in other
    )  # in about the time of 30 tokens; 20 x 40 of the other's came before them
    assert not all(job.done for job in greedy)
    finish(engine)
    assert all(len(job.samples[0].ids) == 40 for job in greedy)


def test_few_overtake_a_request_that_has_no_room(decoder: Decoder) -> None:
    engine = serving(decoder, max_batch=8, cache_tokens=80)
    holds = engine.add(Request([1] * 30, Sampling(40)))
    engine.step()
    large = engine.add(Request(list(range(60)), Sampling(4)))
    small = [engine.add(Request([2, n], Sampling(3))) for n in range(30)]
    while not holds.done:
        engine.step()
        check_sound(engine)
    assert any(job.done for job in small)
    assert not large.samples[0].ids
    finish(engine)
    assert large.overtaken <= 16
    assert large.done


def test_cancelling_frees_pages_wherever_a_request_is(decoder: Decoder) -> None:
    engine = serving(decoder)
    running, reading, waits = (
        engine.add(Request([number] * length, Sampling(20))) for number, length in enumerate((5, 40, 60))
    )
    while not running.samples[0].ids:
        engine.step()
    assert [prompt.job for prompt in engine.scheduler.prompts] == [reading]
    assert waits in engine.scheduler.waiting
    for job in (waits, reading, running, running):
        engine.cancel(job)
        check_sound(engine)
    check_empty(engine)


def test_a_conversation_reads_only_what_is_new(decoder: Decoder) -> None:
    engine = serving(decoder, cache_tokens=200)
    first = engine.add(Request(list(range(13)), Sampling(20, temperature=0)))
    finish(engine)
    assert first.cached == 0
    conversation = [*range(13), *first.samples[0].ids, 50, 51]
    second = engine.add(Request(conversation, Sampling(5, temperature=0)))
    finish(engine)
    assert second.cached == 32  # all whole pages of the 33 that the network had seen, less the last token
    assert [s.ids for s in second.samples] == alone(decoder, second)
    assert engine.scheduler.found == 32


def test_nothing_is_remembered_across_new_weights(decoder: Decoder) -> None:
    engine = serving(decoder, cache_tokens=200)
    engine.add(Request(list(range(13)), Sampling(20, temperature=0)))
    for _ in range(6):
        engine.step()
    engine.take_weights(decoder, 1)
    finish(engine)
    assert not engine.cache._known


def test_a_failing_pass_leaves_prompts_to_be_read_again(decoder: Decoder) -> None:
    engine = serving(decoder)
    job = engine.add(Request(list(range(20)), Sampling(4, temperature=0), samples=2))
    engine.step()
    with (
        mock.patch.object(engine.scheduler, "prefill", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        engine.step()
    finish(engine)
    assert [s.ids for s in job.samples] == alone(decoder, job)
