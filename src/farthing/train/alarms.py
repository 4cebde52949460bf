"""What GRPO's figures look like when training goes wrong, and what to do: each is said once.

The levels are those that axolotl's documentation gives for GRPO; for how many steps is ours.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farthing.base.errors import UserError
from farthing.base.figures import percent, short

Line = Mapping[str, Any]  # of metrics.jsonl

EARLY = 3  # first steps without signal after which that is said
MIXED = 0.9  # share of the answers that ended alike, below which they did not all end so


class NothingToLearn(UserError):
    """The first steps had no answer that did better than another to the same question."""


@dataclass(frozen=True)
class Alarm:
    """A figure beyond a limit at so many steps in a row."""

    key: str
    limit: float
    steps: int
    said: str
    """What to say and to do, with {value} for the latest value."""
    below: bool = False

    def rings(self, value: float) -> bool:
        return value < self.limit if self.below else value > self.limit


ALARMS = (
    Alarm("entropy", 0.01, 5, "the entropy is {value} nats per token: the model no longer explores; lower lr, raise "
          "clip_high (0.28) or give kl", below=True),
    Alarm("kl", 2.0, 1, "the KL is {value} nats per token: the model has left the one it started from; lower lr or "
          "raise kl"),
    Alarm("grad_norm", 10.0, 3, "the gradient's norm is {value}, which grad_clip cuts down; lower lr, or ask more "
          "questions a step (prompts)"),
    Alarm("clip_fraction", 0.3, 3, "{value} of the tokens are clipped: the updates of a step lead too far; lower lr or "
          "updates"),
    Alarm("cut_off", 0.3, 10, "{value} of the answers are cut off and earn nothing, however good; raise "
          "max_new_tokens, or ask for shorter answers"),
    Alarm("silent", 0.8, 10, "{value} of the questions teach nothing, as all their answers earn the same; {remedy}"),
)  # fmt: skip
_SHARES = ("clip_fraction", "cut_off", "silent")


class Watch:
    """Sees every step of a GRPO stage and warns.

    Args:
        warn: called with each sentence.
        stop: first steps without signal after which to stop; None for never.
    """

    def __init__(
        self, warn: Callable[[str], None], stop: int | None, alarms: Sequence[Alarm] = ALARMS
    ) -> None:
        self._warn, self._stop, self._alarms = warn, stop, alarms
        self._first: list[Line] = []  # the steps before the first that had signal
        self._learns = False
        self._beyond: dict[str, int] = defaultdict(int)  # steps in a row
        self._recent: deque[Line] = deque(maxlen=max((alarm.steps for alarm in alarms), default=1))
        self._told: set[str] = set()

    def recall(self, line: Line) -> None:
        """Take a step of an earlier attempt, which has warned then."""
        self._see(line, lambda _: None)

    def see(self, line: Line) -> None:
        """Take a step that was just done; may warn."""
        self._see(line, self._warn)

    def check(self) -> None:
        """To be called before a step.

        Raises:
            NothingToLearn: after the first `stop` steps if none had signal.
        """
        if self._stop is not None and not self._learns and len(self._first) >= self._stop:
            raise NothingToLearn(
                f"training stopped: {_nothing(self._first)}; or go on all the same with --set "
                "stages.grpo.stop_silent=null"
            )

    def _see(self, line: Line, warn: Callable[[str], None]) -> None:
        self._recent.append(line)
        if not self._learns:
            self._learns = has_signal(line)
            self._first += [] if self._learns else [line]
            stops_now = self._stop is not None and self._stop <= EARLY  # and says it then
            if not self._learns and len(self._first) == EARLY and not stops_now:
                end = f"; it stops after {self._stop} such steps (stop_silent)" if self._stop else ""
                warn(_nothing(self._first) + end)
        for alarm in self._alarms:
            value = line.get(alarm.key)
            if value is None:
                continue
            self._beyond[alarm.key] = self._beyond[alarm.key] + 1 if alarm.rings(value) else 0
            early = alarm.key == "silent" and not self._learns  # has been said above
            if self._beyond[alarm.key] >= alarm.steps and alarm.key not in self._told and not early:
                self._told.add(alarm.key)
                said = percent(value, 0) if alarm.key in _SHARES else short(value)
                where = f"step {line['step']}"
                if alarm.steps > 1:
                    where += f", for {alarm.steps} steps in a row"
                warn(f"{where}: " + alarm.said.format(value=said, remedy=remedy(self._recent)))


def has_signal(line: Line) -> bool:
    """Whether a step had an answer that did better than another, and not all were cut off."""
    signal = line.get("signal", line.get("groups_kept", 1))  # runs of 0.1.0 wrote no signal
    return bool(signal) and line.get("cut_off") != 1.0


def _nothing(lines: Sequence[Line]) -> str:
    steps = "the first step did not have" if len(lines) == 1 else f"none of the first {len(lines)} steps had"
    return f"{steps} anything to learn from; {remedy(lines)}"


def remedy(lines: Sequence[Line]) -> str:
    """How most of the answers ended in some steps, and what to do so that questions teach something."""

    def share(key: str) -> float:
        return sum(line.get(key) or 0.0 for line in lines) / len(lines)

    shares = {key: share(key) for key in ("right", "unparsed", "cut_off", "timeout", "error")}
    shares["wrong"] = max(0.0, 1.0 - sum(shares.values()))
    most = max(shares, key=lambda key: shares[key])
    who = "all answers" if shares[most] >= 1 else f"{percent(shares[most], 0)} of the answers"
    if shares[most] < MIXED and min(shares["right"], 1 - shares["right"]) >= 1 - MIXED:
        return (
            f"{percent(shares['right'], 0)} of the answers are right, but those to one question earn the same: raise "
            "group or temperature"
        )
    return f"{who} {_REMEDIES[most]}"


_REMEDIES = {
    "right": "are right: ask harder questions (tasks), the model can do these",
    "wrong": "are wrong: ask easier questions (tasks), fine-tune first (an sft stage), sample more answers a question "
    "(group), or take another base",
    "unparsed": "hold none that can be read: choose the convention that the model writes (answer), say in prompt or "
    "system how to answer, or fine-tune first (an sft stage)",
    "cut_off": "are cut off: raise max_new_tokens, or ask for shorter answers in prompt",
    "timeout": "could not be judged in time: is the machine busy?",
    "error": "could not be judged, because the reward failed: mend it",
}
