"""The mixture of experts: against a plain loop over tokens, at any imbalance, and the balance that training keeps."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.model import Decoder, ModelConfig, Moe, Routing, Segments, routers, update_biases
from farthing.model.kernels import experts as kernel
from farthing.model.kernels import rows as layout
from farthing.model.kernels.rows import Rows, ragged_works
from farthing.model.moe import Experts, MixtureOfExperts, Router

TOKENS, WIDTH, EXPERTS, TOP_K, INNER = 40, 16, 8, 3, 8


def config(**changed: Any) -> ModelConfig:
    settings = {"experts": EXPERTS, "top_k": TOP_K, "expert_size": INNER, **changed}
    return ModelConfig(97, WIDTH, 24, 2, 2, 2, 8, moe=Moe(**settings))


def randomly(module: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


def network(**changed: Any) -> Decoder:
    decoder = Decoder(config(**changed))
    decoder.init_weights(seed=0, std=0.2)
    return decoder


def plainly(experts: Experts, x_NC, gates_NK, chosen_NK):
    """The definition: every token through every one of its experts, one by one."""
    rows = []
    for x_C, gates_K, chosen_K in zip(x_NC, gates_NK, chosen_NK, strict=True):
        out_C = torch.zeros_like(x_C)
        for gate, expert in zip(gates_K, chosen_K.tolist(), strict=True):
            first, second = (experts.gate_up[expert] @ x_C).chunk(2)
            out_C = out_C + gate * (experts.down[expert] @ (F.silu(first) * second))
        rows.append(out_C)
    return torch.stack(rows)


def choices(kind: str) -> torch.Tensor:
    if kind == "all to the same":
        return torch.arange(TOP_K).expand(TOKENS, -1).contiguous()
    if kind == "evenly":
        return (torch.arange(TOKENS)[:, None] + torch.arange(TOP_K)) % EXPERTS
    generator = torch.Generator().manual_seed(4)
    return torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices


@pytest.mark.parametrize("kind", ["all to the same", "evenly", "at random"])
@pytest.mark.parametrize("way", ["padded", "one by one", "ragged"])
def test_no_token_is_dropped_and_every_gradient_is_right(kind, way, monkeypatch):
    monkeypatch.setattr(layout, "PAD_TO", 4)
    monkeypatch.setattr(layout, "CALL", 1e9 if way == "padded" else -1e9)
    monkeypatch.setattr(layout, "MOST_PADDING", 0)
    monkeypatch.setattr(kernel, "ragged_works", lambda x, inner: way == "ragged")
    experts = randomly(Experts(EXPERTS, WIDTH, INNER))
    chosen = choices(kind)
    rows = Rows.of(chosen, EXPERTS, way == "ragged")
    assert (bool(rows.sizes), rows.ends_E is not None) == (way == "one by one", way == "ragged")
    results = []
    for function in (experts, lambda *inputs: plainly(experts, *inputs)):
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        gates = torch.rand(TOKENS, TOP_K, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = function(x, gates, chosen)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        grads = torch.autograd.grad((out * weights).sum(), [x, gates, experts.gate_up, experts.down])
        results.append((out, *grads))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40)
@given(
    chosen=st.integers(1, 4).flatmap(
        lambda k: st.lists(st.permutations(range(6)).map(lambda p: p[:k]), min_size=1, max_size=30)
    ),
    way=st.sampled_from(["padded", "one by one", "ragged"]),
)
def test_every_token_has_a_row_of_each_of_its_experts(chosen, way):
    """Whatever the load: the rows of a token are its own, and lie where their expert's rows are."""
    chosen_NK = torch.tensor(chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "PAD_TO", 4)
        patch.setattr(layout, "CALL", 1e9 if way == "padded" else -1e9)
        patch.setattr(layout, "MOST_PADDING", 0)
        rows = Rows.of(chosen_NK, 6, way == "ragged")
    assert rows.row_NK.unique().numel() == chosen_NK.numel(), "no two share a row"
    assert torch.equal(rows.source_S[rows.row_NK], torch.arange(len(chosen_NK))[:, None].expand_as(chosen_NK))
    if rows.ends_E is not None:
        lengths = rows.ends_E.diff(prepend=rows.ends_E.new_zeros(1))
    else:
        lengths = torch.tensor(rows.sizes or [len(rows.source_S) // 6] * 6)
        assert lengths.remainder(4).eq(0).all()
    assert lengths.sum() == len(rows.source_S)
    assert torch.equal(torch.repeat_interleave(lengths)[rows.row_NK], chosen_NK)


def test_rows_that_fill_up_give_nothing(monkeypatch):
    """They carry token 0: an expert that nobody chose has rows of it and yet no gradient, to the last bit."""
    experts = randomly(Experts(EXPERTS, WIDTH, INNER))
    chosen = choices("evenly") % 5  # some tokens then have an expert twice, which changes nothing here
    x, gates = torch.randn(TOKENS, WIDTH) * 100, torch.rand(TOKENS, TOP_K)
    monkeypatch.setattr(layout, "MOST_PADDING", 1e9)
    results = []
    for pad_to in (1, 64):
        monkeypatch.setattr(layout, "PAD_TO", pad_to)
        rows = Rows.of(chosen, EXPERTS, True)
        assert not rows.sizes
        assert len(rows.source_S) >= EXPERTS * pad_to
        out = experts(x.requires_grad_(), gates, chosen)
        results.append((out, *torch.autograd.grad(out.sum(), [x, experts.gate_up, experts.down])))
    for few, many in zip(*results, strict=True):
        torch.testing.assert_close(many, few)
    assert results[1][2][5:].eq(0).all()
    assert results[1][3][5:].eq(0).all()
    assert results[1][3][:5].ne(0).any()


def test_few_tokens_go_through_the_chosen_experts_alone():
    experts = randomly(Experts(EXPERTS, WIDTH, INNER))
    x, gates, chosen = torch.randn(2, WIDTH), torch.rand(2, TOP_K), choices("at random")[:2]
    with torch.no_grad():
        torch.testing.assert_close(experts(x, gates, chosen), plainly(experts, x, gates, chosen))
        experts.gate_up[[e for e in range(EXPERTS) if e not in chosen]] = torch.nan
        assert experts(x, gates, chosen).isfinite().all()


@pytest.mark.parametrize("width", [(16, 6), (6, 16)])
def test_any_width_works_when_all_tokens_want_one_expert(width):
    """torch's product over ragged rows refuses rows that are no multiple of 16 bytes."""
    experts = randomly(Experts(EXPERTS, *width))
    x, gates, chosen = torch.randn(300, width[0]), torch.rand(300, 1), torch.zeros(300, 1, dtype=torch.int64)
    assert not ragged_works(x, experts.inner)
    torch.testing.assert_close(experts(x, gates, chosen), plainly(experts, x, gates, chosen))


# ---- the router ----


def test_a_choice_within_the_best_groups():
    """V3: a group's score is that of its best two, corrected; the gates are the scores without the correction."""
    router = randomly(Router(config(groups=4, top_groups=2, scale=2.5), 0))
    x = torch.randn(TOKENS, WIDTH)
    gates, chosen = router(x, None)
    scores = (x @ router.weight.T).sigmoid()
    for token in range(TOKENS):
        corrected = (scores[token] + router.bias).tolist()
        groups = sorted(range(4), key=lambda g: -(corrected[2 * g] + corrected[2 * g + 1]))[:2]
        allowed = [expert for group in groups for expert in (2 * group, 2 * group + 1)]
        best = sorted(allowed, key=lambda e: -corrected[e])[:TOP_K]
        assert set(chosen[token].tolist()) == set(best)
        own = scores[token][chosen[token]]
        torch.testing.assert_close(gates[token], 2.5 * own / own.sum())


def test_a_group_without_a_correction_is_scored_by_its_best_one():
    router = Router(
        config(groups=4, top_groups=1, top_k=2, scoring="softmax", normalise=False, bias=False), 0
    )
    with torch.no_grad():  # group 0 has the best expert, group 1 the best two
        router.weight.copy_(torch.tensor([3.0, 0, 2, 2, 0, 0, 0, 0])[:, None].expand(-1, WIDTH) / WIDTH)
    gates, chosen = router(torch.ones(1, WIDTH), None)
    assert set(chosen[0].tolist()) == {0, 1}
    expected = torch.tensor([3.0, 0, 2, 2, 0, 0, 0, 0]).softmax(0)[chosen[0]]
    torch.testing.assert_close(gates[0], expected)


def test_negative_corrections_do_not_let_other_groups_in():
    """With what is shut out at 0 instead of at minus infinity, the corrected scores of the best group would lose."""
    router = randomly(Router(config(groups=2, top_groups=1, top_k=4), 0))
    with torch.no_grad():
        router.bias.fill_(-5.0)
    _, chosen = router(torch.randn(TOKENS, WIDTH), None)
    assert all(len({expert // 4 for expert in token}) == 1 for token in chosen.tolist())


def test_the_correction_stays_float32_and_exact():
    decoder = network()
    fine = 5.0 + torch.arange(EXPERTS) / 1024  # all of these are 5 in bfloat16
    for router in routers(decoder):
        router.bias.data.copy_(fine)
    decoder.to(torch.bfloat16)
    found = list(routers(decoder))
    assert len(found) == 2
    for router in found:
        assert router.weight.dtype == torch.bfloat16
        assert router.bias.dtype == torch.float32
        assert not router.bias.requires_grad
        assert torch.equal(router.bias, fine)
        gates, _ = router(torch.randn(4, WIDTH, dtype=torch.bfloat16), None)
        assert gates.dtype == torch.float32


# ---- routing: loads, replay, balance ----


def test_loads_add_up():
    decoder, routing = network(first_dense=1), Routing()
    decoder.hidden(torch.arange(30), torch.arange(30), Segments([(30, ())]), routing)
    assert list(routing.loads) == list(routing.chosen) == decoder.config.moe_layers == [1]
    assert routing.loads[1].sum() == 30 * TOP_K
    assert torch.equal(routing.loads[1], torch.bincount(routing.chosen[1].flatten(), minlength=EXPERTS))
    assert routing.loss is None


def test_replay_uses_the_experts_given_and_still_teaches_the_router():
    decoder = network()
    ids, segments = torch.arange(30), Segments([(30, ())])
    given = {layer: choices("at random")[:30] for layer in (0, 1)}
    routing = Routing(replay=given)
    out = decoder.hidden(ids, segments.positions(), segments, routing)
    assert torch.equal(routing.chosen[0], given[0])
    out.square().sum().backward()
    used = given[0].unique()
    for router in routers(decoder):
        assert (router.weight.grad.abs().sum(1) > 0)[used].all()
    with torch.no_grad():
        free = Routing()
        expected = decoder.hidden(ids, segments.positions(), segments, free)
        again = decoder.hidden(ids, segments.positions(), segments, Routing(replay=free.chosen))
    assert torch.equal(again, expected)
    assert not torch.allclose(out, expected, atol=1e-3)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_the_balance_loss_is_the_papers(scoring):
    """arXiv:2412.19437 eq. 17 to 20, written out for each sequence and each expert."""
    lengths, alpha = [7, 1, 12], 0.01
    router = randomly(Router(config(scoring=scoring), 0))
    x = torch.randn(sum(lengths), WIDTH)
    routing = Routing(lengths=lengths, balance=alpha)
    router(x, routing)
    assert routing.loss is not None
    [grad] = torch.autograd.grad(routing.loss, [router.weight])

    logits = x @ router.weight.T
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    total: Any = 0.0
    for s_TE in scores.split(lengths):
        best = s_TE.topk(TOP_K).indices
        for i in range(EXPERTS):
            f = EXPERTS / (TOP_K * len(s_TE)) * (best == i).sum()
            p = (s_TE[:, i] / s_TE.sum(1)).mean()
            total = total + alpha * f * p / len(lengths)
    torch.testing.assert_close(routing.loss, total)
    torch.testing.assert_close(grad, torch.autograd.grad(total, [router.weight])[0])


def test_the_balance_loss_of_several_layers_is_their_sum_and_falls_when_followed():
    decoder, lengths = network(), [20, 10]
    ids, segments = torch.arange(30), Segments([(20, ()), (10, ())])
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.3)
    losses = []
    for _ in range(40):
        routing = Routing(lengths=lengths, balance=1.0)
        decoder.hidden(ids, segments.positions(), segments, routing)
        assert routing.loss is not None
        losses.append(float(routing.loss.detach()))
        optimizer.zero_grad()
        routing.loss.backward()
        optimizer.step()
    assert losses[0] > 2.0, "two layers of at least 1 each: 1 is an even load"
    assert 2.0 - 1e-3 < losses[-1] < losses[0] - 0.02


def test_a_correction_moves_towards_the_experts_with_less_and_is_centred():
    decoder = network()
    before = torch.linspace(-0.1, 0.3, EXPERTS)
    for router in routers(decoder):
        router.bias.data.copy_(before)
    load = torch.tensor([9, 0, 4, 4, 4, 4, 4, 3])  # the mean is 4
    update_biases(decoder, {0: load}, 0.01)
    first, second = routers(decoder)
    moved = before + 0.01 * torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 1])
    torch.testing.assert_close(first.bias, moved - moved.mean())
    assert abs(float(first.bias.mean())) < 1e-7
    assert torch.equal(second.bias, before), "a layer without loads is left alone"


def test_corrections_even_out_the_load():
    router = randomly(Router(config(), 0))
    x = torch.randn(400, WIDTH) + 0.7  # a common direction, which some experts like more
    spreads = []
    for _ in range(150):
        routing = Routing()
        router(x, routing)
        spreads.append(float(routing.loads[0].max()) / (400 * TOP_K / EXPERTS))
        update_biases(router, routing.loads, 0.02)
    assert spreads[0] > 1.5
    assert spreads[-1] < 1.2


def test_the_whole_layer_adds_shared_experts_and_the_stream():
    layer = randomly(MixtureOfExperts(config(shared=2), 0))
    x, plus = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    gates, chosen = layer.router(x, None)
    first, second = F.linear(x, layer.shared.gate_up.weight).chunk(2, -1)
    assert first.shape[1] == 2 * INNER
    shared = F.linear(F.silu(first) * second, layer.shared.down.weight)
    expected = plus + shared + plainly(layer.experts, x, gates, chosen)
    torch.testing.assert_close(layer(x, plus, None), expected, atol=1e-4, rtol=1e-5)
    assert MixtureOfExperts(config(shared=0), 0).shared is None
