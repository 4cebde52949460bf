"""A run seen from another terminal: reads its files, writes nothing, and disturbs nothing.

The files may be torn, damaged or replaced at any moment, since the run goes on; what cannot be read is left out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from rich.console import Console

from farthing.base.errors import UserError
from farthing.base.figures import duration, money, percent
from farthing.base.schema import parse_text
from farthing.base.terminal import console
from farthing.cost import ledger
from farthing.recipe import KINDS
from farthing.recipe.kinds import spec_of
from farthing.report.live import LiveView
from farthing.report.run import Json, mapping, number, read_json, rows, text

POLL = 1.0  # seconds
State = Literal["running", "finished", "stopped"]


def is_running(folder: Path) -> bool:
    """Whether a process holds the lock of a run directory."""
    try:
        with (folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@dataclass(frozen=True)
class Snapshot:
    """What there is to know about a run at one moment."""

    folder: Path
    name: str
    state: State
    since: float
    """Unix seconds of the last sign of life."""
    stage: str | None
    """The last stage with steps: its folder's name."""
    step: int
    steps: int | None
    seconds_left: float | None
    """Of the stage."""
    activity: str | None
    """What a running run is doing: one of the ledger's activities."""
    seconds: float
    usd: float
    attempts: int
    how: str
    """How a stopped run stopped, as far as is known."""
    latest: Json = field(default_factory=dict)
    """The last step's figures."""
    evaluations: list[Json] = field(default_factory=list)

    def as_json(self) -> Json:
        """Ready for JSON."""
        return {
            "run_dir": str(self.folder), "name": self.name, "state": self.state,
            "since": datetime.fromtimestamp(self.since).astimezone().isoformat(timespec="seconds"),
            "stage": self.stage, "step": self.step, "steps": self.steps, "seconds_left": self.seconds_left,
            "activity": self.activity, "seconds": self.seconds, "usd": self.usd, "attempts": self.attempts,
            "how": self.how, "metrics": self.latest, "evaluations": self.evaluations,
        }  # fmt: skip

    def sentence(self) -> str:
        """The run in one line."""
        so_far = f"{duration(self.seconds)} and {money(self.usd)} so far"
        of = f" of {self.steps}" if self.steps else ""
        at = f"{self.stage}, step {self.step}{of}" if self.stage else "before its first step"
        when = datetime.fromtimestamp(self.since).strftime("%Y-%m-%d %H:%M:%S")
        if self.state == "running":
            doing = f" ({self.activity})" if self.activity else ""
            left = (
                f", {duration(self.seconds_left)} left of the stage" if self.seconds_left is not None else ""
            )
            return f"{self.name} is running{doing}: {at}{left}; {so_far}"
        if self.state == "finished":
            said = [f"{text(e.get('name'))} {percent(number(e.get('accuracy')))}" for e in self.evaluations]
            scores = "; right: " + ", ".join(said) if said else ""
            return f"{self.name} finished at {when}: {duration(self.seconds)} and {money(self.usd)}{scores}"
        return (
            f"{self.name} is not running since {when}: it {self.how} at {at}, after "
            f"{duration(self.seconds)} and {money(self.usd)}; the same `farthing run` command continues it"
        )


def snapshot(folder: Path) -> Snapshot:
    """Read a run directory.

    Raises:
        UserError: if it is none.
    """
    known = ("recipe.yaml", "run.json", "ledger.jsonl", "stages")
    if not folder.is_dir() or not any((folder / name).exists() for name in known):
        raise UserError(f"{folder} is no run directory; give the one that `farthing run` printed")
    running = is_running(folder)  # asked first, so that nothing is missed of a run that ends meanwhile
    stage = _stage(folder)
    lines = list(_Tail(stage / "metrics.jsonl").new()) if stage else []
    results = read_json(folder / "results.json")
    booked, _ = ledger.read(folder / "ledger.jsonl")
    beating = (
        [line for line in _rows_of(folder / "ledger.open.json") if ledger.is_line(line)] if running else []
    )
    summary = ledger.summarise([*booked, *beating])  # type: ignore[list-item]
    steps = steps_of(stage) if stage else None
    left = None
    if stage is not None and steps:
        view = _view(stage, steps, console(quiet=True), quiet=True)
        for line in lines:
            view.recall(line)
        left = view.seconds_left()
    busy = [line["activity"] for line in beating if line["activity"] != "idle"]
    return Snapshot(
        folder=folder,
        name=text(results.get("name") or folder.resolve().name),
        state="running" if running else "finished" if results else "stopped",
        since=_last_sign(folder),
        stage=stage.name if stage else None,
        step=int(lines[-1]["step"]) if lines else 0,
        steps=steps,
        seconds_left=left if running else None,
        activity=busy[0] if busy else None,
        seconds=number(results.get("wall_seconds")) or summary.wall_seconds,
        usd=summary.total.usd,
        attempts=int(number(read_json(folder / "run.json").get("attempts")) or 0),
        how=_how(folder, booked),
        latest=lines[-1] if lines else {},
        evaluations=rows(results.get("evaluations")),
    )


def follow(folder: Path, console: Console, poll: float = POLL) -> Snapshot:
    """Show a run until it ends: its present stage with the steps so far, and each stage after that.

    Raises:
        UserError: if it is no run directory.
    """
    found = snapshot(folder)
    console.print(found.sentence(), markup=False, highlight=False, soft_wrap=True)
    shown: Path | None = None
    while found.state == "running":
        stage = _stage(folder)
        if stage is None or stage == shown:
            time.sleep(poll)
        else:
            shown = stage
            _follow_stage(folder, stage, console, poll)
        found = snapshot(folder)
        if found.state != "running":
            console.print(found.sentence(), markup=False, highlight=False, soft_wrap=True)
    return found


def _follow_stage(folder: Path, stage: Path, console: Console, poll: float) -> None:
    """Show a stage until it is done, another has begun, or the run has ended."""
    tail = _Tail(stage / "metrics.jsonl")
    with _view(stage, steps_of(stage) or 0, console) as view:
        view.note(stage.name)
        before = list(tail.new())
        for line in before[:-1]:
            view.recall(line)
        for line in before[-1:]:
            view.update(line)
        while True:
            over = not is_running(folder) or (stage / "done.json").exists() or _stage(folder) != stage
            for line in tail.new():
                view.update(line)
            if over:
                return
            time.sleep(poll)


def _view(stage: Path, steps: int, console: Console, quiet: bool = False) -> LiveView:
    kind = stage.name.partition("-")[2]
    return LiveView(steps, spec_of(kind).curves if kind in KINDS else (), console, quiet)


def steps_of(stage: Path) -> int | None:
    """How many steps a stage takes, as it wrote when it began or as its recipe says."""
    found = number(read_json(stage / "steps.json").get("steps"))
    if found is None:  # runs of 0.1.0
        with contextlib.suppress(OSError, UserError, ValueError, IndexError):
            recipe = parse_text((stage.parents[1] / "recipe.yaml").read_text(encoding="utf-8"), "recipe.yaml")
            found = number(rows(mapping(recipe).get("stages"))[int(stage.name[:2]) - 1].get("steps"))
    return int(found) if found is not None and 0 < found < 1e12 else None


def _stage(folder: Path) -> Path | None:
    """The last stage that has begun its steps."""
    begun = [
        path.parent for path in folder.glob("stages/*/*") if path.name in ("metrics.jsonl", "steps.json")
    ]
    return max(begun, default=None)


class _Tail:
    """The lines of a metrics.jsonl as they come, each step once, though the file may be cut back and go on."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._at, self._last = path, 0, 0, 0

    def new(self) -> Iterator[Json]:
        """The lines that have been added."""
        try:
            with self._path.open("rb") as file:
                status = self._path.stat()
                if status.st_ino != self._file or status.st_size < self._at:
                    self._file, self._at = status.st_ino, 0
                file.seek(self._at)
                pieces = file.read().split(b"\n")
        except OSError:
            return
        self._at += sum(
            len(piece) + 1 for piece in pieces[:-1]
        )  # what follows the last line's end is not whole
        for piece in pieces[:-1]:
            line = _figures(piece)
            if line is not None and line["step"] > self._last:
                self._last = line["step"]
                yield line


def _figures(piece: bytes) -> Json | None:
    """The numbers of a line, those in tables too; None if it is no step."""
    try:
        value = mapping(json.loads(piece))
    except (ValueError, RecursionError):
        return None
    line: Json = {}
    for key, figure in value.items():
        if isinstance(figure, dict):
            line[key] = {text(name): found for name, f in figure.items() if (found := number(f)) is not None}
        else:
            line[key] = number(figure)
    for key in ("seconds_by_activity", "reward_parts"):
        line[key] = mapping(line.get(key))
    step = line.get("step")
    return {**line, "step": int(step)} if isinstance(step, float) and 0 < step < 1e12 else None


def _rows_of(path: Path) -> list[Json]:
    return rows(read_json(path).get("lines"))


def _last_sign(folder: Path) -> float:
    """Unix seconds at which the run last wrote something that every run writes."""
    names = (
        "ledger.jsonl",
        "ledger.open.json",
        "run.json",
        "results.json",
        "recipe.yaml",
        "stages/*/metrics.jsonl",
    )
    found = [path for name in names for path in folder.glob(name)]
    return max((path.stat().st_mtime for path in found if path.exists()), default=folder.stat().st_mtime)


def _how(folder: Path, booked: list[ledger.Line]) -> str:
    """How a run that is not running stopped."""
    if (folder / "ledger.open.json").exists():  # no last word
        return "was killed"
    attempt = ledger.last_attempt(booked)
    statuses = {line["status"] for line in booked if line["attempt"] == attempt}
    if "failed" in statuses:
        return "stopped with an error"
    return "was interrupted" if "interrupted" in statuses else "stopped"
