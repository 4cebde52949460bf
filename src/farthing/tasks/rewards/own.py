"""Functions of the user's own, as `my_rewards.py:score`. Only the pool's processes import them.

Three signatures are known: (question, answer, completion, row), in any order by these names, or any four arguments in
this order; verl's compute_score(data_source, solution_str, ground_truth, extra_info); and TRL's, with `completions` and
a list for each column of the row, which returns a list. TRL's batches are of one completion here.

What fails is an error with the line of the user's file, never a reward of 0.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import inspect
import math
import numbers
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from farthing.recipe.rewards import Own
from farthing.tasks.item import Item, Outcome
from farthing.tasks.rewards.part import Part

_OURS = ("question", "answer", "completion", "row")
_OUTCOMES = ("right", "wrong", "unparsed")
_READS_MESSAGES = re.compile(r"""\[\s*["']content["']\s*\]|\.get\(\s*["']content["']""")
_SHOWN = 200  # characters of an exception


class _Wrong(Exception):
    """What is wrong with a function, or with what it returned."""


def verify(use: str, item: Item, text: str, settings: Own) -> Part:
    """The reward that the function `use` gives a completion."""
    path, _, name = use.rpartition(":")
    try:
        function = _function(path, name)
        return _part(_call(function, item, text, settings), settings.right_from)
    except BaseException as error:  # a KeyboardInterrupt too: this process hears none of the terminal
        where = item.metadata.get("place", f"row {item.index} of {item.task}")
        return Part("error", error=f"{line_of(error, path)} ({where})")


def prepare(use: str) -> None:
    """Import the file, so that the time this takes is no answer's. What fails fails again for every answer."""
    path, _, name = use.rpartition(":")
    try:
        _function(path, name)
    except BaseException:
        return


def line_of(error: BaseException, path: str) -> str:
    """An exception in one line: the user's file, the line in it that failed, and what failed."""
    file = Path(path)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    try:
        said = " ".join(f"{error}".split())[:_SHOWN]
    except Exception:  # an exception of the user's own that cannot say what it is
        said = ""
    if isinstance(error, _Wrong):
        return f"{file.name}: {said}"
    where = f"{file.name}, line {lines[-1]}" if lines else file.name
    return f"{where}: {type(error).__name__}" + (f": {said}" if said else "")


@functools.cache
def _module(path: str) -> dict[str, Any]:
    file = Path(path)
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))  # as for a script: it may import its neighbours
    name = f"_rewards_of_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    spec.loader.exec_module(module)
    return vars(module)


def _function(path: str, name: str) -> Callable[..., Any]:
    function = _module(path).get(name)
    if not callable(function):
        raise _Wrong(f"{name} is no function")
    return cast(Callable[..., Any], function)


def _call(function: Callable[..., Any], item: Item, text: str, settings: Own) -> Any:
    row: Mapping[str, Any] = item.metadata.get("row") or {}
    taken = inspect.signature(function).parameters
    if "completions" in taken:
        return _only(_awaited(function(**_trl(function, taken, item, text, row, settings.completions))))
    if "solution_str" in taken:
        verl = {
            "data_source": row.get("data_source", item.task),
            "solution_str": text,
            "ground_truth": item.answer,
            "extra_info": row.get("extra_info", {"index": item.index}),
        }
        return _awaited(function(**{name: value for name, value in verl.items() if _takes(taken, name)}))
    ours = dict(zip(_OURS, (item.question, item.answer, text, dict(row)), strict=True))
    needed = [
        name
        for name, parameter in taken.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if "completion" in taken and set(needed) <= set(_OURS):
        return _awaited(function(**{name: value for name, value in ours.items() if _takes(taken, name)}))
    by_place = all(taken[name].kind is not inspect.Parameter.KEYWORD_ONLY for name in needed)
    if len(needed) == 4 and by_place:
        return _awaited(function(*ours.values()))
    raise _Wrong(
        f"{getattr(function, '__name__', 'the function')} takes ({', '.join(taken)}); take (question, answer, "
        "completion, row), as verl (data_source, solution_str, ground_truth, extra_info), or as TRL (completions, …)"
    )


def _trl(
    function: Callable[..., Any],
    taken: Mapping[str, inspect.Parameter],
    item: Item,
    text: str,
    row: Mapping[str, Any],
    form: str,
) -> dict[str, Any]:
    turns = row.get("prompt") if isinstance(row.get("prompt"), list) else None
    messages = form == "messages" or (
        form == "auto" and (turns is not None or _reads_messages(function, taken["completions"]))
    )
    columns = dict.fromkeys(("answer", "solution", "ground_truth"), item.answer) | dict(row)
    values: dict[str, Any] = {
        **columns,
        "prompts": (turns or [{"role": "user", "content": item.question}]) if messages else item.question,
        "completions": [{"role": "assistant", "content": text}] if messages else text,
    }
    return {name: [value] for name, value in values.items() if _takes(taken, name)}


def _reads_messages(function: Callable[..., Any], parameter: inspect.Parameter) -> bool:
    """Whether a function of TRL's kind reads lists of messages, by its annotation or its source. Where a row's prompt
    is a conversation it gets them in any case, as from TRL."""
    if "dict" in str(parameter.annotation).lower():
        return True
    try:
        return _READS_MESSAGES.search(inspect.getsource(function)) is not None
    except (OSError, TypeError):
        return False


def _takes(taken: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())


def _awaited(value: Any) -> Any:
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


def _only(rewards: Any) -> Any:
    """The reward of the only completion that a function of TRL's kind was given."""
    if isinstance(rewards, str | Mapping) or not hasattr(rewards, "__len__"):
        raise _Wrong(f"returned {_given(rewards)} for a list of one completion; return a list of one reward")
    if len(rewards) != 1:
        raise _Wrong(f"returned {len(rewards)} rewards for one completion")
    return rewards[0]


def _part(returned: Any, right_from: float) -> Part:
    """What a function returned: a number, true or false, None for no opinion, or a table or object with more."""
    if returned is None:
        return Part("unparsed", reward=None)
    outcome, answer, value = None, None, returned
    if isinstance(returned, Mapping):
        if "score" not in returned:
            raise _Wrong(f"returned a table without score: {_given(dict(returned))}")
        outcome, answer, value = returned.get("outcome"), returned.get("answer"), returned["score"]
    elif hasattr(returned, "outcome"):
        outcome, answer = returned.outcome, getattr(returned, "answer", None)
        value = getattr(returned, "score", None)
        value = float(outcome == "right") if value is None else value
    if value is None:
        return Part("unparsed", reward=None)
    reward = _number(value)
    if outcome is None:
        outcome = "right" if reward >= right_from else "wrong"
    if outcome not in _OUTCOMES:
        raise _Wrong(f"returned the outcome {_given(outcome)}; the outcomes are {', '.join(_OUTCOMES)}")
    return Part(cast(Outcome, outcome), None if answer is None else str(answer)[:1000], reward)


def _number(value: Any) -> float:
    if not isinstance(value, numbers.Real | Decimal):
        if (
            isinstance(value, str | bytes)
            or getattr(value, "shape", None) != ()
            or not hasattr(value, "item")
        ):
            raise _Wrong(f"returned {_given(value)}, which is no number")
        value = value.item()  # of NumPy, or torch
    reward = float(value)
    if not math.isfinite(reward):
        raise _Wrong(f"returned {reward}; a reward is a finite number")
    return reward


def _given(value: Any) -> str:
    return " ".join(repr(value).split())[:60]
