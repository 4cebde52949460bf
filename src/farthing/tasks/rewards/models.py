"""What rewards ask of the models of this process; `engine/asked.py` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from farthing.cost.meter import Span
from farthing.tasks.item import Item


@dataclass(frozen=True)
class Reply:
    """A judge's reply, or the line about why there is none; and the tokens that were read and written for it."""

    text: str = ""
    error: str | None = None
    tokens: int = 0


class Models(Protocol):
    """Models by their source, each loaded when it is first asked, and kept. The work is booked on the span.

    Raises UserError for a source that cannot be loaded.
    """

    def replies(self, source: str, prompts: Sequence[str], max_new_tokens: int, span: Span) -> list[Reply]:
        """The greedy replies to messages of a user."""

    def scores(self, source: str, pairs: Sequence[tuple[Item, str]], span: Span) -> list[float | str]:
        """A reward model's scores of answers, or the lines about why there are none."""
