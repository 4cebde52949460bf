"""GRPO: every token once and rightly predicted, and gradients equal to those worked out sequence by
sequence."""

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farthing.base.device import Alone
from farthing.cost.devices import Device
from farthing.cost.meter import Meter
from farthing.engine import Sample
from farthing.model import Decoder
from farthing.recipe import Grpo
from farthing.tasks import Item
from farthing.train.grpo import Answer, Learner, layout, passes, prepare
from farthing.train.loop import Diverged
from farthing.train.losses import advantages, token_logprobs
from farthing.train.optim import MasterWeights
from farthing.train.rollout import Batch, Group

Make = Callable[..., Grpo]
Decoders = Callable[..., Decoder]
HF = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def decoder(small_decoder: Decoders) -> Decoder:
    return small_decoder(tied=False)


def score(decoder: Decoder, prompt: Sequence[int], ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of a completion by a plain forward pass over one whole sequence."""
    logits = decoder(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def make_groups(
    decoder: Decoder, outcomes: Sequence[str], temperature: float = 1.0, seed: int = 0
) -> list[Group]:
    """Random prompts with random answers, one letter each: r(ight), w(rong), c(ut off)."""
    draw = random.Random(seed)
    words = {"r": "right", "w": "wrong", "c": "cut_off"}
    groups = []
    for number, letters in enumerate(outcomes):
        prompt = [draw.randrange(61) for _ in range(draw.randint(1, 12))]
        samples = []
        for letter in letters:
            ids = [draw.randrange(61) for _ in range(draw.randint(1, 6))]
            with torch.no_grad():
                logprobs = score(decoder, prompt, ids, temperature).tolist()
            samples.append(Sample(ids, logprobs, 1.0, "length" if letter == "c" else "stop"))
        item = Item("chain_sum", 0, number, f"question {number}", "1", {"scorer": "integer"})
        groups.append(Group(item, prompt, samples, [words[letter] for letter in letters]))
    return groups


@pytest.fixture
def learn(meter: Meter, make_stage: Make) -> Callable[..., tuple[list[dict[str, Tensor]], dict[str, Any]]]:
    """A function that learns from groups: gives the gradients of each optimizer step, and the metrics."""

    def run(
        decoder: Decoder,
        groups: list[Group],
        *,
        reference: Decoder | None = None,
        budget: int | None = None,
        move: bool = False,
        kept: list[Group] | None = None,
        **stage: Any,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        settings = make_stage(**{"max_grad_norm": 1e9, "grad_clip": 1e9} | stage)
        weights = MasterWeights(decoder, "adamw", settings.lr, (0.9, 0.95), 0.0)
        learner = Learner(settings, decoder, reference, weights, HF, meter, Alone("cpu"))
        learner.budget = budget or learner.budget
        steps: list[dict[str, Tensor]] = []
        names = [name for name, parameter in decoder.named_parameters() if parameter.requires_grad]
        real = weights.step

        def step(lr: float) -> None:
            grads = [master.copy.grad for master in weights.masters]
            steps.append({n: g.clone() for n, g in zip(names, grads, strict=True) if g is not None})
            real(lr if move else 0.0)

        weights.step = step  # type: ignore[method-assign]
        try:
            return steps, learner.learn(Batch(groups if kept is None else kept, groups), 0)
        finally:
            for hook in weights.hooks:  # the next call brings its own
                hook.remove()

    return run


def by_hand(
    decoder: Decoder, groups: list[Group], weight: Callable[[int], float], **how: Any
) -> dict[str, Tensor]:
    """REINFORCE's gradient: each answer's advantage times the gradient of its tokens' log-probabilities."""
    twin = copy.deepcopy(decoder)
    loss = torch.zeros(())
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        deviation = (sum((r - mean) ** 2 for r in group.rewards) / len(group.rewards)) ** 0.5
        for sample, reward in zip(group.samples, group.rewards, strict=True):
            if how.get("masked") and sample.finish_reason == "length":
                continue
            advantage = (reward - mean) / (deviation + 1e-6 if how.get("std", True) else 1.0)
            logprobs = score(twin, group.prompt, sample.ids, how.get("temperature", 1.0))
            loss = loss - advantage * weight(len(sample.ids)) * logprobs.sum()
    loss.backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 2e-5) -> None:
    assert got.keys() == expected.keys()
    assert max(float(grad.abs().max()) for grad in expected.values()) > 100 * atol, "no gradient to speak of"
    for name, grad in got.items():
        where = f"the gradients of {name} differ"
        torch.testing.assert_close(grad, expected[name], atol=atol, rtol=1e-3, msg=where)


@pytest.mark.parametrize("loss", ["token", "sample", "constant"])
def test_two_ranks_together_learn_what_one_does(
    decoder: Decoder, make_stage: Make, on_two: Callable[..., Any], tmp_path: Path, loss: str
) -> None:
    groups = make_groups(decoder, ["rw", "rrww", "wwwwr"])
    stage = make_stage(max_grad_norm=1e9, grad_clip=1e9, loss=loss)

    def work(rank: Any, own: Decoder) -> tuple[list[Tensor], dict[str, Any]]:
        weights = MasterWeights(own, "adamw", stage.lr, (0.9, 0.95), 0.0)
        mine = groups[rank.share(len(groups))]
        device = Device(name="cpu: test", kind="cpu")
        ledger = tmp_path / f"{rank.count}-{rank.index}.jsonl"
        with Meter(ledger, stage="01-grpo", device=device, rate=(0.0, "test")) as meter:
            metrics = Learner(stage, own, None, weights, HF, meter, rank).learn(Batch(mine, mine), 0)
        assert '"activity": "train"' in ledger.read_text()
        return [
            master.copy.grad.clone() for master in weights.masters if master.copy.grad is not None
        ], metrics

    expected, alone = work(Alone("cpu"), copy.deepcopy(decoder))
    (ours, first), (theirs, second) = on_two(work, decoder)
    assert first["clip_fraction"] == second["clip_fraction"] == alone["clip_fraction"]
    assert len(ours) == len(theirs) == len(expected) > 5
    assert first["grad_norm"] == second["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    for mine, other, whole in zip(ours, theirs, expected, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, whole, atol=1e-6, rtol=1e-4)


# the first rank has the larger half; of one group the other has none, of three its second part is empty or not
UNEVEN = {
    "one group": (["rwww"], {}),
    "two updates": (["rw", "rrww", "wwwwr"], {"updates": 2}),
    "none": (["rrrr"], {}),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_ranks_with_unequal_shares_stay_together(
    decoder: Decoder,
    small_decoder: Decoders,
    make_stage: Make,
    on_two: Callable[..., Any],
    tmp_path: Path,
    name: str,
) -> None:
    outcomes, settings = UNEVEN[name]
    groups, reference = make_groups(decoder, outcomes), small_decoder(seed=8, tied=False)
    stage = make_stage(max_grad_norm=1e9, kl=0.1, **settings)

    def work(rank: Any, own: Decoder) -> dict[str, Any]:
        weights = MasterWeights(own, "adamw", stage.lr, (0.9, 0.95), 0.0)
        mine = groups[rank.share(len(groups))]
        path = tmp_path / f"{rank.count}-{rank.index}.jsonl"
        with Meter(path, stage="01-grpo", device=Device("test", "cpu"), rate=(0.0, "test")) as meter:
            return Learner(stage, own, reference, weights, HF, meter, rank).learn(Batch(mine, mine), 0)

    alone = work(Alone("cpu"), copy.deepcopy(decoder))
    first, second = on_two(work, decoder)
    for key in ("clip_fraction", "kl", "sync_mean", "sync_max"):
        assert first[key] == second[key], key
        if "updates" not in settings:  # the parts of two ranks are others than those of one
            same = pytest.approx(alone[key], rel=1e-4, abs=1e-7) if alone[key] is not None else None
            assert first[key] == same, key
    assert first["kl"] is not None  # also of groups without an advantage


def test_samples_of_another_policy_on_one_rank_stop_all(
    decoder: Decoder, make_stage: Make, on_two: Callable[..., Any], tmp_path: Path
) -> None:
    groups = make_groups(decoder, ["rwww", "rrww"])
    for sample in groups[1].samples:  # the second rank's
        sample.logprobs = [p + 3.0 for p in sample.logprobs]

    def work(rank: Any, own: Decoder) -> str:
        stage, weights = make_stage(max_grad_norm=1e9), MasterWeights(own, "adamw", 0.0, (0.9, 0.95), 0.0)
        mine = groups[rank.share(len(groups))]
        path = tmp_path / f"{rank.index}.jsonl"
        with (
            Meter(path, stage="01-grpo", device=Device("test", "cpu"), rate=(0.0, "test")) as meter,
            pytest.raises(Diverged, match="sync_tolerance") as said,
        ):
            Learner(stage, own, None, weights, HF, meter, rank).learn(Batch(mine, mine), 0)
        return str(said.value)

    first, second = on_two(work, decoder)
    assert first == second


# ---- layout ----

token_lists = st.lists(st.integers(0, 60), min_size=1, max_size=9)
prepared_groups = st.lists(st.tuples(token_lists, st.lists(token_lists, min_size=1, max_size=5)), max_size=5)


def answers_of(groups: list[tuple[list[int], list[list[int]]]]) -> list[tuple[list[int], list[Answer]]]:
    return [(prompt, [Answer(ids, [0.0] * len(ids), 1.0, 1.0) for ids in many]) for prompt, many in groups]


@given(prepared_groups, st.integers(1, 80))
def test_every_answer_goes_through_once_within_the_budget(
    groups: list[tuple[list[int], list[list[int]]]], budget: int
) -> None:
    prepared = answers_of(groups)
    made = list(passes(prepared, budget))
    expected = [(id(answer), prompt) for prompt, answers in prepared for answer in answers]
    seen = [(id(answer), prompt) for one in made for prompt, answers in one.prompts for answer in answers]
    assert seen == expected
    assert sum(len(one.answers) for one in made) == len(expected)
    for one in made:
        tokens = sum(len(prompt) + sum(len(a.ids) for a in answers) for prompt, answers in one.prompts)
        assert tokens <= budget or len(one.answers) == 1
        assert all(answers for _, answers in one.prompts)
        assert len(layout(one)[0]) == layout(one)[1].tokens == tokens
    for one, following in itertools.pairwise(made):  # none was closed while the next would have fitted
        used = layout(one)[1].tokens
        prompt, answers = following.prompts[0]
        shared = one.prompts[-1][0] is prompt
        assert used + len(answers[0].ids) + (0 if shared else len(prompt)) > budget


@settings(max_examples=25, deadline=None)
@given(groups=prepared_groups.filter(bool), budget=st.integers(1, 60))
def test_a_pass_gives_every_token_its_own_log_probability(
    small_decoder: Decoders, groups: list[tuple[list[int], list[list[int]]]], budget: int
) -> None:
    decoder = small_decoder(tied=False)
    got: list[float] = []
    with torch.no_grad():
        for one in passes(answers_of(groups), budget):
            ids, segments, rows, targets = layout(one)
            hidden = decoder.hidden(ids, segments.positions(), segments)
            got += token_logprobs(hidden[rows], decoder.head.weight, targets).tolist()
        alone = [p for prompt, many in groups for ids in many for p in score(decoder, prompt, ids).tolist()]
    assert got == pytest.approx(alone, abs=2e-5)


# ---- gradients ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_reinforce_with_group_advantages(
    decoder: Decoder, learn: Callable[..., Any], temperature: float
) -> None:
    groups = make_groups(decoder, ["rwww", "rrww", "wrrr"], temperature)
    tokens = sum(len(s.ids) for g in groups for s in g.samples)
    (got,), metrics = learn(decoder, groups, temperature=temperature)
    assert_equal(got, by_hand(decoder, groups, lambda _: 1 / tokens, temperature=temperature))
    norm = sum(float(g.square().sum()) for g in got.values()) ** 0.5
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["clip_fraction"] == 0
    assert metrics["sync_max"] < 1e-4
    assert metrics["kl"] is None


@pytest.mark.parametrize("loss", ["sample", "constant"])
def test_the_other_weightings_and_the_plain_mean(
    decoder: Decoder, learn: Callable[..., Any], loss: str
) -> None:
    groups = make_groups(decoder, ["rwww", "rrrw"], seed=1)
    assert len({len(s.ids) for g in groups for s in g.samples}) > 1
    (got,), _ = learn(decoder, groups, loss=loss, advantage="mean")
    weight = (lambda n: 1 / (8 * n)) if loss == "sample" else (lambda n: 1 / (8 * 6))
    assert_equal(got, by_hand(decoder, groups, weight, std=False), atol=1e-5)


@pytest.mark.parametrize("budget", [1, 17, 40])
@pytest.mark.parametrize("tied", [True, False])
def test_many_passes_make_the_step_of_one(
    small_decoder: Decoders, make_stage: Make, learn: Callable[..., Any], budget: int, tied: bool
) -> None:
    decoder = small_decoder(tied=tied)
    groups = make_groups(decoder, ["rwww", "rrww", "wrrr"])
    assert len(list(passes(prepare(groups, make_stage(), Alone("cpu")), budget))) > 1
    (one,), metrics = learn(copy.deepcopy(decoder), groups, budget=10_000)
    (many,), again = learn(copy.deepcopy(decoder), groups, budget=budget)
    assert_equal(many, one, atol=1e-5)
    for name in ("grad_norm", "sync_mean"):
        assert again[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-6)


def test_truncated_answers_do_not_train_when_masked(decoder: Decoder, learn: Callable[..., Any]) -> None:
    groups = make_groups(decoder, ["rwcc", "rrwc"])
    whole = sum(len(s.ids) for g in groups for s in g.samples if s.finish_reason == "stop")
    everything = sum(len(s.ids) for g in groups for s in g.samples)
    (masked,), _ = learn(decoder, groups, mask_truncated=True)
    assert_equal(masked, by_hand(decoder, groups, lambda _: 1 / whole, masked=True))
    (unmasked,), _ = learn(decoder, groups)
    assert_equal(unmasked, by_hand(decoder, groups, lambda _: 1 / everything))
    assert any(not torch.allclose(masked[name], unmasked[name], atol=1e-3) for name in masked)


@pytest.mark.parametrize("outcomes", [["wwww", "rrrr"], []])
def test_without_signal_nothing_moves(
    decoder: Decoder, learn: Callable[..., Any], outcomes: list[str]
) -> None:
    before = copy.deepcopy(decoder.state_dict())
    steps, metrics = learn(decoder, make_groups(decoder, outcomes), move=True, drop_silent=False)
    assert steps == []
    assert metrics["grad_norm"] is metrics["sync_mean"] is metrics["clip_fraction"] is None
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())


def test_a_batch_of_nothing_but_masked_answers_is_passed_over(
    decoder: Decoder, learn: Callable[..., Any]
) -> None:
    for loss in ("token", "sample", "constant"):
        steps, _ = learn(
            decoder, make_groups(decoder, ["cccc"]), mask_truncated=True, drop_silent=False, loss=loss
        )
        assert steps == []


# ---- more than one update ----


def test_two_updates_use_the_log_probabilities_that_were_sampled(
    decoder: Decoder, learn: Callable[..., Any]
) -> None:
    groups = make_groups(decoder, ["rwww", "rrww"])
    for group in groups:  # as if an older policy had sampled: some ratios inside the clip range, some beyond
        for number, sample in enumerate(group.samples):
            sample.logprobs = [p + (0.1, -0.1, 0.6, -0.6)[number] for p in sample.logprobs]
    settings = {"clip_low": 0.2, "clip_high": 0.28, "sync_tolerance": 9.0}
    steps, metrics = learn(decoder, groups, updates=2, **settings)
    assert len(steps) == 2  # a group each
    for group, got in zip(groups, steps, strict=True):
        twin = copy.deepcopy(decoder)
        loss, held, tokens = torch.zeros(()), 0, sum(len(s.ids) for s in group.samples)
        scores = advantages(torch.tensor([group.rewards]), "std")[0].tolist()
        for sample, advantage in zip(group.samples, scores, strict=True):
            ratio = (score(twin, group.prompt, sample.ids) - torch.tensor(sample.logprobs)).exp()
            bounded = ratio.clamp(max=1.28) if advantage > 0 else ratio.clamp(min=0.8)
            held += int((bounded != ratio).sum())
            loss = loss - (bounded * advantage).sum() / tokens
        loss.backward()
        assert held
        assert_equal(got, {n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["sync_mean"] > 0.05
    (once,), _ = learn(decoder, groups, updates=1, **settings)  # one update: the policy is the sampler itself
    tokens = sum(len(s.ids) for g in groups for s in g.samples)
    assert_equal(once, by_hand(decoder, groups, lambda _: 1 / tokens))


def test_the_second_update_starts_from_the_first(decoder: Decoder, learn: Callable[..., Any]) -> None:
    groups = make_groups(decoder, ["rwww", "rrww"])
    still, _ = learn(copy.deepcopy(decoder), groups, updates=2)
    moving, _ = learn(copy.deepcopy(decoder), groups, updates=2, move=True, lr=1e-2)
    assert_equal(moving[0], still[0])
    assert any(not torch.allclose(moving[1][name], still[1][name], atol=1e-3) for name in still[1])


# ---- the reference ----


def test_the_divergence_from_the_reference_starts_at_zero_and_pulls_back(
    decoder: Decoder, learn: Callable[..., Any]
) -> None:
    reference = copy.deepcopy(decoder).requires_grad_(False)
    frozen = copy.deepcopy(reference.state_dict())
    groups = make_groups(decoder, ["rwww", "rrww"])
    tokens = sum(len(s.ids) for g in groups for s in g.samples)
    (start,), metrics = learn(decoder, groups, reference=reference, kl=0.5)
    assert metrics["kl"] is not None
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert_equal(start, by_hand(decoder, groups, lambda _: 1 / tokens))  # no pull where both agree
    for _ in range(5):
        learn(decoder, groups, reference=reference, kl=0.5, move=True, lr=1e-2, sync_tolerance=99.0)
    (later,), metrics = learn(decoder, groups, reference=reference, kl=0.5, sync_tolerance=99.0)
    with torch.no_grad():
        ratios = [
            score(reference, g.prompt, s.ids) - score(decoder, g.prompt, s.ids)
            for g in groups
            for s in g.samples
        ]
    expected = sum(float((r.exp() - r - 1).sum()) for r in ratios) / tokens
    assert metrics["kl"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3
    twin = copy.deepcopy(decoder)
    loss = torch.zeros(())
    for group in groups:
        for sample in group.samples:
            with torch.no_grad():
                wanted = score(reference, group.prompt, sample.ids)
            r = wanted - score(twin, group.prompt, sample.ids)
            loss = loss + 0.5 * (r.exp() - r - 1).sum() / tokens
    loss.backward()
    pull = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    reward = by_hand(decoder, groups, lambda _: 1 / tokens)
    assert_equal(later, {name: reward[name] + pull[name] for name in reward})
    assert all(torch.equal(frozen[name], value) for name, value in reference.state_dict().items())
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("estimator", ["k3", "k3_corrected"])
@pytest.mark.parametrize("loss", ["token", "sample", "constant"])
@pytest.mark.parametrize("drop", [True, False])
def test_the_divergence_acts_on_silent_groups_too(
    small_decoder: Decoders, learn: Callable[..., Any], loss: str, estimator: str, drop: bool
) -> None:
    decoder, reference = small_decoder(tied=False), small_decoder(seed=8, tied=False)
    groups = make_groups(decoder, ["wwww", "rwww", "rrr"])
    kept = groups[1:2] if drop else groups
    settings = {"kl": 0.5, "loss": loss, "kl_estimator": estimator, "drop_silent": drop}
    (got,), metrics = learn(decoder, groups, kept=kept, reference=reference, **settings)

    def mean(values: list[Tensor]) -> Tensor:
        """The mean over some answers, as each loss takes it."""
        tokens = sum(len(value) for value in values)
        each = {"token": tokens, "constant": 6 * len(values)}.get(loss)
        return sum((v.sum() / (each or len(v) * len(values)) for v in values), torch.zeros(()))

    twin = copy.deepcopy(decoder)
    divergences, objectives = [], []
    for group in groups:
        scores = advantages(torch.tensor([group.rewards]), "std")[0].tolist()
        for sample, advantage in zip(group.samples, scores, strict=True):
            logprobs = score(twin, group.prompt, sample.ids)
            with torch.no_grad():
                log_ratio = score(reference, group.prompt, sample.ids) - logprobs
            # the gradients, worked out: d k3 = 1 - r, and d (ratio * k3) = -log r where the ratio is 1
            pull = -log_ratio if estimator == "k3_corrected" else 1 - log_ratio.exp()
            divergences.append(pull * logprobs)
            if group in kept:
                objectives.append(advantage * logprobs)
    (0.5 * mean(divergences) - mean(objectives)).backward()
    assert_equal(got, {n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
    assert metrics["signal"] == 4
    assert metrics["kl"] > 0.01


def test_a_kl_term_leaves_the_rewards_part_of_the_gradient_as_it_was(
    decoder: Decoder, learn: Callable[..., Any]
) -> None:
    groups = make_groups(decoder, ["wwww", "rwww", "rrr", "rrww"])
    kept = [group for group in groups if not group.silent]
    (without,), _ = learn(decoder, groups, kept=kept)
    (with_it,), metrics = learn(decoder, groups, kept=kept, reference=copy.deepcopy(decoder), kl=0.5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert_equal(with_it, without)


def test_silent_groups_are_spread_over_the_updates(
    small_decoder: Decoders, learn: Callable[..., Any]
) -> None:
    decoder, reference = small_decoder(tied=False), small_decoder(seed=8, tied=False)
    groups = make_groups(decoder, ["wwww", "rwww", "rrr"])
    settings = {"kl": 0.5, "reference": reference}
    steps, metrics = learn(decoder, groups, kept=groups[1:2], updates=2, **settings)
    assert len(steps) == 2
    assert metrics["signal"] == 4
    none, metrics = learn(decoder, groups[:1], kept=[], **settings)
    assert len(none) == 1  # the divergence alone
    assert metrics["signal"] == 0


# ---- the sync proof ----


@pytest.mark.parametrize("error", [0.2, -0.2, float("nan")])
def test_samples_of_another_policy_stop_the_run(
    decoder: Decoder, learn: Callable[..., Any], error: float
) -> None:
    groups = make_groups(decoder, ["rwww", "rrww"])
    before = copy.deepcopy(decoder.state_dict())
    for group in groups:
        for sample in group.samples:
            sample.logprobs = [p + error for p in sample.logprobs]
    with pytest.raises(Diverged, match="sync_tolerance"):
        learn(decoder, groups, move=True)
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())


def test_the_proof_is_made_every_so_many_steps(decoder: Decoder, meter: Meter, make_stage: Make) -> None:
    stage = make_stage(sync_every=3, max_grad_norm=1e9)
    weights = MasterWeights(decoder, "adamw", 0.0, (0.9, 0.95), 0.0)
    learner = Learner(stage, decoder, None, weights, HF, meter, Alone("cpu"))
    weights.step = lambda lr: [o.zero_grad() for o in weights.optimizers]  # type: ignore[assignment]
    groups = make_groups(decoder, ["rwww"])
    proved = [learner.learn(Batch(groups, groups), step)["sync_mean"] is not None for step in range(7)]
    assert proved == [True, False, False, True, False, False, True]
