"""What metering costs: the same steps with the meter and without it, in turn.

A step is three spans (generate, verify, train) around matrix products, as in reinforcement learning, only
shorter: a step of the quickstart takes seconds, one here tenths of one, so the share that is measured is
an upper bound. `details` has the microseconds of a span on its own and what they are of a step.

    python benchmarks/meter.py
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import contextlib
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from side_by_side import Phase, compare, options, profile, say

from farthing.cost import devices, ledger
from farthing.cost.meter import Meter

SIZE = 1024
ACTIVITIES = ("generate", "verify", "train")


def main() -> None:
    chosen = options(__doc__ or "", runs=7)
    steps, products = (4, 2) if chosen.quick else (40, 12)
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)

    def work(span: Callable[[str], AbstractContextManager[object]]) -> None:
        for _ in range(steps):
            for activity in ACTIVITIES:
                with span(activity):
                    for _ in range(products):
                        a @ b

    with tempfile.TemporaryDirectory() as folder:
        device = devices.detect()
        path = Path(folder) / "ledger.jsonl"
        with Meter(path, stage="01-steps", device=device, rate=devices.rate(device)) as meter:
            if chosen.profile:
                profile("meter", lambda: work(meter.span))
                return
            microseconds = 1e6 * one_span(meter)
            say(f"a span: {microseconds:.0f} us")
            flops = 2.0 * SIZE**3
            compare(
                "meter/steps",
                "seconds",
                lambda: work(meter.span),
                lambda: work(contextlib.nullcontext),
                "no meter",
                runs=chosen.runs,
                work=[Phase(flops, 3.0 * a.nbytes, steps * len(ACTIVITIES) * products)],
                details={"span_microseconds": round(microseconds, 1), "spans": steps * len(ACTIVITIES)},
            )
        lines, skipped = ledger.read(path)
        assert not skipped
        assert len(lines) >= chosen.runs * steps * len(ACTIVITIES)


def one_span(meter: Meter, times: int = 2000) -> float:
    """Seconds that a span with nothing in it takes."""
    started = time.perf_counter()
    for _ in range(times):
        with meter.span("train"):
            pass
    return (time.perf_counter() - started) / times


if __name__ == "__main__":
    main()
