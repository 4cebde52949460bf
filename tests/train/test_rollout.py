"""Batches: what is asked, what is kept, what is counted. The verdicts here are scripted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from farthing.base.device import Alone
from farthing.base.errors import UserError
from farthing.cost import ledger
from farthing.cost.devices import Device
from farthing.cost.meter import Meter
from farthing.data.overlap import HeldOut
from farthing.engine import Model, Sample
from farthing.recipe import Grpo
from farthing.tasks import Item, Verdict
from farthing.tasks.mixture import Mixture
from farthing.train.rollout import Batch, Group, Roller

Make = Callable[..., Grpo]


class Judge:
    """Gives the verdicts it was told to, a letter an answer: r(ight), w(rong), u(nparsed); then wrong for
    ever."""

    def __init__(self, script: str) -> None:
        self.script = list(script.replace(" ", ""))
        self.texts: list[str] = []

    def verify(self, pairs: Sequence[tuple[Item, str]], convention: str) -> list[Verdict]:
        words = {"r": "right", "w": "wrong", "u": "unparsed"}
        self.texts += [text for _, text in pairs]
        return [Verdict(words[self.script.pop(0) if self.script else "w"]) for _ in pairs]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return Model(tiny_model)


@pytest.fixture
def roll(model: Model, meter: Meter) -> Callable[..., Roller]:
    def make(stage: Grpo, script: str = "", seed: int = 3) -> Roller:
        tasks = {name: setting.model_dump() for name, setting in stage.tasks.items()}
        stream, pool = Mixture(tasks, seed).stream(HeldOut()), Judge(script)
        return Roller(
            stage, model, model.engine(), stream, pool, meter, seed, Alone("cpu")  # type: ignore[arg-type]
        )  # fmt: skip

    return make


def questions(groups: Sequence[Group]) -> list[int]:
    return [group.item.index for group in groups]


def test_silent_groups_are_counted_but_not_trained_on(roll: Callable[..., Roller], make_stage: Make) -> None:
    roller = roll(make_stage(prompts=3), "wwww rwuw rrrr")
    batch, cursor = roller.collect(0, 5)
    assert cursor == 8
    assert questions(batch.sampled) == [5, 6, 7]
    assert questions(batch.groups) == [6]
    finished = [s.finish_reason == "stop" for g in batch.sampled for s in g.samples]
    metrics = batch.metrics(Alone("cpu"))
    assert all(finished), "an answer ran out of tokens; give the test more"
    assert metrics["right"] == metrics["reward"] == pytest.approx(5 / 12)
    assert metrics["unparsed"] == pytest.approx(1 / 12)
    assert metrics["cut_off"] == 0
    assert (metrics["groups_kept"], metrics["groups_sampled"]) == (1, 3)
    assert metrics["length"] == pytest.approx(sum(len(s.ids) for g in batch.sampled for s in g.samples) / 12)
    kept = roll(make_stage(prompts=3, drop_silent=False), "wwww rwuw rrrr").collect(0, 5)[0]
    assert questions(kept.groups) == [5, 6, 7]


def test_refill_asks_only_for_what_is_missing(roll: Callable[..., Roller], make_stage: Make) -> None:
    roller = roll(make_stage(prompts=3, refill=3), "wwww rwww rrrr wwwr rwww rwww")
    batch, cursor = roller.collect(0, 0)
    assert questions(batch.groups) == [1, 3, 4]
    assert questions(batch.sampled) == [0, 1, 2, 3, 4]  # three, and then two for the two that were lost
    assert cursor == 5
    roller = roll(make_stage(prompts=3, refill=3), "wwww rwww rrrr rrrr rwww wwww rwww rwww")
    batch, cursor = roller.collect(0, 0)
    assert questions(batch.groups) == [1, 4, 6]  # three, then two, then one, and one more
    assert cursor == 7
    short, cursor = roll(make_stage(prompts=3, refill=1), "wwww" * 9).collect(0, 0)
    assert (short.groups, len(short.sampled), cursor) == ([], 6, 6)


def test_no_two_samples_of_a_step_share_their_draws(roll: Callable[..., Roller], make_stage: Make) -> None:
    numbers: list[int] = []
    roller = roll(make_stage(prompts=2, refill=2))
    generate = roller.generator.generate

    def watched(requests):  # type: ignore[no-untyped-def]
        numbers.extend(r.first_sample + i for r in requests for i in range(r.samples))
        assert {r.sampling.seed for r in requests} == {(3 << 32) + 7}
        return generate(requests)

    roller.generator.generate = watched  # type: ignore[method-assign]
    roller.collect(7, 0)
    assert sorted(numbers) == list(range(2 * 3 * 4))


def test_a_batch_depends_on_step_cursor_and_seed_alone(roll: Callable[..., Roller], make_stage: Make) -> None:
    stage = make_stage(prompts=4)

    def texts(roller: Roller, step: int, cursor: int) -> list[list[list[int]]]:
        return [[s.ids for s in g.samples] for g in roller.collect(step, cursor)[0].sampled]

    used = roll(stage)
    first = texts(used, 0, 0)
    assert texts(used, 1, 0) != first
    assert texts(used, 0, 0) == first
    assert texts(roll(stage), 0, 0) == first
    assert texts(roll(stage, seed=4), 0, 0) != first


def test_what_runs_out_of_tokens_is_cut_off_whatever_it_says(
    roll: Callable[..., Roller], make_stage: Make, tmp_path: Path, meter: Meter
) -> None:
    batch, _ = roll(make_stage(max_new_tokens=1), "r" * 8).collect(0, 0)
    assert {o for g in batch.sampled for o in g.outcomes} == {"cut_off"}
    assert batch.metrics(Alone("cpu"))["cut_off"] == 1
    assert batch.metrics(Alone("cpu"))["reward"] == 0
    meter.close()
    by_activity = {line["activity"]: line for line in ledger.read(tmp_path / "ledger.jsonl")[0]}
    assert by_activity["generate"]["tokens_out"] == 8
    assert by_activity["generate"]["flops"] > 0
    assert by_activity["verify"]["step"] == 0


def test_outcomes_and_rewards() -> None:
    cut, whole = Sample([1], finish_reason="length"), Sample([1], finish_reason="stop")
    assert Verdict("right").outcome_of(cut.finish_reason) == "cut_off"
    assert Verdict("right").outcome_of(whole.finish_reason) == "right"
    assert Verdict("timeout").outcome_of(whole.finish_reason) == "timeout"
    item = Item("chain_sum", 0, 0, "1 + 1 =", "2", {"scorer": "integer"})
    group = Group(item, [1], [whole] * 6, ["right", "wrong", "unparsed", "cut_off", "timeout", "bad_gold"])
    assert group.rewards == [1, 0, 0, 0, 0, 0]
    assert not group.silent
    assert Group(item, [1], [whole] * 3, ["wrong", "cut_off", "unparsed"]).silent
    assert Batch([], [group]).metrics(Alone("cpu"))["right"] == pytest.approx(1 / 6)


def test_two_ranks_ask_what_one_asks(
    model: Model, make_stage: Make, on_two: Callable[..., Any], tmp_path: Path
) -> None:
    stage = make_stage(prompts=4, refill=2)
    scripts = {1: ("wwww rwww rrrr rwwu wwww rwww rwwr",), 2: ("wwww rwww wwww rwwr", "rrrr rwwu rwww")}

    def work(rank: Any, _: None) -> tuple[Batch, int, dict[str, Any], Any]:
        tasks = {name: setting.model_dump() for name, setting in stage.tasks.items()}
        stream, judge = Mixture(tasks, 3).stream(HeldOut()), Judge(scripts[rank.count][rank.index])
        path = tmp_path / f"{rank.count}-{rank.index}.jsonl"
        with Meter(path, stage="01-grpo", device=Device("test", "cpu"), rate=(0.0, "test")) as meter:
            roller = Roller(stage, model, model.engine(), stream, judge, meter, 3, rank)  # type: ignore[arg-type]
            batch, cursor = roller.collect(0, 5)
        booked = [line for line in ledger.read(path)[0] if line["activity"] == "generate"]
        counts = [[line["tokens_in"], line["tokens_out"]] for line in booked]
        return batch, cursor, batch.metrics(rank), counts

    whole, end, expected, _ = work(Alone("cpu"), None)
    (first, *ours), (second, *theirs) = on_two(work, None)
    assert questions(whole.sampled) == [5, 6, 7, 8, 9, 10, 11]
    assert questions(first.sampled) == [
        5,
        6,
        9,
        11,
    ]  # the last refill is one question, and none for the other
    assert questions(second.sampled) == [7, 8, 10]
    assert sorted(questions(first.groups + second.groups)) == questions(whole.groups)
    assert ours == theirs
    assert ours[0] == end
    for name in ("right", "reward", "unparsed", "groups_kept", "groups_sampled"):
        assert ours[1][name] == pytest.approx(expected[name]), name
    assert sum(out for _, out in ours[2]) == sum(
        len(s.ids) for b in (first, second) for g in b.sampled for s in g.samples
    )


def test_scores_of_several_parts_are_what_trains(roll: Callable[..., Roller], make_stage: Make) -> None:
    roller = roll(make_stage(prompts=1))
    asked = Item("mine", 0, 0, "3 + 4 =", "7", {"scorer": "rewards", "row": {}, "rewards": [
        {"use": "number", "weight": 1.0, "settings": {}}, {"use": "format", "weight": 0.5, "settings": {}},
    ]})  # fmt: skip
    found = [
        Verdict("right", "7", 1.5, {"number": 1.0, "format": 1.0}),
        Verdict("right", "7", 1.0, {"number": 1.0, "format": 0.0}),
        Verdict("error", error="mine.py, line 3: KeyError: 'x' (row 0 of mine)"),
        Verdict("wrong", "8", 0.5, {"number": 0.0, "format": 1.0}),
    ]
    roller.stream.take = lambda cursor, n: ([asked], cursor + 1)  # type: ignore[method-assign]
    roller.pool.verify = lambda pairs, convention: found  # type: ignore[method-assign]
    batch, _ = roller.collect(0, 0)
    assert batch.sampled[0].rewards == [1.5, 1.0, 1.0, 0.5]  # without a reward: the mean of the others
    metrics = batch.metrics(Alone("cpu"))
    assert metrics["error"] == 0.25
    assert metrics["reward_parts"] == {"number": pytest.approx(2 / 3), "format": pytest.approx(2 / 3)}
    roller.pool.verify = lambda pairs, convention: [found[2]] * 4  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=r"^step 3: the reward failed for every answer: mine.py, line 3: KeyError"
    ):
        roller.collect(2, 0)


def test_failed_rewards_make_no_signal() -> None:
    item = Item("mine", 0, 0, "?", "7", {"scorer": "rewards", "row": {}, "rewards": []})
    whole, failed, fine = (
        Sample([1], finish_reason="stop"),
        Verdict("error", error="why"),
        Verdict("right", None, 0.1),
    )
    group = Group(item, [1], [whole] * 4, ["right"] * 3 + ["error"], [fine, fine, fine, failed])
    assert group.rewards == [0.1] * 4
    assert group.silent
    assert Group(item, [1], [whole] * 2, ["error"] * 2, [failed] * 2).silent
