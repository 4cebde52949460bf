"""What a run provides to a stage: a folder, a device, a meter, and a view of its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from farthing.base.device import Place, Ranks
from farthing.base.files import read_json, read_lines, write_json
from farthing.base.seal import hashes, seal
from farthing.base.waiting import Waiting
from farthing.cost.meter import Meter
from farthing.data.chat_templates import template_text
from farthing.data.left_out import LEFT_OUT, counts
from farthing.data.overlap import HeldOut
from farthing.engine import Model, at_place
from farthing.recipe import Asks
from farthing.stages.subset import RIGHT, Subset
from farthing.tasks.pool import VerifierPool
from farthing.train.loop import Progress, best_step
from farthing.weights.folder import same_weights

Say = Callable[[str], None]

UNCHANGED = (
    "training changed no weight: the model is the one it started from; either no step had anything to learn from, "
    "or lr is too small for bfloat16 to show"
)


class View(Protocol):
    """Shows the progress of training."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl."""

    def recall(self, metrics: Mapping[str, Any]) -> None:
        """Take a line of an earlier attempt into the picture; it was shown then."""


class Models:
    """The one model in memory, so that a model just loaded or trained need not be loaded again for evaluation."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._held: tuple[Path, Model] | None = None
        self._trained = False

    def to_train(self, folder: Path) -> Model:
        """The model of a folder, fresh from there; the caller may change it."""
        model = None if self._trained else self._in_memory(folder)
        self._held = None  # its memory is needed
        return model or at_place(folder, self.place)

    def to_ask(self, folder: Path) -> Model:
        """The model of a folder; the caller must not change it."""
        model = self._in_memory(folder)
        if model is None:
            self._held = None
            model = at_place(folder, self.place)
            self._held, self._trained = (folder.resolve(), model), False
        return model

    def keep(self, folder: Path, model: Model) -> None:
        """Remember a trained model that was saved in this folder."""
        self._held, self._trained = (folder.resolve(), model), True

    def _in_memory(self, folder: Path) -> Model | None:
        return self._held[1] if self._held is not None and self._held[0] == folder.resolve() else None


@dataclass(frozen=True)
class At:
    """The environment of a stage."""

    folder: Path
    """The stage's folder: metrics.jsonl, state/, data/, and finally model/ and done.json."""
    seed: int
    models: Models
    ranks: Ranks
    meter: Meter
    pool: VerifierPool
    held_out: HeldOut
    """The questions that no stage may train on."""
    asks: Asks
    """The recipe's way of asking questions."""
    say: Say
    """Say a sentence about progress; nobody hears it in a quiet run."""
    warn: Say
    """Say a sentence that matters to the result, in a quiet run too; the stage's name is put before it."""
    view: Callable[[int], View]
    """Make a view of so many steps."""
    origin: str = ""
    """Of the run; what the stage leaves for later attempts carries it."""
    subset: Subset | None = None
    """Questions to measure training by."""

    def waiting(self, what: str) -> Waiting:
        """A context that says what is being done if that takes longer than two seconds."""
        return Waiting(f"{self.folder.name}: {what}", self.say)

    @contextmanager
    def progress(self, steps: int, model: Model | None = None) -> Iterator[Progress]:
        """Show the progress of training, and measure the model by the held-out subset, if there is one."""
        subset = self.subset if model is not None else None

        def measure(step: int) -> dict[str, Any]:
            if subset is None or model is None:
                return {}
            return subset.measure(model, step, steps, self.pool, self.meter)

        with self.view(steps) as view:
            yield Progress(
                view.update,
                view.recall,
                say=lambda text: self.say(f"{self.folder.name}: {text}"),
                warn=self.warn,
                measure=measure,
                best=RIGHT if subset is not None and subset.keep_best else "",
                origin=self.origin,
            )

    def load(self, folder: Path, chat_template: str | None = None) -> Model:
        """The model to train, booked as loading.

        Args:
            chat_template: the template that it is given, by name or path; None keeps its own.
        """
        with self.meter.span("load"), self.waiting("loading the model"):
            model = self.models.to_train(folder)
            if chat_template is not None:
                model.use_template(template_text(chat_template, model.tokenizer))
            return model

    def finish(
        self, model: Model, steps: int, *, start: Path | None = None, merged: bool = False, **facts: Any
    ) -> Path:
        """Write the model and done.json, which says that the stage is complete.

        Args:
            start: the folder that the stage started from; that nothing has changed since is said and recorded.
            merged: adapters are merged into the written model, so the one in memory differs.
            facts: further entries of done.json.
        """
        folder = self.folder / "model"
        with self.meter.span("checkpoint"), self.waiting("writing the model"):
            model.save(folder)
            kind = self.folder.name.partition("-")[2]
            if self.subset is not None and self.subset.keep_best:
                best = best_step(read_lines(self.folder / "metrics.jsonl"), RIGHT)
                facts |= {} if best is None else {"best_step": best}
            if start is not None and same_weights(start, folder):
                facts["unchanged"] = True
                self.warn(UNCHANGED)
            done = {"name": self.folder.name, "kind": kind, "steps": steps, **facts}
            done |= {"origin": self.origin, "sha256": hashes(folder)}
            left_out = counts(self.folder / LEFT_OUT)
            if left_out.exists():
                done["left_out"] = read_json(left_out, "delete it and run the same command again")
            write_json(self.folder / "done.json", seal(done))
        if not merged:
            self.models.keep(folder, model)
        return folder
