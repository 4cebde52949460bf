"""Multiple choice by log-likelihood, as lm-evaluation-harness scores it."""

from pathlib import Path

import pytest
import torch

from farthing.engine import Model
from farthing.evaluate.ask import evaluate
from farthing.evaluate.choice import choose, encoded_pair
from farthing.evaluate.score import summarise
from farthing.recipe import Asks, plain_asks
from farthing.tasks import Item
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool


def item(index: int, context: str, endings: list[str], right: int) -> Item:
    likelihood = {"context": context, "endings": endings, "right": right}
    return Item("t", 0, index, context, "ABCD"[right], {"scorer": "integer", "likelihood": likelihood})


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return Model(tiny_model, torch.float32)


ITEMS = [
    item(0, "State the final answer", [" to the following", " 7", " final"], 0),
    item(1, "4 + 3 =", [" 7", " 12345678901234567890"], 1),
]


def alone(model: Model, context: str, ending: str) -> float:
    ids, start = model.tokenizer.encode(context + ending), len(model.tokenizer.encode(context))
    logits = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(float(logits[at - 1, ids[at]]) for at in range(start, len(ids)))


def test_the_likeliest_ending_is_the_answer(model: Model) -> None:
    endings = [" to the following", " 7", " final"]
    expected = [alone(model, "State the final answer", ending) for ending in endings]
    best = expected.index(max(expected))
    items = [item(0, "State the final answer", endings, right) for right in (best, (best + 1) % 3)]
    (first, second), work = choose(model, list(enumerate(items)))
    assert (first["outcome"], second["outcome"]) == ("right", "wrong")
    assert first["text"] == second["text"] == endings[best]
    assert first["answer"] == endings[best].strip()
    assert first["logprobs"] == pytest.approx(expected, abs=1e-3)
    assert work.new_tokens == 0 < work.scored_tokens


def test_per_character_a_long_ending_is_not_punished(model: Model) -> None:
    [record], _ = choose(model, [(0, ITEMS[1])])
    by_sum = record["logprobs"][0] > record["logprobs"][1]
    per_character = record["logprobs"][0] / 1 > record["logprobs"][1] / 20  # without the space before it
    assert by_sum
    assert not per_character
    assert record["right_per_character"]
    found = summarise("x", [record])
    assert (found["accuracy"], found["acc_norm"]["accuracy"]) == (0, 1)


def test_questions_with_endings_and_others_go_together(model: Model) -> None:
    asks: Asks = plain_asks({"chain_sum": 1})._replace(max_new_tokens=4)
    items = [*Mixture(asks.tasks, 0).held_out(2), *ITEMS]
    with VerifierPool(1) as pool:
        told: list[tuple[int, int]] = []
        records, work = evaluate(
            model, items, asks, pool, temperature=0, seed=0, by_likelihood=True, told=lambda a, b: told.append((a, b))
        )  # fmt: skip
        asked, _ = evaluate(model, items, asks, pool, temperature=0, seed=0)
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert ["logprobs" in record for record in records] == [False, False, True, True]
    assert records[:2] == asked[:2]
    assert "logprobs" not in asked[2]
    assert told[-1] == (4, 4)
    assert work.new_tokens > 0
    assert "acc_norm" not in summarise("x", records)


def test_a_context_keeps_its_own_tokens(model: Model) -> None:
    tokens = model.tokenizer
    context, ending = encoded_pair(tokens, "4 + 3 = ", "7")
    assert (context, ending) == (tokens.encode("4 + 3 ="), tokens.raw_encode(" 7"))
    assert encoded_pair(tokens, "", " 7") == ([tokens.eos_id], tokens.raw_encode(" 7"))
