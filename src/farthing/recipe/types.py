"""What the stages of a recipe may say: one class a kind, and the types they share.

Every key carries its meaning and, where it comes from a paper, which: the documentation's tables and the
sentences about mistakes are made of these.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)

from farthing.base.schema import given

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, StringConstraints(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TaskSetting(Strict):
    """One task of a mixture: its share and its generator's settings. In YAML a bare number is the weight."""

    weight: Positive = Field(default=1.0, description="Share of the questions, relative to the other tasks.")
    config: dict[str, JsonValue] = Field(default={}, description="Settings of the reasoning-gym generator.")

    @model_validator(mode="before")
    @classmethod
    def _bare_weight(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"weight": value}
        if not isinstance(value, (dict, TaskSetting)):
            raise ValueError(f"must be a weight, or a table with weight and config, got {given(value)}")
        return value


Tasks = Annotated[dict[str, TaskSetting], Field(min_length=1)]


def _amount(value: Any) -> Any:
    """A whole number, or one as people say it: 12M, 1.5B, 300K, 2T."""
    if isinstance(value, str):
        said = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", value.strip(), re.IGNORECASE)
        if said is None:
            raise ValueError(f"must be a whole number, or one such as 12M or 1.5B, got {given(value)}")
        value = float(said[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[said[2].upper()]
    return int(value) if isinstance(value, float) and value == int(value) else value


def _share_or_path(value: Any) -> Any:
    if isinstance(value, bool) or not ((isinstance(value, str) and value) or isinstance(value, (int, float))):
        raise ValueError(f"must be a share of the documents or a path, got {given(value)}")
    if not isinstance(value, str) and not 0 < value < 1:
        raise ValueError(f"must be a share above 0 and below 1, or a path, got {given(value)}")
    return value


Amount = Annotated[int, BeforeValidator(_amount), Field(ge=1)]


class Source(Strict):
    """Where documents or conversations come from. In YAML a bare text is the path."""

    path: Text | None = Field(
        default=None,
        description="A .jsonl, .jsonl.gz, .parquet or .txt file, a folder of them, or hf:owner/name[:split].",
    )
    field: Text | None = Field(
        default=None, description="The field to read; null takes text, and messages where conversations are."
    )
    tasks: Tasks | None = Field(
        default=None, description="Instead of a path: worked solutions of these tasks, none of them held out."
    )
    items: Amount | None = Field(default=None, description="How many worked solutions to make.")
    weight: Positive = Field(
        default=1.0, description="How often each document is taken: 2 takes it twice, 0.5 every other one."
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


class LanguageModelling(Strict):
    """What predicting the next token takes, in pretraining and in fine-tuning."""

    data: Annotated[list[Source], Field(min_length=1)] = Field(
        description="The sources, each a path or a table (see Sources of data)."
    )
    policy: Literal["stop", "skip"] = Field(
        default="stop",
        description="What a broken row or document does: stop the run, or be skipped and said.",
    )
    length: Annotated[int, Field(ge=2)] = Field(
        default=1024, description="Tokens in a row, into which documents are packed."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: matrices by Muon scaled to AdamW's step, the rest by AdamW (arXiv:2502.16982).",
    )
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.95), strict=False, description="AdamW's two decay rates (arXiv:2412.19437)."
    )
    weight_decay: NotNegative = Field(
        default=0.1, description="Decoupled weight decay (DeepSeek-V3's 0.1, arXiv:2412.19437)."
    )
    grad_clip: Positive = Field(
        default=1.0, description="The gradient's norm is scaled down to this (DeepSeek-V3's 1.0)."
    )
    max_grad_norm: Positive = Field(
        default=1000.0, description="A norm above this, before clipping, stops the run."
    )
    balance: NotNegative = Field(
        default=1e-4,
        description="Weight of the sequence-wise balance loss of a mixture of experts "
        "(DeepSeek-V3, arXiv:2412.19437, section 2.1.2).",
    )
    bias_rate: NotNegative = Field(
        default=1e-3,
        description="Step of the routing biases that balance the experts without a loss "
        "(DeepSeek-V3's 0.001, arXiv:2412.19437; 0 leaves them).",
    )
    checkpoint_every: Count = Field(
        default=100, description="Steps between the checkpoints a killed run continues from."
    )
    memory_gb: Positive = Field(
        default=2.0, description="Memory for one micro-batch's activations and logits, in GB."
    )


class Pretrain(LanguageModelling):
    """A model from nothing but text. One dial, `size` or `depth`, sets what is left null (docs/training.md)."""

    kind: Literal["pretrain"]
    validation: Annotated[float | str, BeforeValidator(_share_or_path)] = Field(
        default=0.01,
        description="Documents to validate on and never train on: a share, chosen by their text, or a path.",
    )
    tokenizer: Text | None = Field(
        default=None, description="A model folder whose tokenizer to take; null trains one on the data."
    )
    vocab_size: Amount = Field(
        default=8192, description="Entries of the tokenizer that is trained, marks included."
    )
    family: Literal["deepseek", "moe", "llama"] = Field(
        default="deepseek",
        description="deepseek: latent attention and a mixture of experts (DeepSeek-V3); moe: grouped-query "
        "attention and the same mixture (GLM-4-MoE's folder); llama: grouped-query attention, dense.",
    )
    size: Amount | None = Field(
        default=None, description="The dial: parameters in all, embedding included, such as 12M."
    )
    depth: Count | None = Field(default=None, description="The dial, by layers; give either size or depth.")
    model: dict[str, JsonValue] = Field(
        default={}, description="Keys of config.json that take the place of the dial's (hidden_size, …)."
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
    warmup: Annotated[int, Field(ge=0)] | None = Field(
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


class Sft(LanguageModelling):
    """Conversations, with a loss on the assistant's words alone (DeepSeek-V3, arXiv:2412.19437, section 5.1)."""

    kind: Literal["sft"]
    epochs: Positive = Field(default=2.0, description="Times through the data (DeepSeek-V3's 2).")
    steps: Count | None = Field(default=None, description="Steps, whatever epochs says; null goes by epochs.")
    batch_tokens: Amount = Field(default=16384, description="Tokens a step, in whole rows.")
    lr: Positive = Field(default=5e-6, description="Peak learning rate (DeepSeek-V3's 5e-6).")
    warmup: Annotated[int, Field(ge=0)] = Field(default=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine",
        description="The learning rate after the warm-up; cosine ends at zero (DeepSeek-V3's at 1e-6).",
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


class Grpo(Strict):
    """Group relative policy optimisation, verifiable rewards (DeepSeekMath, arXiv:2402.03300, section 4)."""

    kind: Literal["grpo"]
    tasks: Tasks = Field(description="Generators by name, each with a weight or {weight, config}.")
    answer: Literal["final", "tag", "boxed"] = Field(
        default="final",
        description="How the answer is read: the number the text ends on, <answer>…</answer>, or \\boxed{…}.",
    )
    prompt: Text = Field(
        default="{question}", description="What the user says; {question} stands for the question."
    )
    system: str | None = Field(default=None, description="The system message, if any.")

    steps: Count = Field(description="Batches of questions to train on.")
    prompts: Count = Field(default=32, description="Questions a step (R1-Zero's 32, arXiv:2501.12948).")
    group: Annotated[int, Field(ge=2)] = Field(
        default=16, description="Answers sampled for each question, compared with each other (R1-Zero's 16)."
    )
    max_new_tokens: Count = Field(default=1024, description="Longest answer, in tokens.")
    temperature: Positive = Field(
        default=1.0, description="Sampling temperature; 1 samples the policy itself."
    )

    lr: Positive = Field(default=1e-6, description="Peak learning rate (GRPO's 1e-6, arXiv:2402.03300).")
    warmup: Annotated[int, Field(ge=0)] = Field(default=0, description="Steps of linear warm-up.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="The learning rate after the warm-up; cosine and linear end at zero."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: matrices by Muon scaled to AdamW's step, the rest by AdamW (arXiv:2502.16982).",
    )
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.95),
        strict=False,
        description="AdamW's two decay rates (DeepSeek-V3, arXiv:2412.19437).",
    )
    weight_decay: NotNegative = Field(default=0.0, description="Decoupled weight decay.")
    grad_clip: Positive = Field(default=1.0, description="The gradient's norm is scaled down to this.")
    max_grad_norm: Positive = Field(
        default=100.0, description="A norm above this, before clipping, stops the run."
    )

    updates: Count = Field(default=1, description="Optimizer steps for each batch of answers.")
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2,
        description="The probability ratio is clipped below 1 - clip_low (arXiv:2402.03300, eq. 3).",
    )
    clip_high: Annotated[float, Field(gt=0, le=10)] = Field(
        default=0.2,
        description="… and above 1 + clip_high; DAPO's clip-higher is 0.28 (arXiv:2503.14476), R1 used 10.",
    )
    loss: Literal["token", "sample", "constant"] = Field(
        default="token",
        description="Mean over all tokens (DAPO, arXiv:2503.14476), over each answer and then the answers "
        "(GRPO, arXiv:2402.03300), or by max_new_tokens (Dr. GRPO, arXiv:2503.20783).",
    )
    advantage: Literal["std", "mean"] = Field(
        default="std",
        description="Reward less the group's mean, divided by its deviation (GRPO, arXiv:2402.03300) or not "
        "(Dr. GRPO, arXiv:2503.20783).",
    )
    drop_silent: bool = Field(
        default=True,
        description="Leave out groups whose answers all earned the same: they carry no advantage.",
    )
    refill: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Extra rounds of questions to replace left-out groups (DAPO's dynamic sampling, "
        "arXiv:2503.14476); 0 replaces none.",
    )
    mask_truncated: bool = Field(
        default=False, description="Answers cut off at max_new_tokens do not train (DAPO, arXiv:2503.14476)."
    )
    kl: NotNegative = Field(
        default=0.0,
        description="Weight of the KL term to the stage's starting model, by Schulman's k3 estimator "
        "(joschu.net/blog/kl-approx.html; GRPO, arXiv:2402.03300, eq. 4); 0 keeps no reference model.",
    )
    lora: Count | None = Field(
        default=None, description="Rank of LoRA adapters (arXiv:2106.09685); null trains all."
    )
    lora_alpha: Positive = Field(
        default=32.0, description="LoRA's scale: its update is multiplied by lora_alpha / lora."
    )

    sync_every: Count = Field(
        default=10,
        description="Steps between checks that the engine and the trainer give the same log-probabilities.",
    )
    sync_tolerance: Positive = Field(
        default=0.1,
        description="Largest mean absolute difference of those log-probabilities, in nats; rounding to bfloat16 "
        "alone makes 0.02 to 0.04.",
    )
    checkpoint_every: Count = Field(
        default=10, description="Steps between the checkpoints a killed run continues from."
    )
    memory_gb: Positive = Field(
        default=2.0, description="Memory for one micro-batch's activations and logits, in GB."
    )

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if "{question}" not in self.prompt:
            raise ValueError('prompt must contain "{question}", where the question goes')
        if self.warmup > self.steps:
            raise ValueError(f"warmup ({self.warmup}) must not be longer than steps ({self.steps})")
        if self.updates > self.prompts:
            raise ValueError(
                f"updates ({self.updates}) must not exceed prompts ({self.prompts}): each takes whole groups"
            )
        if self.refill and not self.drop_silent:
            raise ValueError("refill replaces left-out groups: set drop_silent: true, or refill: 0")
        return self


Stage = Annotated[Pretrain | Sft | Grpo, Field(discriminator="kind")]
