"""Keys of `kind: pretrain`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from farthing.recipe.dial import dial
from farthing.recipe.source import lessons
from farthing.recipe.stage import LanguageModelling
from farthing.recipe.types import (
    Amount,
    Count,
    Depth,
    NotNegative,
    Place,
    Positive,
    ShareOrPath,
    Size,
    Vocabulary,
    Warmup,
)
from farthing.recipe.work import Config, Guess, StageWork


class Pretrain(LanguageModelling):
    """A model from nothing but text. One dial, `size` or `depth`, sets what is left null (docs/training.md)."""

    starts_from_nothing: ClassVar[bool] = True

    kind: Literal["pretrain"]
    validation: ShareOrPath = Field(
        default=0.01,
        description="Documents to validate on and never train on: a share, chosen by their text, or a path.",
    )
    tokenizer: Place | None = Field(
        default=None, description="A folder whose tokenizer to use; null trains one on the data."
    )
    vocab_size: Vocabulary = Field(
        default=8192, description="Size of the trained tokenizer's vocabulary, special tokens included."
    )
    family: Literal["deepseek", "moe", "llama"] = Field(
        default="deepseek",
        description="deepseek: latent attention and a mixture of experts (DeepSeek-V3); moe: grouped-query "
        "attention and the same mixture (GLM-4-MoE's folder); llama: grouped-query attention, dense.",
    )
    size: Size | None = Field(
        default=None, description="The dial: parameters in all, embedding included, such as 12M."
    )
    depth: Depth | None = Field(default=None, description="The dial, by layers; give either size or depth.")
    model: dict[str, JsonValue] = Field(
        default={}, description="Keys of config.json that override the dial's (hidden_size, …)."
    )
    tokens: Amount | None = Field(
        default=None, description="Tokens to train on; null takes the dial's 20 for each active parameter."
    )
    batch_tokens: Amount | None = Field(
        default=None, description="Tokens a step; null takes DeepSeek LLM's law (arXiv:2401.02954)."
    )
    lr: Positive | None = Field(
        default=None, description="Peak learning rate; null takes DeepSeek LLM's law (arXiv:2401.02954)."
    )
    warmup: Warmup | None = Field(
        default=None, description="Steps of linear warm-up; null takes 2,000 (DeepSeek-V3), 5% at most."
    )
    schedule: Literal["wsd", "cosine", "linear", "constant"] = Field(
        default="wsd",
        description="The learning rate after the warm-up. wsd: constant, the last fifth linear to zero "
        "(arXiv:2405.18392); cosine and linear end at zero.",
    )
    mtp_depth: Annotated[int, Field(ge=0, le=4)] = Field(
        default=0, description="Further tokens predicted by modules of their own (DeepSeek-V3 has 1)."
    )
    mtp_weight: NotNegative = Field(
        default=0.3,
        description="Weight of their loss, a third of it after two thirds of the tokens "
        "(DeepSeek-V3: 0.3, then 0.1).",
    )
    cross_document: bool = Field(
        default=True,
        description="Attend across the documents packed in a row, as DeepSeek-V3 was trained; false keeps "
        "them apart.",
    )
    fim_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Share of documents rearranged to fill in their middle (DeepSeek-V3's is 0.1).",
    )
    validate_every: Count = Field(default=200, description="Steps between validations, in bits per byte.")

    @model_validator(mode="after")
    def _one_dial(self) -> Self:
        if (self.size is None) == (self.depth is None):
            raise ValueError("give the dial: either size, such as 12M, or depth, such as 6")
        if self.batch_tokens is not None and self.batch_tokens < self.length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must hold one row of length ({self.length})"
            )
        if self.mtp_depth and self.family != "deepseek":
            raise ValueError("mtp_depth needs family: deepseek, whose folders have a place for it")
        return self

    @property
    def paths(self) -> list[str]:
        return [*super().paths, *([self.validation] if isinstance(self.validation, str) else [])]

    def work(self, config: Config | None, guess: Guess) -> StageWork:
        dialled = dial(self, self.vocab_size)
        return self.language_work(
            dialled.config, dialled.steps, dialled.batch_tokens, lessons=lessons(self.data)
        )
