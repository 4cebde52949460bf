"""A run seen from another terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from farthing.base.errors import UserError
from farthing.cli.help import run_names
from farthing.cli.shared import RUNS, Json, print_result, run_folder


def watch(
    run: Annotated[
        str | None,
        typer.Argument(
            help="A run directory, or a name under runs/; the newest run by default.",
            autocompletion=run_names,
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Say where the run is, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Follow a run from another terminal until it ends; Ctrl-C leaves it alone."""
    from farthing.base.terminal import console
    from farthing.report.watch import follow, snapshot

    folder = run_folder(run) if run is not None else _newest()
    if once or as_json:
        found = snapshot(folder)
        print_result(found.as_json(), found.sentence(), as_json)
        return
    try:
        follow(folder, console(file=sys.stdout))
    except KeyboardInterrupt as interrupt:
        if type(interrupt) is not KeyboardInterrupt:  # SIGTERM ends the command as any other
            raise


def _newest() -> Path:
    """The run that was started or continued last."""
    runs = [path for path in RUNS.glob("*") if (path / "run.json").is_file()]
    if not runs:
        raise UserError(f"no run under {RUNS}/; give a run directory")
    return max(runs, key=lambda path: (path / "run.json").stat().st_mtime)


COMMANDS: tuple[Callable[..., Any], ...] = (watch,)
