"""What people write by hand and the program reads strictly: claims, rates, entries of a bill.

Unknown keys are mistakes, and every mistake is said in one sentence that names the key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from farthing.base.errors import UserError
from farthing.base.schema import UNKNOWN_KEY, given, parse_text, sentence

MAX_BYTES = 1_000_000  # a file beyond this was not written by hand

# Nothing that is paid or counted lies outside, and no sum of what lies inside overflows.
LEAST, MOST = 1e-6, 1e40


def _in_reach(number: float) -> float:
    if 0 < number < LEAST or number > MOST:
        raise ValueError(f"must be between {LEAST:g} and {MOST:g}, got {number:g}")
    return number


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_in_reach)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_in_reach)]
Text = Annotated[str, Field(min_length=1)]


def _date(text: str) -> str:
    if not re.fullmatch(r"\d{4}(-\d{2}(-\d{2})?)?", text):
        raise ValueError(f"must be a date such as 2026-11-23, 2026-11 or 2026, got {given(text)}")
    return text


Date = Annotated[str, AfterValidator(_date)]


class Written(BaseModel):
    """A table that a person wrote: no unknown keys, no values that only look like the right type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_Model = TypeVar("_Model", bound=BaseModel)


def validated(model: type[_Model], data: Any, name: str) -> _Model:
    """`data` as `model`. Raises UserError that starts with `name` and names up to three wrong keys."""
    if not isinstance(data, dict):
        raise UserError(f"{name}: must be a table of keys, got {given(data)}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A misspelt key is often what makes another one missing, so those come first.
        found = sorted(error.errors(), key=lambda problem: problem["type"] not in UNKNOWN_KEY)
        problems = [sentence(dict(problem), data, model).removeprefix(": ") for problem in found]
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{name}: " + "; ".join(problems[:3]) + more) from None


def read_yaml(path: Path) -> Any:
    """The YAML document in a file. Raises UserError that names the file, and the line where there is one."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({said}); give a YAML file") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: larger than 1 MB, so not written by hand; give a YAML file")
    try:
        return parse_text(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give a YAML file") from None
