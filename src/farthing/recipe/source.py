"""Sources of documents and conversations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from farthing.base.schema import Strict, given
from farthing.recipe.tasks import Tasks
from farthing.recipe.types import Amount, Place, Positive, Text

Shape = Literal[
    "messages", "alpaca", "prompt-completion", "question-answer", "preference", "unpaired preference", "segments",
    "text", "continuation",
]  # fmt: skip
"""The shapes of conversations (farthing.data.shapes) that can be learnt from."""


class Source(Strict):
    """A source of documents or conversations. In YAML a bare text is the path."""

    path: Place | None = Field(
        default=None,
        description="A .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet or .txt file, a folder of them, or "
        "hf:owner/name[:split].",
    )
    field: Text | None = Field(
        default=None, description="The field to read; null takes text, and messages where conversations are."
    )
    shape: Shape | None = Field(
        default=None,
        description="The shape of the rows of conversations; null recognises each row by its columns.",
    )
    tasks: Tasks | None = Field(
        default=None,
        description="Instead of a path: worked solutions of these tasks, without held-out questions.",
    )
    items: Amount | None = Field(default=None, description="How many worked solutions to make.")
    weight: Positive = Field(
        default=1.0, description="Copies of each document: 2 takes it twice, 0.5 every other one."
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"path": value}
        if not isinstance(value, (dict, Source)):
            raise ValueError(f"must be a path, or a table with path or tasks, got {given(value)}")
        return value

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (self.tasks is None):
            raise ValueError("a source has either a path or tasks: give one of them")
        if (self.tasks is None) != (self.items is None):
            raise ValueError("tasks and items go together: say which tasks, and how many worked solutions")
        return self


def lessons(sources: Iterable[Source]) -> int:
    """How many worked solutions are written for these sources."""
    return sum(source.items or 0 for source in sources)
