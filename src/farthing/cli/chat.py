"""`farthing chat`: talking to a model in the terminal."""

from __future__ import annotations

import io
import select
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from farthing.cli.help import run_names
from farthing.cli.shared import (
    DeviceName,
    Dtype,
    Json,
    Quantize,
    log,
    model_source,
    only_results_on_stdout,
    print_result,
    starting,
)

_TOGETHER = 0.02  # seconds between two lines that were pasted together


def chat(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A run, model folder, .gguf, hf:owner/name or pypi:name; the newest run by default.",
            autocompletion=run_names,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the most likely token.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Sample from this share of probability.")
    ] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the answers repeatable.")] = None,
    device: DeviceName = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "exact",
    as_json: Json = False,
) -> None:
    """Talk to a model. Reads lines from stdin if that is not a terminal."""
    chosen = model_source(source)
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    with only_results_on_stdout(), starting():
        from farthing import load as load_model
        from farthing.serve.chat import Reply, chat_loop, pasted
        from farthing.serve.talker import Talker

    def load(name: str) -> Reply:
        name = model_source(name)
        with only_results_on_stdout(f"loading {name}"):
            model = load_model(name, dtype, device, quantize)
        return Talker(
            model,
            device,
            dtype,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )

    talker = load(chosen)
    output = sys.stderr if as_json else sys.stdout
    for stream in (
        sys.stdin,
        getattr(output, "raw", output),
    ):  # stray bytes, or characters the terminal lacks, must not end the chat
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    read: Callable[[str], str] = _read_line
    if terminal:
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
        read = pasted(input, _more)
        log(f"{chosen}   /help lists the commands")
    messages = chat_loop(talker, read, output, system=system, terminal=terminal, source=chosen, load=load)
    if as_json:
        print_result({"source": chosen, "messages": messages}, "", as_json)


def _read_line(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _more() -> bool:
    """Whether further lines of what was pasted are there."""
    return bool(select.select([sys.stdin], [], [], _TOGETHER)[0])
