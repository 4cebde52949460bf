"""From one sample's tokens to what a client reads: thinking, text, and calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from farthing.data.tokenizer import StreamDecoder, Tokenizer
from farthing.serve.thinking import CLOSE, OPEN, Splitter, overlap
from farthing.serve.tools import Calls, Form


class Read(NamedTuple):
    """What has become known."""

    thinking: str = ""
    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()  # names and arguments


class Reader:
    """Reads one sample's tokens as they come.

    Args:
        stops: texts that end the answer and are no part of it.
        opened: the prompt ends within a thought.
        splits: whether thinking is told apart; else everything is text.
        form: of calls; None if no tool may be called.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        opened: bool = False,
        splits: bool = True,
        form: Form | None = None,
    ) -> None:
        self._decoder, self._stops = StreamDecoder(tokenizer), stops
        self._splitter = Splitter(opened) if splits else None
        self._calls = Calls(form) if form is not None else None
        marks = " ".join([OPEN, CLOSE, *(() if form is None else (form.open, form.close, *form.around))])
        # marks that are special tokens are no text to a tokenizer
        self._marks = {i: text for i in tokenizer.special_ids if (text := tokenizer.token_text(i)) in marks}
        self._held = ""  # may be the beginning of a stop
        self._stopped = False
        self._answered = False
        self.thought = 0  # tokens of thinking

    def push(self, ids: Sequence[int]) -> Read:
        """Read new tokens."""
        known: list[Read] = []
        for token in ids:
            before = self._splitter is not None and self._splitter.thinking
            mark = self._marks.get(token)
            piece = self._decoder.push(token) if mark is None else self._decoder.flush() + mark
            known.append(self._split(self._cut(piece)))
            after = self._splitter is not None and self._splitter.thinking
            self.thought += before or after
        return _joined(known)

    def finish(self) -> Read:
        """What was held back."""
        known = [self._split(self._cut(self._decoder.flush(), last=True))]
        if self._splitter is not None:
            known.append(self._sort(self._splitter.flush()))
        if self._calls is not None:
            known.append(_told(self._calls.flush()))
        return _joined(known)

    def _cut(self, piece: str, last: bool = False) -> str:
        """The text before a stop; what may become one is held back."""
        if not self._stops:
            return piece
        text, self._held = self._held + piece, ""
        if self._stopped:
            return ""
        at = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if at >= 0:
            self._stopped = True
            return text[:at]
        if last:
            return text
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _split(self, text: str) -> Read:
        if not text:
            return Read()
        return self._sort(self._splitter.push(text) if self._splitter is not None else [(False, text)])

    def _sort(self, pieces: Sequence[tuple[bool, str]]) -> Read:
        known = []
        for thinking, text in pieces:
            if thinking:
                known.append(Read(thinking=text))
                continue
            if not self._answered and self._splitter is not None and (self.thought or self._calls):
                text = text.lstrip()  # the newlines between thought and answer
            self._answered = self._answered or bool(text)
            known.append(_told(self._calls.push(text)) if self._calls is not None else Read(text=text))
        return _joined(known)


def _told(found: Sequence[str | tuple[str, str]]) -> Read:
    text = "".join(part for part in found if isinstance(part, str))
    return Read(text=text, calls=tuple(part for part in found if not isinstance(part, str)))


def _joined(known: Sequence[Read]) -> Read:
    return Read(
        "".join(read.thinking for read in known),
        "".join(read.text for read in known),
        tuple(call for read in known for call in read.calls),
    )
