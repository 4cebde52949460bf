"""The report on answers: the result, how the answers ended, and ten of them.

A function returns None if the run holds nothing for its section; the template then says so.
"""

import hashlib
from dataclasses import dataclass

from markupsafe import Markup

from farthing.base import figures
from farthing.evaluate.intervals import finding
from farthing.report import charts
from farthing.report.run import SHOWN, Json, Outcomes, Run, mapping, number, outcome, pair, text
from farthing.tasks.item import READABLE

OUTCOME_NAMES = {
    "right": "right",
    "wrong": "wrong",
    "unparsed": "no answer read",
    "cut_off": "cut off",
    "other": "not judged",
}


# ---- The result ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Share:
    """A part of the questions, split by what the base did with them, and its part in the gain."""

    name: str
    n: int
    before: int
    after: int
    gain: float  # in shares of all questions, so that the parts add up to the whole


@dataclass(frozen=True)
class Result:
    """The answers before and after training, compared question by question."""

    n: int
    before: float
    after: float
    before_ci: tuple[float, float] | None
    after_ci: tuple[float, float] | None
    difference: float
    difference_ci: tuple[float, float] | None
    verdict: str  # as `intervals.finding`; "unknown" without an interval
    p_value: float | None
    parseable_n: int
    parseable_difference: float | None
    parseable_ci: tuple[float, float] | None
    parseable_finding: str
    shares: list[Share]
    samples: int
    """Answers to each question."""
    estimates: list[Json]
    """pass@k and maj@k before and after, where there were several."""
    figure: Markup


def pairs(run: Run) -> list[tuple[Json, Json]]:
    """The lines before and after that are about the same question, and the same sample of it, ordered by index."""
    after = {_key(line): line for line in run.after}
    found = [(line, after[key]) for line in run.before if (key := _key(line)) in after]
    return sorted(found, key=lambda both: number(both[0].get("index")) or 0.0)


def _key(line: Json) -> tuple[str, str, str]:
    return text(line.get("index")), text(line.get("question")), text(line.get("sample") or 0)


def result(run: Run) -> Result | None:
    """Compare before with after; None unless both evaluations exist."""
    before, after = run.evaluation("before"), run.evaluation("after")
    if before is None or after is None:
        return None
    gain = mapping(run.results.get("gain"))
    parseable = mapping(gain.get("on_parseable"))
    difference = number(gain.get("difference"))
    if difference is None:
        difference = after.overall.accuracy - before.overall.accuracy
    interval, readable = pair(gain.get("ci95")), pair(parseable.get("ci95"))
    return Result(
        n=after.overall.questions,
        before=before.overall.accuracy,
        after=after.overall.accuracy,
        before_ci=before.overall.ci95,
        after_ci=after.overall.ci95,
        difference=difference,
        difference_ci=interval,
        verdict=finding(*interval) if interval is not None else "unknown",
        p_value=number(gain.get("mcnemar_p")),
        parseable_n=int(number(parseable.get("n")) or 0),
        parseable_difference=number(parseable.get("difference")),
        parseable_ci=readable,
        parseable_finding=finding(*readable) if readable is not None else "unknown",
        shares=_shares(run) if after.overall.samples == 1 else [],
        samples=after.overall.samples,
        estimates=_estimates(before.overall, after.overall),
        figure=_intervals(before.overall, after.overall),
    )


def _estimates(before: Outcomes, after: Outcomes) -> list[Json]:
    earlier = {name: (share, interval) for name, share, interval in before.estimates}
    return [
        {"name": name, "before": earlier.get(name, (None, None)), "after": (share, interval)}
        for name, share, interval in after.estimates
    ]


def _shares(run: Run) -> list[Share]:
    both = pairs(run)

    def share(name: str, members: list[tuple[Json, Json]]) -> Share:
        before = sum(outcome(first) == "right" for first, _ in members)
        after = sum(outcome(second) == "right" for _, second in members)
        return Share(name, len(members), before, after, (after - before) / max(1, len(both)))

    readable = [one for one in both if outcome(one[0]) in READABLE]
    unread = [one for one in both if outcome(one[0]) not in READABLE]
    return [
        share(f"the {run.first} already gave a readable answer", readable),
        share(f"the {run.first} gave none", unread),
        share("all questions", both),
    ] if both else []  # fmt: skip


def _intervals(before: Outcomes, after: Outcomes) -> Markup:
    estimates, said = [], []
    for when, outcomes in (("before", before), ("after", after)):
        low, high = outcomes.ci95 or (outcomes.accuracy, outcomes.accuracy)
        estimates.append(charts.Estimate(when, outcomes.accuracy, low, high, when))
        known = f", 95% interval {figures.interval(outcomes.ci95)}" if outcomes.ci95 else ""
        said.append(f"{when} {figures.percent(outcomes.accuracy)}{known}")
    return charts.intervals(estimates, f"Share of answers right: {'; '.join(said)}.")


# ---- How answers ended -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class OutcomeRow:
    """One evaluation of one task (or of all) as a bar and as numbers."""

    when: str
    outcomes: Outcomes
    bar: Markup


def outcomes(run: Run) -> list[tuple[str, list[OutcomeRow]]] | None:
    """Bars before and after, for all tasks together and then for each task."""
    found = [(when, evaluation) for when in ("before", "after") if (evaluation := run.evaluation(when))]
    if not found:
        return None
    tasks = sorted({task for _, evaluation in found for task in evaluation.by_task})
    groups = [("all tasks", [_outcome_row(when, evaluation.overall) for when, evaluation in found])]
    for task in tasks if len(tasks) > 1 else []:
        groups.append((task, [_outcome_row(when, evaluation.by_task[task])
                              for when, evaluation in found if task in evaluation.by_task]))  # fmt: skip
    if len(tasks) == 1:
        groups = [(tasks[0], groups[0][1])]
    return groups


def _outcome_row(when: str, counts: Outcomes) -> OutcomeRow:
    segments = [
        charts.Segment(
            counts.counts[kind] / counts.n,
            kind,
            OUTCOME_NAMES[kind],
            figures.percent(counts.counts[kind] / counts.n, 0),
        )
        for kind in SHOWN
    ]
    said = ", ".join(f"{segment.name} {segment.text}" for segment in segments if segment.share)
    return OutcomeRow(when, counts, charts.stacked(segments, f"{counts.name}, {when}: {said}"))


# ---- Sample answers --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """One question with the answers before and after."""

    kind: str
    task: str
    question: str
    gold: str
    before: Json
    after: Json


KINDS = {  # in the order in which they are shown
    "fixed": "not right before, right after",
    "broken": "right before, not right after",
    "kept": "right before and after",
    "never": "right neither before nor after",
}
WANTED = {"fixed": 3, "broken": 2, "kept": 2, "never": 3}
LONGEST_TEXT = 1500  # characters of an answer shown


def samples(run: Run) -> tuple[list[Sample], dict[str, int]] | None:
    """Ten questions, as many of each kind as WANTED (others fill gaps), and the number of questions of each kind.

    Within a kind they are ordered by a hash of the question's text, so nobody picked them.
    """
    kinds: dict[str, list[tuple[Json, Json]]] = {kind: [] for kind in KINDS}
    for before, after in pairs(run):
        was, now = outcome(before) == "right", outcome(after) == "right"
        kind = ("kept" if now else "broken") if was else ("fixed" if now else "never")
        kinds[kind].append((before, after))
    if not any(kinds.values()):
        return None
    for found in kinds.values():
        found.sort(key=lambda both: hashlib.sha256(text(both[0].get("question")).encode()).hexdigest())
    wanted = {kind: min(WANTED[kind], len(found)) for kind, found in kinds.items()}
    for kind in ("never", "broken", "kept", "fixed"):  # fill gaps with the least flattering first
        wanted[kind] += min(sum(WANTED.values()) - sum(wanted.values()), len(kinds[kind]) - wanted[kind])
    chosen = [
        Sample(
            kind, text(before.get("task")), _shortened(before.get("question")),
            _shortened(before.get("gold")), _answer(before), _answer(after),
        )
        for kind in KINDS
        for before, after in kinds[kind][: wanted[kind]]
    ]  # fmt: skip
    return chosen, {kind: len(found) for kind, found in kinds.items()}


def _shortened(value: object) -> str:
    whole = text(value)
    return whole if len(whole) <= LONGEST_TEXT else f"{whole[:LONGEST_TEXT]} …"


def _answer(line: Json) -> Json:
    whole = text(line.get("text"))
    return {
        "text": whole[:LONGEST_TEXT],
        "more": max(0, len(whole) - LONGEST_TEXT),
        "outcome": outcome(line),
        "outcome_name": OUTCOME_NAMES[outcome(line)],
        "tokens": number(line.get("tokens")),
    }
