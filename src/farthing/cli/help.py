"""The list of commands, `farthing help`, and what a shell completes."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from farthing.base.errors import UserError
from farthing.cli.shared import RUNS, print_text


class Commands(TyperGroup):
    """The commands, each with its whole first sentence, wrapped where the terminal ends."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list into the help."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, command.get_short_help_str(limit=1000)) for name, command in found if command is not None
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def help_(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(help="The command; without one, all are listed.")] = None,
) -> None:
    """Show the help of a command, as `farthing COMMAND --help` does."""
    root = context.parent
    assert root is not None
    if command is None:
        print_text(root.get_help())
        return
    group: Any = root.command
    found = group.get_command(root, command)
    if found is None:
        near = difflib.get_close_matches(command, group.list_commands(root), n=1)
        hint = f"did you mean {near[0]}?" if near else "`farthing help` lists them"
        raise UserError(f"{command}: no such command; {hint}")
    with found.make_context(command, [], parent=root, resilient_parsing=True) as own:
        print_text(found.get_help(own))


help_.__name__ = "help"  # the name of the command


def recipe_names(incomplete: str) -> list[str]:
    """Built-in recipes that begin so; a shell completes files where there are none."""
    from farthing.recipe import builtin

    return [name for name, _ in builtin() if name.startswith(incomplete)]


def run_names(incomplete: str) -> list[str]:
    """Runs under runs/ that begin so, by their bare names."""
    return sorted(path.name for path in RUNS.glob("*") if path.name.startswith(incomplete) and path.is_dir())


def claim_names(incomplete: str) -> list[str]:
    """Built-in claims that begin so."""
    from farthing.claims.claim import builtin

    return [name for name in builtin() if name.startswith(incomplete)]


def one_of(*names: str) -> Callable[[str], list[str]]:
    """A completion with fixed words."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


COMMANDS: tuple[Callable[..., Any], ...] = (help_,)
