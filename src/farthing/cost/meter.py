"""The meter: books every second of a process into the ledger, and what it cost.

    with Meter(run_dir / "ledger.jsonl", stage="01-grpo", device=device, rate=rate(device, recipe.rates)) as
    meter: with meter.span("generate", step=3) as span: span.tokens_out += 512

Spans nest: a span inside another pauses it, so that a second is booked once. Time outside all spans is
booked as idle. A span is one appended line when it closes; a heartbeat keeps what is still open in
`ledger.open.json`, from which `recover` books it after a death without a last word (kill -9, power).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from farthing.base.files import append_lines, appending
from farthing.base.machine import cpu_cores
from farthing.cost import energy, ledger
from farthing.cost.devices import Device
from farthing.cost.flops import forward_flops, mtp_flops
from farthing.cost.ledger import ACTIVITIES, Line

BEAT_SECONDS = 1.0
_CLOCK_SECONDS = 1.0  # difference of the wall clock from the steady one above which a line reports it
_IDLE_LINE_SECONDS = 0.25  # shorter gaps between spans are merged, or they would double the ledger

_Status = Literal["ok", "failed", "interrupted"]


@dataclass
class Span:
    """An activity in progress. The caller adds tokens and FLOPs as they happen; the meter does the rest."""

    stage: str
    activity: str
    step: int | None
    started: float
    """By the wall clock, unix seconds; a person reads it."""
    opened: float | None = None
    """By the clock that cannot be set; None for what began before the meter."""
    tokens_in: int = 0
    tokens_out: int = 0
    flops: int = 0
    seconds: float = 0.0
    joules: float = 0.0
    joules_are: energy.JoulesAre = "measured"
    usd_paid: float = 0.0
    """To others, as a judge's server."""


def line_of(
    span: Span,
    device: Device,
    rate: tuple[float, str],
    devices: int = 1,
    status: _Status = "ok",
    attempt: int = 1,
) -> Line:
    """The ledger's line of a span; `rate` is dollars a device-hour and their source."""
    seconds = round(span.seconds, 6)
    return Line(
        stage=span.stage,
        activity=span.activity,
        started=max(0.0, span.started),
        seconds=seconds,
        device=device.name,
        devices=devices,
        # int(), because these may come as numpy's or torch's
        tokens_in=int(span.tokens_in),
        tokens_out=int(span.tokens_out),
        flops=int(span.flops),
        joules=round(span.joules, 6),
        joules_are=span.joules_are,
        usd=seconds * devices * rate[0] / 3600 + span.usd_paid,
        usd_rate=rate[0],
        rate_source=rate[1],
        status=status,
        attempt=attempt,
        step=span.step,
    )


class Sampled(Protocol):
    """A generator's work (`engine.sequence.Work`): tokens, and (query, key) pairs attended."""

    prompt_tokens: int
    new_tokens: int
    computed_tokens: int
    scored_tokens: int
    pairs: float
    decode_pairs: float
    module_tokens: int
    module_scored: int
    module_pairs: float
    module_decode_pairs: float


def book_sampling(span: Span, done: Sampled, hf_config: Mapping[str, Any]) -> None:
    """Add the tokens and FLOPs of sampling to a span."""
    span.tokens_in += done.prompt_tokens
    span.tokens_out += done.new_tokens
    span.flops += forward_flops(hf_config, done.computed_tokens, done.pairs, done.scored_tokens)
    span.flops += forward_flops(hf_config, 0, done.decode_pairs, 0, absorbed=True)
    if done.module_tokens:
        layers = mtp_flops(hf_config, done.module_tokens, done.module_pairs, 0)
        layers += mtp_flops(hf_config, 0, done.module_decode_pairs, 0, absorbed=True)
        span.flops += layers // hf_config["num_nextn_predict_layers"]  # counted as if all read every token
        span.flops += mtp_flops(hf_config, 0, 0, done.module_scored)


@dataclass(frozen=True)
class Totals:
    """Cost of the run so far, with earlier attempts and open spans."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By activity."""
    usd: float = 0.0
    joules: float = 0.0


class Meter:
    """Writes the ledger of one process. A context manager; closing it books the idle rest.

    `rate` is what `hardware.rate` gives: dollars for a device-hour and the source of the figure. `attempt`
    is the next one after the ledger's last if it is not given. `started` (unix seconds, see
    `process_started`) is when the process began, to book the time from there to here as `load`. `stage` may
    be set anew at any time. Only one thread may open spans; any may read `totals`. What a killed process
    left open is recovered first.
    """

    def __init__(
        self,
        path: Path,
        *,
        stage: str,
        device: Device,
        rate: tuple[float, str],
        devices: int = 1,
        attempt: int | None = None,
        started: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._monotonic, self._wall = monotonic, wall
        self._charged = monotonic()
        load_seconds = 0.0 if started is None else wall() - started
        recover(path)
        earlier, _ = ledger.read(path)
        self._stage = stage
        self.attempt = ledger.last_attempt(earlier) + 1 if attempt is None else attempt
        self._device, self._devices, self._rate = device, devices, rate
        self._seconds: dict[str, float] = defaultdict(float)
        self._usd = self._joules = 0.0
        for line in earlier:
            self._count(line)
        self._energy = energy.EnergyMeter(device, devices, monotonic)
        self._joules_read, _ = self._energy.joules()
        self._spans: list[Span] = []
        self._idle = self._new_idle()
        self._lock = threading.RLock()

        self._open_path = _open_path(path)
        self._file = appending(path)
        self._unsynced = False
        if started is not None:
            self._book_load(started, max(0.0, load_seconds))
        self._stop = threading.Event()
        self._beat()
        self._heart = threading.Thread(target=self._beat_on, name="farthing-meter", daemon=True)
        self._heart.start()

    @property
    def stage(self) -> str:
        """The stage that new spans are booked on. Setting it does not move open spans."""
        return self._stage

    @stage.setter
    def stage(self, stage: str) -> None:
        with self._lock:
            self._charge()
            if not self._spans:
                self._book_idle()
            self._stage = stage

    @contextlib.contextmanager
    def span(self, activity: str, *, step: int | None = None) -> Iterator[Span]:
        """Book what happens inside as `activity` (one of `ledger.ACTIVITIES`) of the current stage; inside another
        span it is of that one's step.

        An exception closes the span as failed, Ctrl-C and SystemExit as interrupted; they pass on.
        """
        if activity not in ACTIVITIES:
            raise ValueError(f"no activity is called {activity!r}: use one of {', '.join(ACTIVITIES)}")
        with self._lock:
            assert not self._file.closed, "the meter is closed"
            self._charge()
            if not self._spans and self._idle.seconds >= _IDLE_LINE_SECONDS:
                self._book_idle()
            if step is None and self._spans:
                step = self._spans[-1].step
            span = Span(self._stage, activity, step, self._wall(), self._monotonic())
            self._spans.append(span)
        try:
            yield span
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            self._close_span(span, "interrupted")
            raise
        except BaseException:
            self._close_span(span, "failed")
            raise
        else:
            self._close_span(span, "ok")

    def totals(self) -> Totals:
        """Seconds by activity, dollars and joules of the run so far."""
        with self._lock:
            self._charge()
            seconds, usd, joules = defaultdict(float, self._seconds), self._usd, self._joules
            for span in (*self._spans, self._idle):
                seconds[span.activity] += span.seconds
                usd += self._usd_for(span.seconds) + span.usd_paid
                joules += span.joules
            return Totals({name: amount for name, amount in seconds.items() if amount > 0}, usd, joules)

    def close(self) -> None:
        """Book the idle rest and end the heartbeat. A second call does nothing."""
        with self._lock:
            if self._file.closed:
                return
            if self._spans:
                self._close_span(self._spans[0], "interrupted")
            os.fsync(self._file.fileno())  # the slow one, which is still on the clock
            self._charge()
            self._book_idle()
            self._stop.set()
            os.fsync(self._file.fileno())
            self._file.close()
            self._open_path.unlink(missing_ok=True)
        self._heart.join()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _charge(self) -> None:
        """Give the time and energy since the last call to the innermost open span, or to idling."""
        now = self._monotonic()
        joules, joules_are = self._energy.joules()
        owner = self._spans[-1] if self._spans else self._idle
        if owner is self._idle and owner.seconds == 0:
            owner.stage, owner.started = self._stage, self._wall() - (now - self._charged)
            owner.opened = self._charged
        owner.seconds += max(0.0, now - self._charged)
        owner.joules += max(0.0, joules - self._joules_read)
        if joules_are == "estimated":
            owner.joules_are = "estimated"
        self._charged, self._joules_read = now, joules

    def _close_span(self, span: Span, status: _Status) -> None:
        with self._lock:
            if span not in self._spans:
                return  # closed already, by the span around it or with the meter
            self._charge()
            while (inner := self._spans.pop()) is not span:
                # Only a second Ctrl-C, in the middle of its own closing, leaves one open inside.
                self._write(self._line(inner, "interrupted"))
            self._write(self._line(span, status))

    def _book_load(self, started: float, seconds: float) -> None:
        """The unmetered time from the start of the process to the meter's."""
        cpu_seconds = min(time.process_time(), seconds * cpu_cores())
        load = Span(self._stage, "load", None, started, seconds=seconds, joules_are="estimated")
        load.joules = energy.estimate(seconds, cpu_seconds)
        self._write(self._line(load, "ok"))

    def _book_idle(self) -> None:
        if self._idle.seconds > 0:
            self._write(self._line(self._idle, "ok"))
        self._idle = self._new_idle()

    def _new_idle(self) -> Span:
        return Span(self._stage, "idle", None, self._wall(), self._monotonic())

    def _line(self, span: Span, status: _Status) -> Line:
        line = line_of(span, self._device, self._rate, self._devices, status, self.attempt)
        if span.usd_paid:
            line["usd_paid"] = span.usd_paid
        if span.opened is not None:
            jump = (self._wall() - span.started) - (self._monotonic() - span.opened)
            if abs(jump) > _CLOCK_SECONDS:
                line["clock_jump"] = round(jump, 3)
        return line

    def _usd_for(self, seconds: float) -> float:
        return seconds * self._devices * self._rate[0] / 3600

    def _write(self, line: Line) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self._unsynced = True
        self._count(line)

    def _count(self, line: Line) -> None:
        self._seconds[line["activity"]] += line["seconds"]
        self._usd += line["usd"]
        self._joules += line["joules"]

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            # A full disk is for the run to notice when it writes; the heartbeat tries again.
            with contextlib.suppress(OSError):
                self._beat()

    def _beat(self) -> None:
        """Write the open spans beside the ledger, and flush the ledger to disk."""
        with self._lock:
            if self._file.closed:
                return
            self._charge()
            unsynced, self._unsynced = self._unsynced, False
            spans = [span for span in (*self._spans, self._idle) if span.seconds > 0]
            lines = [self._line(span, "interrupted") for span in spans]
            beside = self._open_path.with_suffix(".tmp")
            beside.write_text(json.dumps({"ledger_bytes": self._file.tell(), "lines": lines}))
            beside.replace(self._open_path)
            descriptor = os.dup(self._file.fileno()) if unsynced else None
        if descriptor is not None:
            # Outside the lock: a slow disk must not hold up the spans.
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def recover(path: Path) -> int:
    """Book what a process that died had open, up to its last heartbeat, as interrupted; gives how many lines.

    A line that was written after that heartbeat is not booked twice. Does nothing when nothing was left
    open; must not be called while the process that writes the ledger is alive.
    """
    open_path = _open_path(path)
    try:
        left = json.loads(open_path.read_bytes())
        lines = [line for line in left["lines"] if ledger.is_line(line)]
        offset = max(0, int(left["ledger_bytes"]))
    except FileNotFoundError:
        return 0
    except (
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
    ):  # damaged in spite of the replacement
        lines, offset = [], 0
    written = path.read_bytes()[offset:] if path.exists() else b""
    closed = {_identity(line) for piece in written.split(b"\n") if (line := ledger.parse(piece)) is not None}
    lost = [line for line in lines if _identity(line) not in closed]
    append_lines(path, lost)
    open_path.unlink()
    return len(lost)


def process_started() -> float:
    """Unix seconds at which this process began, to about 10 ms; the present without /proc."""
    now = time.time()
    try:
        # Field 22 of proc(5)'s stat: clock ticks since boot. Counted behind the command's name, which may
        # hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - max(0.0, age)


def _identity(line: Line) -> tuple[object, ...]:
    return line["attempt"], line["stage"], line["activity"], line["step"], line["started"]


def _open_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.open.json")
