"""Routing replay: the trainer sends every token to the experts that the sampler sent it to."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farthing.base.device import Alone
from farthing.cost.meter import Meter
from farthing.data.overlap import HeldOut
from farthing.engine import Engine, Model, Request, Sampling
from farthing.model import Decoder, ModelConfig
from farthing.model.moe import Routing, routers
from farthing.recipe import Grpo
from farthing.stages.grpo import train_grpo
from farthing.tasks import Item, Verdict
from farthing.tasks.rewards.beside import Beside
from farthing.train.grpo import Answer, Learner, Pass, layout, passes, replay
from farthing.train.loop import Progress
from farthing.train.optim import MasterWeights
from farthing.train.rollout import Group

Make = Callable[..., Grpo]
Deepseek = Callable[..., tuple[Decoder, dict[str, Any]]]


class Judge:
    """Finds every second answer right, whatever it says."""

    asking = Beside()

    def verify(self, pairs: Sequence[tuple[Item, str]], convention: str) -> list[Verdict]:
        return [Verdict("right" if number % 2 else "wrong") for number in range(len(pairs))]


def sample_groups(decoder: Decoder, *, record: bool = True, questions: int = 4) -> list[Group]:
    """Groups of six answers by the engine, some prompts beginning alike; every second answer is called right."""
    engine = Engine(decoder, max_batch=5, cache_tokens=640, page_size=4, record_routing=record)
    shared = torch.randint(0, 304, (9,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [[*shared, number, number + 7][: 11 - number % 2] for number in range(questions)]
    requests = [
        Request(p, Sampling(max_new_tokens=24, temperature=1.0, seed=2), 6, 6 * n)
        for n, p in enumerate(prompts)
    ]
    item = Item("chain_sum", 0, 0, "question", "1", {"scorer": "integer"})
    return [
        Group(item, prompt, samples, ["right", "wrong"] * 3)
        for prompt, samples in zip(prompts, engine.generate(requests), strict=True)
    ]


@pytest.fixture
def learn(meter: Meter, make_stage: Make) -> Callable[..., dict[str, Any]]:
    """A function that learns one step from groups without moving the weights: gives the metrics."""

    def run(decoder: Decoder, hf: dict[str, Any], groups: list[Group], **stage: Any) -> dict[str, Any]:
        from farthing.train.rollout import Batch

        chosen = make_stage(**{"max_new_tokens": 24, "max_grad_norm": 1e9, "sync_tolerance": 9.0} | stage)
        weights = MasterWeights(decoder, "adamw", 0.0, (0.9, 0.95), 0.0)
        try:
            return Learner(chosen, decoder, None, weights, hf, meter, Alone("cpu")).learn(
                Batch(groups, groups), 0
            )
        finally:
            for hook in weights.hooks:
                hook.remove()

    return run


def test_in_float32_sampler_and_trainer_agree(
    small_deepseek: Deepseek, learn: Callable[..., dict[str, Any]]
) -> None:
    decoder, hf = small_deepseek()
    groups = sample_groups(decoder)
    metrics = learn(decoder, hf, groups)
    assert metrics["sync_max"] < 1e-3
    assert metrics["grad_norm"] > 0
    for group in groups:  # send every token to the next expert: that the routes are obeyed must show
        for sample in group.samples:
            assert sample.routes is not None
            sample.routes = (sample.routes + 1) % 8
    assert learn(decoder, hf, groups)["sync_mean"] > 0.1


def test_in_bfloat16_replay_takes_away_what_other_experts_would_add(
    small_deepseek: Deepseek, learn: Callable[..., dict[str, Any]]
) -> None:
    decoder, hf = small_deepseek(num_hidden_layers=6, n_routed_experts=32, n_group=1, topk_group=1)
    decoder.bfloat16()
    with_replay = learn(decoder, hf, sample_groups(decoder))
    without = learn(decoder, hf, sample_groups(decoder, record=False))
    assert with_replay["sync_mean"] < 0.1
    assert without["sync_mean"] > 1.5 * with_replay["sync_mean"]
    assert without["sync_max"] > 1.5 * with_replay["sync_max"]


@torch.no_grad()
def test_recorded_routes_are_those_of_a_plain_forward(small_deepseek: Deepseek) -> None:
    decoder, _ = small_deepseek()
    for group in sample_groups(decoder):
        for sample in group.samples:
            ids = [*group.prompt, *sample.ids[:-1]]
            assert sample.routes is not None
            assert sample.routes.dtype == torch.uint8
            assert sample.routes.shape == (len(ids), 2, 3)
            routing = Routing()
            one = Pass([(group.prompt, [Answer(sample.ids[:-1], [], 0.0, 0.0)])])
            flat, segments, _, _ = layout(one)
            assert flat.tolist() == ids
            decoder.hidden(flat, segments.positions(), segments, routing)
            for number, layer in enumerate((1, 2)):
                got = sample.routes[:, number].long().sort(-1).values
                assert torch.equal(got, routing.chosen[layer].sort(-1).values)


lengths = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)


@settings(max_examples=40)
@given(lengths, st.integers(1, 40))
def test_every_row_of_a_pass_gets_its_own_token_s_experts(
    small_deepseek: Deepseek, shapes: list[tuple[int, list[int]]], budget: int
) -> None:
    config: ModelConfig = small_deepseek()[0].config

    def routes_of(ids: list[int]) -> Tensor:  # a token's id, in two layers and three places
        return torch.tensor(ids)[:, None, None] + torch.tensor([0, 50])[:, None] + torch.tensor([0, 100, 150])

    prepared, fresh = [], iter(range(10_000))
    for length, counts in shapes:
        prompt = [next(fresh) for _ in range(length)]
        completions = [[next(fresh) for _ in range(count)] for count in counts]
        prepared.append(
            (prompt, [Answer(ids, [], 0.0, 0.0, routes_of([*prompt, *ids[:-1]])) for ids in completions])
        )
    for one in passes(prepared, budget):
        ids, segments, rows, _ = layout(one)
        routing = replay(one, config)
        assert routing is not None
        assert routing.replay is not None
        assert set(routing.replay) == {1, 2}
        lasts, at = set(), 0
        for prompt, answers in one.prompts:
            at += len(prompt)
            for answer in answers:
                at += len(answer.ids)
                lasts.add(at - 1)
        assert not lasts & set(rows.tolist())
        for number, layer in enumerate((1, 2)):
            assert routing.replay[layer].shape == (segments.tokens, 3)
            for row, token in enumerate(ids.tolist()):
                if row not in lasts:
                    assert torch.equal(routing.replay[layer][row], routes_of([token])[0, number])


def test_without_routes_nothing_is_replayed(small_deepseek: Deepseek) -> None:
    decoder, _ = small_deepseek()
    assert all(sample.routes is None for g in sample_groups(decoder, record=False) for sample in g.samples)
    assert replay(Pass([([1], [Answer([2], [0.0], 1.0, 1.0)])]), decoder.config) is None


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
def test_a_stage_on_a_mixture_of_experts(
    small_deepseek: Deepseek,
    tiny_model: Path,
    make_stage: Make,
    meter: Meter,
    tmp_path: Path,
    dtype: torch.dtype,
    largest: float,
) -> None:
    from farthing.weights import save_decoder

    decoder, hf = small_deepseek()
    folder = save_decoder(decoder, hf, tmp_path / "deepseek", tokenizer_from=tiny_model)
    model = Model(folder, dtype)
    before = {name: p.detach().clone() for name, p in model.decoder.named_parameters()}
    stage = make_stage(steps=3, prompts=2, group=4, drop_silent=False, optimizer="muon", max_new_tokens=12)
    train_grpo(
        stage, model, tmp_path / "run", seed=3, held_out=HeldOut(), pool=Judge(), meter=meter, ranks=Alone("cpu"),  # type: ignore[arg-type]
        progress=Progress(),
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    proved = [line["sync_max"] for line in lines if line["sync_max"] is not None]
    assert proved
    assert max(proved) < largest
    still = {name for name, p in model.decoder.named_parameters() if torch.equal(p, before[name])}
    biases = {name for name in before if name.endswith("router.bias")}
    assert len(biases) == 3
    assert biases <= still
    assert sum(1 for _ in routers(model.decoder)) == 3
    modules = {name for name in before if name.startswith("mtp.")}
    assert modules <= still  # no gradient reaches them: they stay as they were
    assert not {n for n in still - biases - modules if "expert" in n or "router.weight" in n}
