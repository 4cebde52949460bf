"""Runs a recipe in a run directory: base, audit, evaluation, stages, evaluation, bill, report.

Everything that is finished leaves a file, and what has its file is not done again: running the same recipe in
the same directory goes on from where it was stopped, at any moment and by any means.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from farthing import __version__
from farthing.cost import hardware, ledger
from farthing.cost.bill import bill_table, human_seconds
from farthing.cost.meter import Meter, process_started
from farthing.data.templates import question_ids
from farthing.engine import Model, Sampling
from farthing.errors import UserError
from farthing.evaluate import suite
from farthing.live import LiveView
from farthing.recipe import Grpo, Recipe, dump, load
from farthing.report import write_report
from farthing.tasks import Item
from farthing.tasks.audit import audit
from farthing.tasks.mixture import Mixture, question_key
from farthing.tasks.pool import VerifierPool
from farthing.train.grpo import train_grpo
from farthing.weights.folder import is_disk_full
from farthing.weights.sources import Source, model_folder, resolve


@dataclass(frozen=True)
class Run:
    """A finished run: its directory and what results.json holds."""

    run_dir: Path
    results: dict[str, Any]

    @property
    def model_folder(self) -> Path:
        """The last stage's model folder."""
        return (self.run_dir / "model").resolve()

    @property
    def ledger(self) -> list[ledger.Line]:
        """Every line of the ledger that is whole."""
        return ledger.read(self.run_dir / "ledger.jsonl")[0]

    @property
    def lineage(self) -> dict[str, Any]:
        """What the model was built from."""
        lineage: dict[str, Any] = json.loads((self.run_dir / "lineage.json").read_text())
        return lineage


def run(recipe: Recipe | str | Path, run_dir: Path | str | None = None, quiet: bool = False) -> Run:
    """Run a recipe to its end, or continue it.

    Raises:
        UserError: when the directory belongs to another recipe or is in use, the base cannot be loaded, the
            reward audit fails, training diverges, or the disk is full. What was done stays; the same call
            continues.
    """
    if not isinstance(recipe, Recipe):
        recipe = load(recipe)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / recipe.name
    console = Console(stderr=True)
    with _locked(folder), _room_on_disk(folder):
        _claim(folder, recipe)
        results = folder / "results.json"
        if not results.exists():
            _Work(recipe, folder, console, quiet).do()
        elif not (folder / "report.html").exists():  # killed between the two
            write_report(folder)
        finished = Run(folder, json.loads(results.read_text()))
    if not quiet:
        _show(finished, console)
    return finished


class _Work:
    """One attempt at a run."""

    def __init__(self, recipe: Recipe, folder: Path, console: Console, quiet: bool) -> None:
        self.recipe, self.folder, self.console, self.quiet = recipe, folder, console, quiet
        self.place = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = hardware.detect()
        self.meter = Meter(
            folder / "ledger.jsonl",
            stage="00-base",
            device=self.device,
            rate=hardware.rate(self.device, recipe.rates),
            started=process_started(),
        )

    def do(self) -> None:
        """Everything that is not done yet."""
        recipe = self.recipe
        with self.meter:
            self._record_run()
            with self.meter.span("load"):
                self._say(f"base model {recipe.base}")
                source = resolve(recipe.base)
                base = model_folder(source)
                _link(self.folder / "base", base)
                self._record_lineage(source)
                items = self._held_out()
            with VerifierPool(workers=max(1, (os.cpu_count() or 2) - 1)) as pool:
                self._audit(pool)
                current = base
                model: Model | None = None
                for number, stage in enumerate(recipe.stages, 1):
                    name = f"{number:02d}-{stage.kind}"
                    self.meter.stage = (
                        name if (self.folder / "stages" / name).exists() or number > 1 else "00-base"
                    )
                    stage_folder = self.folder / "stages" / name
                    if not (stage_folder / "done.json").exists():
                        with self.meter.span("load"):
                            model = Model(current, device=self.place)
                        if number == 1:
                            self._evaluate("before", model, items, pool)
                        self.meter.stage = name
                        self._stage(stage, model, stage_folder, items, pool)
                        if stage.lora:
                            model = None  # what is judged is what was saved, with the updates merged in
                    current = stage_folder / "model"
                self.meter.stage = "99-final"
                _link(self.folder / "model", current)
                self._evaluate("after", model, items, pool)
        self._conclude()

    def _stage(self, stage: Grpo, model: Model, folder: Path, items: list[Item], pool: VerifierPool) -> None:
        self._say(f"{folder.name}: {stage.steps} steps of {stage.prompts} questions x {stage.group} answers")
        with LiveView(stage.steps, self.console, self.quiet) as view:
            train_grpo(
                stage,
                model,
                folder,
                seed=self.recipe.seed,
                held_out={question_key(item.question) for item in items},
                pool=pool,
                meter=self.meter,
                on_metrics=view.update,
            )
        with self.meter.span("checkpoint"):
            model.save(folder / "model")
            done = {
                "name": folder.name,
                "kind": stage.kind,
                "steps": stage.steps,
            }
            _write_json(folder / "done.json", done)

    def _held_out(self) -> list[Item]:
        if self.recipe.evaluate is None:
            return []
        return Mixture(self.recipe.evaluation_tasks(), self.recipe.seed).held_out(
            self.recipe.evaluate.held_out
        )

    def _evaluate(self, name: str, model: Model | None, items: list[Item], pool: VerifierPool) -> None:
        path = self.folder / "evaluations" / f"{name}.jsonl"
        if not items or path.exists():
            return
        self._say(f"evaluating {name} training: {len(items)} held-out questions")
        settings, stage = self.recipe.evaluate, self.recipe.stages[-1]
        assert settings is not None
        if model is None:
            with self.meter.span("load"):
                model = Model(self.folder / "model", device=self.place)
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens or stage.max_new_tokens,
            temperature=settings.temperature,
            seed=self.recipe.seed,
        )
        with self.meter.span("evaluate") as span:
            prompts = [question_ids(model.tokenizer, i.question, stage.prompt, stage.system) for i in items]
            engine = model.engine(max_batch=48, cache_tokens=48 * (sampling.max_new_tokens + 1024))
            answers = suite.ask(engine, model.tokenizer, items, prompts, sampling)
            engine.book(span, model.hf_config)
            records = suite.judge(answers, pool, stage.answer)
            path.parent.mkdir(exist_ok=True)
            _write(path, "".join(json.dumps(record) + "\n" for record in records))
        self._say(_score_line(suite.summarise(name, records)))

    def _audit(self, pool: VerifierPool) -> None:
        path = self.folder / "audit.json"
        if not path.exists():
            with self.meter.span("verify"):
                audits = [
                    audit(Mixture(stage.tasks, self.recipe.seed), stage.answer, pool)
                    for stage in self.recipe.stages
                ]
                _write_json(
                    path,
                    {
                        "passed": all(found["passed"] for found in audits),
                        "seconds": sum(found["seconds"] for found in audits),
                        "cases": [case for found in audits for case in found["cases"]],
                    },
                )
        found = json.loads(path.read_text())
        failed = [case["case"] for case in found["cases"] if not case["passed"]]
        if failed:
            raise UserError(f"the reward audit failed on {', '.join(sorted(set(failed)))}; see {path}")
        self._say(f"reward audit: {len(found['cases'])} cases, none earned, ran or hung anything it must not")

    def _conclude(self) -> None:
        lines, _ = ledger.read(self.folder / "ledger.jsonl")
        # earlier attempts by the ledger's own clock, this one by the process's, which no line can hide from
        ended = [line for line in lines if line["attempt"] != self.meter.attempt]
        wall = (ledger.summarise(ended).wall_seconds if ended else 0.0) + time.time() - process_started()
        summary = ledger.summarise(lines, wall)
        stages = [json.loads(path.read_text()) for path in sorted(self.folder.glob("stages/*/done.json"))]
        for stage in stages:  # all attempts at it together
            stage["seconds"] = sum(line["seconds"] for line in lines if line["stage"] == stage["name"])
        rounds = {
            name: _read_lines(self.folder / "evaluations" / f"{name}.jsonl") for name in ("before", "after")
        }
        rounds = {name: records for name, records in rounds.items() if records}
        results = {
            "name": self.recipe.name,
            "seed": self.recipe.seed,
            "stages": stages,
            "evaluations": [suite.summarise(name, records) for name, records in rounds.items()],
            "gain": suite.gain(rounds["before"], rounds["after"]) if len(rounds) == 2 else None,
            "wall_seconds": summary.wall_seconds,
            "ledger_covered": summary.covered,
            "usd": summary.total.usd,
            "joules": summary.total.joules,
        }
        _write_json(self.folder / "results.json", results)
        write_report(self.folder)

    def _record_run(self) -> None:
        path = self.folder / "run.json"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        facts = {
            "farthing": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "reasoning-gym")},
            "platform": platform.platform(),
            "cpu": hardware.cpu_model(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "device": self.device.name,
            "seed": self.recipe.seed,
            "commit": _commit(),
            "started": earlier.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "attempts": earlier.get("attempts", 0) + 1,
        }
        for key in ("torch", "threads", "cpu"):
            if earlier and earlier.get(key) != facts[key]:
                self._say(
                    f"{key} was {earlier.get(key)}, now {facts[key]}: the weights may differ in the last bits"
                )
        _write_json(path, facts)

    def _record_lineage(self, source: Source) -> None:
        path = self.folder / "lineage.json"
        if path.exists():
            recorded = json.loads(path.read_text())["base"]["sha256"]
            if recorded != source.identity["sha256"]:
                raise UserError(
                    f"the weights of {self.recipe.base} have changed since {self.folder} was started; "
                    "put them back, or give another --run-dir"
                )
            return
        tasks = {name: setting for stage in self.recipe.stages for name, setting in stage.tasks.items()}
        lineage = {
            "base": source.identity,
            "data": [
                {
                    "source": f"reasoning-gym:{name}",
                    "version": importlib.metadata.version("reasoning-gym"),
                    "license": "Apache-2.0",
                    "config": setting.config,
                }
                for name, setting in tasks.items()
            ],
            "teachers": [],
        }
        _write_json(path, lineage)

    def _say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _room_on_disk(folder: Path) -> Iterator[None]:
    """A full disk is the user's to mend, wherever in the run it is met."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"no disk space left for {folder}; free some and run the same command again"
            ) from error
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The run directory is ours alone; the lock goes with the process, however it ends."""
    foreign = folder.is_dir() and not (folder / "recipe.yaml").exists()
    if foreign and any(entry.name not in ("lock", ".recipe.yaml.partial") for entry in folder.iterdir()):
        raise UserError(f"{folder} holds other files and is no run directory; give another --run-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise UserError(f"cannot write to the run directory {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder} is in use by another run; wait for it or give another --run-dir"
            ) from error
        yield


def _claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into a new run directory, or make sure that an old one is of the same recipe."""
    path = folder / "recipe.yaml"
    if not (
        folder / "lineage.json"
    ).exists():  # nothing rests on the recipe yet: a mistyped base can be corrected
        _write(path, dump(recipe))
        return
    ours, theirs = recipe.model_dump(mode="json"), load(path).model_dump(mode="json")
    if ours != theirs:
        raise UserError(
            f"{folder} was started with another {_first_difference(theirs, ours, '')}; "
            "give the same settings to continue it, or another --run-dir"
        )


def _first_difference(old: Any, new: Any, path: str) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (a, b) in enumerate(zip(old, new, strict=True), 1):
            if a != b:
                return _first_difference(a, b, f"{path}.{number}")
    return f"{path} ({old!r}, now {new!r})"


def _show(finished: Run, console: Console) -> None:
    """The bill, the result and where to go from here."""
    results = finished.results
    title = f"{results['name']} · {human_seconds(results['wall_seconds'])}"
    console.print(bill_table(ledger.summarise(finished.ledger), title))
    for evaluation in results["evaluations"]:
        console.print(_score_line(evaluation), highlight=False)
    if results["gain"]:
        console.print(_gain_line(results["gain"]), highlight=False)
    console.print(
        f"chat: farthing chat {finished.run_dir}     report: {finished.run_dir / 'report.html'}",
        soft_wrap=True,
    )


def _score_line(evaluation: dict[str, Any]) -> str:
    low, high = evaluation["ci95"]
    return (
        f"{evaluation['name']:>6}: {evaluation['accuracy']:.1%} right "
        f"(95% interval {low:.1%} to {high:.1%}), {evaluation['right']} right, {evaluation['wrong']} wrong, "
        f"{evaluation['unparsed']} no answer found, {evaluation['cut_off']} cut off, of {evaluation['n']}"
    )


def _gain_line(gain: dict[str, Any]) -> str:
    def points(part: dict[str, Any]) -> str:
        low, high = part["ci95"]
        return f"{part['difference'] * 100:+.1f} points (95% interval {low * 100:+.1f} to {high * 100:+.1f})"

    line = f"  gain: {points(gain)}, paired"
    readable = gain["on_parseable"]
    if readable["n"]:
        line += f"; {points(readable)} on the {readable['n']} questions the base already answered readably"
    return f"{line}; format alone {gain['format']['share_of_all'] * 100:+.1f}"


def _link(path: Path, target: Path) -> None:
    """A symbolic link, relative within the run directory so that it can be moved."""
    inside = target.absolute().is_relative_to(path.parent.absolute())
    to = target.absolute().relative_to(path.parent.absolute()) if inside else target.absolute()
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(to)
    temporary.replace(path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1) + "\n")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _commit() -> str | None:
    """The commit of the source this runs from, when it is a git checkout."""
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
