"""`farthing serve`: models over OpenAI's API, with a chat page."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from farthing.base.errors import UserError
from farthing.cli.help import run_names
from farthing.cli.shared import (
    DeviceName,
    Dtype,
    Quantize,
    log,
    model_source,
    only_results_on_stdout,
    starting,
)


def serve(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE]...",
            help="Runs, model folders, .gguf, hf:owner/name or pypi:name, each as NAME=SOURCE if you like; the newest "
            "run by default.",
            autocompletion=run_names,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine a key is demanded.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="FARTHING_API_KEY", help="Demand this key; `new` makes one.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="A YAML file of keys with limits of their own.")] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Serve the model that a run began with, too.")
    ] = False,
    max_batch: Annotated[int, typer.Option(min=1, max=4096, help="Answers that are written at once.")] = 32,
    cache_tokens: Annotated[
        int | None, typer.Option(min=256, help="Tokens of all conversations together; 32,768 or the context.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 503.")] = 256,
    max_seconds: Annotated[float, typer.Option(min=1, help="Longest time for an answer.")] = 600.0,
    speculate: Annotated[
        int, typer.Option(min=0, help="Tokens to guess a step with the model's prediction modules.")
    ] = 0,
    ledger: Annotated[
        Path | None, typer.Option(help="Keep books in this file; a run's own serving.jsonl by default.")
    ] = None,
    usd_per_hour: Annotated[
        float | None, typer.Option(min=0, help="This machine's price; else the catalogue's.")
    ] = None,
    lenient: Annotated[
        bool,
        typer.Option(
            "--lenient", help="Answer to any model's name, and ignore what only OpenAI's servers can do."
        ),
    ] = False,
    moderation: Annotated[
        str,
        typer.Option(help="off, warn=HOOK or block=HOOK; a HOOK is module:function or a classifier's URL."),
    ] = "off",
    moderation_log: Annotated[
        Path | None, typer.Option(help="Log what moderation finds, without the text.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="A system message to put before every conversation.")
    ] = None,
    backend: Annotated[
        Literal["farthing", "vllm", "llama.cpp"],
        typer.Option(help="Who runs the models: we, or another engine that is installed here."),
    ] = "farthing",
    backend_args: Annotated[
        str, typer.Option(metavar="'ARG ...'", help="More arguments for the other engine's server.")
    ] = "",
    page: Annotated[bool, typer.Option("--page/--no-page", help="The chat page at /.")] = True,
    device: DeviceName = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "exact",
) -> None:
    """Serve models over OpenAI's API, and a chat page, on this machine."""
    named = _named(sources or [model_source(None)])
    if with_base:
        named |= _bases(named)
    if keys is not None and api_key is not None:
        raise UserError("give either --api-key or --keys")
    if backend_args and backend == "farthing":
        raise UserError("--backend-args is for another engine: give --backend")
    from farthing.serve.server import LOCAL, listen

    if host not in LOCAL and keys is None and api_key is None:
        raise UserError(
            f"--host {host} can be reached from other machines: give --api-key new, or --keys FILE"
        )
    with only_results_on_stdout(), starting():
        from farthing.serve.start import Settings, start

    listening = listen(host, port)
    key = f"sk-{secrets.token_urlsafe(24)}" if api_key == "new" else api_key
    start(
        Settings(
            named,
            device=device,
            dtype=dtype,
            quantize=quantize,
            key=key,
            keys=keys,
            max_batch=max_batch,
            cache_tokens=cache_tokens,
            max_waiting=max_waiting,
            max_seconds=max_seconds,
            speculate=speculate,
            ledger=ledger,
            usd_per_hour=usd_per_hour,
            lenient=lenient,
            page=page,
            backend=backend,
            backend_args=backend_args,
            moderation=moderation,
            moderation_log=moderation_log,
            policy=policy,
        ),
        listening,
        made=api_key == "new",
        say=log,
    )


def _named(sources: list[str]) -> dict[str, str]:
    """Sources by the names under which they are served."""
    named: dict[str, str] = {}
    for given in sources:
        name, equals, source = given.partition("=")
        if not equals or "/" in name or ":" in name:
            source, name = given, ""
        source = model_source(source)
        name = name or _name(source)
        if name in named:
            raise UserError(f"two models are called {name}; name one: NAME={source}")
        named[name] = source
    return named


def _name(source: str) -> str:
    path = Path(source)
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else source.split(":", 1)[-1]


def _bases(named: dict[str, str]) -> dict[str, str]:
    """The models that runs began with, by the names under which they are served."""
    from farthing.base.schema import read_yaml

    found: dict[str, str] = {}
    for name, source in named.items():
        recipe = Path(source) / "recipe.yaml"
        base = read_yaml(recipe).get("base") if recipe.is_file() else None
        if not isinstance(base, str):
            raise UserError(f"--with-base: {source} is no run that began with a model; leave it out")
        found["base" if len(named) == 1 else f"{name}-base"] = base
    return found


COMMANDS: tuple[Any, ...] = (serve,)
