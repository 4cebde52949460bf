"""The report on training: curves, sync proof, reward audit, and how the model was made.

A function returns None if the run holds nothing for its section; the template then says so.
"""

import statistics
from dataclasses import dataclass

from markupsafe import Markup

from farthing.base import figures
from farthing.recipe import KINDS, Curve
from farthing.recipe.kinds import spec_of
from farthing.report import charts
from farthing.report.run import Json, Run, mapping, number, rows, text


# ---- The curves ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Panel:
    """One drawing with its title and a sentence that says what it means."""

    title: str
    gloss: str
    drawing: Markup


@dataclass(frozen=True)
class StageCurves:
    """The curves of one stage; `missing` names those for which its metrics hold no value."""

    stage: str
    steps: int
    window: int
    panels: list[Panel]
    missing: list[str]
    unchanged: bool  # its model has the weights that it started from


def shown(stage: str) -> list[Curve]:
    """The curves of a stage, by its folder's name; none for a kind that this version does not know."""
    kind = stage.partition("-")[2]
    return [curve for curve in spec_of(kind).curves if curve.gloss] if kind in KINDS else []


def series(lines: list[Json], key: str) -> list[charts.Point]:
    """The points (step, value) of one key, skipping lines without a number for it."""
    return [(float(line["step"]), value) for line in lines if (value := number(line.get(key))) is not None]


def curves(run: Run) -> list[StageCurves]:
    """The training curves of every stage that wrote metrics."""
    stages = []
    unchanged = {
        entry.get("name") for entry in rows(run.results.get("stages")) if entry.get("unchanged") is True
    }
    for stage, lines in run.metrics.items():
        panels, missing = [], []
        for curve in shown(stage):
            points = series(lines, curve.key)
            if not points:
                missing += [] if curve.optional else [curve.title.lower()]
                continue
            panels.append(Panel(curve.title, curve.gloss, _drawing(curve, points)))
        panels += _parts(lines)
        _, window = charts.smooth([0.0] * len(lines))
        stages.append(StageCurves(stage, len(lines), window, panels, missing, stage in unchanged))
    return stages


def _parts(lines: list[Json]) -> list[Panel]:
    """A panel for each part of the reward, where it has several: one alone is the reward."""
    table = [{"step": line["step"], **mapping(line.get("reward_parts"))} for line in lines]
    names = {name: None for line in table for name in line if name != "step"}
    if len(names) < 2:
        return []
    gloss = "One part of the reward, before its weight."
    return [
        Panel(f"Reward: {text(name)}", gloss, _drawing(Curve(name, text(name), "mean reward"), points))
        for name in names
        if (points := series(table, name))
    ]


def _drawing(curve: Curve, points: list[charts.Point]) -> Markup:
    values = [value for _, value in points]
    lowest, highest = min(values), max(values)

    def write(value: float) -> str:
        return figures.percent(value, 0) if curve.share else figures.short(value)

    describe = (
        f"{curve.title} over {len(points)} steps, from {write(values[0])} to {write(values[-1])}; "
        f"lowest {write(lowest)}, highest {write(highest)}."
    )
    wild = curve.key == "grad_norm" and lowest > 0 and highest > 20 * statistics.median(values)
    return charts.curve(
        [charts.Line(points)],
        f"{curve.unit}, logarithmic" if wild else curve.unit,
        describe,
        write,
        logarithmic=wild,
        ceiling=1.0 if curve.share else None,
    )


# ---- Validation ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Validation:
    """Bits per byte of validation text, at the first and the last step that measured it."""

    stage: str
    first_step: int
    first: float
    last_step: int
    last: float


def validation(run: Run) -> Validation | None:
    """The validation of the last stage that has one."""
    for stage, lines in reversed(run.metrics.items()):
        if points := series(lines, "val_bits_per_byte"):
            (first_step, first), (last_step, last) = points[0], points[-1]
            return Validation(stage, int(first_step), first, int(last_step), last)
    return None


# ---- The sync proof --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sync:
    """Disagreement between sampler and trainer on the log-probabilities of the same tokens."""

    stage: str
    measured: int
    largest: float
    mean: float | None
    tolerance: float | None  # for the mean of a step
    within: bool | None
    drawing: Markup


def sync(run: Run) -> list[Sync]:
    """The sync proof of every stage in which it was measured."""
    proofs = []
    for index, (stage, lines) in enumerate(run.metrics.items()):
        largest, mean = series(lines, "sync_max"), series(lines, "sync_mean")
        if not largest:
            continue
        top = max(value for _, value in largest)
        average = sum(value for _, value in mean) / len(mean) if mean else None
        stages = rows(run.recipe.get("stages"))
        tolerance = number(stages[index].get("sync_tolerance")) if index < len(stages) else None
        tolerance = tolerance if tolerance is not None and tolerance > 0 else None
        lines_drawn = [charts.Line(largest, "main", "largest")] + (
            [charts.Line(mean, "second", "mean")] if mean else []
        )
        drawing = charts.curve(
            lines_drawn,
            "difference in log-probability, nats",
            f"Largest difference over the run {figures.short(top)}, measured at {len(largest)} steps.",
            logarithmic=True,
            limit=(tolerance, "tolerance of the mean") if tolerance else None,
        )
        judged = max(value for _, value in mean or largest)
        within = None if tolerance is None else judged <= tolerance
        proofs.append(Sync(stage, len(largest), top, average, tolerance, within, drawing))
    return proofs


# ---- The audit -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AuditRow:
    """One attack on the verifier, over all tasks it was tried on."""

    case: str
    tasks: list[str]
    failed: int
    outcomes: list[str]


@dataclass(frozen=True)
class Audit:
    """The reward audit: passed or not, case by case, and every failure in full."""

    passed: bool
    tries: int
    seconds: float | None
    table: list[AuditRow]
    failures: list[Json]


def audit(run: Run) -> Audit | None:
    """The audit by case; a case without a clear `passed: true` counts as failed."""
    cases = rows(run.audit.get("cases"))
    if not cases:
        return None
    grouped: dict[str, list[Json]] = {}
    for case in cases:
        grouped.setdefault(text(case.get("case")), []).append(case)
    table = [
        AuditRow(
            name.replace("_", " "),
            sorted({text(case.get("task")) for case in group}),
            sum(case.get("passed") is not True for case in group),
            sorted({text(case.get("outcome")) for case in group}),
        )
        for name, group in grouped.items()
    ]
    failures = [{key: text(case.get(key)) for key in ("case", "task", "expected", "outcome")}
                for case in cases if case.get("passed") is not True]  # fmt: skip
    return Audit(run.audit.get("passed") is True and not failures, len(cases),
                 number(run.audit.get("seconds")), table, failures)  # fmt: skip


# ---- How it was made -------------------------------------------------------------------------------------
FACTS = {
    "farthing": "Farthing", "commit": "source commit", "python": "Python", "torch": "PyTorch",
    "transformers": "Transformers",
    "reasoning-gym": "Reasoning Gym", "platform": "platform", "cpu": "processor", "threads": "threads",
    "memory_gb": "memory, GB", "device": "device", "seed": "seed", "started": "started",
    "attempts": "attempts",
}  # fmt: skip


def facts(run: Run) -> list[tuple[str, str]]:
    """run.json as (name, value) pairs, known keys first under readable names."""
    known = [(name, run.facts[key]) for key, name in FACTS.items() if key in run.facts]
    others = [(text(key).replace("_", " "), value) for key, value in run.facts.items() if key not in FACTS]
    return [(name, _fact(value)) for name, value in known + others]


def built_from(run: Run) -> list[tuple[str, str]]:
    """lineage.json as pairs of a part and its origin: source, version, licence, hashes; and of what each stage was to
    train on, the rows that it left out."""
    parts = [("weights", mapping(run.lineage.get("base")))]
    for entry in rows(run.lineage.get("data")):
        asks = entry.get("questions") or text(entry.get("source")).startswith("reasoning-gym:")
        parts.append(("questions" if asks else "text", entry))
    parts += [(text(entry.get("use")).replace("_", " "), entry) for entry in rows(run.lineage.get("judges"))]
    parts += [("teacher", entry) for entry in rows(run.lineage.get("teachers"))]
    found = []
    for name, entry in parts:
        licence = entry.get("license")
        said = [text(entry.get("source")), text(entry.get("version") or entry.get("revision"))]
        said.append(f"licence {text(licence)}" if licence else "licence not recorded")
        said += [
            f"{text(file)} sha256 {text(digest)}" for file, digest in mapping(entry.get("sha256")).items()
        ]
        if entry.get("source"):
            found.append((name, ", ".join(part for part in said if part)))
    for stage in rows(run.results.get("stages")):
        left_out = mapping(stage.get("left_out")).items()
        if left_out:
            said = [f"{number(count) or 0:,.0f}: {text(why)}" for why, count in left_out]
            found.append(("left out", f"{text(stage.get('name'))}: {'; '.join(said)}"))
    return found


def _fact(value: object) -> str:
    if value is None:
        return figures.MISSING
    return f"{value:g}" if isinstance(value, float) else text(value)
