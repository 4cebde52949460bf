"""Types that the keys of stages share.

Every key carries its meaning and, where it comes from a paper, which: the documentation's tables and the
sentences about mistakes are made of these.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from farthing.base.errors import UserError
from farthing.base.figures import parse_amount
from farthing.base.limits import named
from farthing.base.schema import given

# The upper bounds are far beyond what anybody trains with, and within what the arithmetic of a plan can hold.
Count = Annotated[int, Field(ge=1, le=10**9)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
Gigabytes = Annotated[float, Field(gt=0, le=1e6)]
Warmup = Annotated[int, Field(ge=0, le=10**9)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, StringConstraints(min_length=1)]


def _name_of_a_file(text: str) -> str:
    try:
        named(text.encode().decode())
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate); give another name") from None
    return text


Place = Annotated[Text, AfterValidator(_name_of_a_file)]
"""A path, or a name on the hub."""


def _amount(value: Any) -> Any:
    """A whole number, or one as people say it: 12M, 1.5B, 300K, 2T."""
    if isinstance(value, str):
        try:
            value = parse_amount(value, "")
        except UserError:
            raise ValueError(
                f"must be a whole number, or one such as 12M or 1.5B, got {given(value)}"
            ) from None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _share_or_path(value: Any) -> Any:
    if isinstance(value, bool) or not ((isinstance(value, str) and value) or isinstance(value, (int, float))):
        raise ValueError(f"must be a share of the documents or a path, got {given(value)}")
    if not isinstance(value, str) and not 0 < value < 1:
        raise ValueError(f"must be a share above 0 and below 1, or a path, got {given(value)}")
    return _name_of_a_file(value) if isinstance(value, str) else value


_Whole = Annotated[int, Field(ge=1, le=10**18)]
TEMPLATES = ("chatml", "plain")
"""Chat templates that ship with Farthing."""

Amount = Annotated[_Whole, BeforeValidator(_amount, json_schema_input_type=_Whole | str)]
Vocabulary = Annotated[Amount, Field(le=1_000_000)]
Held = Annotated[int, Field(ge=1, le=1_000_000)]
Depth = Annotated[int, Field(ge=1, le=1000)]
Size = Annotated[Amount, Field(le=10**13)]
ShareOrPath = Annotated[float | str, BeforeValidator(_share_or_path)]
"""A share of the documents, or the path of others."""
