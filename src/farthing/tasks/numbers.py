"""Reading a number: exactly one, in one spelling, and only where it is the whole of what is said.

Strict on purpose: "7 million", "7k", "7!", "not 7", "7x" and "√7" are not 7, and a reward for them would teach them.
"""

from __future__ import annotations

import re
import unicodedata

_NUMBER = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_LATEX_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3}(?![0-9]))")
_UNIT_POWER = re.compile(  # cm^2 and \\text{m}^3 hold no second number
    r"(\\(?:text|mathrm)\{ ?[a-zA-Z. ]{1,20}\}|(?<![a-zA-Z])(?:mm|cm|km|ft|in|yd|mi|units?|inches|feet|met(?:er|re)s))"
    r" ?\^ ?(?:\{ ?[23] ?\}|[23])(?![0-9])"
)
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_MINUS = "-−–"
_SIGNS = _MINUS + "+"
_WRAPPERS = "{$*(`£€\\"  # may stand between a sign and its number: -$7$, \boxed{-7}, -(7), **7**
_OPERATORS = "±√^/×÷·≠<>≤≥≈~!¬"  # what precedes an operand, not an answer
_LONGEST = 400  # characters; no task here has a longer answer
_AROUND = 24  # characters examined on each side of a number
# LaTeX that may stand right before a number's brace, as in \\boxed{7}; any other computes something: \\sqrt{7}
_FORMATS = (
    "boxed",
    "text",
    "textbf",
    "textit",
    "mathrm",
    "mathbf",
    "mathit",
    "displaystyle",
    "left",
    "big",
    "Big",
)
# LaTeX that may follow a number and says nothing of its value
_HARMLESS = re.compile(
    r"\\(?:[,;:! %$)\]}\\]|"
    r"(?:text|textbf|mathrm|right|quad|qquad|degree|circ|end|dots|ldots|checkmark|square|blacksquare)(?![a-zA-Z]))"
)
_COMMAND = re.compile(r"\\([a-zA-Z]+)\s*\{*$")
# words that make another number of the one before or after them
_OTHER_BEFORE = re.compile(
    r"(?:(?:\bnot|n't|\bcannot)(?: (?:be|equal|equal to|equals))?|\bthan|\bover|\bunder|\babove|\bbelow|\bleast|\bmost|"
    r"\bup to|\btimes|\b(?:divided|multiplied) by|\bbelow zero:?|"
    r"\b(?:root|square|cube|third|quarter|fifth|sixth|eighth|tenth|percent|power|reciprocal|inverse|opposite|negation|"
    r"negative|factorial|logarithm) of|"
    r"\btwice|\bdouble|\btriple|\bhalf(?: of)?|\blog|\bln|\bsin|\bcos|\btan|\bmod|\bsqrt|\bneg\.?|\bmoins)\s*$",
    re.IGNORECASE,
)
_MINUS_WORD = re.compile(r"(?:minus|negative)\s*$", re.IGNORECASE)
_OTHER_AFTER = re.compile(
    r"\s*(?:\\text\{|\\mathrm\{)?[\s-]*(?:"
    r"(?:tens|hundred|thousand|million|billion|trillion|lakh|crore|milliard|grand|gross|mio|mrd|mil|dozen|score|squared|"
    r"cubed|doubled|tripled|halved|factorial|negative|repeating|recurring|below zero|zeroe?|halves|"
    r"thirds|quarters|tenths|hundredths|thousandths|pi)s?\b|"
    r"(?:and )?(?:a|one) (?:half|third|quarter)\b|(?:plus|minus|over|choose|mod)\b|"
    r"or (?:more|less|fewer|greater|so)\b|at (?:least|most)\b|(?-i:[a-zA-Z](?<![mgshlLWVAJNCF]))\s*\})",
    re.IGNORECASE,
)
# letters that stand alone after a number: a variable or a multiplier, in this case only (7 m is a length, 7 M is not)
_LONE = re.compile(r" ?(?:[xyzniekKMBT]|bn|mn|mln|tn)(?![\w'-])| [a-zA-Z](?<![mgshlLWVAJNCF])[\s.$)}]*$")
_UNITS_OF_ONE_LETTER = "mgshLlWVAJNCF"
_OTHER_SUFFIXES = ("bn", "mn", "mil", "mln", "tn", "pi")


def one_number(text: str) -> str | None:
    """The only number in the text, in canonical form ("7", "-3", "7.5"), or None without exactly one.

    Thousands separators, a leading +, a unicode minus or the word "minus", trailing zeros of a fraction, units and
    wrappers of Markdown or LaTeX are understood. What makes another number of it is not: a multiplier, a factorial, a
    variable, a root, a relation. Only ASCII digits are digits: any other numeric character (full-width, superscript, a
    vulgar fraction) makes the text ambiguous.
    """
    text = _tidied(text)
    found = _NUMBER.finditer(text)
    match = next(found, None)
    if match is None or next(found, None) is not None or has_foreign_digits(text):
        return None
    return _value(text, match)


def same_number(text: str) -> str | None:
    """The number in the text as `one_number` reads it, which may come again after words: "= 7, so there are 7 left"."""
    text = _tidied(text)
    number, end = None, 0
    for match in _NUMBER.finditer(text):
        value = _value(text, match)
        if value is None or (end and (value != number or not _WORD.search(text, end, match.start()))):
            return None
        number, end = value, match.end()
    return None if has_foreign_digits(text) else number


def _tidied(text: str) -> str:
    return _UNIT_POWER.sub(r"\1", _LATEX_THOUSANDS.sub(",", text))


def _value(text: str, match: re.Match[str]) -> str | None:
    before = text[max(0, match.start() - _AROUND) : match.start()]
    sign = _sign(before, begins=match.start() <= _AROUND)
    if sign is None or len(match[0]) > _LONGEST or _continues(text[match.end() : match.end() + _AROUND]):
        return None
    return canonical(sign, match[0])


def has_number(text: str) -> bool:
    """Whether the text holds any numeric character."""
    return _NUMBER.search(text) is not None or has_foreign_digits(text)


def has_foreign_digits(text: str) -> bool:
    """Whether the text holds a numeric character that is not one of 0 to 9."""
    if text.isascii():
        return False
    return any(char > "\x7f" and unicodedata.category(char)[0] == "N" for char in text)


def canonical(sign: str, digits: str) -> str:
    """One spelling for each value: equal numbers give equal text, so answers compare as text."""
    whole, _, fraction = digits.replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return value if value == "0" or sign != "-" else f"-{value}"


def _sign(before: str, begins: bool) -> str | None:
    """ "-" or "" for the number that follows `before`; None if it is ambiguous. `begins`: `before` is all there is."""
    if before[-1:].isalpha() or before.endswith("_"):
        return None  # part of a name: x7, H2
    if _MINUS_WORD.search(before):
        return "-" if begins and not _MINUS_WORD.sub("", before).strip(_WRAPPERS + " \t\n") else None
    if _OTHER_BEFORE.search(before):
        return None
    core = before.rstrip(_WRAPPERS)
    wrapped = before[len(core) :]
    if command := _COMMAND.search(before):
        if command[1] not in _FORMATS:
            return None  # \\sqrt{7}, \\frac{7}
        core = before[: command.start()].rstrip(_WRAPPERS)
    elif core[-1:].isalpha() and "(" in wrapped:
        return None  # f(7)
    last = core[-1:]
    if not last or last in _OPERATORS or (last in "}]" and "{" in wrapped):
        return None if last else ""
    if last in _SIGNS:
        earlier = core[-2:-1]
        if earlier.isalnum() or (earlier and earlier in ")]}._" + _SIGNS):
            return None  # a subtraction or a hyphen
        return "-" if last in _MINUS else ""
    if last in " \t" and core.rstrip(" \t")[-1:] in tuple(_SIGNS + _OPERATORS):
        return None  # "- 7": a minus, a bullet or a dash
    return ""


def _continues(after: str) -> bool:
    """Whether what follows a number makes another of it."""
    if unicodedata.category(after[:1] or " ")[0] == "M":
        return True  # a bar over it, or a stroke through it
    if after.lstrip()[:1] in ("!", "‰") or _OTHER_AFTER.match(after) or _LONE.match(after):
        return True
    letters = re.match(r"[^\W\d_]+", after)
    if letters:
        word = letters[0]
        return word not in _UNITS_OF_ONE_LETTER if len(word) == 1 else word.lower() in _OTHER_SUFFIXES
    if re.match(r"\^\s*\{?\s*\\circ", after):
        return False  # degrees
    if re.match(r"[\^/·×÷√_]\s*[^\s.]|[*+]\s*[\w(\\{]", after):
        return True
    if re.match(r"\s*[-−+^/·×÷<>≤≥=]\s*[A-Za-z](?![A-Za-z])", after):
        return True  # 7 - x
    rest = after.lstrip(" ${}")
    return rest.startswith("\\") and len(rest) > 1 and not _HARMLESS.match(rest)
