"""Where a model's thinking ends and its answer begins, in text that comes in pieces.

A model writes its thoughts between <think> and </think>. Some chat templates (DeepSeek-R1, QwQ) write the <think>
themselves, at the end of the prompt; the model's own text then begins in the middle of a thought.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

OPEN, CLOSE = "<think>", "</think>"


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends with <think>, so that the model continues a thought."""
    return prompt.rstrip().endswith(OPEN)


class Splitter:
    """Separates thinking from answer, piece by piece, and drops the marks.

    A mark may be spread over any number of pieces: text that may become a mark is held back until known.

    Args:
        opened: the text begins within a thought; see `opens_thinking`.
    """

    def __init__(self, opened: bool = False) -> None:
        self.thinking = opened  # whether the text so far ends within a thought
        self._held = ""

    def push(self, piece: str) -> list[tuple[bool, str]]:
        """What is now known, as (is thinking, text)."""
        held, known = self._held + piece, []
        while True:
            mark = CLOSE if self.thinking else OPEN
            before, found, after = held.partition(mark)
            if not found:
                break
            known.append((self.thinking, before))
            self.thinking, held = not self.thinking, after
        keep = overlap(held, mark)
        known.append((self.thinking, held[: len(held) - keep]))
        self._held = held[len(held) - keep :]
        return [(thinking, text) for thinking, text in known if text]

    def flush(self) -> list[tuple[bool, str]]:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return [(self.thinking, held)] if held else []


def overlap(text: str, mark: str) -> int:
    """Length of the end of a text that may be the beginning of a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def split_thinking(pieces: Iterable[str], opened: bool = False) -> Iterator[tuple[bool, str]]:
    """Yield a text that comes in pieces as (is thinking, text), without the marks; see `Splitter`."""
    splitter = Splitter(opened)
    for piece in pieces:
        yield from splitter.push(piece)
    yield from splitter.flush()
