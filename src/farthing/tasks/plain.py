"""Texts as verifiers compare them."""

from __future__ import annotations

import re

from farthing.tasks.extract import PUNCTUATION

_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm)\{([^{}]*)\}")


def plain_text(text: str, case: bool = False) -> str:
    """Text without outer punctuation, the amount of white space and, unless `case`, upper case."""
    wrapped = _LATEX_TEXT.fullmatch(text.strip())
    inner = wrapped[1] if wrapped else text
    return " ".join((inner if case else inner.casefold()).split()).strip(PUNCTUATION)
