"""Speculative decoding against plain decoding: equal tokens in fewer passes."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.cost.flops import forward_flops, mtp_flops
from farthing.cost.meter import book_sampling
from farthing.engine import Engine, Request, Sample, Sampling
from farthing.engine.sequence import Running
from farthing.model import Decoder

Deepseek = Callable[..., tuple[Decoder, dict[str, Any]]]


def predictable(decoder: Decoder) -> Decoder:
    """Return the network changed to depend almost only on the last token, with modules that mostly guess its choices.

    Some guesses stay wrong, so that accepted runs of every length occur.
    """
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith((".o.weight", ".down", ".down.weight")):
                parameter.mul_(0.03)
        width = twin.config.hidden_size
        for depth in range(len(twin.mtp)):  # [embedding, hidden]: pass the embedding on
            twin.get_parameter(f"mtp.{depth}.join.weight").copy_(
                torch.cat([torch.eye(width), 0.01 * torch.ones(width, width)], 1)
            )
        twin.head.weight.mul_(3)  # more confident, so that sampling follows it too
    return twin


@pytest.fixture(scope="module", params=["mla", "gqa"])
def decoders(request: pytest.FixtureRequest, small_deepseek: Deepseek) -> dict[str, Decoder]:
    """A random network whose guesses are wrong and one whose guesses are mostly right, with three modules each."""
    random, _ = small_deepseek(num_hidden_layers=2, num_nextn_predict_layers=3)
    if request.param == "gqa":
        random = Decoder(replace(random.config, mla=None, head_dim=16, num_kv_heads=2)).eval()
        random.init_weights(seed=5, std=0.15)
    return {"random": random, "predictable": predictable(random)}


def requests(stop_ids: frozenset[int] = frozenset(), temperature: float = 0.0) -> list[Request]:
    draw = torch.Generator().manual_seed(3)
    shared = torch.randint(0, 304, (9,), generator=draw).tolist()
    made = []
    for number, (length, new, samples) in enumerate(
        [(1, 9, 2), (2, 1, 1), (3, 2, 1), (4, 13, 3), (8, 9, 2), (16, 7, 1), (21, 12, 1)]
    ):
        prompt = torch.randint(0, 304, (length,), generator=draw).tolist()
        if number in (4, 6):
            prompt = [*shared, *prompt]
        sampling = Sampling(max_new_tokens=new, temperature=temperature, seed=11, stop_ids=stop_ids)
        made.append(Request(prompt, sampling, samples, 10 * number))
    return made


def flat(lists: list[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def same(plain: list[list[Sample]], fast: list[list[Sample]]) -> None:
    for before, after in zip(flat(plain), flat(fast), strict=True):
        assert after.ids == before.ids
        assert after.finish_reason == before.finish_reason
        torch.testing.assert_close(after.logprobs, before.logprobs, atol=2e-4, rtol=0)
        assert after.entropy == pytest.approx(before.entropy, abs=2e-4)


@pytest.mark.parametrize("kind", ["random", "predictable"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_tokens_are_those_of_plain_decoding(
    decoders: dict[str, Decoder], kind: str, count: int, temperature: float
) -> None:
    decoder = decoders[kind]
    wanted = requests(temperature=temperature)
    plain = Engine(decoder, max_batch=8, cache_tokens=800, page_size=4)
    expected = plain.generate(wanted)
    stops = frozenset(sample.ids[len(sample.ids) // 2] for group in expected for sample in group)
    for max_batch, times in ((1, 1), (5, 2)):  # the second time, every prompt is cached
        engine = Engine(decoder, max_batch=max_batch, cache_tokens=160, page_size=4, speculate=count)
        for _ in range(times):
            same(expected, engine.generate(wanted))
        assert engine.cache.available == len(engine.cache.users)
        work = engine.work
        assert all(work.guessed[depth + 1] <= work.accepted[depth] for depth in range(count))
        if kind == "predictable":
            assert len(work.acceptance) == count
            assert all(share > 0.3 for share in work.acceptance)
            assert work.acceptance[0] < 1  # both kinds of guess occur
        else:
            assert work.acceptance[0] < 0.3
    stopping = requests(stops, temperature)
    engine = Engine(decoder, max_batch=3, cache_tokens=160, page_size=4, speculate=count)
    same(plain.generate(stopping), engine.generate(stopping))


@torch.no_grad()
def test_guesses_equal_those_of_a_full_pass(small_deepseek: Deepseek) -> None:
    """Every guess equals the one computed from scratch over the sequence so far."""
    from farthing.model import Segments

    decoder, _ = small_deepseek(num_nextn_predict_layers=2)
    decoder = predictable(decoder)
    engine = Engine(decoder, max_batch=4, page_size=4, speculate=2)
    assert engine.guesser is not None
    original, checked = engine.guesser.guess, 0

    def watched(sequences: list[Running], work: Any) -> None:
        nonlocal checked
        original(sequences, work)
        for s in sequences:
            ids = [*s.prompt, *s.sample.ids]
            context = torch.tensor(ids[: s.length])
            attend, positions = Segments([(s.length, ())]), torch.arange(s.length)
            hidden = decoder.hidden(context, positions, attend)
            for depth, guess in enumerate(s.guesses):
                after = torch.tensor([*ids, *s.guesses][depth + 1 : depth + 1 + s.length])
                hidden = decoder.mtp_hidden(depth, after, hidden, positions, attend)
                logits = decoder.logits(hidden[-1:])[0]
                assert float(logits.max() - logits[guess]) < 1e-4
                checked += 1

    engine.guesser.guess = watched  # type: ignore[assignment, method-assign]
    prompts = [
        torch.randint(0, 304, (n,), generator=torch.Generator().manual_seed(n)) for n in (1, 2, 4, 7, 13)
    ]
    engine.generate([Request(p.tolist(), Sampling(max_new_tokens=12, temperature=0)) for p in prompts])
    assert checked > 40


def test_routes_are_those_of_plain_decoding(small_deepseek: Deepseek) -> None:
    decoder, _ = small_deepseek()
    decoder = predictable(decoder)
    plain, fast = (
        Engine(decoder, max_batch=4, page_size=4, record_routing=True, speculate=count).generate(requests())
        for count in (0, 1)
    )
    for before, after in zip(flat(plain), flat(fast), strict=True):
        assert before.routes is not None
        assert after.routes is not None
        assert torch.equal(after.routes.sort(-1).values, before.routes.sort(-1).values)


def test_a_stream_yields_several_tokens_at_once(small_deepseek: Deepseek) -> None:
    decoder = predictable(small_deepseek()[0])
    request = Request([3, 1, 4], Sampling(max_new_tokens=30, temperature=0))
    plain = Engine(decoder).generate([request])[0][0].ids
    pieces = list(Engine(decoder, speculate=1).stream(request))
    assert flat(pieces) == plain
    assert len(pieces) < 25


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=6),
    st.integers(1, 2),
)
def test_speculation_needs_no_more_cache_and_loses_no_page(
    small_deepseek: Deepseek, shapes: list[tuple[int, int, int]], count: int
) -> None:
    decoder, _ = small_deepseek(num_hidden_layers=1, num_nextn_predict_layers=2)
    engine = Engine(decoder, max_batch=5, cache_tokens=29, page_size=4, speculate=count)
    made = [Request([7] * n, Sampling(max_new_tokens=new), samples) for n, new, samples in shapes]
    assert [len(group) for group in engine.generate(made)] == [samples for _, _, samples in shapes]
    assert engine.cache.available == len(engine.cache.users)
    assert all(users == 0 for users in engine.cache.users)


def test_the_modules_work_is_booked(small_deepseek: Deepseek) -> None:
    decoder, hf = small_deepseek(num_nextn_predict_layers=2)
    engine = Engine(decoder, page_size=4, speculate=1)
    prompt, new = 10, 3
    engine.generate([Request(list(range(prompt)), Sampling(max_new_tokens=new, temperature=0))])
    assert sum(engine.work.accepted.values()) == 0, "the guesses of a random module are wrong"
    assert (engine.guessed, engine.accepted) == (sum(engine.work.guessed.values()), 0)
    # two steps of two tokens each, after the prompt; the module reads the prompt, and two tokens before each step
    steps = [(10, 11), (11, 12)]
    decode = sum(at + 1 for step in steps for at in step)
    module = sum(at + 1 for at in (8, 9, 9, 10))
    span = SimpleNamespace(tokens_in=0, tokens_out=0, flops=0)
    book_sampling(span, engine.done(), hf)  # type: ignore[arg-type]
    expected = forward_flops(hf, prompt + 4, prompt * (prompt + 1) // 2, 1 + 4)
    expected += forward_flops(hf, 0, decode, 0, absorbed=True)
    one = {**hf, "num_nextn_predict_layers": 1}
    expected += mtp_flops(one, prompt + 4, prompt * (prompt + 1) // 2, 2)
    expected += mtp_flops(one, 0, module, 0, absorbed=True)
    assert span.flops == expected
    assert (span.tokens_in, span.tokens_out) == (prompt, new)


def test_more_guesses_than_modules_are_refused(small_deepseek: Deepseek) -> None:
    decoder, _ = small_deepseek()
    with pytest.raises(UserError, match="speculate is 2, but the model has 1"):
        Engine(decoder, speculate=2)
    with pytest.raises(UserError, match="speculate is -1"):
        Engine(decoder, speculate=-1)
