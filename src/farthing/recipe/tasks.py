"""Tasks of a mixture: generators by name, or questions from data, and what an answer earns."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from farthing.base.schema import Strict, given
from farthing.recipe.types import Place, Positive, Text


class Gold(Strict):
    """Where a row has its right answer. In YAML a bare text is the column."""

    column: Text = Field(description="The column, or a template over columns.")
    after: Text | None = Field(
        default=None, description="The answer is what follows the last such marker, as ####."
    )
    boxed: bool = Field(default=False, description="The answer is what the last \\boxed{…} holds.")

    @model_validator(mode="before")
    @classmethod
    def _bare_column(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value


class RewardPart(Strict):
    """One part of what an answer earns. In YAML a bare text is `use`."""

    use: Text = Field(description="A verifier by name, or a function of your own as my_rewards.py:score.")
    weight: float = Field(default=1.0, description="The part's reward is multiplied by this.")
    settings: dict[str, JsonValue] = Field(default={}, description="Settings of the verifier.")

    @model_validator(mode="before")
    @classmethod
    def _bare_use(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value


def _list_of_parts(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Rewards = Annotated[
    list[RewardPart],
    Field(min_length=1),
    BeforeValidator(_list_of_parts, json_schema_input_type=RewardPart | list[RewardPart]),
]


class TaskSetting(Strict):
    """One task of a mixture: its share, and where its questions come from. In YAML a bare number is the weight."""

    weight: Positive = Field(default=1.0, description="Share of the questions, relative to the other tasks.")
    config: dict[str, JsonValue] = Field(default={}, description="Settings of the reasoning-gym generator.")
    path: Place | None = Field(
        default=None,
        description="Questions from data: a file, a folder of them, or hf:owner/name[/config][:split].",
    )
    question: Text = Field(
        default="question", description="The column that asks, or a template over columns."
    )
    answer: Gold = Field(default=Gold(column="answer"), description="The right answer: a column, or a table.")
    reward: Rewards | None = Field(
        default=None, description="What an answer earns; null compares it with the gold one."
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_weight(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"weight": value}
        if not isinstance(value, (dict, TaskSetting)):
            raise ValueError(f"must be a weight, or a table with weight and config, got {given(value)}")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is not None and self.config:
            raise ValueError("config belongs to a generator and path to data: give one of them")
        return self

    @model_serializer(mode="wrap")
    def _what_counts(self, dumped: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the keys that say nothing of a generator, or of data."""
        unsaid = ("path", "question", "answer") if self.path is None else ("config",)
        return {
            key: value
            for key, value in dumped(self).items()
            if key not in unsaid and (key != "reward" or value)
        }


Tasks = Annotated[dict[str, TaskSetting], Field(min_length=1)]
