"""A weighted mixture of tasks: items held out for evaluation, and an endless stream that never shows them."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from random import Random
from typing import Any

from farthing.base.errors import UserError
from farthing.base.schema import checked
from farthing.data.overlap import HeldOut
from farthing.data.words import question_key
from farthing.recipe import TaskSetting
from farthing.tasks.data import DataTask, is_data
from farthing.tasks.gym import Task, load_task
from farthing.tasks.item import Item

_HALF = 2**30  # training seeds lie below, held-out seeds in [2 * _HALF, 3 * _HALF)
_PROBES = 16  # training items drawn per task before a run, to see what is left
_MAX_HELD_OUT = 0.75  # share of probes held out above which too few questions are left
_MAX_EXCLUDED = 1000  # excluded items in a row


class Mixture:
    """Tasks by name, each with a weight, with a table as in a recipe, or as a recipe's `TaskSetting`.

    Raises UserError for no tasks, a weight that is not positive, and what `load_task` and `DataTask` raise.
    """

    def __init__(self, tasks: Mapping[str, float | Mapping[str, Any] | TaskSetting], seed: int) -> None:
        if not tasks:
            raise UserError("tasks: there are none; name at least one, as in {chain_sum: 1}")
        self.seed = seed
        self.tasks: dict[str, Task | DataTask] = {}
        self.weights: dict[str, float] = {}
        for name, given in tasks.items():
            weight = (
                given.get("weight", 1.0) if isinstance(given, Mapping) else getattr(given, "weight", given)
            )
            if not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise UserError(f"tasks: the weight of {name} must be a number above 0, not {weight!r}")
            setting = (
                given
                if isinstance(given, TaskSetting)
                else checked(TaskSetting, _table(given), f"tasks: {name}")
            )
            self.tasks[name] = (
                DataTask(name, setting) if is_data(name, setting) else load_task(name, setting.config)
            )
            self.weights[name] = float(weight)
        self._drawn = _Drawn(self) if len(self.tasks) > 1 and self.data_tasks else None

    @property
    def data_tasks(self) -> list[DataTask]:
        """The tasks whose questions come from data."""
        return [task for task in self.tasks.values() if isinstance(task, DataTask)]

    @property
    def epoch(self) -> int:
        """Places of the stream after which every row of data has come, or nearly; 0 without data."""
        total = sum(self.weights.values())
        return max(
            (math.ceil(len(t.to_train) * total / self.weights[t.name]) for t in self.data_tasks), default=0
        )

    @property
    def said(self) -> list[str]:
        """What there is to say about rows of data that are not used."""
        return [line for task in self.data_tasks for line in task.said]

    def held_out(self, n: int, exclude: Iterable[str] = (), who: str = "") -> list[Item]:
        """`n` items, the same at every call: stratified by weight, in mixed order, no question twice, and none whose
        `question_key` is in `exclude`. Data that has fewer gives all it has.

        Args:
            who: what a sentence about too few begins with: the key of a recipe that wants them.

        Raises UserError when a generator cannot give its share of different questions, or data none at all.
        """
        items: list[Item] = []
        seen = set(exclude)
        for name, count in self._shares(n).items():
            task = self.tasks[name]
            chosen: list[Item] = []
            for item in self._candidates(name, count):
                if len(chosen) == count:
                    break
                key = question_key(item.question)
                if key not in seen:
                    seen.add(key)
                    chosen.append(item)
            if isinstance(task, DataTask) and (chosen or not count):
                pass  # a set of 30 questions is asked whole
            elif isinstance(task, DataTask):
                raise UserError(
                    f"{who}tasks: {name}: every question of {task.questions.source} has been trained on or asked; "
                    "lower held_out, or give more questions"
                )
            elif len(chosen) < count:
                raise UserError(
                    f"{who}tasks: {name} has only about {len(chosen)} different questions with this config and "
                    f"{count} were to be held out; hold out fewer or widen its config"
                )
            items += chosen
        Random(f"{self.seed} order").shuffle(items)
        return items

    def never_trained(self, stages: Iterable[Mapping[str, TaskSetting]]) -> set[str]:
        """Every question of data that is here for evaluation alone: none of these mixtures of tasks trains on the same
        source."""
        mixtures = [Mixture(tasks, self.seed) for tasks in stages]
        trained = {task.training.source for each in mixtures for task in each.data_tasks if task.training}
        apart = [task for task in self.data_tasks if task.questions.source not in trained]
        return set().union(*(task.every_question() for task in apart))

    def train(self, index: int) -> Item:
        """Item `index` of the endless training stream, held-out questions included."""
        return self._train(*(self._drawn.at(index) if self._drawn else (self._name(index), index)))

    def stream(self, exclude: HeldOut, fits: Callable[[Item], bool] = lambda _: True) -> Stream:
        """The training stream without the questions in `exclude`, however they are written.

        Args:
            fits: whether a question is short enough to be asked.

        Raises UserError when that leaves a task (almost) without questions.
        """
        for name in self.tasks if exclude else ():
            questions = [self._train(name, index).question for index in range(_PROBES)]
            if sum(map(exclude.holds, questions)) > _MAX_HELD_OUT * _PROBES:
                raise UserError(nothing_left(self.tasks[name]))
        return Stream(self, exclude, fits)

    def _name(self, index: int) -> str:
        """The task of item `index` of the stream."""
        return Random(f"{self.seed} task {index}").choices(list(self.tasks), list(self.weights.values()))[0]

    def _candidates(self, name: str, count: int) -> Iterator[Item]:
        task = self.tasks[name]
        if isinstance(task, DataTask):
            return task.held_out()
        seed = 2 * _HALF + self._seed("held out", name)
        return (task.item(seed, index) for index in range(20 * count + 200))

    def _train(self, name: str, index: int) -> Item:
        return self.tasks[name].item(self._seed("train", name), index)

    def _seed(self, purpose: str, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed} {purpose} {name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % _HALF

    def _shares(self, n: int) -> dict[str, int]:
        """Each task's share of `n` items: proportional, the largest remainders rounded up."""
        total = sum(self.weights.values())
        exact = {name: n * weight / total for name, weight in self.weights.items()}
        shares = {name: int(share) for name, share in exact.items()}
        by_remainder = sorted(shares, key=lambda name: shares[name] - exact[name])
        for name in by_remainder[: n - sum(shares.values())]:
            shares[name] += 1
        return shares


class _Drawn:
    """Which item of which task each place of a mixed stream has. Rows of data are counted by task, so that an epoch
    leaves none out; made up to where it was asked, from nothing but the seed."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture, self._names = mixture, list(mixture.tasks)
        self._tasks, self._places = array("H"), array("I")
        self._counts = dict.fromkeys(self._names, 0)

    def at(self, index: int) -> tuple[str, int]:
        for place in range(len(self._tasks), index + 1):
            name = self._mixture._name(place)
            self._tasks.append(self._names.index(name))
            self._places.append(self._counts[name])
            self._counts[name] += 1
        name = self._names[self._tasks[index]]
        is_data = isinstance(self._mixture.tasks[name], DataTask)
        return name, self._places[index] if is_data else index


class Stream:
    """A mixture's training items from any cursor on; has no state, so the cursor alone resumes it."""

    def __init__(self, mixture: Mixture, exclude: HeldOut, fits: Callable[[Item], bool]) -> None:
        self.fits = fits
        self.mixture = mixture
        self.exclude = exclude

    def take(self, cursor: int, n: int) -> tuple[list[Item], int]:
        """The next `n` items from `cursor` on, and the cursor after them.

        A question that is held out or too long is skipped together with its place in the stream, so a task that loses
        many comes up a little less often than its weight says. Raises UserError when only such questions come.
        """
        items: list[Item] = []
        excluded = 0
        while len(items) < n:
            item = self.mixture.train(cursor)
            cursor += 1
            fits = self.fits(item)
            if fits and not (self.exclude and self.exclude.holds(item.question)):
                items.append(item)
                excluded = 0
                continue
            excluded += 1
            if excluded == _MAX_EXCLUDED and not fits:
                raise UserError(
                    f"tasks: {item.task}: hardly any question leaves room for an answer in the model's context; lower "
                    "max_new_tokens, take fewer shots, or a model with a longer context"
                )
            if excluded == _MAX_EXCLUDED:
                raise UserError(nothing_left(self.mixture.tasks[item.task]))
        return items, cursor


def _table(given: Any) -> dict[str, Any]:
    return dict(given) if isinstance(given, Mapping) else {"weight": float(given)}


def nothing_left(task: Task | DataTask) -> str:
    """That holding questions out leaves a task without any, and what to do."""
    if isinstance(task, DataTask):
        assert task.training is not None
        return (
            f"tasks: {task.name}: of the {len(task.training):,} questions of {task.training.source} (almost) all are "
            "held out and none are left to train on; lower held_out or subset of evaluate, or give more questions"
        )
    return (
        f"tasks: {task.name} has so few different questions with this config that holding some out leaves "
        "(almost) none to train on; hold out fewer or widen its config"
    )
