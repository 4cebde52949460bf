"""reasoning-gym's generators (arXiv:2505.24760) as tasks: a seed and an index name an item, for good."""

from __future__ import annotations

import dataclasses
import difflib
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from typing import Any

from farthing.errors import UserError
from farthing.tasks.generators import Scorer, scorer_of
from farthing.tasks.item import Item
from farthing.tasks.numbers import one_number

_SEEDS_KEPT = 8  # datasets kept per task; making one costs up to 0.2 s
_ENDLESS = 2**62  # the size asked for; datasets make items on demand
_LISTED = ("gsm_symbolic",)  # draws one number per item up front, in order: its size has to be kept small
_LISTED_SIZE = 4096
_CHATTY = ("bf",)  # prints a dot an item, where --json wants one object


class Task:
    """One generator with one config; made by `load_task`."""

    def __init__(self, name: str, config: Mapping[str, Any], scorer: Scorer) -> None:
        self.name = name
        self.config = dict(config)
        self.scorer = scorer
        self._datasets: OrderedDict[int, Any] = OrderedDict()

    def item(self, seed: int, index: int) -> Item:
        """Item `index` (any integer from 0 on) of the dataset that `seed` names.

        Nearby seeds share items: most generators draw item i of seed s from Random(s + i). Raises UserError
        where the config leaves the generator no way to make the item.
        """
        assert index >= 0
        try:
            with redirect_stdout(StringIO()) if self.name in _CHATTY else nullcontext():
                entry = self._dataset(seed, index)[index]
        except ValueError as error:
            raise UserError(
                f"tasks: {self.name} cannot make item {index} of seed {seed}: {error}; loosen its config"
            ) from error
        answer, facts = entry["answer"], entry["metadata"]
        assert isinstance(answer, str), f"{self.name} gives the answer {answer!r}"
        metadata: dict[str, Any] = {"scorer": self.scorer}
        if self.scorer == "mixed":
            metadata["scorer"] = "text" if one_number(answer) is None else "integer"
        elif self.scorer == "expression":
            metadata["numbers"] = [int(number) for number in facts["numbers"]]
            metadata["target"] = int(facts.get("target", 24))
            # puzzle24's question names the operators; countdown's only describes how to write two of them
            named = self._dataset(seed, index).config.operators if self.name == "puzzle24" else "+-*/"
            metadata["operators"] = list(named)
        return Item(self.name, seed, index, entry["question"], answer, metadata)

    def _dataset(self, seed: int, index: int) -> Any:
        dataset = self._datasets.get(seed)
        if dataset is None or index >= dataset.size:
            size = _ENDLESS
            if self.name in _LISTED:
                size = max(_LISTED_SIZE, 1 << index.bit_length())
            dataset = _create(self.name, {**self.config, "seed": seed, "size": size})
            self._datasets[seed] = dataset
            if len(self._datasets) > _SEEDS_KEPT:
                self._datasets.popitem(last=False)
        self._datasets.move_to_end(seed)
        return dataset


def load_task(name: str, config: Mapping[str, Any] | None = None) -> Task:
    """The generator `name` with its config's defaults overridden by `config`.

    Raises UserError for a generator that does not exist or has no safe scorer, an unknown key and a value
    that the generator refuses.
    """
    scorer = scorer_of(name)
    from reasoning_gym.factory import DATASETS

    config = config or {}
    fields = [field.name for field in dataclasses.fields(DATASETS[name][1])]
    known = [field for field in fields if field not in ("seed", "size")]
    for key in config:
        if key in ("seed", "size"):
            raise UserError(f"tasks: {name}: {key} is set by Farthing; remove it from the task's config")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"tasks: {name} has no setting {key!r}; {hint}")
    task = Task(name, config, scorer)
    try:
        task.item(0, 0)
    except UserError:
        raise
    except (AssertionError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise UserError(f"tasks: {name} does not accept its config {dict(config)}: {error}") from error
    return task


def _create(name: str, config: Mapping[str, Any]) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(name, **config)
