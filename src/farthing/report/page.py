"""Write report.html: one self-contained file that loads nothing and runs nothing.

Model answers, questions and every other string from the run's files are untrusted: the template escapes
all of them (autoescape is on, drawings use escaping formats), and the page's content security policy forbids
scripts and requests in case an escape is ever missed.
"""

import importlib.resources
import itertools
from pathlib import Path

import jinja2
from markupsafe import Markup

from farthing.base import figures
from farthing.base.errors import UserError
from farthing.base.files import write
from farthing.report import answers, training
from farthing.report.money import Bill, CostPage, bill, cost_page
from farthing.report.run import Run, number, read_run, rows, text


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from the files there so far; return its path.

    A sentence stands in for anything missing (no evaluation yet, no audit, no ledger). The file is
    replaced in one step, so a reader never sees half of it. Raises UserError if the directory does not exist
    or holds no run.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory; give the run directory that `farthing run` printed.")
    known = ("recipe.yaml", "run.json", "ledger.jsonl", "results.json", "stages")
    if not any((run_dir / name).exists() for name in known):
        raise UserError(f"{run_dir} holds no run (none of {', '.join(known)}); give a run directory.")
    run = read_run(run_dir)
    page = render(run, bill(run_dir, run.results), cost_page(run_dir, run.results))
    target = run_dir / "report.html"
    write(target, page)
    return target


def render(run: Run, the_bill: Bill | None, cost: CostPage | None) -> str:
    """The page as text."""
    files = importlib.resources.files("farthing.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bits": figures.bits, "clean": text, "count": figures.count, "interval": figures.interval,
        "percent": figures.percent, "plural": figures.plural, "points": figures.points, "short": figures.short,
    }  # fmt: skip
    template = environment.from_string((files / "report.html.jinja").read_text(encoding="utf-8"))
    found = answers.samples(run)
    numbered = list(enumerate(found[0] if found else [], 1))
    result = answers.result(run)
    outcomes = answers.outcomes(run)
    validation = None if result or run.compared else training.validation(run)
    judged = any(row.outcomes.counts["other"] for _, bars in outcomes or [] for row in bars)
    return template.render(
        css=Markup((files / "report.css").read_text(encoding="utf-8")),  # ours, not from a run
        run=run,
        setting=_setting(run),
        result=result,
        validation=validation,
        headline=_headline(run, validation),
        asked=_asked(run),
        figures=_figures(result, validation, the_bill),
        outcomes=outcomes,
        outcome_names=[
            (kind, name) for kind, name in answers.OUTCOME_NAMES.items() if kind != "other" or judged
        ],
        curves=training.curves(run),
        samples=[list(group) for _, group in itertools.groupby(numbered, key=lambda one: one[1].kind)],
        sample_sentence=_sample_sentence(*found) if found else "",
        kinds=answers.KINDS,
        bill=the_bill,
        cost=cost,
        audit=training.audit(run),
        sync=training.sync(run),
        facts=training.facts(run),
        built_from=training.built_from(run),
    )


def _setting(run: Run) -> list[str]:
    """The line under the title: base, stages, device, start."""
    base = run.recipe.get("base")
    said = [f"from {text(base)}" if base else "from nothing" if run.recipe else ""]
    for stage in rows(run.recipe.get("stages")):
        steps = number(stage.get("steps"))
        length = "" if steps is None else f", {figures.plural(int(steps), 'step')}"
        said.append(text(stage.get("kind")) + length)
    said += [text(run.facts.get("cpu") or run.facts.get("device")), text(run.facts.get("started"))[:10]]
    return [part for part in said if part]


def _headline(run: Run, validation: training.Validation | None) -> str:
    """The headline of a run that was not evaluated both before and after."""
    if validation is not None:
        bits, steps = figures.bits(validation.last), figures.plural(validation.last_step, "step")
        return f"{bits} bits per byte of validation text after {steps}."
    if not run.compared:
        return _asked(run) or "Nothing has been measured of the model yet."
    for name, who, lacking in (
        ("before", f"The {run.first}", "the trained model has not been evaluated yet"),
        (
            "after",
            "The trained model",
            f"the {run.first} was not evaluated, so nothing is known about the gain",
        ),
    ):
        if evaluation := run.evaluation(name):
            share = figures.percent(evaluation.overall.accuracy)
            questions = figures.plural(evaluation.overall.questions, "held‑out question")
            return f"{who} answers {share} of {questions} right; {lacking}."
    return "The model has not been evaluated, so nothing is known about how good it is."


def _asked(run: Run) -> str:
    """A sentence about the questions of a run that asks them only afterwards; empty if it asked none."""
    found = None if run.compared else run.evaluation("after")
    if found is None:
        return ""
    interval = f" (95% interval {figures.interval(found.overall.ci95)})" if found.overall.ci95 else ""
    questions = figures.plural(found.overall.questions, "held‑out question")
    return (
        f"The trained model answers {figures.percent(found.overall.accuracy)} of {questions} right{interval}."
    )


def _figures(
    result: answers.Result | None, validation: training.Validation | None, the_bill: Bill | None
) -> list[tuple[str, str]]:
    """Headline numbers as (value, label)."""
    shown = []
    if validation is not None:
        shown.append((figures.bits(validation.last), "bits per byte of validation text"))
    if result:
        shown.append((f"{figures.points(result.difference)}", "percentage points, after minus before"))
    if the_bill:
        shown.append((figures.duration(the_bill.seconds), "on the clock"))
        shown.append((figures.money(the_bill.usd), "cost"))
        if the_bill.joules:
            shown.append((figures.energy(the_bill.joules), f"energy, {the_bill.joules_are}"))
    return shown


def _sample_sentence(chosen: list[answers.Sample], counts: dict[str, int]) -> str:
    kinds = ", ".join(f"{counts[kind]:,} {kind} ({meaning})" for kind, meaning in answers.KINDS.items())
    return (
        f"Of {figures.plural(sum(counts.values()), 'question')}: {kinds}. The {len(chosen)} shown were not "
        "picked by hand: three fixed, two broken, two kept, three never, in the order of a hash of the "
        "question's text; where a kind has too few, others fill in, the least flattering first."
    )
