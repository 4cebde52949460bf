"""Held-out questions put to a model, and their answers judged.

An answer has one of six outcomes, which are never merged: right, wrong, unparsed (no answer found),
cut_off (it ran out of tokens), timeout (the verifier ran out of time), bad_gold (the question itself is broken).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from farthing.data.tokenizer import question_ids
from farthing.engine import Model, Request, Sample, Sampling
from farthing.engine.generator import Work
from farthing.evaluate.choice import choose, has_endings
from farthing.evaluate.score import Record
from farthing.recipe import Asks
from farthing.recipe.work import EVALUATED_AT_ONCE, PROMPT_TOKENS
from farthing.tasks import Item
from farthing.tasks.item import Convention
from farthing.tasks.pool import VerifierPool

JUDGED_AT_ONCE = 16  # answers, so that an interruption loses few


def evaluate(
    model: Model,
    items: Sequence[Item],
    asks: Asks,
    pool: VerifierPool,
    *,
    temperature: float,
    seed: int,
    samples: int = 1,
    by_likelihood: bool = False,
    speculate: int = 0,
    told: Callable[[int, int], None] | None = None,
    kept: Callable[[list[Record]], None] | None = None,
    earlier: Sequence[Record] = (),
) -> tuple[list[Record], Work]:
    """Ask a model every question, and judge its answers.

    Args:
        asks: how to ask, and how to read the answers.
        samples: answers to each question.
        by_likelihood: where a question has endings to choose from, compare their likelihoods instead of asking.
        speculate: tokens to guess a step with the model's prediction modules.
        told: called now and then with the number of questions answered, and of all.
        kept: called with every few records as they come, in no order.
        earlier: records of questions that were answered before and are not asked again.

    Returns:
        the records, in the order of `items` and of each one's samples; the engine's work, to be booked.
    """
    records: list[Record] = list(earlier)
    have = {record["index"] for record in earlier}

    def keep(new: list[Record]) -> None:
        records.extend(new)
        if kept is not None:
            kept(new)

    numbered = [(number, item) for number, item in enumerate(items) if number not in have]
    compared = [each for each in numbered if by_likelihood and has_endings(each[1])]
    asked = [each for each in numbered if not (by_likelihood and has_endings(each[1]))]
    before, work = len(have), Work()
    if compared:
        new = len(compared)
        chosen, work = choose(
            model, compared, told and (lambda share: told(before + int(share * new), len(items)))
        )
        keep(chosen)
    done = before + len(compared)
    if asked:
        sampling = Sampling(max_new_tokens=asks.max_new_tokens, temperature=temperature, seed=seed)
        count = told and (lambda answered, _: told(done + answered, len(items)))
        work += _ask(model, asked, asks, sampling, samples, speculate, pool, count, keep)
    return sorted(records, key=lambda record: (record["index"], record.get("sample", 0))), work


def _ask(
    model: Model,
    numbered: Sequence[tuple[int, Item]],
    asks: Asks,
    sampling: Sampling,
    samples: int,
    speculate: int,
    pool: VerifierPool,
    told: Callable[[int, int], None] | None,
    keep: Callable[[list[Record]], None],
) -> Work:
    requests = [
        Request(
            question_ids(model.tokenizer, item.asked, asks.prompt, item.system or asks.system),
            replace(sampling, stop=tuple(item.metadata.get("until", ()))),
            samples,
            first_sample=number * samples,
        )
        for number, item in numbered
    ]
    at_once = min(EVALUATED_AT_ONCE, len(numbered) * samples)
    longest = max(len(request.ids) for request in requests)  # examples before a question make it long
    cache_tokens = max(at_once * (asks.max_new_tokens + PROMPT_TOKENS), asks.max_new_tokens + longest)
    engine = model.engine(at_once, cache_tokens, speculate=speculate)
    waiting: list[tuple[int, Item, int, Sample]] = []

    def judge_waiting() -> None:
        places, items, numbers, answers = zip(*waiting, strict=True)
        texts = [item.said(model.tokenizer.decode(answer.ids)) for _, item, _, answer in waiting]
        found = judge(items, texts, answers, pool, asks.answer, places, numbers if samples > 1 else None)
        waiting.clear()
        keep(found)

    def ended(place: int, answers: list[Sample]) -> None:
        waiting.extend((*numbered[place], number, answer) for number, answer in enumerate(answers))
        if len(waiting) >= JUDGED_AT_ONCE:
            judge_waiting()

    engine.generate(requests, told, ended)
    if waiting:
        judge_waiting()
    return engine.done()


def judge(
    items: Sequence[Item],
    texts: Sequence[str],
    samples: Sequence[Sample],
    pool: VerifierPool,
    convention: Convention,
    places: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Record]:
    """The answers with their outcomes.

    Args:
        places: the questions' numbers; from 0 up by default.
        numbers: of each answer among those to its question, where there are several.
    """
    verdicts = pool.verify(list(zip(items, texts, strict=True)), convention)
    return [
        {
            "index": index,
            **({} if numbers is None else {"sample": numbers[at]}),
            "task": item.task,
            "question": item.question,
            "gold": item.answer,
            "text": text,
            "outcome": verdict.outcome_of(sample.finish_reason),
            "answer": verdict.answer,
            "tokens": len(sample.ids),
            **({} if verdict.score is None else {"score": verdict.score, "parts": dict(verdict.parts)}),
            **({} if verdict.error is None else {"error": verdict.error}),
        }
        for at, (index, item, text, sample, verdict) in enumerate(
            zip(places or range(len(items)), items, texts, samples, verdicts, strict=True)
        )
    ]
