"""Keys of `kind: grpo`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from farthing.cost.flops import causal_pairs
from farthing.recipe.places import ChatTemplate
from farthing.recipe.stage import GRAD_NORM, PACE, SUBSET, Asks, Curve, StageSpec
from farthing.recipe.tasks import Tasks
from farthing.recipe.types import Count, Decay, Gigabytes, NotNegative, Positive, Text, Warmup
from farthing.recipe.work import PROMPT_TOKENS, SAMPLED_AT_ONCE, Answers, Config, Guess, StageWork

_ASKS = Asks({})  # for the defaults

CURVES = (
    Curve("reward", "Reward", "mean reward", "What the verifier paid per answer, averaged over the step.",
          live="reward", drawn=True),
    Curve("right", "Answers right", "share right",
          "Share of sampled answers that the verifier accepted, on training questions.", live="right",
          drawn=True, share=True),
    SUBSET,
    Curve("unparsed", "No answer read", "share of answers",
          "Share of sampled answers in which no answer was found.", share=True),
    Curve("cut_off", "Cut off", "share of answers",
          "Share of sampled answers that reached max_new_tokens without an end.", share=True),
    Curve("silent", "Without signal", "share of groups",
          "Share of questions whose answers all earned the same, so that nothing is learnt from them.", live="silent",
          share=True, optional=True),
    Curve("entropy", "Entropy", "nats per token",
          "How undecided the model is about its next token; at zero it no longer explores.", live="entropy"),
    Curve("kl", "KL", "nats per token", "Divergence from the model the stage started with.", live="KL", optional=True),
    Curve("length", "Length", "tokens", "Mean number of tokens in an answer.", live="length"),
    PACE,
    GRAD_NORM,
)  # fmt: skip


class Grpo(StageSpec):
    """Group relative policy optimisation, verifiable rewards (DeepSeekMath, arXiv:2402.03300, section 4)."""

    curves: ClassVar[Sequence[Curve]] = CURVES

    kind: Literal["grpo"]
    tasks: Tasks = Field(description="Generators by name, each with a weight or {weight, config}.")
    answer: Literal["final", "tag", "boxed"] = Field(
        default=_ASKS.answer,
        description="How the answer is read: the last number of the text, <answer>…</answer>, or \\boxed{…}.",
    )
    prompt: Text = Field(
        default=_ASKS.prompt, description="What the user says; {question} stands for the question."
    )
    chat_template: ChatTemplate | None = Field(
        default=None,
        description="Give the model this chat template: chatml, plain, or a file's path; null keeps its own.",
    )
    system: str | None = Field(default=_ASKS.system, description="The system message, if any.")

    steps: Count = Field(description="Batches of questions to train on.")
    prompts: Count = Field(default=32, description="Questions a step (R1-Zero's 32, arXiv:2501.12948).")
    group: Annotated[int, Field(ge=2, le=1_000_000)] = Field(
        default=16, description="Answers sampled for each question, compared with each other (R1-Zero's 16)."
    )
    max_new_tokens: Count = Field(default=_ASKS.max_new_tokens, description="Longest answer, in tokens.")
    temperature: Positive = Field(
        default=1.0, description="Sampling temperature; 1 samples the policy itself."
    )

    lr: Positive = Field(default=1e-6, description="Peak learning rate (GRPO's 1e-6, arXiv:2402.03300).")
    warmup: Warmup = Field(default=0, description="Steps of linear warm-up.")
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
    grad_clip: Positive = Field(default=1.0, description="The gradient is scaled down to this norm.")
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
        description="Reward minus the group's mean, divided by its deviation (GRPO, arXiv:2402.03300) or not "
        "(Dr. GRPO, arXiv:2503.20783).",
    )
    drop_silent: bool = Field(
        default=True,
        description="Leave out groups whose answers all earned the same: they carry no advantage. The KL term, where "
        "there is one, takes them in all the same.",
    )
    refill: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
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
    kl_estimator: Literal["k3", "k3_corrected"] = Field(
        default="k3",
        description="k3, as GRPO was published; its gradient is that of KL(reference || policy). k3_corrected: times "
        "the probability ratio, with the gradient of KL(policy || reference) (DeepSeek-V3.2, arXiv:2512.02556, "
        "section 3.1).",
    )
    lora: Count | None = Field(
        default=None, description="Rank of LoRA adapters (arXiv:2106.09685); null trains all."
    )
    lora_alpha: Positive = Field(
        default=32.0, description="LoRA's scale: its update is multiplied by lora_alpha / lora."
    )

    stop_silent: Count | None = Field(
        default=10,
        description="The run stops if in none of so many first steps an answer did better than another to the same "
        "question; null never stops.",
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
    memory_gb: Gigabytes = Field(
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

    @property
    def asks(self) -> Asks:
        return Asks(self.tasks, self.answer, self.prompt, self.system, self.max_new_tokens)

    @property
    def sampled_at_once(self) -> int:
        """Sequences in a batch of the sampler."""
        return min(self.prompts * self.group, SAMPLED_AT_ONCE)

    @property
    def cache_tokens(self) -> int:
        """Tokens in the sampler's cache: its sequences, and the prompts that they share."""
        return self.sampled_at_once * (self.max_new_tokens + 32) + self.prompts * PROMPT_TOKENS

    def work(self, config: Config | None, guess: Guess) -> StageWork:
        assert config is not None
        mean = guess.answer_tokens(self.max_new_tokens)
        prompt = guess.prompt_tokens(self.system)
        rounds = min(1 + self.refill, 1 / guess.kept) if self.refill else 1.0
        kept = guess.kept if self.drop_silent and not self.kl else 1.0
        training = 1 - (1 - min(1.0, kept)) ** self.prompts  # a step in which no group is kept trains nothing
        asked = self.prompts * rounds
        groups = asked if self.kl else min(self.prompts, kept * asked) / training
        own = causal_pairs(round(prompt))
        scored = groups * self.group * mean
        return StageWork(
            config=config,
            steps=self.steps,
            tokens=groups * prompt + scored,
            pairs=groups * (own + self.group * (mean * prompt + causal_pairs(round(mean)))),
            scored=scored,
            length=self.max_new_tokens,
            save_every=self.checkpoint_every,
            memory_gb=self.memory_gb,
            forwards=3.0 + bool(self.kl),
            training_steps=training,
            updates=self.updates,
            lora=self.lora_rank,
            muon=self.optimizer == "muon",
            reference=bool(self.kl),
            sampling=Answers(
                questions=self.prompts,
                answers=self.prompts * self.group,
                at_once=SAMPLED_AT_ONCE,
                prompt=prompt,
                mean=mean,
                longest=self.max_new_tokens,
                rounds=rounds,
            ),
            cache_tokens=self.cache_tokens,
        )
