"""Model folders: what is in one, and the same weights in other formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from farthing.cli.help import one_of, run_names
from farthing.cli.shared import (
    Json,
    log,
    may_overwrite,
    model_source,
    only_results_on_stdout,
    print_result,
    starting,
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER",
        help="A model folder, run, .gguf, hf:owner/name or pypi:name.",
        autocompletion=run_names,
    ),
]


def export(
    source: Source,
    to: Annotated[
        str, typer.Option(help="gguf, hf-fp8 or hf-bf16.", autocompletion=one_of("gguf", "hf-fp8", "hf-bf16"))
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output path; by default a name derived from the source's, in the current directory."
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--type", help="Type of a .gguf's tensors: f16, bf16, q8_0, q5_1, q5_0, q4_k, q4_1, q4_0 or f32."
        ),
    ] = "f16",
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Overwrite what is there, without asking.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a model in another format: for llama.cpp, in FP8, in bfloat16."""
    with only_results_on_stdout(), starting():
        from farthing.cost.room import room_to_read
        from farthing.weights.export import default_name, describe
        from farthing.weights.export import export as write
        from farthing.weights.sources import model_folder
    chosen = model_source(source)
    path = out or Path(default_name(chosen, to, kind))
    if not force:
        may_overwrite(path, ", or --force to overwrite it")
    with only_results_on_stdout(f"reading and writing {source}"):
        folder = model_folder(chosen)
        with room_to_read(f"exporting {source}", folder):
            notes = write(folder, to, path, kind)
    for note in notes:
        log(note)
    print_result(describe(path, to, notes), str(path), as_json)


def inspect(source: Source, as_json: Json = False) -> None:
    """Describe a model folder: its contents, its cost to run, and the engines that would misread it."""
    with only_results_on_stdout(), starting():
        from farthing.cost.room import room_to_read
        from farthing.plans.inspect import inspect as look
        from farthing.plans.inspect import inspection_text
        from farthing.weights.sources import model_folder
    with only_results_on_stdout(f"reading {source}"):
        folder = model_folder(model_source(source))
        with room_to_read(f"inspecting {source}", folder):
            found = look(folder)
    print_result(found, inspection_text(found), as_json)


COMMANDS: tuple[Callable[..., Any], ...] = (export, inspect)
