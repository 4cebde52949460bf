"""What a run's model was trained on, so that none of it is asked of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.files import read_json, read_lines
from farthing.data.overlap import HeldOut
from farthing.data.rows import rows
from farthing.data.text import Problems
from farthing.data.words import question_key
from farthing.recipe import Recipe
from farthing.recipe import load as load_recipe
from farthing.tasks.item import Item
from farthing.tasks.mixture import Mixture

Say = Callable[[str], None]
_MOST_QUESTIONS = 10**7  # of a run's training; more were never asked


def trained_questions(source: Path, say: Say = lambda _: None) -> set[str]:
    """The `question_key`s of all training questions of the run that `source` is or lies in, and of the run that its
    base came from; empty for a model from elsewhere.

    Args:
        say: called with a sentence for data that are gone or have changed since, so that what trained is not known.
    """
    run = _run_of(source)
    if run is None:
        return set()
    recipe = load_recipe(run / "recipe.yaml")
    keys: set[str] = set()
    known = True
    for number, stage in enumerate(recipe.stages, 1):
        folder = run / "stages" / f"{number:02d}-{stage.kind}"
        for path in folder.glob("data/lessons-*.jsonl"):  # worked solutions
            keys |= {question_key(str(lesson.get("question"))) for lesson in read_lines(path)}
        if stage.asks is None:
            continue
        metrics = folder / "metrics.jsonl"
        lines = read_lines(metrics)
        last = lines[-1].get("cursor") if lines else 0
        if not isinstance(last, int) or not 0 <= last <= _MOST_QUESTIONS:
            raise UserError(
                f"{metrics}: its last line does not say how many questions were asked; put it back"
            )
        try:
            mixture = Mixture(stage.asks.tasks, recipe.seed)
        except UserError as error:
            say(f"{error}: which of its questions {run} trained on is not known, and some may be asked again")
            known = False
            continue
        if (changed := _changed(mixture, run)) is None:
            keys |= {question_key(mixture.train(index).question) for index in range(last)}
            continue
        say(f"{changed} has changed since {run} trained on it, so all its questions count as trained on")
        known = False
        keys |= {question_key(question) for task in mixture.data_tasks for question in task.every_trained()}
    if known:  # never trained on, though the stream passes over them
        keys.difference_update(map(question_key, _never(recipe)))
    return keys | before(recipe)


def _changed(mixture: Mixture, run: Path) -> str | None:
    """Data of a mixture that are not those a run has recorded; None if all are."""
    recorded = read_json(run / "lineage.json").get("data") if mixture.data_tasks else None
    hashes = {entry.get("source"): entry.get("sha256") for entry in recorded or [] if isinstance(entry, dict)}
    for task in mixture.data_tasks:
        for entry in task.origins(license_too=False):
            if hashes.get(entry["source"]) != entry["sha256"]:
                return str(entry["source"])
    return None


def before(recipe: Recipe) -> set[str]:
    """The `trained_questions` of a recipe's base, where that is another run's model."""
    base = Path(recipe.base) if recipe.base else None
    return trained_questions(base) if base is not None and base.exists() else set()


def untrained(mixtures: Sequence[tuple[Mixture, int]], sources: Iterable[Path], say: Say) -> list[list[Item]]:
    """So many items of each mixture, none of which a model of the sources was trained on, be it as a question or
    somewhere in its conversations and documents.

    Args:
        say: called with a sentence for data that cannot be read any more.
    """
    sources = list(sources)
    trained = set().union(*(trained_questions(source, say) for source in sources))
    looked_for: set[str] = set()
    while True:
        found = [mixture.held_out(n, trained) for mixture, n in mixtures]
        index = HeldOut({item.question for items in found for item in items} - looked_for)
        looked_for.update(index.questions)
        told, say = say, lambda _: None  # once
        met = (
            {one.text for source in sources for text in _texts(source, told) for one in index.matches(text)}
            if index
            else set()
        )
        if not met:
            return found
        trained.update(map(question_key, met))


def _texts(source: Path, say: Say) -> Iterator[str]:
    """Every text in the data of the run that `source` lies in, but for the rows that it left out."""
    run = _run_of(source)
    if run is None:
        return
    recipe = load_recipe(run / "recipe.yaml")
    left_out = HeldOut(_never(recipe))
    for path in dict.fromkeys(one.path for stage in recipe.stages for one in stage.sources if one.path):
        if path.startswith("hf:"):
            say(f"{path} is not read again, so a question that stands in it may be asked")
            continue
        try:
            for row, _ in rows(path, Problems("skip", lambda _: None), set()):
                texts = list(_strings(row))
                if not any(map(left_out.holds, texts)):
                    yield from texts
        except UserError as error:
            say(f"what was trained on cannot be read any more, so a question in it may be asked: {error}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _never(recipe: Recipe) -> list[str]:
    """The questions that no stage of a run trains on."""
    if recipe.evaluate is None:
        return []
    own = Mixture(recipe.evaluation_tasks(), recipe.seed)
    held_out = own.held_out(recipe.evaluate.held_out, before(recipe))
    apart = own.never_trained(tasks for stage in recipe.stages for tasks in stage.mixtures)
    return list(dict.fromkeys([*(item.question for item in held_out), *sorted(apart)]))


def _run_of(source: Path) -> Path | None:
    place = source.resolve()
    return next(
        (folder for folder in (place, *place.parents[:3]) if (folder / "ledger.jsonl").exists()), None
    )
