"""What serving costs: the price and the energy of the machine, and lines in a ledger.

An answer's cost is its share of the time in which the engines ran. A ledger line stands for up to a minute; it holds
counts and no words. Time without requests is booked as idle, because a rented machine costs then too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from farthing.base.errors import UserError
from farthing.base.files import append_lines
from farthing.cost.devices import Device, rate
from farthing.cost.energy import EnergyMeter
from farthing.cost.meter import Span, line_of
from farthing.serve.served import Spoken

LINE_SECONDS = 60.0


class Bill:
    """The machine's clock while it serves.

    Args:
        path: a ledger to append to; None keeps no books.
        usd_per_hour: the machine's price, if it is not the catalogue's.
    """

    def __init__(self, device: Device, path: Path | None = None, usd_per_hour: float | None = None) -> None:
        self._device, self._path = device, path
        try:
            self.rate = rate(device) if usd_per_hour is None else (usd_per_hour, "given when serving began")
        except UserError:  # a device without a known price
            self.rate = 0.0, "no price is known"
        self._energy = EnergyMeter(device)
        self._booked = time.monotonic()
        self._joules = 0.0

    @property
    def usd_per_second(self) -> float:
        return self.rate[0] / 3600

    def joules(self) -> float:
        """Energy since the start."""
        return self._energy.joules()[0]

    def due(self) -> bool:
        """Whether a line should be written."""
        return self._path is not None and time.monotonic() - self._booked >= LINE_SECONDS

    def book(self, models: Sequence[Spoken], busy_seconds: float) -> None:
        """Write what has been done since the last call, of which the engines ran `busy_seconds`. Call it where the
        engines run."""
        now, (joules, joules_are) = time.monotonic(), self._energy.joules()
        seconds, spent = now - self._booked, joules - self._joules
        self._booked, self._joules = now, joules
        if self._path is None or seconds <= 0:
            return
        busy = min(busy_seconds, seconds)
        span = Span("serve", "generate", None, time.time() - seconds, seconds=busy)
        for served in models:
            served.book(span)
        span.joules = spent * busy / seconds
        idle = Span(
            "serve", "idle", None, span.started + busy, seconds=seconds - busy, joules=spent - span.joules
        )
        span.joules_are = idle.joules_are = joules_are
        lines = [line_of(one, self._device, self.rate) for one in (span, idle) if one.seconds > 0]
        with contextlib.suppress(OSError):  # a full disk must not end the service
            append_lines(self._path, map(dict, lines))
