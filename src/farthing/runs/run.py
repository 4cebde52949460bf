"""Run a recipe in a run directory: base, audit, evaluation, stages, evaluation, bill, report.

Everything finished leaves a file and is not done again: running the same recipe in the same directory continues where
it stopped, at any moment and for any reason.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from farthing import __version__, plans
from farthing.base import processor, terminal
from farthing.base.arguments import takes
from farthing.base.device import Alone, choose, reference_only
from farthing.base.errors import UserError
from farthing.base.figures import bits, duration
from farthing.base.files import link, read_json, read_lines, write, write_json
from farthing.base.limits import named
from farthing.base.waiting import Waiting
from farthing.cost import devices, ledger
from farthing.cost.bill import bill_table
from farthing.cost.meter import Meter, book_sampling, process_started
from farthing.data.overlap import HeldOut
from farthing.data.text import pinned
from farthing.data.words import question_key
from farthing.engine.asked import Asked
from farthing.evaluate.ask import evaluate
from farthing.evaluate.score import gain, summarise
from farthing.evaluate.trained import before
from farthing.evaluate.words import gain_line, score_line
from farthing.plans.recipe import RecipePlan, beside_text, plan_beside_actual
from farthing.recipe import Recipe, StageSpec, load, validate
from farthing.recipe.log_to import check_installed
from farthing.report import write_report
from farthing.report.live import LiveView
from farthing.runs import attacks, record
from farthing.runs.folder import (
    claim,
    data_tasks,
    locked,
    origin,
    place_of,
    put_back,
    reward_files,
    room_on_disk,
    source_commit,
)
from farthing.runs.inputs import Inputs
from farthing.runs.loggers import Loggers
from farthing.runs.memory import within_memory
from farthing.runs.result import Run
from farthing.runs.revisions import Revisions
from farthing.stages import kind
from farthing.stages.at import UNCHANGED, At, Models, View
from farthing.stages.subset import Subset
from farthing.tasks import Item, gym
from farthing.tasks.audit import audit
from farthing.tasks.check import check
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool
from farthing.tasks.rewards.beside import Beside
from farthing.weights.folder import read_config
from farthing.weights.sources import Source, model_folder, resolve

_ATTEMPTS = itertools.count()  # in this process


@takes(recipe=(str, Path, Recipe, Mapping), run_dir=(str, Path, None), quiet=(bool,))
def run(
    recipe: Recipe | Mapping[str, Any] | str | Path, run_dir: Path | str | None = None, quiet: bool = False
) -> Run:
    """Run a recipe to its end, or continue it.

    Args:
        recipe: a built-in recipe's name, a YAML file, or what such a file holds.
        run_dir: where to run; runs/NAME by default.
        quiet: says nothing.

    Raises:
        UserError: if the recipe has a mistake, the directory belongs to another recipe or is in use, the base cannot
        be loaded, the reward audit fails, training diverges, or the disk is full. Finished work stays; the same call
        continues.
    """
    recipe = _recipe(recipe)
    if run_dir is not None and not str(run_dir):
        raise UserError("run_dir is empty; give the path of a folder")
    folder = named(run_dir) if run_dir is not None else Path("runs") / recipe.name
    choose(recipe.device, recipe.dtype)  # a missing device leaves no folder behind
    check_installed(recipe.log_to)
    check(recipe)  # nor does a task that does not exist
    console = terminal.console()
    with locked(folder), room_on_disk(folder):
        claim(folder, recipe)
        results = folder / "results.json"
        done_before = results.exists()
        if not done_before:
            with pinned(Revisions(folder).of):
                _Work(recipe, folder, console, quiet).do()
        elif not (folder / "report.html").exists():  # killed between the two
            write_report(folder)
        finished = Run(folder, read_json(results, "delete it and run the same command again"))
    if not quiet:
        if done_before:
            console.print(
                f"{folder} was finished earlier: nothing had to be done. This is what it came to:",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
        _show(finished, console)
    return finished


def _recipe(given: object) -> Recipe:
    """The recipe in any of the forms that `run` takes.

    Raises:
        UserError: for a mistake in it, and for anything else.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        try:
            table = json.loads(json.dumps(dict(given), default=str))  # a copy, of plain values
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"the recipe is no table of texts, numbers, lists and tables: {error}") from None
        return validate(table)
    if isinstance(given, str | Path):
        return load(given)
    raise UserError(
        f"a recipe is a name, the path of a YAML file, or a table of keys (name, base, stages, …), not {given!r:.60}"
    )


class _Work:
    """One attempt at a run."""

    def __init__(self, recipe: Recipe, folder: Path, console: Console, quiet: bool) -> None:
        self.recipe, self.folder, self.console, self.quiet = recipe, folder, console, quiet
        path = folder / "run.json"
        self.earlier = record.earlier(path, folder) if path.exists() else {}
        self.place = place_of(recipe, self.earlier, folder)
        self.origin = origin(folder)
        self.began = (
            time.time() if next(_ATTEMPTS) else process_started()
        )  # the first run loaded the libraries
        self.device = devices.detect(self.place.device)
        self.meter = Meter(
            folder / "ledger.jsonl",
            stage="00-base",
            device=self.device,
            rate=devices.rate(self.device, recipe.rates),
            started=self.began,
        )
        self.models = Models(self.place)
        self.loggers = Loggers(recipe, folder, lambda text: self._say(text, aloud=True))
        self.held_out = HeldOut()  # the questions that no stage may train on
        self.plan: RecipePlan | None = None  # of this machine, where it has been calibrated
        self._subset: Subset | None = None

    def do(self) -> None:
        """Do everything that is not done yet."""
        recipe = self.recipe
        with self.meter, self.loggers:
            self._record_run()
            with self.meter.span("load"):
                current = self._base()
                with self._waiting("planning, and choosing held-out questions"):
                    self.plan = plans.for_run(recipe, read_config(current) if current else None, self.place)
                    items = self._held_out()
            asking = Beside(Asked(self.place, self._say, self.meter), self.meter)
            with VerifierPool(asking=asking) as pool:
                self._audit(pool)
                asked = plans.asked_configs(recipe)
                for number, stage in enumerate(recipe.stages, 1):
                    name = f"{number:02d}-{stage.kind}"
                    folder = self.folder / "stages" / name
                    if self._finished(folder):
                        self._say(f"{name}: finished in an earlier attempt")
                    else:
                        self.meter.stage = name if number > 1 else "00-base"
                        if number == self._first_evaluated():
                            assert current is not None
                            self._evaluate("before", current, items, pool)
                        self.meter.stage = name
                        start = read_config(current) if current else None
                        with within_memory(self.place, number, stage, start, asked):
                            kind(stage.kind).run(stage, current, self._at(folder, stage, items, pool))
                    current = folder / "model"
                assert current is not None
                self.meter.stage = "99-final"
                link(self.folder / "model", current)
                self._evaluate("after", current, items, pool)
        self._conclude()

    def _finished(self, folder: Path) -> bool:
        """Whether a stage is done and its model as it was written. A damaged one is made again from its checkpoint."""
        path = folder / "done.json"
        if not path.exists():
            return False
        damaged = record.changed_since_done(folder, self.origin)
        if damaged is None:
            return True
        self._say(f"{damaged} has changed since it was written; the stage makes its model again")
        path.unlink()
        if damaged != path:  # a folder that lacks its config.json would not be written over
            shutil.rmtree(folder / "model", ignore_errors=True)
        return False

    def _at(self, folder: Path, stage: StageSpec, items: list[Item], pool: VerifierPool) -> At:
        return At(
            folder=folder,
            seed=self.recipe.seed,
            origin=self.origin,
            models=self.models,
            ranks=Alone(self.place.device),
            meter=self.meter,
            pool=pool,
            held_out=self.held_out,
            asks=self.recipe.asks(),
            say=self._say,
            warn=lambda text: self._say(f"{folder.name}: {text}", aloud=True),
            view=lambda steps: self._view(folder, stage, steps),
            subset=self._subset,
        )

    def _view(self, folder: Path, stage: StageSpec, steps: int) -> View:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "steps.json", {"steps": steps})  # for `farthing watch`
        return self.loggers.beside(LiveView(steps, stage.curves, self.console, self.quiet), folder.name)

    def _base(self) -> Path | None:
        """The base model's folder; None if the first stage starts from nothing."""
        if self.recipe.base is None:
            self._record_lineage(None)
            return None
        self._say(f"base model {self.recipe.base}")
        with self._waiting(f"getting {self.recipe.base}, which is downloaded and converted the first time"):
            source = resolve(self.recipe.base)
            folder = model_folder(source)
        link(self.folder / "base", folder)
        self._record_lineage(source)
        return folder

    def _first_evaluated(self) -> int | None:
        """Number of the stage whose starting model is evaluated "before": the first, which starts from the base;
        without a base, the last stage with rewards, if any."""
        if self.recipe.base is not None:
            return 1
        rewarded = [number for number, stage in enumerate(self.recipe.stages, 1) if stage.asks]
        return rewarded[-1] if rewarded else None

    def _held_out(self) -> list[Item]:
        asked = data_tasks(self.recipe).values()
        for line in dict.fromkeys(line for task in asked for line in task.said):
            self._say(line, aloud=True)
        if self.recipe.evaluate is None:
            return []
        mixture = Mixture(self.recipe.evaluation_tasks(), self.recipe.seed)
        earlier = before(self.recipe)
        items = mixture.held_out(self.recipe.evaluate.held_out, earlier)
        settings, between = self.recipe.evaluate, list[Item]()
        if settings.every is not None:
            asked_last = {question_key(item.question) for item in items}
            between = mixture.held_out(settings.subset, earlier | asked_last, "evaluate: subset: ")
            self._subset = Subset(
                between,
                self.recipe.asks(),
                settings.every,
                settings.temperature,
                settings.samples,
                settings.keep_best,
                self.recipe.seed,
            )
        apart = mixture.never_trained(tasks for stage in self.recipe.stages for tasks in stage.mixtures)
        self.held_out = HeldOut(
            dict.fromkeys([*(item.question for item in [*items, *between]), *sorted(apart)])
        )
        for stage in self.recipe.stages:
            if stage.asks:  # refuses a stage that would have nothing to ask, before anything takes long
                Mixture(stage.asks.tasks, self.recipe.seed).stream(self.held_out)
        return items

    def _evaluate(self, name: str, folder: Path, items: list[Item], pool: VerifierPool) -> None:
        path = self.folder / "evaluations" / f"{name}.jsonl"
        settings = self.recipe.evaluate
        if settings is None or path.exists():
            return
        self._say(f"evaluating {name} training: {len(items)} held-out questions")
        with self.meter.span("load"), self._waiting("loading the model"):
            model = self.models.to_ask(folder)
        waiting = self._waiting(f"evaluating {name} training")
        with within_memory(self.place), self.meter.span("evaluate") as span, waiting:
            records, work = evaluate(
                model,
                items,
                self.recipe.asks(),
                pool,
                temperature=settings.temperature,
                seed=self.recipe.seed,
                samples=settings.samples,
                told=waiting.at,
            )
            book_sampling(span, work, model.hf_config)
            path.parent.mkdir(exist_ok=True)
            write(path, "".join(json.dumps(answer) + "\n" for answer in records))
        summary = summarise(name, records)
        self._say(score_line(summary))
        self.loggers.evaluation(summary)
        if summary["timeout"]:
            self._say(
                f"{summary['timeout']} answers could not be judged in time, in two tries, and count as not right; is "
                "the machine busy?"
            )

    def _audit(self, pool: VerifierPool) -> None:
        path = self.folder / "audit.json"
        asked = [stage.asks for stage in self.recipe.stages if stage.asks]
        if not asked:
            return  # no reward is paid
        if not path.exists():
            with self.meter.span("verify"), self._waiting("attacking the rewards"):
                audits = [audit(Mixture(asks.tasks, self.recipe.seed), asks.answer, pool) for asks in asked]
                write_json(
                    path,
                    {
                        "passed": all(found["passed"] for found in audits),
                        "seconds": sum(found["seconds"] for found in audits),
                        "cases": [case for found in audits for case in found["cases"]],
                    },
                )
        found = record.audited(path)
        self._say(attacks.verdict(found, path))
        for line in attacks.warnings(found, path, self.recipe):
            self._say(line, aloud=True)

    def _conclude(self) -> None:
        lines, _ = ledger.read(self.folder / "ledger.jsonl")
        # earlier attempts by the ledger's clock; this one by the wall clock, which no line can hide from
        ended = [line for line in lines if line["attempt"] != self.meter.attempt]
        wall = (ledger.summarise(ended).wall_seconds if ended else 0.0) + time.time() - self.began
        summary = ledger.summarise(lines, wall)
        stages = [
            read_json(path, put_back(self.folder)) | {"name": path.parent.name}
            for path in sorted(self.folder.glob("stages/*/done.json"))
        ]
        for stage in stages:  # all attempts at it together
            for key in ("origin", "sha256", "seal"):  # for the next attempt
                stage.pop(key, None)
            stage["seconds"] = sum(line["seconds"] for line in lines if line["stage"] == stage["name"])
            measured = read_lines(self.folder / "stages" / stage["name"] / "metrics.jsonl")
            for key in ("val_bits_per_byte", "val_loss"):
                if validated := [line[key] for line in measured if line.get(key) is not None]:
                    stage[key] = validated[-1]
        rounds = {
            name: record.records(self.folder / "evaluations" / f"{name}.jsonl")
            for name in ("before", "after")
        }
        rounds = {name: records for name, records in rounds.items() if records}
        results = {
            "name": self.recipe.name,
            "seed": self.recipe.seed,
            "stages": stages,
            "evaluations": [summarise(name, records) for name, records in rounds.items()],
            "gain": gain(*record.paired(self.folder, rounds)) if len(rounds) == 2 else None,
            "wall_seconds": summary.wall_seconds,
            "ledger_covered": summary.covered,
            "usd": summary.total.usd,
            "joules": summary.total.joules,
        }
        if self.plan is not None:
            seconds = {row.activity: row.seconds for row in summary.by_activity()}
            results["plan"] = plan_beside_actual(self.plan, seconds, summary.total.usd)
        write_json(self.folder / "results.json", results)
        write_report(self.folder)

    def _record_run(self) -> None:
        path = self.folder / "run.json"
        earlier = self.earlier
        facts = {
            "farthing": __version__,
            "python": platform.python_version(),
            **{
                name: version
                for name in ("torch", "transformers", "reasoning-gym")
                if (version := gym.installed(name)) is not None
            },
            "platform": platform.platform(),
            "cpu": devices.cpu_model(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "device": self.device.name,
            "computed_on": self.place.device,
            "dtype": self.place.dtype,
            "dtype_why": self.place.why,
            "isa": processor.isa(),
            "kernels": "reference" if reference_only() else "auto",
            "memory_gb_of_stages": [getattr(stage, "memory_gb", None) for stage in self.recipe.stages],
            "seed": self.recipe.seed,
            "rewards": reward_files(self.recipe),
            "commit": source_commit(),
            "started": earlier.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "attempts": earlier.get("attempts", 0) + 1,
        }
        for key in ("torch", "threads", "cpu", "computed_on", "isa", "kernels", "memory_gb_of_stages"):
            if key in earlier and earlier[key] != facts[key]:
                self._say(
                    f"{key} was {earlier.get(key)}, now {facts[key]}: the weights may differ in the last bits"
                )
        if facts["attempts"] > 1:
            self._say(f"continuing {self.folder}, started {facts['started']}: attempt {facts['attempts']}")
        write_json(path, facts)

    def _record_lineage(self, source: Source | None) -> None:
        """Record the model's inputs once; later attempts must find the same."""
        path = self.folder / "lineage.json"
        with self._waiting("getting and hashing weights and data"):
            found = Inputs.of(self.recipe, source)
        if path.exists():
            found.check(record.recorded(path, self.folder), self.folder)
        else:
            write_json(path, found.lineage())

    def _waiting(self, what: str) -> Waiting:
        return Waiting(what, self._say)

    def _say(self, text: str, aloud: bool = False) -> None:
        if aloud or not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show(finished: Run, console: Console) -> None:
    """Print the bill, the result and the next commands."""
    results = finished.results
    title = f"{results['name']} · {duration(results['wall_seconds'])}"
    console.print(bill_table(ledger.summarise(finished.ledger, results["wall_seconds"]), title))
    if results.get("plan"):
        console.print(beside_text(results["plan"]), highlight=False)
    for stage in results["stages"]:
        if stage.get("val_bits_per_byte") is not None:
            measured = f"{bits(stage['val_bits_per_byte'])} bits per byte of validation text"
            console.print(f"{stage['name']}: {measured} at its end", highlight=False, soft_wrap=True)
        if stage.get("val_loss") is not None:
            measured = f"{stage['val_loss']:.3f} nats a token of validation conversations"
            console.print(f"{stage['name']}: {measured} at its end", highlight=False, soft_wrap=True)
        if stage.get("unchanged"):
            console.print(f"{stage['name']}: {UNCHANGED}", highlight=False, soft_wrap=True)
    for evaluation in results["evaluations"]:
        console.print(score_line(evaluation), highlight=False, soft_wrap=True)
    if results["gain"]:
        console.print(gain_line(results["gain"]), highlight=False, soft_wrap=True)
    console.print(
        f"chat: farthing chat {finished.run_dir}     report: {finished.run_dir / 'report.html'}",
        soft_wrap=True,
    )
