"""Starting a server: from sources and settings to a process that answers."""

from __future__ import annotations

import asyncio
import importlib.util
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from farthing.base.device import choose
from farthing.base.errors import UserError
from farthing.cost.devices import detect
from farthing.cost.spend import SERVING
from farthing.engine.model import Model, load
from farthing.serve.api.app import create_app
from farthing.serve.backends.engines import Engine, check_options, find, model_for
from farthing.serve.backends.process import Process, free_port
from farthing.serve.backends.remote import Clock, Remote
from farthing.serve.bill import Bill
from farthing.serve.errors import ApiError
from farthing.serve.gateway import Bounds, Gateway
from farthing.serve.keys import Keys, read_keys, single
from farthing.serve.protocol import ChatRequest
from farthing.serve.safety import Policy, moderation, read_policy
from farthing.serve.served import Served, Spoken
from farthing.serve.server import server_of
from farthing.weights.adapter import base_of
from farthing.weights.folder import read_config
from farthing.weights.layouts import decoder_config
from farthing.weights.sources import adapter_folder, model_folder, resolve

_CACHE = 32_768


@dataclass(frozen=True)
class Settings:
    """What `farthing serve` is told: sources by name, and its options."""

    sources: dict[str, str]
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "exact"
    key: str | None = None
    keys: Path | None = None
    max_batch: int = 32
    cache_tokens: int | None = None
    max_waiting: int = 256
    max_seconds: float = 600.0
    speculate: int = 0
    ledger: Path | None = None
    usd_per_hour: float | None = None
    lenient: bool = False
    page: bool = True
    backend: str = "farthing"
    backend_args: str = ""
    moderation: str = "off"
    moderation_log: Path | None = None
    policy: Path | None = None


def start(settings: Settings, listening: socket.socket, made: bool, say: Callable[[str], None]) -> None:
    """Serve until the process is told to end.

    Args:
        made: the key was made for this server, and is told.
        say: hears where the page is, what is served, and what takes long.

    Raises:
        UserError: if a source cannot be loaded, or the keys cannot be read.
    """
    keys = _keys(settings)
    engine = _engine(settings)
    place = choose(settings.device, settings.dtype)
    bill = Bill(detect(place.device), _ledger(settings), settings.usd_per_hour)
    bounds = Bounds(answer_seconds=settings.max_seconds, waiting=settings.max_waiting)
    gateway = Gateway(
        list(settings.sources),
        keys,
        bill,
        bounds,
        settings.lenient,
        moderation(settings.moderation, settings.moderation_log),
        read_policy(settings.policy) if settings.policy is not None else None,
    )
    failures: list[Exception] = []

    async def load_models() -> None:
        try:
            remotes: list[Remote] = []
            if engine is not None:
                remotes = await asyncio.to_thread(_remotes, settings, engine, Clock(bill.joules))
            models: Sequence[Spoken] = remotes or await asyncio.to_thread(_load, settings)
            for served in models:
                _check_policy(served, gateway.policy)
            await _start_all(remotes)
            gateway.start(models)
            say(_where(listening, settings, made))
        except Exception as error:
            failures.append(error)
            server.should_exit = True

    app = create_app(gateway, load_models)
    end_page = _mount(app, gateway, say) if settings.page else _nothing
    server = server_of(app, lambda: gateway.busy, end_page)
    try:
        server.run([listening])
    except KeyboardInterrupt:
        if server.force_exit:  # otherwise the answers have ended, and uvicorn raises what told it to end
            raise
    if failures:
        raise failures[0]


def _keys(settings: Settings) -> Keys:
    if settings.keys is not None:
        return read_keys(settings.keys)
    return single(settings.key) if settings.key is not None else Keys()


def _ledger(settings: Settings) -> Path | None:
    """Where books are kept: as told, or in the folder of the run that is served."""
    if settings.ledger is not None:
        return settings.ledger
    for source in settings.sources.values():
        if (folder := Path(source)).is_dir() and (folder / "ledger.jsonl").is_file():
            return folder / SERVING
    return None


def _engine(settings: Settings) -> Engine | None:
    """The other engine that is to run the models; None for our own. Raises UserError if it is not installed."""
    if settings.backend == "farthing":
        return None
    vllm = settings.backend == "vllm"
    check_options(
        settings.backend,
        [
            ("--speculate", settings.speculate > 0),
            ("--device", settings.device != "auto"),
            ("--quantize", vllm and settings.quantize != "exact"),
            ("--cache-tokens", vllm and settings.cache_tokens is not None),
        ],
    )
    return find(settings.backend, settings.max_batch, settings.cache_tokens or _CACHE, settings.dtype)


def _remotes(settings: Settings, engine: Engine, clock: Clock) -> list[Remote]:
    """The models behind another engine, which has not been started yet."""
    made = []
    for name, given in settings.sources.items():
        source = resolve(given)
        model = model_for(engine, source, settings.dtype, settings.quantize)
        port, key = free_port(), secrets.token_urlsafe(24)
        folder = model_folder(source)
        context = decoder_config(read_config(folder)).max_positions
        if engine.reads_gguf:
            context = min(context, settings.cache_tokens or _CACHE)
        command = engine.command(model, name, port, context, settings.backend_args)
        process = Process(name, command, port, engine.health, {engine.key: key}, key)
        made.append(Remote(name, folder, process, clock, context, engine))
    return made


async def _start_all(remotes: Sequence[Remote]) -> None:
    """Start the engines; if one does not start, end the others."""
    try:
        await asyncio.gather(*(remote.process.start() for remote in remotes))
    except BaseException:
        await asyncio.gather(*(remote.process.stop() for remote in remotes), return_exceptions=True)
        raise


def _check_policy(served: Spoken, policy: Policy | None) -> None:
    """Raise UserError if a model's chat template has no place for the policy: it would refuse every conversation."""
    if policy is None or not served.template:
        return
    try:
        served.chat_prompt(
            ChatRequest.model_validate({"messages": [{"role": "user", "content": "hello"}]}), policy
        )
    except ApiError as error:
        raise UserError(f"--policy: the chat template of {served.name} does not take it ({error})") from None


def _load(settings: Settings) -> list[Served]:
    models, loaded = [], _loaded(settings)
    for name in settings.sources:
        model = loaded[name]
        wanted = max(_CACHE, model.decoder.config.max_positions)
        tokens = settings.cache_tokens or model.affordable(wanted)
        served = Served(
            name,
            model,
            max_batch=settings.max_batch,
            cache_tokens=tokens,
            speculate=min(settings.speculate, len(model.decoder.mtp)),
        )
        models.append(served)
    return models


def _loaded(settings: Settings) -> dict[str, Model]:
    """The models by name; adapters of a model that is served share the tensors that they leave alone with it."""
    given = (settings.dtype, settings.device, settings.quantize)
    adapters = {
        name: folder for name, source in settings.sources.items() if (folder := adapter_folder(source))
    }
    loaded = {name: load(source, *given) for name, source in settings.sources.items() if name not in adapters}
    bases = dict(loaded)
    for name, folder in adapters.items():
        served = [
            base for base in bases if _is_served(base_of(folder), base, settings.sources[base], bases[base])
        ]
        if not served:
            loaded[name] = load(folder, *given)
        elif settings.quantize == "exact":
            loaded[name] = bases[served[0]].adapted(folder)
        else:  # rounded weights take no update
            exact = load(settings.sources[served[0]], settings.dtype, settings.device)
            loaded[name] = exact.adapted(folder).rounded(settings.quantize)
    return loaded


def _is_served(base: str, name: str, source: str, model: Model) -> bool:
    """Whether a model is an adapter's base: the same folder or, of a hub's OWNER/NAME, one called so."""
    if Path(base).exists():
        return Path(base).resolve() == model.folder.resolve()
    base = base.removeprefix("hf:").partition("@")[0]
    return base == source.removeprefix("hf:").partition("@")[0] or Path(base).name in (
        name,
        Path(source).name,
    )


def _where(listening: socket.socket, settings: Settings, made: bool) -> str:
    """What a person needs to know: the address, what is served, and a key that was made."""
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    said = f"{', '.join(settings.sources)} at {address}"
    if made:
        said += f"   key: {settings.key}   page: {address}/?key={settings.key}"
    return said


def _mount(app: FastAPI, gateway: Gateway, say: Callable[[str], None]) -> Callable[[], None]:
    """The page at /, where its library is installed. Returns what closes the page's connections."""
    if importlib.util.find_spec("gradio") is None:
        say("no page: pip install 'farthing[serve]' brings what it is made with")
        return _nothing
    from farthing.serve.page import mount

    return mount(app, gateway)


def _nothing() -> None:
    """There is no page to close."""
