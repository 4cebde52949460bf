"""Where the curves of a run may go besides metrics.jsonl: each is an extra of the package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from farthing.base.errors import UserError

_EXTRAS = {
    "wandb": "farthing[wandb]",
    "tensorboard": "farthing[tensorboard]",
    "trackio": "farthing[trackio]",
}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _once_each(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


_Name = Literal["wandb", "tensorboard", "trackio"]
LogTo = Annotated[
    list[_Name],
    BeforeValidator(_listed, json_schema_input_type=_Name | list[_Name]),
    AfterValidator(_once_each),
]


def check_installed(names: Sequence[str]) -> None:
    """Refuse what this installation lacks.

    Raises:
        UserError: that names the extra.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"log_to: {name} is not installed; pip install '{_EXTRAS[name]}', or leave it out"
            )
