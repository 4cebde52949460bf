"""Held-out questions put to a model, and two rounds of answers compared.

An answer has one of six outcomes and none is folded into another: right, wrong, unparsed (no answer found),
cut_off (it ran out of tokens), timeout (the verifier did), bad_gold (the question itself is broken).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.data.tokenizer import Tokenizer, question_ids
from farthing.engine import Engine, Request, Sample, Sampling, load
from farthing.evaluate.score import (
    Record,
    summarise,
)
from farthing.recipe import Grpo, TaskSetting
from farthing.recipe import load as load_recipe
from farthing.tasks import Item
from farthing.tasks.item import Convention
from farthing.tasks.mixture import Mixture, question_key
from farthing.tasks.pool import VerifierPool


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
