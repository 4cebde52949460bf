"""Tasks whose questions come from data: a file, a folder, a dataset of the hub, or a set by its name.

An item's metadata has, for the verifiers and for whoever asks:

scorer      "rewards"
rewards     [{"use", "weight", "settings"}, …], the parts of what an answer earns
row         the row, every column that can be read
place       where the row stands, as in "questions.jsonl:12"
asked       what a model is shown, where that is more than the question: a set's words, and examples before it
system      the system message, where the prompt is a conversation with one
choices     the options in their order, where there are any; the answer is the letter of one
likelihood  {"context", "endings", "right"}, where an answer is also judged by how likely each ending is
until       texts that end an answer
convention  how a set's answers are given, whatever the stage's `answer` says
solution    a worked solution that ends in the answer, where the row has one
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from random import Random
from typing import Any

from farthing.base.errors import UserError
from farthing.base.files import sha256
from farthing.data.rows import Row
from farthing.data.text import files, pinned_revision, said_by_hub
from farthing.recipe import Recipe, RewardPart, TaskSetting
from farthing.recipe.rewards import check_reward, default_reward, model_of
from farthing.tasks.columns import LETTERS, Asked, Template, option_lines
from farthing.tasks.item import Item
from farthing.tasks.sets import QUESTION_ANSWER, SETS, NamedSet
from farthing.tasks.table import Columns, Table, table

_GOLDS = 1000  # answers by which a verifier is chosen
_NEEDS_NO_ANSWER = (
    "code",
    "regex",
    "json",
    "judge",
    "reward_model",
    "format",
    "length",
    "overlong",
    "ifeval",
)
_EPOCHS_KEPT = 2


def is_data(name: str, setting: TaskSetting) -> bool:
    """Whether a task's questions come from data and not from a generator."""
    return setting.path is not None or name in SETS


def parts_of(name: str, setting: TaskSetting) -> list[RewardPart] | None:
    """The rewards of a task as the recipe or the set says; None where the answers decide."""
    if setting.reward is not None:
        return list(setting.reward)
    return list(SETS[name].reward) if name in SETS else None


def rewards_of(recipe: Recipe) -> Iterator[RewardPart]:
    """The parts of all rewards of a recipe, of evaluation too."""
    mixtures = [mixture for stage in recipe.stages for mixture in stage.mixtures]
    mixtures += [recipe.evaluation_tasks()] if recipe.evaluate else []
    tasks = (task for mixture in mixtures for task in mixture.items())
    return (part for name, setting in tasks for part in parts_of(name, setting) or [])


def models_asked(recipe: Recipe) -> dict[str, str]:
    """The models of this machine that rewards ask, by their source; each with what it is: judge or reward_model."""
    return {source: part.use for part in rewards_of(recipe) if (source := model_of(part)) is not None}


def columns_of(name: str, setting: TaskSetting) -> Columns:
    """The columns of a task: the recipe's own, else those of the set of this name."""
    named = SETS.get(name)
    parts = parts_of(name, setting)
    return Columns(
        setting.question or (named.question if named else None),
        setting.answer or (named.answer if named else None),
        setting.choices or (named.choices if named else None),
        parts is None or any(part.use not in _NEEDS_NO_ANSWER and ".py" not in part.use for part in parts),
    )


class DataTask:
    """Questions from data under a name.

    Raises:
        UserError: for data that cannot be read or has not the columns, a reward that does not exist, and examples that
            are not there.
    """

    def __init__(self, name: str, setting: TaskSetting) -> None:
        where = f"tasks: {name}"
        if setting.config:
            raise UserError(f"{where}: config belongs to a generator; leave it out")
        self.name, self.setting, self._where = name, setting, where
        self.set: NamedSet | None = SETS.get(name)
        prepare = self.set.prepare if self.set else None
        columns = columns_of(name, setting)
        source = setting.path or (self.set.source if self.set else None)
        assert source is not None
        self.questions = table(source, columns, where, prepare)
        """Where evaluations draw from; training too, unless a set has a split of its own for it."""
        self.training: Table | None = self.questions
        if setting.path is None and self.set is not None:
            self.training = table(self.set.train, columns, where, prepare) if self.set.train else None
        self._examples: Table | None = None  # a table of nothing else
        self._shots, self._apart = self._choose_shots(columns)
        self.rewards = self._rewards()
        self._orders: dict[tuple[int, int], array[int]] = {}

    @property
    def said(self) -> list[str]:
        """What there is to say about rows that are not used."""
        tables = [self.questions, *([self.training] if self.training not in (None, self.questions) else [])]
        return [line for found in tables if found is not None for line in found.said]

    def item(self, seed: int, index: int) -> Item:
        """Item `index` of an endless stream: every row once, in an order that `seed` decides, then again in another.

        Raises UserError for a set without a part to train on.
        """
        rows = self.to_train
        epoch, place = divmod(index, len(rows))
        order = self._orders.get((seed, epoch))
        if order is None:
            shuffled = list(rows)
            Random(f"{seed} epoch {epoch}").shuffle(shuffled)
            order = self._orders[seed, epoch] = array("q", shuffled)
            while len(self._orders) > _EPOCHS_KEPT:
                self._orders.pop(next(iter(self._orders)))
        assert self.training is not None
        return self._item(self.training, order[place], seed, index)

    def held_out(self) -> Iterator[Item]:
        """Every question that an evaluation may ask, those first whose hash is smallest: as many as are wanted may be
        taken from the front, and whatever was trained on before the data grew is not among the new ones."""
        for place, number in enumerate(self.questions.order):
            if self.questions is not self._apart[0] or number not in self._apart[1]:
                yield self._item(self.questions, number, 0, place)

    def every_question(self) -> Iterator[str]:
        """Every question that an evaluation may ask."""
        return (self.questions.asked(number).question for number in self.questions.order)

    def every_trained(self) -> Iterator[str]:
        """Every question that training may draw."""
        return (
            (self.training.asked(number).question for number in self.to_train) if self.training else iter(())
        )

    @cached_property
    def to_train(self) -> array[int]:
        """Numbers of the rows to train on, by hash."""
        if self.training is None:
            raise UserError(
                f"{self._where} is for evaluation only: the set has nothing to train on; name another task, or give a "
                "path"
            )
        apart = self._apart[1] if self._apart[0] is self.training else frozenset[int]()
        return array("q", (number for number in self.training.order if number not in apart))

    def origins(self, license_too: bool = True) -> list[dict[str, Any]]:
        """Where the rows come from, for the lineage: source, hashes, and what the hub says of revision and licence."""
        tables = {
            id(found): found for found in (self.questions, self.training, self._examples) if found is not None
        }
        return [origin(found, license_too) for found in tables.values()]

    def _rewards(self) -> list[RewardPart]:
        parts = parts_of(self.name, self.setting)
        if parts is None:
            rows = self.questions.order[:_GOLDS]
            read = [self.questions.asked(number) for number in rows]
            parts = [RewardPart(use=default_reward([one.answer for one in read], bool(read[0].choices)))]
        return [check_reward(part, self._where) for part in parts]

    # ---- items ----

    def _item(self, rows: Table, number: int, seed: int, index: int) -> Item:
        place, row = rows.placed(number)
        read = rows.reading.read(row)
        metadata: dict[str, Any] = {
            "scorer": "rewards",
            "rewards": [part.model_dump() for part in self.rewards],
            "row": row,
            "place": place,
        }
        asked = self._asked(row, read)
        if asked != read.question:
            metadata["asked"] = asked
        for key, value in (("system", read.system), ("choices", read.choices), ("solution", read.solution)):
            if value:
                metadata[key] = value
        if self.set is not None:
            # without examples nothing suggests to a model how to go on, and an answer may have paragraphs
            metadata |= {"until": list(self.set.until)} if self.set.until and self._shots else {}
            metadata |= {"convention": self.set.convention} if self.set.convention else {}
        if read.choices and any(part.use == "choice" for part in self.rewards):
            metadata["likelihood"] = self._likelihood(row, read, asked)
        return Item(self.name, seed, index, read.question, read.answer, metadata)

    def _asked(self, row: Row, read: Asked) -> str:
        """The question in the set's words, with examples before it."""
        shots = self._shots_for(row)
        if self.set is None and not shots:
            return read.question
        prompt = self.set.prompt if self.set else QUESTION_ANSWER
        shown = self.set.shown if self.set else " {solution}\nThe answer is {answer}"
        if self.set is None and not all(read.solution for _, read in shots):
            shown = " {answer}"
        blocks = [self._filled(self.set.intro, row, read)] if self.set and self.set.intro else []
        blocks += [self._filled(prompt + shown, *shot) for shot in shots]
        return "\n\n".join([*blocks, self._filled(prompt, row, read)])

    def _likelihood(self, row: Row, read: Asked, asked: str) -> dict[str, Any]:
        """The context and the endings whose likelihoods are compared: letters, or the options themselves where the
        question does not show them, or the set is judged so."""
        assert read.choices
        right = LETTERS.index(read.answer)
        letters = [f" {one}" for one in LETTERS[: len(read.choices)]]
        shots = [(shot, seen) for shot, seen in self._shots_for(row) if seen.choices]
        if self.set is None:
            listed = option_lines(read.choices) in read.question
            blocks = [
                f"{self._filled(QUESTION_ANSWER, *shot)} {shot[1].answer if listed else _right_option(shot[1])}"
                for shot in shots
            ]
            context = "\n\n".join([*blocks, self._filled(QUESTION_ANSWER, row, read)])
            endings = letters if listed else [f" {option}" for option in read.choices]
            return {"context": context, "endings": endings, "right": right}
        if self.set.likelihood == "letters":
            return {"context": asked, "endings": letters, "right": right}
        template = Template(self.set.context, self._where)
        blocks = [f"{template.fill(shot)} {_right_option(seen)}" for shot, seen in shots]
        return {
            "context": "\n\n".join([*blocks, template.fill(row)]),
            "endings": [f" {option}" for option in read.choices],
            "right": right,
        }

    def _filled(self, text: str, row: Row, read: Asked) -> str:
        own = {"question": read.question, "answer": read.answer, "solution": read.solution or read.answer}
        return Template(text, self._where).fill({**row, **own}) if "{" in text else text

    # ---- examples ----

    def _choose_shots(
        self, columns: Columns
    ) -> tuple[list[tuple[Row, Asked]], tuple[Table | None, frozenset[int]]]:
        """The examples, and which rows of which table are therefore not asked."""
        setting, named = self.setting, self.set
        wanted = setting.shots if setting.shots is not None else named.shots if named else 0
        if setting.shots_path is not None and not wanted:
            raise UserError(f"{self._where}: shots_path without shots: say how many")
        if not wanted:
            return [], (None, frozenset())
        source = setting.shots_path or (named.shots_from if named and setting.path is None else None)
        rows = (
            table(source, columns, self._where, named.prepare if named else None)
            if source
            else self.questions
        )
        if rows is self.questions or rows is self.training:
            chosen = list(rows.order[-wanted:])  # the end that evaluations come to last
            if len(rows) <= wanted:
                raise UserError(
                    f"{self._where}: {rows.source} has {len(rows)} rows and shots is {wanted}; take fewer"
                )
            return [(rows.row(n), rows.asked(n)) for n in chosen], (rows, frozenset(chosen))
        self._examples = rows
        found = [(rows.row(number), rows.asked(number)) for number in range(len(rows))]
        where = dict(named.shots_where) if named and setting.shots_path is None else {}
        found = [
            shot for shot in found if all(shot[0].get(column) in values for column, values in where.items())
        ]
        if len(found) < wanted:
            raise UserError(
                f"{self._where}: {rows.source} has {len(found)} rows and shots is {wanted}; take fewer"
            )
        return (found if self._like(found) else found[:wanted]), (None, frozenset())

    def _shots_for(self, row: Row) -> list[tuple[Row, Asked]]:
        """The examples before a question: where a set has them by subject, those of its own."""
        like = self._like(self._shots)
        if like is None:
            return self._shots
        wanted = self.setting.shots if self.setting.shots is not None else self.set.shots if self.set else 0
        return [shot for shot in self._shots if shot[0].get(like) == row.get(like)][:wanted]

    def _like(self, shots: Sequence[tuple[Mapping[str, Any], Asked]]) -> str | None:
        column = self.set.shots_like if self.set else None
        return column if column and all(column in row for row, _ in shots) else None


def _right_option(read: Asked) -> str:
    assert read.choices
    return read.choices[LETTERS.index(read.answer)]


def origin(rows: Table, license_too: bool = True) -> dict[str, Any]:
    """Source, hashes, revision and licence of a table; the last two as the hub says, where it can be asked."""
    if not rows.source.startswith("hf:"):
        digests = {name: sha256(path) for path, name in files(rows.source)}
        return {"source": rows.source, "sha256": digests, "license": None}
    revision, licence = said_by_hub(rows.source) if license_too else (None, None)
    revision = pinned_revision(rows.source) or revision
    return {"source": rows.source, "revision": revision, "sha256": {"rows": rows.sha256}, "license": licence}
