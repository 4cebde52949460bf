"""What can be known of a recipe's tasks without a model or a network: names, settings, files, columns, rewards."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from farthing.base.errors import UserError
from farthing.base.files import strange
from farthing.base.limits import named
from farthing.base.sources import local_path
from farthing.data.rows import FORMS, check_source
from farthing.data.shapes import placed_conversations
from farthing.data.text import Problems, hub_name
from farthing.recipe import Recipe, Source, TaskSetting
from farthing.recipe.rewards import check_reward
from farthing.tasks import arithmetic
from farthing.tasks.columns import Asked, Unusable, reading
from farthing.tasks.data import columns_of, is_data, parts_of
from farthing.tasks.gym import REFUSED, SCORERS, installed, load_task, scorer_of
from farthing.tasks.sets import SETS
from farthing.tasks.solutions import SOLVABLE
from farthing.tasks.table import sample

NO_SOLUTIONS = (
    "data: {} has no worked solutions: no text that ends in its answer, as GSM8K's rows have; give its file as a path "
    "to learn the answers as they are"
)
_FIRST = 20  # rows without a conversation, after which none is expected


def check(recipe: Recipe) -> None:
    """Refuse what a run of this recipe would fail on later: the base, tasks, their data and rewards, other paths.

    Raises:
        UserError: for the first such mistake.
    """
    if recipe.base is not None:
        try:
            local_path(recipe.base)
        except UserError as error:
            raise UserError(f"base: {error}") from None
    for stage in recipe.stages:
        template = getattr(stage, "chat_template", None)
        for path in stage.paths:
            _exists(path, "give the path of a template" if path == template else f"give {FORMS}")
        if stage.asks:
            check_tasks(stage.asks.tasks, trains=True)
        for source in stage.sources:
            check_tasks(source.tasks or {}, trains=True)
            check_solvable(source.tasks or {})
            if stage.kind == "sft" and source.path is not None:
                _check_conversations(source.path, source)
    if recipe.evaluate is not None:
        check_tasks(recipe.evaluation_tasks())


def check_tasks(tasks: Mapping[str, TaskSetting], trains: bool = False) -> None:
    """Refuse tasks that cannot be asked, or `trains` and cannot be trained on. Raises UserError."""
    for name, setting in tasks.items():
        if is_data(name, setting):
            _check_data(name, setting, trains)
        elif name not in SCORERS and name not in REFUSED:
            raise UserError(_unknown(name))
        else:
            scorer_of(name)
            if name in arithmetic.GENERATORS or installed("reasoning-gym") is not None:
                load_task(name, setting.config)


def check_solvable(tasks: Mapping[str, TaskSetting]) -> None:
    """Refuse generators, and data on this machine, without worked solutions. Raises UserError."""
    for name, setting in tasks.items():
        if is_data(name, setting):
            read = _first_rows(name, setting)
            if read and not any(one.solution for one in read):
                raise UserError(NO_SOLUTIONS.format(name))
        elif name not in SOLVABLE:
            raise UserError(
                f"data: {name} has no worked solutions; those that have are {', '.join(SOLVABLE)}, and data with its "
                "solutions"
            )


def _check_data(name: str, setting: TaskSetting, trains: bool) -> None:
    where, known = f"tasks: {name}", SETS.get(name)
    if setting.config:
        raise UserError(f"{where}: config belongs to a generator; leave it out")
    for part in parts_of(name, setting) or []:
        check_reward(part, where)
    if setting.shots_path is not None:
        check_source(setting.shots_path)
    if setting.path is None and trains and known is not None and known.train is None:
        raise UserError(
            f"{where} is for evaluation only: the set has nothing to train on; name another task, or give a path"
        )
    _first_rows(name, setting)


def _first_rows(name: str, setting: TaskSetting) -> list[Asked]:
    """What the first rows ask and answer, where they are on this machine. Raises UserError if none can be used."""
    if setting.path is None:
        return []
    check_source(setting.path)
    if setting.path.startswith("hf:"):
        return []
    known, where, columns = SETS.get(name), f"tasks: {name}", columns_of(name, setting)
    rows = sample(setting.path, known.prepare if known else None)
    how = reading(columns.question, columns.answer, columns.choices, rows, where, columns.needs_answer)
    read: list[Asked] = []
    why = ""
    for row in rows:
        try:
            read.append(how.read(row))
        except Unusable as reason:
            why = why or str(reason)
    if not read:
        raise UserError(f"{where}: none of the first {len(rows)} rows of {setting.path} can be used: {why}")
    return read


def _check_conversations(path: str, source: Source) -> None:
    """Refuse a file whose first rows hold nothing to learn from. Raises UserError."""
    if path.startswith("hf:"):
        return
    said: list[str] = []

    def report(sentence: str) -> None:
        said.append(sentence.removesuffix("; left out"))
        if len(said) == _FIRST:
            raise UserError(_no_conversation(path, said))

    read = placed_conversations(path, Problems("skip", report), field=source.field, shape=source.shape)
    if next(read, None) is None:
        raise UserError(_no_conversation(path, said))


def _no_conversation(path: str, said: list[str]) -> str:
    why = f"; {said[0]}" if said else ""
    return f"{path} has no conversation in its first rows{why}; farthing data FILE shows what is recognised"


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, [*SETS, *SCORERS, *REFUSED], n=3, cutoff=0.6)
    hint = (
        f"the nearest are {', '.join(near)}" if near else f"there are sets ({', '.join(SETS)}) and generators"
    )
    return f"tasks: there is no task {name!r}; {hint}; data of your own needs a path, as in {{{name}: {{path: …}}}}"


def _exists(source: str, remedy: str) -> None:
    if source.startswith("hf:"):
        hub_name(source)
    elif what := strange(Path(named(source))):
        raise UserError(f"{source} is {what}; {remedy}")
    elif not Path(named(source)).exists():
        raise UserError(f"{source} does not exist; {remedy}")
