"""Run a recipe in a run directory: base, audit, evaluation, stages, evaluation, bill, report.

Everything finished leaves a file and is not done again: running the same recipe in the same directory continues where
it stopped, at any moment and for any reason.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from farthing import __version__, plans
from farthing.base import processor
from farthing.base.arguments import takes
from farthing.base.device import Alone, choose, reference_only
from farthing.base.errors import UserError
from farthing.base.figures import duration
from farthing.base.files import link, read_json, write, write_json
from farthing.base.limits import named
from farthing.cost import devices, ledger
from farthing.cost.bill import bill_table
from farthing.cost.meter import Meter, book_sampling, process_started
from farthing.evaluate.ask import evaluate
from farthing.evaluate.score import gain, summarise
from farthing.plans.recipe import RecipePlan, beside_text, plan_beside_actual
from farthing.recipe import Recipe, StageSpec, load
from farthing.report import write_report
from farthing.runs import record
from farthing.runs.folder import (
    claim,
    data_files,
    locked,
    place_of,
    put_back,
    room_on_disk,
    source_commit,
)
from farthing.runs.live import LiveView
from farthing.runs.memory import within_memory
from farthing.stages import kind
from farthing.stages.at import At, Models
from farthing.tasks import Item, gym
from farthing.tasks.audit import audit
from farthing.tasks.mixture import Mixture, question_key
from farthing.tasks.pool import VerifierPool
from farthing.weights.folder import read_config
from farthing.weights.sources import Source, model_folder, resolve

_ATTEMPTS = itertools.count()  # in this process


@dataclass(frozen=True)
class Run:
    """A finished run: its directory and its results.json."""

    run_dir: Path
    results: dict[str, Any]

    @property
    def model_folder(self) -> Path:
        """The last stage's model folder."""
        return (self.run_dir / "model").resolve()

    @property
    def ledger(self) -> list[ledger.Line]:
        """Every complete line of the ledger."""
        return ledger.read(self.run_dir / "ledger.jsonl")[0]

    @property
    def lineage(self) -> dict[str, Any]:
        """The model's inputs: base, data, teachers."""
        return read_json(self.run_dir / "lineage.json", put_back(self.run_dir))


@takes(recipe=(str, Path, Recipe), run_dir=(str, Path, None), quiet=(bool,))
def run(recipe: Recipe | str | Path, run_dir: Path | str | None = None, quiet: bool = False) -> Run:
    """Run a recipe to its end, or continue it.

    Raises:
        UserError: if the directory belongs to another recipe or is in use, the base cannot be loaded, the reward
        audit fails, training diverges, or the disk is full. Finished work stays; the same call continues.
    """
    if not isinstance(recipe, Recipe):
        recipe = load(recipe)
    folder = named(run_dir) if run_dir is not None else Path("runs") / recipe.name
    choose(recipe.device, recipe.dtype)  # a missing device leaves no folder behind
    console = Console(stderr=True)
    with locked(folder), room_on_disk(folder):
        claim(folder, recipe)
        results = folder / "results.json"
        if not results.exists():
            _Work(recipe, folder, console, quiet).do()
        elif not (folder / "report.html").exists():  # killed between the two
            write_report(folder)
        finished = Run(folder, read_json(results, "delete it and run the same command again"))
    if not quiet:
        _show(finished, console)
    return finished


class _Work:
    """One attempt at a run."""

    def __init__(self, recipe: Recipe, folder: Path, console: Console, quiet: bool) -> None:
        self.recipe, self.folder, self.console, self.quiet = recipe, folder, console, quiet
        path = folder / "run.json"
        self.earlier = record.earlier(path, folder) if path.exists() else {}
        self.place = place_of(recipe, self.earlier, folder)
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
        self.plan: RecipePlan | None = None  # of this machine, where it has been calibrated

    def do(self) -> None:
        """Do everything that is not done yet."""
        recipe = self.recipe
        with self.meter:
            self._record_run()
            with self.meter.span("load"):
                current = self._base()
                self.plan = plans.for_run(recipe, read_config(current) if current else None, self.place)
                items = self._held_out()
            with VerifierPool() as pool:
                self._audit(pool)
                for number, stage in enumerate(recipe.stages, 1):
                    name = f"{number:02d}-{stage.kind}"
                    folder = self.folder / "stages" / name
                    if not (folder / "done.json").exists():
                        self.meter.stage = name if number > 1 else "00-base"
                        if number == self._first_evaluated():
                            assert current is not None
                            self._evaluate("before", current, items, pool)
                        self.meter.stage = name
                        with within_memory(
                            self.place, number, stage, read_config(current) if current else None
                        ):
                            kind(stage.kind).run(stage, current, self._at(folder, stage, items, pool))
                    current = folder / "model"
                assert current is not None
                self.meter.stage = "99-final"
                link(self.folder / "model", current)
                self._evaluate("after", current, items, pool)
        self._conclude()

    def _at(self, folder: Path, stage: StageSpec, items: list[Item], pool: VerifierPool) -> At:
        return At(
            folder=folder,
            seed=self.recipe.seed,
            models=self.models,
            ranks=Alone(self.place.device),
            meter=self.meter,
            pool=pool,
            held_out={question_key(item.question) for item in items},
            asks=self.recipe.asks(),
            say=self._say,
            view=lambda steps: LiveView(steps, stage.curves, self.console, self.quiet),
        )

    def _base(self) -> Path | None:
        """The base model's folder; None if the first stage starts from nothing."""
        if self.recipe.base is None:
            self._record_lineage(None)
            return None
        self._say(f"base model {self.recipe.base}")
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
        if self.recipe.evaluate is None:
            return []
        return Mixture(self.recipe.evaluation_tasks(), self.recipe.seed).held_out(
            self.recipe.evaluate.held_out
        )

    def _evaluate(self, name: str, folder: Path, items: list[Item], pool: VerifierPool) -> None:
        path = self.folder / "evaluations" / f"{name}.jsonl"
        settings = self.recipe.evaluate
        if settings is None or path.exists():
            return
        self._say(f"evaluating {name} training: {len(items)} held-out questions")
        with self.meter.span("load"):
            model = self.models.to_ask(folder)
        with within_memory(self.place), self.meter.span("evaluate") as span:
            records, work = evaluate(
                model,
                items,
                self.recipe.asks(),
                pool,
                temperature=settings.temperature,
                seed=self.recipe.seed,
            )
            book_sampling(span, work, model.hf_config)
            path.parent.mkdir(exist_ok=True)
            write(path, "".join(json.dumps(answer) + "\n" for answer in records))
        self._say(_score_line(summarise(name, records)))

    def _audit(self, pool: VerifierPool) -> None:
        path = self.folder / "audit.json"
        asked = [stage.asks for stage in self.recipe.stages if stage.asks]
        if not asked:
            return  # no reward is paid
        if not path.exists():
            with self.meter.span("verify"):
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
        failed = [case["case"] for case in found["cases"] if not case["passed"]]
        if failed:
            raise UserError(f"the reward audit failed on {', '.join(sorted(set(failed)))}; see {path}")
        self._say(
            f"reward audit: {len(found['cases'])} cases, none of which earned a reward, ran code or hung"
        )

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
            stage["seconds"] = sum(line["seconds"] for line in lines if line["stage"] == stage["name"])
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
            "commit": source_commit(),
            "started": earlier.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "attempts": earlier.get("attempts", 0) + 1,
        }
        for key in ("torch", "threads", "cpu", "computed_on", "isa", "kernels", "memory_gb_of_stages"):
            if key in earlier and earlier[key] != facts[key]:
                self._say(
                    f"{key} was {earlier.get(key)}, now {facts[key]}: the weights may differ in the last bits"
                )
        write_json(path, facts)

    def _record_lineage(self, source: Source | None) -> None:
        """Record the model's inputs once; later attempts must find the same.

        Raises:
            UserError: if the base's weights or a data file are not those the run was started with.
        """
        path = self.folder / "lineage.json"
        files = data_files(self.recipe)
        if path.exists():
            recorded = record.recorded(path, self.folder)
            base = recorded["base"]["sha256"] if recorded["base"] else None
            if source is not None and base != source.identity["sha256"]:
                raise UserError(
                    f"the weights of {self.recipe.base} have changed since {self.folder} was started; "
                    "put them back, or give another --run-dir"
                )
            earlier = {entry["source"]: entry.get("sha256") for entry in recorded["data"]}
            for name, digests in files.items():
                if earlier.get(name) != digests:
                    raise UserError(
                        f"the data in {name} has changed since {self.folder} was started; put it back, or give "
                        "another --run-dir"
                    )
            return
        mixtures = [mixture for stage in self.recipe.stages for mixture in stage.mixtures]
        tasks = {name: setting for mixture in mixtures for name, setting in mixture.items()}
        data: list[dict[str, Any]] = [
            {**gym.origin(name), "config": setting.config} for name, setting in tasks.items()
        ]
        data += [{"source": name, "sha256": digests, "license": None} for name, digests in files.items()]
        given = getattr(self.recipe.stages[0], "tokenizer", None)
        lineage = {"base": source.identity if source else None, "data": data, "teachers": []}
        write_json(path, lineage | ({"tokenizer": given} if given else {}))

    def _say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show(finished: Run, console: Console) -> None:
    """Print the bill, the result and the next commands."""
    results = finished.results
    title = f"{results['name']} · {duration(results['wall_seconds'])}"
    console.print(bill_table(ledger.summarise(finished.ledger), title))
    if results.get("plan"):
        console.print(beside_text(results["plan"]), highlight=False)
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
