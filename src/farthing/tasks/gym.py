"""reasoning-gym's generators (arXiv:2505.24760) as tasks: a seed and an index always name the same item. Those of
`arithmetic` are built in; the others need reasoning-gym.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import sys
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from types import ModuleType
from typing import Any, Literal

from farthing.base.errors import UserError
from farthing.tasks import arithmetic
from farthing.tasks.item import Item
from farthing.tasks.numbers import one_number

_SEEDS_KEPT = 8  # datasets kept per task; making one costs up to 0.2 s
_ENDLESS = 2**62  # the size asked for; datasets make items on demand
_LISTED = ("gsm_symbolic",)  # draws one number per item up front, in order, so its size must stay small
_LISTED_SIZE = 4096
_CHATTY = ("bf",)  # prints a dot per item, where --json needs one object
_SATISFIED = ("zebra_puzzles",)  # asks pycosat whether its puzzle has one solution


class Task:
    """One generator with one config; made by `load_task`."""

    def __init__(self, name: str, config: Mapping[str, Any], scorer: Scorer) -> None:
        self.name = name
        self.config = dict(config)
        self.scorer = scorer
        self._datasets: OrderedDict[int, Any] = OrderedDict()
        self._own = arithmetic.GENERATORS[name](**config) if name in arithmetic.GENERATORS else None

    def item(self, seed: int, index: int) -> Item:
        """Item `index` (any integer from 0 on) of the dataset that `seed` names.

        Nearby seeds share items: most generators draw item i of seed s from Random(s + i). Raises UserError
        if the generator cannot make the item under its config.
        """
        assert index >= 0
        try:
            if self._own is not None:
                question, answer = self._own.item(seed, index)
                return Item(self.name, seed, index, question, answer, {"scorer": self.scorer})
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

    Raises UserError for a generator that does not exist or has no safe scorer, one whose package is not
    installed, an unknown key and a value that the generator refuses.
    """
    scorer = scorer_of(name)
    settings = arithmetic.GENERATORS.get(name) or _factory(name).DATASETS[name][1]
    if name in _SATISFIED and not _importable("pycosat"):
        raise UserError(
            f"tasks: {name} needs pycosat, which comes as source only; install a C compiler, then "
            "pip install pycosat"
        )
    config = config or {}
    fields = [field.name for field in dataclasses.fields(settings)]
    known = [field for field in fields if field not in ("seed", "size")]
    for key in config:
        if key in ("seed", "size"):
            raise UserError(f"tasks: {name}: {key} is set by Farthing; remove it from the task's config")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"tasks: {name} has no setting {key!r}; {hint}")
    try:
        task = Task(name, config, scorer)
        task.item(0, 0)
    except UserError:
        raise
    except (AssertionError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise UserError(f"tasks: {name} does not accept its config {dict(config)}: {error}") from error
    return task


def origin(name: str) -> dict[str, str | None]:
    """Origin of a generator's questions, for the lineage: source, version, license."""
    source, version = f"reasoning-gym:{name}", installed("reasoning-gym")
    if name in arithmetic.GENERATORS:
        source, version = f"{source} (made by Farthing)", arithmetic.VERSION
    return {"source": source, "version": version, "license": "Apache-2.0"}


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def reasoning_gym(module: str = "reasoning_gym") -> Any:
    """Import a module of reasoning-gym, with or without pycosat. Raises ImportError.

    pycosat must be compiled and only one generator uses it, but reasoning-gym imports it for all of them: if it is
    missing, an empty module replaces it during the import.
    """
    if "reasoning_gym" in sys.modules or _importable("pycosat"):
        return importlib.import_module(module)
    blocked = "pycosat" in sys.modules  # None forbids an import
    sys.modules["pycosat"] = ModuleType("pycosat", "Stands in for pycosat, which is not installed.")
    try:
        return importlib.import_module(module)
    finally:
        del sys.modules["pycosat"]
        if blocked:
            sys.modules["pycosat"] = None  # type: ignore[assignment]


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _factory(name: str) -> Any:
    try:
        return reasoning_gym("reasoning_gym.factory")
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing == "reasoning_gym":
            raise UserError(
                f"tasks: {name} needs reasoning-gym; pip install 'farthing[gym]' (a part of it, pycosat, is "
                "compiled; docs/index.md says how to do without)"
            ) from None
        raise UserError(
            f"tasks: {name} needs reasoning-gym, which needs {missing}; pip install 'farthing[gym-parts]'"
        ) from None


def _create(name: str, config: Mapping[str, Any]) -> Any:
    return _factory(name).create_dataset(name, **config)


# "mixed": a whole number for some questions and a word for others; each item says which.
Scorer = Literal["integer", "text", "expression", "mixed"]


_INTEGER = """
    aiw basic_arithmetic binary_alternation chain_sum circuit_logic count_bits count_primes gcd gsm_symbolic
    largest_island lcm leg_counting letter_counting maze number_sequence products rectangle_count
    rotten_oranges self_reference simple_equations simple_geometry
"""


_TEXT = """
    base_conversion bf bitwise_arithmetic color_cube_rotation course_schedule family_relationships
    figlet_font game_of_life_halting mahjong_puzzle needle_haystack path_star spell_backward spiral_matrix
    string_insertion string_manipulation string_splitting string_synthesis syllogism zebra_puzzles
"""


SCORERS: dict[str, Scorer] = {
    **dict.fromkeys(_INTEGER.split(), "integer"),
    **dict.fromkeys(_TEXT.split(), "text"),
    **dict.fromkeys(("countdown", "puzzle24"), "expression"),
    "calendar_arithmetic": "mixed",
}


_REASONS = {
    "its answers are decimals or fractions whose right spelling the question leaves open": """
        advanced_geometry coin_flip complex_arithmetic decimal_arithmetic decimal_chain_sum dice
        fraction_simplification number_format polynomial_equations power_function""",
    "its answers are formulas, and comparing formulas needs an algebra system that runs what it reads": """
        intermediate_integration polynomial_multiplication simple_integration""",
    "its answers are grids of several lines": """
        arc_1d arc_agi binary_matrix futoshiki game_of_life kakurasu manipulate_matrix mini_sudoku modulo_grid
        pool_matrix rearc rotate_matrix sudoku survo""",
    "its answers are lists or tables whose spelling the question leaves open": """
        codeio cryptarithm group_anagrams list_functions number_filtering number_sorting
        palindrome_partitioning prime_factorization word_sequence_reversal word_sorting""",
    "its answers are free sentences": """
        caesar_cipher emoji_mystery knights_knaves letter_jumble sentence_reordering""",
    "its answers are times, which the reading of a last clause would cut at the colon": "time_intervals",
    "its questions have more than one right answer and only one is given": """
        jugs knight_swap n_queens palindrome_generation quantum_lock shortest_path sokoban tower_of_hanoi
        tsumego word_ladder""",
    "its answers can be empty": "ab",
    "it gives no answer to compare with": "boxnet graph_color propositional_logic rubiks_cube rush_hour",
    "its items depend on how many are drawn, so that a seed and an index do not name one": "acre",
    "its items change with PYTHONHASHSEED, so that a seed and an index do not name one": """
        isomorphic_strings ransom_note""",
    "it mixes other generators, which a recipe's `tasks` does": "composite",
}


REFUSED: dict[str, str] = {name: why for why, names in _REASONS.items() for name in names.split()}


def scorer_of(name: str) -> Scorer:
    """The scorer of a generator. Raises UserError when it does not exist or is refused, and says why."""
    if name in SCORERS:
        return SCORERS[name]
    if name in REFUSED:
        raise UserError(f"tasks: {name} cannot be used because {REFUSED[name]}; choose another task")
    near = difflib.get_close_matches(name, [*SCORERS, *REFUSED], n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else f"try {', '.join(list(SCORERS)[:5])}"
    raise UserError(f"tasks: there is no reasoning-gym generator {name!r}; {hint}")
