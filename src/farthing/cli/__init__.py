"""The commands. Thin: each reads its options, calls the library, and prints.

stdout carries results only, stderr everything else; with --json exactly one JSON object goes to stdout.
Exit codes: 0 done, 1 a bug of ours (with its traceback), 2 a mistake the user can fix (one line on stderr),
130 interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import atexit
import itertools
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from farthing.base import processor
from farthing.base.device import reference_only
from farthing.base.errors import UserError
from farthing.base.limits import refusal
from farthing.base.terminal import guard
from farthing.cli import data, doctor, folders, help, money, recipes, serve, watch
from farthing.cli.chat import chat
from farthing.cli.evaluate import evaluate
from farthing.cli.help import Commands, recipe_names
from farthing.cli.shared import (
    DeviceOr,
    DtypeOr,
    Json,
    Seed,
    log,
    only_results_on_stdout,
    placed,
    print_result,
    print_text,
    starting,
)

app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,  # plain help: rich would double the time `farthing --help` takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds like Ctrl-C, but also ends a chat, where Ctrl-C only stops the answer."""


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False,
) -> None:
    """Build a language model from open weights, and account for every farthing."""
    if version:
        from importlib.metadata import version as installed

        print_text(f"farthing {installed('farthing')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print_text(context.get_help())
        return
    if {"-h", "--help"} & set(sys.argv):
        return
    processor.isa()  # an invalid FARTHING_ISA or FARTHING_KERNELS is refused whatever the command
    reference_only()


@app.command()
def run(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A built-in recipe's name, or the path of a YAML file.", autocompletion=recipe_names
        ),
    ],
    run_dir: Annotated[Path | None, typer.Option(help="Where to run; runs/NAME by default.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one key, such as stages.1.lr=2e-5. Repeatable."
        ),
    ] = None,
    seed: Seed = None,
    device: DeviceOr = None,
    dtype: DtypeOr = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe with every default, and stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live view, and no progress.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe, or continue it where it was interrupted."""
    from farthing.recipe import dump, load

    loaded = load(recipe, [*(set_ or ()), *placed(device, dtype)], seed)
    if dry_run:
        from farthing.recipe.log_to import check_installed
        from farthing.tasks.check import check

        check_installed(loaded.log_to)
        check(loaded)
        print_result(loaded.model_dump(mode="json"), dump(loaded).rstrip("\n"), as_json)
        return
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with only_results_on_stdout():
        with starting(quiet):
            from farthing.runs import run as run_recipe

        result = run_recipe(loaded, run_dir, quiet)
    print_result({"run_dir": str(result.run_dir), **result.results}, str(result.run_dir), as_json)


app.command()(chat)


app.command(name="eval")(evaluate)


app.add_typer(recipes.recipes, name="recipes")

# In the order `farthing --help` lists them.
_PARTS = (serve, watch, recipes, data, money, folders, doctor, help)
for _command in itertools.chain(*(part.COMMANDS for part in _PARTS)):
    app.command()(_command)


_COMMAND = typer.main.get_command(app)


def main() -> NoReturn:
    """The console entry point: runs one command and exits with its code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    guard()
    command = _COMMAND
    usage_error: type[Exception] = typer.BadParameter.__mro__[
        1
    ]  # click's UsageError, wherever typer keeps it
    subcommand: str | None = None
    code = 0
    if "_FARTHING_COMPLETE" in os.environ:  # the shell asks for completions, and gets nothing else
        command(prog_name="farthing", complete_var="_FARTHING_COMPLETE")
    # make_context and invoke rather than command(): typer would turn Ctrl-C, broken pipes and mistakes into
    # messages and exit codes of its own.
    try:
        with command.make_context("farthing", sys.argv[1:]) as context:
            try:
                command.invoke(context)
            finally:
                subcommand = context.invoked_subcommand
        sys.stdout.flush()
    except typer.Exit as done:
        code = done.exit_code
    except UserError as mistake:
        log(f"farthing: {mistake}")
        code = 2
    except usage_error as mistake:
        name = getattr(getattr(mistake, "ctx", None), "command_path", _named(command))
        said = mistake.format_message().rstrip(".")  # type: ignore[attr-defined]
        log(f"farthing: {said} (see {name} --help)")
        code = 2
    except KeyboardInterrupt:
        with _uninterrupted():
            again = "; run the same command again to continue" if subcommand == "run" else ""
            log(f"farthing: interrupted{again}")
        code = 130
    except BrokenPipeError:
        if not _stdout_is_gone():
            raise
        code = 1  # stdout's reader, such as `head`, has left
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        log(f"farthing: {refused}")
        code = 2
    if code == 2:  # libraries that end without memory or disk would complain again
        atexit.register(setattr, sys, "unraisablehook", lambda _: None)
    sys.exit(code)


# ---- helpers ----


def _named(command: Any) -> str:
    """The command that was called, for a mistake that was found before it was entered."""
    word = next(iter(sys.argv[1:]), "")
    return f"farthing {word}" if word in command.commands else "farthing"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM inside, and when the process ends: each would be one more traceback."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in numbers])
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def _on_sigterm(*_: object) -> None:
    raise Terminated


def _stdout_is_gone() -> bool:
    """Return whether stdout's reader has left; if so, discard further output, even at exit."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # not a file
        return False
    poll = select.poll()
    poll.register(stdout, 0)  # a closed pipe is reported without being asked for
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
