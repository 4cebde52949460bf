"""Outcomes, intervals and gains of evaluations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

from farthing.evaluate import intervals
from farthing.evaluate.intervals import mcnemar
from farthing.tasks.item import OUTCOMES, READABLE

Record = dict[str, Any]
"""A line of evaluations/*.jsonl, one answer: index, task, question, gold, text, outcome, answer, tokens; sample where a
question was answered several times. docs/evaluation.md lists the keys."""


def summarise(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Counts of every outcome and the accuracy with its 95% interval, overall and by task.

    With several answers to a question `n` still counts questions, the accuracy is pass@1, the mean over them all, and
    pass@k and maj@k are given as well.
    """
    summary = _counts(records)
    tasks = sorted({record["task"] for record in records})
    by_task = {task: _counts([r for r in records if r["task"] == task]) for task in tasks}
    return {"name": name, **summary, "by_task": by_task}


def _counts(records: Sequence[Record]) -> dict[str, Any]:
    questions = by_question(records)
    samples = max(map(len, questions))
    counts = Counter(record["outcome"] for record in records)
    accuracy, low, high = intervals.mean([_share(answers) for answers in questions], samples)
    return {
        "n": len(questions),
        **({"samples": samples} if samples > 1 else {}),
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "accuracy": accuracy,
        "ci95": [low, high],
        **(_over_samples(questions, samples) if samples > 1 else {}),
        **_where_given(records),
        "mean_tokens": sum(record["tokens"] for record in records) / len(records),
    }


def _over_samples(questions: Sequence[Sequence[Record]], samples: int) -> dict[str, Any]:
    sizes = [2**power for power in range(1, samples.bit_length()) if 2**power < samples] + [samples]
    passed = {
        k: [pass_at(k, len(each), sum(map(is_right, each))) for each in questions if len(each) >= k]
        for k in sizes
    }
    return {
        "pass_at": {str(k): _estimate(values, samples) for k, values in passed.items()},
        "maj_at": {str(samples): _estimate([majority(answers) for answers in questions], samples)},
    }


def _where_given(records: Sequence[Record]) -> dict[str, Any]:
    """What only some ways of judging give: acc_norm, and the mean of rewards."""
    found: dict[str, Any] = {}
    if all("right_per_character" in record for record in records):
        found["acc_norm"] = _estimate([float(record["right_per_character"]) for record in records], 1)
    if all("score" in record for record in records):
        found["score"] = sum(record["score"] for record in records) / len(records)
    return found


def _estimate(values: Sequence[float], samples: int) -> dict[str, Any]:
    share, low, high = intervals.mean(values, samples)
    return {"accuracy": share, "ci95": [low, high]}


def by_question(records: Sequence[Record]) -> list[list[Record]]:
    """The answers to each question, in the order in which the questions first come."""
    found: dict[Any, list[Record]] = {}
    for place, record in enumerate(records):
        found.setdefault(record.get("index", f"line {place}"), []).append(record)
    return list(found.values())


def is_right(record: Record) -> bool:
    return bool(record["outcome"] == "right")


def _share(answers: Sequence[Record]) -> float:
    return sum(map(is_right, answers)) / len(answers)


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that one of k answers drawn from these samples is right: an unbiased estimate of pass@k (Chen et al.,
    arXiv:2107.03374, equation 1)."""
    return 1 - comb(samples - right, k) / comb(samples, k)


def majority(answers: Sequence[Record]) -> float:
    """Whether the commonest of the readable answers is right; with several equally common, the share of them that is,
    which is what drawing one of them would come to (Wang et al., arXiv:2203.11171, vote likewise)."""
    votes = Counter(record["answer"] for record in answers if record["outcome"] in READABLE)
    if not votes:
        return 0.0
    most = max(votes.values())
    right = Counter(record["answer"] for record in answers if is_right(record))
    tied = [answer for answer, count in votes.items() if count == most]
    return sum(right[answer] / votes[answer] for answer in tied) / len(tied)


def gain(before: Sequence[Record], after: Sequence[Record]) -> dict[str, Any]:
    """The change from one evaluation to another, question by question.

    `on_parseable` covers the questions where the first model already gave a readable answer: a gain there does not
    come from learning the format. `format` covers the rest: answers that are readable only now. Of several answers to
    a question all must be readable for that, and the shares that are right are compared.

    Raises:
        ValueError: if the two are not answers to the same questions.
    """
    first, second = by_question(before), by_question(after)
    if [answers[0]["question"] for answers in first] != [answers[0]["question"] for answers in second]:
        raise ValueError("the two evaluations asked different questions")
    pairs = list(zip(first, second, strict=True))
    sides: dict[bool, list[tuple[list[Record], list[Record]]]] = {True: [], False: []}
    for pair in pairs:
        sides[all(record["outcome"] in READABLE for record in pair[0])].append(pair)
    readable, unreadable = sides[True], sides[False]
    out = _difference(pairs)
    if max(map(len, first + second)) == 1:
        out["mcnemar_p"] = mcnemar(*([is_right(pair[side][0]) for pair in pairs] for side in (0, 1)))
    out["on_parseable"] = {"n": len(readable), **(_difference(readable) if readable else {})}
    found = [record for _, answers in unreadable for record in answers if record["outcome"] in READABLE]
    gained = sum(_share(now) - _share(then) for then, now in unreadable)
    out["format"] = {
        "n": len(unreadable),
        "now_parsed": len(found),
        "now_right": sum(map(is_right, found)),
        "share_of_all": gained / len(pairs),
    }
    return out


def _difference(pairs: Sequence[tuple[Sequence[Record], Sequence[Record]]]) -> dict[str, Any]:
    before, after = ([_share(pair[side]) for pair in pairs] for side in (0, 1))
    samples = max(len(answers) for pair in pairs for answers in pair)
    difference, low, high = intervals.paired_difference(before, after, samples)
    return {"difference": difference, "ci95": [low, high], "finding": intervals.finding(low, high)}
