"""Keys of `kind: sft`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from farthing.base.errors import UserError
from farthing.recipe.places import ChatTemplate
from farthing.recipe.source import Source, lessons
from farthing.recipe.stage import LanguageModelling
from farthing.recipe.types import Amount, Count, NotNegative, Positive, ShareOrPath, Warmup
from farthing.recipe.work import BYTES_PER_TOKEN, Config, Guess, StageWork


class Sft(LanguageModelling):
    """Conversations, with a loss on the assistant's words alone (DeepSeek-V3, arXiv:2412.19437, section 5.1)."""

    kind: Literal["sft"]
    epochs: Positive = Field(default=2.0, description="Passes over the data (DeepSeek-V3's 2).")
    steps: Count | None = Field(default=None, description="Steps, overriding epochs; null goes by epochs.")
    validation: ShareOrPath | None = Field(
        default=None,
        description="Conversations to validate on and never train on: a share, chosen by what is asked, or a path.",
    )
    validate_every: Count = Field(default=20, description="Steps between validations, in nats a token.")
    batch_tokens: Amount = Field(default=16384, description="Tokens a step, in whole rows.")
    lr: Positive = Field(default=5e-6, description="Peak learning rate (DeepSeek-V3's 5e-6).")
    warmup: Warmup = Field(default=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine",
        description="The learning rate after the warm-up; cosine ends at zero (DeepSeek-V3's at 1e-6).",
    )
    chat_template: ChatTemplate | None = Field(
        default=None,
        description="Give the model this chat template: chatml, plain, or a file's path; null keeps its own.",
    )
    mtp_weight: NotNegative = Field(
        default=0.1, description="Weight of the loss of the model's MTP modules, if it has any."
    )
    lora: Count | None = Field(
        default=None, description="Rank of LoRA adapters (arXiv:2106.09685); null trains all."
    )
    lora_alpha: Positive = Field(
        default=32.0, description="LoRA's scale: its update is multiplied by lora_alpha / lora."
    )

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.batch_tokens < self.length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must hold one row of length ({self.length})"
            )
        return self

    @property
    def paths(self) -> list[str]:
        return [*super().paths, *([self.validation] if isinstance(self.validation, str) else [])]

    def work(self, config: Config | None, guess: Guess) -> StageWork:
        assert config is not None
        steps = self.steps or max(1, math.ceil(self._tokens(guess) * self.epochs / self.batch_tokens))
        return self.language_work(config, steps, self.batch_tokens, self.lora_rank, lessons(self.data))

    def _tokens(self, guess: Guess) -> float:
        return sum(source.weight * _tokens(source, guess) for source in self.data)


def _tokens(source: Source, guess: Guess) -> float:
    """Tokens of a source of conversations: of its file, or of as many worked solutions as it asks for."""
    if source.path is None:
        return (source.items or 0) * 2 * guess.prompt
    path = Path(source.path)
    if not path.exists():
        raise UserError(
            f"{source.path}: its size is unknown here; set steps in the stage, or give a local path"
        )
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / BYTES_PER_TOKEN
