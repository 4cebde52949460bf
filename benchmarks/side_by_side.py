"""What the benchmarks share: two programs measured in turn, beside the machine's own limits.

Farthing and its peer do the same work in the same process, alternating, after a warm-up of each; medians
are compared. The machine's limits (a large matrix product in the dtype that Farthing computes in here, reading a
large tensor) are measured in the same process, so that every result also says how far it is from what the hardware
allows. One JSON line a result goes to stdout, words go to stderr.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from farthing.base import processor
from farthing.base.device import choose

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@dataclass(frozen=True)
class Phase:
    """A part of the work that is repeated `times` times: FLOPs and bytes that have to be moved each time."""

    flops: float
    bytes: float
    times: int = 1


@dataclass(frozen=True)
class Machine:
    """What was measured: FLOP/s of a 2048^3 product in the dtype that is computed in, bytes/s of reading 1 GB."""

    flops: float
    bytes: float

    def seconds(self, work: Sequence[Phase]) -> float:
        """The least time the work can take: each phase is bound by arithmetic or by memory."""
        return sum(max(p.flops / self.flops, p.bytes / self.bytes) * p.times for p in work)


def options(
    description: str, runs: int, add: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """The command line every benchmark has, and what `add` adds to it; sets torch's thread count."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=runs, help=f"timed runs of each side (default {runs})")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--quick", action="store_true", help="tiny settings: a trial, not a measurement")
    parser.add_argument("--profile", action="store_true", help="profile Farthing's side alone, to stderr")
    if add is not None:
        add(parser)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.quick:
        chosen.runs = 1
    return chosen


def say(text: str) -> None:
    """A line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def timed(function: Callable[[], object]) -> float:
    """Seconds a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@functools.cache
def machine() -> Machine:
    """The limits of this machine with the current thread count, best of several tries."""
    size = 2048
    place = choose("cpu")
    a, b = (torch.randn(size, size).to(place.torch_dtype) for _ in range(2))
    big = torch.ones(1 << 28)
    a @ b, big.sum()
    found = Machine(
        flops=2 * size**3 / min(timed(lambda: a @ b) for _ in range(12)),
        bytes=big.nbytes / min(timed(big.sum) for _ in range(6)),
    )
    load = os.getloadavg()[0]
    say(
        f"machine: {found.flops / 1e9:.0f} GFLOPS in {place.dtype}, {found.bytes / 1e9:.1f} GB/s, load {load:.2f}"
    )
    return found


def compare(
    name: str,
    unit: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    peer_name: str,
    *,
    runs: int,
    work: Sequence[Phase],
    amount: float = 1.0,
    warm_ups: int = 1,
    details: dict[str, Any] | None = None,
) -> None:
    """Warm both up, run them in turn `runs` times, print the result. Arguments as `report`'s."""
    for _ in range(warm_ups):
        ours()
        peer()
    seconds, busy = [], []
    for _ in range(runs):
        before = os.times()
        seconds.append((timed(ours), timed(peer)))
        after = os.times()
        cpu = after.user + after.system - before.user - before.system
        busy.append(round(cpu / (after.elapsed - before.elapsed), 2))
    details = {**(details or {}), "cores_had": busy}  # far below `threads`: something else was running
    report(name, unit, seconds, peer_name, work=work, amount=amount, details=details)


def report(
    name: str,
    unit: str,
    seconds: Sequence[tuple[float, float]],
    peer_name: str,
    *,
    work: Sequence[Phase],
    amount: float = 1.0,
    details: dict[str, Any] | None = None,
) -> None:
    """Print one result.

    Args:
        unit: `seconds` (fewer are better), or anything a second, with `amount` of it done in a run.
        seconds: of (ours, peer) for each pair of runs.
        work: what one run of ours has to do at least.
    """
    ours, theirs = (statistics.median(pair[side] for pair in seconds) for side in (0, 1))
    ratios = [b / a for a, b in seconds]
    values = (ours, theirs) if unit == "seconds" else (amount / ours, amount / theirs)
    line = {
        "name": name,
        "peer_name": peer_name,
        "unit": unit,
        "farthing": round(values[0], 4),
        "peer": round(values[1], 4),
        "ratio": round(theirs / ours, 3),
        "roofline_fraction": round(machine().seconds(work) / ours, 3),
        "runs": len(seconds),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "isa": processor.isa(),
        "dtype": choose("cpu").dtype,
        "threads": torch.get_num_threads(),
        "details": {
            "seconds": [[round(a, 3), round(b, 3)] for a, b in seconds],
            "gflops": round(machine().flops / 1e9),
            "read_gb_s": round(machine().bytes / 1e9, 1),
            "load_average": round(os.getloadavg()[0], 2),
            **(details or {}),
        },
    }
    print(json.dumps(line), flush=True)


def profile(name: str, function: Callable[[], object]) -> None:
    """Where the time of a (warmed-up) call goes: the operators with the most time of their own, to stderr."""
    function()
    seconds = timed(function)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    say(f"{name}: {seconds:.3f} s without the profiler")
    say(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=48))
