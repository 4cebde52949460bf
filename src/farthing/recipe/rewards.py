"""What an answer earns: verifiers by name with their settings, shaping parts, and functions of one's own.

Only what can be known without running anything is checked here: that a verifier exists and accepts its settings, that a
file of one's own is Python and has the function. The file itself is run by the verifier processes alone.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from farthing.base.errors import UserError
from farthing.base.schema import Strict, checked, nearest
from farthing.base.sources import is_server
from farthing.recipe.places import folders
from farthing.recipe.tasks import RewardPart
from farthing.recipe.types import Count, NotNegative, Positive, Text

_MOST_BYTES = 1_000_000  # of a file of one's own


# ---- settings of the verifiers ----


class Plain(Strict):
    """Has no settings."""


class Number(Strict):
    after: Text | None = Field(
        default=None,
        description="The answer is what follows the last such marker; null reads it as `answer` says.",
    )


class Exact(Strict):
    case: bool = Field(default=False, description="Whether upper and lower case differ.")


class Regex(Strict):
    pattern: Text = Field(
        description="A Python pattern. With a group, what its last match caught is compared with the gold answer; "
        "without, a match anywhere pays."
    )

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern: is not one that Python can read ({error}); mend it") from None
        if groups > 1:
            raise ValueError(
                f"pattern: has {groups} groups, and one catches the answer; write (?:…) for the others"
            )
        return self


class Json(Strict):
    schema_: dict[str, JsonValue] | None = Field(
        default=None,
        alias="schema",
        description="The JSON schema (draft 2020-12) that the answer must satisfy.",
    )
    equal: bool = Field(default=False, description="The answer must also equal the gold one, as JSON.")

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.schema_ is None and not self.equal:
            raise ValueError("schema: is missing; give one, or equal: true to compare with the gold answer")
        return self


class Code(Strict):
    tests: Text | None = Field(
        default=None,
        description="The column with the tests; null takes test and entry_point (HumanEval), test_list (MBPP), or "
        "input_output (APPS).",
    )
    seconds: Annotated[float, Field(gt=0, le=300)] = Field(
        default=6.0, description="Time for all tests of an answer; processor time has the same limit."
    )
    memory_mb: Annotated[int, Field(ge=64, le=65536)] = Field(
        default=512, description="Memory of the answer's process."
    )


class Judge(Strict):
    url: Text | None = Field(
        default=None,
        description="An OpenAI-compatible server, as http://127.0.0.1:8000/v1, or `farthing serve`'s; null asks a "
        "model in this process.",
    )
    model: Text = Field(
        description="The model's name at the server; without url, a model as `base` names one."
    )
    prompt: Text = Field(
        default="Question:\n{question}\n\nReference answer:\n{answer}\n\nAnswer to judge:\n{completion}\n\n"
        "How good is the answer to judge, from 0 (wrong) to 10 (as right as the reference)? "
        "Reply with the line `Score: N` and nothing after it.",
        description="What the judge is asked; {question}, {answer} and {completion} are filled in.",
    )
    best: Positive = Field(default=10.0, description="The score that earns 1; 0 earns 0.")
    right_from: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="An answer counts as right from this reward up."
    )
    key: Text = Field(default="OPENAI_API_KEY", description="The environment variable that holds the key.")
    max_new_tokens: Count = Field(default=256, description="Longest reply of the judge, in tokens.")
    calls: Count | None = Field(
        default=None, description="Most calls of an attempt at a run, which stops beyond."
    )
    usd: Positive | None = Field(
        default=None, description="Most dollars of an attempt, by the two prices below."
    )
    usd_per_million_in: NotNegative = Field(default=0.0, description="Dollars for a million prompt tokens.")
    usd_per_million_out: NotNegative = Field(default=0.0, description="Dollars for a million reply tokens.")
    tokens: Count | None = Field(
        default=None, description="Most tokens of an attempt, prompts and replies together."
    )
    retries: Annotated[int, Field(ge=0, le=20)] = Field(
        default=3, description="Further tries of a call that failed."
    )
    at_once: Annotated[int, Field(ge=1, le=256)] = Field(default=8, description="Calls at the same time.")

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if self.url is not None and not is_server(self.url):
            raise ValueError(f"url: must be http://HOST[:PORT]/… or https://…, got {self.url!r}")
        if self.url is None and (self.usd is not None or self.usd_per_million_in + self.usd_per_million_out):
            raise ValueError("usd: is for a server's prices; a judge without url costs this machine's time")
        if "{completion}" not in self.prompt:
            raise ValueError('prompt must contain "{completion}", where the answer goes')
        if self.usd is not None and not self.usd_per_million_in + self.usd_per_million_out:
            raise ValueError(
                "usd: needs usd_per_million_in and usd_per_million_out, from which dollars are counted"
            )
        return self


class RewardModel(Strict):
    model: Text = Field(
        description="The folder of a `*ForSequenceClassification` with one label, or hf:OWNER/NAME."
    )
    right_from: float = Field(default=0.0, description="An answer counts as right from this score up.")


class Overlong(Strict):
    cache: Count | None = Field(
        default=None,
        description="Tokens before max_new_tokens over which the penalty grows; null takes a fifth, as DAPO does.",
    )


class Own(Strict):
    seconds: Annotated[float, Field(gt=0, le=300)] = Field(
        default=2.0, description="Processor time for an answer; twice that by the clock."
    )
    right_from: float = Field(default=1.0, description="An answer counts as right from this reward up.")
    completions: Literal["auto", "text", "messages"] = Field(
        default="auto",
        description="What a function of TRL's kind gets: texts, or lists of messages; auto sees which it reads.",
    )


VERIFIERS: dict[str, type[Strict]] = {
    "number": Number, "math": Plain, "choice": Plain, "exact": Exact, "regex": Regex, "json": Json, "code": Code,
    "judge": Judge, "reward_model": RewardModel, "ifeval": Plain,
}  # fmt: skip
ASKED = ("judge", "reward_model")
"""Verifiers for which a model is asked, which costs something."""
SHAPING: dict[str, type[Strict]] = {"format": Plain, "length": Plain, "overlong": Overlong}
_EXTRAS = {
    "math": ("math_verify", "math needs math-verify; pip install 'farthing[math]'"),
    "json": ("jsonschema", "json needs jsonschema; pip install 'farthing[json]'"),
}


def is_own(use: str) -> bool:
    """Whether `use` names a function of the user's own, as file.py:function."""
    return ".py" in use or ":" in use


def settings_of(part: RewardPart) -> Any:
    """The settings as their model, with defaults. Raises pydantic's errors for settings that `check_reward` refuses."""
    known = Own if is_own(part.use) else {**VERIFIERS, **SHAPING}[part.use]
    return known.model_validate(part.settings)


# ---- checks ----


def check_reward(part: RewardPart, where: str) -> RewardPart:
    """The part, with the path of a file of one's own made absolute.

    Args:
        where: what the sentences about mistakes begin with.

    Raises:
        UserError: for a verifier that does not exist or whose package is missing, settings that it refuses, and a file
            that does not exist, is no Python or lacks the function.
    """
    if is_own(part.use):
        checked(Own, part.settings, f"{where}: {part.use}: settings")
        return part.model_copy(update={"use": _own(part.use, where)})
    known = {**VERIFIERS, **SHAPING}
    if part.use not in known:
        hint = nearest(part.use, list(known)) or f"there are {', '.join(known)}, and my_rewards.py:function"
        raise UserError(f"{where}: there is no verifier {part.use!r}; {hint}")
    checked(known[part.use], part.settings, f"{where}: {part.use}: settings")
    module, needs = _EXTRAS.get(part.use, ("json", ""))
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{where}: {needs}")
    if part.use == "json":
        _check_schema(part, where)
    if part.use == "reward_model":
        _check_reward_model(part, where)
    return part


def model_of(part: RewardPart) -> str | None:
    """The model that this process must load for a part, as `base` names one; None for none."""
    local = part.use == "reward_model" or (part.use == "judge" and part.settings.get("url") is None)
    return str(part.settings["model"]) if local else None


def _check_reward_model(part: RewardPart, where: str) -> None:
    """Refuse another model's folder; one that is not on this machine is looked at when it is."""
    from farthing.weights.reward import reward_config

    folder = Path(str(model_of(part)))
    if (folder / "config.json").is_file():
        try:
            reward_config(folder)
        except UserError as error:
            raise UserError(f"{where}: reward_model: {error}") from None


def _check_schema(part: RewardPart, where: str) -> None:
    from jsonschema import Draft202012Validator, SchemaError

    schema = settings_of(part).schema_
    try:
        Draft202012Validator.check_schema(schema if schema is not None else True)
    except SchemaError as error:
        raise UserError(f"{where}: json: settings: schema: {error.message}; mend the schema") from None


def _own(use: str, where: str) -> str:
    path, colon, function = use.rpartition(":")
    if not colon or not path.endswith(".py") or not function.isidentifier():
        raise UserError(f"{where}: {use}: write a function of your own as my_rewards.py:function")
    tried = [folder / path for folder in folders()]
    file = next((place for place in tried if place.is_file()), None)
    if file is None:
        raise UserError(
            f"{where}: {path}: no such file in {' or '.join(str(place.parent) for place in tried)}"
        )
    try:
        content = file.read_bytes()
        if len(content) > _MOST_BYTES:
            raise UserError(f"{where}: {path}: larger than 1 MB, so no file of rewards")
        tree = ast.parse(content, filename=path)
    except SyntaxError as error:
        raise UserError(
            f"{where}: {path}, line {error.lineno}: is no Python ({error.msg}); mend it"
        ) from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{where}: {path}: cannot be read as Python ({error})") from None
    names = list(_names(tree))
    if function not in names and "*" not in names:
        hint = nearest(function, names) or f"there are {', '.join(names[:8]) or 'none'}"
        raise UserError(f"{where}: {path} has no function {function}; {hint}")
    return f"{file.resolve()}:{function}"


def _names(tree: ast.Module) -> Iterator[str]:
    """Names that a file defines, imports or assigns, inside conditions too; "*" where it imports all of another."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


# ---- the default ----

_NUMBER = re.compile(r"(?s)(?:.*####\s*)?[-+−]?\s*[$€£]?\s*[-+−]?[0-9][0-9,]*(?:\.[0-9]+)?\s*[.%]?\s*")
_FORMULA = re.compile(r"\\|\$|\^|[0-9a-z]\s*[/=+*]\s*[0-9a-z(]|^[\[(].*,.*[\])]$|[0-9]")


def default_reward(golds: Sequence[str], choices: bool) -> str:
    """The verifier for answers such as these: choice, number, math (formulas, if math-verify is installed) or exact."""
    if choices:
        return "choice"
    if golds and all(_NUMBER.fullmatch(gold) for gold in golds):
        return "number"
    formulas = bool(golds) and sum(bool(_FORMULA.search(gold)) for gold in golds) > 0.5 * len(golds)
    return "math" if formulas and importlib.util.find_spec("math_verify") else "exact"
