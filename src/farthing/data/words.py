"""Text as words, numbers and signs, so that the same question written in another way gives the same words.

What carries no meaning in a question is dropped (case, accents, quotes, full stops, markdown, TeX's dollars, zero-width
characters); what does is kept, one spelling for each (every minus, every multiplication sign, `1,000` and `1000`,
`three` and `3`).
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

_LETTERS = r"[^\W\d_]"
_DASHES = "-‐‑‒–—―−"
_QUOTES = "'’ʼ"
_ONE_BY_ONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts written without spaces (Thai, Lao, Burmese, Khmer, kana, Han): each character is a word."""


def _pattern(letters: str, dashes: str, quotes: str, others: str) -> re.Pattern[str]:
    operand = rf"(?:\d|\(|\.\d|{letters}(?!{letters}))"
    begins = rf"(?:[\w({dashes}]|\.\d)"
    return re.compile(
        rf"""
        {letters}+(?:[{quotes}]{letters}+)*
        | \d+(?:,\d\d\d)+(?!\d)(?:\.\d+)? | \d+(?:\.\d+)? | (?<!\d)\.\d+  # numbers
        | (?<=\d)[ ]x[ ](?=\d)  # 3 x 4
        | \\[a-z]+ | \\[^\sa-z\d]  # TeX
        | [{dashes}](?=\s?{operand})  # a minus, not a hyphen
        | (?<=[\w)])\*\*?(?={begins}) | (?<=[\w)][ ])\*\*?(?=[ ]{begins})  # a product, not an emphasis
        | (?<=[\d)])!(?!=)  # a factorial
        | [+/^=<>%()&@] {others}
        """,
        re.VERBOSE,
    )


_ASCII = _pattern("[a-z]", r"\-", "'", "")
_ANY = _pattern(
    rf"(?![{_ONE_BY_ONE}]){_LETTERS}",
    rf"\{_DASHES}",
    _QUOTES,
    rf"| [{_ONE_BY_ONE}] | [^\w\s\x00-\x7f{_DASHES}]",
)
_BLANKS = re.compile("[ \\t]{2,}|\\t")
_DRAWN = 8  # signs, with fewer letters among them, make a line of a picture; three lines a picture
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LABEL = re.compile(r"(?<![\w()])\(?([a-h])\)(?=\s+\w)")  # of a choice
_VULGAR = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")  # 2½ is not 21/2
_SUPERSCRIPT = re.compile("([²³¹⁰⁴-⁹]+)")
_INVISIBLE = re.compile(
    "[\xad\u0300-\u0337\u0339-\u036f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]"
)
_NARROW = re.compile("(?<=\\d)[\u2009\u202f](?=\\d\\d\\d)")  # spaces that only stand inside a number
_SIGNS = {
    **dict.fromkeys(_DASHES, "-"),
    **dict.fromkeys(("×", "·", "⋅", "∙", "∗", "✕", "✖", " x "), "*"),
    **dict.fromkeys("÷∕⁄", "/"),
    **{"**": "^", "√": "sqrt", "∞": "infinity", "\\*": "*", "\\%": "%", "\\&": "&"},
    **{"\\times": "*", "\\cdot": "*", "\\ast": "*", "\\div": "/", "\\percent": "%", "\\infty": "infinity"},
    **{"\\le": "≤", "\\leq": "≤", "\\ge": "≥", "\\geq": "≥", "\\pi": "π", "\\lt": "<", "\\gt": ">"},
    **{
        "plus": "+",
        "minus": "-",
        "times": "*",
        "multiplied": "*",
        "divided": "/",
        "percent": "%",
        "equals": "=",
    },
}
_UNITS = "zero one two three four five six seven eight nine ten eleven twelve"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBERS = {word: str(number) for number, word in enumerate(_UNITS.split())} | {
    word: str(number) for number, word in zip(range(20, 100, 10), _TENS.split(), strict=True)
}
_LAYOUTS = r"""
    \left \right \big \bigl \bigr \text \textbf \textit \mathrm \mathbf \displaystyle \quad \qquad \begin \end
"""
_LAYOUT = frozenset(_LAYOUTS.split())


def split(text: str) -> list[str]:
    """The words of a text as they are written; `spelling` gives each its one spelling. Linear in the text."""
    if not text.isascii():
        text = _INVISIBLE.sub("", unicodedata.normalize("NFD", text))
        text = _SUPERSCRIPT.sub(r"^\1", _VULGAR.sub(" ", _NARROW.sub("", text)))
        text = unicodedata.normalize("NFKD", text)
    if "&" in text:
        text = html.unescape(text)
    if "  " in text or "\t" in text:
        text = _BLANKS.sub(" ", text)
    text = text.casefold()
    if "\\" in text:
        text = _FRACTION.sub(_fraction, text.replace("{,}", ","))
    if ")" in text:
        text = _LABEL.sub(r" \1 ", text)
    return (_ASCII if text.isascii() else _ANY).findall(text)


def _fraction(found: re.Match[str]) -> str:
    """A fraction of TeX on one line."""
    above, below = (part if part.strip().isalnum() else f"({part})" for part in found.groups())
    return f" {above}/{below} "


@lru_cache(maxsize=1 << 16)
def spelling(word: str) -> str | None:
    """The one spelling of a word; None for what is dropped."""
    if word in _SIGNS:
        return _SIGNS[word]
    if word[0] == "\\":
        return None if word in _LAYOUT or not word[1].isalpha() else word[1:]
    if word[0] in "0123456789.":
        number = word.replace(",", "")
        if "." in number:
            number = number.rstrip("0").rstrip(".")
        return number if word[0] != "." else f"0{number}"
    if word[0].isdecimal():  # digits of another script
        return "".join(str(unicodedata.decimal(digit, digit)) for digit in word)
    if word[0].isalpha():
        plain = "".join(letter for letter in word if letter not in _QUOTES)
        return _NUMBERS.get(plain, plain)
    if not word.isascii() and not unicodedata.category(word).startswith(("Sm", "So", "Sk", "M")):
        return None  # quotes, brackets, bullets and currencies
    return word


def words(text: str) -> list[str]:
    """The words of a text, each in its one spelling."""
    return [spelt for word in split(text) if (spelt := spelling(word)) is not None]


def question_key(text: str) -> str:
    """A question with everything normalised: equal keys mean the same question.

    One that consists of signs which `words` drops (a picture of characters) keeps them all.
    """
    if is_picture(text):
        return " ".join(text.casefold().split())
    spelt = words(text)
    while spelt and spelt[-1] == "=":
        spelt.pop()
    return " ".join(spelt)


def is_picture(text: str) -> bool:
    """Whether a text is drawn with signs, which `words` drops, so that its words do not tell it from others."""
    lines = ("".join(line.split()) for line in text.splitlines())
    return sum(len(line) >= _DRAWN and 2 * sum(map(str.isalnum, line)) < len(line) for line in lines) > 2
