"""Arguments of the public functions: a value of the wrong type is refused by name, before it does anything."""

from __future__ import annotations

import functools
import inspect
import numbers
import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

from farthing.base.errors import UserError
from farthing.base.schema import given

F = TypeVar("F", bound=Callable[..., Any])
_WORDS: dict[type | None, str] = {
    str: "a text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false",
    Mapping: "a table", Sequence: "a list", Set: "a set", None: "None",
}  # fmt: skip
_MOST = 1e30  # of any number


def takes(**kinds: Sequence[Any]) -> Callable[[F], F]:
    """Check arguments of a function by name: each must be of one of its kinds (types, or None).

    A number must be finite and within 1e30 either way; true and false are no numbers, and a text is no list.

    Raises, when the function is called:
        UserError: that names the argument, what it must be and what it is.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                if name in kinds:
                    check(name, value, *kinds[name])
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


def check(name: str, value: Any, *kinds: Any) -> None:
    """Refuse a value that is of none of these kinds. Raises UserError as `takes`."""
    if not any(_is(value, kind) for kind in kinds):
        words = [_WORDS.get(kind) or f"a {kind.__name__}" for kind in kinds]
        wanted = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
        raise UserError(f"{name}: must be {wanted}, got {_shown(value)}")


def check_text(name: str, value: Any) -> None:
    """Refuse what is no text, or text with half a character in it. Raises UserError as `takes`."""
    check(name, value, str)
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{name}: holds half a character (a lone surrogate); take it out")


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind in (int, float):
        form = numbers.Integral if kind is int else numbers.Real  # NumPy's numbers are these too
        return isinstance(value, form) and not isinstance(value, bool) and _is_in_reach(value)
    if kind is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return isinstance(value, kind)


def _is_in_reach(value: Any) -> bool:
    return bool(-_MOST <= value <= _MOST)  # false for a NaN


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, str | int | float | list | tuple | dict)
    return given(value) if plain else f"a {type(value).__name__}"
