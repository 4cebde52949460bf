"""Held-out questions put to a model, and two rounds of answers compared.

An answer has one of six outcomes and none is folded into another: right, wrong, unparsed (no answer found),
cut_off (it ran out of tokens), timeout (the verifier did), bad_gold (the question itself is broken).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from farthing.data.templates import question_ids
from farthing.data.tokenizer import Tokenizer
from farthing.engine import Engine, Request, Sample, Sampling, load
from farthing.errors import UserError
from farthing.evaluate.statistics import mcnemar, paired_difference, wilson
from farthing.recipe import Grpo, TaskSetting
from farthing.recipe import load as load_recipe
from farthing.tasks import Item
from farthing.tasks.item import Convention
from farthing.tasks.mixture import Mixture, question_key
from farthing.tasks.pool import VerifierPool

OUTCOMES = ("right", "wrong", "unparsed", "cut_off", "timeout", "bad_gold")
PARSED = ("right", "wrong")

Record = dict[str, Any]
"""A line of evaluations/*.jsonl: index, task, question, gold, text, outcome, answer, tokens."""


def ask(
    engine: Engine,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    prompts: Sequence[list[int]],
    sampling: Sampling,
) -> list[tuple[Item, str, Sample]]:
    """One answer to every question: (item, text, sample)."""
    requests = [Request(prompt, sampling, first_sample=number) for number, prompt in enumerate(prompts)]
    answers = engine.generate(requests)
    return [(item, tokenizer.decode(s.ids), s) for item, (s,) in zip(items, answers, strict=True)]


def judge(
    answers: Sequence[tuple[Item, str, Sample]], pool: VerifierPool, convention: Convention
) -> list[Record]:
    """The answers with their outcomes."""
    verdicts = pool.verify([(item, text) for item, text, _ in answers], convention)
    return [
        {
            "index": index,
            "task": item.task,
            "question": item.question,
            "gold": item.answer,
            "text": text,
            "outcome": "cut_off" if sample.finish_reason == "length" else verdict.outcome,
            "answer": verdict.answer,
            "tokens": len(sample.ids),
        }
        for index, ((item, text, sample), verdict) in enumerate(zip(answers, verdicts, strict=True))
    ]


def summarise(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Counts of every outcome, the accuracy and its 95% Wilson interval, overall and by task."""
    summary = _counts(records)
    tasks = sorted({record["task"] for record in records})
    by_task = {task: _counts([r for r in records if r["task"] == task]) for task in tasks}
    return {"name": name, **summary, "by_task": by_task}


def _counts(records: Sequence[Record]) -> dict[str, Any]:
    counts = Counter(record["outcome"] for record in records)
    n = len(records)
    return {
        "n": n,
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "accuracy": counts["right"] / n,
        "ci95": list(wilson(counts["right"], n)),
        "mean_tokens": sum(record["tokens"] for record in records) / n,
    }


def gain(before: Sequence[Record], after: Sequence[Record]) -> dict[str, Any]:
    """What changed, question by question.

    `on_parseable` looks only at the questions where the first model already gave an answer that could be
    read: what it gained there it did not gain by learning the format. `format` is the rest: answers found now
    that were not.

    Raises:
        ValueError: when the two are not answers to the same questions.
    """
    if [r["question"] for r in before] != [r["question"] for r in after]:
        raise ValueError("the two evaluations asked different questions")
    pairs = list(zip(before, after, strict=True))
    readable = [pair for pair in pairs if pair[0]["outcome"] in PARSED]
    unreadable = [pair for pair in pairs if pair[0]["outcome"] not in PARSED]
    out = _difference(pairs)
    out["mcnemar_p"] = mcnemar(*_right(pairs))
    out["on_parseable"] = {"n": len(readable), **(_difference(readable) if readable else {})}
    found = [after for _, after in unreadable if after["outcome"] in PARSED]
    out["format"] = {
        "n": len(unreadable),
        "now_parsed": len(found),
        "now_right": sum(record["outcome"] == "right" for record in found),
        "share_of_all": sum(record["outcome"] == "right" for record in found) / len(pairs),
    }
    return out


def _right(pairs: Sequence[tuple[Record, Record]]) -> tuple[list[bool], list[bool]]:
    before, after = ([pair[side]["outcome"] == "right" for pair in pairs] for side in (0, 1))
    return before, after


def _difference(pairs: Sequence[tuple[Record, Record]]) -> dict[str, Any]:
    difference, low, high = paired_difference(*_right(pairs))
    return {"difference": difference, "ci95": [low, high]}


def trained_questions(source: Path) -> set[str]:
    """The `question_key`s of everything that was trained on in the run that `source` is, or lies in; none for a model
    that comes from no run here."""
    place = source.resolve()
    run = next((folder for folder in (place, *place.parents[:3]) if (folder / "ledger.jsonl").exists()), None)
    if run is None:
        return set()
    recipe = load_recipe(run / "recipe.yaml")
    keys: set[str] = set()
    for number, stage in enumerate(recipe.stages, 1):
        folder = run / "stages" / f"{number:02d}-{stage.kind}"
        for path in folder.glob("data/lessons-*.jsonl"):  # worked solutions that it learnt from
            with path.open(encoding="utf-8") as file:
                keys |= {question_key(json.loads(line)["question"]) for line in file}
        if not isinstance(stage, Grpo):
            continue
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        mixture = Mixture(stage.tasks, recipe.seed)
        last = json.loads(lines[-1])["cursor"] if lines else 0
        keys |= {question_key(mixture.train(index).question) for index in range(last)}
    if recipe.evaluate is not None:  # never trained on, though the stream passes over them
        own = Mixture(recipe.evaluation_tasks(), recipe.seed)
        keys -= {question_key(item.question) for item in own.held_out(recipe.evaluate.held_out)}
    return keys


def evaluate_source(
    source: str | Path,
    tasks: Mapping[str, TaskSetting],
    n: int,
    *,
    answer: Convention,
    prompt: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    speculate: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Evaluate any model: the summary `farthing eval` prints.

    Args:
        device, dtype: as in `load`.
        speculate: tokens to guess a step with the model's prediction modules; the summary then has `acceptance`, for
            each depth the share of right guesses.

    Raises:
        UserError: when the source cannot be loaded, a task does not exist, n is not positive, or the model has too few
            prediction modules.
    """
    if n < 1:
        raise UserError(f"n is {n}; ask at least one question")
    model = load(source, dtype, device)
    items = Mixture(tasks, seed).held_out(n, trained_questions(Path(source)))
    prompts = [question_ids(model.tokenizer, item.question, prompt, system) for item in items]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    engine = model.engine(48, 48 * (max_new_tokens + 1024), speculate=speculate)
    with VerifierPool(workers=max(1, (os.cpu_count() or 2) - 1)) as pool:
        records = judge(ask(engine, model.tokenizer, items, prompts, sampling), pool, answer)
    summary = summarise(str(source), records)
    return {**summary, "acceptance": engine.done().acceptance} if speculate else summary
