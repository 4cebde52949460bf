"""One step of predicting the next token, against the same written out plainly; and how a corpus is scored."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.device import Alone
from farthing.cost.flops import forward_flops, mtp_flops
from farthing.data.corpus import Corpus
from farthing.data.packing import NO_LOSS, PackedBatch, ragged_batch
from farthing.data.text import Document
from farthing.model import Decoder, Segments
from farthing.model.moe import Routing, routers, update_biases
from farthing.recipe import validate
from farthing.recipe.dial import dial
from farthing.train import losses
from farthing.train.lm import Step, bits_per_byte, further, lm_step, passes
from farthing.train.losses import next_token_losses
from farthing.train.optim import MasterWeights
from farthing.weights import decoder_config

Make = Callable[..., tuple[Decoder, dict[str, Any]]]
VOCAB = 61


@pytest.fixture(scope="module")
def network() -> Make:
    """A function that makes a float32 network of a family, and its config.json."""

    def make(family: str = "deepseek", mtp_depth: int = 0) -> tuple[Decoder, dict[str, Any]]:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {} if family == "llama" else {"n_routed_experts": 4, "moe_intermediate_size": 32}
        stage = {
            "kind": "pretrain", "data": ["x"], "family": family, "depth": 2, "length": 16, "model": sizes,
            "mtp_depth": mtp_depth,
        }  # fmt: skip
        config = dial(validate({"name": "t", "stages": [stage]}).stages[0], VOCAB).config  # type: ignore[arg-type]
        decoder = Decoder(decoder_config(config))
        decoder.init_weights(seed=1, std=0.2)
        for number, router in enumerate(routers(decoder)):
            assert router.bias is not None
            router.bias.data = torch.tensor([0.1, -0.1, 0.05, 0.0]) * (number + 1)
        return decoder, config

    return make


def batch(*rows: list[int], masked: bool = False) -> PackedBatch:
    """Rows of texts of these lengths; with `masked` every third token has no target."""
    generator = np.random.default_rng(3)

    def text(length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = generator.integers(0, VOCAB, length)
        targets = np.append(ids[1:], NO_LOSS)
        if masked:
            targets[::3] = NO_LOSS
        return ids, targets

    return ragged_batch([[text(length) for length in row] for row in rows], 16)


def gradients(decoder: Decoder) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad(set_to_none=True)
    return found


ROWS = ([9, 7], [16], [5, 5, 6], [12])


@pytest.mark.parametrize("family", ["llama", "moe", "deepseek"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_is_the_mean_over_its_targets_of_each_texts_own_loss(
    network: Make, family: str, masked: bool
) -> None:
    decoder, config = network(family)
    packed = batch(*ROWS, masked=masked)
    done = lm_step(decoder, packed, config, 10**6, ranks=Alone("cpu"))
    ours = gradients(decoder)
    terms = []
    for ids, targets in zip(
        packed.ids_N.split(packed.segments), packed.targets_N.split(packed.segments), strict=True
    ):
        logits = decoder(ids[None])[0]
        terms.append(F.cross_entropy(logits, targets, ignore_index=NO_LOSS, reduction="sum"))
    loss = torch.stack(terms).sum() / int((packed.targets_N != NO_LOSS).sum())
    loss.backward()
    assert done.targets == packed.loss_tokens == int((packed.targets_N >= 0).sum())
    assert done.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, expected in gradients(decoder).items():
        torch.testing.assert_close(ours[name], expected, atol=2e-6, rtol=1e-4, msg=name)
    pairs = sum(n * (n + 1) // 2 for n in packed.segments)
    assert done.flops == 3 * forward_flops(config, len(packed.ids_N), pairs, done.targets)


@pytest.mark.parametrize("at_once", [1, 17, 33])
def test_how_a_step_is_cut_in_passes_changes_nothing_but_rounding(network: Make, at_once: int) -> None:
    decoder, config = network(mtp_depth=2)
    packed = batch(*ROWS, masked=True)
    settings: dict[str, Any] = {"mtp_weight": 0.3, "balance": 0.1}
    whole, together = (
        lm_step(decoder, packed, config, 10**6, **settings, ranks=Alone("cpu")),
        gradients(decoder),
    )
    parts, apart = (
        lm_step(decoder, packed, config, at_once, **settings, ranks=Alone("cpu")),
        gradients(decoder),
    )
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.mtp_losses == pytest.approx(whole.mtp_losses, rel=1e-5)
    assert parts.loads.keys() == whole.loads.keys() == {1, 2, 3}  # the mixture's layer and both modules
    for layer, load in whole.loads.items():
        assert torch.equal(parts.loads[layer], load)
        assert int(load.sum()) == 2 * len(packed.ids_N)
    for name, expected in together.items():
        torch.testing.assert_close(apart[name], expected, atol=5e-6, rtol=1e-3, msg=name)


def test_two_ranks_together_do_the_step_of_one(network: Make, on_two: Callable[..., Any]) -> None:
    decoder, config = network(mtp_depth=2)
    packed = batch(*ROWS, [7, 2, 6], masked=True)  # five rows, so that the shares differ
    settings: dict[str, Any] = {"mtp_weight": 0.3, "balance": 0.1}
    alone = lm_step(decoder, packed, config, 10**6, **settings, ranks=Alone("cpu"))
    expected = gradients(decoder)

    def work(rank: Any, own: Decoder) -> tuple[Step, dict[str, torch.Tensor]]:
        rows = rank.share(packed.rows)
        part = packed.slice_rows(rows.start, rows.stop)
        return lm_step(own, part, config, 20, **settings, ranks=rank), gradients(own)

    (first, ours), (second, theirs) = on_two(work, decoder)
    assert first.loss + second.loss == pytest.approx(alone.loss, rel=1e-5)
    assert first.flops + second.flops == alone.flops
    assert first.targets == second.targets == alone.targets
    for layer, load in alone.loads.items():  # every rank moves its routers' biases alike
        assert torch.equal(first.loads[layer], load)
        assert torch.equal(second.loads[layer], load)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name] + theirs[name], gradient, atol=5e-6, rtol=1e-3, msg=name)


def test_two_ranks_end_a_step_with_the_same_weights_and_biases(
    network: Make, on_two: Callable[..., Any]
) -> None:
    decoder, config = network(mtp_depth=1)
    packed = batch(*ROWS, masked=True)

    def work(rank: Any, own: Decoder) -> Decoder:
        weights = MasterWeights(own, "muon", 1e-2, (0.9, 0.95), 0.1)
        rows = rank.share(packed.rows)
        part = packed.slice_rows(rows.start, rows.stop)
        done = lm_step(own, part, config, 20, mtp_weight=0.3, balance=0.1, ranks=rank)
        weights.sum_gradients(rank)
        weights.clip(1.0)
        weights.step(1e-2)
        update_biases(own, done.loads, 1e-3)
        return own

    alone = work(Alone("cpu"), copy.deepcopy(decoder))
    first, second = on_two(work, decoder)
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        whole = alone.get_parameter(name)
        if name.endswith("router.bias"):
            assert torch.equal(ours, whole)
            assert not torch.equal(ours, decoder.get_parameter(name))
        elif (
            ".layers." in f".{name}" and ours.dim() == 2 and "router" not in name
        ):  # by Muon, smooth in the gradient
            torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-3, msg=name)


def test_the_balance_loss_reaches_the_router_and_not_the_reported_loss(network: Make) -> None:
    decoder, config = network("moe")
    packed = batch(*ROWS)
    plain, without = lm_step(decoder, packed, config, 10**6, ranks=Alone("cpu")), gradients(decoder)
    balanced, with_it = (
        lm_step(decoder, packed, config, 10**6, balance=1.0, ranks=Alone("cpu")),
        gradients(decoder),
    )
    assert balanced.loss == plain.loss
    name = "layers.1.feedforward.router.weight"
    assert not torch.allclose(without[name], with_it[name])
    routing = Routing(lengths=packed.row_lengths, balance=1.0)
    segments = Segments([(length, ()) for length in packed.segments])
    decoder.hidden(packed.ids_N, segments.positions(), segments, routing)
    assert routing.loss is not None
    [expected] = torch.autograd.grad(routing.loss, decoder.get_parameter(name))
    torch.testing.assert_close(with_it[name] - without[name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_the_modules_predict_further_ahead_and_never_past_a_document(network: Make, masked: bool) -> None:
    decoder, config = network(mtp_depth=2)
    packed = batch(*ROWS, masked=masked)
    done = lm_step(decoder, packed, config, 10**6, mtp_weight=0.5, ranks=Alone("cpu"))
    sums, counts = [0.0, 0.0], [0, 0]
    for ids, targets in zip(
        packed.ids_N.split(packed.segments), packed.targets_N.split(packed.segments), strict=True
    ):
        segments = Segments([(len(ids), ())])
        hidden = decoder.hidden(ids, segments.positions(), segments)
        for k in range(2):
            later = torch.cat([ids[k + 1 :], torch.zeros(k + 1, dtype=torch.int64)])
            hidden = decoder.mtp_hidden(k, later, hidden, segments.positions(), segments)
            for place in range(len(ids) - k - 1):
                if targets[place + k + 1] != NO_LOSS:
                    logits = decoder.logits(hidden[place : place + 1])
                    sums[k] += float(F.cross_entropy(logits, targets[place + k + 1][None]))
                    counts[k] += 1
    expected = [total / count for total, count in zip(sums, counts, strict=True)]
    assert done.mtp_losses == pytest.approx(expected, rel=1e-4)
    pairs = sum(n * (n + 1) // 2 for n in packed.segments)
    both = forward_flops(config, len(packed.ids_N), pairs, done.targets)
    assert 3 * both < done.flops <= 3 * (both + mtp_flops(config, len(packed.ids_N), pairs, max(counts)))


def test_without_a_weight_the_modules_are_left_alone(network: Make) -> None:
    decoder, config = network(mtp_depth=1)
    done = lm_step(decoder, batch(*ROWS), config, 10**6, ranks=Alone("cpu"))
    assert done.mtp_losses == []
    assert not [name for name in gradients(decoder) if name.startswith("mtp.")]


@given(
    rows=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=2), min_size=1, max_size=5),
    module=st.integers(0, 2),
)
def test_what_a_module_reads_and_predicts(rows: list[list[int]], module: int) -> None:
    packed = batch(*rows)
    ids, targets = further(packed, module)
    for place in range(len(packed.ids_N)):
        there = place + module + 1
        same = there < len(packed.ids_N) and packed.documents_N[there] == packed.documents_N[place]
        assert targets[place] == (packed.targets_N[there] if same else NO_LOSS)
        assert ids[place] == (packed.ids_N[there] if same else 0)


@given(
    rows=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=2), min_size=1, max_size=6),
    at_once=st.integers(1, 40),
)
def test_passes_are_whole_rows_and_all_of_them(rows: list[list[int]], at_once: int) -> None:
    packed = batch(*rows)
    parts = list(passes(packed, at_once))
    assert torch.equal(torch.cat([part.ids_N for part in parts]), packed.ids_N)
    assert [n for part in parts for n in part.row_lengths] == packed.row_lengths
    assert all(len(part.ids_N) <= at_once or part.rows == 1 for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_the_loss_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCAB, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (50,), generator=generator)
    exact = F.cross_entropy(hidden.detach().float() @ head.detach().float().T, targets, reduction="none")
    found = []
    for limit in (losses.LOGIT_BYTES, 1):
        monkeypatch.setattr(losses, "LOGIT_BYTES", limit)
        each = next_token_losses(hidden, head, targets)
        assert each.dtype == torch.float32
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(each.detach(), exact, atol=tolerance, rtol=tolerance)
        found.append(torch.autograd.grad(each.mean(), (hidden, head)))
    for fused, chunked in zip(*found, strict=True):
        close = 1e-6 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(fused, chunked, atol=close, rtol=2e-2)


def test_bits_per_byte_count_every_byte_once(network: Make, tmp_path: Path) -> None:
    decoder, config = network()
    texts = ["abcdefghij" * 3, "xyz", "a"]
    corpus = Corpus.build(
        (Document(text, "here:1") for text in texts),
        lambda some: [[1 + ord(c) % (VOCAB - 1) for c in text] for text in some],
        tmp_path / "corpus", eos=0, vocab_size=VOCAB,
    )  # fmt: skip
    nats = 0.0
    for text in texts:  # a piece's first token is seen, not predicted: rows of 64 hold each text whole
        ids = torch.tensor([0] + [1 + ord(c) % (VOCAB - 1) for c in text])
        logits = decoder(ids[None])[0, :-1]
        nats += float(F.cross_entropy(logits.detach(), ids[1:], reduction="sum"))
    found, tokens, flops = bits_per_byte(decoder, corpus, 64, 40, config, Alone("cpu"))
    assert found == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-5)
    assert tokens == sum(map(len, texts)) + len(texts)
    assert flops > 0
    again, _, _ = bits_per_byte(decoder, corpus, 64, 10**6, config, Alone("cpu"))
    assert again == pytest.approx(found, rel=1e-5)


def test_two_ranks_score_a_corpus_together(network: Make, on_two: Callable[..., Any], tmp_path: Path) -> None:
    decoder, config = network()
    corpus = Corpus.build(
        (Document(text, "here:1") for text in ["abcdefghij" * 3, "xyz", "a"]),
        lambda texts: [[1 + ord(c) % (VOCAB - 1) for c in text] for text in texts],
        tmp_path / "corpus", eos=0, vocab_size=VOCAB,
    )  # fmt: skip
    bits, *counts = bits_per_byte(decoder, corpus, 16, 30, config, Alone("cpu"))  # some batches are one row

    def work(rank: Any, own: Decoder) -> tuple[float, int, int]:
        return bits_per_byte(own, corpus, 16, 30, config, rank)

    for found, *counted in on_two(work, decoder):
        assert found == pytest.approx(bits, rel=1e-6)
        assert counted == counts
