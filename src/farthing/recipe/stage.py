"""The interface of every kind of stage's keys: to the run, the planner, the live view and the report."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field

from farthing.base.schema import Strict
from farthing.cost.flops import causal_pairs, forward_flops, mtp_flops
from farthing.recipe.source import Source
from farthing.recipe.tasks import TaskSetting
from farthing.recipe.types import TEMPLATES, Count, Decay, Gigabytes, NotNegative, Positive
from farthing.recipe.work import Config, Guess, StageWork


class Asks(NamedTuple):
    """How a model is asked questions, and how its answers are read."""

    tasks: dict[str, TaskSetting]
    answer: Literal["final", "tag", "boxed"] = "final"
    prompt: str = "{question}"
    system: str | None = None
    max_new_tokens: int = 1024


@dataclass(frozen=True)
class Curve:
    """A figure of metrics.jsonl, for the live view and the report."""

    key: str
    title: str
    unit: str = ""
    """Label of its axis in the report."""
    gloss: str = ""
    """One sentence in the report; without it the report has no panel."""
    live: str = ""
    """Its name in the live view; without it the view leaves it out."""
    drawn: bool = False
    """The live view draws it, and does not only write it."""
    share: bool = False
    """A share from 0 to 1, written in percent."""
    optional: bool = False
    """Only some stages of the kind have it."""


class StageSpec(Strict):
    """The keys of a stage in a recipe, and what they come to. Each kind is a subclass."""

    starts_from_nothing: ClassVar[bool] = False
    """It makes a model of its own, so it comes first and the recipe has no base."""
    curves: ClassVar[Sequence[Curve]] = ()

    kind: str

    @property
    def asks(self) -> Asks | None:
        """How it asks questions whose answers earn rewards; None if it pays no rewards."""
        return None

    @property
    def sources(self) -> Sequence[Source]:
        """The data that it learns from."""
        return ()

    @property
    def paths(self) -> list[str]:
        """Every path or hub name that it reads."""
        template = getattr(self, "chat_template", None)
        return [source.path for source in self.sources if source.path] + (
            [template] if template and template not in TEMPLATES else []
        )

    @property
    def mixtures(self) -> list[dict[str, TaskSetting]]:
        """Every mixture of tasks that it draws questions from."""
        rewarded = [self.asks.tasks] if self.asks else []
        return rewarded + [source.tasks for source in self.sources if source.tasks]

    @property
    def lora_rank(self) -> int:
        """Rank of its LoRA adapters; 0 trains every parameter, as a kind without the key does."""
        return getattr(self, "lora", None) or 0

    def with_lora(self, rank: int) -> Self | None:
        """The same stage training adapters alone; None if it already does, or cannot."""
        if self.lora_rank or "lora" not in type(self).model_fields:
            return None
        return self.model_copy(update={"lora": rank})

    @abstractmethod
    def work(self, config: Config | None, guess: Guess) -> StageWork:
        """The work of the stage on a model with this config.json, None for a stage that starts from nothing.

        Raises:
            UserError: if that cannot be known here.
        """


SUBSET = Curve(
    "subset_right", "Held-out subset", "share right",
    "Share of right answers to questions that are neither trained on nor among those of the final evaluation.",
    live="held out", share=True, optional=True,
)  # fmt: skip
PACE = Curve("tokens_per_second", "Tokens per second", live="tokens/s")
GRAD_NORM = Curve(
    "grad_norm", "Gradient norm", "L2 norm", "Size of the update before clipping; spikes are large steps."
)
LANGUAGE_CURVES = (
    Curve("loss", "Loss", "nats per token", "How badly the next token was predicted, on the step's own text.",
          live="loss", drawn=True),
    Curve("val_bits_per_byte", "Validation", "bits per byte",
          "The same on validation text, per byte, so comparable across tokenizers.", live="bits per byte",
          optional=True),
    Curve("val_loss", "Validation", "nats per token",
          "The same on conversations that are never trained on.", live="validation", optional=True),
    SUBSET,
    Curve("tokens", "Tokens", live="tokens"),
    PACE,
    Curve("mtp_loss", "Loss further ahead", "nats per token", "Loss of the modules that look beyond the next token.",
          optional=True),
    Curve("load_worst", "Busiest expert", "times the mean",
          "Tokens of the busiest expert over the mean, in the layer where they differ most; 1 is perfect balance.",
          optional=True),
    GRAD_NORM,
    Curve("lr", "Learning rate", "learning rate", "Set by the schedule.", optional=True),
)  # fmt: skip


class LanguageModelling(StageSpec):
    """Keys of pretraining and fine-tuning: predicting the next token."""

    curves: ClassVar[Sequence[Curve]] = LANGUAGE_CURVES

    data: Annotated[list[Source], Field(min_length=1)] = Field(
        description="The sources, each a path or a table (see Sources of data)."
    )
    policy: Literal["stop", "skip"] = Field(
        default="stop",
        description="On a broken row or document: stop the run, or skip it and report it.",
    )
    length: Annotated[int, Field(ge=2, le=10**7)] = Field(
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
        default=1.0, description="The gradient is scaled down to this norm (DeepSeek-V3's 1.0)."
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
    memory_gb: Gigabytes = Field(
        default=2.0, description="Memory for one micro-batch's activations and logits, in GB."
    )

    @property
    def sources(self) -> Sequence[Source]:
        return self.data

    def language_work(
        self, config: Config, steps: int, batch_tokens: int, lora: int = 0, lessons: int = 0
    ) -> StageWork:
        """The work of so many steps; prediction modules go at the network's own pace."""
        pairs = max(1, batch_tokens // self.length) * causal_pairs(self.length)
        forward = forward_flops(config, batch_tokens, pairs, batch_tokens)
        return StageWork(
            config=config,
            steps=steps,
            tokens=batch_tokens,
            pairs=pairs,
            scored=batch_tokens,
            length=self.length,
            save_every=self.checkpoint_every,
            memory_gb=self.memory_gb,
            forwards=3 * (1 + mtp_flops(config, batch_tokens, pairs, batch_tokens) / forward),
            lora=lora,
            muon=self.optimizer == "muon",
            lessons=lessons,
        )
