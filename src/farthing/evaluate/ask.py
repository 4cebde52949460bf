"""Held-out questions put to a model, and their answers judged.

An answer has one of six outcomes, which are never merged: right, wrong, unparsed (no answer found),
cut_off (it ran out of tokens), timeout (the verifier ran out of time), bad_gold (the question itself is broken).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.figures import plural
from farthing.base.files import read_lines
from farthing.base.waiting import Waiting
from farthing.data.tokenizer import question_ids
from farthing.data.words import question_key
from farthing.engine import Model, Request, Sample, Sampling, load
from farthing.engine.generator import Work
from farthing.evaluate.score import Record, summarise
from farthing.recipe import Asks
from farthing.recipe import load as load_recipe
from farthing.recipe.work import EVALUATED_AT_ONCE, PROMPT_TOKENS
from farthing.tasks import Item
from farthing.tasks.check import check_tasks
from farthing.tasks.item import Convention
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool

_MOST_QUESTIONS = 10**7  # of a run's training; more were never asked


def evaluate(
    model: Model,
    items: Sequence[Item],
    asks: Asks,
    pool: VerifierPool,
    *,
    temperature: float,
    seed: int,
    speculate: int = 0,
    told: Callable[[int, int], None] | None = None,
) -> tuple[list[Record], Work]:
    """Ask a model every question once, and judge its answers.

    Args:
        asks: how to ask, and how to read the answers.
        speculate: tokens to guess a step with the model's prediction modules.
        told: called now and then with the number of questions answered, and of all.

    Returns:
        the records, in the order of `items`; the engine's work, to be booked.
    """
    sampling = Sampling(max_new_tokens=asks.max_new_tokens, temperature=temperature, seed=seed)
    cache_tokens = EVALUATED_AT_ONCE * (asks.max_new_tokens + PROMPT_TOKENS)
    engine = model.engine(EVALUATED_AT_ONCE, cache_tokens, speculate=speculate)
    prompts = (
        question_ids(model.tokenizer, item.asked, asks.prompt, item.system or asks.system) for item in items
    )
    requests = [Request(prompt, sampling, first_sample=number) for number, prompt in enumerate(prompts)]
    samples = [sample for (sample,) in engine.generate(requests, told)]
    texts = [model.tokenizer.decode(sample.ids) for sample in samples]
    return judge(items, texts, samples, pool, asks.answer), engine.done()


def judge(
    items: Sequence[Item],
    texts: Sequence[str],
    samples: Sequence[Sample],
    pool: VerifierPool,
    convention: Convention,
) -> list[Record]:
    """The answers with their outcomes."""
    verdicts = pool.verify(list(zip(items, texts, strict=True)), convention)
    return [
        {
            "index": index,
            "task": item.task,
            "question": item.question,
            "gold": item.answer,
            "text": text,
            "outcome": verdict.outcome_of(sample.finish_reason),
            "answer": verdict.answer,
            "tokens": len(sample.ids),
        }
        for index, (item, text, sample, verdict) in enumerate(
            zip(items, texts, samples, verdicts, strict=True)
        )
    ]


def trained_questions(source: Path) -> set[str]:
    """The `question_key`s of all training questions of the run that `source` is or lies in; empty for a model from
    elsewhere."""
    place = source.resolve()
    run = next((folder for folder in (place, *place.parents[:3]) if (folder / "ledger.jsonl").exists()), None)
    if run is None:
        return set()
    recipe = load_recipe(run / "recipe.yaml")
    keys: set[str] = set()
    for number, stage in enumerate(recipe.stages, 1):
        folder = run / "stages" / f"{number:02d}-{stage.kind}"
        for path in folder.glob("data/lessons-*.jsonl"):  # worked solutions
            keys |= {question_key(str(lesson.get("question"))) for lesson in read_lines(path)}
        if stage.asks is None:
            continue
        metrics = folder / "metrics.jsonl"
        lines = read_lines(metrics)
        mixture = Mixture(stage.asks.tasks, recipe.seed)
        last = lines[-1].get("cursor") if lines else 0
        if not isinstance(last, int) or not 0 <= last <= _MOST_QUESTIONS:
            raise UserError(
                f"{metrics}: its last line does not say how many questions were asked; put it back"
            )
        keys |= {question_key(mixture.train(index).question) for index in range(last)}
    if recipe.evaluate is not None:  # never trained on, though the stream passes over them
        own = Mixture(recipe.evaluation_tasks(), recipe.seed)
        keys -= {question_key(item.question) for item in own.held_out(recipe.evaluate.held_out)}
        apart = own.never_trained(tasks for stage in recipe.stages for tasks in stage.mixtures)
        keys -= set(map(question_key, apart))
    return keys


def evaluate_source(
    source: str | Path,
    asks: Asks,
    n: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    speculate: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate any model on `n` held-out questions; returns the summary that `farthing eval` prints.

    Args:
        device, dtype: as in `load`.
        speculate: tokens to guess a step with the model's prediction modules; the summary then has `acceptance`, the
            share of right guesses at each depth.
        say: called with a line for whatever takes longer than two seconds.

    Raises:
        UserError: when the source cannot be loaded, a task does not exist, n is not positive, or the model has too few
            prediction modules.
    """
    if n < 1:
        raise UserError(f"n is {n}; ask at least one question")
    check_tasks(asks.tasks)
    with Waiting(f"loading {source}", say):
        model = load(source, dtype, device)
    with Waiting("choosing questions", say):
        mixture = Mixture(asks.tasks, seed)
        items = mixture.held_out(n, trained_questions(Path(source)))
    for line in mixture.said:
        say(line)
    with VerifierPool() as pool, Waiting(f"asking {plural(n, 'question')}", say) as waiting:
        records, work = evaluate(
            model,
            items,
            asks,
            pool,
            temperature=temperature,
            seed=seed,
            speculate=speculate,
            told=waiting.at,
        )
    summary = summarise(str(source), records)
    return {**summary, "acceptance": work.acceptance} if speculate else summary
