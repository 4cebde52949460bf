"""What is said of made-up figures, and when a stage that learns nothing stops."""

from typing import Any

import pytest

from farthing.train.alarms import ALARMS, EARLY, NothingToLearn, Watch, has_signal, remedy

HEALTHY: dict[str, Any] = {
    "signal": 40, "right": 0.4, "unparsed": 0.05, "cut_off": 0.02, "timeout": 0.0, "entropy": 0.3, "kl": 0.01,
    "grad_norm": 0.7, "clip_fraction": 0.01, "silent": 0.3, "groups_kept": 5, "groups_sampled": 8,
}  # fmt: skip
BEYOND = {"entropy": 0.001, "kl": 3.0, "grad_norm": 12.0, "clip_fraction": 0.5, "cut_off": 0.6, "silent": 0.9}
SILENT = {"signal": 0, "silent": 1.0, "grad_norm": None, "right": 0.0, "unparsed": 0.0, "cut_off": 0.0}


class Heard(list[str]):
    """A watch's sentences."""

    def __init__(self, stop: int | None = 10) -> None:
        super().__init__()
        self.watch = Watch(self.append, stop)
        self.step = 0

    def go(self, steps: int, **changed: Any) -> "Heard":
        for _ in range(steps):
            self.watch.check()
            self.step += 1
            self.watch.see({**HEALTHY, "step": self.step, **changed})
        return self


def test_a_healthy_run_hears_nothing() -> None:
    assert Heard().go(100) == []


@pytest.mark.parametrize("alarm", ALARMS, ids=lambda alarm: alarm.key)
def test_each_alarm_rings_once_after_its_steps(alarm: Any) -> None:
    heard = Heard().go(2)
    beyond = {alarm.key: BEYOND[alarm.key]}
    assert heard.go(alarm.steps - 1, **beyond) == []
    heard.go(1)  # a step within the limit in between starts the count anew
    assert heard.go(alarm.steps - 1, **beyond) == []
    heard.go(1, **beyond)
    assert len(heard) == 1
    assert "\n" not in heard[0]
    assert heard[0].startswith(f"step {heard.step}")
    heard.go(30, **beyond).go(3).go(30, **beyond)
    assert len(heard) == 1


def test_every_alarm_has_a_limit_that_is_told_apart_from_its_value() -> None:
    assert {alarm.key for alarm in ALARMS} == BEYOND.keys()
    for alarm in ALARMS:
        assert not alarm.rings(alarm.limit)
        assert alarm.rings(BEYOND[alarm.key])
        assert "{value}" in alarm.said


def test_a_figure_that_a_step_does_not_have_neither_rings_nor_resets() -> None:
    heard = Heard().go(1).go(2, grad_norm=12.0).go(5, grad_norm=None)
    assert heard == []
    assert len(heard.go(1, grad_norm=12.0)) == 1
    assert Heard().go(50, kl=None) == []


def test_what_an_earlier_attempt_has_said_is_not_said_again() -> None:
    said: list[str] = []
    watch = Watch(said.append, 10)
    for step in range(1, 4):
        watch.recall({**HEALTHY, "step": step, "kl": 3.0})
    watch.see({**HEALTHY, "step": 4, "kl": 3.0})
    assert said == []


# ---- nothing to learn ----

CAUSES = {
    "ask harder questions": {"right": 1.0},
    "sft stage": {"right": 0.0},
    "(answer)": {"unparsed": 1.0},
    "max_new_tokens": {"cut_off": 1.0},
    "machine busy": {"timeout": 1.0},
    "mend it": {"error": 1.0},
    "raise group or temperature": {"right": 0.5},
}


@pytest.mark.parametrize("said", CAUSES)
def test_a_run_whose_first_steps_teach_nothing_is_told_why_and_stops(said: str) -> None:
    heard = Heard(stop=5).go(EARLY, **SILENT | CAUSES[said])
    assert len(heard) == 1
    assert f"none of the first {EARLY} steps" in heard[0]
    assert said in heard[0]
    assert "after 5 such steps" in heard[0]
    heard.go(5 - EARLY, **SILENT | CAUSES[said])
    with pytest.raises(NothingToLearn, match="none of the first 5 steps") as stopped:
        heard.go(1, **SILENT)
    assert said in str(stopped.value)
    assert "stop_silent=null" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert len(heard) == 1


def test_every_answer_cut_off_counts_whatever_it_earned() -> None:
    with pytest.raises(NothingToLearn, match="max_new_tokens"):
        Heard(stop=3).go(4, cut_off=1.0, right=0.0, unparsed=0.0)


def test_one_step_with_signal_is_enough() -> None:
    heard = Heard(stop=5).go(4, **SILENT).go(1).go(60, **SILENT)
    assert len(heard) == 2  # the early word, and the alarm about groups without signal, with the cause
    assert heard[1].startswith("step 15, for 10 steps in a row: 100% of the questions teach nothing")
    assert "all answers are wrong" in heard[1]


def test_null_never_stops_and_a_small_number_stops_at_once() -> None:
    assert len(Heard(stop=None).go(200, **SILENT)) == 1
    heard = Heard(stop=1)
    with pytest.raises(NothingToLearn, match="the first step did not have"):
        heard.go(2, **SILENT)
    assert heard == []  # the stop says it


def test_an_earlier_attempts_steps_count() -> None:
    watch = Watch(lambda _: None, 3)
    for step in range(1, 4):
        watch.recall({**HEALTHY, **SILENT, "step": step})
    with pytest.raises(NothingToLearn):
        watch.check()


def test_steps_of_0_1_0_say_whether_they_had_signal() -> None:
    assert has_signal({"step": 1, "groups_kept": 2, "cut_off": 0.5})
    assert not has_signal({"step": 1, "groups_kept": 0, "cut_off": 0.5})


def test_most_of_the_answers_decide_the_remedy() -> None:
    line = {"right": 0.02, "unparsed": 0.6, "cut_off": 0.3}
    assert remedy([line]).startswith("60% of the answers hold none that can be read")
