"""Where a recipe's own files lie: beside it, or where the command was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from farthing.base.limits import named
from farthing.recipe.types import TEMPLATES, Place, Text

_HERE: ContextVar[Path | None] = ContextVar("_HERE", default=None)


@contextmanager
def reading_from(folder: Path | None) -> Iterator[None]:
    """While it lasts, a recipe's own files are looked for in this folder first: where the recipe lies."""
    token = _HERE.set(folder)
    try:
        yield
    finally:
        _HERE.reset(token)


def folders() -> list[Path]:
    """Where a recipe's own files may lie, the likeliest first."""
    here = _HERE.get()
    return [here, Path.cwd()] if here is not None and here != Path.cwd() else [Path.cwd()]


def located(place: str) -> str:
    """A local path in full, so that a recipe can be read again from anywhere; a hub's name as it is."""
    if place.startswith("hf:"):
        return place
    path = named(place)
    tried = [folder / path for folder in folders()]
    return str(next((found for found in tried if found.exists()), tried[-1]))


def located_function(use: str) -> str:
    """A function of one's own, as rewards.py:score, with its file in full if it is found; any other text as it is."""
    path, colon, function = use.rpartition(":")
    if not colon or not path.endswith(".py"):
        return use
    found = located(path)
    return f"{found}:{function}" if Path(found).is_file() else use


def located_model(source: str) -> str:
    """A model's folder or file in full if it is found; any other name as it is."""
    found = located(source)
    return found if Path(found).exists() else source


DataPlace = Annotated[Place, AfterValidator(located)]
"""A path of data, made absolute, or a name on the hub."""


def _template(chosen: str) -> str:
    if chosen in TEMPLATES:
        return chosen
    if "/" not in chosen and "." not in chosen:
        raise ValueError(
            f"there is no chat template {chosen!r}; give {' or '.join(TEMPLATES)}, or the path of one"
        )
    return located(chosen)


ChatTemplate = Annotated[Place, AfterValidator(_template)]
"""A chat template of ours by name, or the path of one, made absolute."""
Use = Annotated[Text, AfterValidator(located_function)]
"""A verifier's name, or a function of one's own with its file's path made absolute."""
