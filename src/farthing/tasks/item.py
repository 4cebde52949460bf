"""Items, which tasks hand out, and verdicts, which verifiers return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["right", "wrong", "unparsed", "timeout", "bad_gold", "error"]
OUTCOMES = ("right", "wrong", "unparsed", "cut_off", "timeout", "bad_gold", "error")  # of a sampled answer
READABLE = ("right", "wrong")  # an answer was read
Convention = Literal["final", "tag", "boxed"]
CONVENTIONS: tuple[Convention, ...] = ("final", "tag", "boxed")


@dataclass(frozen=True)
class Item:
    """One problem. `seed` and `index` name it: the same task, config, seed and index give the same item.

    `metadata` is JSON-like and holds what the scorer needs: always "scorer", and for arithmetic puzzles also
    "numbers", "target" and "operators". Items from data have "rewards" and "row", and what else `tasks/data.py` says.
    """

    task: str
    seed: int
    index: int
    question: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> str:
        """What a model is shown: the question, in the words and after the examples of a named set."""
        return str(self.metadata.get("asked", self.question))

    @property
    def system(self) -> str | None:
        """The system message that comes with the question, if any."""
        return self.metadata.get("system")

    def said(self, text: str) -> str:
        """A completion up to where its answer ends, in a model that goes on to ask the next question."""
        for mark in self.metadata.get("until", ()):
            text = text.partition(mark)[0]
        return text

    def convention(self, given: Convention) -> Convention:
        """How an answer is given: as a named set has it, or as the stage says."""
        named: Convention = self.metadata.get("convention", given)
        return named


@dataclass(frozen=True)
class Verdict:
    """The outcome for one completion, and the answer that was read from it (None when none could be read).

    right, wrong: an answer was read and compared. unparsed: none could be read. timeout: the verifier hit a
    limit of time or memory, or died. bad_gold: the item's own answer does not verify, so no verdict is possible.
    error: a reward of the user's own failed.
    """

    outcome: Outcome
    answer: str | None = None
    score: float | None = None
    """What the completion earns, where rewards of several parts or a function of the user's own say so."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """The reward of each part by name, before its weight."""
    error: str | None = None
    """One line about why a reward failed."""

    @property
    def reward(self) -> float:
        """The score if there is one; else 1.0 for a right answer and 0.0 for everything else."""
        if self.score is not None:
            return self.score
        return 1.0 if self.outcome == "right" else 0.0

    def outcome_of(self, finish_reason: str) -> str:
        """One of OUTCOMES for a sampled answer; one that ran out of tokens is cut_off whatever it says."""
        return "cut_off" if finish_reason == "length" else self.outcome
