"""Curves for TensorBoard, Weights & Biases and trackio, besides metrics.jsonl, which has everything.

What each has got is noted in logged.json of the run directory: a continued run goes on in the same curve and repeats no
step in it, since the steps that are done again are the same. One that fails is said once and left alone from then on.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from farthing.base.errors import UserError
from farthing.base.terminal import one_line
from farthing.recipe import Recipe, dump
from farthing.stages.at import View

PROJECT = "farthing"


class Backend(Protocol):
    """Takes the curves of one run."""

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step of a stage, or of an evaluation."""

    def close(self, failed: bool) -> None:
        """Finish, and write what is still held."""


class TensorBoard:
    """Event files in the run directory's folder `tensorboard`."""

    def __init__(self, name: str, recipe: Recipe, folder: Path, new: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        if new:
            self._writer.add_text("run", name)
            self._writer.add_text("recipe", "\n".join(f"    {line}" for line in dump(recipe).splitlines()))

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{group}/{key}", value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A run at Weights & Biases, or in the run directory's folder `wandb` with WANDB_MODE=offline."""

    def __init__(self, name: str, recipe: Recipe, folder: Path, new: bool) -> None:
        wandb: Any = importlib.import_module("wandb")
        if os.environ.get("WANDB_MODE", "online") == "online":
            wandb.Api()  # without a key or a network it says so; `init` would ask in a terminal
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=name,
            resume="allow",
            config=recipe.model_dump(mode="json"),
            dir=str(folder),
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        self._groups: set[str] = set()

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if group not in self._groups:  # each has steps of its own
            self._groups.add(group)
            self._run.define_metric(f"{group}/step", hidden=True)
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._run.log({f"{group}/step": step, **{f"{group}/{key}": value for key, value in values.items()}})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run in trackio's local store, or in the Space of TRACKIO_SPACE_ID."""

    def __init__(self, name: str, recipe: Recipe, folder: Path, new: bool) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self._run = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=name,
            resume="allow",
            config=recipe.model_dump(mode="json"),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{group}/{key}": value for key, value in values.items()}, step=step)

    def close(self, failed: bool) -> None:
        self._trackio.finish()  # the run's own leaves a word on stdout to be said at exit


BACKENDS: dict[str, Callable[[str, Recipe, Path, bool], Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
_REMEDIES = {"wandb": "run `wandb login`, set WANDB_MODE=offline to keep the curves on disk, or leave it out"}


class Loggers:
    """Sends the curves of a run to where its recipe says. Use as a context manager.

    Args:
        warn: called with one sentence about each that fails.
    """

    def __init__(self, recipe: Recipe, folder: Path, warn: Callable[[str], None]) -> None:
        self._recipe, self._folder, self._warn = recipe, folder, warn
        self._path = folder / "logged.json"
        self._open: dict[str, Backend] = {}
        self._logged: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Open them all.

        Raises:
            UserError: for one that cannot be opened, before anything is loaded or trained.
        """
        names = self._recipe.log_to
        if names:
            self._logged = self._noted()
            name = f"{self._folder.resolve().name}-{self._logged['id']}"
        for which in names:
            new = which not in self._logged["steps"]
            try:
                with _quietly():
                    self._open[which] = BACKENDS[which](name, self._recipe, self._folder, new)
            except Exception as error:
                self.__exit__(type(error))
                remedy = _REMEDIES.get(which, "mend it, or leave it out")
                raise UserError(f"log_to: {which} cannot be used ({_reason(error)}); {remedy}") from error
            self._logged["steps"].setdefault(which, {})
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for which in list(self._open):
            with self._guarded(which), _quietly():
                self._open[which].close(failed=error is not None)
        self._open = {}

    def beside(self, view: View, stage: str) -> View:
        """The view, and every step it is given goes into the curves of the stage too."""
        return _Beside(view, lambda line: self.log(stage, line["step"], line)) if self._open else view

    def log(self, group: str, step: int, figures: Mapping[str, Any]) -> None:
        """Send the numbers among the figures of a step, where they have not been sent."""
        values = numbers(figures)
        for which in list(self._open):
            steps = self._logged["steps"][which]
            if step <= steps.get(group, -1):
                continue
            with self._guarded(which):
                self._open[which].log(group, step, values)
                steps[group] = step
                self._note()

    def evaluation(self, summary: Mapping[str, Any]) -> None:
        """Send an evaluation, as a point after the steps done so far."""
        if self._open:
            done = [path.read_bytes().count(b"\n") for path in self._folder.glob("stages/*/metrics.jsonl")]
            self.log("evaluation", sum(done), summary)

    @contextlib.contextmanager
    def _guarded(self, which: str) -> Iterator[None]:
        """Training goes on without what fails inside."""
        try:
            yield
        except Exception as error:
            self._open.pop(which, None)
            self._warn(
                f"log_to: {which} failed and gets no more curves ({_reason(error)}); training goes on, and "
                "metrics.jsonl has everything"
            )

    def _noted(self) -> dict[str, Any]:
        """logged.json, or a new one where there is none that can be read."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(found["id"], str) and all(isinstance(v, dict) for v in found["steps"].values()):
                return {"id": found["id"], "steps": found["steps"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return {"id": secrets.token_hex(3), "steps": {}}

    def _note(self) -> None:
        """Written every step, so not flushed to the disk each time."""
        temporary = self._path.with_name(".logged.json.partial")
        temporary.write_text(json.dumps(self._logged) + "\n", encoding="utf-8")
        temporary.replace(self._path)


class _Beside:
    """A view whose steps go somewhere else too."""

    def __init__(self, view: View, log: Callable[[Mapping[str, Any]], None]) -> None:
        self._view, self._log = view, log

    def __enter__(self) -> Self:
        self._view.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._view.__exit__(*exception)

    def update(self, metrics: Mapping[str, Any]) -> None:
        self._view.update(metrics)
        self._log(metrics)

    def recall(self, metrics: Mapping[str, Any]) -> None:
        self._view.recall(metrics)
        self._log(metrics)


def numbers(figures: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """The finite numbers among figures, those of tables and lists inside under names with a slash."""
    found: dict[str, float] = {}
    for key, value in figures.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            found |= numbers(value, f"{name}/")
        elif isinstance(value, list):
            found |= numbers({str(place): each for place, each in enumerate(value)}, f"{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[name] = float(value)
    return {name: value for name, value in found.items() if above or name not in ("step", "cursor")}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what these libraries print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _reason(error: Exception) -> str:
    """What an error says, on one line."""
    return (one_line(str(error)) or type(error).__name__)[:200]
