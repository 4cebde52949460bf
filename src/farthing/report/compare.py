"""Cost against quality of real runs: what each cost, what it gets right, and which differences are real.

Two runs are compared question by question where both were asked; if the interval holds zero, chance alone could have
made the difference. A run's cost is its ledger, failures included, and entries made by hand.
"""

from __future__ import annotations

import importlib.resources
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from farthing.base import figures
from farthing.base.errors import UserError
from farthing.base.files import write
from farthing.base.limits import Unwritable, unwritable
from farthing.cost import spend
from farthing.cost.spend import Booked
from farthing.evaluate.intervals import finding, paired_difference, wilson
from farthing.report import learning, learning_text
from farthing.report.charts import Dot, best_for_the_money, frontier
from farthing.report.run import Json, Run, mapping, number, outcome, pair, read_run, text

_Key = tuple[str, str, int]
_SAID = {"rose": "a clear difference", "fell": "a clear difference", "no clear change": "no clear difference"}


@dataclass(frozen=True)
class Contender:
    """One run: its bill and its score on the questions it was asked after training."""

    name: str
    usd: float
    seconds: float
    n: int
    accuracy: float
    ci95: tuple[float, float]
    before: float | None
    gain: float | None
    gain_ci95: tuple[float, float] | None
    """Paired with its own base, as the run recorded it."""
    tasks: tuple[str, ...]
    """Tasks of its questions; accuracies on different tasks are not comparable."""
    samples: int = 1
    """Answers to each question."""
    on_frontier: bool = False

    @property
    def points_per_dollar(self) -> float | None:
        """Percentage points gained a dollar; None where no gain was recorded or nothing was paid."""
        return 100 * self.gain / self.usd if self.gain is not None and self.usd else None


@dataclass(frozen=True)
class Pair:
    """Two runs on the questions that both were asked."""

    first: str
    second: str
    n: int
    difference: float | None
    """Accuracy of the second minus that of the first; None without common questions."""
    ci95: tuple[float, float] | None
    usd: float
    """Cost of the second minus the first."""


@dataclass(frozen=True)
class Comparison:
    """The runs, cheapest first, and every pair of them."""

    runs: list[Contender]
    pairs: list[Pair]
    left_out: list[str]
    learning: Json | None = None
    """Learning curves compared, where runs share a validation set; see `learning.compare`."""

    @property
    def caution(self) -> str:
        """A warning if the runs were not all asked the same tasks."""
        if len({run.tasks for run in self.runs}) <= 1:
            return ""
        return (
            "The runs were not asked the same tasks, so their accuracies are not on one scale: "
            "best for the money is among those that were"
        )


def compare(folders: Sequence[Path], baseline: str | None = None) -> Comparison:
    """Compare run directories: cost against quality of those that were evaluated, and the learning curves of those
    that share a validation set; of several sets, the one of most runs.

    Args:
        baseline: the variant that learning curves are compared with; the first one's if None.

    Raises:
        UserError: when a directory does not exist, or there are not two runs to compare in either way.
    """
    evaluated: list[tuple[Contender, dict[_Key, float]]] = []
    reasons: dict[Path, str] = {}
    trained: list[learning.Trained] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a directory; give run directories")
        run, booked = read_run(folder), spend.read_run(folder)
        contender = _contender(run, booked)
        if isinstance(contender, str):
            reasons[folder] = contender
        else:
            evaluated.append(contender)
        if (curve := learning.read(run, booked)) is None:
            continue
        if any(learning.same(run, curve) for run in trained):
            reasons[folder] = f"{folder} repeats seed {curve.seed} of a run with the same recipe"
        else:
            trained.append(curve)
    sets = Counter(run.validation for run in trained).most_common(1)
    apart = {run.name for run in trained if run.validation != sets[0][0]}
    trained = [run for run in trained if run.name not in apart]
    curves = learning.compare(trained, baseline)
    if curves is None and baseline is not None:
        raise UserError(
            "--baseline: no two of these runs share a validation set, so there are no curves to compare"
        )
    if curves is not None:
        shown = {run.name for run in trained}
        reasons = {folder: why for folder, why in reasons.items() if text(str(folder)) not in shown}
    reasons |= {
        folder: f"{folder} has another validation set" for folder in reasons if text(str(folder)) in apart
    }
    left_out = list(reasons.values())
    if len(evaluated) < 2 and curves is None:
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise UserError(
            "to compare, give two runs with a ledger and an evaluation, or two trained from scratch that share a "
            f"validation set{why}"
        )
    names = _names(evaluated)
    evaluated = [
        (replace(run, name=name), answers) for (run, answers), name in zip(evaluated, names, strict=True)
    ]
    evaluated.sort(key=lambda each: each[0].usd)
    runs = _with_frontier([run for run, _ in evaluated])
    pairs = [_pair(one, other) for one, other in itertools.combinations(evaluated, 2)]
    return Comparison(runs, pairs, left_out, curves)


def _contender(run: Run, booked: Booked | None) -> tuple[Contender, dict[_Key, float]] | str:
    """The run with its ledger, or why it cannot be compared."""
    if booked is None or not booked.lines:
        return f"{run.folder} has no ledger"
    after = run.evaluation("after")
    if after is None:
        return f"{run.folder} was not evaluated after training"
    before = run.evaluation("before")
    gain = mapping(run.results.get("gain"))
    overall = after.overall
    contender = Contender(
        name=text(str(run.folder)),
        usd=booked.summary.total.usd + booked.entered,
        seconds=booked.summary.total.seconds,
        n=overall.questions,
        accuracy=overall.accuracy,
        ci95=overall.ci95 or wilson(overall.counts["right"], overall.n),
        before=before.overall.accuracy if before else None,
        gain=number(gain.get("difference")),
        gain_ci95=pair(gain.get("ci95")),
        tasks=tuple(sorted(after.by_task)),
        samples=overall.samples,
    )
    return contender, _answers(run.after)


def _with_frontier(runs: Sequence[Contender]) -> list[Contender]:
    """The runs with those marked that nothing beats for the money among the runs asked the same tasks."""
    marked = []
    for run in runs:
        rivals = [other for other in runs if other.tasks == run.tasks]
        best = best_for_the_money([(rival.usd, rival.accuracy) for rival in rivals])
        marked.append(replace(run, on_frontier=best[rivals.index(run)]))
    return marked


def _names(found: Sequence[tuple[Contender, object]]) -> list[str]:
    """The last part of each path where that tells the runs apart, else the whole path."""
    short = [Path(run.name).name for run, _ in found]
    return short if len(set(short)) == len(short) else [run.name for run, _ in found]


def _answers(lines: Sequence[Json]) -> dict[_Key, float]:
    """The share of right answers by question; a question that was asked twice is two."""
    asked: dict[tuple[str, str, str], list[bool]] = {}
    for place, line in enumerate(lines):
        index = text(line.get("index")) or f"line {place}"
        key = (index, text(line.get("task")), text(line.get("question")))
        asked.setdefault(key, []).append(outcome(line) == "right")
    seen: Counter[tuple[str, str]] = Counter()
    answers: dict[_Key, float] = {}
    for (_, task, question), right in asked.items():
        answers[task, question, seen[task, question]] = sum(right) / len(right)
        seen[task, question] += 1
    return answers


def _pair(one: tuple[Contender, dict[_Key, float]], other: tuple[Contender, dict[_Key, float]]) -> Pair:
    (first, asked), (second, answered) = one, other
    common = [key for key in asked if key in answered]
    usd = second.usd - first.usd
    if not common:
        return Pair(first.name, second.name, 0, None, None, usd)
    difference, low, high = paired_difference(
        [asked[key] for key in common],
        [answered[key] for key in common],
        max(first.samples, second.samples),
    )
    return Pair(first.name, second.name, len(common), difference, (low, high), usd)


# ---- showing it ----


def as_json(found: Comparison) -> dict[str, Any]:
    """Shares in [0, 1], dollars, seconds."""
    return {
        "runs": [{**asdict(run), "points_per_dollar": run.points_per_dollar} for run in found.runs],
        "pairs": [asdict(each) for each in found.pairs],
        "left_out": found.left_out,
        "caution": found.caution,
        "learning": found.learning,
    }


def as_text(found: Comparison) -> str:
    """A line per run, cheapest first, a line per pair, and the learning curves."""
    lines = [] if not found.runs else _table(found.runs)
    lines += ["", *(pair_sentence(each) for each in found.pairs)] if found.pairs else []
    lines += [found.caution] if found.caution else []
    if found.learning is not None:
        lines += [""] if lines else []
        for table in learning_text.tables(found.learning)[:2]:
            lines += [*_aligned(table), ""]
        lines += learning_text.findings(found.learning)
    lines += [f"left out: {why}" for why in found.left_out]
    return "\n".join(lines)


def _table(runs: Sequence[Contender]) -> list[str]:
    width = max(len(run.name) for run in runs)
    head = (
        f"{'':{width}}  {'$':>10}  {'time':>10}  {'right':>6}  95% interval      gain             points a $"
    )
    lines = [head]
    for run in runs:
        gained = figures.points(run.gain) if run.gain is not None else figures.MISSING
        per = figures.significant(run.points_per_dollar, 3) if run.points_per_dollar else figures.MISSING
        mark = "  best for the money" if run.on_frontier else ""
        lines.append(
            f"{run.name:{width}}  {figures.money(run.usd):>10}  {figures.duration(run.seconds):>10}  "
            f"{figures.percent(run.accuracy):>6}  {figures.interval(run.ci95):<16}  {gained:<15}  {per:>10}{mark}"
        )
    return lines


def _aligned(table: learning_text.Table) -> list[str]:
    rows = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *rest = (
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return [table.caption, head, *rest]


def pair_sentence(found: Pair) -> str:
    """A pair in one sentence."""
    more = f"{figures.money(abs(found.usd))} {'more' if found.usd >= 0 else 'less'}"
    if found.difference is None or found.ci95 is None:
        return f"{found.second} costs {more} than {found.first}; no question was asked of both, so nothing to compare"
    clear = _SAID.get(told := finding(*found.ci95), told)
    return (
        f"{found.second} costs {more} than {found.first}: {figures.points(found.difference)} points "
        f"(95% interval {figures.interval(found.ci95, as_points=True)}, {found.n} same questions), {clear}"
    )


def write_html(found: Comparison, target: Path) -> None:
    """One page with the plot and the tables, that loads nothing; replaced in one step.

    Raises UserError when it cannot be written there.
    """
    files = importlib.resources.files("farthing.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "interval": figures.interval, "percent": figures.percent, "points": figures.points,
        "money": figures.money, "duration": figures.duration, "count": figures.count, "short": figures.short,
    }  # fmt: skip
    template = environment.from_string((files / "compare.html.jinja").read_text(encoding="utf-8"))
    dots = [
        Dot(run.name, run.usd, run.accuracy, *run.ci95, run.on_frontier) for run in found.runs if run.usd > 0
    ]
    page = template.render(
        css=Markup((files / "report.css").read_text(encoding="utf-8")),  # ours, not from a run
        found=found,
        plot=frontier(dots) if dots else None,
        sentences=[pair_sentence(each) for each in found.pairs],
        findings=learning_text.findings(found.learning) if found.learning else [],
        tables=learning_text.tables(found.learning) if found.learning else [],
        drawings=[learning_text.drawing(found.learning, axis) for axis in found.learning["equal"]]
        if found.learning
        else [],
    )
    try:
        write(target, page)
    except (OSError, Unwritable) as error:
        raise UserError(f"cannot write {target}: {unwritable(error) or error}; give another --out") from error
