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
from farthing.recipe.places import DataPlace, Use, located_model
from farthing.recipe.types import Positive, Text


class Gold(Strict):
    """Where a row has its right answer. In YAML a bare text is the column."""

    column: Text = Field(description="The column, or a template over columns as {a} and {b.c}.")
    after: Text | None = Field(
        default=None, description="The answer is what follows the last such marker, as ####."
    )
    boxed: bool = Field(default=False, description="The answer is what the last \\boxed{…} holds.")

    @model_validator(mode="before")
    @classmethod
    def _bare_column(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.after is not None and self.boxed:
            raise ValueError("after and boxed are two ways to find the answer in a text: give one of them")
        return self


class RewardPart(Strict):
    """One part of what an answer earns. In YAML a bare text is `use`."""

    use: Use = Field(description="A verifier by name, or a function of your own as my_rewards.py:score.")
    weight: float = Field(default=1.0, description="The part's reward is multiplied by this.")
    settings: dict[str, JsonValue] = Field(default={}, description="Settings of the verifier.")

    @model_validator(mode="before")
    @classmethod
    def _bare_use(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _model_in_full(self) -> Self:
        model = self.settings.get("model")
        if isinstance(model, str) and self.settings.get("url") is None:
            self.settings["model"] = located_model(model)
        return self


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
    path: DataPlace | None = Field(
        default=None,
        description="Questions from data: a .jsonl, .jsonl.gz, .json, .csv, .tsv or .parquet file, a folder of them, "
        "or hf:owner/name[/config][@revision][:split].",
    )
    question: Text | None = Field(
        default=None,
        description="The column that asks, or a template over columns; null finds question, problem or prompt.",
    )
    answer: Gold | None = Field(
        default=None,
        description="The right answer: a column, or a table; null finds answer, solution or "
        "reward_model.ground_truth.",
    )
    choices: Text | None = Field(
        default=None, description="The column with the options to choose from; null finds choices or options."
    )
    reward: Rewards | None = Field(
        default=None, description="What an answer earns; null compares it with the gold one."
    )
    shots: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None,
        description="Solved examples before each question, never asked themselves; null takes a named set's own "
        "number, or none.",
    )
    shots_path: DataPlace | None = Field(
        default=None,
        description="Where the examples come from; null takes rows of the data that are then not asked.",
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
        """Without the keys that were not given, and without config where there is data."""
        unsaid = [key for key, value in dumped(self).items() if value is None]
        unsaid += ["config"] if self.path is not None else []
        return {key: value for key, value in dumped(self).items() if key not in unsaid}


Tasks = Annotated[dict[str, TaskSetting], Field(min_length=1)]
