"""What the report says about the training: the curves, the sync proof, the reward audit and how it was made.

A function returns nothing where the run holds nothing for its section; the template then says so in a
sentence.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from farthing.base import figures
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


Curve = tuple[str, str, str, Callable[[float], str], float | None, str]
# key, title, axis label, how a value is written, ceiling, gloss
CURVES: list[Curve] = [
    ("reward", "Reward", "mean reward", figures.short, None,
     "What the verifier paid per answer, averaged over the step."),
    ("right", "Answers right", "share right", lambda y: figures.percent(y, 0), 1.0,
     "Share of sampled answers the verifier accepted, on training questions."),
    ("unparsed", "No answer read", "share of answers", lambda y: figures.percent(y, 0), 1.0,
     "Share of sampled answers in which no answer could be found."),
    ("length", "Length", "tokens", figures.short, None,
     "Mean number of tokens in an answer."),
    ("entropy", "Entropy", "nats per token", figures.short, None,
     "How undecided the model is about its next token; a fall to zero means it stopped exploring."),
    ("grad_norm", "Gradient norm", "L2 norm", figures.short, None,
     "Size of the update before clipping; spikes are steps that tried to go far."),
    ("kl", "Distance from the start", "KL, nats per token", figures.short, None,
     "Divergence from the reference model."),
]  # fmt: skip
TEXT_CURVES: list[Curve] = [
    ("loss", "Loss", "nats per token", figures.short, None,
     "How badly the next token was predicted, on the step's own text."),
    ("val_bits_per_byte", "Validation", "bits per byte", figures.short, None,
     "The same on text kept apart, for each byte of it, whatever the tokenizer."),
    ("mtp_loss", "Loss further ahead", "nats per token", figures.short, None,
     "Of the modules that predict the tokens after the next."),
    ("load_worst", "Busiest expert", "times the mean", figures.short, None,
     "Tokens of the busiest expert over the mean, in the layer where they differ most; 1 is perfect balance."),
    ("grad_norm", "Gradient norm", "L2 norm", figures.short, None,
     "Size of the update before clipping; spikes are steps that tried to go far."),
    ("lr", "Learning rate", "peak and schedule", figures.short, None,
     "As the schedule set it."),
]  # fmt: skip
OPTIONAL = ("kl", "val_bits_per_byte", "mtp_loss", "load_worst", "lr")  # not every stage has them: no hole


def series(lines: list[Json], key: str) -> list[charts.Point]:
    """The points (step, value) of one key, without the lines that have no number for it."""
    return [(float(line["step"]), value) for line in lines if (value := number(line.get(key))) is not None]


def curves(run: Run) -> list[StageCurves]:
    """The training curves of every stage that wrote metrics."""
    stages = []
    for stage, lines in run.metrics.items():
        panels, missing = [], []
        wanted = TEXT_CURVES if any("loss" in line for line in lines) else CURVES
        for key, title, label, value_text, ceiling, gloss in wanted:
            points = series(lines, key)
            if not points:
                missing += [] if key in OPTIONAL else [title.lower()]
                continue
            lowest, highest = min(y for _, y in points), max(y for _, y in points)
            describe = (
                f"{title} over {len(points)} steps, from {value_text(points[0][1])} "
                f"to {value_text(points[-1][1])}; lowest {value_text(lowest)}, highest {value_text(highest)}."
            )
            wild = (
                key == "grad_norm" and lowest > 0 and highest > 20 * statistics.median(y for _, y in points)
            )
            drawing = charts.curve(
                [charts.Line(points)],
                f"{label}, logarithmic" if wild else label,
                describe,
                value_text,
                logarithmic=wild,
                ceiling=ceiling,
            )
            panels.append(Panel(title, gloss, drawing))
        _, window = charts.smooth([0.0] * len(lines))
        stages.append(StageCurves(stage, len(lines), window, panels, missing))
    return stages


# ---- The sync proof --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sync:
    """How far the engine that samples and the trainer that learns disagreed about the same tokens."""

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
            sorted({text(case.get("task")) for case in some}),
            sum(case.get("passed") is not True for case in some),
            sorted({text(case.get("outcome")) for case in some}),
        )
        for name, some in grouped.items()
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
    """run.json as pairs of a name and a value, the known ones first and named."""
    known = [(name, run.facts[key]) for key, name in FACTS.items() if key in run.facts]
    others = [(text(key).replace("_", " "), value) for key, value in run.facts.items() if key not in FACTS]
    return [(name, _fact(value)) for name, value in known + others]


def built_from(run: Run) -> list[tuple[str, str]]:
    """lineage.json as pairs of a part and where it is from: source, version, licence, hashes."""
    parts = [("weights", mapping(run.lineage.get("base")))]
    for entry in rows(run.lineage.get("data")):
        parts.append(
            ("questions" if text(entry.get("source")).startswith("reasoning-gym:") else "text", entry)
        )
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
    return found


def _fact(value: object) -> str:
    if value is None:
        return figures.MISSING
    return f"{value:g}" if isinstance(value, float) else text(value)
