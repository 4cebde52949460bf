"""The verifier process: reads batches, writes one line per verdict, and cannot outlive its parent.

A request is one JSON line, {"convention": ..., "items": [[item's fields, text], ...], "seconds": [a limit each]}. The
replies to it are "[]" when the first item begins, then a verdict's fields for each item in order, or {"error":
traceback}.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from farthing.base.terminal import guard
from farthing.tasks.item import Item, Verdict

_MEMORY = 2**30  # bytes of address space
_START = 60  # seconds of processor time to import what a batch needs


def main(function: str) -> None:
    """Serves `function` (dotted name; item, text, convention -> Verdict) on the standard streams."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, _MEMORY)
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # whatever the function prints must not mix with the replies
    guard()  # it may quote what it judges
    sys.stdout = sys.stderr
    module, _, name = function.rpartition(".")
    home = importlib.import_module(module)
    judge, prepare = getattr(home, name), getattr(home, "prepare", None)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    while True:
        request = json.loads(inbox.get())
        pairs = [(Item(*fields), text) for fields, text in request["items"]]
        if prepare is not None:
            _limit(resource.RLIMIT_CPU, _cpu_seconds() + _START)
            prepare(item for item, _ in pairs)
        _reply(replies, [])
        for (item, text), seconds in zip(pairs, request["seconds"], strict=True):
            _limit(resource.RLIMIT_CPU, _cpu_seconds() + math.ceil(seconds) + 1)
            _reply(replies, _judge(judge, item, text, request["convention"]))


def _judge(judge: Callable[..., Verdict], item: Item, text: str, convention: str) -> Any:
    try:
        verdict = judge(item, text, convention)
        return [verdict.outcome, verdict.answer, verdict.score, dict(verdict.parts), verdict.error]
    except (MemoryError, RecursionError):
        return ["timeout"]
    except Exception:
        return {"error": traceback.format_exc()}


def _listen(requests: BinaryIO, inbox: queue.SimpleQueue[bytes]) -> None:
    """The pipe closes when the parent is gone, however it went; then this process goes too, busy or not."""
    for request in requests:
        inbox.put(request)
    os._exit(0)


def _reply(replies: int, reply: Any) -> None:
    try:
        os.write(replies, json.dumps(reply).encode() + b"\n")
    except BrokenPipeError:
        os._exit(0)


def _limit(what: int, soft: int) -> None:
    """A soft limit, so that the time limit can move on from item to item."""
    hard = resource.getrlimit(what)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    try:
        resource.setrlimit(what, (soft, hard))
    except (OSError, ValueError):
        print(f"farthing: this system cannot limit resource {what} of a verifier", file=sys.stderr)


def _cpu_seconds() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return math.ceil(used.ru_utime + used.ru_stime)
