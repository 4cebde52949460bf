"""Progress of training: one picture in a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from farthing.base.figures import duration, money, percent, short
from farthing.recipe import Curve

HISTORY = 60  # steps a sparkline shows
RECENT = 20  # steps that the time left is estimated from
MIN_STEPS = 3  # needed for an honest estimate of the time left
_BARS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Show training as it goes. Use as a context manager and `update` it with each line of metrics.jsonl.

    In a terminal the view redraws in place; elsewhere it writes about a hundred plain lines; `quiet` writes
    nothing.

    Args:
        total_steps: of the stage, 0 if unknown; a line's "step" counts the steps done, from 1.
        curves: the stage's figures; those with a `live` name are shown.
    """

    def __init__(
        self, total_steps: int, curves: Sequence[Curve], console: Console, quiet: bool = False
    ) -> None:
        self._total, self._console, self._quiet = total_steps, console, quiet
        self._curves = [curve for curve in curves if curve.live and curve.drawn]
        self._figures = [curve for curve in curves if curve.live and not curve.drawn]
        self._latest: Mapping[str, Any] = {}
        self._history: deque[Mapping[str, Any]] = deque(maxlen=HISTORY)
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._steps_seen = 0
        self._activities: Counter[str] = Counter()
        self._seen: set[str] = set()  # keys of figures
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            # stdout is left alone: with --json it carries the one object.
            self._live = Live(
                self._picture(), console=self._console, redirect_stdout=False, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show a finished step, a line of metrics.jsonl."""
        self.recall(metrics)
        if self._live is None and not self._quiet and self._worth_a_line():
            self._print(self._line())

    def recall(self, metrics: Mapping[str, Any]) -> None:
        """Take a step of an earlier attempt into the picture; it had its line then."""
        self._latest = metrics
        self._history.append(metrics)
        self._steps_seen += 1
        self._seen |= {curve.key for curve in self._figures if metrics.get(curve.key) is not None}
        if metrics.get("seconds") is not None:
            self._seconds.append(metrics["seconds"])
        self._activities.update(metrics.get("seconds_by_activity") or {})
        if self._live is not None:
            self._live.update(self._picture())

    def _worth_a_line(self) -> bool:
        step, every = self._done(), max(1, self._total // 100)
        return step % every == 0 or step == self._total

    def note(self, text: str) -> None:
        """Write a sentence above the picture."""
        if not self._quiet:
            self._print(text)

    def seconds_left(self) -> float | None:
        """Seconds left: the median time of the last steps times the steps left; None while too few are known."""
        if self._steps_seen < MIN_STEPS or not self._seconds or not self._total:
            return None
        return statistics.median(self._seconds) * max(0, self._total - self._done())

    def _done(self) -> int:
        return int(self._latest.get("step") or 0)

    def _print(self, text: str) -> None:
        encoding = self._console.encoding
        said = text.encode(encoding, "replace").decode(encoding)  # an ASCII log must not end a run
        self._console.print(Text(said), soft_wrap=True, highlight=False)

    def _value(self, curve: Curve) -> str:
        """The latest value; an optional figure may be missing from a step."""
        lines = reversed(self._history) if curve.optional else [self._latest]
        value = next((line[curve.key] for line in lines if line.get(curve.key) is not None), None)
        return percent(value) if curve.share else short(value)

    def _known(self, curves: Sequence[Curve]) -> list[Curve]:
        """Those that have a value, or will have one in every step."""
        return [curve for curve in curves if not curve.optional or curve.key in self._seen]

    def _parts(self) -> dict[str, list[float | None]]:
        """The parts of the reward by step, where it has several: one alone is the reward."""
        lines = [line.get("reward_parts") or {} for line in self._history]
        names = dict.fromkeys(name for line in lines for name in line)
        return {name: [line.get(name) for line in lines] for name in names} if len(names) > 1 else {}

    def _line(self) -> str:
        get = self._latest.get
        parts = [
            f"step {self._done()}/{self._total}",
            *(f"{curve.live} {self._value(curve)}" for curve in self._known((*self._curves, *self._figures))),
            *(f"{name} {short(values[-1])}" for name, values in self._parts().items()),
            f"step time {duration(get('seconds'))}",
            f"spent {money(get('usd_so_far'))}",
            f"left {duration(self.seconds_left())}",
        ]
        return "  ".join(parts)

    def _picture(self) -> Group:
        get = self._latest.get
        width = max(20, min(self._console.width, 100))
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(f"step {self._done()}/{self._total}", style="bold")
        head.append(f"   left {duration(self.seconds_left())}   spent {money(get('usd_so_far'))}")
        bar = ProgressBar(total=max(1, self._total), completed=min(self._done(), self._total), width=width)
        bar_line = Table.grid()  # a bare bar does not end its line
        bar_line.add_row(bar)
        curves = Table.grid(padding=(0, 2))
        curves.add_column(style="dim", no_wrap=True)
        curves.add_column(justify="right", no_wrap=True)
        curves.add_column(no_wrap=True, overflow="crop")
        room = min(HISTORY, max(1, width - 20))
        for curve in self._curves:
            values = [line.get(curve.key) for line in self._history][-room:]
            drawn = self._drawn(values, (0.0, 1.0) if curve.share else None)
            curves.add_row(curve.live, self._value(curve), drawn)
        for name, values in self._parts().items():
            curves.add_row(Text(name), short(values[-1]), self._drawn(values[-room:], None))
        figures = Text(no_wrap=True, overflow="ellipsis")
        for curve in self._known(self._figures):
            figures.append(f"{curve.live} ", style="dim").append(f"{self._value(curve)}   ")
        shares = Text(self._shares(), "dim", no_wrap=True, overflow="ellipsis")
        return Group(head, bar_line, curves, figures, shares)

    def _drawn(self, values: Sequence[float | None], bounds: tuple[float, float] | None) -> Text:
        plain = self._console.options.ascii_only
        return Text("" if plain else sparkline(values, bounds), style="cyan")

    def _shares(self) -> str:
        total = sum(self._activities.values())
        if total <= 0:
            return "time –"
        shares = (f"{name} {percent(seconds / total, 0)}" for name, seconds in self._activities.most_common())
        return "time " + " · ".join(shares)


def sparkline(values: Sequence[float | None], bounds: tuple[float, float] | None = None) -> str:
    """One character for each value between `bounds`, by default the values' own; a gap where there is no number."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return " " * len(values)
    low, high = bounds or (min(known), max(known))
    top = len(_BARS) - 1

    def bar(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return " "
        share = (value - low) / (high - low) if high > low else 0.5
        return _BARS[round(top * min(1.0, max(0.0, share)))]

    return "".join(map(bar, values))
