"""Judges and reward models in this process, asked by the pool: parts, budgets, bookings, answers that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farthing.base.device import Place
from farthing.base.errors import UserError
from farthing.cost import ledger
from farthing.cost.meter import Meter, Span
from farthing.engine import load
from farthing.engine.asked import Asked
from farthing.tasks.item import Item, Verdict
from farthing.tasks.pool import VerifierPool
from farthing.tasks.rewards.beside import Beside
from farthing.tasks.rewards.shaping import shaped

FLOAT32 = Place("cpu", "float32", "asked for")
MakeReward = Callable[..., Path]


def item(*rewards: dict[str, Any]) -> Item:
    parts = [{"weight": 1.0, "settings": {}, **part} for part in rewards]
    return Item("mine", 0, 0, "What is 2 + 3?", "5", {"scorer": "rewards", "rewards": parts, "row": {}})


def scored_by(folder: Path, **more: Any) -> dict[str, Any]:
    return {"use": "reward_model", "weight": 0.5, "settings": {"model": str(folder), **more}}


def judge(folder: Path, **more: Any) -> dict[str, Any]:
    settings = {"model": str(folder), "prompt": "{question} {completion}", "max_new_tokens": 5, **more}
    return {"use": "judge", "settings": settings}


def span() -> Span:
    return Span("01-grpo", "judge", None, 0.0)


def booked(path: Path) -> ledger.Line:
    """The only line of asking models."""
    [line] = [line for line in ledger.read(path / "ledger.jsonl")[0] if line["activity"] == "judge"]
    return line


def test_a_reward_model_is_a_part(tiny_reward: MakeReward, meter: Meter, tmp_path: Path) -> None:
    folder = tiny_reward()
    asked, models = item({"use": "number"}, scored_by(folder)), Asked(FLOAT32)
    pairs = [(asked, "The answer is: 5"), (asked, "The answer is: 6")]
    with VerifierPool(1, asking=Beside(models, meter)) as pool, meter.span("verify", step=2):
        right, wrong = pool.verify(pairs, "final")
        assert pool.verify(pairs, "final", beside=False)[0].parts == {"number": 1.0}
    scores = [float(score) for score in models.scores(str(folder), pairs, span())]
    assert (right.outcome, wrong.outcome) == ("right", "wrong")
    assert right.parts == {"number": 1.0, "reward_model": pytest.approx(scores[0])}
    assert right.score == pytest.approx(1.0 + 0.5 * scores[0])
    assert wrong.score == pytest.approx(0.5 * scores[1])
    meter.close()
    line = booked(tmp_path)
    assert line["step"] == 2
    assert line["tokens_in"] > 10
    assert line["flops"] > 0


def test_alone_it_says_what_is_right(tiny_reward: MakeReward) -> None:
    folder, models = tiny_reward(), Asked(FLOAT32)
    score = float(models.scores(str(folder), [(item(), "5")], span())[0])
    with VerifierPool(1, asking=Beside(models)) as pool:
        for right_from, outcome in ((score - 1, "right"), (score + 1, "wrong")):
            [verdict] = pool.verify([(item(scored_by(folder, right_from=right_from)), "5")], "final")
            assert verdict.outcome == outcome


def test_an_answer_that_ran_out_of_tokens_keeps_its_score() -> None:
    """Or it would earn 0, which is more than a finished one with a score below 0."""
    asked = item({"use": "number"}, {"use": "reward_model", "settings": {"model": "any"}})
    verdict = Verdict("right", "5", -2.0, {"number": 1.0, "reward_model": -3.0})
    [cut] = shaped(asked, [verdict], [6], [True], 6)
    assert (cut.parts, cut.score) == ({"number": 0.0, "reward_model": -3.0}, -3.0)


def test_an_answer_that_does_not_fit_is_an_error(tiny_reward: MakeReward) -> None:
    asked = item(scored_by(tiny_reward()))
    with VerifierPool(1, asking=Beside(Asked(FLOAT32))) as pool:
        fits, longer = pool.verify([(asked, "5"), (asked, "5 " * 300)], "final")
    assert fits.outcome in ("right", "wrong")
    assert longer.outcome == "error"
    assert "tokens, and the model reads 256" in str(longer.error)


def test_a_judge_of_this_process_replies_as_the_model_does(
    tiny_model: Path, meter: Meter, tmp_path: Path
) -> None:
    prompts = ["What is 2 + 3?", "State the final answer to the following arithmetic problem: 6 - 4 ="]
    models, work = Asked(FLOAT32), span()
    replies = models.replies(str(tiny_model), prompts, 5, work)
    own = load(tiny_model, "float32")
    chats = [
        own.chat([{"role": "user", "content": text}], max_new_tokens=5, temperature=0.0) for text in prompts
    ]
    assert [reply.text for reply in replies] == [chat.text for chat in chats]
    assert work.tokens_in + work.tokens_out == sum(reply.tokens for reply in replies)
    assert work.flops > 0
    [long] = models.replies(str(tiny_model), ["5 " * 300], 5, span())
    assert "tokens, and the model reads 251" in str(long.error)
    asked = item(judge(tiny_model))
    with VerifierPool(1, asking=Beside(models, meter)) as pool:
        verdict, same, longer = pool.verify([(asked, "5"), (asked, "5"), (asked, "5 " * 300)], "final")
        assert (verdict.outcome, verdict.parts) == ("unparsed", {"judge": 0.0})  # it says a sum, and no score
        assert same == verdict
        assert longer.outcome == "error"
        assert (pool.asking.judges.calls, pool.asking.judges.usd) == (2, 0.0)
    meter.close()
    line = booked(tmp_path)
    assert line["tokens_out"] > 0
    assert "usd_paid" not in line


@pytest.mark.parametrize(("budget", "said"), [({"calls": 3}, "3 calls"), ({"tokens": 20}, "20 tokens")])
def test_a_judge_of_this_process_has_a_budget(tiny_model: Path, budget: dict[str, int], said: str) -> None:
    asked = item(judge(tiny_model, at_once=2, **budget))
    with VerifierPool(1, asking=Beside(Asked(FLOAT32))) as pool:
        pool.verify([(asked, "5")], "final")
        with pytest.raises(UserError, match=rf"^judge: its budget of {said} is spent"):
            pool.verify([(asked, f"answer {number}") for number in range(3)], "final")


def test_models_that_cannot_be_asked_are_refused(
    tiny_model: Path, tiny_reward: MakeReward, tmp_path: Path
) -> None:
    models = Asked(FLOAT32)
    with pytest.raises(UserError, match="is no reward model: its architecture is LlamaForCausalLM"):
        models.scores(str(tiny_model), [(item(), "5")], span())
    with pytest.raises(UserError, match="holds a reward model, which writes no text"):
        models.replies(str(tiny_reward()), ["Why?"], 5, span())
    bare = load(tiny_model).save(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template to be asked by"):
        models.replies(str(bare), ["Why?"], 5, span())
    with pytest.raises(UserError, match="does not exist"):
        models.scores("./nowhere", [(item(), "5")], span())
