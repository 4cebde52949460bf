"""From the page's messages to a request, and from an answer's chunks to the page's messages.

The page shows an answer as up to three messages, told apart by `metadata["id"]`: its thinking (folded when it ends),
the answer itself (no id), and its figures (tokens, speed, cost), or what went wrong. Only the answer is sent back.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from farthing.base import figures

Message = dict[
    str, Any
]  # {"role", "content": text or [{"type": "text", "text": text}], "metadata": {"id", "title", …}}
_FORMULAS = re.compile(
    r"(```.*?(?:```|\Z)|`[^`\n]+`|\$\$.*?\$\$)"  # code and displayed formulas are left alone
    r"|\$(?=\S)([^$\n]*?)(?<=\S)\$(?!\d)",  # a formula, told from two prices as pandoc does
    re.DOTALL,
)
_DRAWN = re.compile(r"\\\(\{\}(.*?)\\\)")


def drawn(said: str) -> str:
    r"""Text with its `$x$` as `\({}x\)`: Gradio would read "$5 and $10" as a formula too. `text` takes it back."""
    return _FORMULAS.sub(lambda found: found[1] or rf"\({{}}{found[2]}\)", said)


def text(message: Message) -> str:
    """What a message says, in either of the forms that the page uses."""
    content = message["content"]
    said = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return _DRAWN.sub(r"$\1$", said)


def kind(message: Message) -> str:
    """question, answer, thinking, figures or error."""
    said = (message.get("metadata") or {}).get("id")
    return "question" if message["role"] == "user" else said or "answer"


def asked(shown: Iterable[Message], system: str) -> list[dict[str, str]]:
    """The conversation as a model reads it; a question that was left without an answer is no part of it."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    question = ""
    for message in shown:
        if kind(message) == "question":
            question = text(message)
        elif kind(message) == "answer" and text(message):
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": text(message)},
            ]
            question = ""
    return [*messages, {"role": "user", "content": question}] if question else messages


def unanswered(shown: list[Message]) -> bool:
    return bool(shown) and kind(shown[-1]) == "question"


def up_to_question(shown: list[Message]) -> list[Message]:
    """The conversation without its last answer."""
    last = max(index for index, message in enumerate(shown) if kind(message) == "question")
    return shown[: last + 1]


def turns(shown: Iterable[Message]) -> int:
    """How many questions were asked."""
    return sum(kind(message) == "question" for message in shown)


def before(shown: list[Message], turns: int) -> list[Message]:
    """The first `turns` questions and their answers."""
    questions = [index for index, message in enumerate(shown) if kind(message) == "question"]
    return shown[: questions[turns]] if turns < len(questions) else shown


@dataclass
class Answer:
    """An answer as it comes in. `clock()` counts seconds."""

    model: str
    clock: Callable[[], float] = time.perf_counter
    thinking: str = ""
    content: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    stopped: bool = False
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.started = self.clock()
        self.first: float | None = None  # when the first token came
        self.thought: float | None = None  # when the thinking ended
        self.ended: float | None = None

    def take(self, chunk: dict[str, Any]) -> None:
        """Read a `chat.completion.chunk`."""
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            delta = choice["delta"]
            reasoning, content = delta.get("reasoning_content") or "", delta.get("content") or ""
            if (reasoning or content) and self.first is None:
                self.first = self.clock()
            if content and self.thinking and self.thought is None:
                self.thought = self.clock()
            self.thinking += reasoning
            self.content += content
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def end(self, error: str = "") -> None:
        self.error = error
        self.ended = self.clock()

    def messages(self) -> list[Message]:
        """What the page shows of it by now."""
        shown: list[Message] = []
        if self.thinking:
            over = self.thought or self.ended
            title = f"Thought for {figures.duration(over - (self.first or over))}" if over else "Thinking"
            status = "done" if over else "pending"
            shown.append(
                _assistant(drawn(self.thinking), {"id": "thinking", "title": title, "status": status})
            )
        if self.content or (not self.thinking and self.ended is None):
            shown.append(_assistant(drawn(self.content.lstrip("\n"))))
        if self.error:
            shown.append(_note("error", f"⚠ {self.error[:1].upper()}{self.error[1:]}"))
        elif self.ended is not None:
            shown.append(_note("figures", self.figures(), self.details()))
        return shown

    def figures(self) -> str:
        """One line: tokens, tokens a second, seconds to the first token, cost."""
        tokens = self.usage.get("completion_tokens")
        said = [] if tokens is None else [_tokens(tokens)]
        if self.first is not None and self.ended is not None:
            if tokens and tokens > 1 and self.ended > self.first:
                said.append(f"{figures.significant((tokens - 1) / (self.ended - self.first))} tokens/s")
            said.append(f"first after {self.first - self.started:.2f} s")
        cost = (self.usage.get("cost") or {}).get("usd")
        if cost is not None:
            said.append(figures.money(cost))
        if self.finish_reason == "length":
            said.append("cut at the longest length")
        if self.stopped:
            said.append("stopped")
        return " · ".join(said) or "nothing was said"

    def details(self) -> str:
        """What the line leaves out, as Markdown."""
        prompt = self.usage.get("prompt_tokens")
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        reasoning = (self.usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
        cost = self.usage.get("cost") or {}
        rows = {
            "Model": f"`{self.model}`",
            "Prompt": prompt is not None
            and _tokens(prompt) + (f", {cached:,} of them read before and kept" if cached else ""),
            "Thinking": reasoning and f"{reasoning:,} of the tokens",
            "Processor": cost.get("seconds") is not None and f"{cost['seconds']:.2g} s",
            "Energy": cost.get("joules") is not None and f"{cost['joules']:.2g} J",
        }
        return "  \n".join(f"{name}: {value}" for name, value in rows.items() if value)


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' if count != 1 else ''}"


def question(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str, metadata: dict[str, str] | None = None) -> Message:
    return {"role": "assistant", "content": content} | ({"metadata": metadata} if metadata else {})


def _note(name: str, title: str, content: str = "") -> Message:
    return _assistant(content, {"id": name, "title": title, "status": "done"})
