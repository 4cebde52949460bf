"""The one way to a terminal: whatever is printed passes through here and loses what could control the screen.

Names of tensors, keys of files, a template's own error and a model's answers are written by others. An escape in them
could move the cursor, set the clipboard or hide text.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# C0 and C1 controls except newline and tab, and the marks that reverse the direction of the text around them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def harmless(text: str) -> str:
    """`text` without what could control a terminal; newlines and tabs stay."""
    return _CONTROLS.sub("", text)


def one_line(text: str) -> str:
    """`text` on one line, harmless."""
    return " ".join(harmless(text).split())


def say(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Print lines on `file`, by default stdout; characters that it cannot show become question marks."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write(harmless(text).encode(encoding, "replace").decode(encoding) + end)
    file.flush()


def console(**options: Any) -> Console:
    """A rich console on stderr that prints nothing but its own escapes.

    Args:
        options: as rich's Console takes, for another file or width.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Harmless(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=harmless(segment.text))

    options.setdefault("file", getattr(sys.stderr, "raw", sys.stderr))
    return Harmless(**options)


class HarmlessStream:
    """A text stream that takes what could control a terminal out of all that is written to it, by whomever.

    A carriage return may stand first: with one, libraries draw a progress bar anew.
    """

    def __init__(self, stream: TextIO) -> None:
        self.raw = stream

    def write(self, text: str) -> int:
        """Write what is left of a text."""
        again = "\r" if text.startswith("\r") else ""
        self.raw.write(again + harmless(_COLOURS.sub("", text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write what is left of each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def guard() -> None:
    """Let nothing reach stderr but through here: libraries' warnings and logs, and every traceback."""
    sys.excepthook = show_traceback
    if not isinstance(sys.stderr, HarmlessStream):
        sys.stderr = HarmlessStream(sys.stderr)


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook`: an error's text may quote what others wrote."""
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), sys.stderr)
