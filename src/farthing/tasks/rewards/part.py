"""What one part of a reward finds out about one completion."""

from __future__ import annotations

from dataclasses import dataclass

from farthing.tasks.extract import tail, without_echo
from farthing.tasks.item import Item, Outcome


@dataclass(frozen=True)
class Part:
    """The outcome and the reward before its weight, which is None for no opinion; 1 or 0 by the outcome if not said."""

    outcome: Outcome
    answer: str | None = None
    reward: float | None = 0.0
    error: str | None = None


def compared(answer: str | None, right: bool) -> Part:
    """Right or wrong; unparsed without an answer."""
    if answer is None:
        return Part("unparsed")
    return Part("right", answer, 1.0) if right else Part("wrong", answer)


def said(item: Item, text: str) -> str:
    """What is read of a completion: its end after any thinking, without copies of the question."""
    return without_echo(tail(text).rpartition("</think>")[2], item.question)
