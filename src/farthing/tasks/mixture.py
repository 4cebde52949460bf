"""A weighted mixture of tasks: items held out for evaluation, and an endless stream that never shows them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from random import Random
from typing import Any

from farthing.base.errors import UserError
from farthing.data.overlap import HeldOut
from farthing.data.words import question_key
from farthing.recipe import TaskSetting
from farthing.tasks.gym import Task, load_task
from farthing.tasks.item import Item

_HALF = 2**30  # training seeds lie below, held-out seeds in [2 * _HALF, 3 * _HALF)
_PROBES = 16  # training items drawn per task before a run, to see what is left
_MAX_HELD_OUT = 0.75  # share of probes held out above which too few questions are left
_MAX_EXCLUDED = 1000  # excluded items in a row


class Mixture:
    """Tasks by name, each with a weight, with {"weight": w, "config": {...}}, or as a recipe's `TaskSetting`.

    Raises UserError for no tasks, a weight that is not positive, and what `load_task` raises.
    """

    def __init__(self, tasks: Mapping[str, float | Mapping[str, Any] | TaskSetting], seed: int) -> None:
        if not tasks:
            raise UserError("tasks: there are none; name at least one, as in {chain_sum: 1}")
        self.seed = seed
        self.tasks: dict[str, Task] = {}
        self.weights: dict[str, float] = {}
        for name, setting in tasks.items():
            weight: Any = setting
            config: dict[str, Any] | None = None
            if isinstance(setting, TaskSetting):
                weight, config = setting.weight, setting.config
            elif isinstance(setting, Mapping):
                weight, config = setting.get("weight", 1.0), setting.get("config")
            if not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise UserError(f"tasks: the weight of {name} must be a number above 0, not {weight!r}")
            self.tasks[name] = load_task(name, config)
            self.weights[name] = float(weight)

    def held_out(self, n: int, exclude: Iterable[str] = ()) -> list[Item]:
        """`n` items, the same at every call: stratified by weight, in mixed order, no question twice, and none whose
        `question_key` is in `exclude`.

        Raises UserError when a task cannot give its share of different questions.
        """
        items: list[Item] = []
        seen = set(exclude)
        for name, count in self._shares(n).items():
            seed = 2 * _HALF + self._seed("held out", name)
            chosen: list[Item] = []
            for index in range(20 * count + 200):
                if len(chosen) == count:
                    break
                item = self.tasks[name].item(seed, index)
                key = question_key(item.question)
                if key not in seen:
                    seen.add(key)
                    chosen.append(item)
            if len(chosen) < count:
                raise UserError(
                    f"tasks: {name} has only about {len(chosen)} different questions with this config and "
                    f"{count} were to be held out; hold out fewer or widen its config"
                )
            items += chosen
        Random(f"{self.seed} order").shuffle(items)
        return items

    def train(self, index: int) -> Item:
        """Item `index` of the endless training stream, held-out questions included."""
        names = list(self.tasks)
        name = Random(f"{self.seed} task {index}").choices(names, list(self.weights.values()))[0]
        return self._train(name, index)

    def stream(self, exclude: HeldOut) -> Stream:
        """The training stream without the questions in `exclude`, however they are written.

        Raises UserError when that leaves a task (almost) without questions.
        """
        for name in self.tasks if exclude else ():
            questions = [self._train(name, index).question for index in range(_PROBES)]
            if sum(map(exclude.holds, questions)) > _MAX_HELD_OUT * _PROBES:
                raise UserError(_nothing_left(name))
        return Stream(self, exclude)

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


class Stream:
    """A mixture's training items from any cursor on; has no state, so the cursor alone resumes it."""

    def __init__(self, mixture: Mixture, exclude: HeldOut) -> None:
        self.mixture = mixture
        self.exclude = exclude

    def take(self, cursor: int, n: int) -> tuple[list[Item], int]:
        """The next `n` items from `cursor` on, and the cursor after them.

        A held-out question is skipped together with its place in the stream, so a task that loses many comes up
        a little less often than its weight says. Raises UserError when only held-out questions come.
        """
        items: list[Item] = []
        excluded = 0
        while len(items) < n:
            item = self.mixture.train(cursor)
            cursor += 1
            if not (self.exclude and self.exclude.holds(item.question)):
                items.append(item)
                excluded = 0
                continue
            excluded += 1
            if excluded == _MAX_EXCLUDED:
                raise UserError(_nothing_left(item.task))
        return items, cursor


def _nothing_left(name: str) -> str:
    return (
        f"tasks: {name} has so few different questions with this config that holding some out leaves "
        "(almost) none to train on; hold out fewer or widen its config"
    )
