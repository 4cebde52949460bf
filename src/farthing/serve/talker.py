"""A loaded model's answers in a chat: within its context, and with what they cost."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing.base.errors import UserError
from farthing.base.figures import money, plural, significant
from farthing.cost.devices import detect, rate
from farthing.cost.energy import EnergyMeter
from farthing.cost.room import room_for
from farthing.serve.chat import Answer, Message
from farthing.serve.thinking import opens_thinking

if TYPE_CHECKING:
    from farthing.engine.model import Model

_SHARE = (
    4  # of the context: a quarter is kept for the answer, if it may be as long; old turns go by the quarter
)


class Talker:
    """Answers conversations with one model.

    Args:
        device, dtype: what the model computes on and in, as in `farthing.load`.
        max_new_tokens: of the longest answer; shorter where the context ends.
        sampling: further keywords of `Sampling`.
    """

    def __init__(
        self, model: Model, device: str = "auto", dtype: str = "auto", *, max_new_tokens: int, **sampling: Any
    ) -> None:
        self._model, self._longest, self._sampling = model, max_new_tokens, sampling
        self._place = device, dtype
        found = detect(device)
        self._energy = EnergyMeter(found)
        try:
            self._usd_per_second = rate(found)[0] / 3600
        except UserError:  # no price is known, so none is shown
            self._usd_per_second = 0.0

    def __call__(self, messages: list[Message]) -> Answer:
        """Answer the newest message; the oldest turns are left out if they have no room.

        Raises:
            UserError: if the newest message has no room by itself, or the model has no chat template.
        """
        kept, prompt, size = self._fitted(messages)
        left = self._model.context - size
        if left < 1:
            raise UserError(
                f"the message is too long: {size:,} tokens with the system message, and the model has room for "
                f"{self._model.context:,}; shorten it"
            )
        longest, spent = min(self._longest, left), _Spent()
        return Answer(
            self._pieces(kept, longest, spent),
            opens_thinking(prompt),
            len(messages) - len(kept),
            lambda: self._report(spent, longest),
        )

    def _fitted(self, messages: list[Message]) -> tuple[list[Message], str, int]:
        """The system message and as many of the newest turns as leave room for an answer, but one at least; the prompt
        that they make, and its tokens."""
        tokenizer = self._model.tokenizer
        system = [message for message in messages if message["role"] == "system"]
        starts = [place for place, message in enumerate(messages) if message["role"] == "user"]
        quarter = self._model.context // _SHARE
        room = self._model.context - min(self._longest, quarter)

        def rendered(turn: int) -> tuple[list[Message], str, int]:
            kept = [*system, *messages[starts[turn] :]]
            prompt = tokenizer.render(kept)
            return kept, prompt, len(tokenizer.raw_encode(prompt))

        whole = rendered(0)
        if whole[2] <= room:
            return whole
        # By the quarter: the prompt then begins as the last one did for some turns, and its cache is used again.
        most = whole[2] - -(-(whole[2] - room) // quarter) * quarter
        return rendered(bisect_left(range(len(starts) - 1), True, key=lambda turn: rendered(turn)[2] <= most))

    def _pieces(self, messages: list[Message], longest: int, spent: _Spent) -> Generator[str, None, None]:
        self._model.done()
        began, (joules, _) = time.monotonic(), self._energy.joules()
        stream = self._model.stream(messages, max_new_tokens=longest, **self._sampling)
        try:
            with closing(stream), room_for("answering", self._model.tokenizer.folder, *self._place):
                for piece in stream:
                    spent.first = spent.first or time.monotonic() - began
                    yield piece
        finally:
            spent.seconds = time.monotonic() - began
            spent.tokens = self._model.done().new_tokens
            spent.joules = self._energy.joules()[0] - joules

    def _report(self, spent: _Spent, longest: int) -> str:
        parts = [plural(spent.tokens, "token")]
        if spent.tokens > 1 and spent.seconds > spent.first:
            parts.append(f"{significant((spent.tokens - 1) / (spent.seconds - spent.first))} tokens/s")
        if self._usd_per_second:
            parts.append(money(spent.seconds * self._usd_per_second))
        parts.append(f"{significant(spent.joules)} J")
        if spent.tokens >= longest:
            parts.append(
                "which is all there was room for" if longest < self._longest else "the longest answer"
            )
        return ", ".join(parts)


@dataclass
class _Spent:
    """What an answer took; `first` is the seconds to the first piece of text."""

    tokens: int = 0
    seconds: float = 0.0
    first: float = 0.0
    joules: float = 0.0
