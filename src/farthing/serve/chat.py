"""Talking to a model in the terminal.

The loop knows nothing of models: it is given a function that answers a conversation piece by piece. What a
model writes is untrusted: it reaches the terminal through `base.terminal.harmless`; the conversation itself keeps the
text as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import TextIO

from farthing.base.errors import UserError
from farthing.base.terminal import harmless, one_line
from farthing.base.waiting import Waiting
from farthing.serve.thinking import CLOSE, OPEN, split_thinking

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Reply = Callable[[list[Message]], Iterator[str]]

HELP = """\
/think   show the model's thinking, or fold it away again
/reset   forget the conversation
/help    this list
/quit    leave (so do Ctrl-D, and Ctrl-C twice)
Ctrl-C stops an answer; the part already shown stays in the conversation."""

_DIM, _PLAIN, _START_OF_LINE = "\x1b[2m", "\x1b[22m", "\r\x1b[K"


def chat_loop(
    reply: Reply,
    read: Callable[[str], str],
    output: TextIO,
    *,
    system: str | None = None,
    terminal: bool = True,
) -> list[Message]:
    """Run a conversation until the input ends, and return it.

    `reply(messages)` yields the answer's text in pieces. `read(prompt)` gives one line and raises EOFError at
    the end and KeyboardInterrupt on Ctrl-C, as `input` does; a subclass of KeyboardInterrupt asks the whole
    program to end and is passed on. With `terminal` false nothing but answers is written: no prompts, no
    colour, no thinking. A UserError of `reply` is shown and its question withdrawn; without a terminal it is
    raised.
    """
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    show_thinking, interrupts = False, 0

    def say(text: str) -> None:
        if terminal:
            output.write(f"{_DIM}{text}{_PLAIN}\n")
            output.flush()

    while True:
        try:
            line = read("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                output.write("\n")
            return messages
        except KeyboardInterrupt as interrupt:
            if not terminal or type(interrupt) is not KeyboardInterrupt:
                raise
            output.write("\n")
            interrupts += 1
            if interrupts > 1:
                return messages
            say("Ctrl-C again, or Ctrl-D, leaves")
            continue
        interrupts = 0
        if not line:
            continue
        if line == "/quit":
            return messages
        if line == "/reset":
            messages = list(start)
            say("forgotten")
        elif line == "/think":
            show_thinking = not show_thinking
            say("thinking is shown" if show_thinking else "thinking is folded away")
        elif line == "/help":
            say(HELP)
        elif terminal and re.fullmatch(r"/\w+", line):
            say(f"{line} is not a command; /help lists them")
        else:
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(reply, messages, _View(output, show_thinking, terminal))
            except UserError as error:
                messages.pop()
                if not terminal:
                    raise
                say(f"farthing: {one_line(str(error))}")
                continue
            messages.append({"role": "assistant", "content": answer})


def _answer(reply: Reply, messages: list[Message], view: _View) -> str:
    """Show one answer as it comes and return all of it, thinking included; Ctrl-C cuts it short."""
    said: list[str] = []

    def heard() -> Generator[str, None, None]:
        pieces = reply(list(messages))
        try:
            with view.waiting():
                piece = next(pieces, None)
            while piece is not None:
                said.append(piece)
                yield piece
                piece = next(pieces, None)
        finally:
            close = getattr(
                pieces, "close", None
            )  # a generator frees its cache now, not when it is collected
            if close is not None:
                close()

    try:
        with closing(heard()) as pieces:
            for thinking, text in split_thinking(pieces):
                view.write(thinking, harmless(text))
        view.close()
    except UserError:
        if said:
            view.close()
        raise
    except KeyboardInterrupt as interrupt:
        if not view.terminal or type(interrupt) is not KeyboardInterrupt:
            raise
        view.close(" (stopped)")
    answer = "".join(said)
    # An open thought would swallow the rest of the conversation in the model's eyes.
    return answer + f"\n{CLOSE}\n" if answer.rfind(OPEN) > answer.rfind(CLOSE) else answer


class _View:
    """Print one answer: its thinking as a line that counts words, or in full and dim; then the answer."""

    def __init__(self, output: TextIO, show_thinking: bool, terminal: bool) -> None:
        self.output, self.show_thinking, self.terminal = output, show_thinking, terminal
        self.thoughts, self.words, self.in_word = 0, 0, False
        self.thinking, self.answered = False, False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A terminal is told what takes long before the first word."""
        hints: list[str] = []

        def hint(text: str) -> None:
            hints.append(text)
            self.output.write(f"{_START_OF_LINE}{_DIM}{text}{_PLAIN}")
            self.output.flush()

        with Waiting("reading the conversation", hint) if self.terminal else nullcontext():
            yield
        if hints:
            self.output.write(_START_OF_LINE)

    def write(self, thinking: bool, text: str) -> None:
        if thinking:
            self._think(text)
        else:
            self._end_thinking()
            text = text if self.answered else text.lstrip()  # the newlines between thought and answer
            self.answered = self.answered or bool(text)
            self.output.write(text)
        self.output.flush()

    def close(self, note: str = "") -> None:
        unfinished = self.thinking
        self._end_thinking()
        if self.terminal and unfinished and not self.answered and not note:
            note = "(no answer: the thinking did not come to an end)"
        self.output.write(f"{_DIM}{note}{_PLAIN}\n" if note else "\n")
        self.output.flush()

    def _think(self, text: str) -> None:
        self.thinking = True
        # Words are counted without keeping the text: a thought can be very long.
        begun = text[:1] and not text[0].isspace() and self.in_word
        self.words += len(text.split()) - bool(begun)
        self.in_word = bool(text) and not text[-1].isspace()
        if self.terminal and self.show_thinking:
            self.output.write(f"{_DIM}{text}{_PLAIN}")
        elif self.terminal:
            self.output.write(f"{_START_OF_LINE}{_DIM}thinking… {_words(self.words)}{_PLAIN}")

    def _end_thinking(self) -> None:
        if not self.thinking:
            return
        self.thinking = self.in_word = False
        if self.terminal and self.show_thinking:
            self.output.write("\n\n")
        elif self.terminal:
            self.output.write(f"{_START_OF_LINE}{_DIM}thought for {_words(self.words)}{_PLAIN}\n")


def _words(count: int) -> str:
    return f"{count:,} word" + ("" if count == 1 else "s")
