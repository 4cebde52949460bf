"""Talking to a model in the terminal.

The loop knows nothing of models: it is given a function that answers a conversation. What a model writes is untrusted:
it reaches the terminal through `base.terminal.harmless`; the conversation itself keeps the text as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from farthing.base.errors import UserError
from farthing.base.figures import plural
from farthing.base.files import write, write_json
from farthing.base.limits import named
from farthing.base.terminal import harmless, one_line
from farthing.base.waiting import Waiting
from farthing.serve.thinking import CLOSE, OPEN, split_thinking

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

HELP = """\
/think          show the model's thinking, or fold it away again
/system TEXT    set the system message; without a text, there is none
/model SOURCE   go on with another model
/save FILE      write the conversation to a .json or .md file
/reset          forget the conversation
/help           this list
/quit           leave (so do Ctrl-D, and Ctrl-C twice)
A line that ends with \\ goes on in the next; pasted lines are one message.
Ctrl-C stops an answer; the part already shown stays in the conversation."""

_COMMAND = re.compile(r"/(\w+)")
_WITH_TEXT = re.compile(r"/(system|model|save)(?:\s+(.*))?", re.DOTALL)
_DIM, _PLAIN, _START_OF_LINE = "\x1b[2m", "\x1b[22m", "\r\x1b[K"


@dataclass(frozen=True)
class Answer:
    """An answer in pieces of text, as it is generated."""

    pieces: Iterator[str]
    opened: bool = False
    """Whether the text begins within a thought, which the chat template has opened."""
    left_out: int = 0
    """The oldest messages that had no room in the model's context."""
    report: Callable[[], str] = lambda: ""
    """Length, speed and cost in one line, once the pieces have come to an end."""


Reply = Callable[[list[Message]], Answer]


def chat_loop(
    reply: Reply,
    read: Callable[[str], str],
    output: TextIO,
    *,
    system: str | None = None,
    terminal: bool = True,
    source: str = "",
    load: Callable[[str], Reply] | None = None,
) -> list[Message]:
    """Run a conversation until the input ends, and return it.

    `reply(messages)` answers. `read(prompt)` gives one line and raises EOFError at the end and KeyboardInterrupt on
    Ctrl-C, as `input` does; a subclass of KeyboardInterrupt asks the whole program to end and is passed on. With
    `terminal` false nothing but answers is written: no prompts, no colour, no thinking; and what is read loads no model
    and writes no file. A UserError of `reply` is shown and its question withdrawn; without a terminal it is raised.

    Args:
        source: the model's name, for `/save`.
        load: what `/model` loads another one with.
    """
    chat = _Chat(reply, output, system, terminal, source, load)
    interrupts = 0
    while True:
        try:
            said = _read(read, "> " if terminal else "", "… " if terminal else "").strip()
        except EOFError:
            if terminal:
                output.write("\n")
            return chat.messages
        except KeyboardInterrupt as interrupt:
            if not terminal or type(interrupt) is not KeyboardInterrupt:
                raise
            output.write("\n")
            interrupts += 1
            if interrupts > 1:
                return chat.messages
            chat.say("Ctrl-C again, or Ctrl-D, leaves")
            continue
        interrupts = 0
        if said == "/quit":
            return chat.messages
        if not said:
            continue
        try:
            if not chat.obeys(said):
                chat.ask(said)
        except UserError as error:
            if not terminal:
                raise
            chat.say(f"farthing: {one_line(str(error))}")
        except KeyboardInterrupt as interrupt:  # while a model was loaded, or a prompt made
            if not terminal or type(interrupt) is not KeyboardInterrupt:
                raise
            output.write("\n")
            chat.say("stopped")


def pasted(read: Callable[[str], str], more: Callable[[], bool]) -> Callable[[str], str]:
    """`read`, but lines that arrive together are one text: `more` says whether another one is there already."""

    def read_all(prompt: str) -> str:
        lines = [read(prompt)]
        try:
            while more():
                lines.append(read(""))
        except EOFError:
            pass
        return "\n".join(lines)

    return read_all


def _read(read: Callable[[str], str], prompt: str, further: str) -> str:
    """A message: a line, and the next one for as long as they end with a backslash."""
    lines = [read(prompt)]
    try:
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(read(further))
    except EOFError:
        pass
    return "\n".join(lines)


class _Chat:
    """The conversation so far, and whom it is held with."""

    def __init__(
        self,
        reply: Reply,
        output: TextIO,
        system: str | None,
        terminal: bool,
        source: str,
        load: Callable[[str], Reply] | None,
    ) -> None:
        self._reply, self._output, self._terminal = reply, output, terminal
        self._source, self._load = source, load
        self._show_thinking, self._left_out = False, 0
        self.messages: list[Message] = []
        self._set_system(system or "")

    def say(self, text: str) -> None:
        """A word of the program's own, to a terminal only."""
        if self._terminal:
            self._output.write(f"{_DIM}{text}{_PLAIN}\n")
            self._output.flush()

    def obeys(self, said: str) -> bool:
        """Whether it was a command, which is carried out. Raises UserError."""
        if said == "/reset":
            self.messages, self._left_out = self._system, 0
            self.say("forgotten")
        elif said == "/think":
            self._show_thinking = not self._show_thinking
            self.say("thinking is shown" if self._show_thinking else "thinking is folded away")
        elif said == "/help":
            self.say(HELP)
        elif self._terminal and (found := _WITH_TEXT.fullmatch(said)):
            self._carry_out(found[1], (found[2] or "").strip())
        elif self._terminal and _COMMAND.fullmatch(said):
            self.say(f"{said} is not a command; /help lists them")
        else:
            return False
        return True

    def ask(self, said: str) -> None:
        """Have a message answered. Raises UserError and KeyboardInterrupt, and then it was never said."""
        self.messages.append({"role": "user", "content": said})
        try:
            answer = self._reply(list(self.messages))
            if answer.left_out > self._left_out:
                self.say(f"(without {plural(answer.left_out, 'old message')}: the model's context is full)")
            self._left_out = answer.left_out
            text = _shown(answer, _View(self._output, self._show_thinking, self._terminal))
        except (UserError, KeyboardInterrupt):  # the latter before there was an answer to stop
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": text})
        if report := answer.report():
            self.say(report)

    @property
    def _system(self) -> list[Message]:
        return [message for message in self.messages if message["role"] == "system"]

    def _set_system(self, text: str) -> None:
        rest = self.messages[len(self._system) :]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def _carry_out(self, command: str, text: str) -> None:
        if command == "system":
            self._set_system(text)
            self.say("the system message is set" if text else "there is no system message")
        elif not text:
            self.say(f"/{command} needs {'a file' if command == 'save' else 'a source'}; see /help")
        elif command == "save":
            self.say(f"saved in {one_line(str(_save(text, self._source, self.messages)))}")
        elif self._load is not None:
            self._reply, self._source = self._load(text), text
            self.say(f"now with {one_line(text)}")


def _save(name: str, source: str, messages: list[Message]) -> Path:
    """Write a conversation to a new file. Raises UserError."""
    path = named(name)
    if path.suffix not in (".json", ".md"):
        raise UserError(f"{name}: a conversation is saved as .json or .md; name it so")
    if path.exists():
        raise UserError(f"{name} exists; give another name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder; give another place")
    if path.suffix == ".json":
        write_json(path, {"source": source, "messages": messages})
    else:
        parts = [f"# {source}", *(f"## {message['role']}\n\n{_markdown(message)}" for message in messages)]
        write(path, "\n\n".join(parts) + "\n")
    return path


def _markdown(message: Message) -> str:
    """A message's text, its thoughts as quotations."""
    parts = [
        re.sub("^", "> ", text.strip(), flags=re.MULTILINE) if thinking else text.strip()
        for thinking, text in split_thinking([message["content"]])
    ]
    return "\n\n".join(filter(None, parts))


def _shown(answer: Answer, view: _View) -> str:
    """Show an answer as it comes and return all of it, thinking included; Ctrl-C cuts it short."""
    said: list[str] = []

    def heard() -> Generator[str, None, None]:
        pieces = answer.pieces
        try:
            with view.waiting():
                piece = next(pieces, None)
            while piece is not None:
                said.append(piece)
                yield piece
                piece = next(pieces, None)
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:  # a generator frees its cache now, not when it is collected
                close()

    try:
        with closing(heard()) as pieces:
            for thinking, text in split_thinking(pieces, answer.opened):
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
    text = (f"{OPEN}\n" if answer.opened else "") + "".join(said)
    # An open thought would swallow the rest of the conversation in the model's eyes.
    return text + f"\n{CLOSE}\n" if text.rfind(OPEN) > text.rfind(CLOSE) else text


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
